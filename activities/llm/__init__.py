"""Drivers to language models, one module per wire format.

A driver's module and its SDK are imported at its first use, in a thread: the import of an SDK takes seconds, which is longer than
a worker may be silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from typing import Final

from domain.model import ModelDriver, ModelError, ModelErrorKind
from domain.providers import PROVIDER_TYPES


def _anthropic() -> ModelDriver:
    import anthropic  # noqa: F401

    from activities.llm.anthropic_messages import AnthropicMessages

    return AnthropicMessages()


def _llmsim() -> ModelDriver:
    from activities.llm.llmsim import LlmSim

    return LlmSim()


def _openai_chat() -> ModelDriver:
    import openai  # noqa: F401

    from activities.llm.openai_chat import OpenAIChat

    return OpenAIChat()


def _openai_responses() -> ModelDriver:
    import openai  # noqa: F401

    from activities.llm.openai_responses import OpenAIResponses

    return OpenAIResponses()


DRIVERS: Final[dict[str, Callable[[], ModelDriver]]] = {
    "anthropic": _anthropic,
    "llmsim": _llmsim,
    "openai_chat": _openai_chat,
    "openai_responses": _openai_responses,
}
"""Driver, as `domain.providers` names it, to what makes it."""


@cache
def driver(name: str) -> ModelDriver:
    """The process's one driver of this name: it keeps connections to its providers."""
    return DRIVERS[name]()


def driver_for(provider_type: str) -> ModelDriver:
    """Raises `ModelError` for a provider type that nothing here speaks."""
    known = PROVIDER_TYPES.get(provider_type)
    if known is None:
        raise ModelError(
            ModelErrorKind.NOT_CONFIGURED,
            f"No driver for provider type `{provider_type}`; there is one for: {', '.join(PROVIDER_TYPES)}",
        )
    return driver(known.driver)


async def load_driver(provider_type: str) -> ModelDriver:
    """`driver_for` without holding up the event loop."""
    return await asyncio.to_thread(driver_for, provider_type)
