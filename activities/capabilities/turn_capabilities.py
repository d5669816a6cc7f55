"""The capabilities of one turn: those built in, and those that only its configuration knows.

The configuration is pinned for the turn; what a session's own capabilities say (a file in the workspace, the tools of a server)
is read when a step begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from activities.capabilities.registry import CapabilityRegistry, ResolvedCapabilities, ResolvedCapability
from domain.capabilities import CapabilitySource
from domain.config import TurnConfig
from domain.session_storage import SessionStorage
from domain.turns import SessionResources
from domain.workspace import WorkspaceFiles


class ViewedSession(Struct, frozen=True, kw_only=True):
    """The `SessionView` of a step."""

    session_id: str
    resources: SessionResources

    @property
    def files(self) -> WorkspaceFiles:
        return self.resources.files(self.session_id)

    @property
    def storage(self) -> SessionStorage:
        return self.resources.storage(self.session_id)


class TurnCapabilities:
    def __init__(
        self, registry: CapabilityRegistry, resources: SessionResources, sources: Sequence[CapabilitySource] = ()
    ) -> None:
        self._registry = registry
        self._resources = resources
        self._sources = sources

    async def resolve(self, session_id: str, config: TurnConfig) -> ResolvedCapabilities:
        """Without what capabilities say about the session: enough to run a tool."""
        others = [one for source in self._sources for one in await source.capabilities(session_id, config)]
        resolved = self._registry.resolve(config.capabilities, others)
        problems = {one.ref: one.problem for one in config.declared if one.problem is not None}
        skipped = tuple(
            msgspec.structs.replace(one, reason=problems.get(one.ref, one.reason)) for one in resolved.skipped
        )
        return msgspec.structs.replace(resolved, skipped=skipped)

    async def resolve_for_prompt(self, session_id: str, config: TurnConfig) -> ResolvedCapabilities:
        resolved = await self.resolve(session_id, config)
        if not any(one.capability.session_prompt for one in resolved.capabilities):
            return resolved
        described = tuple([await self._described(session_id, one) for one in resolved.capabilities])
        return msgspec.structs.replace(resolved, capabilities=described)

    def view(self, session_id: str) -> ViewedSession:
        return ViewedSession(session_id=session_id, resources=self._resources)

    async def _described(self, session_id: str, one: ResolvedCapability) -> ResolvedCapability:
        describe = one.capability.session_prompt
        if describe is None:
            return one
        return msgspec.structs.replace(one, session_prompt=await describe(self.view(session_id), one.config))
