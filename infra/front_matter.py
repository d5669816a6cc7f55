"""YAML between two lines of `---` at the beginning of a text, read as what it is: input from strangers.

Without aliases (a few lines of them expand to gigabytes), without tags, without timestamps (JSON has none), and no longer or
deeper than a person would write it. What comes out is JSON-able.
"""

from __future__ import annotations

import re
from typing import Final

import yaml

FRONT_MATTER_MAX_BYTES: Final = 64 * 1024
MAX_DEPTH: Final = 20

_FRONT_MATTER: Final = re.compile(
    r"\A\ufeff?---[ \t]*\r?\n(?P<yaml>.*?)^---[ \t]*(?:\r?\n|\Z)(?P<body>.*)\Z", re.DOTALL | re.MULTILINE
)


class FrontMatterProblem(Exception):
    """The front matter cannot be read; the text says why, and repeats nothing of it"""


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags are not supported", problem_mark=event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def split_front_matter(text: str) -> tuple[dict[str, object], str]:
    """The fields and what stands below them. Raises `FrontMatterProblem`."""
    match = _FRONT_MATTER.match(text)
    if match is None:
        if text.lstrip("\ufeff").startswith("---"):
            raise FrontMatterProblem("the front matter has no end: a line of `---` is missing")
        raise FrontMatterProblem("there is no front matter: the file must begin with a line of `---`")
    if len(match["yaml"].encode()) > FRONT_MATTER_MAX_BYTES:
        raise FrontMatterProblem(f"the front matter is longer than {FRONT_MATTER_MAX_BYTES} bytes")
    fields = _load(match["yaml"])
    if fields is None:
        fields = {}
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise FrontMatterProblem("the front matter must hold fields, such as `name: …`")
    return fields, match["body"].lstrip("\r\n")


def _load(text: str) -> object:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 # a SafeLoader that refuses more
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 2}" if mark else ""
        problem = getattr(error, "problem", None) or "it is not valid YAML"
        raise FrontMatterProblem(f"the front matter cannot be read{where}: {problem}") from None
