"""What the next model call of a session would be made of, for people to look at. Locks nothing and changes nothing."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from db.child_sessions import without_spawning
from db.context_checkpoints import PromptSource, read_prompt_source
from db.database import Database
from db.event_log import SessionTransaction
from db.model_choice import ModelChooser
from db.sessions import session_not_found
from db.turn_config import read_session_layers
from db.turn_rows import read_turn
from db.virtual_capabilities import pinned
from domain.config import TurnConfig, fold
from domain.ids import Prefix, parse_id
from domain.turns import ResolvedModel
from infra.encryption import Keyring

_STATE: Final = "SELECT org_id, turn_id, token_ratio FROM session_state WHERE session_id = $1"


class SessionContext(Struct, frozen=True, kw_only=True):
    """`model` is None when nothing names one and there is no default."""

    config: TurnConfig
    model: ResolvedModel | None
    source: PromptSource
    token_ratio: float | None


async def read_session_context(
    database: Database, session_id: str, models: ModelChooser, keyring: Keyring
) -> SessionContext:
    """Of the running turn with the configuration it began with, or of the next one. Raises `NotFound`."""
    key = parse_id(Prefix.SESSION, session_id)
    async with (
        database.pool.acquire() as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        work = SessionTransaction(connection, session_id)  # type: ignore[arg-type]  # a pool's proxy
        state = await connection.fetchrow(_STATE, key)
        layers = await read_session_layers(work.connection, key)
        if state is None or layers is None:
            raise session_not_found(session_id)
        turn = None if state["turn_id"] is None else await read_turn(work, state["turn_id"])
        config = turn.config if turn else None
        if config is None:
            found = await pinned(work.connection, state["org_id"], fold(layers.layers))
            config = await without_spawning(work.connection, key, found.config)
        model = await models.configured(
            work.connection, state["org_id"], config, 0 if turn is None else turn.model_index
        )
        source = await read_prompt_source(
            work.connection, session_id, keyring, model, [] if turn is None else turn.input_sequences
        )
    return SessionContext(config=config, model=model, source=source, token_ratio=state["token_ratio"])
