"""List the experiments E0 to E11: what each arm harvests and how it trains.

An arm is a training that is repeated with each seed. All arms that are compared with each other make about as
many optimiser steps. E8 and E11 are `trainer loop` and `trainer curve`, see `procedures`; E13 is
`trainer onpolicy`, see `onpolicy`. E12 is what the tests prove, see `report`.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.harvests import GOLD, STRONG, UNSURE, WEAK, Harvest
from benchmarks.quality.trainings import Training

SPLITS = ("held_out", "held_out_phrasing", "held_out_task")
# Experiments beside the main claim are scored on new content alone.
CONTENT = ("held_out",)


@dataclass(frozen=True)
class Sizes:
    """How large the experiments are.

    Attributes:
        claim, claim_epochs, claim_batch_tokens: prompts of E1 and E2, passes over them, tokens of a step.
        soft, soft_epochs: of E5, E6, E7 and E9.
        many, samples, many_epochs: of E3, E4 and E10: prompts, answers to each, passes over the answers.
        batch_tokens: of the smaller experiments.
        loop_rows, loop_rounds, loop_epochs: of E8.
        curve, curve_epochs: sizes of E11 (empty: none), and passes over the largest; all make as many steps.
        test_each: every so manieth held-out row is scored.
        seeds: of every claim.
    """

    claim: int = 8000
    claim_epochs: int = 8
    claim_batch_tokens: int = 2048
    soft: int = 1000
    soft_epochs: int = 16
    many: int = 500
    samples: int = 4
    many_epochs: int = 8
    batch_tokens: int = 1024
    loop_rows: int = 300
    loop_rounds: int = 3
    loop_epochs: int = 16
    # The largest are the rows of E2; its steps are three epochs, the default of train.toml.
    curve: tuple[int, ...] = (500, 1000, 2000, 4000, 8000)
    curve_epochs: int = 3
    test_each: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Sizes()
# As many rows as fit into 90 seconds: it shows that all parts work, not what the method reaches.
SMOKE = Sizes(
    claim=400,
    claim_epochs=8,
    claim_batch_tokens=512,
    soft=400,
    soft_epochs=8,
    batch_tokens=512,
    curve=(),
    test_each=8,
    seeds=(0,),
)
SMOKE_ARMS = ("E2", "E2 small", "E5")


@dataclass(frozen=True)
class Arm:
    """A student of an experiment.

    Attributes:
        name: "E3", or "E10 none" where an experiment has several.
        what: how it differs, in words.
        has_one_seed: trained with the first seed alone, since no gate and no claim rests on it.
    """

    name: str
    what: str
    training: Training
    has_one_seed: bool = False

    def seeds(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the seeds that it is trained with."""
        return sizes.seeds[:1] if self.has_one_seed else sizes.seeds


def arms(sizes: Sizes) -> dict[str, Arm]:
    """Return all arms by name."""
    each = sizes.test_each
    small = {"batch_tokens": sizes.batch_tokens}
    claim = Harvest(STRONG, sizes.claim, splits=SPLITS, test_each=each)
    gold = Harvest(GOLD, sizes.claim, splits=SPLITS, test_each=each)
    soft = Harvest(WEAK, sizes.soft, top_logprobs=5, splits=CONTENT, test_each=each)
    # Text and tail of this one are unbiased, since it is sampled at temperature 1; renormalising is not.
    unsure = Harvest(UNSURE, sizes.soft, temperature=1.0, top_logprobs=5, splits=CONTENT, test_each=each)
    greedy = Harvest(WEAK, sizes.many, splits=CONTENT, test_each=each)
    budget = Harvest(WEAK, sizes.many * sizes.samples, splits=CONTENT, test_each=each)
    several = Harvest(WEAK, sizes.many, sizes.samples, 0.7, splits=CONTENT, test_each=each)
    clean = Harvest(STRONG, sizes.many, sizes.samples, 0.7, splits=CONTENT, test_each=each)
    corrupted = Harvest(STRONG, sizes.many, sizes.samples, 0.7, corrupted=0.1, splits=CONTENT, test_each=each)
    once, often = sizes.many_epochs, sizes.many_epochs * sizes.samples

    def of_claim(harvest: Harvest) -> Training:
        settings = {"batch_tokens": sizes.claim_batch_tokens}
        return Training(harvest, sizes.claim_epochs, train=settings, has_scorecard=True)

    def of_soft(
        student: str = "student", harvest: Harvest = soft, *, knows_all: bool = False, **train: object
    ) -> Training:
        settings = {**small, **train}
        return Training(harvest, sizes.soft_epochs, student, train=settings, knows_all=knows_all)

    def of_many(harvest: Harvest, epochs: int = once, **data: object) -> Training:
        return Training(harvest, epochs, data=data, train=small)

    kl = {"soft_targets": "auto"}
    listed = (
        Arm("E1", "right answers instead of the teacher's, one seed", of_claim(gold), has_one_seed=True),
        Arm("E2", "the teacher's greedy answers", of_claim(claim)),
        Arm("E2 small", "weaker teacher, few rows, text alone", of_soft()),
        Arm("E5", "with the top 5 probabilities and a tail", of_soft(**kl)),
        Arm("E6", "the top 5 renormalised, without a tail", of_soft(**kl, soft_tail="renormalise")),
        Arm("E7", "with all 688 probabilities, read from the weights", of_soft(knows_all=True, **kl)),
        Arm("E2 unsure", "unsure teacher, sampled, text alone", of_soft(harvest=unsure)),
        Arm("E5 unsure", "with its top 5 and a tail", of_soft(harvest=unsure, **kl)),
        Arm("E6 unsure", "its top 5 renormalised", of_soft(harvest=unsure, **kl, soft_tail="renormalise")),
        Arm("E3 greedy", "weaker teacher, one greedy answer a prompt", of_many(greedy, often)),
        Arm("E3 budget", "weaker teacher, greedy, as many answers as E3", of_many(budget)),
        Arm("E3", "weaker teacher, four answers a prompt at temperature 0.7", of_many(several)),
        Arm("E4", "those of E3 that pass the verifier", of_many(several, answers="verified")),
        Arm("E9 text", "BPE student, text alone", of_soft("student_bpe")),
        Arm("E9", "BPE student, probabilities by byte anchors", of_soft("student_bpe", **kl)),
        Arm("E10 clean", "four answers a prompt at temperature 0.7", of_many(clean)),
        Arm("E10 none", "a tenth of them corrupted", of_many(corrupted)),
        Arm("E10 majority", "the most frequent answer", of_many(corrupted, answers="majority")),
        Arm("E10 verified", "those that pass the verifier", of_many(corrupted, answers="verified")),
    )
    return {arm.name: arm for arm in listed}
