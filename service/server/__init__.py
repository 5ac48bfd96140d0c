"""uvicorn, its protocol and the supervisor of worker processes."""
