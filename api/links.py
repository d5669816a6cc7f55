"""Pages, and the links on single resources: where it is and what can be done with it now."""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar
from urllib.parse import urlencode

from litestar import Request
from litestar.params import QueryParameter
from msgspec import Struct

from api.problems import AllowedAction
from api.services import Services

T = TypeVar("T", bound=Struct)

DEFAULT_LIMIT: Final = 20
MAX_LIMIT: Final = 100

MAX_OFFSET: Final = 1_000_000_000
"""Far beyond every resource limit, and well inside PostgreSQL's bigint."""

Offset = Annotated[int, QueryParameter(ge=0, le=MAX_OFFSET, description="How many items to skip.")]
Limit = Annotated[
    int, QueryParameter(ge=1, description=f"Items per page; more than {MAX_LIMIT} is read as {MAX_LIMIT}.")
]

POLICY_ACTIONS: Final = ("read", "create", "update", "delete")


class Page(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`next_url` and `prev_url` are relative to the host, so they hold behind any proxy."""

    total: int
    offset: int
    limit: int
    next_url: str | None = None
    prev_url: str | None = None


class ConfigView(Struct, frozen=True, kw_only=True):
    """Which policies the caller satisfies."""

    policies: dict[str, bool]


def resource_config(resource: str) -> ConfigView:
    return ConfigView(policies={f"org:{resource}:{action}": True for action in POLICY_ACTIONS})


def page_fields(request: Request[Any, Any, Any], *, total: int, offset: int, limit: int) -> dict[str, Any]:
    def url(start: int) -> str:
        kept = [(key, value) for key, value in request.query_params.multi_items() if key not in ("offset", "limit")]
        return f"{request.scope['path']}?{urlencode([*kept, ('offset', start), ('limit', limit)])}"

    return {
        "total": total,
        "offset": offset,
        "limit": limit,
        "next_url": url(offset + limit) if offset + limit < total else None,
        "prev_url": url(max(0, offset - limit)) if offset > 0 else None,
    }


def capped(limit: int) -> int:
    return min(limit, MAX_LIMIT)


def self_url(services: Services, path: str) -> str:
    return f"{services.settings.public_app_url}{services.settings.api_prefix}/v1/{path}"


def actions(url: str, *items: tuple[str, str, str, str]) -> list[AllowedAction]:
    """Items are (rel, method, path after the resource, operation id)."""
    return [
        AllowedAction(rel=rel, method=method, href=url + path, operation_id=operation)
        for rel, method, path, operation in items
    ]


def view(kind: type[T], resource: Struct, **more: Any) -> T:
    """A resource as its view: the same fields and some more."""
    return kind(**{name: getattr(resource, name) for name in resource.__struct_fields__}, **more)
