"""The table on the terminal and the JSON beside it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from benchmarks.measurement import CellResult, Figure

RESULTS: Final = Path(__file__).parent / "results"


class Report(Struct, frozen=True, kw_only=True):
    at: str
    quick: bool
    cores: int
    python: str
    cells: list[CellResult]


def shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def show_cell(console: Console, cell: CellResult) -> None:
    table = Table(
        title=cell.title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False
    )
    table.add_column(min_width=44)
    table.add_column(justify="right", min_width=8)
    table.add_column(min_width=3)
    table.add_column(justify="right", style="dim")
    table.add_column(no_wrap=True)
    for figure in cell.figures:
        table.add_row(figure.name, shown(figure.value), figure.unit, _count(figure), _verdict(figure))
    console.print(table)
    if cell.error:
        console.print(f"[red]{cell.error}[/red]")
    console.print(f"[dim]{cell.seconds:.0f} s, CPU used by others {cell.foreign_share:.0%}[/dim]\n")


def _count(figure: Figure) -> str:
    return "" if figure.n is None else f"n={figure.n:,}"


def _verdict(figure: Figure) -> str:
    if figure.met is None:
        return ""
    sign = "≤" if figure.aim_is == "at most" else "≥"
    color = "green" if figure.met else "yellow"
    return f"[{color}]aim {sign} {figure.aim:,g}: {'met' if figure.met else 'missed'}[/{color}]"


def write(cells: Sequence[CellResult], *, quick: bool) -> Path:
    now = datetime.now(UTC)
    report = Report(
        at=now.isoformat(timespec="seconds"),
        quick=quick,
        cores=os.cpu_count() or 0,
        python=platform.python_version(),
        cells=list(cells),
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y%m%dT%H%M%SZ}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    return path
