"""Record intents and outcomes durably in SQLite before anything else relies on them."""
