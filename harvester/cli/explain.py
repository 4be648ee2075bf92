"""What each error code means, what the harvester did about it, and what its reader can do. Pure."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from harvester import errors
from harvester.errors import HarvesterError, TeacherError, UsageError


@dataclass(frozen=True, slots=True)
class Explanation:
    """One code in words. `exit_code` is None for what a run survives."""

    code: str
    meaning: str
    done: str
    remedy: str
    exit_code: int | None
    is_permanent: bool | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "code": self.code,
            "meaning": self.meaning,
            "done": self.done,
            "remedy": self.remedy,
            "exit_code": self.exit_code,
            "is_permanent": self.is_permanent,
        }

    def lines(self) -> list[str]:
        """For people."""
        said = [f"{self.code}: {self.meaning}", f"  what we do  {self.done}", f"  remedy      {self.remedy}"]
        if self.exit_code is not None:
            said.append(f"  exit code   {self.exit_code}")
        if self.is_permanent is not None:
            kind = (
                "never succeeds by asking again" if self.is_permanent else "may succeed later; it is retried"
            )
            said.append(f"  retry       {kind}")
        return said


_BEFORE = "Nothing was sent and nothing was written."
_KEPT = "What was paid for before is stored and sealed; the same command resumes."

# code -> what we do about it, what the reader can do
_WORDS: dict[str, tuple[str, str]] = {
    "usage": (_BEFORE, "See `harvester COMMAND --help`; every command has an example."),
    "config": (
        f"{_BEFORE} Unknown keys are answered with the nearest known one.",
        "Change the key that is named; `harvester config schema` tells an editor all of them.",
    ),
    "prompt_file": (
        "A run reads every line before it sends the first; with --watch a file is read again when it grows.",
        'Mend the line that is named; a line is {"prompt": "..."} or {"messages": [...]}.',
    ),
    "no_prompts": (
        f"{_BEFORE} With --watch the run waits for them.",
        "Names and globs in [prompts] files are resolved beside the configuration file.",
    ),
    "terms": (
        "The gate asks before the first byte, at sealing, at export and before training. It has no override.",
        "`harvester terms show ID` says what was read and where; record a permission you hold, or ask a "
        "teacher that permits it.",
    ),
    "store": (
        "After a failed write nothing more is sent: what can't be kept must not be paid for.",
        "Look at the disk and its permissions, then `harvester verify STORE`; the same command resumes.",
    ),
    "store_full": (
        "Sending stops at [store] min_free_mib, so that what is on the wire can still be kept.",
        "Free space on the store's disk; the same command resumes.",
    ),
    "store_corrupt": (
        "Nothing is guessed or repaired unasked; undamaged files stay readable.",
        "`harvester verify STORE` names the damage; --repair quarantines it and asks again for what is gone.",
    ),
    "store_format": (
        "A store is never read by guessing its format.",
        "Use the version that wrote it, or one that lists its format in CHANGELOG.md.",
    ),
    "locked": (
        "Nothing was sent. The kernel frees the lock when its holder ends, however it ends.",
        "`harvester status STORE` says who works there; wait, or `harvester stop STORE`.",
    ),
    "limit": (_KEPT, "Raise the ceiling that is named, or go on another day."),
    "interrupted": (
        "What was on the wire was awaited for --grace seconds: it is paid for. A second signal ends at once.",
        "The same command resumes; nothing stored is paid again.",
    ),
    "findings": (
        "Each finding is printed; the exit code is for scripts and probes.",
        "`harvester verify STORE --repair` mends a store; `harvester run` resumes a job.",
    ),
    "too_many_failures": (
        "All rows have an ending, but more of them failed than [run] max_failed allows.",
        "Read dead_letters.jsonl in the store; raise max_failed if you can do without those rows.",
    ),
    "drift": (
        "The change is recorded and shown; the run goes on, or with [canary] pause is held until `resume`.",
        "Decide whether answers of both may stand together: rows name the model that gave them.",
    ),
    "teacher": (_KEPT, "The message names host and status."),
    "rate_limited": (
        "We wait as long as the teacher asks, slow down, and send again; it costs no attempt.",
        "Nothing, unless its share stays high: then lower [teacher.limits] or `harvester set STORE rpm N`.",
    ),
    "unavailable": (
        "Retried with growing waits; when nobody gets through, the run looks once in a while, then parks.",
        "Look at the teacher; the same command resumes. [run] patience_s is how long we wait.",
    ),
    "timeout": (
        "The attempt was cut at [run] deadline_s (unset: max_tokens decide); it counts as possibly billed.",
        "Raise deadline_s for long answers, or lower max_tokens.",
    ),
    "connection": (
        "A cut answer is never taken for a whole one; it may have been billed, and is asked again.",
        "Look at proxies between you and the teacher; deadlines of theirs may be shorter than yours.",
    ),
    "broken_answer": (
        "The raw bytes are kept in the journal; the request is tried again, then given up.",
        "Look at base_url: does an OpenAI-compatible API answer there?",
    ),
    "prompt_rejected": (
        "The row becomes a dead letter and is not asked again; twenty in a row stop the run.",
        "Read the teacher's words in dead_letters.jsonl: too long, a forbidden field, a refused content.",
    ),
    "possibly_billed": (
        "The row is a dead letter; a run with [run] retry_possibly_billed = true asks it again.",
        "Look at the teacher's bill, then set retry_possibly_billed for a run if the rows are worth it.",
    ),
    "teacher_refused": (
        f"The run stops at once: no other request would fare better. {_KEPT}",
        "Look at the key's variable, the account's quota, and the model's name.",
    ),
}


def known() -> dict[str, type[HarvesterError]]:
    """Every code and the class it belongs to."""
    found: dict[str, type[HarvesterError]] = {}
    for one in vars(errors).values():
        if isinstance(one, type) and issubclass(one, HarvesterError) and one is not HarvesterError:
            found[one.code] = one
    return found


def explain(text: str) -> list[Explanation]:
    """The explanations of a code, or of every code that ends with an exit code.

    Raises:
        UsageError: no such code; names the nearest one.
    """
    kinds = known()
    wanted = text.strip().lower()
    if wanted.isascii() and wanted.isdigit() and len(wanted) < 5:
        number = 130 if wanted == "143" else int(wanted)
        codes = [code for code, kind in kinds.items() if _exit_code(kind) == number]
    else:
        codes = [wanted] if wanted in kinds else []
    if not codes:
        near = difflib.get_close_matches(wanted, kinds, n=1)
        raise UsageError(
            f"no error has the code {text[:60]!r}",
            remedy=f"did you mean {near[0]!r}?" if near else f"one of {', '.join(sorted(kinds))}",
        )
    return [_explanation(code, kinds[code]) for code in codes]


def remedy_of(code: str) -> str:
    """What to do about a code in general, for an error that brings no remedy of its own."""
    return _WORDS[code][1] if code in _WORDS else "`harvester explain` lists the codes."


def _explanation(code: str, kind: type[HarvesterError]) -> Explanation:
    meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    done, remedy = _WORDS[code]
    permanent = kind.is_permanent if issubclass(kind, TeacherError) else None
    return Explanation(code, meaning, done, remedy, _exit_code(kind), permanent)


def _exit_code(kind: type[HarvesterError]) -> int | None:
    """A transient error of the teacher, or of one prompt, ends no run."""
    survives = issubclass(kind, TeacherError) and kind.code not in {"teacher_refused", "teacher"}
    return None if survives else kind.exit_code
