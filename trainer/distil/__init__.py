"""Go from prompts to a student by one command (`trainer distil`): all stages in order, each done once."""
