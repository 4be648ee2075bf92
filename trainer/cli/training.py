"""Commands that look at a training, do it, and schedule it: `init`, `plan`, `doctor`, `train`, `schedule`."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import typer

from harvester.system.command_line.extras import require
from harvester.system.command_line.verb_command import VerbApp
from trainer.cli.options import AS_JSON, CONFIG, PROCESSES, TRAIN
from trainer.console import (
    excluded_phrase,
    mark_supervised,
    print_message,
    print_result,
    progress_lines,
)
from trainer.process import is_leader


def register(app: VerbApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(section=TRAIN)(init)
    app.command(section=TRAIN)(plan)
    app.command(section=TRAIN)(doctor)
    app.command(section=TRAIN)(train)
    app.command(section=TRAIN)(schedule)


def init(
    folder: Path = typer.Argument(..., metavar="FOLDER", help="Folder to create.", show_default=False),
    base: Path | None = typer.Option(None, help="Folder of the student; default: base in FOLDER."),
    corpus: str | None = typer.Option(
        None, metavar="PATH", help="Folder or URL of the corpus; default: store in FOLDER."
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Write a folder that `trainer distil` runs at once, offline; with --corpus a train.toml alone.

    Example: trainer init my-student
    """
    from harvester.system.command_line.shell_words import shell_word
    from harvester.system.objects.url import url_in
    from trainer.starter import write_starter

    written = write_starter(folder, base, corpus)
    here = None if corpus is None or url_in(corpus) else Path(corpus)
    for option, path_given, holds in (("--base", base, "the student"), ("--corpus", here, "the corpus")):
        if path_given is not None and not path_given.exists():
            print_message(f"note: {option} {path_given} does not exist yet; put {holds} there before `plan`")
    command, file = ("distil", "distil.toml") if corpus is None else ("plan", "train.toml")
    shown = [str(path.relative_to(folder)) for path in written if path.parent.name != "base"]
    lines = [
        f"created {folder}: {', '.join(shown)}",
        f"next: trainer {command} {shell_word(folder / file)}",
    ]
    print_result({"folder": str(folder), "files": [str(path) for path in written]}, lines, as_json=as_json)


def plan(
    config: Path = CONFIG,
    probe: int = typer.Option(20, min=0, help="Real steps to measure time with; 0 loads no weights."),
    processes: int = PROCESSES,
    as_json: bool = AS_JSON,
) -> None:
    """Estimate rows, tokens, steps, memory and time; time comes from a few real steps.

    Writes nothing but the token store of a large corpus.

    Example: trainer plan train.toml
    """
    require("train", "`trainer plan`")
    from trainer.config import load

    loaded = load(config)
    from trainer.training.plan import plan as make_plan

    estimate = make_plan(loaded, probe, progress_lines("tokens", "rows"), processes=processes)
    memory = ", ".join(f"{part} {size / 2**20:.1f}" for part, size in estimate.memory.items())
    recomputed = "; activations are recomputed" if estimate.checkpointing else ""
    of_each = f" of each of {estimate.processes} processes" if estimate.processes > 1 else ""
    split = "; the base is split over them" if estimate.sharded else ""
    lines = [
        f"examples {estimate.examples:,}, held out {estimate.held_out:,}{excluded_phrase(estimate.excluded)}",
        f"tokens per epoch {estimate.tokens_per_epoch:,}, supervised {estimate.supervised_per_epoch:,}",
        f"steps {estimate.steps:,} of {estimate.packs_per_step} packs, unused {estimate.pack_waste:.1%}",
        f"parameters: base {estimate.base_parameters:,}, adapter {estimate.adapter_parameters:,}",
        f"memory in MiB{of_each}: {memory}{recomputed}{split}",
        *(f"note: {note}" for note in estimate.notes),
        *([f"hint: {estimate.hint}"] if estimate.hint else []),
        *(f"fatal fault, `trainer train` will refuse: {fault}" for fault in estimate.faults),
        f"base SHA-256 {estimate.base_sha256}",
    ]
    if estimate.time_s is not None:
        speed = f"{estimate.tokens_per_s:,.0f} tokens/s"
        lines.append(f"time {estimate.time_s:,.0f} s at {speed} ({probe} steps)")
    print_result(asdict(estimate), lines, as_json=as_json)


def doctor(
    config: Path = CONFIG,
    page: Path | None = typer.Option(None, help="File of the page; default: doctor.html in [out] path."),
    as_json: bool = AS_JSON,
) -> None:
    """Show which tokens are supervised and find faults in the labels, before training; write an HTML page.

    Example: trainer doctor train.toml
    """
    require("train", "`trainer doctor`")
    from trainer.config import load

    loaded = load(config)
    from harvester.system.safe_text import visible
    from trainer.errors import FindingsError
    from trainer.evaluation.doctor import diagnose, write_page

    diagnosis = diagnose(loaded, progress_lines("tokens", "rows"))
    path = str(write_page(diagnosis, loaded, page or loaded.out_path / "doctor.html"))
    if not as_json:
        for shown in diagnosis.shown:
            tokens = [(token.text, token.supervised) for token in shown.tokens]
            typer.echo(f"{visible(shown.prompt_id)}: {mark_supervised(tokens)}")
    lines = [
        f"examples {diagnosis.examples:,}{excluded_phrase(diagnosis.excluded)}",
        *(f"note: {notice}" for notice in diagnosis.notices),
        f"page in {path}",
    ]
    print_result({**asdict(diagnosis), "page": path}, lines, as_json=as_json)
    if diagnosis.findings:
        raise FindingsError(
            "; ".join(diagnosis.findings), place=str(config), remedy="repair template, tokenizer or corpus"
        )


