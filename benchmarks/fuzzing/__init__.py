"""Mutated answers, streams, headers and prompt lines, and an oracle that shares no code with the parsers."""
