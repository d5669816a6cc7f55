"""Which model a reason step calls: the configured one, or the first fallback that can be called instead.

Order of resolution: message, session, agent, harness (folded into `TurnConfig.model_id` when the turn began), then the
organization's default, then the installation's (`DEFAULT_MODEL`). Fallbacks follow in the order they are listed. A turn that had
to leave a model behind stays with the one it came to; the next turn begins with the first again.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import asyncpg
from msgspec import Struct

from db.circuit_breakers import HELD_OPEN_WAIT_SECONDS, claim_try
from db.turn_config import decode_column
from domain.config import TurnConfig
from domain.ids import Prefix, format_id, parse_id
from domain.model import ModelEndpoint, ModelErrorKind
from domain.model_profiles import profile_of
from domain.providers import API_KEY, PROVIDER_TYPES
from domain.turns import FallbackFrom, ModelProblem, ResolvedModel
from infra.encryption import UndecryptableSecret

_CANDIDATES: Final = """
SELECT m.id, m.model_id, m.options, p.id AS provider_id, p.name AS provider_name, p.provider_type, p.base_url, p.credentials,
       b.state AS breaker, b.half_open_at
FROM models m JOIN providers p ON p.id = m.provider_id LEFT JOIN circuit_breakers b ON b.model_id = m.id
WHERE m.org_id = $1 AND m.enabled AND p.status = 'active' AND m.id = ANY($2::uuid[])
"""
_DEFAULT_MODEL: Final = """
SELECT coalesce(
    (SELECT default_model_id FROM organizations WHERE id = $1),
    (SELECT m.id FROM models m JOIN providers p ON p.id = m.provider_id
     WHERE m.org_id = $1 AND m.enabled AND p.status = 'active' AND m.model_id = $2 ORDER BY m.created_at LIMIT 1))
"""

BREAKER_OPTION: Final = "circuit_breaker"

EndpointOf = Callable[[asyncpg.Record], ModelEndpoint]
"""From a row with `provider_id`, `provider_type`, `base_url` and `credentials`. Raises `UndecryptableSecret`."""


class ModelChoice(Struct, frozen=True, kw_only=True):
    """With `problem`, the model is what would have been called."""

    model: ResolvedModel | None
    problem: ModelProblem | None = None


class ModelChooser:
    def __init__(self, endpoint_of: EndpointOf, *, system_model: str | None = None) -> None:
        self._endpoint_of = endpoint_of
        self._system_model = system_model

    async def choose(
        self, connection: asyncpg.Connection, org_id: int, config: TurnConfig, first: int = 0
    ) -> ModelChoice:
        """The model to call, beginning with the turn's model number `first`."""
        keys = await self._keys(connection, org_id, config)
        rows = {row["id"]: row for row in await connection.fetch(_CANDIDATES, org_id, [key for key in keys if key])}
        refused: list[ModelChoice] = []
        left: FallbackFrom | None = _left(keys, rows, first)
        for key in keys[first:]:
            row = key and rows.get(key)
            if row is None:
                continue
            if row["breaker"] in (None, "closed"):
                return self._choice(row, left)
            if await claim_try(connection, row["id"]):
                return self._choice(row, left, trying=True)
            refused.append(ModelChoice(model=self._choice(row, left).model, problem=_circuit_open(row)))
            left = left or FallbackFrom(
                model=row["model_id"], model_id=format_id(Prefix.MODEL, row["id"]), reason="circuit_open"
            )
        return refused[0] if refused else ModelChoice(model=None)

    async def next_after(
        self, connection: asyncpg.Connection, org_id: int, config: TurnConfig, after: int
    ) -> int | None:
        """The place of the next model after number `after` that exists; None at the end of the list."""
        keys = await self._keys(connection, org_id, config)
        rows = {row["id"] for row in await connection.fetch(_CANDIDATES, org_id, [key for key in keys if key])}
        return next((index for index in range(after + 1, len(keys)) if keys[index] in rows), None)

    async def _keys(self, connection: asyncpg.Connection, org_id: int, config: TurnConfig) -> list[UUID | None]:
        """The turn's models in order; a place stays empty when nothing is configured for it."""
        if config.model_id is None:
            chosen = await connection.fetchval(_DEFAULT_MODEL, org_id, self._system_model)
        else:
            chosen = parse_id(Prefix.MODEL, config.model_id)
        return [chosen, *(parse_id(Prefix.MODEL, model_id) for model_id in config.fallback_model_ids)]

    def _choice(self, row: asyncpg.Record, left: FallbackFrom | None, *, trying: bool = False) -> ModelChoice:
        provider = format_id(Prefix.PROVIDER, row["provider_id"])
        problem: ModelProblem | None = None
        try:
            endpoint = self._endpoint_of(row)
            problem = _missing_key(row, endpoint)
        except UndecryptableSecret as error:
            endpoint = ModelEndpoint(provider_type=row["provider_type"], provider_public_id=provider)
            problem = ModelProblem(
                kind=ModelErrorKind.AUTHENTICATION,
                message=f"the stored credentials of provider `{row['provider_name']}` cannot be read: {error}",
            )
        model = ResolvedModel(
            public_id=format_id(Prefix.MODEL, row["id"]),
            name=row["model_id"],
            provider_public_id=provider,
            provider_type=row["provider_type"],
            options=decode_column(row["options"], dict[str, object], {}),
            endpoint=endpoint,
            profile=profile_of(row["model_id"]),
            instead_of=left,
            trying=trying,
        )
        return ModelChoice(model=model, problem=problem)


def is_guarded(model: ResolvedModel) -> bool:
    """Whether failures of this model count against its circuit breaker."""
    known = PROVIDER_TYPES.get(model.provider_type)
    return model.options.get(BREAKER_OPTION, known is None or known.guarded) is True


def _left(keys: list[UUID | None], rows: dict[UUID, asyncpg.Record], first: int) -> FallbackFrom | None:
    """The model a turn has left behind before, or None while it is with its first."""
    key = keys[0]
    if first == 0 or key is None:
        return None
    row = rows.get(key)
    public_id = format_id(Prefix.MODEL, key)
    return FallbackFrom(model=row["model_id"] if row else public_id, model_id=public_id, reason="exhausted")


def _circuit_open(row: asyncpg.Record) -> ModelProblem:
    until = row["half_open_at"]
    wait = HELD_OPEN_WAIT_SECONDS if until is None else max(0.0, (until - datetime.now(UTC)).total_seconds())
    return ModelProblem(
        kind=ModelErrorKind.CIRCUIT_OPEN,
        message=f"the circuit breaker of model `{row['model_id']}` is open; next try in {wait:.0f} s",
        retry_after_seconds=wait,
    )


def _missing_key(row: asyncpg.Record, endpoint: ModelEndpoint) -> ModelProblem | None:
    known = PROVIDER_TYPES.get(row["provider_type"])
    if known is None or not known.needs_key or API_KEY in endpoint.credentials:
        return None
    return ModelProblem(kind=ModelErrorKind.AUTHENTICATION, message=f"provider `{row['provider_name']}` has no API key")
