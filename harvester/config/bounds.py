"""How large a number may be where an operator gives one: beyond it something else would break first."""

from __future__ import annotations

EXACT = 2**53 - 1
"""The largest integer that every reader of JSON keeps as it is (RFC 8785)."""
YEAR_S = 366 * 86400.0
MOST_USD = 1e9
MOST_USD_PER_MILLION = 1e6
MOST_SAMPLES = 1_000_000
MOST_AT_ONCE = 65_535
"""Connections that one address can have to one port of another."""
MOST_MIB = 2.0**30
MOST_A_MINUTE = 1e12
