"""The one step of a firing schedule: its message into the session, then the word to the session's turn."""

from __future__ import annotations

from datetime import UTC, datetime

import structlog
from temporalio import activity

from domain.messages import Delivery as MessageDelivery
from domain.ports import TurnGateway
from domain.schedules import ScheduledDeliveries, Undelivered
from workflows import contract

log = structlog.get_logger(__name__)


class ScheduledMessageActivity:
    def __init__(self, deliveries: ScheduledDeliveries, turns: TurnGateway) -> None:
        self._deliveries = deliveries
        self._turns = turns

    @activity.defn(name=contract.DELIVER_SCHEDULED)
    async def deliver_scheduled(self, input: contract.DeliverScheduledInput) -> contract.DeliveryResult:
        """Every part of it may be repeated: the message is stored once, and a turn that has nothing to read ends at once."""
        due_at = datetime.fromtimestamp(input.due_at, UTC)
        delivery = await self._deliveries.deliver(input.schedule_id, due_at)
        if isinstance(delivery, Undelivered):
            log.info("a schedule delivers nothing", schedule_id=input.schedule_id, reason=delivery.value)
            if delivery is Undelivered.OVER:
                await self._deliveries.forget(input.schedule_id)
            return contract.DeliveryResult(undelivered=delivery.value)
        await self._turns.wake(
            delivery.session_id,
            message_id=delivery.message_id,
            delivery=MessageDelivery.FOLLOW_UP,
            running=delivery.steered,
            ends_wait=delivery.ends_wait,
            labels=delivery.labels,
        )
        # Last: as long as the turn has not been told, the schedule is all there is to try again.
        if delivery.over:
            await self._deliveries.forget(input.schedule_id)
        return contract.DeliveryResult(message_id=delivery.message_id)
