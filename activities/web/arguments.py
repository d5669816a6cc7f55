"""What `web_fetch` takes and returns."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

MAX_BODY_CHARACTERS: Final = 1024 * 1024


class WebFetchArguments(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: Annotated[str, Meta(min_length=1, max_length=8192, description="An http:// or https:// URL.")]
    method: Annotated[
        Literal["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"], Meta(description="Default GET.")
    ] = "GET"
    headers: (
        Annotated[
            dict[str, str],
            Meta(max_length=50, description="Request headers. They are not sent on to another origin by a redirect."),
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
