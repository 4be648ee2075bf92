"""Find llama.cpp's pre-tokenizer for a byte-level BPE tokenizer by the tokenizer's structure.

llama.cpp does not read the rule by which a tokenizer splits text before it merges bytes: a GGUF file names
one of the rules that llama.cpp has in its code (`src/llama-vocab.cpp`). A wrong one gives other tokens than
were learned, so a tokenizer whose structure is not in the table below is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainer.errors import StudentError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_BYTES = ("ByteLevel", False)
_WORDS_AND_BYTES = ("ByteLevel", True)
# Normaliser, pre-tokenizers, and whether a word that is in the vocabulary is a token whatever the merges are.
_KNOWN: dict[tuple[str, tuple[Any, ...], bool], str] = {
    ("", (_WORDS_AND_BYTES,), False): "gpt-2",
    ("", (("Digits", True), _WORDS_AND_BYTES), False): "smollm",
    ("", (("Split", _LLAMA_3), _BYTES), True): "llama-bpe",
    ("NFC", (("Split", _QWEN2), _BYTES), False): "qwen2",
    ("", (("Split", _QWEN2), _BYTES), False): "qwen2",
}
# Settings of a BPE model that llama.cpp does not have.
_FOREIGN = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


def pre_tokenizer_by_structure(tokenizer: Any) -> str:
    """Return llama.cpp's name of a tokenizer's pre-tokenizer.

    Raises:
        StudentError: llama.cpp has none that splits text as this one does.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    parts = _parts(described.get("pre_tokenizer"), "pretokenizers")
    normalisers = _parts(described.get("normalizer"), "normalizers")
    structure = (
        "+".join(str(part["type"]) for part in normalisers),
        tuple(_rule(part) for part in parts),
        bool(model.get("ignore_merges")),
    )
    name = _KNOWN.get(structure)
    if name is None or model.get("type") != "BPE" or any(model.get(setting) for setting in _FOREIGN):
        raise StudentError(
            f"llama.cpp has no pre-tokenizer that splits text as this tokenizer does: {_shown(described)}",
            place="tokenizer.json",
            remedy="serve the merged folder with vLLM or transformers, or choose another base for GGUF",
        )
    return name


def _parts(node: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    if node is None:
        return []
    return list(node[members]) if node["type"] == "Sequence" else [node]


def _rule(part: Mapping[str, Any]) -> tuple[str, Any]:
    """Return a part of a pre-tokenizer with the settings that decide where it splits."""
    kind = part["type"]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return kind, bool(part.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(part["individual_digits"])
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return kind, part["pattern"].get("Regex")
    return kind, json.dumps(part, sort_keys=True)


def _shown(described: Mapping[str, Any]) -> str:
    """Describe a tokenizer in one line."""
    model = described["model"]
    parts = [str(_rule(part)) for part in _parts(described.get("pre_tokenizer"), "pretokenizers")]
    merges = ", ignore_merges" if model.get("ignore_merges") else ""
    return f"{model.get('type')} after {' and '.join(parts) or 'nothing'}{merges}"
