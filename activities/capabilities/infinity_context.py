"""Conversations without end: prompts show the newest messages, and a tool finds the rest.

Old messages leave a prompt in blocks, so that its beginning stays the same for a while and providers' caches good. They leave
before an answer or a message of the user, never between a call and its result; the question of the running turn stays.

With `compaction` configured as well, it alone decides what leaves a prompt, and this only adds the tool.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.messages import Message, Role
from domain.session_past import PastMessages, PastQuery
from domain.tools import SideEffect
from domain.workspace import BadPattern

ID: Final = "infinity_context"
PROMPT: Final = (
    "Only the newest part of this conversation may be in front of you. Look up what was said or done before with `query_history` "
    "when you need it, instead of guessing or asking again."
)


class InfinityContext(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    recent_messages: Annotated[
        int,
        Meta(
            ge=4,
            le=10_000,
            description="At least so many of the newest messages are in a prompt, and at most half as many more.",
        ),
    ] = 100


class QueryHistory(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    query: (
        Annotated[
            str,
            Meta(
                min_length=1, max_length=500, description="Text to find, in any case. Without it: the newest messages."
            ),
        ]
        | None
    ) = None
    regex: Annotated[bool, Meta(description="Whether `query` is a regular expression (RE2), matched line by line.")] = (
        False
    )
    before: Annotated[int, Meta(ge=1, description="Only messages before this `sequence`.")] | None = None
    after: Annotated[int, Meta(ge=0, description="Only messages after this `sequence`.")] | None = None
    limit: Annotated[int, Meta(ge=1, le=50, description="At most so many, the newest that match. Default 10.")] = 10
    role: Literal["user", "agent", "tool_result"] | None = None


async def query_history(context: ToolContext, arguments: QueryHistory) -> PastMessages:
    query = PastQuery(
        limit=arguments.limit,
        text=None if arguments.regex else arguments.query,
        pattern=arguments.query if arguments.regex else None,
        before=arguments.before,
        after=arguments.after,
        role=arguments.role,
    )
    try:
        return await context.past.find(query)
    except BadPattern as error:
        raise ToolError(str(error)) from None


def arrange_messages(messages: list[Message], config: Struct | None) -> list[Message]:
    assert isinstance(config, InfinityContext)
    block = config.recent_messages // 2
    first = (len(messages) - config.recent_messages) // block * block
    while first > 0 and messages[first].role is Role.TOOL_RESULT:
        first -= 1
    if first <= 0:
        return messages
    question = next((place for place in range(len(messages) - 1, -1, -1) if messages[place].role is Role.USER), first)
    return [*messages[question : question + 1], *messages[first:]] if question < first else messages[first:]


CAPABILITY = Capability(
    id=ID,
    name="Infinity Context",
    description="Keeps prompts short by showing the newest messages only, and lets the model search all others.",
    category="Behaviour",
    icon="infinity",
    system_prompt=PROMPT,
    config=InfinityContext,
    arrange_messages=arrange_messages,
    tools=(
        Tool(
            name="query_history",
            display_name="Search the conversation",
            description="Search this session's whole past, also what is not in front of you: messages, tool calls and results. "
            "Results are oldest first; go on with `before` set to the lowest `sequence`.",
            arguments=QueryHistory,
            run=query_history,
            side_effect=SideEffect.PURE,
            timeout_seconds=30.0,
        ),
    ),
)
