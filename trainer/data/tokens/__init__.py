"""Keep a corpus as token ids on disk: rendered once, in parallel, and read by every command."""
