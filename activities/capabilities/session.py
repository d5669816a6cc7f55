"""Lets a model know its session, and name it."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.session_info import SessionInfo
from domain.tools import SideEffect

AUTO_TITLE_PROMPT: Final = """\
Give this session a title: in your first turn, call `write_session_title` once, with three to seven words in the user's language \
that say what the user wants. Do it beside your work and don't mention it. Later, change the title only when you are asked to."""


class SessionConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    auto_title: Annotated[
        bool, Meta(description="Ask the model to name the session in its first turn. Default: false.")
    ] = False


class GetSessionInfo(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class WriteSessionTitle(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    title: Annotated[str, Meta(min_length=1, max_length=200, description="The new title, in one line.")]


async def get_session_info(context: ToolContext, _arguments: GetSessionInfo) -> SessionInfo:
    return await context.session_info()


async def write_session_title(context: ToolContext, arguments: WriteSessionTitle) -> dict[str, object]:
    title = " ".join(arguments.title.replace("\0", " ").split())
    if not title:
        raise ToolError("`title` must not be blank.")
    await context.set_title(title)
    return {"title": title}


def prompt_for(config: Struct | None) -> str | None:
    return AUTO_TITLE_PROMPT if isinstance(config, SessionConfig) and config.auto_title else None


CAPABILITY = Capability(
    id="session",
    name="Session",
    description="Lets the model look up facts about its session and change the session's title.",
    category="Session",
    icon="panel-left",
    config=SessionConfig,
    config_prompt=prompt_for,
    tools=(
        Tool(
            name="get_session_info",
            display_name="Get session info",
            description="Get this session's id, title, agent, harness, model, age, number of turns and token usage.",
            arguments=GetSessionInfo,
            run=get_session_info,
            side_effect=SideEffect.PURE,
            timeout_seconds=10.0,
        ),
        Tool(
            name="write_session_title",
            display_name="Write session title",
            description="Change this session's title, which people see in the list of sessions.",
            arguments=WriteSessionTitle,
            run=write_session_title,
            side_effect=SideEffect.IDEMPOTENT,
            timeout_seconds=10.0,
        ),
    ),
)
