"""Rows as capabilities: what a turn has pinned of declarative capabilities and skills, in the registry's terms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from activities.capabilities import skills
from domain.capabilities import Capability
from domain.config import CapabilityRef, DeclaredCapability, TurnConfig
from domain.skills import SkillRegistry


class DeclaredCapabilities:
    """A `domain.capabilities.CapabilitySource`."""

    def __init__(self, registry: SkillRegistry | None = None) -> None:
        self._registry = registry

    async def capabilities(self, session_id: str, config: TurnConfig) -> Sequence[Capability]:
        return declared_capabilities(config, self._registry)


def declared_capabilities(config: TurnConfig, registry: SkillRegistry | None = None) -> list[Capability]:
    """Those that are usable, in the order that references reach them; and `skills` itself, when it is to know some."""
    usable = [one for one in config.declared if one.problem is None]
    pinned = [one.skill for one in usable if one.skill is not None]
    capabilities = [capability_of(one) for one in usable]
    # In front: nothing else brings `skills` in with the skills it is to know.
    return [skills.capability(registry, pinned), *capabilities] if pinned else capabilities


def capability_of(declared: DeclaredCapability) -> Capability:
    return Capability(
        id=declared.ref,
        name=declared.name,
        description=declared.description,
        category="Skill" if declared.skill else "Declarative",
        risk_level=declared.risk_level,
        dependencies=tuple(declared.dependencies),
        features=tuple(declared.features),
        system_prompt=declared.system_prompt,
    )


def reached(refs: Iterable[CapabilityRef], declared: Sequence[DeclaredCapability]) -> list[DeclaredCapability]:
    """Those of `declared` that `refs` name, and those that these bring in."""
    by_ref = {one.ref: one for one in declared}
    found: dict[str, DeclaredCapability] = {}
    waiting = [ref.ref for ref in refs]
    while waiting:
        one = by_ref.get(waiting.pop())
        if one is not None and one.ref not in found:
            found[one.ref] = one
            waiting += one.dependencies
    return [one for one in declared if one.ref in found]
