from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.conftest import API, Make

DRY_RUN = f"{API}/capabilities/guardrails/dry-run"
LONG = "x" * 100_001


async def test_the_hits_of_a_dry_run_are_in_the_order_of_the_checks(client: httpx.AsyncClient) -> None:
    config = {
        "checks": [
            {"type": "blocklist", "stage": "output", "words": ["darn"], "on_fail": "log"},
            {"type": "regex", "stage": "tool_use", "patterns": ["something"]},
            {"type": "regex", "stage": "output", "patterns": ["some"], "id": "mine", "replacement": "No."},
        ]
    }
    answer = await client.post(DRY_RUN, json={"config": config, "stage": "output", "text": "something Darn surprising"})
    assert answer.status_code == 200
    assert answer.json() == {
        "blocked": True,
        "hits": [
            {
                "check_id": "blocklist#0",
                "check_index": 0,
                "rule_type": "blocklist",
                "stage": "output",
                "action": "log",
                "reason_code": "guardrail.blocklist",
                "matched": "Darn",
            },
            {
                "check_id": "mine",
                "check_index": 2,
                "rule_type": "regex",
                "stage": "output",
                "action": "block",
                "reason_code": "guardrail.regex",
                "matched": "some",
                "replacement": "No.",
            },
        ],
    }
    advisory = {"config": {**config, "mode": "advisory"}, "stage": "output", "text": "something"}
    assert (await client.post(DRY_RUN, json=advisory)).json()["blocked"] is False


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"config": {"checks": [{"type": "llm_judge", "stage": "output", "prompt": "x"}]}}, "config.checks[0].type"),
        ({"config": {"checks": [{"type": "regex", "stage": "output", "patterns": ["("]}]}}, "config.checks[0]"),
        ({"config": {"mode": "harsh"}}, "config.mode"),
        ({"config": {"surprise": 1}}, "config.surprise"),
        ({"stage": "input"}, "stage"),
        ({"text": LONG}, "text"),
        ({"text": None}, "text"),
    ],
)
async def test_a_wrong_dry_run_is_refused_and_names_the_field(
    body: dict[str, Any], field: str, client: httpx.AsyncClient
) -> None:
    answer = await client.post(DRY_RUN, json={"config": {}, "stage": "output", "text": "x", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["field"] == field


async def test_the_capability_is_served_beside_its_endpoints(client: httpx.AsyncClient) -> None:
    shown = (await client.get(f"{API}/capabilities/guardrails")).json()
    assert shown["is_guardrail"] is True
    assert "$ref" not in str(shown["config_schema"])
    assert "$defs" not in str(shown["config_schema"])


async def test_an_agent_with_a_pattern_that_does_not_compile_is_refused(
    client: httpx.AsyncClient, make_agent: Make
) -> None:
    await make_agent()
    config = {"checks": [{"type": "regex", "stage": "output", "patterns": [r"(a)\1"]}]}
    body = {"name": "other", "system_prompt": "x", "capabilities": [{"ref": "guardrails", "config": config}]}
    answer = await client.post(f"{API}/agents", json=body)
    assert answer.status_code == 400
    assert answer.json()["field"] == "capabilities[0].config.checks[0]"
