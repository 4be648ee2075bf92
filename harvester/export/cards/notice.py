"""Write NOTICE: sentences and terms that must be passed on with a student or a data set."""

from __future__ import annotations

from harvester.export.cards.facts import DatasetFacts
from harvester.terms.obligations import duties_of_kind


def notice(dataset: DatasetFacts, *, title: str) -> str:
    """Return the text: notices word by word, sentences to display, terms passed on, and the teachers."""
    parts = [title, ""]
    for sentence in [*duties_of_kind(dataset.duties, "notice"), *duties_of_kind(dataset.duties, "display")]:
        parts += [" ".join(sentence.split()), ""]
    passed_on = duties_of_kind(dataset.duties, "pass_terms")
    if passed_on:
        parts += [
            "These terms are passed on and bind whoever receives this:",
            *[f"  {' '.join(url.split())}" for url in passed_on],
            "",
        ]
    if "noncommercial" in dataset.duties:
        parts += ["For non-commercial use only.", ""]
    parts.append("Made with answers of:")
    parts += [f"  {model} at {host}" for model, host in dataset.teachers]
    parts += ["", "Under:"]
    parts += [f"  {r.licence}  {r.url}  (record {r.id}, seen {r.seen})" for r in dataset.records]
    return "\n".join(parts) + "\n"
