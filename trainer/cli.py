"""The command line: one typer app, and the one door where errors become lines and exit codes.

Importing this loads neither torch, transformers, pyarrow nor pydantic; commands import their rooms when
they run.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import typer

from trainer import __version__
from trainer.console import (
    excluded_phrase,
    mark_supervised,
    print_message,
    print_result,
    print_scorecard,
    progress_bar,
    visible,
)
from trainer.errors import HarvesterError

EXIT_CODES = """Exit codes: 0 complete, 1 doctor found a fatal fault or the training diverged, 2 usage,
configuration, corpus or student, 5 storage fault, 75 another training holds the output folder,
77 the terms do not permit it, 130/143 interrupted and checkpointed (the same command resumes)."""

app = typer.Typer(
    name="trainer",
    help="Teach a local student what a corpus of teacher answers says, and judge it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
CONFIG = typer.Argument(..., help="train.toml", show_default=False)
AS_JSON = typer.Option(False, "--json", help="Machine lines on stdout, talk on stderr.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trainer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Say the version."
    ),
) -> None:
    """Teach a local student what a corpus of teacher answers says, and judge it."""


@app.command()
def plan(
    config: Path = CONFIG,
    probe: int = typer.Option(20, min=0, help="Real steps to measure time with; 0 loads no weights."),
    as_json: bool = AS_JSON,
) -> None:
    """Rows, tokens, steps and memory, before a weight is moved; time from a short probe.

    Example: trainer plan train.toml
    """
    from trainer import config as settings

    loaded = settings.load(config)
    from trainer.training import plan as room

    told = asdict(room.plan(loaded, probe))
    memory = ", ".join(f"{part} {size / 2**20:.1f}" for part, size in told["memory"].items())
    lines = [
        f"examples {told['examples']:,}, held out {told['held_out']:,}{excluded_phrase(told['excluded'])}",
        f"tokens per epoch {told['tokens_per_epoch']:,}, supervised {told['supervised_per_epoch']:,}",
        f"steps {told['steps']:,} of {told['packs_per_step']} packs, empty seats {told['pack_waste']:.1%}",
        f"parameters: base {told['base_parameters']:,}, adapter {told['adapter_parameters']:,}",
        f"memory in MiB: {memory}{'; activations are computed again' if told['checkpointing'] else ''}",
        f"base SHA-256 {told['base_sha256']}",
    ]
    if told["time_s"] is not None:
        lines.append(f"time {told['time_s']:,.0f} s at {told['tokens_per_s']:,.0f} tokens/s ({probe} steps)")
    print_result(told, lines, as_json=as_json)


@app.command()
def doctor(
    config: Path = CONFIG,
    page: Path | None = typer.Option(None, help="Where the page goes; default: doctor.html in [out] path."),
    as_json: bool = AS_JSON,
) -> None:
    """Show what is supervised, and find label faults before they are learned; write it all on one page.

    Example: trainer doctor train.toml
    """
    from trainer import config as settings

    loaded = settings.load(config)
    from trainer.errors import FindingsError
    from trainer.evaluation import doctor as room

    found = room.diagnose(loaded)
    where = str(room.write_page(found, loaded, page or loaded.out_path / "doctor.html"))
    if not as_json:
        for shown in found.shown:
            pieces = [(token.text, token.supervised) for token in shown.tokens]
            typer.echo(f"{visible(shown.prompt_id)}: {mark_supervised(pieces)}")
    lines = [
        f"examples {found.examples:,}{excluded_phrase(found.excluded)}",
        *(f"note: {line}" for line in found.notices),
        f"page in {where}",
    ]
    print_result({**asdict(found), "page": where}, lines, as_json=as_json)
    if found.findings:
        raise FindingsError(
            "; ".join(found.findings), place=str(config), remedy="repair template, tokenizer or corpus"
        )


@app.command()
def train(
    config: Path = CONFIG,
    processes: int = typer.Option(1, min=1, help="Processes on this machine, one a device (torchrun)."),
    allow_change: bool = typer.Option(False, help="Resume although settings or corpus changed."),
    as_json: bool = AS_JSON,
) -> None:
    """Train the adapter; the same command resumes where it stopped.

    Example: trainer train train.toml
    """
    from trainer import config as settings

    loaded = settings.load(config)
    if processes > 1:
        from trainer.training import launch as fleet

        raise typer.Exit(fleet.launch(config, processes, allow_change=allow_change))
    print_message("reading corpus and student")
    from trainer.data import dataset

    rows = dataset.read(loaded)  # what the corpus lacks is said before torch is loaded
    from trainer.training import train as room

    with progress_bar("train", "steps") as update:
        done = room.train(
            loaded,
            lambda log: update(
                log.step,
                log.steps,
                f"epoch {log.epoch + 1}, loss {log.loss:.3f}, {log.tokens_per_s:,.0f} tokens/s",
            ),
            rows=rows,
            allow_change=allow_change,
        )
    loss = f", loss {done.loss:.3f}" if done.loss is not None else ""
    now = (
        f"{done.steps_now:,} steps now ({done.tokens_per_s:,.0f} tokens/s)"
        if done.steps_now
        else "complete already"
    )
    if os.environ.get("RANK", "0") != "0":
        return  # one process of a fleet talks
    lines = [
        *done.notes,
        f"examples {done.examples:,}{excluded_phrase(done.excluded)}; {done.steps:,} steps, {now}{loss}",
        f"adapter in {done.adapter}",
    ]
    print_result(asdict(done), lines, as_json=as_json)


@app.command()
def evaluate(config: Path = CONFIG, as_json: bool = AS_JSON) -> None:
    """Let base and student answer the held-out prompts; write scorecard.json beside the adapter.

    Example: trainer evaluate train.toml
    """
    from trainer import config as settings

    loaded = settings.load(config)
    print_message("reading corpus and student")
    from trainer.evaluation import evaluate as room

    with progress_bar("score", "prompts") as update:
        offset = {"base": 0, "student": 1}
        card = room.evaluate(
            loaded, lambda who, total, done: update(offset[who] * total + done, 2 * total, who)
        )
    where = str(loaded.out_path / "scorecard.json")
    print_scorecard(card)
    print_result({**card, "scorecard": where}, [f"scorecard in {where}"], as_json=as_json)


@app.command()
def export(
    config: Path = CONFIG,
    out: Path = typer.Argument(..., help="Folder for the merged student.", show_default=False),
    dtype: str = typer.Option("", help="float32, bfloat16 or float16; default: the base's own."),
    as_json: bool = AS_JSON,
) -> None:
    """Merge the adapter into the base in fp32, prove the result equal, print the commands that serve it.

    Example: trainer export train.toml merged/
    """
    from trainer import config as settings

    loaded = settings.load(config)
    from trainer.data import chat_template as render
    from trainer.model import model
    from trainer.publish import export as room
    from trainer.publish import serving

    parity = room.export_merged(loaded, out, dtype)
    renderer = render.Renderer(model.load_tokenizer(loaded.base, loaded.template))
    how = serving.commands(loaded, renderer, out.resolve())
    said = ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" for name, value in parity.items() if isinstance(value, float)
    )
    print_result(
        {**parity, "merged": str(out), "serving": asdict(how)},
        [f"merged student in {out}, {parity['dtype']}: {said}", *serving.describe(how)],
        as_json=as_json,
    )


@app.command()
def trace(
    adapter: Path = typer.Argument(..., help="Folder of an adapter.", show_default=False),
    row: str | None = typer.Argument(None, help="Prompt id, or the start of a key; none: check everything."),
    corpus: Path | None = typer.Option(None, help="The corpus; needed to follow a row."),
    as_json: bool = AS_JSON,
) -> None:
    """Follow a learned row back to its request, teacher and terms, or check the whole hash tree.

    Example: trainer trace data/demo/adapter skills-sum-train-0353 --corpus data/demo/store
    """
    from trainer.errors import ConfigError, FindingsError
    from trainer.provenance import fingerprint as room

    if row is not None:
        if corpus is None:
            raise ConfigError(
                "to follow a row the corpus is needed", place=row, remedy="name it with --corpus"
            )
        told = room.trace(adapter, row, corpus)
        print_result(told, [f"{name:<15} {value}" for name, value in told.items()], as_json=as_json)
        return
    found = room.verify(adapter, corpus)
    tree, leaves = room.read(adapter)
    lines = [f"{len(leaves):,} learned rows, root {tree['root']}", *(f"  {one}" for one in found)]
    print_result({"root": tree["root"], "rows": len(leaves), "findings": found}, lines, as_json=as_json)
    if found:
        raise FindingsError(f"{len(found)} findings", place=str(adapter))


def main() -> None:
    """Run the app; every error of ours ends as one clear message and its documented exit code."""
    # OpenMP reads this when torch loads. Threads that spin while they wait fight any other busy process for
    # the cores: measured 500 tokens/s beside a second two-thread process, 9,000 with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except HarvesterError as error:
        print_message(f"error[{error.code}]: {error.message}")
        if error.place:
            print_message(f"  where   {error.place}")
        if error.remedy:
            print_message(f"  remedy  {error.remedy}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
