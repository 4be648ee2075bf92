"""Ask a server for the log-probabilities of a given text: request bodies, replies, probes. Pure."""
