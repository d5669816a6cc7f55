"""The MCP client: tools of other people's servers, as capabilities of a turn.

A server is a stranger. Whatever it does (down, slow, endless answers, redirects into our network, schemas that lie, texts that
give orders) fails the call that asked it, and nothing else. Its library is slow to import, so that is done inside functions,
and first in a thread.
"""
