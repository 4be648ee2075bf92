"""Commands that hand a student on: `export`, `publish`, `push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from harvester.system.command_line.extras import require
from harvester.system.command_line.upload_options import PUBLIC, PUBLICATION_URL, TOKEN_ENV, UPLOAD
from harvester.system.command_line.verb_command import VerbApp
from trainer.cli.options import AS_JSON, CONFIG, PUBLISH
from trainer.console import (
    print_message,
    print_result,
)

MERGED = typer.Option(None, help="Folder of `trainer export` instead of what was trained.")


def register(app: VerbApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(section=PUBLISH)(export)
    app.command(section=PUBLISH)(publish)
    app.command(section=PUBLISH)(push)


def export(
    config: Path = CONFIG,
    out: Path = typer.Argument(..., metavar="OUT", help="Folder for the merged student.", show_default=False),
    dtype: str = typer.Option("", help="float32, bfloat16 or float16; default: the base's own."),
    gguf: list[str] = typer.Option(
        [],
        help="f16, q8_0 or q4_k_m: write a GGUF file, too; may be given several times (extra `gguf`).",
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Merge the adapter into the base in fp32, check that outputs agree, print commands that serve it.

    Example: trainer export train.toml merged/ --gguf q8_0
    """
    require("train", "`trainer export`")
    from trainer.config import load

    loaded = load(config)
    from trainer import actions
    from trainer.publish import gguf_files, server_checks, serving

    exported = actions.export(loaded, out, dtype, gguf)
    parity, facts, forgotten = exported.parity, exported.facts, exported.forgetting
    kept = [f"forgetting: {forgotten['increase']['value']:+.1%} bits on general answers"] if forgotten else []
    figures = ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" for name, value in parity.items() if isinstance(value, float)
    )
    print_result(
        exported.as_dict(),
        [
            *kept,
            f"merged student in {out}, {parity['dtype']}: {figures}",
            *gguf_files.describe(facts["gguf"]),
            *facts["notes"],
            *serving.describe(exported.serving),
            *server_checks.table(facts["checks"]),
        ],
        as_json=as_json,
    )


def publish(
    config: Path = CONFIG,
    url: str = PUBLICATION_URL,
    merged: Path | None = MERGED,
    repair: bool = typer.Option(
        False, "--repair", help="Upload files again that are missing or changed there."
    ),
    prune: bool = typer.Option(False, "--prune", help="Delete objects there of earlier versions."),
    as_json: bool = AS_JSON,
) -> None:
    """Publish the student, its scorecard and pages to object storage; `harvester fetch` downloads them.

    Example: trainer publish train.toml s3://bucket/students/first
    """
    from harvester.system.objects.publisher import PublishOptions
    from trainer.config import load
    from trainer.publish.upload import publish_student

    options = PublishOptions(repair=repair, prune=prune)
    published = publish_student(load(config), url, merged, options, print_message)
    lines = [
        f"published {published.objects:,} files, {published.size_bytes:,} bytes, at {published.url}; "
        f"{published.uploaded:,} of them now, each read back and compared by SHA-256"
    ]
    print_result(asdict(published), lines, as_json=as_json)


def push(
    config: Path = CONFIG,
    repository: str = typer.Argument(
        ..., metavar="OWNER/NAME", help="Model repository on the Hub.", show_default=False
    ),
    merged: Path | None = MERGED,
    upload: bool = UPLOAD,
    public: bool = PUBLIC,
    token_env: str = TOKEN_ENV,
    as_json: bool = AS_JSON,
) -> None:
    """Upload the student to the Hugging Face Hub after a check of the terms; without --upload list files.

    Example: trainer push train.toml my-name/my-student --upload
    """
    from harvester.system.objects.hub import HubTarget
    from trainer.config import load
    from trainer.publish.upload import push_student

    target = HubTarget(repository, "model", private=not public, token_env=token_env)
    pushed = push_student(load(config), target, merged, upload=upload)
    print_result(pushed.facts(), pushed.lines(), as_json=as_json)
