"""Drivers to language models, one module per provider. A driver imports its SDK when it is first used, not before."""

from __future__ import annotations

from collections.abc import Callable

from activities.llm.llmsim import LlmSim
from domain.model import ModelDriver, ModelError, ModelErrorKind

DRIVERS: dict[str, Callable[[], ModelDriver]] = {
    "llmsim": LlmSim,
}
"""Provider type, as stored with a provider, to its driver."""


def driver_for(provider_type: str) -> ModelDriver:
    driver = DRIVERS.get(provider_type)
    if driver is None:
        raise ModelError(
            ModelErrorKind.NOT_CONFIGURED,
            f"No driver for provider type `{provider_type}`; there is one for: {', '.join(DRIVERS)}",
        )
    return driver()
