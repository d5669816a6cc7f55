"""`everruns secrets`: move what is stored to the current key, check that everything stored can be read.

What is printed names rows and key ids, never what is stored.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Iterable, Mapping

import asyncpg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cli.engine import keyring_of
from cli.keys import keys_in_words
from cli.run import StartFailure, check_database
from db.database import Database
from db.patient_state import is_away
from db.secret_columns import Unreadable, check_secrets, count_by_key, reencrypt
from infra.encryption import CURRENT_KEY, PREVIOUS_KEY
from infra.settings import Settings

POOL_SIZE = 2


async def run_secrets_check(settings: Settings) -> bool:
    """Decrypt every stored secret; returns whether all of them can be read."""
    async with _opened(settings, "secrets check") as database:
        with _progress() as progress:
            task = await _task(progress, "Checking", database)
            checked = await check_secrets(database, keyring_of(settings), lambda: progress.advance(task))
    _print_unreadable(checked.unreadable)
    unreadable = len(checked.unreadable)
    verdict = f"{unreadable:,} cannot be read" if unreadable else "all of them can be read"
    print(f"Checked {_secrets(checked.readable + unreadable)}: {verdict}.")
    if checked.by_key:
        print(f"Encrypted: {keys_in_words(checked.by_key)}.")
    return not unreadable


async def run_reencrypt(settings: Settings) -> bool:
    """Move every stored secret to the current key; returns whether none is left under another one."""
    keyring = keyring_of(settings)
    if not keyring.can_encrypt:
        raise StartFailure(f"{CURRENT_KEY}: it is not set; secrets reencrypt needs the key to encrypt with")
    async with _opened(settings, "secrets reencrypt") as database:
        with _progress() as progress:
            task = await _task(progress, "Encrypting", database)
            done = await reencrypt(database, keyring, lambda: progress.advance(task))
    _print_unreadable(done.unreadable)
    print(
        f"Encrypted {_secrets(done.reencrypted)} with key `{keyring.key_ids[0]}`; "
        f"{done.already_current:,} needed nothing; {len(done.unreadable):,} cannot be read."
    )
    if done.left:
        _print_left(done.left)
    elif settings.secrets_encryption_key_previous is not None:
        print(f"Nothing is left under another key: {PREVIOUS_KEY} can be removed.")
    return not done.left


def _print_left(left: Mapping[str | None, int]) -> None:
    print(
        f"Left under another key: {keys_in_words(left)}. What cannot be read needs its old key as {PREVIOUS_KEY}, or to be set "
        "anew. Anything else was written meanwhile by a process without the new key: restart that, then run this again."
    )


@contextlib.asynccontextmanager
async def _opened(settings: Settings, command: str) -> AsyncIterator[Database]:
    if settings.database_url is None:
        raise StartFailure(f"{command} needs DATABASE_URL: the database that holds the secrets")
    await check_database(settings)
    async with Database.opened(settings.database_url, pool_size=POOL_SIZE) as database:
        try:
            yield database
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if not is_away(error):
                raise
            raise StartFailure(f"the database went away ({type(error).__name__}); run this again, it goes on") from None


async def _task(progress: Progress, what: str, database: Database) -> TaskID:
    return progress.add_task(what, total=sum((await count_by_key(database)).values()))


def _progress() -> Progress:
    """A bar on a terminal; nothing where the output goes to a file or a program."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("secrets"),
        TimeRemainingColumn(),
        console=Console(),
        transient=True,
        disable=not sys.stdout.isatty(),
    )


def _print_unreadable(found: Iterable[Unreadable]) -> None:
    for one in found:
        print(f"{one.table} {one.row} {one.column}: {one.problem}")


def _secrets(count: int) -> str:
    return f"{count:,} secret{'' if count == 1 else 's'}"
