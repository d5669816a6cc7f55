"""A change of the workflow must not break turns that began before it.

Every stored history of every release is replayed through today's workflow, inside the sandbox: a command that differs from
the recorded one fails here instead of in somebody's running turn.
"""

from __future__ import annotations

import pytest
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from infra.temporal_client import DATA_CONVERTER
from tests.replay.record import HISTORIES, SHAPES
from workflows.turn import Turn

RECORDED = {path.stem: path.read_text() for path in sorted(HISTORIES.glob("*.json"))}
SANDBOX = SandboxedWorkflowRunner(
    restrictions=SandboxRestrictions.default.with_passthrough_modules("domain", "workflows.contract", "msgspec")
)


def test_every_shape_of_a_turn_has_a_recorded_history() -> None:
    assert {name.rpartition("-")[2] for name in RECORDED} == set(SHAPES)


@pytest.mark.parametrize("name", RECORDED)
async def test_recorded_turn_replays_without_a_difference(name: str) -> None:
    replayer = Replayer(workflows=[Turn], data_converter=DATA_CONVERTER, workflow_runner=SANDBOX)
    await replayer.replay_workflow(WorkflowHistory.from_json("session", RECORDED[name]))


async def test_replay_notices_a_workflow_that_does_something_else() -> None:
    """The guard itself: a history whose first step is another activity must be refused."""
    text = next(history for name, history in RECORDED.items() if name.endswith("-answer"))
    assert '"reason"' in text
    replayer = Replayer(workflows=[Turn], data_converter=DATA_CONVERTER, workflow_runner=SANDBOX)
    with pytest.raises(Exception, match=r"(?i)nondeterminism"):
        await replayer.replay_workflow(WorkflowHistory.from_json("session", text.replace('"reason"', '"act"')))
