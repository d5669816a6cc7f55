"""An MCP server as a program: `python tests/fakes/mcp_stdio.py`."""

from __future__ import annotations

import os

from mcp.server import MCPServer

server = MCPServer("program", log_level="CRITICAL")


@server.tool()
def variable(name: str) -> str:
    """What an environment variable holds."""
    return os.environ.get(name, "nothing")


if __name__ == "__main__":
    server.run("stdio")
