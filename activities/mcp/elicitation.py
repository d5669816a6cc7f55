"""A server that asks the user something in the middle of a call (2026-07-28: `input_required`).

The call is put to rest with what the server said and is sent again with the answers, days later if need be. Several questions are
asked one after another. What a server must not ask through us (a model's answer, our directories) ends the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from activities.capabilities.json_schema import harmless
from activities.mcp.cleaning import clean, one_line
from domain.capabilities import Resumption, ToolError, ToolWaits
from domain.mcp import ServerTarget

KIND: Final = "elicitation"
MAX_ROUNDS: Final = 10
MAX_QUESTIONS: Final = 10
MAX_MESSAGE_CHARACTERS: Final = 4_000
MAX_STATE_CHARACTERS: Final = 256 * 1024


def continued(resumed: Resumption | None) -> tuple[dict[str, object] | None, str | None, int]:
    """Answers, the server's own state, and how often it has asked already. Raises `ToolWaits` while questions are left."""
    if resumed is None:
        return None, None, 0
    state = dict(resumed.state)
    questions = _mapping(state.get("questions"))
    answers = {**_mapping(state.get("answers")), str(state.get("key")): _answer(resumed.answer)}
    left = {key: question for key, question in questions.items() if key not in answers}
    if left and all(_mapping(answer).get("action") == "accept" for answer in answers.values()):
        raise _waits({**state, "answers": answers})
    for key in left:
        # One refusal is enough: nobody is asked more questions about what is not going to happen.
        answers[key] = {"action": "cancel"}
    request_state, rounds = state.get("request_state"), state.get("rounds")
    return answers, request_state if isinstance(request_state, str) else None, rounds if isinstance(rounds, int) else 0


def question_of(result: Mapping[str, object], target: ServerTarget, rounds: int) -> ToolWaits | None:
    """None when the call has ended. Raises `ToolError` for what cannot be asked."""
    if result.get("resultType") != "input_required":
        return None
    requests, request_state = result.get("inputRequests"), result.get("requestState")
    if rounds >= MAX_ROUNDS:
        raise ToolError(
            f"MCP server `{target.name}` asked the user {MAX_ROUNDS} times in one call, which is too often."
        )
    if not isinstance(requests, Mapping) or not 0 < len(requests) <= MAX_QUESTIONS:
        raise ToolError(f"MCP server `{target.name}` interrupted the call without a question that could be asked.")
    if isinstance(request_state, str) and len(request_state) > MAX_STATE_CHARACTERS:
        raise ToolError(f"MCP server `{target.name}` wants more to be kept for it than is possible.")
    questions = {str(key): _question(request, target) for key, request in requests.items()}
    return _waits(
        {
            "server": one_line(target.name),
            "questions": questions,
            "answers": {},
            "request_state": request_state,
            "rounds": rounds + 1,
        }
    )


def _waits(state: dict[str, object]) -> ToolWaits:
    questions, answers = _mapping(state.get("questions")), _mapping(state.get("answers"))
    key = next(key for key in questions if key not in answers)
    request = {"server": state.get("server"), "key": key, **_mapping(questions[key])}
    return ToolWaits(kind=KIND, request=request, state={**state, "key": key})


def _question(request: object, target: ServerTarget) -> dict[str, object]:
    fields = _mapping(request)
    parameters = _mapping(fields.get("params"))
    message = parameters.get("message")
    if fields.get("method") != "elicitation/create" or not isinstance(message, str):
        raise ToolError(
            f"MCP server `{target.name}` asked for `{one_line(str(fields.get('method')), 100)}`, which it is not given here."
        )
    shown: dict[str, object] = {"message": clean(message, MAX_MESSAGE_CHARACTERS)}
    if parameters.get("mode") == "url":
        url = parameters.get("url")
        if not isinstance(url, str) or not url.startswith("https://") or len(url) > 4096 or not url.isprintable():
            raise ToolError(f"MCP server `{target.name}` wants a page to be opened whose address is not usable.")
        return {**shown, "url": url}
    return {**shown, "requested_schema": harmless(parameters.get("requestedSchema"))}


def _answer(answer: Mapping[str, object]) -> dict[str, object]:
    action = answer.get("action")
    if action not in ("accept", "decline"):
        return {"action": "cancel"}
    content = answer.get("content")
    return {"action": action, "content": content} if action == "accept" and content is not None else {"action": action}


def _mapping(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, Mapping) else {}
