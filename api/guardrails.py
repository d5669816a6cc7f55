"""`/v1/capabilities/guardrails`: configurations to start from, and a look at what one would find."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from litestar import Router, get, post
from litestar.params import JSONBody
from msgspec import Meta, Struct

from activities.capabilities.guardrails import EXAMPLES, DryRun, GuardrailExample, Guardrails, Stage, dry_run
from api.problems import declared
from domain.errors import InputTooLarge, invalid_field

TEXT_MAX_CHARACTERS = 100_000
"""Of a sample. A text in a session may be of any length."""


class GuardrailExamples(Struct, frozen=True, kw_only=True):
    examples: list[GuardrailExample]


class DryRunRequest(Struct, frozen=True, kw_only=True):
    """`text` is what the stage looks at: an answer, a call's arguments as JSON, or a tool's result. `config` is that of the
    capability, and wrong for the same reasons."""

    config: dict[str, object]
    stage: Stage
    text: str
    tool_name: Annotated[str, Meta(max_length=256)] | None = None


@get(
    "/examples",
    operation_id="list_guardrail_examples",
    summary="List guardrail examples",
    responses=declared(),
)
async def list_guardrail_examples() -> GuardrailExamples:
    """Configurations of the capability `guardrails`, to be taken over as they are or changed."""
    return GuardrailExamples(examples=list(EXAMPLES))


@post(
    "/dry-run",
    operation_id="dry_run_guardrails",
    summary="Try guardrails out",
    status_code=200,
    responses=declared(413),
)
async def dry_run_guardrails(data: JSONBody[DryRunRequest]) -> DryRun:
    """What a configuration would find in a text. Nothing is stored, and the text goes nowhere."""
    if len(data.text) > TEXT_MAX_CHARACTERS:
        raise InputTooLarge(
            f"Input exceeds allowed limits: `text` may hold {TEXT_MAX_CHARACTERS} characters", field="text"
        )
    try:
        config = msgspec.convert(data.config, Guardrails)
    except msgspec.ValidationError as error:
        raise invalid_field(error, "config") from None
    return await asyncio.to_thread(dry_run, config, data.stage, data.text, data.tool_name)


router = Router(
    "/capabilities/guardrails", tags=["Capabilities"], route_handlers=[list_guardrail_examples, dry_run_guardrails]
)
