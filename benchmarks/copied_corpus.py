"""Make a large corpus and its token store quickly: the rows of one shard under ever other keys and ids.

A copied part is what rendering the copied shard would give, byte for byte: of a row only key, prompt id and
its hash differ. One part is rendered to compare.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harvester.store.reader import Corpus
from harvester.store.shards.parquet_file import ROWS_PER_GROUP, open_writer
from harvester.terms.lineage import Lineage
from trainer import config as settings
from trainer.data.chat_template import Renderer
from trainer.data.tokens import part, store_names
from trainer.data.tokens.row_ranges import Unit, UnitRenderer, units_of
from trainer.data.tokens.token_store import PARTS
from trainer.model import model, weights

Report = Callable[[str], None]


def key_of(number: int) -> str:
    """Return the key of a row by its number."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def prompt_id_of(number: int) -> str:
    """Return the prompt id of a row by its number; all have the same length."""
    return f"p{number:09d}"


def copy_shards(folder: Path, rows: int, of_shard: int, lineage: Lineage) -> None:
    """Add shards to a folder that has the first one, until it has `rows` rows, and mark it as complete.

    Args:
        of_shard: rows of each shard.
    """
    [first] = folder.glob("part-00000001-*.parquet")
    with pq.ParquetFile(first) as file:
        groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    for shard in range(2, rows // of_shard + 1):
        hidden = folder / "shard.tmp"
        number = (shard - 1) * of_shard
        with hidden.open("wb") as sink, open_writer(sink, [lineage]) as writer:
            for group in groups:
                table = group.cast(writer.schema)
                numbers = range(number, number + len(group))
                for name, text_of in (("key", key_of), ("prompt_id", prompt_id_of)):
                    at = table.schema.get_field_index(name)
                    field = table.schema.field(at)
                    table = table.set_column(at, field, pa.array(map(text_of, numbers), field.type))
                writer.write_table(table, row_group_size=ROWS_PER_GROUP)
                number += len(group)
        digest = hashlib.sha256(hidden.read_bytes()).hexdigest()
        hidden.rename(folder / f"part-{shard:08d}-{digest[:16]}.parquet")
    (folder / "complete").touch()


def copy_parts(toml: Path, of_shard: int, report: Report = print) -> None:
    """Render the parts of the first shard, and copy them for the others.

    Args:
        toml: of a training on a corpus that `copy_shards` made; its cache gets the store.

    Raises:
        SystemExit: a copied part is not what rendering gives.
    """
    config = settings.load(toml)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    home = (
        config.cache / store_names.store_key(config, renderer, weights.vocabulary_size(config.base)) / PARTS
    )
    home.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.open(config.corpus)
    with corpus.view(()) as view:
        units = list(units_of(corpus, view, has_signal=config.train.soft_targets != "off"))
    rendering = UnitRenderer(config, home, renderer)
    first_shard = sum(unit.entry == units[0].entry for unit in units)
    number = 0
    originals: list[part.PartFacts] = []
    for place, unit in enumerate(units):
        original = units[place % first_shard]
        if place < first_shard:
            report(f"rendering part {place + 1} of {first_shard}")
            rendering.write(unit)
            facts = part.read_facts(home / unit.name)
            assert facts is not None, "just written"
            originals.append(facts)
        else:
            _copy(home / original.name, home / unit.name, originals[place % first_shard], number)
        number += unit.rows
    assert number == of_shard * (len(units) // first_shard), "each shard has the same rows"
    if len(units) > first_shard:
        _require_equal(units[-1], home, rendering)


def _copy(original: Path, copy: Path, facts: part.PartFacts, number: int) -> None:
    """Copy a part under the keys and prompt ids of other rows.

    Args:
        number: of the first row.
    """
    records = part.read_records(original)
    numbers = range(number, number + len(records))
    ids = [prompt_id_of(at).encode() for at in numbers]
    assert records["id_bytes"].tolist() == [len(text) for text in ids], "prompt ids have one length"
    records["key"] = [bytes.fromhex(key_of(at)) for at in numbers]
    records["id"] = [hashlib.sha256(text).digest()[:16] for text in ids]
    texts = b"".join(ids)
    files: dict[str, bytes] = {name: (original / name).read_bytes() for name in (part.IDS, part.TEXTS)}
    signal = {
        name: (original / name).read_bytes() for name in part.SIGNAL_FILES if (original / name).exists()
    }
    texts += files[part.TEXTS][len(texts) :]
    part.write(copy, part.PartContent(records, files[part.IDS], texts, facts, signal))


def _require_equal(unit: Unit, home: Path, rendering: UnitRenderer) -> None:
    """Refuse a copied part that differs from the same part rendered."""
    copied = {path.name: path.read_bytes() for path in (home / unit.name).iterdir()}
    shutil.rmtree(home / unit.name)
    rendering.write(unit)
    rendered = {path.name: path.read_bytes() for path in (home / unit.name).iterdir()}
    if copied != rendered:
        names = sorted(name for name in rendered if copied.get(name) != rendered[name])
        raise SystemExit(f"a copied part is not what rendering gives: {', '.join(names)}")
