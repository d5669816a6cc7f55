"""Replacing of pieces of text: all of them or none, and precise about what does not fit.

A call may run again after a crash, when the first run has changed the file and its hash is no longer the expected one. Whether
that is what happened can be told without any note: taking the edits back must give content with the expected hash.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Final

from activities.files.arguments import Edit
from domain.capabilities import ToolError

COUNTED_OCCURRENCES: Final = 1000
UNDO_MAX_BYTES: Final = 64 * 1024 * 1024
"""Read while looking for the content before the edits: about a tenth of a second. Unique texts need a few times the file."""
_COMPARED_LINES: Final = 20_000
_COMPARED_CHARACTERS: Final = 300
_CANDIDATES: Final = 50
_NAMED_LINES: Final = 5
_NEAR_SHOWN: Final = 3


def apply_edits(text: str, edits: Sequence[Edit], path: str) -> str:
    """Raises `ToolError` that names the edit, counted from 1."""
    for number, edit in enumerate(edits, 1):
        name = f"Edit {number} of {len(edits)}" if len(edits) > 1 else "The edit"
        if edit.old_text == edit.new_text:
            raise ToolError(f"{name} changes nothing: `old_text` and `new_text` are the same. Nothing was changed.")
        places = _places(text, edit.old_text)
        if not places:
            raise ToolError(
                f"{name}: `old_text` does not occur in `{path}`. {_hint(text, edit, number)} Nothing was changed."
            )
        if len(places) > 1:
            raise ToolError(
                f"{name}: `old_text` must occur exactly once in `{path}`, but occurs {_times(text, places)}. "
                "Make it longer by the lines around the one you mean. Nothing was changed."
            )
        text = text[: places[0]] + edit.new_text + text[places[0] + len(edit.old_text) :]
    return text


def are_applied(content: bytes, edits: Sequence[Edit], expected_hash: str) -> bool:
    """Whether `content` is what the edits made of content with the expected hash.

    False also when that would take too long to find out: when new texts are short, there are many places to try.
    """
    budget = [UNDO_MAX_BYTES]
    return any(
        f"sha256:{hashlib.sha256(before).hexdigest()}" == expected_hash for before in _undone(content, edits, budget)
    )


def _undone(content: bytes, edits: Sequence[Edit], budget: list[int]) -> Iterator[bytes]:
    """Every content that the edits may have been applied to."""
    if not edits:
        yield content
        return
    old, new = edits[-1].old_text.encode(), edits[-1].new_text.encode()
    place = content.find(new)
    while place >= 0:
        before = content[:place] + old + content[place + len(new) :]
        budget[0] -= 2 * len(before)
        if budget[0] < 0:
            return
        first = before.find(old)
        if before.find(old, first + 1) < 0:
            yield from _undone(before, edits[:-1], budget)
        place = content.find(new, place + 1)


def _places(text: str, wanted: str) -> list[int]:
    """Occurrences that overlap count too: which one is meant would be just as unclear."""
    places: list[int] = []
    place = text.find(wanted)
    while place >= 0 and len(places) <= COUNTED_OCCURRENCES:
        places.append(place)
        place = text.find(wanted, place + 1)
    return places


def _times(text: str, places: Sequence[int]) -> str:
    count = f"{len(places)}" if len(places) <= COUNTED_OCCURRENCES else f"more than {COUNTED_OCCURRENCES:,}"
    numbers = [str(text.count("\n", 0, place) + 1) for place in places[:_NAMED_LINES]]
    more = ", …" if len(places) > _NAMED_LINES else ""
    return f"{count} times, on lines {', '.join(numbers)}{more}"


def _hint(text: str, edit: Edit, number: int) -> str:
    earlier = " (Edits before it are applied first: it must match what they leave.)" if number > 1 else ""
    lines = text.split("\n")[:_COMPARED_LINES]
    wanted = edit.old_text.split("\n")
    same = _same_but_for_space(lines, wanted)
    if same is not None:
        found = "\n".join(lines[same : same + len(wanted)])
        why = (
            "The file's lines end in `\\r\\n`, those of `old_text` in `\\n`."
            if found.replace("\r", "") == edit.old_text
            else "White space differs there. The file has:"
        )
        return f"Near match at line {same + 1}. {why} {_quoted(found)}.{earlier}"
    near = _near_lines(lines, max(wanted, key=lambda line: len(line.strip())))
    if not near:
        return f"Nothing similar was found; read the file again.{earlier}"
    return f"Similar lines: {'; '.join(f'{at + 1}: {_quoted(lines[at])}' for at in near)}.{earlier}"


def _same_but_for_space(lines: Sequence[str], wanted: Sequence[str]) -> int | None:
    bare = ["".join(line.split()) for line in wanted]
    if not any(bare):
        return None
    have = ["".join(line.split()) for line in lines]
    first = bare[0]
    for index, line in enumerate(have):
        # The text may begin and end in the middle of a line.
        if len(bare) == 1:
            if first in line:
                return index
        elif (
            line.endswith(first)
            and have[index + 1 : index + len(bare) - 1] == bare[1:-1]
            and index + len(bare) <= len(have)
            and have[index + len(bare) - 1].startswith(bare[-1])
        ):
            return index
    return None


def _near_lines(lines: Sequence[str], wanted: str) -> list[int]:
    """Words are compared first and letters then, of few lines: comparing letters takes time."""
    wanted = wanted.strip()[:_COMPARED_CHARACTERS]
    words = set(re.findall(r"\w+", wanted))
    shared = [
        (len(words & set(re.findall(r"\w+", line[:_COMPARED_CHARACTERS]))), index) for index, line in enumerate(lines)
    ]
    likely = [index for count, index in sorted(shared, key=lambda one: (-one[0], one[1]))[:_CANDIDATES] if count]
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(wanted)
    scored: list[tuple[float, int]] = []
    for index in likely:
        matcher.set_seq1(lines[index].strip()[:_COMPARED_CHARACTERS])
        scored.append((matcher.ratio(), index))
    best = sorted(scored, key=lambda one: (-one[0], one[1]))[:_NEAR_SHOWN]
    return sorted(index for ratio, index in best if ratio >= 0.6)


def _quoted(text: str) -> str:
    """With its white space visible, as JSON would write it."""
    cut = text if len(text) <= _COMPARED_CHARACTERS else text[:_COMPARED_CHARACTERS] + "…"
    return '"' + cut.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'
