"""lmms-eval as a client of the server."""
