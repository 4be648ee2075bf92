"""Commands on stores: seal, verify, purge, rederive, adopt, merge, score, curate, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from harvester import library
from harvester.cli.commands import CORPUS, KEEP, HarvesterApp
from harvester.cli.console import JSON, READ_STORE, STORE, TERMS_BESIDE, emit, message
from harvester.errors import FindingsError, UsageError
from harvester.store import paths
from harvester.system.counted import counted

if TYPE_CHECKING:
    from harvester.store.maintain.verify_report import VerifyReport

# Most keys to be asked again that a repair lists.
KEYS_SHOWN = 20
Shape = Literal["prompt-completion", "messages", "openai", "sharegpt"]
Reasoning = Literal["keep", "inline", "drop"]


def register(app: HarvesterApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(epilog="Example: harvester seal my-run/store", section=KEEP)(seal)
    app.command(epilog="Example: harvester verify my-run/store", section=KEEP)(verify)
    app.command(epilog="Example: harvester purge my-run/store --prompt-id p17", section=KEEP)(purge)
    app.command(epilog="Example: harvester rederive my-run/store", section=KEEP)(rederive)
    app.command(epilog="Example: harvester adopt my-run/store --identity team-llama", section=KEEP)(adopt)
    app.command(epilog="Example: harvester merge my-run/store-*-of-8 my-run/store", section=KEEP)(merge)
    app.command(epilog="Example: harvester score my-run/store --verify my-run/harvest.toml", section=CORPUS)(
        score
    )
    app.command(epilog="Example: harvester curate curate.toml", section=CORPUS)(curate)
    app.command(epilog="Example: harvester export my-run/store out --to messages", section=CORPUS)(export)


def seal(store: Path = STORE, as_json: bool = JSON) -> None:
    """Write all answers that are still in the journal into Parquet shards, now."""
    from harvester.store.maintain.seal_task import seal_now

    sealed = seal_now(store)
    files = [str(store / paths.SHARDS / name) for name in sealed.files]
    emit(
        {"rows": sealed.rows, "files": files},
        [
            f"sealed {counted(sealed.rows, 'answer')} into {counted(len(files), 'shard')} under "
            f"{store / paths.SHARDS}"
        ],
        as_json=as_json,
    )


def verify(
    store: Path = STORE,
    repair: bool = typer.Option(
        False,
        "--repair",
        help="Move damaged and foreign files to quarantine; the next run asks again.",
    ),
    as_json: bool = JSON,
) -> None:
    """Check a store: counts, hashes, attempts without an outcome, damaged or foreign files. Exit 1 if any."""
    from harvester.store.maintain.verify_report import verify_with_bill

    report = verify_with_bill(store, repair=repair)
    emit(report.facts(), verify_lines(store, report), as_json=as_json)
    if left := len(report.messages):
        raise FindingsError(counted(left, "finding"), place=str(store), remedy=report.remedy)


def verify_lines(store: Path, report: VerifyReport) -> list[str]:
    """Return the text of `harvester verify`: repair, sums, a line for each finding and doubtful cost."""
    lines, repaired, bill = [], report.repaired, report.bill
    if repaired is not None:
        lines.append(
            f"repaired: {len(repaired.quarantined)} files in {store / paths.QUARANTINE},"
            f" {repaired.saved:,} of their answers saved, {len(repaired.lost):,} to be asked again"
        )
        lines += [f"  restored byte for byte: {name}" for name in repaired.mended]
        lines += [f"  asked again: {key}" for key in repaired.lost[:KEYS_SHOWN]]
        if len(repaired.lost) > KEYS_SHOWN:
            lines.append(f"  and {len(repaired.lost) - KEYS_SHOWN:,} more; --json lists all")
        lines += [f"  {note}" for note in repaired.notes]
    if report.has_journal:
        lines.append(
            f"{counted(report.answers, 'answer')} stored, {counted(len(report.messages), 'finding')}; "
            f"{bill.billed:,} billed for ${bill.billed_microusd / 1e6:.6f}, "
            f"{counted(len(bill.possibly_billed), 'attempt')} possibly billed"
        )
    else:
        lines.append(
            f"at least {report.answers:,} answers lie in shards that can be read; what else was stored and"
            f" billed is known to the journal only, which can't be read; "
            f"{counted(len(report.messages), 'finding')}"
        )
    lines += [f"  {message}" for message in report.messages]
    for batch in report.waiting.open[:KEYS_SHOWN]:
        name, status = batch["batch_id"] or batch["name"], batch["status"] or batch["state"]
        most = f"${batch['reserved_microusd'] / 1e6:.6f}"
        lines.append(
            f"  batch {name} of {batch['at']}: {batch['rows']:,} rows wait ({status}), may cost up to {most}"
        )
    for attempt in (billed.facts() for billed in bill.possibly_billed[:KEYS_SHOWN]):
        reserved = f"reserved ${attempt['reserved_microusd'] / 1e6:.6f}"
        outcome = attempt["code"] or "no outcome"
        lines.append(f"  possibly billed: {attempt['key']} at {attempt['at']}, {reserved} ({outcome})")
    if len(bill.possibly_billed) > KEYS_SHOWN:
        lines.append(f"  and {len(bill.possibly_billed) - KEYS_SHOWN:,} more; --json lists all")
    return lines


def purge(
    store: Path = STORE,
    key: str | None = typer.Argument(None, metavar="KEY", help="Key of one answer, 64 hex digits."),
    prompt_id: str | None = typer.Option(None, help="Remove every answer to the prompt with this id."),
    where: str | None = typer.Option(
        None,
        help='Remove every answer with these values, as TOML: \'response_model = "a", file = "b.jsonl"\'.',
    ),
    as_json: bool = JSON,
) -> None:
    """Remove answers for good: from the journal, the shards, dead letters and quarantine."""
    from harvester.store.maintain.purge import purge_store
    from harvester.store.where import Where

    condition = None if where is None else Where.parse(where, "--where")
    purged = purge_store(store, key, prompt_id, condition)
    emit({"purged": purged}, [f"purged {counted(purged, 'answer')} from {store}"], as_json=as_json)


def rederive(store: Path = STORE, as_json: bool = JSON) -> None:
    """Derive the columns of stored answers from their raw bodies again. Nothing is asked, nothing is paid."""
    from harvester.store.maintain.rederive import rederive as derive

    result = derive(store)
    lines = [f"derived {result.rows:,} answers again: {result.changed:,} changed, {result.shards} new shards"]
    lines += [f"  {count:,}: {change}" for change, count in sorted(result.outcomes.items())]
    data = {
        "rows": result.rows,
        "changed": result.changed,
        "shards": result.shards,
        "outcomes": dict(result.outcomes),
    }
    emit(data, lines, as_json=as_json)


def adopt(
    store: Path = STORE,
    identity: str = typer.Option(
        ..., help="Name of the teacher, as in [teacher] identity.", show_default=False
    ),
    from_url: str | None = typer.Option(
        None, "--from", metavar="URL", help="Its base_url of before. Default: the only one of the store."
    ),
    as_json: bool = JSON,
) -> None:
    """Let the answers of a teacher count under its identity, wherever it moves. Nothing is asked or paid."""
    from dataclasses import asdict

    from harvester.store.maintain.adopt import adopt as adopt_answers
    from harvester.store.maintain.verify_report import verify_with_bill

    adopted = adopt_answers(store, identity, from_url)
    report = verify_with_bill(store, repair=False)
    lines = [
        f"adopted {adopted.rows:,} answers and {adopted.dead:,} failed rows of {adopted.address} by "
        f"{identity}; {adopted.already:,} answers were adopted before",
        f'next: [teacher] identity = "{identity}" in harvest.toml',
    ]
    if adopted.held:
        lines.append(f"  {adopted.held:,} keep their key: another answer has the new one")
    lines += [
        f"  keeps its key, which is not that of its request: {key}" for key in adopted.unproved[:KEYS_SHOWN]
    ]
    lines += [f"  {message}" for message in report.messages]
    emit({**asdict(adopted), "findings": list(report.messages)}, lines, as_json=as_json)
    if left := len(report.messages):
        raise FindingsError(counted(left, "finding"), place=str(store), remedy=report.remedy)


def merge(
    folders: list[Path] = typer.Argument(
        ..., metavar="STORE... OUT", help="Stores to merge, and the new folder.", show_default=False
    ),
    as_json: bool = JSON,
) -> None:
    """Put the stores of shards together into a new one: each answer once, runs and ledgers kept, verified."""
    from dataclasses import asdict

    from harvester.store.maintain.merge import merge as merge_stores

    *stores, out = folders
    merged = merge_stores(stores, out)
    done = "merged before" if merged.was_there else "merged"
    lines = [
        f"{done}: {merged.answers:,} answers and {merged.failed:,} failed rows of "
        f"{merged.stores} stores in {out}; {merged.repeated:,} were in more than one",
        *merged.notes,
    ]
    emit({**asdict(merged), "out": str(out)}, lines, as_json=as_json)


def score(
    store: Path = READ_STORE,
    verify: Path = typer.Option(
        ..., help="TOML file with [verify]: a harvest.toml, say.", show_default=False
    ),
    k: str = typer.Option("", help="Which pass@k, as 1,4,16. Default: 1, and as many as each prompt has."),
    first: int | None = typer.Option(None, min=1, help="Judge only the first N samples of each prompt."),
    as_json: bool = JSON,
) -> None:
    """Judge stored answers with the verifiers of their tasks; show pass@1 and pass@n by task."""
    from harvester.export.score import score as judge_all
    from harvester.quality.verifiers import pass_rates, settings
    from harvester.quality.verifiers.verifiers import Verifiers

    try:
        ks = sorted({int(number) for number in k.split(",")}) if k else []
    except ValueError:
        ks = [0]
    if ks and ks[0] < 1:
        raise UsageError(f"{k!r} is no list of numbers from 1", place="--k", remedy="--k 1,4,16")
    tasks = judge_all(store, Verifiers(settings.load(verify), verify.parent), first=first)
    data = {task: tally.facts(ks) for task, tally in sorted(tasks.items())}
    emit({"tasks": data}, pass_rates.table_lines(tasks, ks), as_json=as_json)


def curate(
    config: Path = typer.Argument(..., metavar="CONFIG", help="Path of a curate.toml."),
    out: Path | None = typer.Option(None, help="Folder of the curated corpus; default: that in the file."),
    page: Path | None = typer.Option(
        None,
        help="Write an HTML page to this file: kept rows beside dropped ones, and what each filter would "
        "drop by itself, for which every filter looks at every row.",
    ),
    as_json: bool = JSON,
) -> None:
    """Filter answers into a curated corpus; show how many were dropped for which reason."""
    counts = library.curate(config, out=out, page=page)
    lines = [f"kept {counted(counts.kept, 'row')} in {counts.out}"]
    lines += [f"  dropped {count:,}: {reason}" for reason, count in counts.dropped.items()]
    if counts.changed:
        lines.append(f"  masked {counts.changed:,} of the rows that were kept")
    lines += [f"note: {note}" for note in counts.notes]
    if page is not None:
        lines.append(f"page: {page}")
    data = {
        "kept": counts.kept,
        "dropped": dict(counts.dropped),
        "out": str(counts.out),
        "masked": counts.changed,
        "notes": list(counts.notes),
        "warnings": list(counts.warnings),
        "examples": counts.examples,
        "alone": counts.alone,
    }
    emit(data, lines, as_json=as_json)
    for warning in counts.warnings:
        message(f"warning: {warning}")
    if not counts.kept:
        message(
            f"warning: no row was kept of {sum(counts.dropped.values()):,}: {counts.out} holds an empty "
            f"corpus; check the filters in {config}"
        )


def export(
    store: Path = READ_STORE,
    out: Path = typer.Argument(..., metavar="OUT", help="Folder to create.", show_default=False),
    to: Shape = typer.Option("prompt-completion", help="Format to write."),
    reasoning: Reasoning = typer.Option("keep", help="Reasoning: own field, inside the answer, or left out."),
    split: str | None = typer.Option(None, help="Only rows whose metadata `split` has this value."),
    beside: Path | None = TERMS_BESIDE,
    decontaminate: list[Path] = typer.Option(
        [],
        help="Evaluation set (JSON lines, JSON, Parquet, or a folder): rows for training that repeat it, or "
        "a held-out prompt, are left out. May be given several times.",
        exists=True,
    ),
    where: str = typer.Option(
        "", help='Only rows with these values, as TOML: \'model = "a", tags = ["math"]\'.'
    ),
    as_json: bool = JSON,
) -> None:
    """Write a corpus in a format that other trainers read."""
    from harvester.export import export as exporter
    from harvester.quality.similarity.settings import DecontaminateSection
    from harvester.store.where import Where

    section = DecontaminateSection(sets=tuple(map(str, decontaminate))) if decontaminate else None
    choice = exporter.RowChoice(split, section, Where.parse(where, "--where") if where else None)
    result = exporter.export(store, out, shape=to, reasoning=reasoning, choice=choice, beside=beside)
    files = [str(path) for path in result.files]
    lines = [f"wrote {counted(result.rows, 'row')} to {out}"]
    if set(result.splits) != {"train"}:
        lines += [f"  {name}: {count:,} rows" for name, count in sorted(result.splits.items(), reverse=True)]
        lines.append("  rows whose metadata `split` is not train are held out, in files of their own")
    lines += [f"  left out {count:,}: {reason}" for reason, count in result.left_out.items()]
    lines += [f"note: {note}" for note in result.notes]
    data = {
        "rows": result.rows,
        "splits": dict(result.splits),
        "files": files,
        "left_out": dict(result.left_out),
        "notes": list(result.notes),
    }
    emit(data, lines, as_json=as_json)