def train(
    config: Path = CONFIG,
    processes: int | None = typer.Option(
        None, min=1, help="Processes on this machine, one per device; default: 1.", show_default=False
    ),
    nnodes: int | None = typer.Option(
        None, min=1, help="Machines; run the command on each of them. Default: 1, or what PET_NNODES says."
    ),
    node_rank: int | None = typer.Option(
        None, min=0, help="Number of this machine; default: by Kubeflow, Slurm, or order of arrival."
    ),
    rdzv_backend: str = typer.Option(
        "", help="Rendezvous of torchrun: static or c10d; default: static where the number is known."
    ),
    rdzv_endpoint: str = typer.Option("", metavar="HOST:PORT", help="Where the machines meet."),
    rdzv_id: str = typer.Option(
        "", help="Rendezvous id, the same on all machines; default: Slurm's job id, or none."
    ),
    rdzv_timeout: float = typer.Option(900.0, min=1, help="Seconds to wait for the other machines."),
    allow_change: bool = typer.Option(
        False,
        help="Resume although settings or corpus changed (the result is then not that of one training).",
    ),
    force_faults: bool = typer.Option(False, help="Train although the data has fatal faults; see doctor."),
    as_json: bool = AS_JSON,
) -> None:
    """Train the adapter. The same command resumes an interrupted training.

    Example: trainer train train.toml
    """
    require("train", "`trainer train`")
    from trainer.config import load

    loaded = load(config)
    from trainer.training import rendezvous

    options = rendezvous.Options(nnodes, node_rank, rdzv_backend, rdzv_endpoint, rdzv_id, rdzv_timeout)
    nodes = rendezvous.chosen(options, os.environ)
    count = processes or rendezvous.processes_of(os.environ)
    if count > 1 or nodes is not None:
        from trainer.training.launch import launch

        flags = {"--allow-change": allow_change, "--force-faults": force_faults, "--json": as_json}
        wanted = [name for name, is_set in flags.items() if is_set]
        raise typer.Exit(launch(config, count, print_message, flags=wanted, rendezvous=nodes))
    speaks = is_leader()
    if speaks:
        print_message("reading corpus and student")
    from trainer import actions
    from trainer.live.terminal import training_display

    with training_display() if speaks else nullcontext(lambda _event: None) as show:
        on_rows = progress_lines("tokens", "rows") if speaks else None
        trained = actions.train(loaded, show, on_rows, allow_change=allow_change, force_faults=force_faults)
    if not speaks:
        return  # only the first process of a fleet prints
    loss = f", loss {trained.loss:.3f}" if trained.loss is not None else ""
    made = (
        f"{trained.steps_now:,} steps now ({trained.tokens_per_s:,.0f} tokens/s)"
        if trained.steps_now
        else "complete already"
    )
    lines = [
        *trained.notes,
        f"examples {trained.examples:,}{excluded_phrase(trained.excluded)}; "
        f"{trained.steps:,} steps, {made}{loss}",
        f"adapter in {trained.adapter}",
    ]
    print_result(asdict(trained), lines, as_json=as_json)


def schedule(
    config: Path = CONFIG,
    slurm: bool = typer.Option(False, "--slurm", help="Print a script for sbatch."),
    k8s: bool = typer.Option(False, "--k8s", help="Print a PyTorchJob of Kubeflow."),
    nodes: int = typer.Option(1, min=1, help="Machines."),
    processes: int = typer.Option(1, min=1, help="Processes on each machine, one per device."),
    name: str | None = typer.Option(None, help="Name of the job; default: from the folder's name."),
    image: str = typer.Option("trainer", help="Container image, for --k8s; Containerfile.train builds it."),
    out: Path | None = typer.Option(None, help="Folder to write the file into, instead of printing it."),
    as_json: bool = AS_JSON,
) -> None:
    """Print the file that lets Slurm or Kubernetes train on several machines, and resume by itself.

    Example: trainer schedule --slurm --nodes 2 --processes 8 train.toml
    """
    from harvester.system import unit_text
    from trainer import service_units
    from trainer.config import load
    from trainer.errors import UsageError
    from trainer.files import write_text

    loaded = load(config)
    if slurm == k8s:
        raise UsageError("name exactly one scheduler", remedy="give --slurm or --k8s")
    if name is not None:
        unit_text.require_name(name, "job")
    training = service_units.Training(
        name=name or unit_text.name_of(config, "train"),
        command=unit_text.command_of("trainer"),
        file=config.resolve(),
        config=loaded,
        nodes=nodes,
        processes=processes,
        image=image,
    )
    files = service_units.slurm(training) if slurm else service_units.kubernetes(training)
    lines: list[str] = []
    for path, text in files.items():
        if out is not None:
            write_text(out / path, text)
            lines.append(f"written {out / path}")
        else:
            lines += text.rstrip().splitlines()
    print_result({"files": files}, lines, as_json=as_json)
