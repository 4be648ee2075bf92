"""Run the rounds of an on-policy distillation (`trainer onpolicy`): answer, score, one step.

Everything is a function of settings, prompts, base and the teacher's scores. Answers are kept in files named
after their round, with the hash of the student that gave them; scores are in the store; weights, moments and
the report are in a checkpoint after each round. So a killed run goes on with the same bits, and pays for no
score twice. Other settings get a folder of their own.

    runs/KEY/checkpoints/...      weights, moments, and the figures of all rounds
    runs/KEY/answers/NAME.json    token ids of the answers
    runs/KEY/texts/NAME.jsonl     the texts that were sent
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from harvester.store.reader import Corpus
from harvester.system import failpoints
from harvester.system.files import sha256_of
from harvester.terms.lineage import FACT_COLUMNS
from trainer.config import OutSection
from trainer.data.chat_template import Example, Renderer
from trainer.data.conversation import Conversation
from trainer.data.dataset import COLUMNS, Rows
from trainer.data.student_tokens import StudentTokens
from trainer.data.teacher_tokens import TokenTable
from trainer.data.tokens.builder import Progress, no_progress
from trainer.errors import DataError
from trainer.experiments.harvest_file import teacher_id
from trainer.experiments.harvests import Harvests
from trainer.experiments.pool import PoolPrompt
from trainer.experiments.power_law import Floats, percentiles
from trainer.experiments.trainings import Note, digest
from trainer.files import read_json, write_json, write_text
from trainer.model import model, weights
from trainer.model.generate import Answer
from trainer.onpolicy import prompts
from trainer.onpolicy.config import OnPolicyFiles
from trainer.onpolicy.distributions import with_distributions
from trainer.onpolicy.groups import Groups, advantages, divergence, without_mean
from trainer.onpolicy.student import WEIGHTS, OnPolicyStudent
from trainer.onpolicy.texts import (
    TeacherTemplate,
    TextToScore,
    count_answers,
    dollars_of_scores,
    groups_of,
    known_epochs,
    read_scores,
    text_to_score,
)
from trainer.provenance import fingerprint, terms_check
from trainer.publish import serving
from trainer.publish.adapter import write_adapter
from trainer.training.forward import TokenScores
from trainer.training.output_folders import CHECKPOINTS

SCHEMA = "trainer.onpolicy/1"
# Member of a measurement in the checkpoint: sums of log-ratios and scored tokens of each held-out prompt.
BY_PROMPT = "by_prompt"
# Version of what a run is known by: a new one repeats everything.
FORMAT = 1
# Settings that change no weight.
_FREE = frozenset({"rounds", "max_usd", "max_tokens", "resamples", "out", "harvest", "train", "via"})
_FREE_TRAIN = {
    *("log_every", "log_every_s", "save_every", "trackers", "checkpointing", "shard"),
    *("lr", "epochs", "max_steps", "warmup", "schedule", "lr_floor"),
}


class BudgetEnded(Exception):
    """The budget allows no further scores."""


class OnPolicy:
    """Runs one on-policy distillation.

    Raises:
        DataError: no prompts. StudentError: base, adapter or the teacher's tokenizer can't be used.
    """

    def __init__(
        self, files: OnPolicyFiles, on_note: Note = lambda _: None, on_progress: Progress = no_progress
    ) -> None:
        self._files = files
        self._settings = files.config
        self._on_note = on_note
        self._on_progress = on_progress
        train = files.train.train
        train = train.model_copy(update={"lr": files.config.lr or train.lr, "soft_targets": "off"})
        self._config = model.fit_to_device(files.train.model_copy(update={"train": train}))
        weights.check_base(self._config.base, self._config.student.sha256)
        if files.start is not None:
            weights.check_adapter(files.start)
        model.set_threads(self._config.train)
        self._renderer = Renderer(model.load_tokenizer(self._config.base, self._config.template))
        self._tokens = StudentTokens(self._renderer)
        self._template = TeacherTemplate(_teacher_renderer(files))
        learned, held_out = prompts.read_prompts(files)
        self._learned = [prompt for prompt in learned if self._template.knows(prompt)]
        self._held_out = [prompt for prompt in held_out if self._template.knows(prompt)]
        self._left_out = len(learned) + len(held_out) - len(self._learned) - len(self._held_out)
        if not self._learned or not self._held_out:
            raise DataError(
                "every prompt holds a special token of the teacher",
                place=", ".join(map(str, files.prompts)),
                remedy="remove texts such as <|im_start|> from the prompts; the teacher's chat template "
                "adds them",
            )
        self._folder = files.folder / "runs" / self._key()[:16]
        self._harvests = Harvests(files)
        self._teacher_id = teacher_id(files.harvest)
        self._student = OnPolicyStudent(self._config, self._renderer, files.start)
        self._rounds: list[dict[str, Any]] = []
        self._measured: list[dict[str, Any]] = []

    def _key(self) -> str:
        """Return what the run is known by: the hash of all that its weights depend on but the scores."""
        start = self._files.start
        table = self._files.harvest_table.get("teacher", {})
        quantise = self._config.student.quantise
        cuts = serving.other_stops(self._config, self._renderer)
        return digest(
            {
                "format": FORMAT,
                "base": weights.base_sha256(self._config.base),
                **({} if quantise == "none" else {"quantise": quantise}),
                **({"cuts": cuts} if cuts else {}),
                "template": self._renderer.template_sha256,
                "teacher": [table.get("preset"), table.get("base_url"), table.get("model")],
                "start": None if start is None else sha256_of(start / WEIGHTS),
                "settings": self._settings.model_dump(mode="json", exclude=self._not_hashed()),
                "lr": self._config.train.lr,
                "lora": self._config.lora.model_dump(mode="json"),
                "train": self._config.train.model_dump(mode="json", exclude=_FREE_TRAIN),
                "prompts": [[prompt.key for prompt in part] for part in (self._learned, self._held_out)],
            }
        )

    def _not_hashed(self) -> set[str]:
        """Return settings that change no weight, and a `top_logprobs` that earlier versions did not have."""
        return set(_FREE) if self._settings.top_logprobs is not None else {*_FREE, "top_logprobs"}

    def run(self) -> dict[str, Any]:
        """Run all rounds; return the content of onpolicy.json (see trainer/CONFIG.md).

        Raises:
            HarvestFailed: a scoring run ended early. DataError: no answer could be scored.
            TermsRefused: the terms do not permit training.
        """
        ending = "complete"
        done = self._restore()
        try:
            if not self._measured:
                self._measure(0)
                self._save(0)
            for number in range(done + 1, self._settings.rounds + 1):
                self._round(number)
                if self._is_measured(number):
                    self._measure(number)
                self._save(number)
            if self._rounds and self._measured[-1]["round"] != len(self._rounds):
                self._measure(len(self._rounds))  # fewer rounds were asked for than are done
        except BudgetEnded:
            ending = "budget"
        if not self._rounds:
            raise DataError(
                "the distillation ended before its first round was complete",
                place=str(self._files.train.corpus),
                remedy="raise max_usd or max_tokens",
            )
        adapter = self._write_adapter()
        return self._result(ending, adapter)

    def _is_measured(self, number: int) -> bool:
        every = self._settings.held_out_every
        return number == self._settings.rounds or (every > 0 and number % every == 0)

    def _restore(self) -> int:
        newest, skipped = self._student.restore(self._folder / CHECKPOINTS)
        for line in skipped:
            self._on_note(f"checkpoint skipped: {line}")
        if newest is None:
            return 0
        self._rounds = list(newest.state["rounds"])
        self._measured = list(newest.state["held_out"])
        if newest.step:
            self._on_note(f"{newest.step} rounds are done before")
        return newest.step

    def _save(self, number: int) -> None:
        state = {"rounds": self._rounds, "held_out": self._measured}
        self._student.save(self._folder / CHECKPOINTS, number, state)
        failpoints.reach("onpolicy.saved")

    def _round(self, number: int) -> None:
        """Answer, score and learn once."""
        settings = self._settings
        asked = prompts.of_round(self._learned, number, settings.prompts_per_round, settings.seed)
        chosen = [prompt for prompt in asked for _ in range(settings.samples)]
        seeds = [
            prompts.sample_seed(settings.seed, number, f"{prompt.key} {at // settings.samples}", at)
            for at, prompt in enumerate(chosen)
        ]
        examples, answers, groups = self._scored(f"round-{number:06d}", chosen, seeds)
        student = self._student.scores(examples)
        scored = sum(each.scored for each in groups)
        if not scored:
            raise self._unscored(f"{len(answers):,} answers of round {number}")
        values = [
            advantages(each, mine.log_probs, settings.advantage_clip)
            for each, mine in zip(groups, student, strict=True)
        ]
        if settings.baseline == "mean":
            values = without_mean(groups, values)
        values = [
            np.where(np.isnan(mine.divergences), value, np.float32(1.0))
            for value, mine in zip(values, student, strict=True)
        ]
        step = self._student.learn(number - 1, examples, values, scored)
        failpoints.reach("onpolicy.learned")
        total = sum(divergence(each, *mine) for each, mine in zip(groups, student, strict=True))
        counts = self._counts(answers, groups, student)
        self._rounds.append(
            {"round": number, "reverse_kl": total / scored, "gradient_norm": float(step.norm), **counts}
        )
        self._on_progress(number, settings.rounds, f"reverse KL {total / scored:.3f} nats per token")

    def _measure(self, number: int) -> None:
        """Let the student answer the held-out prompts, always with the same seeds, and score the answers."""
        settings = self._settings
        chosen = [prompt for prompt in self._held_out for _ in range(settings.held_out_samples)]
        seeds = [
            prompts.sample_seed(settings.seed, 0, prompt.key, at % settings.held_out_samples)
            for at, prompt in enumerate(chosen)
        ]
        examples, answers, groups = self._scored(f"held-out-{number:06d}", chosen, seeds)
        student = self._student.scores(examples)
        sums = np.array([divergence(each, *mine) for each, mine in zip(groups, student, strict=True)])
        tokens = np.array([g.scored for g in groups], dtype=np.float64)
        if not tokens.sum():
            raise self._unscored(f"{len(answers):,} held-out answers")
        by_prompt = [part.reshape(-1, settings.held_out_samples).sum(axis=1) for part in (sums, tokens)]
        means = _resampled(by_prompt, settings.resamples, settings.seed)
        value = float(sums.sum() / tokens.sum())
        counts = self._counts(answers, groups, student)
        entry = {"round": number, "reverse_kl": value, **_interval(means), **counts}
        self._measured.append({**entry, BY_PROMPT: [part.tolist() for part in by_prompt]})
        self._on_note(f"round {number}: held-out reverse KL {value:.4f} nats per token")

    def _counts(
        self, answers: Sequence[Answer], groups: Sequence[Groups], student: Sequence[TokenScores]
    ) -> dict[str, int]:
        counts = count_answers(answers, groups)
        if self._settings.top_logprobs is not None:
            counts["listed_tokens"] = sum(int((~np.isnan(each.divergences)).sum()) for each in student)
        return counts

    def _scored(
        self, name: str, chosen: Sequence[PoolPrompt], seeds: Sequence[int]
    ) -> tuple[list[Example], list[Answer], list[Groups]]:
        """Answer prompts, let the teacher score the answers, and return both by token."""
        prompt_ids = self._renderer.prompts([Conversation(prompt.messages) for prompt in chosen])
        answers = self._answers(name, prompt_ids, seeds)
        failpoints.reach("onpolicy.answered")
        lead = self._renderer.chat_shape.lead
        texts = [
            text_to_score(prompt, answer, self._tokens, lead, self._template, f"{self._id(name)}-{at}")
            for at, (prompt, answer) in enumerate(zip(chosen, answers, strict=True))
        ]
        self._ask(name, [text for text in texts if text is not None])
        failpoints.reach("onpolicy.scored")
        corpus = Corpus.open(self._files.train.corpus)
        self._require_permission(corpus)
        table = None if self._settings.top_logprobs is None else TokenTable()
        sent = [text for text in texts if text is not None]
        epochs = self._epochs()
        by_text = read_scores(corpus, sent, self._teacher_id, table, epochs=epochs)
        scores = [None if text is None else by_text.get(text.asked) for text in texts]
        stop = self._renderer.chat_shape.stop_id
        examples, groups = [], []
        for ids, answer, text, scored in zip(prompt_ids, answers, texts, scores, strict=True):
            whole = [*ids, *answer.ids, *([] if answer.is_cut else [stop])]
            examples.append(Example(np.asarray(whole, dtype=np.int32), len(ids), not answer.is_cut))
            groups.append(groups_of(answer, text, scored, self._tokens))
        if table is not None:
            examples = with_distributions(examples, texts, scores, groups, table, self._renderer)
        return examples, answers, groups

    def _epochs(self) -> tuple[int, ...]:
        return known_epochs(self._files.train.corpus, self._files.harvest_table)

    def _unscored(self, answers: str) -> DataError:
        return DataError(
            f"none of {answers} could be scored",
            place=str(self._files.train.corpus),
            remedy="`harvester report` shows the replies; does teacher_tokenizer belong to the teacher?",
        )

    def _id(self, name: str) -> str:
        """Return the first part of the ids of lines; two runs in one store have different ones."""
        return f"{self._folder.name}-{name}"

    def _answers(self, name: str, ids: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Answer]:
        """Sample answers, or find those that this student gave before it was killed."""
        path = self._folder / "answers" / f"{name}.json"
        key = digest([self._student.sha256(), ids, seeds])
        stored = read_json(path)
        if isinstance(stored, dict) and stored.get("key") == key:
            found = [Answer(tuple(tokens), is_cut) for tokens, is_cut in stored["answers"]]
            # Earlier versions sampled tokens that the tokenizer lacks, and ended there.
            if all(token < len(self._tokens.data) for answer in found for token in answer.ids):
                return found
        count = len(ids)
        answers = self._student.answer(
            ids,
            seeds,
            self._settings.max_new_tokens,
            lambda done: self._on_progress(done, count, f"answers of {name}"),
            self._on_note,
        )
        write_json(path, {"key": key, "answers": [[list(a.ids), a.is_cut] for a in answers]})
        return answers

    def _ask(self, name: str, texts: Sequence[TextToScore]) -> None:
        """Let the teacher score texts; equal ones are asked once."""
        unique = {text.asked: text for text in texts}
        if not unique:
            return
        path = self._folder / "texts" / f"{name}.jsonl"
        lines = [json.dumps(text.line, ensure_ascii=False) for text in unique.values()]
        write_text(path, "".join(f"{line}\n" for line in lines))
        if not self._harvests.run_scoring(path, self._settings.via, self._settings.top_logprobs):
            raise BudgetEnded

    def _require_permission(self, corpus: Corpus) -> None:
        terms_check.require_permission(self._config, tuple(corpus.lineages()), corpus.distinct(FACT_COLUMNS))

    def _write_adapter(self) -> str:
        """Write the adapter with its documents; the rows it names are the scored texts of the rounds."""
        names = {self._id(f"round-{row['round']:06d}") for row in self._rounds}
        corpus = Corpus.open(self._files.train.corpus)
        origins: dict[str, str] = {}
        learned = []
        columns = list(dict.fromkeys((*COLUMNS, *fingerprint.ORIGIN_COLUMNS)))
        for sample in corpus.samples(columns):
            if sample.outcome == "scored" and sample.prompt_id.rpartition("-")[0] in names:
                if sample.key not in origins:
                    learned.append(sample)
                origins[sample.key] = fingerprint.origin_sha256(sample)
        learned.sort(key=lambda sample: sample.key)
        rows = Rows(tuple(learned), (), {}, tuple(corpus.lineages()), origins)
        config = self._config.model_copy(
            update={
                "out": OutSection(
                    path=str(self._files.folder), name=self._config.name, licence=self._config.out.licence
                )
            }
        )
        answers = sum(row["answers"] for row in self._rounds)
        start = self._files.start
        began = "" if start is None else f"; began with the adapter {sha256_of(start / WEIGHTS)}"
        words = f"{len(self._rounds):,} steps on {answers:,} of the student's own answers{began}"
        return str(write_adapter(self._student.model, self._renderer, config, rows, on_policy=words))

    def _result(self, ending: str, adapter: str) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "ending": ending,
            "seed": self._settings.seed,
            "top_logprobs": self._settings.top_logprobs,
            "prompts": len(self._learned),
            "held_out_prompts": len(self._held_out),
            "left_out": self._left_out,
            "rounds": self._rounds,
            "held_out": [{k: v for k, v in row.items() if k != BY_PROMPT} for row in self._measured],
            "fall": self._fall(),
            "dollars": dollars_of_scores(
                Corpus.open(self._files.train.corpus), self._teacher_id, self._epochs()
            ),
            "adapter": adapter,
            "adapter_sha256": self._student.sha256(),
        }

    def _fall(self) -> dict[str, float]:
        """Return by how much the held-out divergence fell, with its interval over the same prompts."""
        first, last = self._measured[0], self._measured[-1]
        drawn = [
            _resampled(
                [np.asarray(part, dtype=np.float64) for part in row[BY_PROMPT]],
                self._settings.resamples,
                self._settings.seed,
            )
            for row in (first, last)
        ]
        return {"value": first["reverse_kl"] - last["reverse_kl"], **_interval(drawn[0] - drawn[1])}


def _teacher_renderer(files: OnPolicyFiles) -> Renderer | None:
    folder = files.teacher_tokenizer
    return None if folder is None else Renderer(model.load_tokenizer(folder, None))


def _resampled(by_prompt: Sequence[Floats], resamples: int, seed: int) -> Floats:
    """Return means over tokens of resampled prompts; equal seeds draw the same prompts."""
    sums, tokens = by_prompt
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    drawn_tokens = tokens[draws].sum(axis=1)
    means: Floats = sums[draws].sum(axis=1) / np.where(drawn_tokens > 0, drawn_tokens, 1.0)
    return means


def _interval(means: Floats) -> dict[str, float]:
    """Return the 95 % interval."""
    low, high = percentiles(means)
    return {"low": low, "high": high}
