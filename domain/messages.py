"""Messages and their content parts.

There is no table of messages: a message is the payload of an event (`input.message`, `output.message.completed`,
`tool.completed`) and every list of messages is a projection of the log.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from msgspec import Struct


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    AGENT = "agent"
    TOOL_RESULT = "tool_result"


class Phase(StrEnum):
    """Whether an agent message talks about work in progress or is the turn's answer."""

    COMMENTARY = "commentary"
    FINAL_ANSWER = "final_answer"


class Delivery(StrEnum):
    """What a message does to a turn that is already running.

    `steer`: read at the running turn's next reason step. `follow_up`: kept for a turn of its own, after this one.
    `interrupt`: the running step is stopped, its partial output kept, and the message is read at once.
    """

    STEER = "steer"
    FOLLOW_UP = "follow_up"
    INTERRUPT = "interrupt"


class TextPart(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="text"):
    text: str


class ImagePart(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="image"):
    """Either `url` or `base64` with its `media_type`."""

    url: str | None = None
    base64: str | None = None
    media_type: str | None = None


class ImageFilePart(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="image_file"):
    image_id: str
    filename: str | None = None


class ToolCallPart(Struct, frozen=True, kw_only=True, tag_field="type", tag="tool_call"):
    id: str
    name: str
    arguments: dict[str, object]


class ToolResultPart(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="tool_result"):
    """`result` on success, `error` otherwise; a result of one text part is that text as a string."""

    tool_call_id: str
    result: object = None
    error: str | None = None


InputPart = TextPart | ImagePart | ImageFilePart
ContentPart = TextPart | ImagePart | ImageFilePart | ToolCallPart | ToolResultPart


class ReasoningControl(Struct, frozen=True, kw_only=True, omit_defaults=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponseFormat(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the answer must look like: any JSON object, or one that fits `schema` (a JSON Schema). `name` is for the provider."""

    type: Literal["json_schema", "json_object"]
    name: str = "answer"
    schema: dict[str, object] | None = None


class Controls(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Per-message wishes; they win over session, agent and harness."""

    model_id: str | None = None
    reasoning: ReasoningControl | None = None
    locale: str | None = None
    hints: dict[str, object] | None = None
    error_disclosure: Literal["generic", "standard", "detailed"] | None = None
    speed: Literal["flex", "default", "priority", "fast", "ultrafast"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    response_format: ResponseFormat | None = None


class ExternalActor(Struct, frozen=True, kw_only=True, omit_defaults=True):
    actor_id: str
    source: str
    actor_name: str | None = None
    metadata: dict[str, str] | None = None


class Message(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a conversation, as stored and as served. `created_at` is RFC 3339, UTC, milliseconds."""

    id: str
    role: Role
    content: list[ContentPart]
    created_at: str
    controls: Controls | None = None
    metadata: dict[str, object] | None = None
    external_actor: ExternalActor | None = None
    phase: Phase | None = None
    tags: list[str] | None = None

    @property
    def text(self) -> str:
        """All text parts in order, nothing else."""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def tool_calls(self) -> list[ToolCallPart]:
        return [part for part in self.content if isinstance(part, ToolCallPart)]
