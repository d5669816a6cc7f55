"""Checks of what a model writes, what it calls and what tools return; all of them in this process, and in linear time."""
