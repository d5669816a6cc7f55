"""Which model a reason step calls: the configured one, or the first fallback that can be called instead.

Order of resolution: message, session, agent, harness (folded into `TurnConfig.model_id` when the turn began), then the
organization's default, then the installation's (`DEFAULT_MODEL`). Fallbacks follow in the order they are listed. A turn that had
to leave a model behind stays with the one it came to; the next turn begins with the first again.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import asyncpg
import msgspec
from msgspec import Struct

from db.circuit_breakers import HELD_OPEN_WAIT_SECONDS, claim_try
from db.turn_config import decode_column
from domain.config import TurnConfig
from domain.ids import Prefix, format_id, is_id, parse_id
from domain.model import ModelEndpoint, ModelErrorKind
from domain.model_profiles import profile_of
from domain.providers import API_KEY, PROVIDER_TYPES
from domain.turns import FallbackFrom, ModelProblem, ResolvedModel
from infra.encryption import UndecryptableSecret

# A place without a key is that of a turn for which nothing names a model.
_CANDIDATES: Final = """
SELECT w.place::integer - 1 AS place, m.id, m.model_id, m.options, p.id AS provider_id, p.name AS provider_name,
       p.provider_type, p.base_url, p.credentials, b.state AS breaker, b.half_open_at
FROM unnest($2::uuid[]) WITH ORDINALITY AS w (key, place)
JOIN models m ON m.id = coalesce(w.key, (SELECT default_model_id FROM organizations WHERE id = $1), (
    SELECT n.id FROM models n JOIN providers q ON q.id = n.provider_id
    WHERE n.org_id = $1 AND n.enabled AND q.status = 'active' AND n.model_id = $3 ORDER BY n.created_at LIMIT 1))
JOIN providers p ON p.id = m.provider_id
LEFT JOIN circuit_breakers b ON b.model_id = m.id
WHERE m.org_id = $1 AND m.enabled AND p.status = 'active'
ORDER BY w.place
"""
_BY_NAME: Final = """
SELECT m.id FROM models m JOIN providers p ON p.id = m.provider_id
WHERE m.org_id = $1 AND m.model_id = $2 AND m.enabled AND p.status = 'active' ORDER BY m.created_at LIMIT 1
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
        refused: list[ModelChoice] = []
        left = None if first == 0 else FallbackFrom(model="", model_id=config.model_id or "", reason="exhausted")
        for row in await self._candidates(connection, org_id, config):
            passed = FallbackFrom(
                model=row["model_id"], model_id=format_id(Prefix.MODEL, row["id"]), reason="circuit_open"
            )
            if row["place"] < first:
                # The turn has left it before.
                left = msgspec.structs.replace(passed, reason="exhausted") if row["place"] == 0 else left
                continue
            if row["breaker"] in (None, "closed"):
                return self._choice(row, left)
            if await claim_try(connection, row["id"]):
                return self._choice(row, left, trying=True)
            refused.append(ModelChoice(model=self._choice(row, left).model, problem=_circuit_open(row)))
            left = left or passed
        return refused[0] if refused else ModelChoice(model=None)

    async def choose_by_name(self, connection: asyncpg.Connection, org_id: int, name: str) -> ModelChoice:
        """One model alone, by public id or by the vendor's name; no default and no fallback stands in for it."""
        if is_id(Prefix.MODEL, name):
            model_id: str | None = name
        else:
            found = await connection.fetchval(_BY_NAME, org_id, name)
            model_id = found and format_id(Prefix.MODEL, found)
        if model_id is None:
            return ModelChoice(model=None)
        return await self.choose(connection, org_id, TurnConfig(model_id=model_id))

    async def configured(
        self, connection: asyncpg.Connection, org_id: int, config: TurnConfig, first: int = 0
    ) -> ResolvedModel | None:
        """The model a turn would begin with, whatever its circuit breaker says: to look at, not to call."""
        rows = await self._candidates(connection, org_id, config)
        return next((self._choice(row, None).model for row in rows if row["place"] >= first), None)

    async def next_after(
        self, connection: asyncpg.Connection, org_id: int, config: TurnConfig, after: int
    ) -> int | None:
        """The place of the next model after number `after` that exists; None at the end of the list."""
        rows = await self._candidates(connection, org_id, config)
        return next((row["place"] for row in rows if row["place"] > after), None)

    async def _candidates(
        self, connection: asyncpg.Connection, org_id: int, config: TurnConfig
    ) -> list[asyncpg.Record]:
        """Those of the turn's models that exist and are enabled, in order; `place` counts all of them from 0."""
        wanted = [config.model_id, *config.fallback_model_ids]
        keys = [None if model_id is None else parse_id(Prefix.MODEL, model_id) for model_id in wanted]
        return await connection.fetch(_CANDIDATES, org_id, keys, self._system_model)

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


def keeps_state(model: ResolvedModel | None) -> bool:
    """Whether a driver of this model could have anything to give back to its provider."""
    return model is not None and model.provider_type != "llmsim"


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
