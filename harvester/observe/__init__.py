"""Measure a run: counters, status, time series, process statistics, canary answers."""
