"""Wrap the operating system: clock, files, limits, safe text. Nothing here knows a teacher."""
