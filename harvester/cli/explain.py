"""Explain error codes and exit codes: the meaning, what the harvester does about it, what the user can do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harvester import errors
from harvester.errors import HarvesterError, TeacherError, UsageError


@dataclass(frozen=True, slots=True)
class Explanation:
    """The explanation of one error code.

    Attributes:
        code: the error code.
        meaning: what went wrong.
        done: what the harvester does about it.
        remedy: what the user can do.
        exit_code: exit code of a run that ends with this error, None if a run continues after it.
        is_permanent: for errors of the teacher: True if a further attempt is useless. None for others.
    """

    code: str
    meaning: str
    done: str
    remedy: str
    exit_code: int | None
    is_permanent: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        return {
            "code": self.code,
            "meaning": self.meaning,
            "done": self.done,
            "remedy": self.remedy,
            "exit_code": self.exit_code,
            "is_permanent": self.is_permanent,
        }

    def lines(self) -> list[str]:
        """Return the explanation as lines of text."""
        lines = [f"{self.code}: {self.meaning}", f"  what we do  {self.done}", f"  remedy      {self.remedy}"]
        if self.exit_code is not None:
            lines.append(f"  exit code   {self.exit_code}")
        if self.is_permanent is not None:
            retry = "no: it would fail again" if self.is_permanent else "yes: it may succeed later"
            lines.append(f"  retry       {retry}")
        return lines


_BEFORE = "Nothing was sent and nothing was written."
_KEPT = "All answers received before are stored; the same command resumes."

# Error code -> (what the harvester does about it, what the user can do).
_TEXTS: dict[str, tuple[str, str]] = {
    "failed": (
        "The message says what failed. All answers received before are stored.",
        "Try again; if it fails again, report it with the message.",
    ),
    "usage": (_BEFORE, "See `harvester COMMAND --help`; every command has an example."),
    "config": (
        f"{_BEFORE} For an unknown key the message suggests the nearest known one.",
        "Change the key in the message; `harvester config schema` lists all keys, also for an editor.",
    ),
    "missing_package": (_BEFORE, "Run the `pip install` command that the message shows."),
    "prompt_file": (
        "All lines are checked before the first request; with --watch a file is read again when it grows.",
        'Correct the line or file that is named; a line is {"prompt": "..."} or {"messages": [...]}.',
    ),
    "no_prompts": (
        f"{_BEFORE} With --watch the run waits for them.",
        "Names and patterns in [prompts] files are relative to the folder of harvest.toml.",
    ),
    "terms": (
        "The terms are checked before the first request, at sealing, at export and before training. "
        "No option skips the check.",
        "`harvester terms show ID` shows the terms and their source. Use another teacher, or record a "
        "permission that you were granted with `harvester terms record`.",
    ),
    "store": (
        "After a failed write no request is sent: an answer that can't be stored must not be paid for.",
        "Check the disk and the permissions, then run `harvester verify STORE`; the same command resumes.",
    ),
    "store_full": (
        "No request is sent below [store] min_free_mib of free space, so that there is room for answers in "
        "flight.",
        "Free space on the store's disk; the same command resumes.",
    ),
    "store_corrupt": (
        "Nothing is repaired without --repair; undamaged files stay readable.",
        "`harvester verify STORE` lists the damage; with --repair it sets damaged files aside, and the next "
        "run asks again for what is lost.",
    ),
    "store_format": (
        "A store of an unknown format is not opened.",
        "Use the version that wrote it, or one whose CHANGELOG.md lists its format.",
    ),
    "remote_store": (
        "A publication is there when its manifest is, which is written last: nobody sees half of one. "
        "A mirror never stops nor slows a harvest.",
        "Check URL, credentials and network; the same command goes on where it ended. What changed in the "
        "storage is named, and `harvester publish STORE URL --repair` uploads it again.",
    ),
    "locked": (
        "Nothing was sent. The lock is released when the process that holds it ends, even if it is killed.",
        "`harvester status STORE` shows the process; wait for it, or end it with `harvester stop STORE`.",
    ),
    "limit": (_KEPT, "Raise the limit in the message, or continue another day."),
    "interrupted": (
        "Answers in flight were awaited for --grace seconds, as they are paid for. A second signal ends the "
        "run at once.",
        "The same command resumes; stored answers are not paid again.",
    ),
    "findings": (
        "Each problem is printed; the exit code is for scripts and health checks.",
        "`harvester verify STORE --repair` repairs a store; `harvester run` resumes a run.",
    ),
    "too_many_failures": (
        "All rows are done, but more of them failed than [run] max_failed allows, or a larger share of the "
        "answers is empty, invalid, filtered, refused or unknown than [run] max_unusable allows.",
        "Read dead_letters.jsonl in the store; `harvester run CONFIG --retry-dead` asks for failed rows "
        "again, `--retry empty,invalid` for such answers; or raise max_failed or max_unusable.",
    ),
    "drift": (
        "The change is recorded and shown. The run continues; with [canary] pause = true it pauses until "
        "`resume`.",
        "Decide whether to mix answers of both; each row holds the name of its model.",
    ),
    "teacher": (_KEPT, "Read the host and the HTTP status in the message."),
    "rate_limited": (
        "The run waits as long as the teacher asks, slows down, and sends again. This is not counted as an "
        "attempt.",
        "Nothing, unless it happens often: then lower [teacher.limits], or use `harvester set STORE rpm N`.",
    ),
    "unavailable": (
        "It is retried with growing waits. If all requests fail, the run tries now and then, and ends with "
        "exit 10.",
        "Check the teacher; the same command resumes. [run] patience_s sets how long a run waits.",
    ),
    "timeout": (
        "The attempt was ended at [run] deadline_s (if unset: by max_tokens). It counts as possibly billed.",
        "Raise deadline_s for long answers, or lower max_tokens. A server that works on few requests at once "
        "makes the others wait: set [teacher.limits] max_concurrency to the number of its slots.",
    ),
    "connection": (
        "An incomplete answer is not stored. It may have been billed, and is asked again.",
        "Check proxies between you and the teacher; their time limits may be shorter than yours.",
    ),
    "results_deleted": (
        "The rows of the batch count as possibly billed and are asked again, unless [run] "
        "retry_possibly_billed is false. The complaint names the batch.",
        "Collect batches earlier: providers delete results after some days. `harvester run` collects them.",
    ),
    "broken_answer": (
        "The first bytes are kept with the attempt. A row is asked again at most twice, and a run makes 3 "
        "such retries and one for every 20 rows; then the row is a dead letter. It counts as possibly "
        "billed. The message quotes the teacher's own words where it sent any.",
        "Read the message. Is there an OpenAI-compatible API at base_url? An error that the teacher sends "
        "with status 200 is quoted there; a model that can't finish an answer may need a smaller max_tokens. "
        "`harvester run CONFIG --retry-dead` asks again.",
    ),
    "prompt_rejected": (
        "The row has failed (a dead letter) and is asked again only with --retry-dead. Twenty different "
        "prompts in a row that are rejected stop the run and write no dead letter, as the fault may be in "
        "[sampling]; prompts rejected by content moderation do not count for that.",
        "Read the teacher's message in dead_letters.jsonl: too long, an unknown field, moderated content. "
        "`harvester run CONFIG --retry-dead` asks again, for instance after [sampling] was corrected.",
    ),
    "possibly_billed": (
        "The row has failed (a dead letter); a run with [run] retry_possibly_billed = true asks it again.",
        "Check the teacher's bill, then set retry_possibly_billed if the rows are worth it.",
    ),
    "teacher_refused": (
        f"The run stops at once, as every request would be refused. {_KEPT}",
        "Check the variable with the API key, the account's quota, and the model's name.",
    ),
}


def error_classes() -> dict[str, type[HarvesterError]]:
    """Return the error class of every code: the most general one where a subclass shares it."""
    classes: dict[str, type[HarvesterError]] = {}
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, HarvesterError):
            known = classes.get(value.code)
            if known is None or issubclass(known, value):
                classes[value.code] = value
    return classes


def explanations(text: str) -> list[Explanation]:
    """Return the explanation of an error code, or of all errors with an exit code.

    Raises:
        UsageError: there is no such code; the remedy names the nearest one.
    """
    classes = error_classes()
    wanted = text.strip().lower()
    if wanted.isascii() and wanted.isdigit() and len(wanted) < 5:
        number = 130 if wanted == "143" else int(wanted)
        codes = [code for code, error in classes.items() if _exit_code(error) == number]
    else:
        codes = [wanted] if wanted in classes else []
    if not codes:
        near = difflib.get_close_matches(wanted, classes, n=1)
        raise UsageError(
            f"no error or exit code is called {text[:60]!r}",
            remedy=f"did you mean {near[0]!r}?" if near else _known_codes(classes),
        )
    return [_explanation(code, classes[code]) for code in codes]


def _known_codes(classes: Mapping[str, type[HarvesterError]]) -> str:
    numbers = {_exit_code(error) for error in classes.values()} | {143}
    exit_codes = ", ".join(str(number) for number in sorted(number for number in numbers if number))
    return f"error codes: {', '.join(sorted(classes))}; exit codes: {exit_codes}"


def remedy_of(code: str) -> str:
    """Return the general remedy for a code, used for an error that has none of its own."""
    return _TEXTS[code][1] if code in _TEXTS else "`harvester explain` lists the codes."


def _explanation(code: str, error: type[HarvesterError]) -> Explanation:
    meaning = " ".join((error.__doc__ or "").split("\n\n")[0].split())
    done, remedy = _TEXTS[code]
    permanent = error.is_permanent if issubclass(error, TeacherError) else None
    return Explanation(code, meaning, done, remedy, _exit_code(error), permanent)


def _exit_code(error: type[HarvesterError]) -> int | None:
    """Return the exit code, None for an error of one request, after which the run continues."""
    survives = issubclass(error, TeacherError) and error.code not in {"teacher_refused", "teacher"}
    return None if survives else error.exit_code
