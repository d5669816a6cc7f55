"""The installation's keys where processes start: which ones are missing, and the key that dev makes for itself."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from db.database import Database
from db.secret_columns import count_by_key
from domain.secret import Secret
from infra.encryption import CURRENT_KEY, PREVIOUS_KEY, EncryptionKeyError, Keyring, generate_key, key_id_of

DEV_KEY_FILE: Final = "secrets.key"
"""In the data directory of dev."""

log = structlog.get_logger(__name__)


async def missing_keys(database: Database, keyring: Keyring) -> str | None:
    """What cannot be read for want of a key, in one line; None when there is nothing."""
    counts = await count_by_key(database)
    if None in counts:
        log.warning("stored secrets that are no envelopes; `everruns secrets check` lists them", count=counts[None])
    unknown = {key_id: count for key_id, count in counts.items() if key_id and key_id not in keyring.key_ids}
    if not unknown:
        return None
    stored = f"the database holds secrets encrypted with keys that are not given: {keys_in_words(unknown)}"
    if not keyring.can_encrypt:
        return f"{CURRENT_KEY}: it is not set, and {stored}. `everruns secrets check` lists them"
    given = " and ".join(f"`{key_id}`" for key_id in keyring.key_ids)
    return (
        f"{CURRENT_KEY}: {stored}. Given is {given}; set the missing one, here or as {PREVIOUS_KEY}. "
        "`everruns secrets check` lists what cannot be read"
    )


def keys_in_words(counts: Mapping[str, int] | Mapping[str | None, int]) -> str:
    """How many secrets are under which key, most first."""
    most_first = sorted(counts.items(), key=lambda counted: (-counted[1], counted[0] or ""))
    return ", ".join(f"{count:,} with {f'`{key_id}`' if key_id else 'no known key'}" for key_id, count in most_first)


def dev_key(data_dir: Path | None) -> Secret:
    """A key for dev's secrets: kept beside data that is kept. An id of its own lets a lost key be told from a wrong one.

    Raises `EncryptionKeyError` when the file holds no key.
    """
    new = generate_key(f"dev-{secrets.token_hex(4)}")
    if data_dir is None:
        return new
    path = data_dir / DEV_KEY_FILE
    try:
        kept = Secret(path.read_text().strip())
        key_id_of(kept)
    except FileNotFoundError:
        write_private(path, new.reveal())
        return new
    except ValueError:  # of the key, or of UTF-8
        raise EncryptionKeyError(
            f"{path} holds no key; restore it, or remove it if no secret is worth keeping"
        ) from None
    return kept


def write_private(path: Path, text: str) -> None:
    """Only our account can read it, and a reader sees the whole file or none."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    # One that a crash left, or somebody else's: its permissions would stay.
    unfinished.unlink(missing_ok=True)
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
