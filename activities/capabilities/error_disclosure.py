"""How much a failed turn tells its user."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from domain.capabilities import Capability
from domain.config import ERROR_DISCLOSURE, Disclosure


class ErrorDisclosure(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Annotated[
        Disclosure,
        Meta(
            description="generic: only that something went wrong. standard (default): an error code and its fields. "
            "detailed: also the provider's own words, in the field `detail`."
        ),
    ] = "standard"


CAPABILITY = Capability(
    id=ERROR_DISCLOSURE,
    name="Error Disclosure",
    description="Decides how much of a model provider's failure is shown to users.",
    category="Behaviour",
    icon="eye",
    config=ErrorDisclosure,
)
