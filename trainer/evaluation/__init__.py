"""Evaluate a student on held-out prompts, and check the rendered data before training."""
