"""Ready-made configurations of `guardrails`, to be taken over as they are or changed."""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

from activities.guardrails.checks import (
    BlocklistCheck,
    Guardrails,
    MaxLengthCheck,
    PiiCheck,
    RegexCheck,
    ToolPatternCheck,
    UrlCheck,
)


class GuardrailExample(Struct, frozen=True, kw_only=True):
    name: str
    display_name: str
    description: str
    tags: list[str]
    stages: list[str]
    check_types: list[str]
    config: Guardrails
    data_egress: Literal["none"] = "none"


def _example(name: str, display_name: str, description: str, tags: list[str], config: Guardrails) -> GuardrailExample:
    return GuardrailExample(
        name=name,
        display_name=display_name,
        description=description,
        tags=tags,
        stages=list(dict.fromkeys(check.stage for check in config.checks)),
        check_types=list(dict.fromkeys(check.type for check in config.checks)),
        config=config,
    )


EXAMPLES: Final = (
    _example(
        "secrets",
        "Secrets and credentials",
        "API keys, access tokens and private keys reach neither readers, tools nor the model. They are told by their shape.",
        ["security", "secrets"],
        Guardrails(
            checks=[
                PiiCheck(
                    stage="output", id="secret-in-answer", kinds=["secret"], replacement="The answer held a credential."
                ),
                PiiCheck(stage="tool_use", id="secret-in-call", kinds=["secret"]),
                PiiCheck(stage="tool_output", id="secret-in-result", kinds=["secret"]),
            ]
        ),
    ),
    _example(
        "personal-data",
        "Personal data",
        "Answers name no card and account numbers; e-mail addresses and telephone numbers in them are only noted.",
        ["privacy"],
        Guardrails(
            checks=[
                PiiCheck(stage="output", id="accounts", kinds=["credit_card", "iban"]),
                PiiCheck(stage="output", id="contacts", kinds=["email", "phone"], on_fail="log"),
            ]
        ),
    ),
    _example(
        "forbidden-words",
        "Forbidden words",
        "A list of words that no answer may have. Put in your own.",
        ["moderation"],
        Guardrails(
            checks=[BlocklistCheck(stage="output", id="words", words=["internal use only"], replacement="I can't say.")]
        ),
    ),
    _example(
        "dangerous-commands",
        "Dangerous shell commands",
        "Commands that delete everything or run what they download are refused before they run.",
        ["security", "tools"],
        Guardrails(
            checks=[
                RegexCheck(
                    stage="tool_use",
                    id="destructive-commands",
                    patterns=[r"\brm\s+-[a-zA-Z]*[rR][a-zA-Z]*\s+/", r"(?i)\b(?:curl|wget)\b[^|\n]*\|\s*(?:ba|z)?sh\b"],
                    replacement="This command is not allowed here. Find a safer way.",
                )
            ]
        ),
    ),
    _example(
        "read-only",
        "Read-only tools",
        "Tools that write, delete or run something are refused. Change the list to the tools your agent has.",
        ["tools"],
        Guardrails(
            checks=[
                ToolPatternCheck(stage="tool_use", id="no-writing", tools=["write_*", "edit_*", "delete_*", "bash"])
            ]
        ),
    ),
    _example(
        "known-hosts",
        "Links to known hosts only",
        "Neither answers nor calls hold URLs of unknown hosts, which keeps data from leaving in links. Put in your own.",
        ["security", "links"],
        Guardrails(
            checks=[
                UrlCheck(stage="output", id="links", allow=["example.com", "*.example.com"]),
                UrlCheck(stage="tool_use", id="requests", allow=["example.com", "*.example.com"]),
            ]
        ),
    ),
    _example(
        "prompt-injection",
        "Instructions in tool results",
        "Pages and files that speak to the model instead of informing it are noted. Blocks nothing: people discuss such texts.",
        ["security"],
        Guardrails(
            checks=[
                RegexCheck(
                    stage="tool_output",
                    id="instructions",
                    on_fail="log",
                    patterns=[
                        r"(?i)\b(?:ignore|disregard|forget)\s+(?:all\s+|any\s+)?(?:previous|prior|earlier|above)\b"
                    ],
                ),
                MaxLengthCheck(stage="tool_output", id="long-results", characters=50_000, on_fail="log"),
            ]
        ),
    ),
)
