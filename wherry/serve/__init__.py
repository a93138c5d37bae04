"""One door before every runtime: an OpenAI-compatible HTTP server, its chat page, and chat in a terminal."""
