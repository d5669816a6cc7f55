"""Everything that names a model, and how it forgets one."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from db.tables import Agent, Harness, Model, Organization, Session
from domain.ids import Prefix, format_id


async def forget_models(models: Sequence[UUID]) -> None:
    """To be called in the transaction that deletes them. Whatever named one falls back to the next layer's."""
    if not models:
        return
    for column in (Agent.default_model_id, Harness.default_model_id, Session.model_id, Organization.default_model_id):
        table = column._meta.table
        await table.update({column: None}).where(column.is_in(list(models)))
    public_ids = [format_id(Prefix.MODEL, model) for model in models]
    for table in (Agent, Harness):
        await table.raw(
            f"UPDATE {table._meta.tablename} SET fallback_model_ids = fallback_model_ids - {{}}::text[] "  # noqa: S608
            "WHERE fallback_model_ids ?| {}::text[]",
            public_ids,
            public_ids,
        )
    await forget_breakers(models)


async def forget_breakers(models: Sequence[UUID]) -> None:
    """What is known about a model's failures is about the provider it was at."""
    await Model.raw("DELETE FROM circuit_breakers WHERE model_id = ANY({}::uuid[])", list(models))
