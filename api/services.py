"""What routes work with; put together by the composition root and injected as `services`."""

from __future__ import annotations

from dataclasses import dataclass

from activities.capabilities.registry import CapabilityRegistry
from api.background import BackgroundTasks
from api.streams import StreamHub
from db.database import Database
from db.event_log import EventLog
from db.messages import MessageStore
from db.scheduling import Scheduling
from db.session_tasks import TaskStore
from domain.mcp import McpAuthorizer, ToolDiscovery
from domain.ports import MessageMetadataCheck, ModelDiscovery, ModelOptionsCheck, TurnGateway
from infra.encryption import Keyring
from infra.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Services:
    settings: Settings
    database: Database
    log: EventLog
    capabilities: CapabilityRegistry
    turns: TurnGateway
    messages: MessageStore
    scheduling: Scheduling
    tasks: TaskStore
    streams: StreamHub
    background: BackgroundTasks
    keyring: Keyring
    discover_models: ModelDiscovery
    discover_mcp_tools: ToolDiscovery
    mcp_authorizer: McpAuthorizer
    check_model_options: ModelOptionsCheck
    check_message_metadata: MessageMetadataCheck
    version: str
