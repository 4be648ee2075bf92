"""Say for each error code of both programs what the program does about it and what the user can do.

Both command lines print these remedies under errors that have none of their own; `harvester explain` shows
all of it. `harvester` never imports `trainer`, so the facts of the trainer's error classes are repeated here;
tests/test_remedies.py compares them with the classes.
"""

from __future__ import annotations

from harvester.errors import HarvesterError

_BEFORE = "Nothing was sent and nothing was written."
_KEPT = "All answers received before are stored; the same command resumes."

# Error code -> (what the program does about it, what the user can do). A code of both programs has one entry.
TEXTS: dict[str, tuple[str, str]] = {
    "failed": (
        "The message says what failed. All answers received before are stored.",
        "Try again; if it fails again, report it with the message.",
    ),
    "usage": (
        _BEFORE,
        "See `harvester COMMAND --help` or `trainer COMMAND --help`; every command has an example.",
    ),
    "config": (
        f"{_BEFORE} For an unknown key the message suggests the nearest known one.",
        "Change the key in the message; `harvester config schema` lists the keys of harvest.toml, "
        "`trainer config schema` those of train.toml, also for an editor.",
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
        "Free space on the disk of the store or the output folder; the same command resumes.",
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
        "Wait for that process or end it: `harvester status STORE` shows the process of a harvest, "
        "`harvester stop STORE` ends it; a training ends with Ctrl-C or SIGTERM.",
    ),
    "limit": (_KEPT, "Raise the limit in the message, or continue another day."),
    "interrupted": (
        "A harvest awaited answers in flight for --grace seconds, as they are paid for; a training wrote a "
        "checkpoint. A second signal ends the run at once.",
        "The same command resumes; stored answers are not paid again.",
    ),
    "findings": (
        "Each problem is printed; the exit code is for scripts and health checks.",
        "`harvester verify STORE --repair` repairs a store; `harvester run` resumes a run; rows that "
        "`trainer doctor` names are corrected or filtered out.",
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
    "data": (
        "Nothing was trained or evaluated, and no file of the corpus was changed.",
        "`trainer doctor train.toml` shows what is learned and what is left out; correct [data], or "
        "harvest more rows.",
    ),
    "student": (
        "Nothing was trained, and no file of the base was changed.",
        "Check that config.json, tokenizer and *.safetensors of [student] base are of one download.",
    ),
    "checkpoint": (
        "The damaged checkpoint is not used; an earlier one that is whole is, if there is one.",
        "Delete the folder that is named; the same command resumes from the checkpoint before it, or "
        "starts again.",
    ),
    "resume": (
        "The checkpoint is kept. A training never mixes two configurations or two corpora.",
        "Put the setting or corpus back, name another [out] path, or add --allow-change.",
    ),
    "diverged": (
        "The training ended, as further steps can't bring it back. Earlier checkpoints are kept.",
        "Lower [train] lr, or look at the rows that the message names with `trainer doctor`.",
    ),
    "memory": (
        "The training ended; checkpoints are whole.",
        "Lower [train] max_length or batch_tokens; `trainer plan` estimates the memory.",
    ),
    "harvest": (
        "The command ended with the harvest's own exit code; answers received before are stored.",
        "Read the harvester's message above, then start the same command again: it resumes.",
    ),
    "command": (
        "`trainer distil` ended with the exit code of the command that failed; finished stages are kept.",
        "Read the message of that command above, then start `trainer distil` again: it resumes.",
    ),
    "lost": (
        "All processes of the training ended together; the last checkpoint is good.",
        "The same command resumes. If a process is lost again, see its log and the memory of its machine.",
    ),
}

# Error code that only the trainer has -> (meaning, exit code; None: that of the command that failed).
TRAINER_CODES: dict[str, tuple[str, int | None]] = {
    "data": ("The corpus holds nothing to learn from, or nothing to evaluate with.", 2),
    "student": ("The base folder, its tokenizer or its chat template can't be used.", 2),
    "checkpoint": ("A checkpoint, or a file in it, is damaged or not what was written.", 5),
    "resume": ("Configuration or corpus changed since the checkpoint of an unfinished training.", 2),
    "diverged": ("Loss or gradient was NaN or infinite several steps in a row.", 1),
    "memory": ("A pack does not fit into the device's memory.", 1),
    "harvest": ("A harvest that a command of the trainer started ended early.", None),
    "command": ("A command that `trainer distil` started failed.", None),
    "lost": ("Another process of the same training ended or was killed. The last checkpoint is good.", 75),
}

# Exit code of either program -> its meaning.
EXIT_CODES: dict[int, str] = {
    0: "complete",
    1: "`verify` or `--check` found a problem; data with a fatal fault; a training that diverged or does not "
    "fit the memory",
    2: "wrong usage or configuration, or a package that is not installed",
    3: "complete, but more rows failed than `[run] max_failed`, or more answers are unusable than "
    "`max_unusable`",
    4: "the teacher refuses: key, quota, model, policy",
    5: "storage error",
    10: "stopped at a limit; the same command resumes",
    75: "another process uses the store or the output folder, or a process of a training was lost",
    77: "the terms do not permit it",
    130: "interrupted by SIGINT; the same command resumes",
    143: "interrupted by SIGTERM; the same command resumes",
}


def error_lines(error: HarvesterError) -> list[str]:
    """Return the lines that a command prints about the error with which it ends."""
    where = [f"  where   {error.place}"] if error.place else []
    remedy = error.remedy or remedy_of(error.code)
    return [f"error[{error.code}]: {error.message}", *where, f"  remedy  {remedy}"]


def remedy_of(code: str) -> str:
    """Return the general remedy for a code, used for an error that has none of its own."""
    return TEXTS[code][1] if code in TEXTS else "`harvester explain` lists the codes."
