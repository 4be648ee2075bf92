"""Check answers: verifiers by task, their verdicts, and pass rates."""
