"""What a firing Temporal Schedule starts: it can start nothing but a workflow, and a message needs a step in the database."""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from workflows import contract


@workflow.defn(name=contract.SCHEDULED_MESSAGE_WORKFLOW)
class ScheduledMessage:
    """One firing of one schedule. It knows which and when; what the message says stays in PostgreSQL.

    Its one step is repeated until it has succeeded: the message is stored once however often, and the session's turn is told.
    Meanwhile Temporal skips further times of the same schedule.
    """

    @workflow.run
    async def run(self, start: contract.ScheduledMessageStart) -> contract.DeliveryResult:
        info = workflow.info()
        # Temporal says for which time it fires, which may be long ago. Somebody who starts the workflow by hand says nothing.
        due = info.typed_search_attributes.get(contract.SCHEDULED_START_ATTRIBUTE) or info.start_time
        return await workflow.execute_activity(
            contract.DELIVER_SCHEDULED,
            contract.DeliverScheduledInput(schedule_id=start.schedule_id, due_at=due.timestamp()),
            result_type=contract.DeliveryResult,
            start_to_close_timeout=contract.DATABASE_STEP_TIMEOUT,
            heartbeat_timeout=contract.HEARTBEAT_TIMEOUT,
            retry_policy=contract.DATABASE_STEP_RETRY,
            summary="deliver",
        )
