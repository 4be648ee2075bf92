"""Render HTML pages from the templates of a package: every text is escaped, and control characters shown."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from harvester.system.safe_text import visible


def render(package: str, template: str, **values: Any) -> str:
    """Return a page as HTML.

    Args:
        package: whose folder holds the template.
        template: name of the file.
        values: what the template names; a missing one is an error.
    """
    return _environment(package).get_template(template).render(**values)


@cache
def _environment(package: str) -> Environment:
    """Return what compiles the templates of a package, each once: a live page is rendered again and again."""
    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
