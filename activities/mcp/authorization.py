"""A person lets us call a server in their name: OAuth with PKCE, in two halves that may run in two processes.

The library finds the authorization server and registers us there; where it would wait for the browser, its flow ends here, and
what the second half needs is handed out to be stored.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode, urlsplit

import msgspec

from domain.capabilities import ToolError
from domain.config import NetworkAccessList
from domain.mcp import BegunAuthorization, McpProblem, OAuthFlow, OAuthGrant, RegisteredClient, ServerTarget

if TYPE_CHECKING:
    from activities.web.fetch import Fetcher

BEGIN_SECONDS: Final = 30.0
"""For all requests up to the address that is shown to the person."""
CLIENT_NAME: Final = "Everruns"
PROTOCOL: Final = "2025-11-25"

_EVERYWHERE: Final = NetworkAccessList()
"""Network access lists belong to sessions; these requests belong to none."""


class McpAuthorization:
    """Serves the port `domain.mcp.McpAuthorizer`."""

    def __init__(self, private_hosts: Sequence[str] = ()) -> None:
        self._private_hosts = tuple(private_hosts)

    @cached_property
    def _fetcher(self) -> Fetcher:
        from activities.web.fetch import Fetcher, PrivateHosts

        return Fetcher(private_hosts=PrivateHosts(self._private_hosts))

    async def begin(
        self, target: ServerTarget, redirect_uri: str, client: RegisteredClient | None
    ) -> BegunAuthorization:
        from activities.mcp.client import preload

        await preload()
        try:
            async with asyncio.timeout(BEGIN_SECONDS):
                return await self._begin(target, redirect_uri, client)
        except TimeoutError:
            raise McpProblem("The authorization could not be prepared in time.") from None

    async def _begin(
        self, target: ServerTarget, redirect_uri: str, client: RegisteredClient | None
    ) -> BegunAuthorization:
        import httpx2
        from mcp.client.auth import OAuthFlowError, OAuthRegistrationError
        from pydantic import ValidationError

        from activities.mcp.cleaning import one_line
        from activities.mcp.guarded_http import GuardedTransport

        transport = GuardedTransport(self._fetcher, _EVERYWHERE)
        probe = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
        headers = {"mcp-protocol-version": PROTOCOL, "accept": "application/json, text/event-stream"}
        try:
            provider = _provider(target.url or "", redirect_uri, client)
            async with httpx2.AsyncClient(transport=transport, auth=provider, trust_env=False, timeout=10.0) as http:
                response = await http.post(target.url or "", json=probe, headers=headers)
        except _Begun as begun:
            return begun.authorization
        except (OAuthFlowError, OAuthRegistrationError) as error:
            raise McpProblem(f"The authorization cannot begin: {one_line(str(error))}") from None
        except (ToolError, httpx2.HTTPError, ValidationError, ValueError):
            reason = str(transport.failure) if transport.failure is not None else "the server can't be asked."
            raise McpProblem(f"The authorization cannot begin: {reason}") from None
        raise McpProblem(f"The server asks for no authorization; it answered with status {response.status_code}.")

    async def finish(self, flow: OAuthFlow, code: str, issuer: str | None) -> OAuthGrant:
        from activities.mcp.tokens import TokenRefused, request_token

        if (issuer is not None or flow.is_issuer_required) and issuer != flow.issuer:
            raise McpProblem("The answer comes from another authorization server than the one that was asked.")
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": flow.redirect_uri,
            "code_verifier": flow.verifier,
        }
        try:
            return await request_token(self._fetcher, _EVERYWHERE, flow.grant, form)
        except TokenRefused:
            raise McpProblem("The authorization server refused the code.") from None
        except ToolError as error:
            raise McpProblem(str(error)) from None


class _Begun(Exception):
    def __init__(self, authorization: BegunAuthorization) -> None:
        super().__init__("the person is needed")
        self.authorization = authorization


class _NothingStored:
    """The library's storage of tokens: ours are elsewhere."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def get_tokens(self) -> None:
        return None

    async def set_tokens(self, tokens: object) -> None:
        pass

    async def get_client_info(self) -> Any:
        return self._client

    async def set_client_info(self, client_info: object) -> None:
        pass


def _provider(url: str, redirect_uri: str, client: RegisteredClient | None) -> Any:
    from mcp.client.auth import OAuthClientProvider
    from mcp.shared.auth import OAuthClientInformationFull, OAuthClientMetadata

    class Beginning(OAuthClientProvider):
        async def _perform_authorization(self) -> Any:
            raise _Begun(_begun(self.context, redirect_uri))

    metadata = OAuthClientMetadata.model_validate(
        {
            "client_name": CLIENT_NAME,
            "redirect_uris": [redirect_uri],
            "grant_types": ["authorization_code", "refresh_token"],
        }
    )
    known = None
    if client is not None:
        known = OAuthClientInformationFull.model_validate(
            {
                "client_id": client.client_id,
                "client_secret": client.client_secret,
                "redirect_uris": [redirect_uri],
                "token_endpoint_auth_method": "client_secret_post" if client.client_secret else "none",
            }
        )
    return Beginning(url, metadata, _NothingStored(known))


def _begun(context: Any, redirect_uri: str) -> BegunAuthorization:
    """`context` is the library's, with all it has found out."""
    server, client = context.oauth_metadata, context.client_info
    base = context.get_authorization_base_url(context.server_url)
    authorization_endpoint = str(server.authorization_endpoint) if server else f"{base}/authorize"
    token_endpoint = str(server.token_endpoint) if server and server.token_endpoint else f"{base}/token"
    if urlsplit(authorization_endpoint).scheme not in ("https", "http"):
        raise McpProblem("The authorization server names a page that is no web page.")
    method = client.token_endpoint_auth_method or ("client_secret_post" if client.client_secret else "none")
    if method not in ("none", "client_secret_post", "client_secret_basic"):
        raise McpProblem("The authorization server wants a kind of client that is not supported.")
    resource = context.get_resource_url() if context.should_include_resource_param(PROTOCOL) else None
    verifier, state = secrets.token_urlsafe(64), secrets.token_urlsafe(32)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
    parameters = {
        "response_type": "code",
        "client_id": client.client_id,
        "redirect_uri": redirect_uri,
        "state": state,
        "code_challenge": challenge,
        "code_challenge_method": "S256",
    }
    if resource is not None:
        parameters["resource"] = resource
    if context.client_metadata.scope:
        parameters["scope"] = context.client_metadata.scope
        if "offline_access" in context.client_metadata.scope.split():
            parameters["prompt"] = "consent"
    joint = "&" if urlsplit(authorization_endpoint).query else "?"
    grant = OAuthGrant(
        access_token="",
        token_endpoint=token_endpoint,
        client_id=client.client_id,
        client_secret=client.client_secret,
        client_auth=method,
        resource=resource,
        scope=context.client_metadata.scope,
    )
    flow = OAuthFlow(
        grant=grant,
        verifier=verifier,
        redirect_uri=redirect_uri,
        issuer=None if server is None else str(server.issuer),
        is_issuer_required=bool(server and server.authorization_response_iss_parameter_supported),
    )
    return BegunAuthorization(
        url=f"{authorization_endpoint}{joint}{urlencode(parameters)}", state=state, flow=msgspec.json.encode(flow)
    )
