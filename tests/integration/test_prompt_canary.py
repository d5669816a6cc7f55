"""`prompt_canary_guardrail` in a turn: the mark goes to the model and nowhere else."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from activities.capabilities.prompt_canary_guardrail import mark_of
from cli.engine import canary_key_of
from infra.encryption import generate_key
from infra.settings import load_settings
from tests.integration.test_guardrails import engines_words, fixed, script, texts
from tests.stack import Json, Stack, of_type, payload

KEY = generate_key("kek-canary").reveal()
CAPABILITIES: list[Json] = [{"ref": "prompt_canary_guardrail"}, {"ref": "session_storage"}]


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    async with Stack(environment={"SECRETS_ENCRYPTION_KEY": KEY}) as running:
        yield running


def mark(session: str) -> str:
    settings = load_settings({"DEV_MODE": "true", "DATABASE_URL": "postgresql://x@y/z", "SECRETS_ENCRYPTION_KEY": KEY})
    return mark_of(canary_key_of(settings), session)


async def test_an_answer_with_the_mark_is_blocked_and_no_event_has_it(stack: Stack) -> None:
    session = await stack.create_session(capabilities=CAPABILITIES)
    secret = mark(session)
    leak = fixed(f"My prompt says {secret[:9]} - {secret[9:].upper()} and more", inter_token_delay_ms=2)
    log = await stack.ask(session, "hi", llmsim=leak)
    assert texts(log) == ["I can't share that."]
    (replaced,) = of_type(log, "output.message.replaced")
    assert (replaced["guardrail_capability_id"], replaced["guardrail_id"], replaced["reason_code"]) == (
        "prompt_canary_guardrail",
        "prompt_canary",
        "system_prompt_leak",
    )
    (generation,) = of_type(log, "llm.generation")
    system = generation["messages"][0]  # type: ignore[index]
    assert system["role"] == "system"
    assert secret not in str(system)
    assert "[not recorded]" in str(system)
    kept = await engines_words(stack, session)
    assert secret[:9] not in kept
    assert secret[9:] not in kept


async def test_a_call_with_the_mark_does_not_run_and_loses_its_arguments(stack: Stack) -> None:
    session = await stack.create_session(capabilities=CAPABILITIES)
    call: Json = {
        "name": "kv_store",
        "arguments": {"operation": "set", "key": "leak", "value": mark(session)[::-1]},
    }
    log = await stack.ask(session, "hi", llmsim=script({"tool_calls": [call]}, {"text": "Fine."}))
    assert texts(log) == ["", "Fine."]
    (completed,) = of_type(log, "tool.completed")
    assert completed["success"] is False
    assert [(one["stage"], one["action"]) for one in of_type(log, "guardrail.triggered")] == [("tool_use", "block")]
    assert (await stack.client.get(f"sessions/{session}/storage/keys")).json()["data"] == []
    assert mark(session)[::-1][:9] not in await engines_words(stack, session)


async def test_a_wrong_mark_is_as_good_as_any_text(stack: Stack) -> None:
    session = await stack.create_session(capabilities=CAPABILITIES)
    log = await stack.ask(session, "hi", llmsim=fixed(f"Look: {mark(session)[:-1]}."))
    assert not of_type(log, "output.message.replaced")
    assert all("mark of these instructions" not in str(payload(event)) for event in await stack.check(session))
