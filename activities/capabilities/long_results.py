"""Results too long for a conversation: the whole goes into the workspace, the model reads its beginning and where it is."""

from __future__ import annotations

import re
from typing import Final

import msgspec
import structlog

from activities.capabilities.tool_call import MAX_RESULT_BYTES, ToolOutcome, cut, truncated
from domain.capabilities import ToolContext
from domain.limits import FILE_MAX_BYTES
from domain.messages import TextPart
from domain.workspace import FileProblem

OUTPUTS: Final = "/outputs"

HEAD_BYTES: Final = 16 * 1024
"""Shown of a result that the model can read on by itself."""

NOTE_BYTES: Final = 500

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.-]")

log = structlog.get_logger(__name__)


async def within_limit(
    outcome: ToolOutcome, call_id: str, context: ToolContext, *, can_read_files: bool
) -> ToolOutcome:
    """The outcome with texts that fit. A longer one is kept in `/outputs/{call_id}.stdout`, as far as a file may hold it."""
    if outcome.error is not None:
        return msgspec.structs.replace(outcome, error=truncated(outcome.error))
    if not any(_too_long(part.text) for part in outcome.result or [] if isinstance(part, TextPart)):
        return outcome
    parts = [
        TextPart(text=await _shortened(part.text, call_id, context, can_read_files=can_read_files))
        if isinstance(part, TextPart)
        else part
        for part in outcome.result or []
    ]
    return msgspec.structs.replace(outcome, result=parts)


async def _shortened(text: str, call_id: str, context: ToolContext, *, can_read_files: bool) -> str:
    if not _too_long(text):
        return text
    path = f"{OUTPUTS}/{_UNSAFE.sub('_', call_id)[:100] or 'call'}.stdout"
    whole = text.encode("utf-8", "replace")
    kept = cut(whole, FILE_MAX_BYTES)
    try:
        entry, created = await context.files.write(path, kept)
    except FileProblem as problem:
        log.warning("a long result was not kept", call_id=call_id, problem=type(problem).__name__)
        return truncated(text)
    await context.file_written(entry, created=created)
    head = cut(whole, HEAD_BYTES if can_read_files else MAX_RESULT_BYTES - NOTE_BYTES)
    what = "The whole output" if len(kept) == len(whole) else f"As much of it as a file may hold ({len(kept):,} bytes)"
    how = "read it with `read_file` or search it with `grep_files`" if can_read_files else "the user can read it there"
    return (
        f"{head.decode()}\n\n[Output cut: the first {len(head):,} of {len(whole):,} bytes are shown. "
        f"{what} is in the workspace, {how}: {path}]"
    )


def _too_long(text: str) -> bool:
    return len(text) > MAX_RESULT_BYTES or len(text.encode("utf-8", "replace")) > MAX_RESULT_BYTES
