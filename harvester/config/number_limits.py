"""Define upper limits for numbers that an operator sets: beyond them something else would break first."""

from __future__ import annotations

# Largest integer that every JSON reader keeps exactly (RFC 8785).
MAX_EXACT_INT = 2**53 - 1
YEAR_S = 366 * 86400.0
MAX_USD = 1e9
MAX_USD_PER_MILLION = 1e6
MAX_SAMPLES = 1_000_000
# Most answers to one request: what OpenAI's API allows.
MAX_CHOICES = 128
# Connections that one address can have to one port of another.
MAX_CONNECTIONS = 65_535
MAX_MIB = 2.0**30
MAX_PER_MINUTE = 1e12
# Largest weight of one address among several.
MAX_WEIGHT = 1000.0
