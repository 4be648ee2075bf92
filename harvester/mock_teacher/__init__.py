"""The mock teacher: a real local HTTP server that answers rule tasks, bills, enforces limits, misbehaves."""
