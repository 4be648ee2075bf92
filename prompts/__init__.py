"""Prompt sets that travel with an installation as the package `harvester_prompts`."""
