"""Access tokens for servers that want a person's leave: the stored one, renewed in time and without the person."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

import httpx2
import msgspec

from activities.mcp.guarded_http import CONNECT_SECONDS, GuardedTransport
from activities.web.fetch import Fetcher
from domain.capabilities import ToolError
from domain.config import NetworkAccessList
from domain.mcp import AuthMode, McpDirectory, OAuthGrant, ServerTarget
from domain.secret import Secret

RENEWED_AHEAD_SECONDS: Final = 60.0
TOKEN_SECONDS: Final = 15.0


class TokenRefused(Exception):
    """The authorization server gives no token; the person has to be asked."""


async def access_token(
    directory: McpDirectory,
    fetcher: Fetcher,
    target: ServerTarget,
    access: NetworkAccessList,
    *,
    spent: Secret | None = None,
) -> Secret | None:
    """None for a server that needs none. `spent` is one the server has just refused.

    Raises `ToolError` when a person has to connect first.
    """
    if target.auth_mode is not AuthMode.O_AUTH:
        return None
    grant = await directory.grant(target)
    if grant is None:
        raise not_connected(target)
    is_spent = spent is not None and spent.reveal() == grant.access_token
    if is_spent or (grant.expires_at is not None and grant.expires_at - RENEWED_AHEAD_SECONDS < time.time()):

        async def renewed(grant: OAuthGrant) -> OAuthGrant | None:
            return await _renewed(fetcher, grant, access)

        grant = await directory.renew(target, grant.access_token, renewed)
        if grant is None:
            raise not_connected(target)
    return Secret(grant.access_token)


def not_connected(target: ServerTarget) -> ToolError:
    return ToolError(
        f"MCP server `{target.name}` is not connected: somebody has to authorize it first, beginning with "
        f"POST /v1/mcp-servers/{target.server_id}/oauth/authorize."
    )


async def _renewed(fetcher: Fetcher, grant: OAuthGrant, access: NetworkAccessList) -> OAuthGrant | None:
    """None when the refresh token is not taken any more. Raises `ToolError` when the server can't be asked."""
    if grant.refresh_token is None:
        return None
    form = {"grant_type": "refresh_token", "refresh_token": grant.refresh_token}
    try:
        return await request_token(fetcher, access, grant, form)
    except TokenRefused:
        return None


async def request_token(
    fetcher: Fetcher, access: NetworkAccessList, grant: OAuthGrant, form: Mapping[str, str]
) -> OAuthGrant:
    """The next grant, from the token endpoint of `grant`. Raises `TokenRefused`, and `ToolError` for a failure."""
    fields = {**form, "client_id": grant.client_id}
    if grant.resource is not None:
        fields["resource"] = grant.resource
    headers = {"accept": "application/json"}
    if grant.client_secret is not None and grant.client_auth == "client_secret_basic":
        pair = f"{quote(grant.client_id, safe='')}:{quote(grant.client_secret, safe='')}"
        headers["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    elif grant.client_secret is not None and grant.client_auth == "client_secret_post":
        fields["client_secret"] = grant.client_secret
    transport = GuardedTransport(fetcher, access)
    timeout = httpx2.Timeout(CONNECT_SECONDS, read=TOKEN_SECONDS)
    try:
        async with httpx2.AsyncClient(transport=transport, timeout=timeout, trust_env=False) as http:
            response = await http.post(grant.token_endpoint, data=fields, headers=headers)
    except (httpx2.HTTPError, ToolError):
        reason = f": {transport.failure}" if transport.failure is not None else "."
        raise ToolError(f"The authorization server can't be reached{reason}") from None
    if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
        raise TokenRefused
    if response.status_code != 200:
        raise ToolError(f"The authorization server failed with status {response.status_code}.")
    return _grant_of(response, grant)


class _TokenResponse(msgspec.Struct, frozen=True, kw_only=True):
    access_token: str
    token_type: str = "Bearer"  # noqa: S105  # a type, not a token
    expires_in: float | None = None
    refresh_token: str | None = None
    scope: str | None = None


def _grant_of(response: httpx2.Response, before: OAuthGrant) -> OAuthGrant:
    try:
        token = msgspec.json.decode(response.content, type=_TokenResponse, strict=False)
    except (msgspec.MsgspecError, UnicodeError):
        raise ToolError("The authorization server's answer is not a token.") from None
    text = token.access_token
    if not (text.isprintable() and text.isascii() and token.token_type.lower() == "bearer"):
        raise ToolError("The authorization server's answer is not a bearer token.")
    return msgspec.structs.replace(
        before,
        access_token=token.access_token,
        refresh_token=token.refresh_token or before.refresh_token,
        expires_at=None if token.expires_in is None else time.time() + token.expires_in,
        scope=token.scope or before.scope,
    )
