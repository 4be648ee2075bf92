"""Judge answers by the verifiers of their tasks. Every judgement has a verdict, and names its reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError
from harvester.quality.verifiers import code_check, comparisons
from harvester.quality.verifiers.settings import EVERY_TASK, VerifierSection, VerifySection
from harvester.system import json_schema
from harvester.system.limited_child import ChildError, LimitedChild, for_text

# Time limit of importing a verifier's function.
IMPORT_TIMEOUT_S = 120.0


class AnswerVerdict(StrEnum):
    """What a verifier says of an answer."""

    PASSED = "passed"
    FAILED = "failed"
    UNVERIFIABLE = "unverifiable"  # nobody can say: see the reason


class Reason(StrEnum):
    """Why an answer has its verdict."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNUSABLE = "unusable outcome"  # truncated, empty, refused, ...: failed
    NO_VERIFIER = "no verifier for its task"
    NO_REFERENCE = "no reference"
    BAD_REFERENCE = "unusable reference"  # without a number or letter where one is compared
    TOO_SLOW = "check too slow"
    TOO_LARGE = "check out of memory or its process died"
    RAISED = "check raised an error"
    NOT_BOOLEAN = "function returned neither True nor False"


_VERDICTS = {
    Reason.CORRECT: AnswerVerdict.PASSED,
    Reason.WRONG: AnswerVerdict.FAILED,
    Reason.UNUSABLE: AnswerVerdict.FAILED,
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, derived from its reason; `detail` is the message of an error that a function raised."""

    reason: Reason
    detail: str = ""

    @property
    def verdict(self) -> AnswerVerdict:
        """Passed, failed or unverifiable."""
        return _VERDICTS.get(self.reason, AnswerVerdict.UNVERIFIABLE)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer to judge, and what its prompt says of it.

    `text` is the completion, `outcome` that of the answer (`ok` is the only usable one).
    """

    text: str | None
    outcome: str
    reference: str | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The prompt's task, "" for none."""
        task = self.metadata.get("task")
        return task if isinstance(task, str) else ""


class Verifiers:
    """The verifiers of a `[verify]` table. Safe to share between threads.

    Args:
        folder: of the configuration file; modules in it are found by `function`.
    """

    def __init__(self, section: VerifySection, folder: Path) -> None:
        self._section = section
        self._folder = str(folder.resolve())
        self._children = {
            task: LimitedChild(verifier.memory_mib << 20)
            for task, verifier in section.items()
            if verifier.kind == "python"
        }
        self._loaded: set[str] = set()

    def __bool__(self) -> bool:
        """Whether there is any verifier."""
        return bool(self._section)

    def require_functions(self) -> None:
        """Import every function, so that a misspelt one is found before answers are paid for.

        Raises:
            ConfigError: a function can't be imported within the limits.
        """
        for task in self._children:
            try:
                self._load(task)
            except (TimeoutError, MemoryError, ChildError) as error:
                problem = f"{error.kind}: {error}" if isinstance(error, ChildError) else type(error).__name__
                raise ConfigError(
                    f"the function {self._section[task].function} can't be imported ({problem})",
                    place=f"verify.{task}.function",
                    remedy="name package.module:function; modules beside the configuration file are found",
                ) from None

    def name_for(self, candidate: Candidate) -> str | None:
        """Return the table that applies: of the task, else of the first tag that has one, else `*`."""
        names = (candidate.task, *candidate.tags, EVERY_TASK)
        return next((name for name in names if name in self._section), None)

    def kind_for(self, candidate: Candidate) -> str | None:
        """Return the kind of verifier that judges a candidate; None without one."""
        name = self.name_for(candidate)
        return None if name is None else self._section[name].kind

    def judge(self, candidate: Candidate) -> Judgement:
        """Judge an answer. May wait as long as the `timeout_s` of its verifier."""
        name = self.name_for(candidate)
        if name is None:
            return Judgement(Reason.NO_VERIFIER)
        if candidate.outcome != "ok" or candidate.text is None:
            return Judgement(Reason.UNUSABLE, candidate.outcome)
        verifier = self._section[name]
        if verifier.kind in {"json_schema", "regex", "python"}:
            return self._judge_limited(name, verifier, candidate, candidate.text)
        if verifier.kind == "code":
            return _judge_code(verifier, candidate, candidate.text)
        if candidate.reference is None:
            return Judgement(Reason.NO_REFERENCE)
        return _compared(verifier, candidate.text, candidate.reference)

    def _judge_limited(
        self, name: str, verifier: VerifierSection, candidate: Candidate, text: str
    ) -> Judgement:
        try:
            if verifier.kind == "python":
                is_right = self._call(name, verifier, candidate, text)
            else:
                is_right = _check(verifier, text)
        except TimeoutError:
            self._loaded.discard(name)
            return Judgement(Reason.TOO_SLOW)
        except MemoryError as error:
            self._loaded.discard(name)
            return Judgement(Reason.TOO_LARGE, str(error))
        except ChildError as error:
            if verifier.kind == "json_schema" and error.kind == "JSONDecodeError":
                return Judgement(Reason.WRONG, "no JSON")
            return Judgement(Reason.RAISED, f"{error.kind}: {error}")
        if is_right is None:
            return Judgement(Reason.NOT_BOOLEAN)
        return Judgement(Reason.CORRECT if is_right else Reason.WRONG)

    def _call(self, name: str, verifier: VerifierSection, candidate: Candidate, text: str) -> bool | None:
        self._load(name)
        verdict: bool | None = self._children[name].call(
            "harvester.quality.verifiers.limited_checks:call_function",
            self._folder,
            verifier.function,
            text,
            candidate.reference,
            json.dumps(dict(candidate.metadata)),
            timeout_s=verifier.timeout_s,
        )
        return verdict

    def _load(self, name: str) -> None:
        """Import the function, which may take longer than a call is given."""
        if name in self._loaded:
            return
        function = self._section[name].function
        self._children[name].call(
            "harvester.quality.verifiers.limited_checks:load_function",
            self._folder,
            function,
            timeout_s=IMPORT_TIMEOUT_S,
        )
        self._loaded.add(name)


def _judge_code(verifier: VerifierSection, candidate: Candidate, text: str) -> Judgement:
    """Run the code of an answer with the tests that its prompt's metadata or reference holds."""
    tests = candidate.metadata.get(verifier.tests)
    if not isinstance(tests, str):
        tests = candidate.reference
    if tests is None or not tests.strip():
        return Judgement(Reason.NO_REFERENCE)
    problem = code_check.run(
        code_check.code_in(text), tests, timeout_s=verifier.timeout_s, memory_bytes=verifier.memory_mib << 20
    )
    return Judgement(Reason.CORRECT) if problem is None else Judgement(Reason.WRONG, problem)


def _compared(verifier: VerifierSection, text: str, reference: str) -> Judgement:
    is_right: bool | None
    if verifier.kind == "exact":
        is_right = comparisons.is_exact(text, reference)
    elif verifier.kind == "normalised":
        is_right = comparisons.is_normalised_equal(text, reference)
    elif verifier.kind == "contains":
        is_right = comparisons.contains_reference(text, reference)
    elif verifier.kind == "numeric":
        is_right = comparisons.is_number_near(text, reference, verifier.tolerance, verifier.relative)
    else:
        is_right = comparisons.is_choice(text, reference, verifier.choices)
    if is_right is None:
        return Judgement(Reason.BAD_REFERENCE)
    return Judgement(Reason.CORRECT if is_right else Reason.WRONG)


def _check(verifier: VerifierSection, text: str) -> bool:
    if verifier.kind == "regex":
        call = "harvester.quality.verifiers.limited_checks:has_pattern"
        return bool(for_text.call(call, text, verifier.pattern, timeout_s=verifier.timeout_s))
    return json_schema.is_valid_within(text, json_schema.encoded(verifier.json_schema), verifier.timeout_s)
