"""Define the command line: one typer app; errors become a message on stderr and an exit code.

Importing this module loads neither torch, transformers, pyarrow nor pydantic. A command imports what it
needs when it runs, so `--help` is fast.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import typer

from harvester.system.command_line.extras import PACKAGES, missing_package, require
from harvester.system.command_line.unused_imports import skip_unused_imports
from harvester.system.command_line.verb_command import VerbApp, VerbCommand
from harvester.system.command_line.version import version_option
from trainer.console import (
    excluded_phrase,
    mark_supervised,
    print_message,
    print_result,
    print_scorecard,
    progress_bar,
    progress_lines,
)
from trainer.errors import HarvesterError
from trainer.process import end_on_sigterm, ignore_sigterm

if TYPE_CHECKING:
    from trainer.config import TrainConfig

EXIT_CODES = """Exit codes: 0 complete, 1 the data has a fatal fault or the training diverged, 2 usage,
configuration, corpus or student, 5 storage fault, 75 another training holds the output folder, or a process
or machine of this one was lost, 77 the terms do not permit it, 130/143 interrupted and checkpointed (the
same command resumes). `distil`, `loop`, `onpolicy` and `evaluate` end
with the exit code of a harvest or judge that fails."""


class TrainerCommand(VerbCommand):
    """A command of the trainer."""

    program = "TRAINER"


app = VerbApp(
    TrainerCommand,
    name="trainer",
    help="Fine-tune a local student on a corpus of teacher answers, and evaluate it.",
    epilog=EXIT_CODES,
)
config_app = VerbApp(TrainerCommand, help="Describe train.toml.")
app.add_typer(config_app, name="config")
CONFIG = typer.Argument(..., metavar="CONFIG", help="train.toml", show_default=False)
# The stages of `trainer distil`, in order.
Stage = Literal["harvest", "curate", "plan", "train", "evaluate", "export", "report"]
PROCESSES = typer.Option(1, min=1, help="Processes on this machine, one per device.")
AS_JSON = typer.Option(False, "--json", help="Print the result as one JSON line on stdout.")


@app.callback()
def _root(version: bool = version_option("trainer", typer.echo)) -> None:
    """Fine-tune a local student on a corpus of teacher answers, and evaluate it."""


@app.command()
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
    import shlex

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
        f"next: trainer {command} {shlex.quote(str(folder / file))}",
    ]
    print_result({"folder": str(folder), "files": [str(path) for path in written]}, lines, as_json=as_json)


@config_app.command()
def schema(as_json: bool = AS_JSON) -> None:
    """Print the JSON Schema of train.toml.

    An editor uses it if the first line of train.toml is `#:schema FILE`.

    Example: trainer config schema > train.schema.json
    """
    from trainer import reference

    data = reference.schema()
    print_result(data, json.dumps(data, indent=2, ensure_ascii=False).splitlines(), as_json=as_json)


@app.command()
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


@app.command()
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


@app.command()
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
    rdzv_id: str = typer.Option("", help="Name of the meeting; default: Slurm's job id, or none."),
    rdzv_timeout: float = typer.Option(900.0, min=1, help="Seconds to wait for the other machines."),
    allow_change: bool = typer.Option(False, help="Resume although settings or corpus changed."),
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
    is_leader = os.environ.get("RANK", "0") == "0"
    if is_leader:
        print_message("reading corpus and student")
    from trainer import actions
    from trainer.live.terminal import training_display

    with training_display() if is_leader else nullcontext(lambda _event: None) as show:
        on_rows = progress_lines("tokens", "rows") if is_leader else None
        trained = actions.train(loaded, show, on_rows, allow_change=allow_change, force_faults=force_faults)
    if not is_leader:
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


@app.command()
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
    import re
    import shutil

    from trainer import service_units
    from trainer.config import load
    from trainer.errors import UsageError
    from trainer.files import write_text

    if slurm == k8s:
        raise UsageError("name exactly one scheduler", remedy="give --slurm or --k8s")
    if name is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", name):
        raise UsageError(
            f"{name!r} can't be the name of a job", remedy="use lower case letters, digits and dashes"
        )
    loaded = load(config)
    program = shutil.which("trainer", path=str(Path(sys.executable).parent))
    training = service_units.Training(
        name=name or service_units.name_of(config),
        command=[program] if program else [sys.executable, "-m", "trainer"],
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


@app.command()
def evaluate(
    config: Path = CONFIG,
    harness: list[str] = typer.Option(
        [], help="Task of lm-evaluation-harness to score, too; may be given several times (extra `harness`)."
    ),
    harness_tasks: Path | None = typer.Option(
        None, help="Folder of task files of your own.", exists=True, file_okay=False
    ),
    harness_limit: int | None = typer.Option(None, min=1, help="Examples of each of these tasks."),
    merged: Path | None = typer.Option(
        None, help="Exported student to score on these tasks, too.", exists=True, file_okay=False
    ),
    gguf: Path | None = typer.Option(
        None,
        help="Exported folder whose GGUF files to score, too (extra `gguf`).",
        exists=True,
        file_okay=False,
    ),
    gguf_limit: int | None = typer.Option(None, min=1, help="Held-out prompts for each of these files."),
    judge_only: bool = typer.Option(
        False, "--judge-only", help="Only ask [evaluate] judge about the answers of the last evaluation."
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Let base and student answer the held-out prompts; write scorecard.json beside the adapter.

    Example: trainer evaluate train.toml
    """
    from trainer.config import load

    loaded = load(config)
    if judge_only:
        _judge_answers(loaded, as_json=as_json)
        return
    require("train", "`trainer evaluate`")
    from trainer import actions
    from trainer.evaluation import harness as lm_harness
    from trainer.evaluation import preferences

    tasks = actions.HarnessTasks(tuple(harness), harness_tasks, harness_limit, merged)
    with progress_bar("score", "prompts") as update:
        card = actions.evaluate(loaded, tasks, update, print_message, gguf=gguf, gguf_limit=gguf_limit)
    print_scorecard(card)
    lines: list[str] = []
    lines += preferences.lines(card[preferences.KEY]) if loaded.evaluate.judge else ()
    lines += lm_harness.lines(card[lm_harness.KEY]) if harness else ()
    if gguf is not None:
        from trainer.evaluation import limited_devices

        lines += limited_devices.lines(card[limited_devices.KEY])
    for line in lines:
        print_message(line)
    path = str(loaded.out_path / "scorecard.json")
    answers = str(loaded.out_path / "answers.jsonl")
    print_result(
        {**card, "scorecard": path},
        [
            f"scorecard in {path}",
            f"answers of base, student and teacher in {answers}",
            f"where student and teacher disagree: {loaded.out_path / 'disagreements.html'}",
        ],
        as_json=as_json,
    )
    if loaded.evaluate.judge:
        preferences.require_complete(card)


