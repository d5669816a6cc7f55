"""Our OpenAPI description: what it promises is what the server does, and it promises what the published one does.

Schemathesis makes requests from the description, good ones and bad ones, and holds every answer against it. It talks to a
server of its own process, without a worker: turns are started and wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, CheckFunction, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok

from domain.ids import Prefix, format_id, parse_id
from tests.stack import Stack

EXAMPLES_PER_OPERATION = 8
"""Per generation mode; sixty operations take half a minute."""

NOT_FOR_US = {
    # Litestar answers OPTIONS and sends `Allow` by itself; the description lists neither.
    "unsupported_method",
    # With AUTH_MODE=none whatever stands in `Authorization` is right.
    "ignored_auth",
}

STREAMS = {"stream_events", "stream_events_alias"}
"""Endless bodies; `tests/integration/test_streams.py` is about them."""

PUBLISHED = """
GET /v1/agents
POST /v1/agents
POST /v1/agents/analyze
GET /v1/agents/config
POST /v1/agents/import
POST /v1/agents/preview
GET /v1/agents/{agent_id}
PUT /v1/agents/{agent_id}
PATCH /v1/agents/{agent_id}
DELETE /v1/agents/{agent_id}
POST /v1/agents/{agent_id}/copy
GET /v1/agents/{agent_id}/export
GET /v1/agents/{agent_id}/stats
GET /v1/capabilities
POST /v1/capabilities
GET /v1/capabilities/declarative
GET /v1/capabilities/declarative/config
GET /v1/capabilities/declarative/{capability_id}
PATCH /v1/capabilities/declarative/{capability_id}
DELETE /v1/capabilities/declarative/{capability_id}
POST /v1/capabilities/declarative/{capability_id}/delete
POST /v1/capabilities/guardrails/dry-run
GET /v1/capabilities/guardrails/examples
GET /v1/capabilities/{capability_id}
GET /v1/durable/circuit-breakers
GET /v1/durable/circuit-breakers/{key}
DELETE /v1/durable/circuit-breakers/{key}
POST /v1/durable/circuit-breakers/{key}/close
POST /v1/durable/circuit-breakers/{key}/open
GET /v1/durable/config
GET /v1/harness-examples
GET /v1/harnesses
POST /v1/harnesses
GET /v1/harnesses/config
POST /v1/harnesses/import
POST /v1/harnesses/preview
GET /v1/harnesses/{harness_id}
PATCH /v1/harnesses/{harness_id}
DELETE /v1/harnesses/{harness_id}
POST /v1/harnesses/{harness_id}/copy
GET /v1/harnesses/{harness_id}/stats
GET /v1/models
GET /v1/models/config
GET /v1/models/{id}
PATCH /v1/models/{id}
DELETE /v1/models/{id}
GET /v1/providers
POST /v1/providers
GET /v1/providers/config
GET /v1/providers/{id}
PATCH /v1/providers/{id}
DELETE /v1/providers/{id}
POST /v1/providers/{id}/sync-models
GET /v1/providers/{provider_id}/models
POST /v1/providers/{provider_id}/models
GET /v1/sessions
POST /v1/sessions
GET /v1/sessions/stats
GET /v1/sessions/{session_id}
PATCH /v1/sessions/{session_id}
DELETE /v1/sessions/{session_id}
POST /v1/sessions/{session_id}/cancel
GET /v1/sessions/{session_id}/events
GET /v1/sessions/{session_id}/events/summary
GET /v1/sessions/{session_id}/export
GET /v1/sessions/{session_id}/messages
POST /v1/sessions/{session_id}/messages
PUT /v1/sessions/{session_id}/pin
DELETE /v1/sessions/{session_id}/pin
GET /v1/sessions/{session_id}/sse
GET /v1/sessions/{session_id}/storage/keys
GET /v1/sessions/{session_id}/storage/secrets
PUT /v1/sessions/{session_id}/storage/secrets
GET /v1/sessions/{session_id}/tasks
GET /v1/sessions/{session_id}/tasks/{task_id}
POST /v1/sessions/{session_id}/tasks/{task_id}/cancel
POST /v1/sessions/{session_id}/tasks/{task_id}/messages
POST /v1/sessions/{session_id}/tool-results
GET /v1/skills
POST /v1/skills
GET /v1/skills/config
POST /v1/skills/upload
GET /v1/skills/usage
POST /v1/skills/validate
GET /v1/skills/{skill_id}
PATCH /v1/skills/{skill_id}
DELETE /v1/skills/{skill_id}
GET /v1/skills/{skill_id}/content
GET /v1/tasks
GET /v1/workspaces
POST /v1/workspaces
GET /v1/workspaces/{workspace_id}
PATCH /v1/workspaces/{workspace_id}
DELETE /v1/workspaces/{workspace_id}
GET /v1/workspaces/{workspace_id}/fs
POST /v1/workspaces/{workspace_id}/fs/_/copy
GET /v1/workspaces/{workspace_id}/fs/_/download/{path}
POST /v1/workspaces/{workspace_id}/fs/_/grep
POST /v1/workspaces/{workspace_id}/fs/_/move
POST /v1/workspaces/{workspace_id}/fs/_/stat
GET /v1/workspaces/{workspace_id}/fs/{path}
POST /v1/workspaces/{workspace_id}/fs/{path}
PUT /v1/workspaces/{workspace_id}/fs/{path}
DELETE /v1/workspaces/{workspace_id}/fs/{path}
"""
"""Operations of the published description that this server covers."""


@pytest.fixture(scope="module")
async def stack() -> AsyncIterator[Stack]:
    # Nothing drains the sessions that are made here.
    async with Stack(no_worker=True, environment={"LOG_LEVEL": "warning"}) as running:
        yield running


def shape(method: str, path: str) -> str:
    """An operation without the names of its path parameters."""
    return f"{method.upper()} " + "/".join("{}" if part.startswith("{") else part for part in path.split("/"))


async def test_the_published_operations_are_all_here(stack: Stack) -> None:
    described = (await stack.client.get(f"{stack.addresses.docs}/openapi.json")).json()
    ours = {shape(method, path) for path, methods in described["paths"].items() for method in methods}
    published = {shape(*line.split(" /v1", 1)) for line in PUBLISHED.split("\n") if line}
    wanted = {operation.replace(" ", " /api/v1", 1) for operation in published}
    assert wanted - ours == set()


async def test_streams_are_described_as_streams(stack: Stack) -> None:
    described = (await stack.client.get(f"{stack.addresses.docs}/openapi.json")).json()
    found = {
        operation["operationId"]: operation
        for methods in described["paths"].values()
        for operation in methods.values()
        if operation["operationId"] in STREAMS
    }
    assert set(found) == STREAMS
    for operation in found.values():
        assert list(operation["responses"]["200"]["content"]) == ["text/event-stream"]
        assert "application/problem+json" in operation["responses"]["429"]["content"]


async def test_every_answer_is_as_described(stack: Stack) -> None:
    problems = await asyncio.to_thread(run_schemathesis, f"{stack.addresses.docs}/openapi.json", await real_ids(stack))
    assert not problems, "\n\n".join(f"{name}:\n{text}" for name, text in problems.items())


async def real_ids(stack: Stack) -> dict[str, str]:
    """Path parameters that lead somewhere, by name: made-up ones end in 400 and 404."""
    session = await stack.create_session()
    await stack.post_message(session, "hello")
    agent = await stack.client.post("agents", json={"name": "described", "system_prompt": "x"})
    harness = await stack.client.post("harnesses", json={"name": "described"})
    models = (await stack.client.get("models")).json()["data"]
    daily = {"message": "m", "cron_expression": "@daily"}
    schedule = await stack.client.post(f"sessions/{session}/schedules", json=daily)
    task = await stack.pool.fetchval(
        """INSERT INTO session_tasks (id, org_id, session_id, root_session_id, child_session_id, kind, display_name, mode, state,
           wake_policy, deadline_at) SELECT gen_random_uuid(), 1, $1, $1, $2, 'subagent', 'n', 'background', 'running', 'silent',
           now() + interval '1 hour' RETURNING id""",
        parse_id(Prefix.SESSION, session),
        parse_id(Prefix.SESSION, await stack.create_session()),
    )
    skill = await stack.client.post("skills", json={"skill_md": "---\nname: described\ndescription: x\n---\nx"})
    workspace = session.replace("session_", "wsp_")
    for path in ("described.txt", "described/inner.txt"):
        await stack.client.post(f"workspaces/{workspace}/fs/{path}", json={"content": "x"})
    return {
        "session_id": session,
        "workspace_id": workspace,
        "path": "described.txt",
        "agent_id": agent.json()["id"],
        "harness_id": harness.json()["id"],
        "model_id": models[0]["id"],
        "provider_id": models[0]["provider_id"],
        "key": models[0]["id"],
        "schedule_id": schedule.json()["id"],
        "task_id": format_id(Prefix.TASK, task),
        "capability_id": "current_time",
        "skill_id": skill.json()["id"],
        "org": f"org_{1:032x}",
    }


def run_schemathesis(url: str, ids: dict[str, str]) -> dict[str, str]:
    load_all_checks()
    excluded = cast(list[CheckFunction], CHECKS.get_by_names(sorted(NOT_FOR_US)))
    schema = schemathesis.openapi.from_url(url)
    # Rules that JSON Schema cannot say (a model that exists, one of two fields, sizes in bytes) are told with 400, too.
    acceptance = schema.config.checks.positive_data_acceptance
    # Those of a SKILL.md are told with 422, as published.
    acceptance.expected_statuses = [*acceptance.expected_statuses, "400", "422"]
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) > 40
    problems: dict[str, str] = {}
    for operation in operations:
        name = operation.definition.raw["operationId"]
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            problem = None if name in STREAMS else problem_of(operation, mode, ids, excluded)
            if problem:
                problems[f"{name}, {mode.value} ({operation.label})"] = problem
    return problems


def problem_of(
    operation: APIOperation, mode: GenerationMode, ids: dict[str, str], excluded: list[CheckFunction]
) -> str | None:
    deletes = operation.method.upper() == "DELETE" or operation.path.endswith("/delete")
    parameters = ids if mode is GenerationMode.POSITIVE and not deletes else {}

    @settings(
        max_examples=EXAMPLES_PER_OPERATION,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(case=operation.as_strategy(mode))
    def attempt(case: Case) -> None:
        for name in case.path_parameters.keys() & parameters.keys():
            case.path_parameters[name] = parameters[name]
        case.call_and_validate(excluded_checks=excluded, timeout=30)

    try:
        attempt()
    except Unsatisfiable:
        # An operation that takes nothing can't be given anything wrong.
        return None if mode is GenerationMode.NEGATIVE else "no request could be made from its description"
    except Exception as error:
        return f"{error}"[:3_000]
    return None
