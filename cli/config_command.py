"""`everruns config`: every setting, its value, where the value comes from and its default; secrets masked.

It explains a wrong environment as well as a right one: the problems come last, where a person looks first.
"""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.settings import Resolved, resolve_settings

NOTHING = "–"  # not the word "none", which is a value of AUTH_MODE


def print_config(environ: Mapping[str, str], *, console: Console | None = None) -> bool:
    """Print the settings `environ` results in; False when some of them are wrong."""
    console = console or Console()
    resolution = resolve_settings(environ)
    groups: dict[str, list[Resolved]] = {}
    for row in resolution.rows:
        groups.setdefault(row.setting.group, []).append(row)
    if console.is_terminal:
        for group, rows in groups.items():
            console.print(_table(group, rows))
    else:
        # For grep and scripts: one setting per line, and nothing is wrapped or cut.
        for rows in groups.values():
            for row in rows:
                print(_line(row), file=console.file)
    for problem in resolution.problems:
        if console.is_terminal:
            console.print(Text(problem, style="bold red"))
        else:
            print(f"# {problem}", file=console.file)
    return not resolution.problems


def _table(group: str, rows: list[Resolved]) -> Table:
    table = Table(title=group, title_justify="left", title_style="bold", expand=True, box=None, pad_edge=False)
    table.add_column("Setting", no_wrap=True, ratio=3, style="cyan")
    table.add_column("Value", ratio=4, overflow="fold")
    table.add_column("Source", ratio=2)
    table.add_column("Default", ratio=3, style="dim")
    for row in rows:
        table.add_row(
            row.setting.name,
            Text(row.shown or NOTHING),
            Text(_source(row), style="" if row.source.kind == "environment" else "dim"),
            Text(_default(row)),
        )
    return table


def _line(row: Resolved) -> str:
    return f"{row.setting.name}={row.shown}  # {_source(row)}; default: {_default(row)}"


def _source(row: Resolved) -> str:
    # The variable is only worth its space when it is not the setting's own name.
    alias = row.source.variable if row.source.variable != row.setting.name else ""
    return f"{row.source.kind} {alias}".rstrip()


def _default(row: Resolved) -> str:
    return row.setting.default_words.replace("`", "") or NOTHING
