"""`ask_user`: the turn waits, a person answers over the API, the model reads the answer. And what happens when nobody does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from everruns_sdk import ApiError
from everruns_sdk.agent import AgentClient

from activities.capabilities.assembly import planned
from api.services import Services
from db.messages import NewMessage
from db.turn_store import TurnStore
from domain.config import CapabilityRef, TurnConfig
from domain.events import TokenUsage
from domain.ids import DEFAULT_ORG_ID, Prefix, new_id
from domain.messages import TextPart
from domain.tools import ClientSideTool, ToolCall
from domain.turns import ArrivedAnswer, ReasonNext, ReasonOutcome, ResolvedModel, StepRef
from tests.conftest import API, Make, RecordingTurns, turn_store
from tests.integration.test_docs_examples import commands, curl_request
from tests.stack import Json, Stack, of_type
from workflows import contract

SIZE: Json = {"id": "size", "question": "Which size?", "options": [{"label": "Small"}, {"label": "Large"}]}
WHEN: Json = {"question": "When?", "options": [{"label": "Today"}, {"label": "Tomorrow"}]}
LARGE: Json = {"status": "answered", "answers": [{"id": "size", "selected": ["Large"]}]}
DECLINED: Json = {"status": "declined"}
ASK_CLIENT: Json = {"type": "client_side", "name": "look", "description": "Looks.", "parameters": {"type": "object"}}
REFS = [{"ref": "ask_user"}]
MODEL = ResolvedModel(
    public_id=new_id(Prefix.MODEL), name="m", provider_public_id=new_id(Prefix.PROVIDER), provider_type="llmsim"
)

Asking = dict[str, list[Json]]
"""Call ids with their questions."""


# --- the API, on a turn that waits --------------------------------------------------------------------------------------


@pytest.fixture
def store(services: Services) -> TurnStore:
    return turn_store(services.log)


async def waiting(
    services: Services, store: TurnStore, make_session: Make, asking: Asking, *, tools: tuple[str, ...] = ()
) -> str:
    """A session whose model has asked these questions and called these tools of the client, in one answer."""
    session = str((await make_session(capabilities=REFS))["id"])
    await ask_in(services, store, session, asking, tools=tools)
    return session


async def ask_in(
    services: Services, store: TurnStore, session: str, asking: Asking, *, tools: tuple[str, ...] = ()
) -> StepRef:
    await services.messages.post(DEFAULT_ORG_ID, session, NewMessage(content=[TextPart(text="hi")]))
    ref = StepRef(
        session_id=session,
        turn_id=new_id(Prefix.TURN),
        iteration=1,
        exec_id=new_id(Prefix.EXEC),
        attempt=1,
        worker="w",
    )
    await store.begin_reason(ref, "interrupted")
    resolved = services.capabilities.resolve([CapabilityRef(ref="ask_user")])
    config = TurnConfig(tools=[ClientSideTool(name="look", description="", parameters={})])
    calls = [ToolCall(id=key, name="ask_user", arguments={"questions": asked}) for key, asked in asking.items()]
    calls += [ToolCall(id=key, name="look", arguments={}) for key in tools]
    outcome = ReasonOutcome(
        model=MODEL,
        prompt=[],
        offered_tools=[],
        text="",
        answer=ArrivedAnswer(
            finish_reason="tool_calls",
            usage=TokenUsage(input_tokens=1, output_tokens=1),
            text_length=0,
            duration_ms=1,
            calls=[planned(call, resolved, config) for call in calls],
        ),
    )
    assert (await store.commit_reason(ref, outcome)).next is ReasonNext.WAIT
    return ref


async def answer(client: httpx.AsyncClient, session: str, body: Json) -> tuple[int, Json]:
    response = await client.post(f"{API}/sessions/{session}/question-answers", json=body)
    return response.status_code, response.json()


async def return_results(client: httpx.AsyncClient, session: str, **given: object) -> tuple[int, Json]:
    body = {"tool_results": [{"tool_call_id": key, "result": value} for key, value in given.items()]}
    response = await client.post(f"{API}/sessions/{session}/tool-results", json=body)
    return response.status_code, response.json()


async def status_of(client: httpx.AsyncClient, session: str) -> str:
    return (await client.get(f"{API}/sessions/{session}")).json()["status"]


async def results_of(services: Services, session: str) -> dict[str, Any]:
    """What the model reads of each call: the decoded result, or the error."""
    found = await services.log.read(session, after_sequence=0, limit=1_000, types=["tool.completed"])
    payloads = [msgspec.json.decode(event.data) for event in found]
    return {
        one["tool_call_id"]: msgspec.json.decode(one["result"][0]["text"]) if one["success"] else one["error"]
        for one in payloads
    }


async def told(services: Services, turns: RecordingTurns) -> list[tuple[str, ...]]:
    """The calls whose results the workflow was told of."""
    await services.background.close(10)
    return [call[2:] for call in turns.calls if call[0] == "tool_results"]


async def test_an_answer_becomes_the_call_s_result_and_wakes_the_turn(
    client: httpx.AsyncClient, services: Services, store: TurnStore, make_session: Make, turns: RecordingTurns
) -> None:
    session = await waiting(services, store, make_session, {"call_a": [SIZE, WHEN]})
    assert await status_of(client, session) == "waitingfortoolresults"
    given = [{"id": "q1", "selected": [], "other_text": "At noon ✓"}, {"id": "size", "selected": ["Large"]}]
    assert await answer(client, session, {"status": "answered", "answers": given}) == (
        200,
        {"tool_call_id": "call_a", "status": "active"},
    )
    assert await status_of(client, session) == "active"
    assert await results_of(services, session) == {
        "call_a": {
            "status": "answered",
            "answers": [
                {"id": "size", "question": "Which size?", "selected": ["Large"]},
                {"id": "q1", "question": "When?", "selected": [], "other_text": "At noon ✓"},
            ],
        }
    }
    assert await told(services, turns) == [("call_a",)]


async def test_the_event_names_the_questions_with_their_ids(
    services: Services, store: TurnStore, make_session: Make
) -> None:
    session = await waiting(services, store, make_session, {"call_a": [SIZE, WHEN]}, tools=("call_t",))
    (event,) = await services.log.read(session, after_sequence=0, limit=10, types=["tool.call_requested"])
    requested = msgspec.json.decode(event.data)
    assert [call["id"] for call in requested["tool_calls"]] == ["call_a", "call_t"]
    asked = [{**SIZE, "multi_select": False}, {**WHEN, "id": "q1", "multi_select": False}]
    assert requested["questions"] == [{"tool_call_id": "call_a", "questions": asked}]


async def test_a_declined_question_tells_the_model_so(
    client: httpx.AsyncClient, services: Services, store: TurnStore, make_session: Make
) -> None:
    session = await waiting(services, store, make_session, {"call_a": [SIZE]})
    assert (await answer(client, session, DECLINED))[0] == 200
    assert await results_of(services, session) == {"call_a": {"status": "declined", "answers": []}}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"status": "answered", "answers": [{"id": "size", "selected": ["Huge"]}]}, "answers[0].selected[0]"),
        ({"status": "answered", "answers": [{"id": "colour", "selected": ["Large"]}]}, "answers[0].id"),
        ({"status": "answered", "answers": [{"id": "size", "selected": ["Large", "Small"]}]}, "answers[0].selected"),
        ({"status": "answered", "answers": [{"id": "size", "other_text": "\0"}]}, "answers[0].other_text"),
        ({"status": "answered"}, "answers"),
        ({"status": "maybe"}, "status"),
        ({}, "status"),
        ({"status": "answered", "answers": [{"selected": ["Large"]}]}, "answers[0].id"),
        ({**LARGE, "tool_call_id": "call_z"}, "tool_call_id"),
        ({**LARGE, "tool_call_id": "call_t"}, "tool_call_id"),
    ],
)
async def test_an_answer_that_does_not_fit_is_refused_and_the_question_stays_open(
    client: httpx.AsyncClient, services: Services, store: TurnStore, make_session: Make, body: Json, field: str
) -> None:
    session = await waiting(services, store, make_session, {"call_a": [SIZE]}, tools=("call_t",))
    status, problem = await answer(client, session, body)
    assert (status, problem["field"]) == (400, field)
    assert await status_of(client, session) == "waitingfortoolresults"
    assert await results_of(services, session) == {}


async def test_nothing_to_answer_is_a_conflict(client: httpx.AsyncClient, make_session: Make) -> None:
    session = str((await make_session())["id"])
    for body in (LARGE, {**LARGE, "tool_call_id": "call_a"}):
        status, problem = await answer(client, session, body)
        assert (status, problem["code"]) == (409, "not_waiting_for_answers")
    assert (await answer(client, new_id(Prefix.SESSION), LARGE))[0] == 404
    assert (await answer(client, "session_1", LARGE))[1]["code"] == "malformed_id"


async def test_the_first_answer_counts_and_may_be_sent_again(
    client: httpx.AsyncClient, services: Services, store: TurnStore, make_session: Make, turns: RecordingTurns
) -> None:
    session = await waiting(services, store, make_session, {"call_a": [SIZE]})
    named = {**LARGE, "tool_call_id": "call_a"}
    first = await answer(client, session, named)
    assert first == (200, {"tool_call_id": "call_a", "status": "active"})
    assert await answer(client, session, named) == first
    status, problem = await answer(client, session, {**DECLINED, "tool_call_id": "call_a"})
    assert (status, problem["code"]) == (409, "not_waiting_for_answers")
    assert (await answer(client, session, LARGE))[0] == 409
    assert (await results_of(services, session))["call_a"]["status"] == "answered"
    # The word may have been lost the first time: it is given again, and names nothing that another wait is for.
    assert await told(services, turns) == [("call_a",), ("call_a",)]


async def test_two_answers_at_once_are_one(
    client: httpx.AsyncClient, services: Services, store: TurnStore, make_session: Make
) -> None:
    session = await waiting(services, store, make_session, {"call_a": [SIZE]})
    bodies = [{**LARGE, "tool_call_id": "call_a"}, {**DECLINED, "tool_call_id": "call_a"}]
    statuses = [status for status, _ in await asyncio.gather(*(answer(client, session, body) for body in bodies))]
    assert sorted(statuses) == [200, 409]
    assert len(await services.log.read(session, after_sequence=0, limit=10, types=["tool.completed"])) == 1


async def test_several_calls_need_the_call_s_id_and_the_turn_waits_for_all(
    client: httpx.AsyncClient, services: Services, store: TurnStore, make_session: Make, turns: RecordingTurns
) -> None:
    session = await waiting(services, store, make_session, {"call_a": [SIZE], "call_b": [SIZE]})
    status, problem = await answer(client, session, LARGE)
    assert (status, problem["field"]) == (400, "tool_call_id")
    waits = (200, {"tool_call_id": "call_b", "status": "waitingfortoolresults"})
    assert await answer(client, session, {**LARGE, "tool_call_id": "call_b"}) == waits
    assert await answer(client, session, {**LARGE, "tool_call_id": "call_b"}) == waits
    assert await status_of(client, session) == "waitingfortoolresults"
    assert await told(services, turns) == []
    # Only one is left, so it needs no name.
    assert await answer(client, session, LARGE) == (200, {"tool_call_id": "call_a", "status": "active"})
    assert await told(services, turns) == [("call_a",)]


async def test_results_of_a_program_do_not_take_the_question_away_from_a_person(
    client: httpx.AsyncClient, services: Services, store: TurnStore, make_session: Make, turns: RecordingTurns
) -> None:
    session = await waiting(services, store, make_session, {"call_a": [SIZE]}, tools=("call_t",))
    waits = (200, {"accepted": 1, "status": "waitingfortoolresults"})
    assert await return_results(client, session, call_t={"seen": 1}) == waits
    assert await return_results(client, session, call_t={"seen": 1}) == waits
    assert await told(services, turns) == []
    assert (await answer(client, session, LARGE))[1]["status"] == "active"
    assert await told(services, turns) == [("call_a",)]
    found = await results_of(services, session)
    assert (found["call_t"], found["call_a"]["status"]) == ({"seen": 1}, "answered")


async def test_an_answer_waits_for_the_client_s_tools(
    client: httpx.AsyncClient, services: Services, store: TurnStore, make_session: Make, turns: RecordingTurns
) -> None:
    session = await waiting(services, store, make_session, {"call_a": [SIZE]}, tools=("call_t",))
    assert (await answer(client, session, LARGE))[1]["status"] == "waitingfortoolresults"
    # The answer under its call's id, as a result: settled already, and no reason to end the wait.
    assert (await return_results(client, session, call_a={}))[1]["status"] == "waitingfortoolresults"
    assert await return_results(client, session, call_t={"seen": 1}) == (200, {"accepted": 1, "status": "active"})
    assert await told(services, turns) == [("call_t",)]
    assert (await results_of(services, session))["call_a"]["status"] == "answered"


async def test_tool_results_settle_a_question_as_well(
    client: httpx.AsyncClient, services: Services, store: TurnStore, make_session: Make, turns: RecordingTurns
) -> None:
    session = await waiting(services, store, make_session, {"call_a": [SIZE]})
    assert await return_results(client, session, call_a={"size": "any"}) == (200, {"accepted": 1, "status": "active"})
    assert await results_of(services, session) == {"call_a": {"size": "any"}}
    assert await told(services, turns) == [("call_a",)]
    assert (await answer(client, session, {**LARGE, "tool_call_id": "call_a"}))[0] == 409


@pytest.mark.parametrize(
    ("ended", "question_told", "tool_told"),
    [
        ("timed_out", "The user did not answer in time", "Timed out waiting for client tool results"),
        ("interrupted", "before the user answered", "before the client returned a result"),
    ],
)
async def test_a_question_that_was_not_answered_tells_the_model_why_and_takes_no_answer_any_more(
    client: httpx.AsyncClient,
    services: Services,
    store: TurnStore,
    make_session: Make,
    ended: Literal["timed_out", "interrupted"],
    question_told: str,
    tool_told: str,
) -> None:
    session = str((await make_session(capabilities=REFS))["id"])
    ref = await ask_in(services, store, session, {"call_a": [SIZE]}, tools=("call_t",))
    after = msgspec.structs.replace(ref, iteration=2, exec_id=new_id(Prefix.EXEC))
    await store.begin_reason(after, ended)
    found = await results_of(services, session)
    assert question_told in found["call_a"]
    assert tool_told in found["call_t"]
    status, problem = await answer(client, session, {**LARGE, "tool_call_id": "call_a"})
    assert (status, problem["code"]) == (409, "not_waiting_for_answers")


# --- a whole engine -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    """Its only worker is a process of its own, which a test may kill."""
    async with Stack(no_worker=True) as running:
        await running.start_worker()
        yield running


def script(*turns: Json) -> Json:
    return {"mode": "script", "turns": list(turns)}


def asking(*questions: Json, call_id: str = "call_a") -> Json:
    return calling(call(*questions, call_id=call_id))


def call(*questions: Json, call_id: str) -> Json:
    return {"name": "ask_user", "id": call_id, "arguments": {"questions": list(questions)}}


def calling(*calls: Json) -> Json:
    return {"tool_calls": list(calls)}


async def test_a_question_outlives_its_worker_and_the_model_reads_the_answer(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    session = await stack.create_session(capabilities=REFS)
    await stack.post_message(session, "A pizza", llmsim=script(asking(SIZE), {"text": "On its way."}))
    await stack.wait_for_event(session, "tool.call_requested")
    await stack.restart_worker(stack.workers[0])
    assert (await stack.session(session))["status"] == "waitingfortoolresults"
    async with AgentClient(stack.api, "evr_agent_test") as agent:  # the SDK's own call, under the management address
        assert await agent.answer_questions(session, LARGE) == {"tool_call_id": "call_a", "status": "active"}
        with pytest.raises(ApiError) as again:
            await agent.answer_questions(session, DECLINED)
    assert (again.value.status_code, again.value.code) == (409, "not_waiting_for_answers")
    await stack.idle(session)
    log = await stack.check(session)
    seen = msgspec.json.encode(of_type(log, "llm.generation")[-1]["messages"]).decode()
    assert '\\"selected\\":[\\"Large\\"]' in seen
    assert len(of_type(log, "turn.started")) == len(of_type(log, "turn.completed")) == 1
    assert not of_type(log, "transcript.repaired")


async def test_two_questions_are_answered_one_after_another(stack: Stack) -> None:
    session = await stack.create_session(capabilities=REFS, tools=[ASK_CLIENT])
    both = calling(call(SIZE, call_id="call_a"), call(WHEN, call_id="call_b"))
    await stack.post_message(session, "A pizza", llmsim=script(both, {"text": "On its way."}))
    await stack.wait_for_event(session, "tool.call_requested")
    for call_id, given in (
        ("call_b", {"id": "q1", "selected": ["Today"]}),
        ("call_a", {"id": "size", "selected": ["Large"]}),
    ):
        body = {"status": "answered", "tool_call_id": call_id, "answers": [given]}
        posted = await stack.client.post(f"sessions/{session}/question-answers", json=body)
        assert posted.status_code == 200, posted.text
    await stack.idle(session)
    log = await stack.check(session)
    assert [one["success"] for one in of_type(log, "tool.completed")] == [True, True]


async def test_malformed_questions_are_the_model_s_to_correct(stack: Stack) -> None:
    session = await stack.create_session(capabilities=REFS)
    wrong = asking({**SIZE, "options": [{"label": "Only this"}]})
    await stack.post_message(session, "go", llmsim=script(wrong, asking(SIZE, call_id="call_b"), {"text": "Good."}))
    await stack.wait_for_event(session, "tool.call_requested")
    posted = await stack.client.post(f"sessions/{session}/question-answers", json=DECLINED)
    assert posted.json()["tool_call_id"] == "call_b"
    await stack.idle(session)
    log = await stack.check(session)
    first, second = of_type(log, "tool.completed")
    assert "`questions[0].options`" in str(first["error"])
    assert second["success"]
    assert len(of_type(log, "tool.call_requested")) == 1


async def test_a_new_message_withdraws_the_question(stack: Stack) -> None:
    session = await stack.create_session(capabilities=REFS)
    await stack.post_message(session, "go", llmsim=script(asking(SIZE)))
    await stack.wait_for_event(session, "tool.call_requested")
    await stack.post_message(session, "Never mind", llmsim={"mode": "fixed", "text": "Fine."})
    await stack.wait_for_event(session, "turn.completed")
    await stack.idle(session)
    log = await stack.check(session)
    assert [one["status"] for one in of_type(log, "tool.completed")] == ["cancelled"]
    late = await stack.client.post(f"sessions/{session}/question-answers", json={**LARGE, "tool_call_id": "call_a"})
    assert (late.status_code, late.json()["code"]) == (409, "not_waiting_for_answers")


async def test_a_turn_goes_on_without_the_answer_when_nobody_gives_one(stack: Stack) -> None:
    session = await stack.create_session(capabilities=REFS)
    message = {
        "content": [{"type": "text", "text": "go"}],
        "metadata": {"llmsim": script(asking(SIZE), {"text": "Without, then."})},
    }
    await (await stack.temporal()).start_workflow(
        contract.TURN_WORKFLOW,
        {"session_id": session, "client_tool_timeout_seconds": 1},
        id=session,
        task_queue=contract.TURNS_QUEUE,
        start_signal="message",
        start_signal_args=[message],
    )
    await stack.idle(session)
    log = await stack.check(session)
    (completed,) = of_type(log, "tool.completed")
    assert completed["status"] == "timeout"
    assert "did not answer" in str(completed["error"])


async def test_the_example_of_the_page_asks_and_answers(stack: Stack) -> None:
    session = await stack.create_session(capabilities=REFS)
    origin = f"http://{urlsplit(stack.api).netloc}"
    question, given = commands("docs/capabilities/ask_user.md", "curl")
    for command, awaited in ((question, "tool.call_requested"), (given, "turn.completed")):
        request = curl_request(command, {"API": f"{origin}/api/v1", "SESSION": session})
        reply = await stack.client.request(request.method, request.url, headers=request.headers, content=request.body)
        assert reply.is_success, reply.text
        await stack.wait_for_event(session, awaited)
    await stack.idle(session)
    (completed,) = of_type(await stack.check(session), "tool.completed")
    assert "and no onions" in str(completed["result"])
