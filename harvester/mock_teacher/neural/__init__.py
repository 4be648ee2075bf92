"""Answer with a local language model: load it, batch requests, sample. Needs the `train` extra."""
