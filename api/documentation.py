"""The OpenAPI description at `/api-doc/openapi.json` and a page to read and try it at `/api-doc`, without any network.

Swagger UI is vendored in `static/` (swagger-ui-dist 5.35.0, Apache License 2.0, its LICENSE and NOTICE beside it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from litestar import Request, Router
from litestar.datastructures import CacheControlHeader
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from litestar.static_files import create_static_files_router

DOCUMENTATION_PATH: Final = "/api-doc"
STATIC_FILES: Final = Path(__file__).parent / "static"
STATIC_MAX_AGE_SECONDS: Final = 24 * 3600
"""Files change with releases only, under the same names: a day bounds how long an old page may live."""

PAGE: Final = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Everruns API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{DOCUMENTATION_PATH}/static/swagger-ui.css">
</head>
<body>
<div id="documentation"></div>
<script src="{DOCUMENTATION_PATH}/static/swagger-ui-bundle.js"></script>
<script>
SwaggerUIBundle({{
  url: "{DOCUMENTATION_PATH}/openapi.json",
  dom_id: "#documentation",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
}});
</script>
</body>
</html>
"""


class DocumentationPage(OpenAPIRenderPlugin):
    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return PAGE.encode()


def openapi_config(version: str) -> OpenAPIConfig:
    return OpenAPIConfig(
        title="Everruns API",
        version=version,
        description="A headless, durable harness engine for AI agents. Errors are RFC 9457 problem details.",
        path=DOCUMENTATION_PATH,
        use_handler_docstrings=True,
        render_plugins=[JsonRenderPlugin(), DocumentationPage()],
    )


def static_files() -> Router:
    return create_static_files_router(
        f"{DOCUMENTATION_PATH}/static",
        [STATIC_FILES],
        include_in_schema=False,
        cache_control=CacheControlHeader(max_age=STATIC_MAX_AGE_SECONDS, public=True),
    )
