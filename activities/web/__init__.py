"""Requests to the internet on behalf of a model: where they may go, how they are made, what of the answer is shown."""
