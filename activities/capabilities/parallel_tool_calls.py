"""Whether the model should call several tools at once: a hint in the prompt, and where not, the provider's own switch.

`parallel_tool_calls` of a session, agent or harness is stronger: it also decides how calls are run.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from domain.capabilities import Capability

PREFER: Final = (
    "When several tool calls do not depend on each other's results, make them together in one answer: they run side by side. "
    "Call one after the other only what needs another's result."
)
AVOID: Final = "Call one tool at a time, and look at its result before the next call."


class ParallelToolCalls(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mode: Annotated[
        Literal["prefer", "avoid", "none"],
        Meta(
            description="prefer (default): a hint. avoid: a hint, and the provider is asked for one call at a time. none."
        ),
    ] = "prefer"


def config_prompt(config: Struct | None) -> str | None:
    assert isinstance(config, ParallelToolCalls)
    return {"prefer": PREFER, "avoid": AVOID}.get(config.mode)


CAPABILITY = Capability(
    id="parallel_tool_calls",
    name="Parallel Tool Calls",
    description="Tells the model to call independent tools together, or one at a time.",
    category="Behaviour",
    icon="split",
    config=ParallelToolCalls,
    config_prompt=config_prompt,
)
