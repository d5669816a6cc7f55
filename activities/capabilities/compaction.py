"""How a conversation that outgrows its model is made shorter. Without this capability it is done all the same, by the defaults.

The work itself is `activities.context`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from domain.capabilities import Capability

Strategy = Literal["auto", "native", "observation_masking", "summarization"]


class ObservationMasking(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    keep_recent_tool_outputs: Annotated[
        int, Meta(ge=0, le=1000, description="Newest tool outputs that are kept whole. Default: 2.")
    ] = 2


class Summarization(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: (
        Annotated[
            str, Meta(description="Id or name of the model that writes the summary. Default: the conversation's own.")
        ]
        | None
    ) = None
    preserve: Annotated[
        list[Annotated[str, Meta(max_length=500)]],
        Meta(max_length=50, description="What a summary must keep, such as `file paths`."),
    ] = []
    instructions: Annotated[str, Meta(max_length=10_000, description="More for whoever summarises.")] | None = None


class Compaction(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    strategy: Annotated[
        Strategy,
        Meta(
            description="auto (default): the first that helps of masking, the provider's own compaction, a summary. "
            "Otherwise only the one that is named."
        ),
    ] = "auto"
    proactive: Annotated[
        bool, Meta(description="Default: true. False: only after the provider has refused a prompt as too large.")
    ] = True
    budget_percent: Annotated[
        float, Meta(gt=0, le=1, description="Share of the model's input limit from which on to compact. Default: 0.85.")
    ] = 0.85
    observation_masking: ObservationMasking = ObservationMasking()
    summarization: Summarization = Summarization()


CAPABILITY = Capability(
    id="compaction",
    name="Compaction",
    description="Decides how long conversations are kept within what the model can read.",
    category="Behaviour",
    icon="fold-vertical",
    config=Compaction,
)
