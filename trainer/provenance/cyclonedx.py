"""Write the CycloneDX 1.7 bill of materials of a student: base, data set and teachers, with licence and hash.

Source: CycloneDX 1.7 JSON schema (`machine-learning-model` and `data` components, `modelCard`, `pedigree`).
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, time
from typing import Any

from harvester.export.cards.facts import SPDX, DatasetFacts
from harvester.terms.records import TermsRecord
from trainer.provenance.student_facts import StudentFacts


def ml_bom(student: StudentFacts, *, tool_version: str) -> dict[str, Any]:
    """Return the document, ready for `json.dumps`. The same facts give the same serial number."""
    dataset = student.dataset
    base = {
        "type": "machine-learning-model",
        "bom-ref": "base",
        "name": student.base,
        **_hashes(student.base_sha256),
        "licenses": [_licence(student.base_licence)],
    }
    teachers = [
        _teacher(number, model, host, dataset.records)
        for number, (model, host) in enumerate(dataset.teachers)
    ]
    body = {
        "metadata": {
            "timestamp": datetime.combine(student.trained_on, time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tools": {
                "components": [
                    {"type": "application", "name": "blackbox-distillation", "version": tool_version}
                ]
            },
            "component": _student(student),
        },
        "components": [base, _data(dataset), *teachers],
        "dependencies": [
            {"ref": "student", "dependsOn": ["base", "data"]},
            {"ref": "data", "dependsOn": [teacher["bom-ref"] for teacher in teachers]},
        ],
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        **body,
    }


def _kind(student: StudentFacts) -> str:
    if student.full:
        return "full fine-tuning of the base"
    return f"LoRA adapter{', merged into the base' if student.merged else ''}"


def _student(student: StudentFacts) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": "student",
        "name": student.name,
        "version": student.version,
        **_hashes(student.sha256),
        "licenses": [_licence(student.licence_id)],
        "pedigree": {
            "ancestors": [
                {"type": "machine-learning-model", "name": student.base, **_hashes(student.base_sha256)}
            ],
            "notes": f"{_kind(student)}, trained on answers of the teachers listed",
        },
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "text-generation",
                "datasets": [{"ref": "data"}],
            },
            "considerations": {
                "technicalLimitations": [
                    *(
                        ["trained on answers of a mock teacher: for tests only"]
                        if student.dataset.is_mock
                        else []
                    ),
                    "trained on another model's answers, including their errors",
                ]
            },
        },
        "properties": [{"name": "distil:duty", "value": duty} for duty in student.dataset.duties],
    }


def _data(dataset: DatasetFacts) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": "data",
        "name": dataset.name,
        "version": dataset.version,
        "licenses": [_licence(dataset.licence_id)],
        **({"externalReferences": [{"type": "distribution", "url": dataset.url}]} if dataset.url else {}),
        "data": [
            {
                "type": "dataset",
                "name": dataset.name,
                "description": f"{dataset.rows} synthetic answers in {len(dataset.shards)} files",
                "classification": "synthetic",
                **(
                    {"governance": {"owners": [{"organization": {"name": dataset.creator}}]}}
                    if dataset.creator
                    else {}
                ),
            }
        ],
        "components": [
            {"type": "file", "bom-ref": f"shard:{s.name}", "name": s.name, **_hashes(s.sha256)}
            for s in dataset.shards
        ],
    }


def _teacher(number: int, model: str, host: str, records: tuple[TermsRecord, ...]) -> dict[str, Any]:
    applying = [r for r in records if r.applies_to_model(model)]
    references = [{"type": "license", "url": r.url, "comment": f"{r.id}, seen {r.seen}"} for r in applying]
    return {
        "type": "machine-learning-model",
        "bom-ref": f"teacher-{number}",
        "name": model,
        "scope": "excluded",
        "description": f"teacher, answered at {host}",
        "licenses": [_licence(name) for name in dict.fromkeys(r.licence for r in applying)],
        "externalReferences": references,
    }


def _hashes(sha256: str) -> Mapping[str, Any]:
    return {"hashes": [{"alg": "SHA-256", "content": sha256}]} if sha256 else {}


def _licence(name: str) -> dict[str, Any]:
    known = SPDX.get(name.lower())
    return {"license": {"id": known} if known else {"name": name}}
