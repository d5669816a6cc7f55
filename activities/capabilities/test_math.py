"""Arithmetic with an exact answer: the simplest tools to try an agent with."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from operator import add, mul, sub, truediv
from typing import Annotated

from msgspec import Meta, Struct

from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.tools import SideEffect


class Operands(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    a: Annotated[float, Meta(description="The first number.")]
    b: Annotated[float, Meta(description="The second number.")]


def _divide(a: float, b: float) -> float:
    if b == 0:
        raise ToolError(f"Cannot divide {a:g} by zero.")
    return truediv(a, b)


def _run(operation: Callable[[float, float], float]) -> Callable[[ToolContext, Operands], Awaitable[object]]:
    async def run(_context: ToolContext, arguments: Operands) -> dict[str, object]:
        result = operation(arguments.a, arguments.b)
        if not math.isfinite(result):
            raise ToolError("The result is too large to be represented.")
        # A whole number reads better without `.0`; past 2**53 a float no longer knows its last digits.
        return {"result": int(result) if result.is_integer() and abs(result) <= 2**53 else result}

    return run


def _tool(name: str, description: str, operation: Callable[[float, float], float]) -> Tool:
    return Tool(
        name=name,
        display_name=name.capitalize(),
        description=description,
        arguments=Operands,
        run=_run(operation),
        side_effect=SideEffect.PURE,
        timeout_seconds=10.0,
    )


CAPABILITY = Capability(
    id="test_math",
    name="Test Math",
    description="Four exact calculations, for trying out tool calls.",
    category="Testing",
    icon="calculator",
    system_prompt="Calculate with the tools `add`, `subtract`, `multiply` and `divide` instead of in your head.",
    tools=(
        _tool("add", "Add two numbers: a + b.", add),
        _tool("subtract", "Subtract the second number from the first: a - b.", sub),
        _tool("multiply", "Multiply two numbers: a * b.", mul),
        _tool("divide", "Divide the first number by the second: a / b. Fails when b is zero.", _divide),
    ),
)
