"""One engine without a worker for all crash tests: each brings its own workers, which it may kill."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from activities.capabilities.test_faults import EFFECTS_FILE_VARIABLE
from tests.chaos.production import ProductionStack
from tests.stack import Stack


@pytest.fixture(scope="session")
def effects_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tools with effects leave one line per run: call id, attempt, name."""
    path = tmp_path_factory.mktemp("effects") / "effects.log"
    path.touch()
    return path


@pytest.fixture(scope="session")
async def engine(effects_file: Path) -> AsyncIterator[Stack]:
    """PostgreSQL, Temporal and the API. Nobody works until a test starts a worker."""
    async with Stack(no_worker=True, environment={EFFECTS_FILE_VARIABLE: str(effects_file)}) as stack:
        yield stack


@pytest.fixture(scope="session")
async def production(effects_file: Path) -> AsyncIterator[ProductionStack]:
    """Everything apart, with data that survives. The API runs; a test starts the workers it needs."""
    async with ProductionStack(environment={EFFECTS_FILE_VARIABLE: str(effects_file)}) as stack:
        yield stack
