"""Figures, percentiles, and whose CPU time it was.

The machine may be shared. So every figure is a percentile or a ratio of things measured side by side, and every cell says how
much of the CPU others used meanwhile: what is left of the machine's busy time after subtracting our own processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Self

from msgspec import Struct

TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Figure(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the table. `aim` is met when the value is at most, or at least, so much."""

    name: str
    value: float
    unit: str
    n: int | None = None
    aim: float | None = None
    aim_is: Literal["at most", "at least"] = "at most"

    @property
    def met(self) -> bool | None:
        if self.aim is None:
            return None
        return self.value <= self.aim if self.aim_is == "at most" else self.value >= self.aim


class CellResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`foreign_share` is the part of the machine's CPU time that went to processes that are not ours."""

    name: str
    title: str
    seconds: float
    foreign_share: float
    figures: list[Figure] = []
    error: str | None = None


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def p50(values: Sequence[float]) -> float:
    return percentile(values, 50)


def p99(values: Sequence[float]) -> float:
    return percentile(values, 99)


def latency(name: str, milliseconds: Sequence[float], *, aim_p50: float | None = None) -> list[Figure]:
    return [
        Figure(name=f"{name}, p50", value=p50(milliseconds), unit="ms", n=len(milliseconds), aim=aim_p50),
        Figure(name=f"{name}, p99", value=p99(milliseconds), unit="ms", n=len(milliseconds)),
    ]


def cpu_seconds(pid: int, *, with_ended_children: bool = False) -> float:
    """User and system time of a process so far; 0 for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(ticks) for ticks in fields[11 : 15 if with_ended_children else 13]) / TICKS_PER_SECOND


def tree_cpu_seconds(root: int) -> float:
    """A process, its living children and those it has waited for: PostgreSQL's backends."""
    return cpu_seconds(root, with_ended_children=True) + sum(cpu_seconds(pid) for pid in children(root))


def children(parent: int) -> list[int]:
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


def machine_busy_seconds() -> float:
    """CPU time used by anybody since boot, stolen time included."""
    fields = [int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / TICKS_PER_SECOND


class CpuClock:
    """CPU time by part between `start` and `stop`, with everybody else's as `others`."""

    def __init__(self, parts: Mapping[str, Callable[[], float]]) -> None:
        self._parts = parts
        self._before: dict[str, float] = {}
        self._busy = 0.0
        self._began = 0.0
        self.seconds = 0.0
        self.used: dict[str, float] = {}

    def start(self) -> Self:
        self._before = {name: read() for name, read in self._parts.items()}
        self._busy = machine_busy_seconds()
        self._began = time.monotonic()
        return self

    def stop(self) -> Self:
        self.seconds = time.monotonic() - self._began
        self.used = {name: max(0.0, read() - self._before[name]) for name, read in self._parts.items()}
        self.used["others"] = max(0.0, machine_busy_seconds() - self._busy - sum(self.used.values()))
        return self

    @property
    def foreign_share(self) -> float:
        return self.used["others"] / max(self.seconds * (os.cpu_count() or 1), 1e-9)


def total(clocks: Iterable[CpuClock]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for clock in clocks:
        for name, seconds in clock.used.items():
            sums[name] = sums.get(name, 0.0) + seconds
    return sums
