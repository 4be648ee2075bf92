"""Read GGUF files of a student back: weights, tokenizer, template, ends, origin; and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from tests.trainer import tiny
from tests.trainer.architectures import bases
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.errors import ConfigError, StudentError
from trainer.provenance import fingerprint
from trainer.publish import gguf_convert, gguf_files
from trainer.publish.export import export_merged
from trainer.publish.gguf_convert import GgufFacts
from trainer.publish.gguf_tokenizer import pre_tokenizer_by_structure
from trainer.training.train import train

REPOSITORY = Path(__file__).parents[3]
SHAPE = {"hidden_size": 64, "intermediate_size": 256}


def trained(folder: Path, lora=None, speech=None) -> settings.TrainConfig:
    path = tiny.train_toml(folder, tiny.skill(24), lora=lora or {})
    tiny.base(folder / "base", speech=speech, **SHAPE)
    config = settings.load(path)
    train(config)
    return config


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A merged student with GGUF files. Its answers end at another token than the tokenizer's end of text."""
    folder = tmp_path_factory.mktemp("gguf")
    config = trained(folder, {"rslora": True}, speech=tiny.tokenizer(eos="</s>"))
    export_merged(config, folder / "merged", gguf=["f16", "q8_0"])
    return folder


def read(file: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Return the entries and the dequantised tensors of a file."""
    reader = gguf.GGUFReader(file)
    entries = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return entries, tensors


def test_a_file_has_tokenizer_template_ends_and_origin(exported):
    merged = exported / "merged"
    entries, _ = read(merged / "out-q8_0.gguf")
    speech = AutoTokenizer.from_pretrained(merged)
    template = (merged / "chat_template.jinja").read_bytes().decode()
    assert entries["tokenizer.chat_template"] == template == speech.chat_template
    assert entries["tokenizer.ggml.tokens"] == speech.convert_ids_to_tokens(range(len(speech)))
    assert entries["tokenizer.ggml.pre"] == "gpt-2"
    assert entries["tokenizer.ggml.add_bos_token"] is False
    ends = [entries[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot")]
    assert speech.convert_ids_to_tokens(ends) == ["</s>", "<|im_end|>"]
    assert entries["general.type"] == "model"
    assert entries["general.name"] == "out"
    assert entries["general.license"] == "apache-2.0"
    assert entries["general.base_model.0.name"] == "Base"
    assert "general.finetune" not in entries
    assert entries["distillation.teachers"] == ["http://127.0.0.1/v1|mock"]
    assert entries["distillation.terms"] == ["mock-teacher"]
    assert entries["distillation.base_sha256"]


def test_the_weights_are_those_of_the_base_and_the_adapter(exported, tmp_path):
    """W + alpha / sqrt(rank) * B A, from three files that the converter wrote apart."""
    merged = exported / "merged"
    base = exported / "base"
    speech = AutoTokenizer.from_pretrained(base)
    gguf_convert.convert(base, tmp_path / "base.gguf", "f32", GgufFacts("base", {}, tokenizer=speech))
    _, before = read(tmp_path / "base.gguf")
    entries, adapter = read(merged / "out-adapter.gguf")
    assert (entries["general.type"], entries["adapter.type"]) == ("adapter", "lora")
    for file, most in (("out-f16.gguf", 1e-3), ("out-q8_0.gguf", 1e-2)):
        _, after = read(merged / file)
        assert after.keys() == before.keys()
        adapted = {name.rpartition(".")[0] for name in adapter}
        for name, weight in after.items():
            expected = before[name]
            if name in adapted:
                a, b = (adapter[f"{name}.lora_{part}"] for part in "ab")
                expected = expected + entries["adapter.lora.alpha"] / len(a) * b @ a
            assert np.abs(weight - expected).max() <= most * np.abs(expected).max(), name
    assert len(adapted) == 14


def test_the_folder_says_what_the_files_hold(exported):
    merged = exported / "merged"
    files = {each["kind"]: each for each in json.loads((merged / "export.json").read_text())["gguf"]}
    assert list(files) == ["f16", "q8_0", "adapter"]
    assert files["q8_0"]["tensors"] == {"F32": 5, "Q8_0": 15}
    assert files["q8_0"]["bits_per_weight"] == pytest.approx(8.55, abs=0.05)
    assert files["f16"]["bytes"] == (merged / "out-f16.gguf").stat().st_size
    assert "FROM ./out-q8_0.gguf\n" in (merged / "Modelfile.q8_0").read_text()
    assert fingerprint.verify(merged) == []
    assert "out-f16.gguf" in json.loads((merged / "hash_tree.json").read_text())["files"]


def test_the_command_line_writes_the_files_and_says_why_there_is_none_of_the_adapter(
    tmp_path,
    run_trainer,  # noqa: F811
):
    trained(tmp_path, {"dora": True})
    code, out, err = run_trainer(
        "export", tmp_path / "train.toml", tmp_path / "merged", "--gguf", "q8_0", "--gguf", "q8_0"
    )
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.gguf")) == ["out-q8_0.gguf"]
    assert "out-q8_0.gguf" in out
    assert "GGUF has no DoRA adapters" in out


GPT_2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
WORDS += r"|\s+(?!\S)|\s+"


def split(words: str) -> list[object]:
    return [pre_tokenizers.Split(Regex(words), "isolated"), BYTES]


STRUCTURES = {
    "gpt-2": (GPT_2, None, False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), *GPT_2], None, False),
    "qwen2": (split(WORDS % ""), normalizers.NFC(), False),
    "llama-bpe": (split(WORDS % "{1,3}"), None, True),
}


def speech_of(steps, normaliser, ignore_merges):
    """The tiny tokenizer with other rules for what comes before its merges."""
    speech = tiny.tokenizer()
    backend = speech.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if normaliser is not None:
        backend.normalizer = normaliser
    backend.model.ignore_merges = ignore_merges
    return speech


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_pre_tokenizer_is_known_by_its_structure(name):
    assert pre_tokenizer_by_structure(speech_of(*STRUCTURES[name])) == name


@pytest.mark.parametrize(
    "structure",
    [
        (split(WORDS % "{1,2}"), None, False),
        (split(WORDS % "{1,3}"), None, False),  # the regex of Llama 3, but merges are not ignored
        (GPT_2, normalizers.Lowercase(), False),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None, False),
        ([pre_tokenizers.Whitespace(), *GPT_2], None, False),
    ],
    ids=range(5),
)
def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused(structure):
    with pytest.raises(StudentError, match="no pre-tokenizer"):
        pre_tokenizer_by_structure(speech_of(*structure))


def test_the_tokenizer_of_the_demo_is_refused_by_name():
    speech = AutoTokenizer.from_pretrained(REPOSITORY / "data" / "base")
    with pytest.raises(StudentError, match=r"ignore_merges"):
        gguf_convert.check_student(REPOSITORY / "data" / "base", speech)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    folder = bases.write_base(tmp_path / "base", "recurrent_gemma")
    with pytest.raises(StudentError, match="RecurrentGemmaForCausalLM"):
        gguf_convert.check_student(folder, tiny.tokenizer())


@pytest.mark.parametrize(
    ("kinds", "missing", "message"),
    [
        (["int4"], "", "no such GGUF type 'int4'"),
        (["f16"], "conversion", "converter is not installed"),
        (["f16"], "gguf", "converter is not installed"),
    ],
)
def test_what_can_not_be_written_is_refused_before_anything_is_merged(
    learned, tmp_path, monkeypatch, kinds, missing, message
):
    config, _ = learned
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=message):
        export_merged(config, tmp_path / "merged", gguf=kinds)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_the_converter_rearranges_otherwise_is_refused(exported, tmp_path, monkeypatch):
    """A converter that turns B's rows as if they were those of the weight, but not the weight itself."""
    from conversion.llama import LlamaModel

    original = LlamaModel.modify_tensors

    def damaged(self, data_torch, name, bid):
        for new_name, tensor in original(self, data_torch, name, bid):
            yield new_name, tensor.flip(0) if tensor.shape[-1] == 4 else tensor

    monkeypatch.setattr(LlamaModel, "modify_tensors", damaged)
    with pytest.raises(StudentError, match="can't hold the layer"):
        gguf_convert.convert_adapter(
            exported / "base", exported / "out" / "adapter", tmp_path / "a.gguf", GgufFacts("a", {})
        )


@pytest.mark.parametrize("fault", ["template", "end", "tokens"])
def test_a_file_that_holds_something_else_is_refused(exported, tmp_path, fault):
    merged = exported / "merged"
    folder = tmp_path / "merged"
    folder.mkdir()
    for name in ("chat_template.jinja", "config.json"):
        (folder / name).write_bytes((merged / name).read_bytes())
    stop = AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids("<|im_end|>")
    assert gguf_files.read_back(merged / "out-f16.gguf", folder, stop)["parameters"] > 100_000
    if fault == "template":
        (folder / "chat_template.jinja").write_text("other")
    elif fault == "tokens":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    else:
        stop += 1
    with pytest.raises(StudentError, match=r"template|end|tokens"):
        gguf_files.read_back(merged / "out-f16.gguf", folder, stop)
