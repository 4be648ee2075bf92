"""Build the arguments and options that `publish` and `push` of both commands share."""

from __future__ import annotations

import typer

PUBLICATION_URL = typer.Argument(
    ..., metavar="URL", help="s3://, gs://, az://, hf:// or file:/// and a prefix.", show_default=False
)
UPLOAD = typer.Option(False, "--upload", help="Upload. Without it the files are only listed.")
PUBLIC = typer.Option(False, "--public", help="Create a public repository; default: private.")
TOKEN_ENV = typer.Option("HF_TOKEN", help="Name of the environment variable that holds the token.")
