"""`GET /v1/sessions/{session_id}/context-report`: what the next model call would read, and where it comes from.

Put together by the functions that put prompts together. Tokens are estimates, corrected by what the session's provider counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import asyncpg
from litestar import Router, get
from litestar.di import NamedDependency
from litestar.params import FromPath
from msgspec import Struct

from activities.capabilities.assembly import offered_tools
from activities.capabilities.declared import DeclaredCapabilities
from activities.capabilities.registry import ResolvedCapabilities
from activities.capabilities.turn_capabilities import TurnCapabilities
from api.problems import declared
from api.services import Services
from db import sessions
from db.model_choice import ModelChooser
from db.session_context import SessionContext, read_session_context
from db.session_resources import DatabaseResources
from domain.checkpoints import is_checkpoint_message
from domain.events import TokenUsage
from domain.ids import Prefix, format_id
from domain.messages import Message, Role, ToolResultPart
from domain.model import ModelEndpoint
from domain.token_estimate import MESSAGE_TOKENS, message_tokens, text_tokens, tool_tokens

LABEL_CHARACTERS: Final = 60

SECTIONS: Final = {
    "system_prompt": "System prompt",
    "capabilities": "Prompts of capabilities",
    "tools": "Tools",
    "checkpoint": "Summary of earlier messages",
    "history_user": "User messages",
    "history_agent": "Agent messages",
    "history_tool_results": "Tool results",
}

HISTORY: Final = {
    Role.USER: "history_user",
    Role.SYSTEM: "history_user",
    Role.AGENT: "history_agent",
    Role.TOOL_RESULT: "history_tool_results",
}


class ContextReportSection(Struct, frozen=True, kw_only=True):
    key: str
    label: str
    tokens: int
    items: int


class ContextReportContribution(Struct, frozen=True, kw_only=True):
    section_key: str
    source_id: str
    label: str
    tokens: int


class SessionContextReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`contributions` add up to `sections`, and those to `estimated_input_tokens`; sections without anything are left out."""

    session_id: str
    model: str
    estimated_input_tokens: int
    sections: list[ContextReportSection]
    contributions: list[ContextReportContribution]
    context_window_tokens: int | None = None
    cumulative_usage: TokenUsage | None = None


@get(
    "/{session_id:str}/context-report",
    operation_id="get_session_context_report",
    summary="What fills the context",
    responses=declared(),
)
async def get_session_context_report(
    services: NamedDependency[Services], session_id: FromPath[str]
) -> SessionContextReport:
    """What the next model call would read, by section and by source. Tokens are estimates."""
    session = (await sessions.get_session(services.database, session_id)).session
    models = ModelChooser(_endpoint, system_model=services.settings.default_model)
    context = await read_session_context(services.database, session_id, models, services.keyring)
    resources = DatabaseResources(services.database.pool, services.keyring)
    capabilities = TurnCapabilities(services.capabilities, resources, [DeclaredCapabilities()])
    resolved = await capabilities.resolve_for_prompt(session_id, context.config)
    contributions = list(_contributions(context, resolved))
    sections = list(_sections(contributions))
    return SessionContextReport(
        session_id=session_id,
        model=context.model.name if context.model else "",
        estimated_input_tokens=sum(section.tokens for section in sections),
        sections=sections,
        contributions=contributions,
        context_window_tokens=context.model and context.model.context_window,
        cumulative_usage=session.usage,
    )


def _endpoint(row: asyncpg.Record) -> ModelEndpoint:
    """Without credentials: nothing is called."""
    return ModelEndpoint(
        provider_type=row["provider_type"], provider_public_id=format_id(Prefix.PROVIDER, row["provider_id"])
    )


def _sections(contributions: Sequence[ContextReportContribution]) -> Iterator[ContextReportSection]:
    for key, label in SECTIONS.items():
        found = [one.tokens for one in contributions if one.section_key == key]
        if found:
            yield ContextReportSection(key=key, label=label, tokens=sum(found), items=len(found))


def _contributions(context: SessionContext, resolved: ResolvedCapabilities) -> Iterator[ContextReportContribution]:
    ratio = context.token_ratio or 1.0

    def part(key: str, source: str, label: str, tokens: float) -> ContextReportContribution:
        return ContextReportContribution(section_key=key, source_id=source, label=label, tokens=round(tokens))

    if context.config.system_prompt:
        tokens = MESSAGE_TOKENS + text_tokens(context.config.system_prompt)
        yield part("system_prompt", "system_prompt", SECTIONS["system_prompt"], ratio * tokens)
    for one in resolved.capabilities:
        if one.prompt:
            yield part("capabilities", one.capability.id, one.capability.name, ratio * text_tokens(one.prompt))
    for tool in offered_tools(context.config, resolved):
        yield part("tools", tool.name, tool.display_name or tool.name, ratio * tool_tokens(tool))
    checkpoint = context.source.checkpoint
    if checkpoint is not None and checkpoint.native is not None:
        label = "Compacted by the provider"
        yield part("checkpoint", str(checkpoint.id), label, checkpoint.native_tokens)
    for key, source, label, message in _history(context.source.conversation.messages):
        yield part(key, source, label, ratio * message_tokens(message))


def _history(messages: Iterable[Message]) -> Iterator[tuple[str, str, str, Message]]:
    """Section, source, label, message."""
    names: dict[str, str] = {}
    for message in messages:
        if is_checkpoint_message(message):
            yield "checkpoint", message.id, SECTIONS["checkpoint"], message
            continue
        names.update((call.id, call.name) for call in message.tool_calls)
        result = next((part for part in message.content if isinstance(part, ToolResultPart)), None)
        if result is not None:
            yield HISTORY[message.role], result.tool_call_id, names.get(result.tool_call_id, "tool"), message
            continue
        label = message.text.strip()[:LABEL_CHARACTERS] or ", ".join(call.name for call in message.tool_calls)
        yield HISTORY[message.role], message.id, label or message.role.value, message


router = Router("/sessions", tags=["Sessions"], route_handlers=[get_session_context_report])
