"""Which events of a log make up the conversation after rewinds.

The log only grows: a rewind is the event `session.rewound`, which says that the conversation goes on from what it was when event
`to_sequence` had just been written. What lies between stays in the log and is hidden. What the conversation was at an event
depends on rewinds before that event only, so going back to something hidden brings it back: no rewind is final.
"""

from __future__ import annotations

from collections.abc import Sequence

Rewind = tuple[int, int]
"""The sequence of a `session.rewound`, and the one it goes back to."""

Range = tuple[int, int]
"""First and last sequence."""


def hidden_ranges(rewinds: Sequence[Rewind], last: int) -> list[Range]:
    """What does not belong to the conversation as of event `last`, in the order of the log. `rewinds` are in that order too."""
    hidden: list[Range] = []
    end = last
    for sequence, to_sequence in reversed(rewinds):
        if sequence > end:
            continue
        if to_sequence + 1 <= sequence - 1:
            hidden.append((to_sequence + 1, sequence - 1))
        end = to_sequence
    return hidden[::-1]


def is_hidden(hidden: Sequence[Range], sequence: int) -> bool:
    return any(first <= sequence <= last for first, last in hidden)
