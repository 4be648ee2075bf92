"""Run the mock teacher from the command line until SIGINT or SIGTERM."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harvester.errors import ConfigError, HarvesterError
from harvester.mock_teacher.faults.script import load_script
from harvester.mock_teacher.listening import serve
from harvester.mock_teacher.scoring import SCORE_FORMS
from harvester.mock_teacher.settings import BatchSettings, MockSettings, parse_accuracy
from harvester.mock_teacher.tasks.judging import Preference
from harvester.mock_teacher.wire import MAX_CHOICES


def parser(prog: str = "python -m harvester.mock_teacher") -> argparse.ArgumentParser:
    """Return the parser of the command line; `--help` shows its options in sections."""
    flags = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [OPTIONS]",
        description="A local OpenAI-compatible teacher with rules, limits, faults and a billing ledger.",
        epilog=f"example: {prog} --port 8000 --rpm 600 --accuracy 0.9",
    )
    _add_answers(flags.add_argument_group("answers"))
    _add_limits(flags.add_argument_group("limits (default: none)"))
    _add_load(flags.add_argument_group("latency and load"))
    _add_address(flags.add_argument_group("address and access"))
    _add_files(flags.add_argument_group("faults, ledger, output"))
    return flags


def _add_answers(group: argparse._ArgumentGroup) -> None:
    """Add what the teacher answers, and what it can be asked for."""
    add = group.add_argument
    add(
        "--model",
        default="mock-teacher",
        help="name of its model, or a folder with a transformers model that answers instead of the rules "
        "(needs the train extra); it is served under the folder's name",
    )
    add("--accuracy", default="0.95", help="share of right answers: 0.9, or sum=0.8,reverse=0.99")
    add("--seed", type=int, default=0, help="servers with equal seeds give equal answers")
    add(
        "--context-tokens",
        type=int,
        default=131_072,
        metavar="N",
        help="refuse a prompt that does not fit into N tokens together with max_tokens; default: 131,072",
    )
    add("--max-n", type=int, default=MAX_CHOICES, metavar="K", help="most choices of one request (n)")
    add(
        "--n-above",
        default="refuse",
        choices=("refuse", "fewer"),
        help="refuse a request for more choices than --max-n (default), or answer with fewer",
    )
    add(
        "--scores",
        default=",".join(SCORE_FORMS),
        metavar="WAYS",
        help=f"ways to score a given text that a model offers: {', '.join(SCORE_FORMS)}, or none; "
        "the fields of the others are ignored; default: all",
    )
    add(
        "--judge-prefers",
        default=Preference.RIGHT,
        type=Preference,
        choices=tuple(Preference),
        help="which answer of a pair wins when it is asked to judge; default: right",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    """Add the limits that the teacher enforces."""
    add = group.add_argument
    add("--rpm", type=float, help="requests per minute")
    add("--tpm", type=float, help="tokens per minute")
    add(
        "--tpm-counts",
        default="actual",
        choices=("actual", "max"),
        help="count the tokens used (default), or max_tokens",
    )
    add(
        "--burst",
        type=float,
        default=1.0,
        metavar="S",
        help="admit S seconds' worth of a limit at once; default: 1",
    )
    add("--window", type=float, metavar="S", help="count the limits in fixed windows of S seconds")
    add("--max-concurrency", type=int, metavar="N", help="refuse more than N requests at once")
    add(
        "--concurrency-status",
        type=int,
        default=503,
        choices=(429, 503),
        help="HTTP status of a request refused by --max-concurrency; default: 503",
    )
    add("--hide-limits", action="store_true", help="no limit headers, no Retry-After, no wait in messages")


def _add_load(group: argparse._ArgumentGroup) -> None:
    """Add how long the teacher takes."""
    add = group.add_argument
    add("--latency", type=float, default=0.0, metavar="S", help="mean seconds before an answer; default: 0")
    add("--latency-jitter", type=float, default=0.0, metavar="SHARE", help="spread around the mean, 0..1")
    add("--per-token-latency", type=float, default=0.0, metavar="S", help="seconds per generated token")
    add("--slots", type=int, metavar="K", help="work on K requests at once, queue all others, refuse none")
    add(
        "--slot-seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds that a request takes in a slot; default: 1",
    )
    add("--batch-latency", type=float, default=0.0, metavar="S", help="seconds that a batch takes")


def _add_address(group: argparse._ArgumentGroup) -> None:
    """Add where the teacher listens, and who may call it."""
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine alone")
    add("--port", type=int, default=0, help="port; 0 picks a free one (default)")
    add("--port-file", type=Path, metavar="FILE", help="write the port to FILE once requests are served")
    add("--require-key-env", metavar="NAME", help="environment variable with the key that callers must send")
    add("--certificate", type=Path, metavar="FILE", help="PEM; with --private-key the server speaks TLS")
    add("--private-key", type=Path, metavar="FILE", help="PEM; key of --certificate")


def _add_files(group: argparse._ArgumentGroup) -> None:
    """Add what the teacher reads and writes."""
    add = group.add_argument
    add("--faults", type=Path, metavar="FILE", help="fault script, TOML or JSON")
    add("--ledger", type=Path, metavar="FILE", help="append one JSON line per charged reply")
    add("--json", action="store_true", help="announce the address as a JSON line")


def settings_from(flags: argparse.Namespace) -> MockSettings:
    """Return the settings for parsed flags.

    Raises:
        ConfigError: an impossible value, or a fault script that can't be used.
    """
    folder = model_folder(flags.model)
    return MockSettings(
        host=flags.host,
        port=flags.port,
        model=folder.name if folder else flags.model,
        model_folder=folder,
        seed=flags.seed,
        accuracy=parse_accuracy(flags.accuracy),
        judge_prefers=flags.judge_prefers,
        rpm=flags.rpm,
        tpm=flags.tpm,
        burst_s=flags.burst,
        tpm_counts=flags.tpm_counts,
        hide_limits=flags.hide_limits,
        window_s=flags.window,
        slots=flags.slots,
        slot_s=flags.slot_seconds,
        max_concurrency=flags.max_concurrency,
        concurrency_status=flags.concurrency_status,
        latency_s=flags.latency,
        latency_jitter=flags.latency_jitter,
        per_token_latency_s=flags.per_token_latency,
        context_tokens=flags.context_tokens,
        scores=score_forms(flags.scores),
        max_n=flags.max_n,
        n_above=flags.n_above,
        faults=load_script(flags.faults) if flags.faults else (),
        batches=BatchSettings(latency_s=flags.batch_latency),
        ledger_file=flags.ledger,
        require_key_env=flags.require_key_env,
        certificate=flags.certificate,
        private_key=flags.private_key,
    )


def score_forms(text: str) -> tuple[str, ...]:
    """Return the ways to score a text that `--scores` lists.

    Raises:
        ConfigError: it lists an unknown one.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))
    for name in names:
        if name not in SCORE_FORMS:
            raise ConfigError(
                f"unknown way to score a text {name!r}",
                place="--scores",
                remedy=f"known: {', '.join(SCORE_FORMS)}, none",
            )
    return names


def model_folder(value: str) -> Path | None:
    """Return the folder that `--model` names, None if it is only a name.

    Raises:
        ConfigError: it is written as a path and is no folder.
    """
    path = Path(value)
    if path.is_dir():
        return path.resolve()
    if value.startswith(("/", "./", "../", "~")):
        raise ConfigError("there is no such folder", place=f"--model {value}", remedy="name a model folder")
    return None


def main(arguments: Sequence[str] | None = None, prog: str = "python -m harvester.mock_teacher") -> int:
    """Serve with the settings of `arguments`; return the exit code."""
    flags = parser(prog).parse_args(arguments)

    def announce(base_url: str) -> None:
        line = json.dumps({"base_url": base_url}) if flags.json else f"mock teacher at {base_url}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if flags.port_file:
            # Renamed into place: whoever waits for the file never reads half a number.
            hidden = flags.port_file.with_name(f".{flags.port_file.name}.new")
            hidden.write_text(base_url.rpartition(":")[2].partition("/")[0])
            hidden.replace(flags.port_file)

    try:
        serve(settings_from(flags), announce)
    except HarvesterError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
