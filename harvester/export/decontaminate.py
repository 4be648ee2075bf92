"""Drop rows for training that repeat a text of an evaluation set, or a held-out prompt; report each hit."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections import Counter
from pathlib import Path
from typing import IO, Any

from harvester.api.types import OF_TEXTS
from harvester.export.drops import Drop
from harvester.quality.similarity.leaks import leak_label, parse_label, user_texts
from harvester.quality.similarity.settings import DecontaminateSection, load_sets
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample

HITS_NAME = "contamination.jsonl"

# Columns that the check looks at.
COLUMNS = ("key", "prompt_id", "messages", "completion", "metadata_json", "purpose")


class RowLeaks:
    """The texts that no row for training may repeat, and the hits so far.

    Args:
        folder: that the paths of the sets are relative to.

    Raises:
        ConfigError: a set can't be read. StoreError: the corpus can't be read.
    """

    def __init__(self, section: DecontaminateSection, corpus: Corpus, folder: Path) -> None:
        self._section = section
        self._index, self._sets = load_sets(section, folder)
        self._held_out = section.empty_index()
        self._drawn: set[str] = set()
        self._hits: Counter[str] = Counter()
        self._list: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._list.close)
        seen: set[str] = set()
        for sample in corpus.samples(["prompt_id", "messages", "metadata_json", "purpose", "outcome"]):
            if sample.outcome in OF_TEXTS:
                continue
            is_held_out, is_drawn = self._is_held_out(sample), self._is_drawn(sample)
            if is_drawn:
                self._drawn.add(sample.prompt_id)
            if (is_held_out or is_drawn) and sample.prompt_id not in seen:
                seen.add(sample.prompt_id)
                for text in user_texts(sample.messages):
                    self._held_out.add(text, leak_label("held out", sample.prompt_id, text))

    def check(self, sample: Sample) -> Drop | None:
        """Drop a row for training whose prompt or answer repeats one of the texts.

        A row whose prompt is drawn for evaluation is compared with the sets only: another training may learn
        it.
        """
        if self._is_held_out(sample):
            return None
        asked = user_texts(sample.messages)
        texts = [*asked, sample.completion or ""]
        leak = self._index.find(texts)
        if leak is None and not self._is_drawn(sample):
            leak = self._held_out.find(texts)
        if leak is None:
            return None
        place, text = parse_label(leak.label)
        self._hits[leak.kind] += 1
        hit = {
            "prompt_id": sample.prompt_id,
            "key": sample.key,
            "kind": leak.kind,
            "score": round(leak.score, 4),
            "prompt": "\n".join(asked)[:400],
            "hit": place,
            "hit_text": text,
        }
        self._list.write(json.dumps(hit, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        return Drop(f"contaminated_{leak.kind}", f"{place}: {text[:120]!r} ({leak.score:.2f})")

    def write_hits(self, path: Path) -> None:
        """Write one line for each hit: the row, and what it repeats."""
        self._list.seek(0)
        path.write_bytes(self._list.read())

    def facts(self) -> dict[str, Any]:
        """Return what was compared and how many rows were dropped, for the record and the cards."""
        return {
            "sets": self._sets,
            "set_texts": len(self._index),
            "held_out_texts": len(self._held_out),
            "eval_share": self._section.eval_share,
            "drawn_prompts": len(self._drawn),
            "overlap": self._section.overlap,
            "similarity": self._section.similarity,
            "dropped": dict(sorted(self._hits.items())),
        }

    def close(self) -> None:
        """Give memory and files back."""
        self._index.close()
        self._held_out.close()
        self._list.close()

    def _is_held_out(self, sample: Sample) -> bool:
        return sample.purpose == "eval" or self._section.is_held_out(sample.metadata)

    def _is_drawn(self, sample: Sample) -> bool:
        return sample.purpose != "eval" and self._section.is_drawn(sample.metadata, sample.messages)
