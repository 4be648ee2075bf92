"""Croissant 1.1 metadata of a data set (JSON-LD).

Source: MLCommons, Croissant Format Specification 1.1 (required properties, appendix 1 for the context, W3C
PROV for provenance, `usageInfo` for conditions of use) and the RAI vocabulary 1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harvester.papers.account import SPDX, Dataset
from harvester.schema import COLUMNS

CONFORMS_TO = ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"]
_TYPES = {
    "string": "sc:Text", "int32": "sc:Integer", "int64": "sc:Integer", "double": "sc:Float",
    "bool": "sc:Boolean", "timestamp[us, tz=UTC]": "sc:DateTime",
}  # fmt: skip
_OWN = (
    "annotation", "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "excludes",
    "extract", "field", "fileProperty", "fileObject", "fileSet", "format", "includes", "isArray",
    "isLiveDataset", "jsonPath", "key", "md5", "parentField", "recordSet", "references", "regex", "readLines",
    "sdVersion", "separator", "source", "subField", "transform", "unArchive", "value",
)  # fmt: skip
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


def croissant(dataset: Dataset) -> dict[str, Any]:
    """The document, ready for `json.dumps`."""
    models = ", ".join(f"{model} at {host}" for model, host in dataset.teachers)
    mock = "Answers of a mock teacher, made by rules: of no use outside tests. " if dataset.is_mock else ""
    return {
        "@context": dict(CONTEXT),
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": dataset.name,
        "description": f"{mock}{dataset.rows} synthetic answers harvested from {models}.",
        "url": dataset.url,
        "license": _licence_url(dataset),
        "creator": {"@type": "sc:Organization", "name": dataset.creator},
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
        "distribution": [*_files(dataset), _file_set()],
        "recordSet": [_record_set()],
    }


def _licence_url(dataset: Dataset) -> list[str]:
    known = SPDX.get(dataset.licence_id.lower())
    if known:
        return [f"https://spdx.org/licenses/{known}.html"]
    return list(dict.fromkeys(record.url for record in dataset.records)) or [dataset.url]


def _term(record: Any) -> dict[str, Any]:
    return {
        "@type": "sc:DefinedTerm",
        "name": record.gist,
        "termCode": record.id,
        "url": record.url,
        "description": f"{record.verdict}; seen {record.seen}; {record.established}",
    }


def _activity(lineage: Mapping[str, Any]) -> dict[str, Any]:
    label = f"run {lineage.get('run_id') or 'unknown'} asking {lineage.get('model') or 'unknown'}"
    return {
        "@type": "prov:Activity",
        "prov:label": label,
        "sc:identifier": str(lineage.get("config_sha256") or ""),
        "sc:softwareVersion": str(lineage.get("tool_version") or ""),
    }


def _files(dataset: Dataset) -> list[dict[str, Any]]:
    return [
        {
            "@type": "cr:FileObject",
            "@id": shard.name,
            "name": shard.name,
            "contentUrl": shard.name,
            "contentSize": f"{shard.size} B",
            "encodingFormat": "application/x-parquet",
            "sha256": shard.sha256,
        }
        for shard in dataset.shards
    ]


def _file_set() -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": "shards",
        "name": "shards",
        "encodingFormat": "application/x-parquet",
        "includes": "**/*.parquet",
    }


def _record_set() -> dict[str, Any]:
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"answers/{name}",
            "name": name,
            "description": meaning,
            "dataType": _TYPES[str(kind)],
            "source": {"fileSet": {"@id": "shards"}, "extract": {"column": name}},
        }
        for name, kind, _, meaning in COLUMNS
        if str(kind) in _TYPES  # nested columns are described in data/FORMAT.md
    ]
    return {
        "@type": "cr:RecordSet",
        "@id": "answers",
        "name": "answers",
        "key": {"@id": "answers/key"},
        "field": fields,
    }
