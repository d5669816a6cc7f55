"""Questions to the user, with options to choose from. The turn waits for the answer, no worker does; it comes over the API."""

from __future__ import annotations

from typing import Never

from domain.capabilities import Capability, Tool, ToolContext, ToolError
from domain.questions import ASK_USER, AskUser

PROMPT = """\
When you cannot go on without a decision that only the user can make, ask with `ask_user` instead of guessing: one to four \
questions that belong together, the option you recommend first. Do not ask what you can find out yourself. When the user \
declines or does not answer, go on with what you know, or say what you are missing."""


async def ask_user(_context: ToolContext, _arguments: AskUser) -> Never:
    """Only reached by a call that was planned before the tool was the user's to answer."""
    raise ToolError("The questions were not asked. Call the tool again.")


CAPABILITY = Capability(
    id="ask_user",
    name="Ask User",
    description="Lets the model ask the user questions with answers to choose from; the turn waits for the answers.",
    category="Interaction",
    icon="message-circle-question",
    system_prompt=PROMPT,
    tools=(
        Tool(
            name=ASK_USER,
            display_name="Ask user",
            description=(
                "Ask the user one to four questions, each with two to six options, and wait for the answers. The user may also "
                "answer in their own words (`other_text`), or decline."
            ),
            arguments=AskUser,
            run=ask_user,
            answered_by="user",
            readonly=True,
        ),
    ),
)
