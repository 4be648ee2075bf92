"""Let llama.cpp's server answer the held-out prompts from each GGUF file of a student: accuracy, size, speed.

Each file is served alone, one prompt after the other, and gets the conversation, not the prompt: so the chat
template in the file, its tokenizer and its end of turn are tested together with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.data import published_template
from trainer.data.chat_template import Renderer
from trainer.data.held_out import HeldOut
from trainer.data.spread import spread
from trainer.errors import DataError, StudentError
from trainer.evaluation import evaluated_rows, on_demand
from trainer.evaluation.answers_file import WrittenAnswers
from trainer.evaluation.evaluate import judged_text
from trainer.evaluation.judging import judge_answers, verifiers_of
from trainer.evaluation.llama_server import LlamaServer, ServedAnswer, require_server, serving
from trainer.evaluation.scorecard import scorecard, wilson_interval
from trainer.files import read_json, write_json
from trainer.model import model

KEY = "limited_devices"
# Tokens that the context has beyond prompt and answer.
_MARGIN = 16


@dataclass(frozen=True, slots=True)
class GgufChoice:
    """What is scored.

    Attributes:
        folder: of `trainer export --gguf`.
        limit: held-out prompts, evenly spread; None: all.
    """

    folder: Path
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class AnsweredPrompt:
    """A held-out prompt with the student's answer to it, as `trainer evaluate` stored it."""

    held: HeldOut
    student: str


def check_choice(choice: GgufChoice) -> list[dict[str, Any]]:
    """Return the facts of the folder's GGUF files, adapters left out, before an hour of other work.

    Raises:
        ConfigError: llama.cpp's server is not installed.
        StudentError: the folder has no GGUF file of `trainer export`.
    """
    require_server()
    exported = read_json(choice.folder / "export.json") or {}
    files = [file for file in exported.get("gguf", ()) if file["kind"] != "adapter"]
    if not files:
        raise StudentError(
            "has no GGUF files of a student",
            place=str(choice.folder),
            remedy="`trainer export TRAIN.TOML OUT --gguf q8_0` writes one",
        )
    return files


