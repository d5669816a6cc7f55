"""Nothing: neither tools nor prompt. It exists so that references to it are valid.

Whoever switches capabilities on and off by a reference needs one for off.
"""

from __future__ import annotations

from domain.capabilities import Capability

CAPABILITY = Capability(
    id="noop",
    name="No-op",
    description="Does nothing: adds neither tools nor text to a prompt.",
    category="Development",
    icon="circle",
)
