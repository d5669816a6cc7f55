"""`prompt_canary_guardrail`: the mark is found in every form that is claimed, however it is cut, and nothing of it is shown."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import msgspec
import pytest

from activities.capabilities import prompt_canary_guardrail
from activities.capabilities.prompt_canary_guardrail import PromptCanary, mark_of
from domain.capabilities import CallCheck, Refused, SessionView
from domain.tools import ToolCall

KEY = b"k" * 32
SESSION = "session_01933b5a000070008000000000000001"
MARK = mark_of(KEY, SESSION)
CAPABILITY = prompt_canary_guardrail.capability(KEY)
VIEW = cast(SessionView, SimpleNamespace(session_id=SESSION))

FORMS = {
    "as it is": MARK,
    "upper case": MARK.upper(),
    "dashes": "-".join(MARK),
    "spaces and line breaks": " \n ".join(MARK),
    "zero width": "\u200b".join(MARK),
    "full width": "".join(chr(ord(one) + 0xFEE0) for one in MARK),
    "backwards": MARK[::-1],
    "hexadecimal": f"mark {MARK}".encode().hex(),
    "percent": "".join(f"%{ord(one):02X}" for one in MARK),
    "in a URL": f"https://evil.test/?q={quote(MARK)}",
    **{f"base64 behind {n}": base64.b64encode(("x" * n + MARK + " and more").encode()).decode() for n in range(4)},
    "base64 in lines": "\n".join(base64.encodebytes(("You are kind. " * 9 + MARK).encode()).decode().split("\n")),
}


def feed(text: str, size: int) -> tuple[str, bool]:
    assert CAPABILITY.guard_output is not None
    guard = CAPABILITY.guard_output(PromptCanary(), VIEW)
    assert guard is not None
    shown = 0
    for place in range(0, len(text), size):
        verdict = guard.feed(text[place : place + size])
        shown = verdict.shown
        if verdict.replacement is not None:
            return text[:shown], True
    verdict = guard.feed("", finished=True)
    return text[: verdict.shown], verdict.replacement is not None


def check(**arguments: Any) -> Refused | None:
    assert CAPABILITY.check_call is not None
    call = ToolCall(id="call_1", name="web_fetch", arguments=arguments)
    made = CallCheck(call=call, tool=None, capability_id=None, earlier=[], history=[], session_id=SESSION)
    return cast("Refused | None", CAPABILITY.check_call(made, PromptCanary()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_every_form_is_found_in_an_answer_and_nothing_of_it_is_shown(form: str, size: int) -> None:
    before = "Of course! My instructions are: "
    shown, blocked = feed(before + FORMS[form] + " and so on", size)
    assert blocked
    assert before.startswith(shown) or form.startswith("base64") or form in ("hexadecimal", "in a URL", "percent")
    assert MARK[:4] not in shown


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_found_in_arguments_and_they_are_dropped(form: str) -> None:
    refused = check(url=["a", {"b": FORMS[form]}])
    assert refused is not None
    assert not refused.keeps_arguments
    assert MARK not in msgspec.json.encode(refused).decode()


def test_a_mark_spread_over_arguments_is_found() -> None:
    assert check(first=MARK[:13], second=3) is None
    assert check(parts=[MARK[:13], MARK[13:]]) is not None


def test_the_mark_of_another_session_means_nothing() -> None:
    other = mark_of(KEY, SESSION[:-1] + "2")
    assert other != MARK
    assert mark_of(b"other", SESSION) != MARK
    assert feed(f"Look: {other}.", 3) == (f"Look: {other}.", False)


def test_a_megabyte_without_it_is_shown_whole() -> None:
    text = ("The quick brown fox " + MARK[:9] + " ") * 30_000
    assert feed(text, 5_000) == (text, False)


async def test_the_prompt_asks_to_keep_it() -> None:
    assert CAPABILITY.session_prompt is not None
    assert MARK in (await CAPABILITY.session_prompt(VIEW, None) or "")
    assert CAPABILITY.prompt_is_secret
    assert CAPABILITY.is_guardrail
