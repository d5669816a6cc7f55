"""The command: `python -m benchmarks [--only NAME …] [--quick]`, or `make bench ARGS="--quick"`."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Final

import uvloop
from cyclopts import App
from msgspec import Struct
from rich.console import Console

from benchmarks import recovery, report, streams, turns
from benchmarks.measurement import CellResult, Figure
from benchmarks.scope import Scope

FULL_SECONDS: Final = 360.0
QUICK_SECONDS: Final = 90.0
"""When they are over, on a machine that is too busy, the cells that are left are skipped and say so."""

LEAST_SECONDS: Final = 5.0
"""With less than this left, a cell is not begun."""


class Cell(Struct, frozen=True):
    name: str
    title: str
    run: Callable[[Scope], Awaitable[list[Figure]]]


CELLS: Final = (
    Cell("overhead", "Turn overhead against bare Temporal, one at a time", turns.overhead),
    Cell("first-delta", "First delta, one turn at a time", turns.first_delta),
    Cell("throughput", "Turns per second, closed loop, reason → act → reason", turns.throughput),
    Cell("fan-out", "Event streams: 1,000 open in one process", streams.fan_out),
    Cell("replay", "Replay of a long log", streams.replay),
    Cell("recovery", "kill -9 of a worker, another standing by", recovery.recovery),
    Cell("flatness", "The same turn in a long session", streams.flatness),
    Cell("memory", "Memory of the processes, 16 in flight", turns.memory),
    Cell("hops", "Where the time of a turn goes, since the POST", turns.hops),
)
NAMES: Final = ", ".join(cell.name for cell in CELLS)

app = App(name="benchmarks", help=f"Measure the engine against itself and against bare Temporal. Cells: {NAMES}.")


@app.default
def main(*, only: list[str] | None = None, quick: bool = False) -> None:
    """Run the cells, print a table and write benchmarks/results/.

    Example: make bench ARGS="--only throughput --quick"

    Parameters
    ----------
    only:
        Run this cell; may be given several times.
    quick:
        Fewer samples: a look in at most a minute and a half instead of a measurement in at most six.
    """
    unknown = set(only or ()) - {cell.name for cell in CELLS}
    if unknown:
        sys.exit(f"no cell is called {', '.join(sorted(unknown))}; there are {NAMES}")
    results = uvloop.run(_run([cell for cell in CELLS if not only or cell.name in only], quick=quick))
    path = report.write(results, quick=quick)
    print(f"Written to {path}")
    if any(result.error for result in results):
        sys.exit(1)


async def _run(cells: list[Cell], *, quick: bool) -> list[CellResult]:
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width, and its lines are read later
        console = Console(width=120)
    results: list[CellResult] = []
    deadline = time.monotonic() + (QUICK_SECONDS if quick else FULL_SECONDS)
    for cell in cells:
        scope = Scope(quick=quick)
        began = time.monotonic()
        figures: list[Figure] = []
        error: str | None = None
        try:
            with console.status(cell.title):
                left = deadline - began
                if left < LEAST_SECONDS:
                    raise TimeoutError("skipped, the time for all cells was used up")
                async with asyncio.timeout(left):
                    figures = await cell.run(scope)
        except Exception as failure:  # a cell that fails must not cost the figures of the others
            error = f"{type(failure).__name__}: {failure}"
        results.append(
            CellResult(
                name=cell.name,
                title=cell.title,
                seconds=time.monotonic() - began,
                foreign_share=scope.foreign_share,
                figures=figures,
                error=error,
            )
        )
        report.show_cell(console, results[-1])
    return results


if __name__ == "__main__":
    app()
