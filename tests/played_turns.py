"""Plays turns by hand, as a workflow and its steps would: no model, no waiting."""

from __future__ import annotations

from collections.abc import Sequence

from api.services import Services
from db.event_log import EventLog
from db.messages import NewMessage
from db.session_resources import DatabaseResources
from db.turn_store import TurnStore
from db.workspace_files import DatabaseFiles
from domain.events import NewEvent, OutputMessageDelta, StoredEvent, TokenUsage
from domain.ids import DEFAULT_ORG_ID, Prefix, new_id
from domain.messages import TextPart
from domain.tools import SideEffect, ToolCall
from domain.turns import (
    ArrivedAnswer,
    PlannedCall,
    ReasonBriefing,
    ReasonOutcome,
    ReasonResult,
    ResolvedModel,
    StepRef,
    ToolSettlement,
)
from tests.conftest import turn_store

MODEL = ResolvedModel(
    public_id=new_id(Prefix.MODEL), name="m", provider_public_id=new_id(Prefix.PROVIDER), provider_type="llmsim"
)


class Player:
    def __init__(self, services: Services, session: str) -> None:
        self.services = services
        self.session = session
        self.store: TurnStore = turn_store(services.log)
        self.files = DatabaseFiles.of_session(services.database.pool, session)
        self.storage = DatabaseResources(services.database.pool, services.keyring).storage(session)
        self.turn = ""
        self.iteration = 0

    @property
    def log(self) -> EventLog:
        return self.services.log

    async def say(self, text: str) -> str:
        posted = await self.services.messages.post(
            DEFAULT_ORG_ID, self.session, NewMessage(content=[TextPart(text=text)])
        )
        return posted.message.id

    def ref(self, exec_id: str | None = None) -> StepRef:
        return StepRef(
            session_id=self.session,
            turn_id=self.turn,
            iteration=self.iteration,
            exec_id=exec_id or new_id(Prefix.EXEC),
            attempt=1,
            worker="w",
        )

    async def begin(self, *, new_turn: bool = False) -> tuple[StepRef, ReasonBriefing]:
        if new_turn:
            self.turn, self.iteration = new_id(Prefix.TURN), 0
        self.iteration += 1
        ref = self.ref()
        briefing = await self.store.begin_reason(ref, "interrupted")
        assert isinstance(briefing, ReasonBriefing)
        return ref, briefing

    async def answer(self, ref: StepRef, briefing: ReasonBriefing, text: str, *calls: str) -> ReasonResult:
        for offset in range(0, len(text), 4):
            delta = OutputMessageDelta(
                turn_id=self.turn, message_id=briefing.message_id, delta=text[offset : offset + 4], offset=offset
            )
            await self.store.append(ref, [NewEvent(data=delta)])
        planned = [
            PlannedCall(
                call=ToolCall(id=call, name="work", arguments={}),
                kind="server",
                side_effect=SideEffect.AT_MOST_ONCE,
                timeout_seconds=5,
            )
            for call in calls
        ]
        outcome = ReasonOutcome(
            model=MODEL,
            prompt=[],
            offered_tools=[],
            text=text,
            answer=ArrivedAnswer(
                finish_reason="stop",
                usage=TokenUsage(input_tokens=3, output_tokens=2),
                text_length=len(text),
                duration_ms=1,
                calls=planned,
            ),
        )
        return await self.store.commit_reason(ref, outcome)

    async def run_call(self, call: str, *, result: str = "done") -> None:
        ref = self.ref()
        await self.store.begin_call(ref, call)
        await self.write_something(call)
        await self.store.settle_call(
            ref, call, ToolSettlement(status="success", result=[TextPart(text=result)], error=None)
        )

    async def write_something(self, call: str) -> None:
        """Every call changes files and values in another way."""
        await self.files.write("/shared.txt", f"written by {call}".encode())
        await self.files.write(f"/calls/{call}.txt", call.encode())
        await self.storage.set("last", call)
        if call.endswith("2"):
            await self.files.delete("/calls/call_a1.txt")
            await self.files.move("/shared.txt", "/moved.txt")
        if call.endswith("3"):
            await self.files.delete("/calls", recursive=True)
            await self.storage.delete("last")

    async def turn_with_tools(self, text: str, *batches: Sequence[str]) -> str:
        message = await self.say(text)
        first = True
        for batch in batches:
            ref, briefing = await self.begin(new_turn=first)
            first = False
            await self.answer(ref, briefing, "let me see", *batch)
            for call in batch:
                await self.run_call(call)
        ref, briefing = await self.begin(new_turn=first)
        await self.answer(ref, briefing, f"answer to {text}")
        return message

    async def events(self) -> list[StoredEvent]:
        return await self.log.read(self.session, after_sequence=0, limit=10_000)

    async def state(self) -> dict[str, object]:
        """Files with their content, and values."""
        return await state_of(self.services, self.session)


async def state_of(services: Services, session: str) -> dict[str, object]:
    files = DatabaseFiles.of_session(services.database.pool, session)
    entries = await files.list("/", recursive=True)
    contents = {one.path: content for one, content in await files.read_many([one.path for one in entries])}
    values = {
        one.key: one.value
        for one in await DatabaseResources(services.database.pool, services.keyring).storage(session).keys()
    }
    return {"files": contents, "directories": sorted(one.path for one in entries if one.is_directory), "values": values}
