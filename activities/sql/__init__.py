"""SQL over a session's SQLite databases."""
