"""Filter a corpus into a curated corpus, and count the reasons for dropped samples.

A curated corpus is a folder of shards in the same format, one or more for each lineage. Whatever reads a
corpus reads it too, and every row still names its teacher and terms.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError
from harvester.export import stratified
from harvester.export.cards.curation import CURATION_NAME
from harvester.export.curated_files import CuratedFiles
from harvester.export.decontaminate import HITS_NAME, RowLeaks
from harvester.export.drops import Drop, Filter, Survey, chain
from harvester.export.filters import FilterContext, chosen_by, named
from harvester.export.masking import PRIVATE, mask
from harvester.export.stratified import SampleSection
from harvester.export.verdicts import judge_filter
from harvester.quality.similarity import settings as similarity_settings
from harvester.quality.similarity.settings import DecontaminateSection
from harvester.quality.verifiers import settings as verify_settings
from harvester.quality.verifiers.verifiers import Verifiers
from harvester.store import paths, terms_check
from harvester.store.mixing import Mixing
from harvester.store.published import local_store
from harvester.store.reader import Corpus, holds_answers
from harvester.store.shards.parquet_file import translate_disk_errors
from harvester.store.shards.schema import Sample
from harvester.store.shards.swap import if_no_reader
from harvester.store.where import Where
from harvester.system import output_path
from harvester.system.failpoints import reach
from harvester.system.files import fsync
from harvester.system.objects.url import url_in
from harvester.system.toml_file import file_of_keys, read_toml

_SUMMARY = CURATION_NAME
DEFAULT_FILTERS = ("finished", "not_blank")
# Dropped and kept rows that are shown for each reason.
EXAMPLES = 8
SHOWN_CHARACTERS = 1000
# Remedy of errors in a curate.toml that have none of their own.
_KEYS = "the section curate.toml of harvester/CONFIG.md lists all keys"
EXAMPLES_NOTE = (
    "Private data is hidden in the examples; in the rows themselves only the filters pii and secrets "
    "change it."
)
_HIDDEN = ".curating-"
# Inside the hidden folder: rows that passed the filters, before a sample of them is drawn.
_STAGED = "staged"


@dataclass(frozen=True, slots=True)
class CurateCounts:
    """What a curation did.

    Attributes:
        kept: rows that were kept; `changed` of them by masking.
        dropped: rows by reason.
        notes: settings in which kept rows differ.
        warnings: settings of the curation that do not fit its rows.
        examples: by reason, and under "kept", some rows: prompt_id, prompt, answer, detail.
        out: folder of the curated corpus.
        alone: by filter, rows that it would drop by itself, rows that no other filter drops, and rows that it
            would mask; empty unless they were counted.
    """

    kept: int
    dropped: Mapping[str, int]
    notes: tuple[str, ...] = ()
    changed: int = 0
    examples: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)
    alone: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    out: Path = Path()


@dataclass(frozen=True, slots=True)
class CurateConfig:
    """A curate.toml: `corpus` and `out` are paths beside the file, `filters` a list of names or tables.

    Evaluation sets of `decontaminate` are relative to `root`, the folder of the file. `names` are those of
    the filters, `runs` what the filters `run` name.
    """

    corpus: Path
    out: Path
    filters: tuple[Filter, ...]
    root: Path = Path()
    decontaminate: DecontaminateSection | None = None
    where: Where | None = None
    judges: tuple[Mapping[str, Any], ...] = ()
    sample: SampleSection | None = None
    names: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()


def load(path: Path) -> CurateConfig:
    """Read curate.toml.

    Raises:
        ConfigError: missing or broken file, unknown key or filter, or no corpus where `corpus` says. Its
            place is file and line.
    """
    try:
        return _load(path)
    except ConfigError as error:
        if error.remedy or not error.place.startswith(str(path)):
            raise
        raise ConfigError(error.message, place=error.place, remedy=_KEYS) from None


def _load(path: Path) -> CurateConfig:
    file = read_toml(path, "a curate.toml needs corpus, out and filters")
    data = file.table
    unknown = set(data) - {"corpus", "out", "filters", "verify", "decontaminate", "where", "sample"}
    if unknown or not {"corpus", "out"} <= set(data):
        raise ConfigError(
            f"unknown keys {sorted(unknown)}" if unknown else "'corpus' and 'out' are needed",
            place=file.place_of(sorted(unknown)[:1]),
            remedy=("corpus" not in data and file_of_keys(unknown))
            or 'corpus = "store", out = "curated", filters = ["finished", "not_blank"]',
        )
    for name in ("corpus", "out"):
        if not isinstance(data[name], str) or not data[name] or "\0" in data[name]:
            place = file.place_of((name,))
            raise ConfigError(
                f"{name!r} is the path of a folder, as text",
                place=place,
                remedy='corpus = "store", out = "curated"',
            )
        if data[name] == "~" or data[name].startswith("~/"):
            raise ConfigError(
                f"{name!r}: ~ is not replaced here",
                place=file.place_of((name,)),
                remedy=f"write the whole path, or './{data[name]}' for that name",
            )
    entries = data.get("filters", list(DEFAULT_FILTERS))
    if not isinstance(entries, list):
        raise ConfigError(
            "'filters' is a list",
            place=file.place_of(("filters",)),
            remedy='filters = ["finished", {longest = 4000}]',
        )
    verifiers = Verifiers(verify_settings.load(path) if "verify" in data else {}, path.parent)
    verifiers.require_functions()
    judges: list[Mapping[str, Any]] = []
    context = FilterContext(verifiers, path.parent)
    filters = [
        _filter_of(entry, file.place_of(("filters", at)), context, judges) for at, entry in enumerate(entries)
    ]
    names = tuple(entry if isinstance(entry, str) else next(iter(entry)) for entry in entries)
    named_runs = [entry["run"] for entry in entries if isinstance(entry, dict) and "run" in entry]
    runs = [run for value in named_runs for run in ([value] if isinstance(value, str) else value)]
    corpus, out = local_store(data["corpus"]), path.parent / data["out"]
    if not url_in(data["corpus"]):
        corpus = path.parent / corpus
    if not holds_answers(corpus):
        raise ConfigError(
            f"no answers are stored in {corpus}",
            place=file.place_of(("corpus",)),
            remedy="name a folder that holds journal.db or shards/, relative to this file",
        )
    section = None
    if "decontaminate" in data:
        section = similarity_settings.parse(data["decontaminate"], file.place_of)
    where = None
    if "where" in data:
        where = Where.parse(data["where"], file.place_of(("where",))).bind(corpus)
    sample = stratified.parse(data["sample"], file.place_of) if "sample" in data else None
    return CurateConfig(
        corpus, out, tuple(filters), path.parent, section, where, tuple(judges), sample, names, tuple(runs)
    )


def _filter_of(entry: Any, place: str, context: FilterContext, judges: list[Mapping[str, Any]]) -> Filter:
    """The filter of one entry of `filters`; `place` is its file and line, for errors.

    What is to be said of a judge is added to `judges`.
    """
    if isinstance(entry, str):
        name, value = entry, None
    elif isinstance(entry, dict) and len(entry) == 1:
        ((name, value),) = entry.items()
    else:
        raise ConfigError(
            "a filter is a name, or one name = value",
            place=place,
            remedy='filters = ["finished", {longest = 4000}]',
        )
    try:
        if name == "judge":
            judge = judge_filter(value, context.folder)
            judges.append(judge.facts)
            return judge.check
        return named(name, value, context)
    except ConfigError as error:
        raise ConfigError(error.message, place=error.place or place, remedy=error.remedy) from None


def curate(config: CurateConfig, alone: Sequence[Filter] = ()) -> CurateCounts:
    """Filter a corpus into a new folder of shards, which is renamed into place once it is complete.

    Args:
        alone: the filters of the configuration once more, unused: count what each would drop by itself.

    Raises:
        TermsRefused: the lineage of a row is missing or disagrees with it.
        ConfigError: the target can't be a folder, is a store, the corpus itself or inside it, or holds shards
            already: a curated corpus is written once.
        StoreError: the target can't be written.
    """
    corpus = Corpus.open(config.corpus)
    shards = config.out / paths.SHARDS
    _refuse(config.out, {config.corpus.resolve(), corpus.folder.resolve()})
    terms_check.require_lineage(corpus)
    lineages = {lineage.run_id: lineage for lineage in corpus.lineages()}
    warnings = [
        f"filter 'run': no run {run!r} is in {config.corpus}; `harvester report` lists the runs"
        for run in config.runs
        if run not in lineages
    ]
    output_path.folder(config.out)
    with (
        translate_disk_errors(config.out),
        _hidden_folder(config.out) as hidden,
        contextlib.ExitStack() as stack,
    ):
        filters, leaks = list(config.filters), None
        if config.decontaminate is not None:
            leaks = stack.enter_context(
                contextlib.closing(RowLeaks(config.decontaminate, corpus, config.root))
            )
            filters.insert(0, leaks.check)
        if config.where is not None:
            filters.insert(0, chosen_by(config.where))
        _survey(corpus, config, [*filters, *alone])
        by_name = dict(zip(_distinct(config.names), alone, strict=True)) if alone else {}
        tally = _Tally(by_name, Mixing(config.corpus))
        staged = hidden if config.sample is None else hidden / _STAGED
        staged.mkdir(exist_ok=True)
        with CuratedFiles(staged, lineages) as parts:
            changed = _filter(corpus, chain(filters), parts, tally, draws=config.sample is not None)
        if config.sample is not None:
            with CuratedFiles(hidden, lineages) as parts:
                warnings += _draw(Corpus.open(staged), config.sample, parts, tally, changed)
            shutil.rmtree(staged)
        counts = replace(tally.counts(), warnings=tuple(warnings), out=config.out)
        fsync(hidden)
        summary: dict[str, Any] = {
            "kept": counts.kept,
            "dropped": counts.dropped,
            "filters": config.names,
            "corpus": str(config.corpus),
        }
        if config.where is not None:
            summary["where"] = config.where.text
        if config.judges:
            summary["judges"] = [dict(facts) for facts in config.judges]
        if counts.changed:
            summary["masked"] = counts.changed
        if config.sample is not None:
            summary["sample"] = config.sample.model_dump()
        summary["notes"] = counts.notes
        summary["warnings"] = counts.warnings
        summary["examples_note"] = EXAMPLES_NOTE
        summary["examples"] = counts.examples
        if leaks is not None:
            summary["decontamination"] = leaks.facts()
            leaks.write_hits(hidden / HITS_NAME)
            (hidden / HITS_NAME).replace(config.out / HITS_NAME)
        (hidden / _SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (hidden / _SUMMARY).replace(config.out / _SUMMARY)
        reach("curate.before_rename")
        hidden.rename(shards)
        fsync(config.out)
    return counts


class _Tally:
    """Counts what becomes of the rows, with examples, and mixed settings of those that are kept."""

    def __init__(self, alone: Mapping[str, Filter], mixing: Mixing) -> None:
        self.kept = self.changed = 0
        self.dropped: Counter[str] = Counter()
        self._mixing = mixing
        self._examples: dict[str, list[dict[str, str]]] = {}
        self._filters = alone
        self._alone = {name: Counter[str]() for name in alone}

    def keep(self, sample: Sample, *, is_changed: bool) -> None:
        """Count a row as it is written."""
        self.kept += 1
        self.changed += is_changed
        self._mixing.add(sample)
        self._show("kept", sample, "masked" if is_changed else "")

    def drop(self, sample: Sample, why: Drop) -> None:
        """Count a row that is not written."""
        self.dropped[why.reason] += 1
        self._show(why.reason, sample, why.detail)

    def counts(self) -> CurateCounts:
        """Return the sums."""
        return CurateCounts(
            self.kept,
            dict(sorted(self.dropped.items())),
            self._mixing.notes(),
            self.changed,
            self._examples,
            {name: dict(+counts) for name, counts in self._alone.items()},
        )

    def count_alone(self, sample: Sample) -> None:
        """Count what each filter would do with a row by itself."""
        names = []
        for name, check in self._filters.items():
            result = check(sample)
            self._alone[name]["masks"] += isinstance(result, Sample)
            if isinstance(result, Drop):
                self._alone[name]["alone"] += 1
                names.append(name)
        if len(names) == 1:
            self._alone[names[0]]["no_other"] += 1

    def _show(self, reason: str, sample: Sample, detail: str) -> None:
        """Keep a row as an example, with private data masked: the record may be published with the corpus."""
        examples = self._examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            # A shard of somebody else may hold text there.
            turns = [turn for turn in sample.messages if isinstance(turn, Mapping)]
            prompt = "\n".join(str(turn.get("content") or "") for turn in turns)
            answer = sample.completion or ""
            examples.append(
                {
                    "prompt_id": sample.prompt_id,
                    "prompt": mask(prompt, PRIVATE)[:SHOWN_CHARACTERS],
                    "answer": mask(answer, PRIVATE)[:SHOWN_CHARACTERS],
                    "detail": mask(detail, PRIVATE)[:SHOWN_CHARACTERS],
                }
            )


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur again, as in `pattern 2`."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return result


def _survey(corpus: Corpus, config: CurateConfig, filters: Sequence[Filter]) -> None:
    """Show all rows to the filters that must know them before they decide."""
    surveys = [each for each in filters if isinstance(each, Survey)]
    if not surveys:
        return
    for sample in corpus.samples():
        if config.where is None or config.where.matches(sample):
            for survey in surveys:
                survey.observe(sample)


def _filter(corpus: Corpus, decide: Filter, parts: CuratedFiles, tally: _Tally, *, draws: bool) -> set[int]:
    """Write the rows that the filters keep; return the identities of those that were masked.

    Args:
        draws: a sample is drawn of them later, so they don't count as kept yet.
    """
    changed = set()
    for sample in corpus.samples():
        result = decide(sample)
        tally.count_alone(sample)
        if isinstance(result, Drop):
            tally.drop(sample, result)
            continue
        row = result or sample
        parts.add(row)
        if not draws:
            tally.keep(row, is_changed=result is not None)
        elif result is not None:
            changed.add(stratified.identity(row))
    return changed


def _draw(
    staged: Corpus, section: SampleSection, parts: CuratedFiles, tally: _Tally, changed: Collection[int]
) -> tuple[str, ...]:
    """Keep the rows of a staged corpus that the sample draws; return warnings.

    Args:
        changed: identities of rows that were masked.
    """
    drawn = stratified.draw(staged.samples(stratified.COLUMNS), section)
    for sample in staged.samples():
        identity = stratified.identity(sample)
        if identity in drawn.rows:
            parts.add(sample)
            tally.keep(sample, is_changed=identity in changed)
        else:
            tally.drop(sample, Drop("not_drawn"))
    return drawn.warnings


def _refuse(out: Path, sources: Collection[Path]) -> None:
    if (out / paths.JOURNAL).exists() or out.resolve() in sources:
        raise ConfigError("is a store or the corpus itself", place=str(out), remedy="name another 'out'")
    if any(out.resolve().is_relative_to(source) for source in sources):
        raise ConfigError(
            "lies inside the corpus that is read", place=str(out), remedy="name another 'out', beside it"
        )
    try:
        is_used = (out / paths.SHARDS).exists() and any((out / paths.SHARDS).iterdir())
    except OSError as error:
        raise ConfigError(
            f"can't be a folder: {error.strerror}",
            place=str(out / paths.SHARDS),
            remedy="name another 'out', in a folder that you may write",
        ) from None
    if is_used:
        raise ConfigError(
            "holds a curated corpus already", place=str(out / paths.SHARDS), remedy="name another 'out'"
        )


@contextlib.contextmanager
def _hidden_folder(out: Path) -> Iterator[Path]:
    """Make a hidden folder, removed again unless it was renamed; first remove those of killed curations."""
    for left in out.glob(f"{_HIDDEN}*"):
        with if_no_reader(left) as is_nobodys:
            if is_nobodys:
                shutil.rmtree(left)
    hidden = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=out))
    with if_no_reader(hidden):
        try:
            hidden.chmod(stat.S_IMODE(out.stat().st_mode))
            yield hidden
        finally:
            if hidden.exists():
                shutil.rmtree(hidden)
