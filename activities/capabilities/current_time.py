"""What time it is: models have no clock."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from msgspec import Meta, Struct

from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.tools import SideEffect


class GetCurrentTime(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    timezone: (
        Annotated[str, Meta(description="IANA time zone such as Europe/Berlin. Default: the user's, or UTC.")] | None
    ) = None
    format: Annotated[
        Literal["iso8601", "unix", "human"],
        Meta(description="iso8601 (default), unix (seconds since 1970) or human (a sentence)."),
    ] = "iso8601"


async def get_current_time(context: ToolContext, arguments: GetCurrentTime) -> dict[str, object]:
    name, zone = _zone(context, arguments.timezone)
    now = datetime.now(zone).replace(microsecond=0)
    return {"current_time": _formatted(now, arguments.format), "timezone": name}


def _formatted(moment: datetime, style: str) -> str | int:
    match style:
        case "unix":
            return int(moment.timestamp())
        case "human":
            offset = moment.strftime("%z")
            return f"{moment:%A}, {moment.day} {moment:%B %Y}, {moment:%H:%M:%S} (UTC{offset[:3]}:{offset[3:5]})"
        case _:
            return moment.isoformat()


def _zone(context: ToolContext, wanted: str | None) -> tuple[str, tzinfo]:
    if wanted is not None:
        zone = _find(wanted)
        if zone is None:
            raise ToolError(
                f"Unknown time zone `{wanted}`. Use an IANA name of the form Area/City, such as Europe/Berlin, "
                "America/New_York or Asia/Tokyo, or UTC."
            )
        return wanted, zone
    # A client's wrong time zone is not the model's mistake: it gets UTC, and is told so in the result.
    if context.timezone is not None and (zone := _find(context.timezone)) is not None:
        return context.timezone, zone
    return "UTC", UTC


def _find(name: str) -> tzinfo | None:
    if name.upper() in ("UTC", "Z"):  # must work even where no time zone database is installed
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # OSError: the name of a directory of zones, such as America
        return None


CAPABILITY = Capability(
    id="current_time",
    name="Current Time",
    description="Tells the model the current date and time in any time zone.",
    category="Utilities",
    icon="clock",
    tools=(
        Tool(
            name="get_current_time",
            display_name="Get current time",
            description="Get the current date and time. Use it whenever an answer depends on today's date or the hour.",
            arguments=GetCurrentTime,
            run=get_current_time,
            side_effect=SideEffect.PURE,
            timeout_seconds=10.0,
        ),
    ),
)