def run(
    config: TrainConfig, choice: GgufChoice, on_file: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Score each GGUF file, and add the results to scorecard.json under `KEY`.

    Args:
        on_file: called with the name of each file before it is served.

    Returns:
        `prompts`, `threads`, and for each of `files` its facts from export.json with `accuracy` (macro, and
        `accuracy_change` against the student in transformers on the same prompts; None without references),
        `equal` (share of answers that are the same string), `cut` (answers that reached the limit),
        `tokens_per_s` and `prompt_tokens_per_s` (one answer at a time), and `other_prompts` (conversations
        that the template in the file renders otherwise than was learned).

    Raises:
        DataError: there are no answers of this evaluation.
        StudentError: the folder has no GGUF files, or llama.cpp can't serve one.
    """
    files = check_choice(choice)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    prompts, limit = _answered(config, choice.limit, renderer)
    longest = max(len(renderer.prompts([prompt.held.conversation])[0]) for prompt in prompts)
    threads = model.thread_count(config.train)
    results: dict[str, Any] = {"prompts": len(prompts), "threads": threads, "files": []}
    for file in files:
        on_file(file["file"])
        path = choice.folder / file["file"]
        with serving(path, threads=threads, context=longest + limit + _MARGIN) as server:
            facts = score(server, prompts, limit, config, renderer)
        results["files"].append({**file, **facts})
    card = config.out_path / "scorecard.json"
    write_json(card, {**read_json(card), KEY: results})
    return results


def _answered(
    config: TrainConfig, limit: int | None, renderer: Renderer
) -> tuple[Sequence[AnsweredPrompt], int]:
    """Return held-out prompts with the answers of the last evaluation, and its limit of new tokens."""
    card = read_json(config.out_path / "scorecard.json")
    rows = WrittenAnswers(config.out_path)
    held_out = evaluated_rows.read_held_out(config, renderer)
    is_same = len(rows) == len(held_out) and all(
        row["prompt_id"] == held.prompt_id for row, held in zip(rows, held_out, strict=True)
    )
    if not card or not is_same:
        raise DataError(
            "there are no answers to these held-out prompts",
            place=str(rows.path),
            remedy="run `trainer evaluate` first",
        )
    numbers = spread(range(len(rows)), limit or len(rows))
    prompts = on_demand.mapped(numbers, lambda n: AnsweredPrompt(held_out[n], rows[n]["student"]))
    return prompts, int(card["cut"]["max_new_tokens"])


def score(
    server: LlamaServer,
    prompts: Sequence[AnsweredPrompt],
    max_new_tokens: int,
    config: TrainConfig,
    renderer: Renderer,
) -> dict[str, Any]:
    """Ask all prompts of one server, and compare its answers with the student's; see `run`."""
    thinks = published_template.keeps_reasoning(config, renderer)
    other_prompts = 0
    answers: list[ServedAnswer] = []
    for prompt in prompts:
        conversation = prompt.held.conversation
        text = server.rendered(renderer.with_known_roles(conversation.messages), conversation.tools)
        if not renderer.has_special_text(conversation):
            learned = renderer.learned_prompt(conversation, thinks=thinks)
            # The server's text lacks the BOS that it adds when it makes tokens.
            bos = str(renderer.tokenizer.bos_token) if renderer.adds_bos else ""
            other_prompts += text not in (learned, learned.removeprefix(bos))
        answers.append(server.answer(text, max_new_tokens))
    texts = [judged_text(answer.text, renderer, config) for answer in answers]
    equal = sum(text == prompt.student for text, prompt in zip(texts, prompts, strict=True))
    written = [(max(0, a.tokens - 1), a.write_s) for a in answers]
    return {
        **_accuracies(prompts, texts, config),
        "equal": wilson_interval(equal, len(prompts)),
        "cut": sum(answer.is_cut for answer in answers),
        "tokens_per_s": _per_second(written),
        "prompt_tokens_per_s": _per_second([(a.prompt_tokens, a.read_s) for a in answers]),
        "other_prompts": other_prompts,
    }


def _accuracies(
    prompts: Sequence[AnsweredPrompt], texts: Sequence[str], config: TrainConfig
) -> dict[str, Any]:
    held_out = on_demand.mapped(prompts, lambda prompt: prompt.held)
    verifiers = verifiers_of(config, held_out)
    # In the place of the base stands the student in transformers.
    judged, _ = judge_answers(
        held_out, on_demand.mapped(prompts, lambda prompt: prompt.student), texts, verifiers
    )
    macro = scorecard(judged, resamples=1)["macro"]
    if not macro:
        return {"accuracy": None, "accuracy_change": None}
    return {
        "accuracy": macro["student"],
        "accuracy_change": macro["student"]["accuracy"] - macro["base"]["accuracy"],
    }


def _per_second(counts: Sequence[tuple[int, float]]) -> float | None:
    seconds = sum(each for _, each in counts)
    return sum(count for count, _ in counts) / seconds if seconds else None


def lines(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each file: size, speed, accuracy, answers that are the same string."""
    found = []
    for file in results["files"]:
        parts = [f"{file['bytes'] / 2**20:,.1f} MiB"]
        if file["tokens_per_s"]:
            parts.append(f"{file['tokens_per_s']:,.0f} tokens/s on {results['threads']} threads")
        if file["accuracy"]:
            parts.append(f"accuracy {file['accuracy']['accuracy']:.1%} ({file['accuracy_change']:+.1%})")
        parts.append(f"{file['equal']['accuracy']:.1%} of {results['prompts']:,} answers equal")
        if file["cut"]:
            parts.append(f"{file['cut']:,} cut")
        if file["other_prompts"]:
            parts.append(f"{file['other_prompts']:,} prompts rendered otherwise than learned")
        found.append(f"{file['file']}: {', '.join(parts)}")
    return found
