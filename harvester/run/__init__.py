"""Run one harvest: prepare, pass over the prompts, background tasks, ending."""
