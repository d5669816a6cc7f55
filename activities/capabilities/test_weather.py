"""Invented weather that is always the same for the same place: hashed, not measured."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from msgspec import Meta, Struct

from domain.capabilities import Capability, Tool, ToolContext
from domain.tools import SideEffect

Units = Annotated[Literal["celsius", "fahrenheit"], Meta(description="Unit of temperatures; default celsius.")]
Location = Annotated[str, Meta(min_length=1, max_length=200, description="A city or place, such as 'Lisbon'.")]

_CONDITIONS = ("sunny", "partly cloudy", "cloudy", "light rain", "heavy rain", "thunderstorm", "snow", "fog", "windy")
_COLDEST_CELSIUS, _WARMEST_CELSIUS = -10, 35


class GetWeather(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    location: Location
    units: Units = "celsius"


class GetForecast(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    location: Location
    days: Annotated[int, Meta(ge=1, le=7, description="How many days from today, 1 to 7; default 3.")] = 3
    units: Units = "celsius"


async def get_weather(_context: ToolContext, arguments: GetWeather) -> dict[str, object]:
    return {"location": arguments.location, "units": arguments.units} | _weather(arguments.location, 0, arguments.units)


async def get_forecast(_context: ToolContext, arguments: GetForecast) -> dict[str, object]:
    days = [{"day": day} | _weather(arguments.location, day, arguments.units) for day in range(1, arguments.days + 1)]
    return {"location": arguments.location, "units": arguments.units, "forecast": days}


def _weather(location: str, day: int, units: str) -> dict[str, object]:
    dice = hashlib.sha256(f"{location.strip().casefold()}\0{day}".encode("utf-8", "replace")).digest()
    celsius = _COLDEST_CELSIUS + dice[0] % (_WARMEST_CELSIUS - _COLDEST_CELSIUS + 1)
    return {
        "temperature": celsius if units == "celsius" else round(celsius * 9 / 5 + 32),
        "condition": _CONDITIONS[dice[1] % len(_CONDITIONS)],
        "humidity_percent": 20 + dice[2] % 80,
        "wind_kmh": dice[3] % 60,
    }


CAPABILITY = Capability(
    id="test_weather",
    name="Test Weather",
    description="Invented but repeatable weather, for trying out tool calls without a network.",
    category="Testing",
    icon="cloud-sun",
    system_prompt="Answer questions about the weather with `get_weather` (now) and `get_forecast` (the next days).",
    tools=(
        Tool(
            name="get_weather",
            display_name="Get weather",
            description="Get the current weather at a place.",
            arguments=GetWeather,
            run=get_weather,
            side_effect=SideEffect.PURE,
            timeout_seconds=10.0,
        ),
        Tool(
            name="get_forecast",
            display_name="Get forecast",
            description="Get the weather forecast of a place for up to seven days.",
            arguments=GetForecast,
            run=get_forecast,
            side_effect=SideEffect.PURE,
            timeout_seconds=10.0,
        ),
    ),
)
