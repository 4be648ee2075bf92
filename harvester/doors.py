"""The gate's doors inside the house: sealing and export ask again, from the lineage of the rows themselves.

The first door (before a byte is sent) is in `prepare`, the last one (training) in the trainer. Terms may have
changed or run out since the harvest; a refusal here leaves every answer where it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harvester.permissions import load_permissions
from harvester.registry import load_registry
from harvester.terms import Use, allows_lineage


def ask(lineages: Iterable[Mapping[str, Any]], use: Use, beside: Path) -> None:
    """Do nothing when every lineage permits this use today.

    Args:
        beside: folder whose `terms` overlay the registry and whose `permissions` count.

    Raises:
        TermsRefused: exit 77; names the first lineage's record, gist, URL, day seen, and the remedies.
    """
    registry = load_registry(beside / "terms")
    permissions = load_permissions(beside / "permissions")
    for lineage in lineages:
        allows_lineage(
            lineage, registry=registry, today=datetime.now(UTC).date(), permissions=permissions, use=use
        ).require()
