"""Define the eight tasks that the mock teacher can solve."""
