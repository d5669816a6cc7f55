"""What a server's tools are called for the model: `mcp_{server}__{tool}`, in characters and a length that every provider takes.

A name that had to be changed, or that could be read as another server's, ends in a digest of what it stands for. So it is the
same in every turn, whatever else is configured.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

PREFIX: Final = "mcp_"
SEPARATOR: Final = "__"
MAX_CHARACTERS: Final = 64
DIGEST_CHARACTERS: Final = 8

_UNUSABLE: Final = re.compile(r"[^A-Za-z0-9_-]+")


def tool_name(server: str, tool: str) -> str:
    clean_server, clean_tool = _UNUSABLE.sub("_", server), _UNUSABLE.sub("_", tool)
    name = f"{PREFIX}{clean_server}{SEPARATOR}{clean_tool}"
    is_exact = (clean_server, clean_tool) == (server, tool)
    is_ambiguous = SEPARATOR in clean_server or clean_server.endswith("_") or tool.startswith("_")
    if is_exact and not is_ambiguous and len(name) <= MAX_CHARACTERS:
        return name
    return distinct_name(name, server, tool)


def distinct_name(name: str, *parts: str) -> str:
    """The name with a digest of `parts` at its end."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:DIGEST_CHARACTERS]
    return f"{name[: MAX_CHARACTERS - DIGEST_CHARACTERS - 1]}_{digest}"
