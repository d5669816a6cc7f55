"""Content of files, by its SHA-256. An organization stores the same bytes once.

Content goes with the last entry and the last former version that refer to it, in the transaction that removes those. How much
of what was replaced is kept for forks and rewinds is limited, because an agent that rewrites a large file in a loop must not
fill the disk. Whoever is about to refer to content locks it first (`FOR KEY SHARE`), and deleting passes over what is locked,
so it never waits. Therefore content may outlive its last entries when two transactions let go of them at the same moment. It is
harmless, and goes when the same bytes have been stored and deleted again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from typing import Final

import asyncpg

LOCK: Final = (
    "SELECT hash FROM workspace_blobs WHERE org_id = $1 AND hash = ANY($2::bytea[]) ORDER BY hash FOR KEY SHARE"
)
INSERT: Final = """INSERT INTO workspace_blobs (org_id, hash, content, is_text) VALUES ($1, $2, $3, $4)
    ON CONFLICT DO NOTHING RETURNING hash"""
LOCK_UNWANTED: Final = """SELECT hash FROM workspace_blobs WHERE org_id = $1 AND hash = ANY($2::bytea[])
    FOR UPDATE SKIP LOCKED"""
# A statement of its own: it sees what was committed before the locks were had.
DELETE_UNWANTED: Final = """DELETE FROM workspace_blobs b WHERE org_id = $1 AND hash = ANY($2::bytea[])
    AND NOT EXISTS (SELECT 1 FROM workspace_entries e WHERE e.org_id = b.org_id AND e.blob_hash = b.hash)
    AND NOT EXISTS (SELECT 1 FROM workspace_history h WHERE h.org_id = b.org_id AND h.blob_hash = b.hash)"""


def hash_of(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def is_text(content: bytes) -> bool:
    if b"\0" in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


async def store(connection: asyncpg.Connection, org_id: int, contents: Iterable[bytes]) -> None:
    """To be called once per transaction: content is locked in the order of hashes, so that writers cannot lock each other out."""
    waiting = {hash_of(content): content for content in contents}
    while waiting:
        for row in await connection.fetch(LOCK, org_id, list(waiting)):
            del waiting[row["hash"]]
        for key in sorted(waiting):
            content = waiting[key]
            # What somebody else stored meanwhile has to be locked, or may be gone again: another round.
            if await connection.fetchval(INSERT, org_id, key, content, is_text(content)) is not None:
                del waiting[key]


async def release(connection: asyncpg.Connection, org_id: int, hashes: Collection[bytes]) -> None:
    """Delete what nothing refers to any more. The last thing a transaction does: whoever waits for it waits for the commit."""
    if not hashes:
        return
    rows = await connection.fetch(LOCK_UNWANTED, org_id, list(hashes))
    if rows:
        await connection.execute(DELETE_UNWANTED, org_id, [row["hash"] for row in rows])
