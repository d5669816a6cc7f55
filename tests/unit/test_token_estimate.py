"""Estimates of tokens: right to about a factor of two for every kind of text, and fast."""

from __future__ import annotations

import base64
import hashlib
import time

import pytest

from domain.messages import ImagePart, Message, Role, TextPart, ToolResultPart
from domain.token_estimate import IMAGE_TOKENS, message_tokens, prompt_tokens, text_tokens
from domain.tools import ClientSideTool

PROSE = "The committee met on Tuesday and decided, after a long discussion, to postpone the vote until the autumn. "
JSON = '{"id":"5f2a-11","value":1234.5,"ok":true,"items":[1,2,3],"name":"second floor"}'
KEY = base64.b64encode(hashlib.sha512(b"seed").digest() * 3).decode()


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        # Characters per token as today's vocabularies have them, with room on both sides.
        pytest.param(PROSE, len(PROSE) / 5.5, len(PROSE) / 3.5, id="prose"),
        pytest.param(JSON, len(JSON) / 3.2, len(JSON) / 1.6, id="json"),
        pytest.param(KEY, len(KEY) / 2.5, len(KEY) / 1.2, id="base64"),
        pytest.param("会议决定将投票推迟到秋天。", 7, 16, id="chinese"),
        pytest.param("会議は投票を秋まで延期することを決めました。", 12, 26, id="japanese"),
        pytest.param("Комитет решил отложить голосование до осени.", 9, 24, id="russian"),
        pytest.param("قررت اللجنة تأجيل التصويت حتى الخريف.", 8, 24, id="arabic"),
        pytest.param("समिति ने मतदान को शरद ऋतु तक टाल दिया।", 9, 36, id="hindi"),
        pytest.param("😀🎉🚀", 3, 9, id="emoji"),
        pytest.param("Für Kinder über zwölf Jahre geöffnet.", 8, 16, id="german"),
    ],
)
def test_every_script_is_estimated_within_its_range(text: str, least: float, most: float) -> None:
    assert least <= text_tokens(text) <= most


def test_only_no_text_at_all_costs_nothing() -> None:
    assert text_tokens("") == 0
    assert text_tokens(" ") == 1
    assert text_tokens("\ud800") == 1  # half of a surrogate pair, as a broken JSON may hold


def test_structured_results_images_and_tools_count() -> None:
    result = Message(
        id="m",
        role=Role.TOOL_RESULT,
        content=[ToolResultPart(tool_call_id="c", result=[{"type": "text", "text": PROSE}])],
        created_at="",
    )
    image = Message(id="m", role=Role.USER, content=[ImagePart(url="https://example.org/a.png")], created_at="")
    tool = ClientSideTool(name="look_up", description=PROSE, parameters={"type": "object"})
    assert message_tokens(result) > text_tokens(PROSE)
    assert message_tokens(image) > IMAGE_TOKENS
    assert prompt_tokens([result, image], [tool]) > message_tokens(result) + message_tokens(image) + text_tokens(PROSE)


def test_a_megabyte_of_history_is_estimated_in_a_blink() -> None:
    messages = [
        Message(id="m", role=Role.USER, content=[TextPart(text=text * 10)], created_at="")
        for text in (PROSE, JSON, KEY, "会议决定将投票推迟到秋天。") * 250
    ]
    assert sum(len(message.text.encode()) for message in messages) > 1_000_000
    best = min(_seconds(messages) for _ in range(5))
    # About 15 ms on a machine with nothing else to do.
    assert best < 0.15


def _seconds(messages: list[Message]) -> float:
    started = time.perf_counter()
    prompt_tokens(messages, [])
    return time.perf_counter() - started
