"""Measure what a student recovers of the small neural teacher, by method; see `__main__`."""
