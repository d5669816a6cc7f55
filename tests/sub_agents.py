"""What tests of sub-agents have in common: scripts for a parent and, through its model, for its children."""

from __future__ import annotations

from uuid import uuid4

from tests.stack import Json, Stack


def script(*turns: Json, **fields: object) -> Json:
    return {"mode": "script", "turns": list(turns), **fields}


def saying(text: str) -> Json:
    return {"text": text}


def call(name: str, call_id: str | None = None, /, **arguments: object) -> Json:
    return {"name": name, "arguments": arguments, **({"id": call_id} if call_id else {})}


def calling(*calls: Json) -> Json:
    return {"tool_calls": list(calls)}


def bg(call_id: str | None = None, **arguments: object) -> Json:
    """A call that begins a sub-agent in the background."""
    return call("spawn_agent", call_id, **{"name": "Look", "instructions": "Find out.", **arguments})


def fg(call_id: str | None = None, **arguments: object) -> Json:
    """A call that begins a sub-agent and waits for it."""
    return bg(call_id, mode="foreground", **arguments)


async def model_with_script(stack: Stack, llmsim: Json) -> str:
    """A simulated model whose script plays wherever a message brings none: in the sessions of children."""
    providers = (await stack.client.get("providers")).json()["data"]
    provider = next(one["id"] for one in providers if one["provider_type"] == "llmsim")
    body = {"model_id": f"llmsim-{uuid4().hex[:12]}", "display_name": "Scripted", "options": {"script": llmsim}}
    made = await stack.client.post(f"providers/{provider}/models", json=body)
    assert made.status_code == 201, made.text
    return made.json()["id"]
