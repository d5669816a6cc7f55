"""The drivers under contract: each with a fake of its provider, the words that provider has, and what it has not."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from msgspec import Struct

from activities.llm import driver_for
from domain.messages import ContentPart, Message, Role, TextPart
from domain.model import ModelDriver, ModelEndpoint, ModelErrorKind, ModelRequest, ProviderState, StreamEvent
from domain.providers import API_KEY
from domain.secret import Secret
from domain.tools import BuiltinTool
from tests.fakes.anthropic_messages import FakeAnthropic
from tests.fakes.openai_chat import FakeGemini, FakeOpenAIChat
from tests.fakes.openai_responses import FakeOpenAIResponses
from tests.fakes.script import Answer, Failure
from tests.fakes.server import FakeProvider, Json

KEY: Final = "test-key-4f0c1d9e7b"
PROVIDER: Final = "provider_00000000000000000000000000000001"
OTHER_PROVIDER: Final = "provider_00000000000000000000000000000002"

DEADLINE_SECONDS: Final = 30.0
"""For what takes milliseconds; the first call of a driver imports its SDK."""

FAILURES: Final[dict[Failure, ModelErrorKind]] = {
    "rate_limit": ModelErrorKind.RATE_LIMITED,
    "overloaded": ModelErrorKind.OVERLOADED,
    "server_error": ModelErrorKind.SERVER_ERROR,
    "quota": ModelErrorKind.QUOTA_EXHAUSTED,
    "usage_limit": ModelErrorKind.USAGE_LIMIT,
    "auth": ModelErrorKind.AUTHENTICATION,
    "permission": ModelErrorKind.AUTHENTICATION,
    "attestation": ModelErrorKind.ATTESTATION_REQUIRED,
    "not_found": ModelErrorKind.UNSUPPORTED_MODEL,
    "overflow": ModelErrorKind.CONTEXT_OVERFLOW,
    "tool_schema": ModelErrorKind.INVALID_TOOL_SCHEMA,
    "content_filter": ModelErrorKind.CONTENT_FILTERED,
    "invalid_request": ModelErrorKind.INVALID_REQUEST,
}
"""What each failure is, whoever reports it."""


class Words(Struct, frozen=True, kw_only=True):
    """A provider's own finish reasons; None where it has none."""

    length: str
    content_filter: str | None


class Subject(Struct, frozen=True, kw_only=True):
    name: str
    provider_type: str
    fake: type[FakeProvider] | None
    """None for a driver without a wire."""
    model: str
    words: Words
    cannot: Mapping[str, str] = {}
    """Name of a test, or of a failure, to the reason why it cannot be put to this subject."""


_NO_WIRE: Final = "runs inside the worker: nothing is sent anywhere"

SUBJECTS: Final = (
    Subject(
        name="openai",
        provider_type="openai",
        fake=FakeOpenAIResponses,
        model="gpt-5.2",
        words=Words(length="max_output_tokens", content_filter="content_filter"),
    ),
    Subject(
        name="openai_compatible",
        provider_type="openai_completions",
        fake=FakeOpenAIChat,
        model="some-model",
        words=Words(length="length", content_filter="content_filter"),
        cannot={
            "test_a_missing_key_is_not_configured": "servers without authentication need no key",
        },
    ),
    Subject(
        name="gemini",
        provider_type="gemini",
        fake=FakeGemini,
        model="gemini-3-pro",
        words=Words(length="length", content_filter="content_filter"),
        cannot={"test_a_refusal_is_an_answer_with_its_text": "Gemini has no refusals: it writes them as text"},
    ),
    Subject(
        name="anthropic",
        provider_type="anthropic",
        fake=FakeAnthropic,
        model="claude-opus-4-6",
        words=Words(length="max_tokens", content_filter=None),
        cannot={
            "attestation": "Anthropic has no verification that a call could ask for",
            "test_an_answer_ended_by_a_content_filter_says_so": "its filter reports an error, never a finish reason",
        },
    ),
    Subject(
        name="llmsim",
        provider_type="llmsim",
        fake=None,
        model="llmsim-model",
        words=Words(length="length", content_filter="content_filter"),
        cannot={
            "usage_limit": "a class of error that llmsim does not have",
            "attestation": "a class of error that llmsim does not have",
            "content_filter": "a class of error that llmsim does not have",
            "test_malformed_arguments_are_a_problem_of_the_call": "a script's arguments are an object",
            "test_usage_is_counted_in_disjoint_buckets": "its counts are estimates, not ordered by a script",
            "test_the_response_id_is_told_at_once_and_at_the_end": "its ids are derived from the step",
            "test_an_abrupt_cut_is_no_answer": "there is no connection to drop",
            "test_a_missing_key_is_not_configured": "it needs no key",
            "test_a_key_with_a_line_break_is_not_repeated_in_an_error": "it needs no key",
            **dict.fromkeys(
                (
                    "test_a_server_that_is_not_there_is_a_transport_error",
                    "test_a_key_that_the_provider_repeats_is_masked",
                    "test_a_redirect_is_not_followed_with_the_key",
                    "test_images_reach_the_provider",
                    "test_a_conversation_with_tools_is_a_legal_request",
                    "test_a_message_between_call_and_result_is_a_legal_request",
                    "test_opaque_state_comes_back_unmodified",
                    "test_state_of_another_provider_or_driver_stays_out",
                    "test_closing_the_stream_closes_the_connection",
                    "test_cancelling_a_stalled_stream_closes_the_connection_within_a_second",
                    "test_cancelling_a_running_stream_closes_the_connection_within_a_second",
                    "test_what_a_model_does_not_take_is_listed_and_not_sent",
                    "test_serial_tool_calls_are_asked_for_or_listed_as_dropped",
                    "test_a_schema_for_the_answer_is_sent",
                    "test_the_order_of_tools_does_not_change_the_request",
                    "test_the_key_is_sent_and_repeated_nowhere",
                ),
                _NO_WIRE,
            ),
        },
    ),
)


