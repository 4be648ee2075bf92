"""Read what the teacher replied: bodies, streams, choices, log-probabilities and what was used."""
