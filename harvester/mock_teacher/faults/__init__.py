"""Make the mock teacher misbehave: fault scripts and the actions that they name."""
