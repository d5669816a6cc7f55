"""Puts the HTTP edge together: every route, one exception handler, CORS, documentation, and `Edge` around it all."""

from __future__ import annotations

from collections.abc import Sequence

from litestar import Litestar, Router, get
from litestar.config.cors import CORSConfig
from litestar.di import NamedDependency, Provide
from litestar.types import ControllerRouterHandler
from msgspec import Struct

from api import (
    agents,
    budgets,
    capabilities,
    context_report,
    declarative_capabilities,
    durable,
    elicitation_answers,
    events,
    guardrails,
    harnesses,
    mcp_servers,
    memories,
    memory_files,
    messages,
    models,
    organizations,
    previews,
    providers,
    question_answers,
    session_databases,
    session_history,
    session_schedules,
    session_storage,
    session_tasks,
    sessions,
    skills,
    tool_approvals,
    user_connections,
    workspace_files,
    workspaces,
)
from api.caller import CHANGE_REASON, caller_of, check_caller
from api.documentation import openapi_config, static_files
from api.edge import REQUEST_ID, Edge
from api.mcp_endpoint import McpEndpoint
from api.problems import declared, problem_response
from api.services import Services
from domain.limits import BODY_MAX_BYTES
from infra.settings import Settings

ROUTERS = (
    agents.router,
    budgets.router,
    budgets.session_router,
    capabilities.router,
    declarative_capabilities.router,
    context_report.router,
    durable.router,
    elicitation_answers.router,
    events.router,
    guardrails.router,
    harnesses.router,
    harnesses.list_harness_examples,
    mcp_servers.router,
    memories.router,
    memory_files.router,
    user_connections.router,
    messages.router,
    models.router,
    organizations.router,
    previews.router,
    providers.router,
    question_answers.router,
    tool_approvals.router,
    session_schedules.router,
    session_history.router,
    session_storage.router,
    session_databases.router,
    session_tasks.list_org_tasks,
    session_tasks.router,
    sessions.router,
    skills.router,
    workspace_files.session_router,
    workspace_files.workspace_router,
    workspaces.router,
)


class Health(Struct, frozen=True, kw_only=True):
    status: str
    version: str
    auth_mode: str


@get("/health", operation_id="health", summary="Health", tags=["Health"], responses=declared())
async def health(services: NamedDependency[Services]) -> Health:
    """Answers as long as the process serves requests; it looks at nothing else."""
    return Health(status="ok", version=services.version, auth_mode=services.settings.auth_mode.capitalize())


def create_app(services: Services, *, extra_handlers: Sequence[ControllerRouterHandler] = ()) -> Litestar:
    """`extra_handlers` are served beside the resources, under the same prefix and the same rules.

    Requests find the services in the application's state, so that an application can be given others.
    """
    routes = Router(
        f"{services.settings.api_prefix}/v1", route_handlers=[*ROUTERS, *extra_handlers], guards=[check_caller]
    )
    mcp = McpEndpoint(services)
    app = Litestar(
        route_handlers=[health, routes, mcp.route(), static_files()],
        on_shutdown=[mcp.close],
        dependencies={
            "services": Provide(lambda: app.state.services, sync_to_thread=False),
            "caller": Provide(caller_of, sync_to_thread=False),
        },
        exception_handlers={Exception: problem_response},
        request_max_body_size=BODY_MAX_BYTES,
        openapi_config=openapi_config(services.version),
        cors_config=_cors(services.settings),
        # Ours is set up by the composition root; Litestar's would replace its handlers.
        logging_config=None,
    )
    app.state.services = services
    app.asgi_handler = Edge(app.asgi_handler, services.settings.api_prefix)
    return app


def _cors(settings: Settings) -> CORSConfig | None:
    if not settings.cors_allowed_origins:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_allowed_origins),
        allow_credentials=True,
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"],
        allow_headers=[
            "Authorization",
            "Content-Type",
            "End-User",
            "Idempotency-Key",
            "Last-Event-ID",
            "X-Org-Id",
            "X-Project-Id",
            CHANGE_REASON,
            REQUEST_ID,
        ],
        expose_headers=[REQUEST_ID, "X-Total-Count", "Retry-After"],
    )
