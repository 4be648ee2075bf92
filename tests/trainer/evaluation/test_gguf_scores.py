"""Serve the GGUF files of a student that learned three skills by llama.cpp, and score them.

The student is `data/skills/student_bpe`, whose accuracy can be measured after a short training.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("xllamacpp", reason="llama.cpp's server is not installed; run `make test-gguf`")
pytest.importorskip("cyllama", reason="llama.cpp's quantiser is not installed; run `make test-gguf`")

from tests.trainer import tiny
from tests.trainer.chat_templates import SHAPES
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from tests.trainer.publish.test_gguf import STRUCTURES, speech_of
from trainer import config as settings
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.errors import StudentError
from trainer.evaluation.llama_server import serving
from trainer.model import generate, model
from trainer.publish import gguf_convert
from trainer.publish.export import export_merged
from trainer.publish.gguf_convert import GgufFacts
from trainer.training.train import train

pytestmark = pytest.mark.gguf
REPOSITORY = Path(__file__).parents[3]
SKILLS = ("upper", "date", "sql")
HELD_OUT = 60  # of each skill
KINDS = ("f16", "q8_0", "q4_k_m")


def skill_corpus(folder: Path, each: int) -> None:
    """Rows of three skills with right answers, from `data/skill_rows.py`."""
    subprocess.run([sys.executable, "data/skill_rows.py", str(folder / "rows")], cwd=REPOSITORY, check=True)
    rows = []
    for name, most, splits in (("harvest", each, ("train",)), ("test", HELD_OUT, ("held_out",))):
        lines = (folder / "rows" / f"{name}.jsonl").read_text().splitlines()
        for skill in SKILLS:
            of_skill = [
                row for row in map(json.loads, lines) if row["task"] == skill and row["split"] in splits
            ]
            rows += of_skill[:most]
    samples = [
        tiny.sample(
            number,
            row["prompt"],
            row["reference"],
            metadata_json=json.dumps({"task": row["task"], "split": row["split"]}),
        )
        for number, row in enumerate(rows)
    ]
    tiny.corpus(folder / "store", samples)


def write_toml(folder: Path, base: Path) -> Path:
    path = folder / "train.toml"
    path.write_text(
        f'[student]\nbase = "{base}"\n[data]\ncorpus = "store"\n[lora]\nrank = 32\nalpha = 64\n'
        "[train]\nepochs = 3\nbatch_tokens = 2048\nmax_length = 256\nlr = 3e-3\nthreads = 1\n"
        '[evaluate]\nmax_new_tokens = 48\nspeed_prompts = 0\nresamples = 50\n[out]\npath = "out"\n'
    )
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A trained and exported student; its train.toml is beside `merged`."""
    folder = tmp_path_factory.mktemp("limited")
    skill_corpus(folder, 500)
    config = settings.load(write_toml(folder, REPOSITORY / "data" / "skills" / "student_bpe"))
    train(config)
    export_merged(config, folder / "merged", gguf=KINDS)
    return folder


def test_the_scorecard_has_size_speed_and_accuracy_of_each_quantisation(student, run_trainer):  # noqa: F811
    code, _, err = run_trainer("evaluate", student / "train.toml", "--gguf", student / "merged")
    assert code == 0, err
    card = json.loads((student / "out" / "scorecard.json").read_text())
    facts = card["limited_devices"]
    assert facts["prompts"] == len(SKILLS) * HELD_OUT
    files = {file["kind"]: file for file in facts["files"]}
    assert tuple(files) == KINDS
    assert files["f16"]["bytes"] > files["q8_0"]["bytes"] > files["q4_k_m"]["bytes"]
    accuracy = card["macro"]["student"]["accuracy"]
    assert accuracy > 0.5  # so that a wrong answer would show
    assert (
        files["f16"]["equal"]["accuracy"] >= 0.95
    )  # with the student before its weights are rounded to bf16
    assert abs(files["q8_0"]["accuracy"]["accuracy"] - accuracy) <= 0.01
    for name, file in files.items():
        print(
            name,
            {key: file[key] for key in ("bytes", "bits_per_weight", "tokens_per_s", "accuracy", "equal")},
        )
        assert file["other_prompts"] == 0
        assert file["cut"] == card["cut"]["student"]
        assert file["tokens_per_s"] > 0
        assert f"{file['file']}: " in err
    assert files["q4_k_m"]["tensors"].keys() >= {"Q4_K", "Q5_0"}


