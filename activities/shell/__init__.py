"""Scripts in a sandboxed shell over the session's workspace."""
