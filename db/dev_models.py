"""What a development installation begins with: providers for the default keys there are, and a model that answers.

Nothing an operator chose is changed: a provider is added only where there is none of its type, a default model set only where
there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from uuid import UUID

import asyncpg
import msgspec

from db.database import Database
from domain.ids import uuid7
from domain.model_profiles import profile_of
from domain.providers import PREDEFINED_MODELS, PROVIDER_TYPES
from domain.secret import Secret

SIMULATED_MODEL: Final = "llmsim-model"

# A statement of its own: what it waits for must be seen by the next one, and processes start side by side.
_LOCK: Final = "SELECT id FROM organizations ORDER BY id FOR NO KEY UPDATE"
_WITHOUT_PROVIDER: Final = """
SELECT id FROM organizations o
WHERE NOT EXISTS (SELECT FROM providers p WHERE p.org_id = o.id AND p.provider_type = $1)
"""
_ADD_PROVIDER: Final = "INSERT INTO providers (id, org_id, name, provider_type) VALUES ($1, $2, $3, $4)"
_ADD_MODEL: Final = """
INSERT INTO models (id, org_id, provider_id, model_id, display_name, capabilities, source)
VALUES ($1, $2, $3, $4, $5, $6, 'predefined')
"""
_CHOOSE: Final = """
UPDATE organizations o SET default_model_id = (
    SELECT m.id FROM models m JOIN providers p ON p.id = m.provider_id
    WHERE m.org_id = o.id AND m.model_id = $1 AND p.provider_type = $2 AND m.enabled AND p.status = 'active'
    ORDER BY m.created_at LIMIT 1)
WHERE o.default_model_id IS NULL
"""


async def choose_models(database: Database, default_keys: Mapping[str, Secret]) -> None:
    """`default_keys` by provider type. The first vendor of `PREDEFINED_MODELS` with a key answers, else the simulated model."""
    keyed = [provider_type for provider_type in PREDEFINED_MODELS if provider_type in default_keys]
    async with database.transaction() as connection:
        await connection.execute(_LOCK)
        for provider_type in keyed:
            for row in await connection.fetch(_WITHOUT_PROVIDER, provider_type):
                await _add(connection, row["id"], provider_type)
        for provider_type in keyed:
            await connection.execute(_CHOOSE, PREDEFINED_MODELS[provider_type][0], provider_type)
        await connection.execute(_CHOOSE, SIMULATED_MODEL, "llmsim")


async def _add(connection: asyncpg.Connection, org_id: int, provider_type: str) -> None:
    provider: UUID = uuid7()
    await connection.execute(_ADD_PROVIDER, provider, org_id, PROVIDER_TYPES[provider_type].display_name, provider_type)
    for model_id in PREDEFINED_MODELS[provider_type]:
        profile = profile_of(model_id)
        assert profile is not None, "a test compares the predefined models with the profiles"
        capabilities = msgspec.json.encode(profile.capabilities).decode()
        await connection.execute(_ADD_MODEL, uuid7(), org_id, provider, model_id, profile.name, capabilities)
