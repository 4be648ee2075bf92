"""Read and write publication.json, the manifest of what was published; it is written last.

Every object that it names is immutable: its name is made of its SHA-256, or lies in a folder that is. So a
publication in progress never changes what an earlier manifest names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harvester.errors import RemoteStoreError, StoreCorrupt, StoreFormatError

MANIFEST_NAME = "publication.json"
FORMAT = 1
# A manifest takes about 300 bytes a shard; a store of a million shards stays below this.
MAX_MANIFEST_BYTES = 512 * 1024 * 1024
# What helps against a damaged manifest, and against an object that is absent or damaged.
_ANEW = "`harvester publish STORE URL --repair` writes it anew"
UPLOADED_AGAIN = "`harvester publish STORE URL --repair` uploads it again from the store"
_NAME = re.compile(r"[^/\\\0]+(/[^/\\\0]+)*")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["store", "corpus", "folder"]


class _ManifestPart(BaseModel):
    """A part of the manifest. Members that a later release added are passed over."""

    model_config = ConfigDict(frozen=True)


class PublishedObject(_ManifestPart):
    """One object.

    Attributes:
        name: below the URL of the publication.
        path: where it lies in the folder that was published.
    """

    name: str
    path: str
    sha256: Sha256
    size_bytes: int = Field(ge=0)

    @field_validator("name", "path")
    @classmethod
    def _stays_below(cls, value: str) -> str:
        if not _NAME.fullmatch(value) or {".", ".."} & set(value.split("/")):
            raise ValueError(f"names something elsewhere: {value!r}")
        return value


class PublishedShard(PublishedObject):
    """A sealed shard, with its row of the store's manifest."""

    shard: int = Field(ge=0)
    rows: int = Field(ge=0)
    lineage_digest: str = ""
    sealed_us: int = 0


class PublishedRun(_ManifestPart):
    """A run of the store; of its configuration only what tells how rows were chosen."""

    run: int
    run_id: str
    started_us: int
    ended_us: int | None
    ending: str
    exit_code: int | None
    lineage_json: str
    config_json: str


class Publication(_ManifestPart):
    """What publication.json holds.

    Attributes:
        kind: "store": shards, runs and asks of a store. "corpus": shards without a journal, such as a curated
            corpus. "folder": files, such as an adapter.
        name: of the folder that was published.
        source_sha256: of everything but what is generated from it: report, card, times.
        asks: prompts that share an answer, one JSON object a line; None without any.
        files: documents; of a "folder" all files.
        superseded: objects that earlier manifests named, and that may still be there.
    """

    format: Literal[1] = 1
    kind: Kind
    name: str
    tool_version: str
    made_at: str
    source_sha256: Sha256
    shards: tuple[PublishedShard, ...] = ()
    runs: tuple[PublishedRun, ...] = ()
    asks: PublishedObject | None = None
    files: tuple[PublishedObject, ...] = ()
    superseded: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_each_once(self) -> Publication:
        """Refuse what no folder or journal could hold: two objects at one place, a shard or run twice."""
        _require_once("the path", (each.path for each in self.objects))
        _require_once("the object", {(each.name, each.sha256): each.name for each in self.objects}.values())
        _require_once("the shard", (each.shard for each in self.shards))
        _require_once("the run", (each.run for each in self.runs))
        _require_once("the run", (each.run_id for each in self.runs))
        return self

    @property
    def objects(self) -> tuple[PublishedObject, ...]:
        """All objects, those that readers need first."""
        return (*self.shards, *((self.asks,) if self.asks else ()), *self.files)

    @property
    def size_bytes(self) -> int:
        """Size of all objects."""
        return sum(each.size_bytes for each in self.objects)

    def to_bytes(self) -> bytes:
        """Return the manifest as it is written."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_INDENT_2) + b"\n"

    def same_content(self, other: Publication) -> bool:
        """Whether both name the same objects and runs; times and releases aside."""
        return self._content() == other._content()

    def _content(self) -> Mapping[str, Any]:
        return self.model_dump(exclude={"made_at", "tool_version", "superseded"})


def _require_once(what: str, values: Iterable[str | int]) -> None:
    seen: set[str | int] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what} {value!r} stands there twice")
        seen.add(value)


def parse_publication(content: bytes, place: str) -> Publication:
    """Read a manifest.

    Raises:
        StoreFormatError: another release wrote it. StoreCorrupt: it is damaged.
    """
    try:
        data = orjson.loads(content)
    except ValueError:
        raise StoreCorrupt("the manifest is no JSON", place=place, remedy=_ANEW) from None
    version = data.get("format") if isinstance(data, dict) else None
    if type(version) is not int or version < FORMAT:  # every release writes a number, counted from 1
        raise damaged_manifest("it names no format", place)
    if version != FORMAT:
        raise StoreFormatError(
            f"the publication has format {version!r}, this release reads {FORMAT}",
            place=place,
            remedy="use the release that published it, or a later one",
        )
    try:
        return Publication.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        words = [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]
        raise damaged_manifest(": ".join(filter(None, words)), place) from None


def damaged_manifest(what: str, place: str) -> StoreCorrupt:
    """Return the error of a manifest that says what can't be."""
    return StoreCorrupt(f"the manifest is damaged: {what}", place=place, remedy=_ANEW)


def torn(name: str, place: str) -> RemoteStoreError:
    """Return the error of a manifest that names an object which is not there."""
    return RemoteStoreError(
        f"the publication is torn: its manifest names {name}, which is not there",
        place=place,
        remedy=UPLOADED_AGAIN,
    )
