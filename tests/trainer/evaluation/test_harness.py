"""Score models by lm-evaluation-harness on a task of local files, and read its results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.trainer import tiny
from tests.trainer.chat_templates import SHAPES
from tests.trainer.command_line import RunTrainer, run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.data.chat_template import Renderer
from trainer.evaluation import harness
from trainer.evaluation.harness import metrics
from trainer.evaluation.scorecard import wilson_interval
from trainer.training.train import train

TASK = """\
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def test_metrics_have_intervals_and_shares_no_point() -> None:
    found = metrics(
        {
            "alias": "letters",
            "acc,none": 1.0,
            "acc_stderr,none": 0.0,
            "bits,none": 2.0,
            "bits_stderr,none": 0.5,
            "bleu,none": 7,
            "bleu_stderr,none": "N/A",
        },
        20,
    )
    assert found["acc,none"] == {
        "value": 1.0,
        **{k: v for k, v in wilson_interval(20, 20).items() if k != "accuracy"},
    }
    assert found["acc,none"]["low"] < 0.85
    assert found["bits,none"] == {
        "value": 2.0,
        "low": pytest.approx(1.02, abs=1e-4),
        "high": pytest.approx(2.98, abs=1e-4),
    }
    assert found["bleu,none"] == {"value": 7.0}
    assert set(found) == {"acc,none", "bits,none", "bleu,none"}


def test_without_the_harness_nothing_is_scored(run_trainer: RunTrainer, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tiny.train_toml(tmp_path, tiny.skill(3, held_out=1))
    code, _, err = run_trainer("evaluate", str(path), "--harness", "letters")
    assert code == 2
    assert "blackbox-distillation[harness]" in err


def test_every_model_is_asked_in_the_template_that_was_learned(tmp_path, monkeypatch) -> None:
    """Qwen 3's own template leaves out the empty think block before answers without reasoning."""
    path = tiny.train_toml(tmp_path, tiny.skill(8, held_out=2), train={"max_steps": 1})
    tiny.base(tmp_path / "base", speech=SHAPES["qwen-3"].tokenizer())
    config = settings.load(path)
    train(config)
    (config.out_path / "scorecard.json").write_text("{}")
    asked: list[str] = []
    user = [{"role": "user", "content": "hi"}]

    def score(_config, folders, _choice):
        # As HFLM does: the tokenizer it is given, else that of the model.
        speech = AutoTokenizer.from_pretrained(folders.get("tokenizer") or folders["pretrained"])
        asked.append(speech.apply_chat_template(user, tokenize=False, add_generation_prompt=True))
        return "1", {}

    monkeypatch.setattr(harness, "_score", score)
    monkeypatch.setattr(harness, "require_installed", lambda: None)
    harness.run(config, harness.HarnessChoice(("letters",)))
    renderer = Renderer(AutoTokenizer.from_pretrained(config.base))
    assert renderer.chat_shape.scaffold
    assert asked == [renderer.learned_prompt(user, thinks=False)] * 2


@pytest.mark.harness
@pytest.mark.filterwarnings("ignore")  # those of the harness and its libraries
def test_base_student_and_merged_student_are_scored_on_a_task_of_local_files(
    run_trainer: RunTrainer,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = tiny.train_toml(tmp_path, tiny.skill(40, held_out=10), train={"epochs": 12})
    toml, merged = str(path), tmp_path / "merged"
    for words in (("train", toml), ("export", toml, str(merged))):
        code, _, err = run_trainer(*words)
        assert code == 0, err
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = tasks / "rows.jsonl"
    examples = [{"question": f"{n} a b", "choices": ["c", "d"], "label": n % 2} for n in range(6)]
    rows.write_text("".join(json.dumps(example) + "\n" for example in examples))
    (tasks / "letters.yaml").write_text(TASK.format(rows=rows))
    flags = ("--harness", "letters", "--harness-tasks", str(tasks), "--merged", str(merged))
    code, out, err = run_trainer("evaluate", toml, *flags, "--json")
    assert code == 0, err
    card = json.loads(out.strip().splitlines()[-1])
    stored = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert stored["harness"] == card["harness"]
    models = card["harness"]["models"]
    assert set(models) == {"base", "student", "merged"}
    values = {name: found["letters"]["acc,none"]["value"] for name, found in models.items()}
    assert values["student"] == values["merged"]
    assert all(0 <= value <= 1 for value in values.values())
    code, _, err = run_trainer("evaluate", toml, "--harness", "no-such-task", "--harness-tasks", str(tasks))
    assert code == 2
    assert "no-such-task" in err
