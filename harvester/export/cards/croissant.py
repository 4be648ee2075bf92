"""Write Croissant 1.1 metadata of a data set (JSON-LD).

Source: MLCommons, Croissant Format Specification 1.1 (required properties, appendix 1 for the context, W3C
PROV for provenance, `usageInfo` for conditions of use) and the RAI vocabulary 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harvester.export.cards.facts import SPDX, DatasetFacts
from harvester.store.shards.schema import COLUMNS
from harvester.terms.lineage import Lineage
from harvester.terms.records import TermsRecord

CONFORMS_TO = ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"]
# Stands for the page of a data set that has none yet; `.invalid` never resolves (RFC 2606).
UNPUBLISHED = "https://not-published.invalid/"
_LINES, _PARQUET = "application/jsonlines", "application/x-parquet"
_TYPES = {
    "json": "sc:Text",
    "string": "sc:Text",
    "int32": "sc:Integer",
    "int64": "sc:Integer",
    "double": "sc:Float",
    "bool": "sc:Boolean",
    "timestamp[us, tz=UTC]": "sc:DateTime",
}
_OWN = (
    "annotation",
    "arrayShape",
    "citeAs",
    "column",
    "containedIn",
    "equivalentProperty",
    "excludes",
    "extract",
    "field",
    "fileProperty",
    "fileObject",
    "fileSet",
    "format",
    "includes",
    "isArray",
    "isLiveDataset",
    "jsonPath",
    "key",
    "md5",
    "parentField",
    "recordSet",
    "references",
    "regex",
    "readLines",
    "sdVersion",
    "separator",
    "source",
    "subField",
    "transform",
    "unArchive",
    "value",
)
CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "prov": "http://www.w3.org/ns/prov#",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{name: f"cr:{name}" for name in _OWN},
}


def croissant(dataset: DatasetFacts) -> dict[str, Any]:
    """Return the document, ready for `json.dumps`."""
    models = ", ".join(f"{model} at {host}" for model, host in dataset.teachers)
    mock = "Answers of the mock teacher: of no use outside tests. " if dataset.is_mock else ""
    return {
        "@context": dict(CONTEXT),
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": dataset.name,
        "description": f"{mock}{dataset.rows} synthetic answers harvested from {models}.",
        "url": dataset.url or UNPUBLISHED,
        "license": _licence_url(dataset),
        "creator": {"@type": "sc:Organization", "name": dataset.creator or "not named"},
        "datePublished": dataset.published.isoformat(),
        "version": dataset.version,
        "isLiveDataset": False,
        "keywords": ["synthetic", "distillation", *(["mock"] if dataset.is_mock else [])],
        **({"inLanguage": list(dataset.languages)} if dataset.languages else {}),
        "usageInfo": [_term(record) for record in dataset.records],
        "prov:wasGeneratedBy": [_activity(each) for each in dataset.lineages],
        "prov:wasAttributedTo": [
            {"@type": "prov:SoftwareAgent", "prov:label": f"{model} at {host}"}
            for model, host in dataset.teachers
        ],
        "rai:dataCollection": "Prompts were sent to the models named; answers are kept verbatim.",
        "rai:dataCollectionType": ["Software Collection"],
        "rai:machineAnnotationTools": [model for model, _ in dataset.teachers],
        "rai:personalSensitiveInformation": "Not examined: answers are as the models wrote them.",
        "distribution": [*_files(dataset), _file_set(dataset)],
        "recordSet": [_record_set(dataset)],
    }


def _licence_url(dataset: DatasetFacts) -> list[str]:
    known = SPDX.get(dataset.licence_id.lower())
    if known:
        return [f"https://spdx.org/licenses/{known}.html"]
    return list(dict.fromkeys(record.url for record in dataset.records)) or [dataset.url or UNPUBLISHED]


def _term(record: TermsRecord) -> dict[str, Any]:
    return {
        "@type": "sc:DefinedTerm",
        "name": record.gist,
        "termCode": record.id,
        "url": record.url,
        "description": f"{record.verdict}; seen {record.seen}; {record.established}",
    }


def _activity(lineage: Lineage) -> dict[str, Any]:
    label = f"run {lineage.run_id or 'unknown'} asking {lineage.model or 'unknown'}"
    return {
        "@type": "prov:Activity",
        "prov:label": label,
        "sc:identifier": lineage.config_sha256,
        "sc:softwareVersion": lineage.tool_version,
    }


def _files(dataset: DatasetFacts) -> list[dict[str, Any]]:
    return [
        {
            "@type": "cr:FileObject",
            "@id": shard.name,
            "name": shard.name,
            "contentUrl": shard.name,
            "contentSize": f"{shard.size} B",
            "encodingFormat": _encoding(shard.name),
            "sha256": shard.sha256,
        }
        for shard in dataset.shards
    ]


def _encoding(name: str) -> str:
    return _LINES if name.endswith(".jsonl") else _PARQUET


def _file_set(dataset: DatasetFacts) -> dict[str, Any]:
    encoding = _encoding(dataset.shards[0].name) if dataset.shards else _PARQUET
    return {
        "@type": "cr:FileSet",
        "@id": "shards",
        "name": "shards",
        "encodingFormat": encoding,
        "includes": "*.jsonl" if encoding == _LINES else "**/*.parquet",
    }


def _record_set(dataset: DatasetFacts) -> dict[str, Any]:
    columns = dataset.columns
    if columns is None:
        columns = tuple((name, str(kind), meaning) for name, kind, _, meaning in COLUMNS)
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"answers/{name}",
            "name": name,
            "description": meaning,
            "dataType": _TYPES[kind],
            "source": {"fileSet": {"@id": "shards"}, "extract": {"column": name}},
        }
        for name, kind, meaning in columns
        if kind in _TYPES  # nested columns are described in data/FORMAT.md
    ]
    key = {"key": {"@id": "answers/key"}} if any(name == "key" for name, *_ in columns) else {}
    return {"@type": "cr:RecordSet", "@id": "answers", "name": "answers", **key, "field": fields}