def _judge_answers(config: TrainConfig, *, as_json: bool) -> None:
    """Let the judge compare the answers of the last evaluation, and print what it says."""
    from trainer.evaluation import preferences

    card = preferences.judge(config)
    for line in preferences.lines(card[preferences.KEY]):
        print_message(line)
    path = str(config.out_path / "scorecard.json")
    print_result({**card, "scorecard": path}, [f"scorecard in {path}"], as_json=as_json)
    preferences.require_complete(card)


@app.command()
def audit(
    config: Path = CONFIG,
    folds: int = typer.Option(2, min=0, help="Parts of the corpus; 0: no training, the student judges."),
    as_json: bool = AS_JSON,
) -> None:
    """Find rows that contradict the others, wrong answers above all; write audit.html beside the adapter.

    For each fold a student is trained on the other folds: two folds cost about one training. The same
    command resumes.

    Example: trainer audit train.toml
    """
    require("train", "`trainer audit`")
    from trainer.config import load

    if folds == 1:
        raise typer.BadParameter("one fold has no other rows to learn from; name 0, 2 or more")
    loaded = load(config)
    print_message("reading corpus")
    from trainer.evaluation.audit import audit as run_audit

    result = run_audit(loaded, folds, print_message)
    lines = [
        f"{result['rows']:,} rows, the most suspicious first: {result['file']}",
        f"page: {result['page']}",
    ]
    print_result(result, lines, as_json=as_json)


@app.command()
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


