"""What a fake provider is to answer, in words that fit every provider; each fake says it in its own wire format."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Failure = Literal[
    "rate_limit",
    "overloaded",
    "server_error",
    "quota",
    "usage_limit",
    "auth",
    "permission",
    "attestation",
    "not_found",
    "overflow",
    "tool_schema",
    "content_filter",
    "invalid_request",
]
"""A failure as that provider really reports it: status, type, code and words."""


class Call(Struct, frozen=True, kw_only=True):
    """A tool call the model makes. `arguments` is the JSON text as the model wrote it, sent in several pieces."""

    name: str
    arguments: str = "{}"
    id: str | None = None


class Usage(Struct, frozen=True, kw_only=True):
    """Disjoint, like ours: a fake adds them up where its provider's counts include each other."""

    input: int = 11
    output: int = 7
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0
    cost_usd: float | None = None


class Answer(Struct, frozen=True, kw_only=True):
    """One answer to one model call.

    `failure` alone is an HTTP error before any byte of a stream. With `after` it strikes when that many pieces (thinking, text
    and refusal pieces, counted together) were sent, with HTTP status 200. `cut` ends the stream there without a terminal event:
    cleanly, or by dropping the connection. `stall` sends nothing more after that piece until the client goes away.
    """

    thinking: list[str] = []
    text: list[str] = []
    refusal: list[str] = []
    calls: list[Call] = []
    finish: str | None = None
    """The provider's own finish reason; by default what fits the rest."""
    usage: Usage | None = Usage()
    failure: Failure | None = None
    retry_after_seconds: int | None = None
    after: int | None = None
    cut: Literal["clean", "abrupt"] | None = None
    stall: bool = False
    piece_delay_seconds: float = 0.0
    response_id: str | None = None
    phase: str | None = None
