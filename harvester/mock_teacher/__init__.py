"""Serve a local teacher: an OpenAI-compatible HTTP server with rules, limits, faults and a ledger.

For demos, tests and benchmarks. `listening.serve` blocks, `running.start_in_thread` and
`running.start_process` do not; `python -m harvester.mock_teacher --help` lists what it can be told.
"""
