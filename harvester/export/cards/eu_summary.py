"""Item 2.5 (synthetic data) of the EU's public summary of training content, prefilled.

Source: template of the European Commission under Article 53(1)(d) of Regulation (EU) 2024/1689, published on
24 July 2025, known second-hand.
"""

from __future__ import annotations

from harvester.export.cards.facts import StudentFacts, cell

NOT_REQUIRED = (
    "Probably not required of you. The summary is owed by providers of general-purpose AI models. By the "
    "Commission's guidelines of 18 July 2025, as read second-hand, whoever modifies such a model becomes its "
    "provider when the modification takes more than a third of the compute the original took; a LoRA adapter "
    "stays far below. A reading, not legal advice: the operator decides."
)


def eu_summary(student: StudentFacts) -> str:
    """Markdown for item 2.5, with a plain word on whether it is needed."""
    dataset = student.dataset
    hosts = {r.id: r for r in dataset.records}
    lines = [
        f"# Synthetic data in the training of {cell(student.name)}",
        "",
        NOT_REQUIRED,
        "",
        "### 2.5. Synthetic data",
        "",
        "**Was synthetic AI-generated data created by or on behalf of the provider to train the model?** Yes",
        "",
        "**Modality of the synthetic data:** Text",
        "",
        "**General-purpose AI models used to generate the synthetic data, where they are on the market:**",
        "",
        *[f"- {cell(model)}, reached at {cell(host)}" for model, host in dataset.teachers],
        "",
        "**Other AI models used, and what is known of their training:** "
        + ("a mock teacher that answers by rules" if dataset.is_mock else "none beyond those named"),
        "",
        f"**Additional comments:** {dataset.rows:,} answers, trained on {student.trained_on}; terms records "
        + (", ".join(f"{cell(r.id)} (seen {r.seen})" for r in hosts.values()) or "none"),
    ]
    return "\n".join(lines) + "\n"
