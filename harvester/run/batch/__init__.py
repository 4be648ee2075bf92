"""Send the requests of a run in batches, and keep what comes back."""
