"""Harnesses and agents to start from. Their capabilities are checked against the registry by a test."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from domain.config import CapabilityRef


class HarnessExample(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A read-only harness example."""

    name: str
    display_name: str
    description: str
    tags: list[str]
    capabilities: list[CapabilityRef]
    dev_only: bool
    parent_name: str | None = None


HARNESS_EXAMPLES: Final = [
    HarnessExample(
        name="task-planner",
        display_name="Task planner",
        description="Keeps a visible list of what is to be done and works it off.",
        tags=["planning"],
        capabilities=[CapabilityRef(ref="stateless_todo_list")],
        dev_only=False,
        parent_name="generic",
    ),
    HarnessExample(
        name="weather-desk",
        display_name="Weather desk",
        description="Simulated weather tools, for trying out tool calls without a network.",
        tags=["testing"],
        capabilities=[CapabilityRef(ref="test_weather"), CapabilityRef(ref="current_time")],
        dev_only=True,
        parent_name="base",
    ),
]

AGENT_EXAMPLES: Final = {
    "dad-jokes-agent": """---
name: dad-jokes-agent
display_name: Dad jokes
description: Answers everything, and ends with a pun.
tags: [fun]
---

You are a cheerful assistant. Answer the question first, correctly and briefly. Then add one harmless pun about its topic.
""",
    "weather-agent": """---
name: weather-agent
display_name: Weather
description: Answers questions about the weather with simulated tools.
tags: [testing]
capabilities:
  - ref: test_weather
  - ref: current_time
---

You answer questions about the weather. Always look it up with your tools; never guess. Name the place and the unit.
""",
}
"""Agent files, by the name they are imported with."""
