"""Findings about a whole configuration: prompt, tools, capabilities, network, cost. Rules only, no model is asked.

The same input gives the same findings in the same order. A rule is a function from `Shape` to findings; each finding says what to
do about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from msgspec import Struct

from activities.capabilities.assembly import offered_tools, system_prompt
from activities.capabilities.prompt_checks import prompt_findings
from activities.capabilities.registry import ResolvedCapabilities
from domain.config import CapabilityRef, NetworkAccessList, TurnConfig
from domain.findings import Category, Finding, FindingLocation, Severity
from domain.network_patterns import problem_of
from domain.token_estimate import text_tokens, tool_tokens

MANY_TOOLS: Final = 60
LARGE_SHARE: Final = 0.25
"""Of the context window, for prompt and tools together: what a conversation cannot use."""
LARGE_TOKENS: Final = 20_000
"""The same where no window is known."""

READS_OUTSIDE: Final = frozenset({"web_fetch"})
HOLDS_SECRETS: Final = frozenset({"session_storage"})
APPROVES: Final = frozenset({"tool_approval"})

_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class GivenTool(Struct, frozen=True, kw_only=True):
    """A client-side tool as it was written. `problem` when it cannot be read as one."""

    name: str
    description: str = ""
    parameters: dict[str, object] = {}
    problem: str | None = None


class Shape(Struct, frozen=True, kw_only=True):
    """What is checked. `prompt`, `refs`, `tools` and `network_access` are what was written, `config` is what they fold into."""

    prompt: str
    refs: Sequence[CapabilityRef]
    tools: Sequence[GivenTool]
    network_access: NetworkAccessList
    config: TurnConfig
    resolved: ResolvedCapabilities
    context_window: int | None = None

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(one.capability.id for one in self.resolved.capabilities)


def findings(shape: Shape) -> list[Finding]:
    names = frozenset(tool.name for tool in offered_tools(shape.config, shape.resolved))
    found = list(prompt_findings(shape.prompt, names))
    for rule in RULES:
        found += rule(shape)
    return found


def _finding(rule: str, category: Category, severity: Severity, field: str, message: str, fix: str) -> Finding:
    return Finding(
        rule_id=rule,
        category=category,
        severity=severity,
        source="builtin",
        message=message,
        fix=fix,
        location=FindingLocation(field=field),
    )


def _tools(shape: Shape) -> Iterator[Finding]:
    counts = Counter(tool.name for tool in shape.tools)
    theirs = {tool.tool.name: tool.capability.name for tool in shape.resolved.tools}
    told: set[str] = set()
    for index, tool in enumerate(shape.tools):
        field, shown = f"tools[{index}]", f"`{tool.name[:80]}`"
        if tool.problem is not None:
            yield _finding(
                "tools.invalid",
                "structure",
                "warning",
                field,
                f"This is no tool: {tool.problem}.",
                "Give it `name`, `description` and `parameters`.",
            )
            continue
        if not _TOOL_NAME.fullmatch(tool.name):
            yield _finding(
                "tools.name",
                "structure",
                "warning",
                f"{field}.name",
                f"{shown} is no name that providers accept.",
                "Use up to 64 letters, digits, `_` and `-`.",
            )
        if counts[tool.name] > 1 and tool.name not in told:
            told.add(tool.name)
            yield _finding(
                "tools.duplicate",
                "structure",
                "warning",
                field,
                f"{shown} is defined {counts[tool.name]} times; only the first is offered.",
                "Rename or remove the others.",
            )
        if tool.name in theirs:
            yield _finding(
                "tools.shadowed",
                "structure",
                "warning",
                field,
                f"{shown} is also a tool of {theirs[tool.name]}, which is offered instead.",
                "Rename it, or leave out the capability.",
            )
        if not tool.description.strip():
            yield _finding(
                "tools.description",
                "effectiveness",
                "warning",
                f"{field}.description",
                f"{shown} has no description; the model cannot know when to use it.",
                "Say what it does, when to use it, and what it returns.",
            )
        if tool.parameters.get("type", "object") != "object":
            yield _finding(
                "tools.parameters",
                "structure",
                "warning",
                f"{field}.parameters",
                f"The parameters of {shown} are no object; providers refuse that.",
                'Use a JSON Schema with `"type": "object"`.',
            )


def _capabilities(shape: Shape) -> Iterator[Finding]:
    places = {ref.ref: index for index, ref in reversed(list(enumerate(shape.refs)))}
    for one in shape.resolved.skipped:
        index = places.get(one.ref)
        if index is not None:
            rule = "capabilities.invalid_config" if "configuration" in one.reason else "capabilities.unknown"
            yield _finding(
                rule,
                "structure",
                "warning",
                f"capabilities[{index}]",
                f"`{one.ref[:120]}` does nothing: {one.reason}.",
                "Correct it or leave it out; `GET /v1/capabilities` lists what there is.",
            )
            continue
        needing = [
            other.capability.id for other in shape.resolved.capabilities if one.ref in other.capability.dependencies
        ]
        by = f"`{needing[0]}`" if needing else "A capability"
        yield _finding(
            "capabilities.missing_dependency",
            "structure",
            "warning",
            "capabilities",
            f"{by} needs `{one.ref[:120]}`, but {one.reason}.",
            f"Leave out {by if needing else 'it'}, or bring back what it needs.",
        )
    for ref, count in Counter(ref.ref for ref in shape.refs).items():
        if count > 1:
            yield _finding(
                "capabilities.duplicate",
                "structure",
                "info",
                f"capabilities[{places[ref]}]",
                f"`{ref[:120]}` is listed {count} times; the last configuration holds.",
                "List it once.",
            )
    for one in shape.resolved.capabilities:
        if one.capability.status == "deprecated":
            yield _finding(
                "capabilities.deprecated",
                "effectiveness",
                "suggestion",
                "capabilities",
                f"`{one.capability.id}` is deprecated.",
                "Use what its description names instead.",
            )


def _tool_clashes(shape: Shape) -> Iterator[Finding]:
    owners: dict[str, str] = {}
    for one in shape.resolved.capabilities:
        for tool in one.capability.tools:
            first = owners.setdefault(tool.name, one.capability.id)
            if first != one.capability.id:
                yield _finding(
                    "tools.clash",
                    "structure",
                    "warning",
                    "capabilities",
                    f"`{tool.name}` comes from `{first}` and from `{one.capability.id}`; that of `{first}` is offered.",
                    "Leave out one of the two.",
                )


def _safety(shape: Shape) -> Iterator[Finding]:
    risky = [one.capability.id for one in shape.resolved.capabilities if one.capability.risk_level == "high"]
    listed = ", ".join(f"`{one}`" for one in risky)
    if risky:
        yield _finding(
            "capabilities.high_risk",
            "safety",
            "info",
            "capabilities",
            f"High risk: {listed}. Only admins may give them out.",
            "Leave out what the agent can do without.",
        )
    if risky and not shape.ids & APPROVES:
        yield _finding(
            "capabilities.no_approval",
            "safety",
            "suggestion",
            "capabilities",
            f"{listed} run without anybody's approval.",
            "Add `tool_approval`, so that a person decides about what matters.",
        )
    reads = shape.ids & READS_OUTSIDE or (frozenset({"MCP servers"}) if shape.config.mcp_servers else frozenset[str]())
    open_network = not shape.config.network_access.allowed and shape.config.network_access.allowed != []
    if reads and open_network and shape.ids & HOLDS_SECRETS:
        yield _finding(
            "safety.secrets_and_open_network",
            "safety",
            "warning",
            "network_access",
            f"The session keeps values and secrets (`session_storage`) and can reach every host (`{min(reads)}`): a page with "
            "hostile instructions could have data sent anywhere.",
            "Name the hosts it needs in `network_access.allowed`.",
        )
    elif reads and open_network:
        yield _finding(
            "safety.open_network",
            "safety",
            "suggestion",
            "network_access",
            f"`{min(reads)}` can reach every public host.",
            "Name the hosts it needs in `network_access.allowed`.",
        )


def _network(shape: Shape) -> Iterator[Finding]:
    for name, patterns in (("allowed", shape.network_access.allowed), ("blocked", shape.network_access.blocked)):
        for index, pattern in enumerate(patterns or []):
            if (problem := problem_of(pattern)) is not None:
                effect = "It allows nothing." if name == "allowed" else "It blocks everything."
                yield _finding(
                    "network.malformed",
                    "safety",
                    "warning",
                    f"network_access.{name}[{index}]",
                    f"The pattern `{pattern[:120]}` {problem}. {effect}",
                    "Write it as `[scheme://]host[:port][/path]`.",
                )
    if shape.config.network_access.allowed == [] and (shape.network_access.allowed or shape.ids & READS_OUTSIDE):
        yield _finding(
            "network.nothing_allowed",
            "effectiveness",
            "warning",
            "network_access.allowed",
            "No host is allowed by every layer: nothing can be reached.",
            "Allow hosts that the layers below have in common.",
        )


def _cost(shape: Shape) -> Iterator[Finding]:
    tools = offered_tools(shape.config, shape.resolved)
    tokens = text_tokens(system_prompt(shape.config, shape.resolved)) + sum(tool_tokens(tool) for tool in tools)
    window = shape.context_window
    if window is not None and tokens >= window:
        yield _finding(
            "cost.does_not_fit",
            "cost",
            "warning",
            "system_prompt",
            f"Prompt and tools take about {tokens:,} tokens; the model's context window has {window:,}. No call can succeed.",
            "Shorten the prompt, leave out tools, or choose a model with a larger window.",
        )
    elif tokens > (LARGE_TOKENS if window is None else window * LARGE_SHARE):
        share = f"{tokens / window:.0%} of the model's context window" if window else "of every model call"
        yield _finding(
            "cost.large_prompt",
            "cost",
            "warning",
            "system_prompt",
            f"Prompt and tools take about {tokens:,} tokens, {share}.",
            "Move what is seldom needed into skills or files.",
        )
    if len(tools) > MANY_TOOLS:
        yield _finding(
            "cost.many_tools",
            "effectiveness",
            "suggestion",
            "capabilities",
            f"{len(tools)} tools are offered; models choose worse among many.",
            "Leave out capabilities this agent does not need.",
        )


RULES: Final[tuple[Callable[[Shape], Iterator[Finding]], ...]] = (
    _tools,
    _tool_clashes,
    _capabilities,
    _safety,
    _network,
    _cost,
)
