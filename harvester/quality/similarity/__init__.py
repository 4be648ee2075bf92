"""Compare texts: duplicates, near duplicates, and overlap with evaluation sets."""