def test_the_answers_are_those_of_the_merged_student(student):
    """The same strings, from transformers with the merged folder and from llama.cpp with the f16 file."""
    config = settings.load(student / "train.toml")
    renderer = Renderer(model.load_tokenizer(student / "merged"))
    prompts = [held.conversation for held in dataset.read(config, learns=False).held_out]
    stop = renderer.chat_shape.stop_id
    limits = generate.Limits(stop_id=stop, max_new_tokens=48, batch=64, pad_id=0)
    merged = model.load_base(student / "merged", torch.device("cpu"), dtype=torch.float32)
    expected = generate.generate(merged, renderer.prompts(prompts), limits)
    with serving(student / "merged" / "out-f16.gguf", threads=1, context=256) as server:
        served = [server.answer(server.rendered(prompt.messages), 48) for prompt in prompts]
    equal = [answer.text == renderer.decode(e.ids) for answer, e in zip(served, expected, strict=True)]
    assert sum(equal) >= 0.99 * len(prompts)
    stopped = [answer.is_cut == e.is_cut for answer, e in zip(served, expected, strict=True)]
    assert sum(stopped) >= 0.99 * len(prompts)
    assert not all(e.is_cut for e in expected)


def test_the_adapter_file_on_the_file_of_the_base_answers_as_the_merged_student(student, tmp_path):
    config = settings.load(student / "train.toml")
    base = tmp_path / "base-f16.gguf"
    speech = model.load_tokenizer(config.base)
    gguf_convert.convert(config.base, base, "f16", GgufFacts("base", {}, tokenizer=speech))
    prompts = [held.conversation for held in dataset.read(config, learns=False).held_out][::6]
    answers = {}
    for name, file, adapter in (
        ("base", base, None),
        ("adapter", base, student / "merged" / "out-adapter.gguf"),
        ("merged", student / "merged" / "out-f16.gguf", None),
    ):
        with serving(file, threads=1, context=256, adapter=adapter) as server:
            texts = [server.rendered(prompt.messages) for prompt in prompts]
            answers[name] = [server.answer(text, 48).text for text in texts]
    equal = sum(a == b for a, b in zip(answers["adapter"], answers["merged"], strict=True))
    assert equal >= len(prompts) - 1
    assert answers["base"] != answers["merged"]


TEXTS = (
    "The quick brown fox, it's 12345 times 6.7!",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 3 33 333 3333 33333",
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български ''''''```````\"\"\"\"......",
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like tea? We'Ve a'lL",
    "  leading and trailing   ",
    "say the word backwards, please\r\nsay it again",
)


@pytest.mark.parametrize("name", STRUCTURES)
def test_llama_cpp_makes_the_tokens_of_the_tokenizer(tmp_path, name):
    speech = speech_of(*STRUCTURES[name])
    base = tiny.base(tmp_path / "base", speech=speech)
    gguf_convert.convert(base, tmp_path / "x.gguf", "f16", GgufFacts("x", {}, tokenizer=speech))
    with serving(tmp_path / "x.gguf", threads=1, context=256) as server:
        for text in (*TEXTS, tiny.CHATML, "<|im_start|>user\nhi<|im_end|>\n"):
            assert server.token_ids(text) == speech(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_renders_the_prompts_that_were_learned(tmp_path, name):
    speech = SHAPES[name].tokenizer()
    base = tiny.base(tmp_path / "base", speech=speech)
    path = tiny.train_toml(tmp_path, tiny.skill(8))
    tiny.base(tmp_path / "base", speech=speech)
    config = settings.load(path)
    train(config)
    export_merged(config, tmp_path / "merged", gguf=["f16"])
    renderer = Renderer(model.load_tokenizer(base))
    talks = [
        [{"role": "user", "content": "what is\n2+2?"}],
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho, and\n\nmore"},
            {"role": "user", "content": "again"},
        ],
    ]
    system = {"role": "system", "content": "Be brief."}
    talks += [] if name == "gemma" else [[system, *talk] for talk in talks]
    with serving(tmp_path / "merged" / "out-f16.gguf", threads=1, context=256) as server:
        for talk in talks:
            text = server.rendered(talk)
            assert text == renderer.learned_prompt(talk, thinks=False)
            assert server.token_ids(text) == renderer.prompts([talk])[0]


def test_a_file_that_is_none_is_refused_with_the_words_of_llama_cpp(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    with (
        pytest.raises(StudentError, match="can't serve the file"),
        serving(tmp_path / "x.gguf", threads=1, context=64),
    ):
        pass


def test_a_student_whose_rows_fit_no_block_is_refused_by_name(tmp_path):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(8)))  # rows of 48
    train(config)
    with pytest.raises(StudentError, match="multiple of 32"):
        export_merged(config, tmp_path / "merged", gguf=["q4_k_m"])
    assert not (tmp_path / "merged").exists()
