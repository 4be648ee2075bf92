"""Read prompt files and feed them to a run as requests."""
