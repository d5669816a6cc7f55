"""What `web_fetch` takes and returns."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from domain.limits import SECRET_NAME_MAX_CHARACTERS
from domain.network_patterns import parse_pattern, problem_of

MAX_BODY_CHARACTERS: Final = 1024 * 1024
SECRET_NAME: Final = rf"[A-Za-z_][A-Za-z0-9_]{{0,{SECRET_NAME_MAX_CHARACTERS - 1}}}"


class WebFetchConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Written by people, never by a model: it decides where secrets may go."""

    secrets: Annotated[
        dict[
            Annotated[str, Meta(pattern=f"^{SECRET_NAME}$")],
            Annotated[list[Annotated[str, Meta(min_length=1, max_length=2048)]], Meta(min_length=1, max_length=20)],
        ],
        Meta(
            max_length=100,
            description="Where each secret of the session may be sent in a header, by its name: patterns as in `network_access`, "
            "without `*`, such as `https://api.example.com/v1`. Default: nowhere.",
        ),
    ] = {}

    def __post_init__(self) -> None:
        for name, texts in self.secrets.items():
            for text in texts:
                problem = problem_of(text)
                pattern = parse_pattern(text)
                if pattern is not None and (pattern.host == "*" or pattern.subdomains_only):
                    problem = "has a `*`; a secret goes to hosts that are named"
                if problem is not None:
                    raise ValueError(f"the pattern `{text[:200]}` for the secret `{name}` {problem}")


class WebFetchArguments(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: Annotated[str, Meta(min_length=1, max_length=8192, description="An http:// or https:// URL.")]
    method: Annotated[
        Literal["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"], Meta(description="Default GET.")
    ] = "GET"
    headers: (
        Annotated[
            dict[str, str],
            Meta(
                max_length=50,
                description="Request headers. They are not sent on to another origin by a redirect. A value may name a secret of "
                "the session, which is put in when it is sent: `Bearer {{secret:NAME}}`.",
            ),
        ]
        | None
    ) = None
    body: Annotated[str, Meta(max_length=MAX_BODY_CHARACTERS, description="A text as the request's body.")] | None = (
        None
    )
    json: Annotated[dict[str, Any], Meta(description="A JSON object as the body, instead of `body`.")] | None = None
    form: (
        Annotated[dict[str, str], Meta(description="Form fields as the body (URL-encoded), instead of `body`.")] | None
    ) = None
    as_markdown: (
        Annotated[bool, Meta(description="HTML as Markdown, which is the default; false: the HTML itself.")] | None
    ) = None
    as_text: Annotated[bool, Meta(description="HTML as plain text, without links and formatting.")] = False
    content_focus: Annotated[
        Literal["full", "main"],
        Meta(description="main: only the main content of an HTML page, without navigation and the like. Default full."),
    ] = "full"
    if_none_match: (
        Annotated[
            str, Meta(max_length=1000, description="The `etag` of an earlier result: answers whether it changed.")
        ]
        | None
    ) = None
    save_to_file: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=1024,
                description="Save the body to this workspace file, as it was sent, or converted when as_markdown or as_text "
                "is true. The result then shows only its beginning.",
            ),
        ]
        | None
    ) = None


class WebFetchResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`url` is what was asked for. `content` is None for binary bodies and for what did not change."""

    url: str
    final_url: str
    status: int
    content_type: str
    trust: str
    title: str | None = None
    content: str | None = None
    truncated: bool = False
    note: str | None = None
    not_modified: bool = False
    size_bytes: int | None = None
    etag: str | None = None
    last_modified: str | None = None
    location: str | None = None
    saved_to: str | None = None
