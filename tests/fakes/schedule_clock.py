"""A clock that only notes what it is told; for tests of everything around it."""

from __future__ import annotations

from dataclasses import dataclass, field

from domain.schedules import ScheduleRefused, Timing


@dataclass
class FakeClock:
    """With `failure` every call raises it. Time zones in `unknown_zones` are refused."""

    armed: dict[str, Timing] = field(default_factory=dict)
    fired: list[str] = field(default_factory=list)
    paused: set[str] = field(default_factory=set)
    unknown_zones: set[str] = field(default_factory=set)
    failure: Exception | None = None

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def arm(self, timing: Timing) -> bool:
        self._fail()
        if timing.timezone in self.unknown_zones:
            raise ScheduleRefused
        new = timing.schedule_id not in self.armed
        self.armed.setdefault(timing.schedule_id, timing)
        return new

    async def disarm(self, schedule_id: str) -> None:
        self._fail()
        self.armed.pop(schedule_id, None)

    async def fire_now(self, schedule_id: str) -> None:
        self._fail()
        if schedule_id in self.armed:
            self.fired.append(schedule_id)

    async def is_paused(self, schedule_id: str) -> bool | None:
        self._fail()
        return schedule_id in self.paused if schedule_id in self.armed else None

    async def known(self) -> set[str]:
        self._fail()
        return set(self.armed)
