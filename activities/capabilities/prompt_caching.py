"""Whether providers may keep the beginning of a prompt in their cache: they may, unless this says otherwise."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from domain.capabilities import Capability


class PromptCaching(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: Annotated[bool, Meta(description="Default: true. Without this capability prompts are cached as well.")] = (
        True
    )


CAPABILITY = Capability(
    id="prompt_caching",
    name="Prompt Caching",
    description="Lets the model's provider cache the beginning of prompts, which makes long conversations cheaper.",
    category="Behaviour",
    icon="database",
    config=PromptCaching,
)
