"""Define the command line: one typer app; errors become a message on stderr and an exit code.

Importing these modules loads neither torch, transformers, pyarrow nor pydantic. A command imports what it
needs when it runs, so `--help` is fast.
"""
