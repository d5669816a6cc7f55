r"""Regular expressions and globs from people and models, which may be hostile.

RE2, because its time is linear in the text whatever the pattern: Python's `re` and PostgreSQL's regular expressions can be made
to run for hours, and a thread that matches cannot be stopped. It also lets go of the GIL while it matches. What RE2 leaves out is
what needs backtracking: look-around and back-references. PostgreSQL's dialect would besides mean something else by `\b`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import re2

from domain.limits import GREP_PATTERN_MAX_BYTES
from domain.workspace import ROOT, BadPattern

CHUNK_BYTES: Final = 256 * 1024
"""Text that is matched between two looks at the clock, and what is looked at of a line. The worst patterns get through about
half a megabyte a second (RE2 without its automaton, for want of memory)."""

PATTERN_MEMORY_BYTES: Final = 8 * 1024 * 1024


class Match(Protocol):
    def start(self) -> int: ...

    def end(self) -> int: ...


class Pattern(Protocol):
    """What is used of a compiled expression."""

    def search(self, text: bytes, pos: int | None = None, endpos: int | None = None) -> Match | None: ...

    def fullmatch(self, text: bytes) -> Match | None: ...


def compile_line_pattern(pattern: str) -> Pattern:
    """Matched line by line: `^` and `$` stand for a line's beginning and end, and nothing matches a line break.

    Raises `BadPattern`.
    """
    try:
        return _compiled(b"(?m)" + _encoded(pattern, "The regular expression"))
    except re2.error as error:
        reason = error.args[0] if error.args else b""
        text = (reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)).replace("(?m)", "", 1)
        raise BadPattern(
            f"The regular expression cannot be used: {text}. The syntax is RE2's, without look-around and back-references"
        ) from None


def matching_lines(pattern: Pattern, content: bytes) -> Iterator[tuple[int, bytes] | None]:
    """The matching lines with their numbers from 1, and now and then a None, so that a caller can look at the clock.

    Of a line that is longer than `CHUNK_BYTES` only the beginning is looked at, and given.
    """
    position, number, counted = 0, 1, 0
    while position < len(content):
        limit, following = _chunk(content, position)
        while position < limit and (match := pattern.search(content, position, limit)) is not None:
            start = content.rfind(b"\n", 0, match.start()) + 1
            if start >= len(content):
                # An empty match behind the last line break: no line begins there.
                return
            stop = content.find(b"\n", match.start(), limit)
            stop = limit if stop < 0 else stop
            number += content.count(b"\n", counted, start)
            counted = start
            yield number, content[start:stop]
            position = stop + 1
        position = following
        yield None


def _chunk(content: bytes, position: int) -> tuple[int, int]:
    """From the beginning of a line: where to stop matching, and where the line behind that begins."""
    if len(content) - position <= CHUNK_BYTES:
        return len(content), len(content)
    end = content.rfind(b"\n", position, position + CHUNK_BYTES)
    if end >= 0:
        return end, end + 1
    end = content.find(b"\n", position + CHUNK_BYTES)
    return position + CHUNK_BYTES, len(content) if end < 0 else end + 1


def compile_glob(pattern: str) -> Callable[[str], bool]:
    """Whether a normal path matches. `*` and `?` stay within a name, `**` crosses directories; `[a-z]`, `[!a-z]`, `{one,two}`.

    Without a slash the name decides, with one the whole path. Raises `BadPattern`.
    """
    text = _encoded(unicodedata.normalize("NFC", pattern), "The glob").decode()
    by_name = "/" not in text
    relative = text.removeprefix("/")
    if relative.startswith(f"{ROOT[1:]}/"):
        relative = relative.removeprefix(f"{ROOT[1:]}/")
    try:
        compiled = _compiled(_translated(relative).encode())
    except re2.error:
        raise BadPattern(f"The glob `{pattern[:80]}` cannot be used") from None

    def matches(path: str) -> bool:
        subject = path.rpartition("/")[2] if by_name else path[1:]
        return compiled.fullmatch(subject.encode()) is not None

    return matches


def _encoded(pattern: str, what: str) -> bytes:
    try:
        encoded = pattern.encode()
    except UnicodeEncodeError:
        raise BadPattern(f"{what} is not valid Unicode") from None
    if not encoded:
        raise BadPattern(f"{what} is empty")
    if len(encoded) > GREP_PATTERN_MAX_BYTES:
        raise BadPattern(f"{what} is too long; {GREP_PATTERN_MAX_BYTES} bytes are allowed")
    return encoded


def _compiled(pattern: bytes) -> Pattern:
    options = re2.Options()
    options.max_mem = PATTERN_MEMORY_BYTES
    options.never_nl = True
    options.never_capture = True
    # It would write the pattern to standard error.
    options.log_errors = False
    compiled = re2.compile(pattern, options)
    # Its cache would keep the last 128 patterns, each with its memory.
    re2.purge()
    return compiled


def _translated(glob: str) -> str:
    """A glob as a regular expression."""
    out: list[str] = []
    place = 0
    depth = 0
    while place < len(glob):
        one = glob[place]
        if glob.startswith("**/", place) and (place == 0 or glob[place - 1] == "/"):
            out.append("(?:[^/]+/)*")
            place += 3
            continue
        if glob.startswith("**", place):
            out.append(".*")
            place += 2
            continue
        if one == "[" and (end := glob.find("]", place + 2)) > 0:
            out.append(_translated_class(glob[place + 1 : end]))
            place = end + 1
            continue
        if one == "{" and "}" in glob[place:]:
            depth += 1
            out.append("(?:")
        elif one == "}" and depth:
            depth -= 1
            out.append(")")
        elif one == "," and depth:
            out.append("|")
        else:
            out.append({"*": "[^/]*", "?": "[^/]"}.get(one) or re2.escape(one))
        place += 1
    return "(?s)" + "".join(out)


def _translated_class(inner: str) -> str:
    negated = inner.startswith(("!", "^"))
    body = "".join(f"\\{one}" if one in "\\[]^&~" else one for one in (inner[1:] if negated else inner))
    return f"[^/{body}]" if negated else f"[{body}]"
