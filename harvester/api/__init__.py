"""Use the OpenAI-compatible HTTP API: build requests, send them, parse what comes back."""
