"""`/v1/budgets` and the budget routes of sessions: shapes, what a change does, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from db.database import Database
from domain.ids import DEFAULT_ORG_PUBLIC_ID, Prefix, new_id, parse_id
from tests.conftest import API, Make, RecordingTurns

BUDGETS = f"{API}/budgets"
USER = f"user_{1:032x}"


@pytest.fixture
async def session(make_session: Make) -> str:
    return (await make_session())["id"]


async def made(client: httpx.AsyncClient, session: str, **fields: Any) -> dict[str, Any]:
    body = {"subject_type": "session", "subject_id": session, "currency": "usd", "limit": 10, **fields}
    answer = await client.post(BUDGETS, json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def spend(database: Database, budget: dict[str, Any], amount: float, status: str = "active") -> None:
    """As the engine does it, without a turn."""
    await database.pool.execute(
        "UPDATE budgets SET spent = spent + $2, status = $3 WHERE id = $1",
        parse_id(Prefix.BUDGET, budget["id"]),
        amount,
        status,
    )


async def pause(database: Database, session: str, budget: dict[str, Any]) -> None:
    await database.pool.execute(
        "UPDATE session_state SET status = 'paused', paused_by = $2 WHERE session_id = $1",
        parse_id(Prefix.SESSION, session),
        parse_id(Prefix.BUDGET, budget["id"]),
    )


async def woken(turns: RecordingTurns, session: str) -> None:
    async with asyncio.timeout(10):
        while ("wake", session) not in turns.calls:  # noqa: ASYNC110  # the gateway's fake tells nobody
            await asyncio.sleep(0.01)


async def post_message(client: httpx.AsyncClient, session: str) -> None:
    body = {"message": {"content": [{"type": "text", "text": "hi"}]}}
    assert (await client.post(f"{API}/sessions/{session}/messages", json=body)).status_code == 201


# --- reading and writing ----------------------------------------------------------------------------------------------


async def test_a_budget_is_served_as_it_was_made(client: httpx.AsyncClient, session: str) -> None:
    period = {"type": "calendar", "unit": "month"}
    budget = await made(client, session, soft_limit=7.5, period=period, currency="USD", metadata={"team": "a"})
    assert budget["id"].startswith("bdgt_")
    assert {key: value for key, value in budget.items() if not key.endswith("_at") and key != "id"} == {
        "organization_id": DEFAULT_ORG_PUBLIC_ID,
        "subject_type": "session",
        "subject_id": session,
        "currency": "usd",
        "limit": 10.0,
        "soft_limit": 7.5,
        "balance": 10.0,
        "status": "active",
        "period": period,
        "metadata": {"team": "a"},
    }
    assert budget["period_started_at"].endswith("-01T00:00:00.000Z")
    assert (await client.get(f"{BUDGETS}/{budget['id']}")).json() == budget


async def test_lists_are_bare_and_filtered_by_subject_under_both_names_of_the_organization(
    client: httpx.AsyncClient, session: str
) -> None:
    own = await made(client, session)
    org = await made(client, session, subject_type="organization", subject_id=DEFAULT_ORG_PUBLIC_ID)
    assert org["subject_type"] == "org"

    async def listed(**filters: str) -> list[str]:
        return [budget["id"] for budget in (await client.get(BUDGETS, params=filters)).json()]

    assert await listed() == [own["id"], org["id"]]
    assert await listed(subject_type="org") == await listed(subject_type="organization") == [org["id"]]
    assert await listed(subject_type="session", subject_id=session) == [own["id"]]
    assert await listed(subject_id="nobody") == []


async def test_every_subject_of_a_session_is_found_from_it_its_own_budgets_first(
    client: httpx.AsyncClient, make_agent: Make, make_session: Make
) -> None:
    agent = await make_agent()
    session = await make_session(agent_id=agent["id"])
    subjects = {
        "org": DEFAULT_ORG_PUBLIC_ID,
        "user": USER,
        "harness": session["harness_id"],
        "agent": agent["id"],
        "session": session["id"],
    }
    for kind, subject in subjects.items():
        await made(client, "", subject_type=kind, subject_id=subject)
    other = await make_session()
    await made(client, other["id"])
    found = (await client.get(f"{API}/sessions/{session['id']}/budgets")).json()
    assert [budget["subject_type"] for budget in found] == ["session", "agent", "harness", "user", "org"]
    assert [budget["subject_id"] for budget in found] == list(reversed(subjects.values()))


async def test_a_deleted_budget_is_listed_no_more_and_keeps_its_ledger(client: httpx.AsyncClient, session: str) -> None:
    budget = await made(client, session)
    await client.post(f"{BUDGETS}/{budget['id']}/top-up", json={"amount": 2})
    assert (await client.delete(f"{BUDGETS}/{budget['id']}")).status_code == 204
    assert (await client.get(BUDGETS)).json() == (await client.get(f"{API}/sessions/{session}/budgets")).json() == []
    assert (await client.get(f"{BUDGETS}/{budget['id']}")).json()["status"] == "disabled"
    assert len((await client.get(f"{BUDGETS}/{budget['id']}/ledger")).json()) == 1
    refused = await client.post(f"{BUDGETS}/{budget['id']}/top-up", json={"amount": 2})
    assert refused.status_code == 409


async def test_top_ups_are_exact_and_stand_in_the_ledger_newest_first(client: httpx.AsyncClient, session: str) -> None:
    budget = await made(client, session, limit=0.1)
    for amount in (0.2, 0.4):
        answer = await client.post(f"{BUDGETS}/{budget['id']}/top-up", json={"amount": amount, "description": "more"})
    assert answer.json()["balance"] == 0.7
    ledger = (await client.get(f"{BUDGETS}/{budget['id']}/ledger")).json()
    assert [(entry["amount"], entry["meter_source"], entry["description"]) for entry in ledger] == [
        (-0.4, "top_up", "more"),
        (-0.2, "top_up", "more"),
    ]
    page = (await client.get(f"{BUDGETS}/{budget['id']}/ledger", params={"limit": 1, "offset": 1})).json()
    assert page == ledger[1:]


async def test_a_patch_changes_what_it_names_and_null_clears(client: httpx.AsyncClient, session: str) -> None:
    budget = await made(client, session, soft_limit=5, metadata={"a": 1})
    url = f"{BUDGETS}/{budget['id']}"
    assert (await client.patch(url, json={})).json()["limit"] == 10
    changed = (await client.patch(url, json={"limit": 20, "soft_limit": None, "metadata": None})).json()
    assert (changed["limit"], changed["balance"]) == (20, 20)
    assert not {"soft_limit", "metadata"} & changed.keys()
    assert (await client.patch(url, json={"status": "paused"})).json()["status"] == "paused"
    assert (await client.patch(url, json={"status": "active", "limit": None})).json()["status"] == "active"


# --- checks -----------------------------------------------------------------------------------------------------------


async def test_a_check_says_what_is_demanded_and_why(
    client: httpx.AsyncClient, session: str, database: Database
) -> None:
    check = f"{API}/sessions/{session}/budget-check"
    assert (await client.get(check)).json() == {"action": "continue"}
    own = await made(client, session, soft_limit=5)
    org = await made(client, session, subject_type="org", subject_id=DEFAULT_ORG_PUBLIC_ID)
    assert (await client.get(check)).json() == {"action": "continue"}
    await spend(database, own, 6, "paused")
    paused = (await client.get(check)).json()
    assert (paused["action"], paused["budget_id"], paused["error_code"]) == ("pause", own["id"], "budget_paused")
    assert (paused["balance"], paused["currency"]) == (4, "usd")
    await spend(database, org, 10.5, "exhausted")
    stopped = (await client.get(check)).json()
    assert (stopped["action"], stopped["budget_id"], stopped["balance"]) == ("stop", org["id"], -0.5)
    assert stopped["error_code"] == "budget_exhausted"
    assert stopped["error_fields"] == {"budget_id": org["id"], "currency": "usd", "limit": 10, "balance": -0.5}
    assert (await client.get(f"{BUDGETS}/{own['id']}/check")).json() == paused


async def test_a_period_that_is_over_is_rolled_over_when_somebody_looks(
    client: httpx.AsyncClient, session: str, database: Database
) -> None:
    budget = await made(client, session, period={"type": "duration", "seconds": 3600})
    await spend(database, budget, 10, "exhausted")
    await database.pool.execute("UPDATE budgets SET period_started_at = period_started_at - interval '90 minutes'")
    seen = (await client.get(f"{BUDGETS}/{budget['id']}")).json()
    assert (seen["status"], seen["balance"]) == ("active", 10)
    topped_up = await client.post(f"{BUDGETS}/{budget['id']}/top-up", json={"amount": 1})
    assert topped_up.json()["balance"] == 11


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/top-up", {"amount": 1}),
        ("PATCH", "", {"limit": 11}),
        ("PATCH", "", {"soft_limit": 9}),
        ("PATCH", "", {"status": "active"}),
        ("DELETE", "", None),
    ],
)
async def test_whatever_lifts_the_pause_lets_waiting_sessions_go_on(
    method: str,
    path: str,
    body: dict[str, Any] | None,
    client: httpx.AsyncClient,
    session: str,
    database: Database,
    turns: RecordingTurns,
) -> None:
    budget = await made(client, session, soft_limit=5)
    await spend(database, budget, 6, "paused")
    await pause(database, session, budget)
    await post_message(client, session)
    turns.calls.clear()
    answer = await client.request(method, f"{BUDGETS}/{budget['id']}{path}", json=body)
    assert answer.is_success, answer.text
    await woken(turns, session)
    events = (await client.get(f"{API}/sessions/{session}/events", params={"types": "budget.resumed"})).json()["data"]
    assert [event["data"]["budget_id"] for event in events] == [budget["id"]]


async def test_a_resume_lifts_every_pause_of_the_session_but_no_end(
    client: httpx.AsyncClient, session: str, database: Database
) -> None:
    first, second = [await made(client, session, soft_limit=5) for _ in range(2)]
    await spend(database, first, 6, "paused")
    await spend(database, second, 10, "exhausted")
    url = f"{API}/sessions/{session}/resume"
    assert (await client.post(url, json={})).json() == {"session_id": session, "resumed_budgets": 1}
    assert (await client.post(url)).json() == {"session_id": session, "resumed_budgets": 0}
    statuses = [(await client.get(f"{BUDGETS}/{one['id']}")).json()["status"] for one in (first, second)]
    assert statuses == ["active", "exhausted"]


async def test_a_paused_session_is_idle_to_clients_that_know_no_other_word(
    client: httpx.AsyncClient, session: str, database: Database
) -> None:
    await pause(database, session, await made(client, session))
    assert (await client.get(f"{API}/sessions/{session}")).json()["status"] == "idle"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": -1}, "limit"),
        ({"limit": 1e300}, "limit"),
        ({"limit": 10**400}, None),
        ({"limit": "ten"}, "limit"),
        ({"limit": None}, "limit"),
        ({"soft_limit": 11}, "soft_limit"),
        ({"soft_limit": -1}, "soft_limit"),
        ({"currency": ""}, "currency"),
        ({"currency": "u\0sd"}, "currency"),
        ({"subject_type": "planet"}, "subject_type"),
        ({"subject_id": "session_1"}, "subject_id"),
        ({"subject_id": "x' OR '1'='1"}, "subject_id"),
        ({"period": {"type": "sometimes"}}, "period"),
        ({"period": {"type": "duration", "seconds": 0}}, "period.seconds"),
        ({"period": {"type": "duration"}}, "period"),
        ({"period": {"type": "rolling", "window": "5 years"}}, "period.window"),
        ({"period": {"type": "calendar", "unit": "eon"}}, "period.unit"),
        ({"metadata": {"a": "x" * 20_000}}, "metadata"),
        ({"metadata": []}, "metadata"),
    ],
)
async def test_a_budget_that_makes_no_sense_is_refused_and_the_field_is_named(
    fields: dict[str, Any], field: str | None, client: httpx.AsyncClient, session: str
) -> None:
    body = {"subject_type": "session", "subject_id": session, "currency": "usd", "limit": 10, **fields}
    answer = await client.post(BUDGETS, json=body)
    assert answer.status_code in (400, 422), answer.text
    if field is not None:
        assert field in answer.text
    assert (await client.get(BUDGETS)).json() == []


@pytest.mark.parametrize("amount", [0, -5, 1e300, "1; DROP TABLE budgets", None])
async def test_a_top_up_that_makes_no_sense_is_refused(amount: Any, client: httpx.AsyncClient, session: str) -> None:
    budget = await made(client, session)
    answer = await client.post(f"{BUDGETS}/{budget['id']}/top-up", json={"amount": amount})
    assert answer.status_code in (400, 422)
    assert "amount" in answer.text
    assert (await client.get(f"{BUDGETS}/{budget['id']}")).json() == budget


@pytest.mark.parametrize(
    ("changes", "status"),
    [({"status": "exhausted"}, 400), ({"status": "gone"}, 400), ({"limit": 4}, 400), ({"soft_limit": 1e9}, 400)],
)
async def test_a_change_that_makes_no_sense_is_refused(
    changes: dict[str, Any], status: int, client: httpx.AsyncClient, session: str
) -> None:
    budget = await made(client, session, soft_limit=5)
    answer = await client.patch(f"{BUDGETS}/{budget['id']}", json=changes)
    assert answer.status_code == status, answer.text
    assert (await client.get(f"{BUDGETS}/{budget['id']}")).json() == budget


async def test_a_used_up_budget_is_not_made_active_by_its_status(
    client: httpx.AsyncClient, session: str, database: Database
) -> None:
    budget = await made(client, session)
    await spend(database, budget, 10, "exhausted")
    answer = await client.patch(f"{BUDGETS}/{budget['id']}", json={"status": "active"})
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")


async def test_a_subject_has_only_so_many_budgets(client: httpx.AsyncClient, session: str) -> None:
    for _ in range(20):
        await made(client, session)
    body = {"subject_type": "session", "subject_id": session, "currency": "usd", "limit": 1}
    answer = await client.post(BUDGETS, json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "resource_limit")


# --- other organizations ----------------------------------------------------------------------------------------------


async def test_budgets_and_subjects_of_other_organizations_do_not_exist(
    client: httpx.AsyncClient, session: str, make_agent: Make, make_harness: Make, database: Database
) -> None:
    budget = await made(client, session)
    agent, harness = (await make_agent())["id"], (await make_harness())["id"]
    for table in ("budgets", "sessions", "agents", "harnesses"):
        await database.pool.execute(f"UPDATE {table} SET org_id = 2 WHERE NOT id = ANY($1)", [])
    await database.pool.execute("INSERT INTO organizations (public_id, name) VALUES ($1, 'Other')", f"org_{2:032x}")
    url = f"{BUDGETS}/{budget['id']}"
    answers = [
        await client.get(url),
        await client.patch(url, json={"limit": 1}),
        await client.delete(url),
        await client.post(f"{url}/top-up", json={"amount": 1}),
        await client.get(f"{url}/ledger"),
        await client.get(f"{url}/check"),
        await client.get(f"{API}/sessions/{session}/budgets"),
        await client.get(f"{API}/sessions/{session}/budget-check"),
        await client.post(f"{API}/sessions/{session}/resume", json={}),
        *[
            await client.post(
                BUDGETS, json={"subject_type": kind, "subject_id": subject, "currency": "usd", "limit": 1}
            )
            for kind, subject in (
                ("session", session),
                ("agent", agent),
                ("harness", harness),
                ("org", f"org_{2:032x}"),
                ("user", new_id(Prefix.USER)),
            )
        ],
    ]
    assert [answer.status_code for answer in answers] == [404] * len(answers)
    assert (await client.get(BUDGETS)).json() == []
    row = await database.pool.fetchrow("SELECT status, limit_amount, spent FROM budgets")
    assert row is not None
    assert tuple(row) == ("active", 10, 0)
