"""Python code in a sandbox."""
