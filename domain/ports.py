"""Small Protocols through which a package gets what lives beside or above it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from domain.messages import Delivery
from domain.model import DiscoveredModel, ModelEndpoint


class TurnLabels(Struct, frozen=True, kw_only=True):
    """What a person sees of a turn in Temporal's Web UI and can filter by. The ids are public ids."""

    org_id: str
    harness: str
    turn_number: int
    agent_id: str | None = None
    agent_name: str | None = None
    title: str | None = None


class TurnGateway(Protocol):
    """How the API reaches turns. State is committed before any of these is called, so a repeated call does no harm.

    All raise `DependencyUnavailable` when the engine cannot be reached.
    """

    async def wake(
        self,
        session_id: str,
        *,
        message_id: str | None = None,
        delivery: Delivery = Delivery.STEER,
        running: bool = False,
        ends_wait: bool | None = None,
        labels: TurnLabels | None = None,
    ) -> None:
        """Start a turn, or tell the running one, because something unread is in the log.

        `running` is the caller's guess which of the two it will be; a wrong one costs a round trip. `ends_wait` tells whether
        the message came while the session waited for client-side tools.
        """
        ...

    async def cancel(self, session_id: str, reason: str | None, *, read_up_to: int | None = None) -> None:
        """Ask the running turn to stop; no running turn is fine."""
        ...

    async def interrupt(self, session_id: str, message_id: str | None) -> None:
        """Stop the running step, then answer."""
        ...

    async def tool_results(self, session_id: str, tool_call_ids: Sequence[str]) -> None:
        """Results of client-side tools are in the log."""
        ...


class ModelOptionsCheck(Protocol):
    def __call__(self, provider_type: str, options: Mapping[str, object]) -> None:
        """Refuse options that the driver of this provider type could not use; raises `InvalidInput`."""
        ...


class ModelDiscovery(Protocol):
    async def __call__(self, endpoint: ModelEndpoint) -> list[DiscoveredModel] | None:
        """The provider's own list of models; None when it has none to give. Raises `ModelError`."""
        ...


class MessageMetadataCheck(Protocol):
    def __call__(self, metadata: Mapping[str, object]) -> None:
        """Refuse message metadata that a driver would have to refuse later; raises `InvalidInput`."""
        ...