@app.command()
def publish(
    config: Path = CONFIG,
    url: str = typer.Argument(
        ..., metavar="URL", help="s3://, gs://, az://, hf:// or file:/// and a prefix.", show_default=False
    ),
    merged: Path | None = typer.Option(None, help="Folder of `trainer export` instead of what was trained."),
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


@app.command()
def push(
    config: Path = CONFIG,
    repository: str = typer.Argument(
        ..., metavar="OWNER/NAME", help="Model repository on the Hub.", show_default=False
    ),
    merged: Path | None = typer.Option(None, help="Folder of `trainer export` instead of what was trained."),
    upload: bool = typer.Option(False, "--upload", help="Upload. Without it the files are only listed."),
    public: bool = typer.Option(False, "--public", help="Create a public repository; default: private."),
    token_env: str = typer.Option("HF_TOKEN", help="Name of the environment variable that holds the token."),
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


@app.command()
def distil(
    config: Path = typer.Argument(..., metavar="DISTIL", help="distil.toml", show_default=False),
    until: Stage = typer.Option("report", help="Last stage to run."),
    first: Stage = typer.Option(
        "harvest", "--from", help="First stage to run; what those before it made last is used as it is."
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Go from prompts to a student: harvest, curate, plan, train, evaluate, export, report.

    A stage whose input did not change is not repeated, and an interrupted one goes on: the same command
    resumes. distil.html shows all of it.

    Example: trainer distil my-student/distil.toml
    """
    require("train", "`trainer distil`")
    from trainer.distil.config import load_distil

    files = load_distil(config)
    from trainer.distil import report
    from trainer.distil.inputs import require_own_folder
    from trainer.distil.pipeline import Distillation
    from trainer.process import lock_output_folder

    require_own_folder(files)
    with (
        lock_output_folder(files.folder, "`trainer distil`", "`out` in distil.toml"),
        progress_bar("distil", "steps or prompts") as update,
    ):
        result = Distillation(files, print_message, update).run(first, until)
    lines = [*report.text_lines(result), f"page in {result['page']}"]
    print_result(result, lines, as_json=as_json)


@app.command()
def curve(
    config: Path = typer.Argument(..., metavar="CURVE", help="curve.toml", show_default=False),
    as_json: bool = AS_JSON,
) -> None:
    """Train on nested subsets of the corpus and predict what the next dollar brings; write curve.html.

    Stages that are done are not repeated: the same command resumes.

    Example: trainer curve curve.toml
    """
    require("train", "`trainer curve`")
    from trainer.experiments.curve_config import load_curve

    settings, loaded, folder = load_curve(config)
    from trainer.experiments.subsets import plan_curve

    planned = plan_curve(settings, loaded, folder)  # a fault in the corpus is reported before torch is loaded
    from trainer.experiments import curve_report
    from trainer.experiments.curve import measure_curve
    from trainer.process import lock_output_folder

    with (
        lock_output_folder(folder, "`trainer curve`", "`out` in curve.toml"),
        progress_bar("curve", "steps or prompts") as update,
    ):
        result = measure_curve(planned, print_message, update)
        files = curve_report.write(result, folder, loaded.name)
    lines = [*curve_report.text_lines(result), f"page in {files[0]}, figures in {files[1]}"]
    print_result({**result, "page": files[0], "file": files[1]}, lines, as_json=as_json)


@app.command()
def loop(
    config: Path = typer.Argument(..., metavar="LOOP", help="loop.toml", show_default=False),
    as_json: bool = AS_JSON,
) -> None:
    """Harvest what the student fails, round by round, train on all so far and score; write loop.html.

    Runs `harvester run` under the budget of loop.toml. What is done is not repeated: the command resumes.

    Example: trainer loop loop.toml
    """
    require("train", "`trainer loop`")
    from trainer.experiments.loop_config import load_loop

    files = load_loop(config)
    from trainer.experiments import loop_report
    from trainer.experiments.loop import Loop
    from trainer.process import lock_output_folder

    with (
        lock_output_folder(files.folder, "`trainer loop`", "`out` in loop.toml"),
        progress_bar("loop", "steps or prompts") as update,
    ):
        result = Loop(files, print_message, update).run()
        written = loop_report.write(result, files.folder, files.train.name)
    lines = [*loop_report.text_lines(result), f"page in {written[0]}, figures in {written[1]}"]
    print_result({**result, "page": written[0], "file": written[1]}, lines, as_json=as_json)


@app.command()
def onpolicy(
    config: Path = typer.Argument(..., metavar="ONPOLICY", help="onpolicy.toml", show_default=False),
    as_json: bool = AS_JSON,
) -> None:
    """Let the student answer, let the teacher score its tokens, and learn from that; write onpolicy.html.

    Runs `harvester run` with [score] under the budget of onpolicy.toml. What is done is not repeated.

    Example: trainer onpolicy onpolicy.toml
    """
    require("train", "`trainer onpolicy`")
    from trainer.onpolicy.config import load_onpolicy

    files = load_onpolicy(config)
    from trainer.onpolicy import report
    from trainer.onpolicy.rounds import OnPolicy
    from trainer.process import lock_output_folder

    with (
        lock_output_folder(files.folder, "`trainer onpolicy`", "`out` in onpolicy.toml"),
        progress_bar("onpolicy", "rounds or answers") as update,
    ):
        result = OnPolicy(files, print_message, update).run()
        written = report.write(result, files.folder, files.train.name)
    lines = [*report.text_lines(result), f"page in {written[0]}, figures in {written[1]}"]
    print_result({**result, "page": written[0], "file": written[1]}, lines, as_json=as_json)


@app.command()
def trace(
    adapter: Path = typer.Argument(..., metavar="ADAPTER", help="Folder of an adapter.", show_default=False),
    row: str | None = typer.Argument(
        None, metavar="ROW", help="Prompt id, or the start of a key; none: check everything."
    ),
    corpus: str | None = typer.Option(
        None, metavar="PATH", help="Folder or URL of the corpus; needed to trace a row."
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Trace a learned row back to its request, teacher and terms, or verify the whole hash tree.

    Example: trainer trace data/demo/adapter skills-sum-train-0353 --corpus data/demo/store
    """
    from trainer.errors import ConfigError, FindingsError
    from trainer.provenance import fingerprint

    learned = None
    if corpus is not None:
        from harvester.store.published import local_store

        learned = local_store(corpus)
    if row is not None:
        if learned is None:
            raise ConfigError("tracing a row needs the corpus", place=row, remedy="name it with --corpus")
        origin = fingerprint.trace(adapter, row, learned)
        print_result(origin, [f"{name:<15} {value}" for name, value in origin.items()], as_json=as_json)
        return
    findings = fingerprint.verify(adapter, learned)
    tree, leaves = fingerprint.read(adapter)
    lines = [
        f"{len(leaves):,} learned rows, root {tree['root']}",
        *(f"  {finding}" for finding in findings),
    ]
    print_result({"root": tree["root"], "rows": len(leaves), "findings": findings}, lines, as_json=as_json)
    if findings:
        raise FindingsError(
            f"{len(findings)} findings", place=str(adapter), remedy=fingerprint.CHANGED_REMEDY
        )


def main() -> None:
    """Run the app. Every HarvesterError ends as one message on stderr and its documented exit code."""
    # OpenMP reads this when torch loads. Threads that spin while they wait compete with other processes for
    # the cores: 500 tokens/s beside a second two-thread process, against 9,000 with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # CUDA's allocator can then grow a block: packs differ in size, and fixed blocks fragment.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if sys.argv[1:2] in (["train"], ["plan"], ["doctor"]):  # lm-evaluation-harness needs pandas
        skip_unused_imports()
    # PEFT imports bitsandbytes where it is installed, which on a CPU with bf16 arithmetic fetches a kernel
    # from a hub by this package, or warns that it can't. Nothing is downloaded here.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    end_on_sigterm()
    try:
        app(prog_name="trainer")
    except HarvesterError as error:
        _end_with(error)
    except ModuleNotFoundError as error:  # in a command that looks for none of them first
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES["train"]:
            raise
        _end_with(missing_package("train", "this command", package))
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with(error: HarvesterError) -> NoReturn:
    """Print an error and end with its exit code."""
    ignore_sigterm()
    print_message(f"error[{error.code}]: {error.message}")
    if error.place:
        print_message(f"  where   {error.place}")
    if error.remedy:
        print_message(f"  remedy  {error.remedy}")
    sys.exit(error.exit_code)
