"""Fill in item 2.5 (synthetic data) of the EU's public summary of training content.

Source: template of the European Commission under Article 53(1)(d) of Regulation (EU) 2024/1689, published on
24 July 2025, known second-hand.
"""

from __future__ import annotations

from harvester.export.cards.markdown import cell
from trainer.provenance.student_facts import StudentFacts

NOT_REQUIRED = (
    "Probably not required of you. The summary is owed by providers of general-purpose AI models. By the "
    "Commission's guidelines of 18 July 2025, as read second-hand, whoever modifies such a model becomes its "
    "provider when the modification takes more than a third of the compute the original took; a LoRA adapter "
    "stays far below. A reading, not legal advice: the operator decides."
)


def eu_summary(student: StudentFacts) -> str:
    """Return item 2.5 as Markdown, with a note on whether the summary is required at all."""
    dataset = student.dataset
    records = {record.id: record for record in dataset.records}.values()
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
        + (", ".join(f"{cell(record.id)} (seen {record.seen})" for record in records) or "none"),
    ]
    return "\n".join(lines) + "\n"
