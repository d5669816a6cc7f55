"""Model providers over HTTP, in their own wire formats, that answer what a test tells them to."""