class Rig:
    """One driver and the provider it talks to."""

    def __init__(self, subject: Subject, fake: FakeProvider | None) -> None:
        self.subject = subject
        self.fake = fake
        self._scripts: list[Answer] = []
        self._steps = itertools.count(1)

    @property
    def driver(self) -> ModelDriver:
        return driver_for(self.subject.provider_type)

    @property
    def wire(self) -> FakeProvider:
        assert self.fake is not None, "a test of the wire must be excluded in the subject's `cannot`"
        return self.fake

    @property
    def bodies(self) -> list[Json]:
        return [recorded.body for recorded in self.wire.requests]

    def play(self, *answers: Answer) -> None:
        if self.fake is not None:
            self.fake.play(*answers)
        else:
            self._scripts.extend(answers)

    def request(self, *messages: Message, **changes: Any) -> ModelRequest:
        """A request with these messages, by default one from the user."""
        options = changes.pop("options", {})
        if self._scripts:
            options = {**options, "script": llmsim_script(self._scripts.pop(0))}
        fields: dict[str, Any] = {
            "model": self.subject.model,
            "messages": list(messages) or [user("Hello?")],
            "tools": [],
            "session_id": "session_00000000000000000000000000000001",
            "idempotency_key": f"step-{next(self._steps)}",
            "endpoint": self.endpoint(),
            "options": options,
            **changes,
        }
        return ModelRequest(**fields)

    def endpoint(self, **changes: Any) -> ModelEndpoint:
        fields: dict[str, Any] = {
            "provider_type": self.subject.provider_type,
            "provider_public_id": PROVIDER,
            "base_url": self.fake.url if self.fake else None,
            "credentials": {API_KEY: Secret(KEY)},
            **changes,
        }
        return ModelEndpoint(**fields)

    def stream(self, request: ModelRequest) -> AsyncIterator[StreamEvent]:
        return self.driver.stream(request)

    async def run(self, *messages: Message, **changes: Any) -> list[StreamEvent]:
        return await self.call(self.request(*messages, **changes))

    async def call(self, request: ModelRequest) -> list[StreamEvent]:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return [event async for event in self.stream(request)]

    async def body_of(self, *messages: Message, **changes: Any) -> Json:
        """What goes over the wire for a request."""
        self.wire.requests.clear()
        await self.run(*messages, **changes)
        return self.bodies[-1]

    def state(self, items: list[dict[str, object]], **changes: Any) -> ProviderState:
        fields: dict[str, Any] = {
            "provider_public_id": PROVIDER,
            "driver": self.driver.name,
            "model": self.subject.model,
            "items": items,
            **changes,
        }
        return ProviderState(**fields)


@asynccontextmanager
async def rigged(subject: Subject) -> AsyncIterator[Rig]:
    if subject.fake is None:
        yield Rig(subject, None)
        return
    async with subject.fake().running() as fake:
        yield Rig(subject, fake)


_LLMSIM_ERRORS: Final[dict[Failure, str]] = {
    "rate_limit": "rate_limit",
    "overloaded": "overloaded",
    "server_error": "server_error",
    "quota": "quota_exhausted",
    "auth": "authentication",
    "permission": "authentication",
    "not_found": "unsupported_model",
    "overflow": "context_overflow",
    "tool_schema": "invalid_tool_schema",
    "invalid_request": "invalid_request",
}


def llmsim_script(answer: Answer) -> dict[str, object]:
    """The same answer as a script of llmsim. Its pieces are words, so an answer's pieces must be single words."""
    turn: dict[str, object] = {
        "thinking": "".join(answer.thinking),
        "text": "".join((*answer.text, *answer.refusal)),
        "tool_calls": [
            {"name": call.name, "arguments": msgspec.json.decode(call.arguments)} | ({"id": call.id} if call.id else {})
            for call in answer.calls
        ],
        "inter_token_delay_ms": int(answer.piece_delay_seconds * 1000),
    }
    if answer.finish or answer.refusal:
        turn["finish_reason"] = answer.finish or "refusal"
    if answer.failure:
        wait = {"retry_after_seconds": answer.retry_after_seconds} if answer.retry_after_seconds is not None else {}
        turn["error"] = {"class": _LLMSIM_ERRORS[answer.failure], **wait}
        if answer.after is not None:
            turn["error_after_tokens"] = answer.after
    if answer.cut:
        turn["cut_after_tokens"] = answer.after
    if answer.stall:
        turn["stall_after_tokens"] = answer.after
    return {"mode": "script", "turns": [turn]}


# --- conversations ----------------------------------------------------------------------------------------------------

_ids = itertools.count(1)


def message(role: Role, *parts: ContentPart) -> Message:
    return Message(
        id=f"message_{next(_ids):032x}", role=role, content=list(parts), created_at="2026-01-01T00:00:00.000Z"
    )


def user(text: str) -> Message:
    return message(Role.USER, TextPart(text=text))


def tool(name: str) -> BuiltinTool:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return BuiltinTool(name=name, description=f"What {name} does.", parameters=schema)


def strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, object keys aside."""
    match value:
        case str():
            yield value
        case dict():
            for inner in value.values():
                yield from strings(inner)
        case list():
            for inner in value:
                yield from strings(inner)
        case _:
            pass
