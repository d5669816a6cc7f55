"""What a model's stored configuration may say, the same for every real driver.

A request's own fields win over it. What a provider has and we have no name for goes into `extra_body`, as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from domain.errors import InvalidInput, invalid_field
from domain.model import ModelError, ModelErrorKind, ModelRequest
from domain.model_profiles import ReasoningEffort


class ModelOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`background`: let generations go on at the provider when a worker is lost, for the next one to resume (OpenAI).

    `circuit_breaker` is read where models are chosen, see `db.model_choice`; `context_window` (tokens) where prompts are kept in
    bounds, see `domain.turns.ResolvedModel.limits`.
    """

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    reasoning_effort: ReasoningEffort | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    speed: Literal["flex", "default", "priority", "fast", "ultrafast"] | None = None
    background: bool = False
    circuit_breaker: bool = True
    context_window: Annotated[int, Meta(ge=1)] | None = None
    extra_body: dict[str, object] = {}


def parse_options(options: Mapping[str, object], *, root: str = "options") -> ModelOptions:
    """Raises `InvalidInput` whose `field` is the full path of what is wrong."""
    try:
        return msgspec.convert(options, ModelOptions)
    except msgspec.ValidationError as error:
        raise invalid_field(error, root) from None


def options_of(request: ModelRequest) -> ModelOptions:
    """The options of a model call. Raises `ModelError`: no try would make them better."""
    try:
        return parse_options(request.options)
    except InvalidInput as error:
        raise ModelError(ModelErrorKind.INVALID_REQUEST, f"The model's {error.message}") from None
