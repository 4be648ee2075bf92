"""Render the HTML of the report (a file) and of the live view from the same templates.

All text from a teacher passes through `safe_text.visible` and the escaping of jinja2. Style and script are
constants of this package, pinned by their hashes in a Content-Security-Policy that allows nothing else.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from harvester.system.safe_text import visible

REPORT_SCRIPT, VIEW_SCRIPT = "report.js", "view.js"


def policy(script: str) -> str:
    """Return the Content-Security-Policy of a page with that script; the view may fetch from its server."""
    connect = "'self'" if script == VIEW_SCRIPT else "'none'"
    return (
        f"default-src 'none'; style-src {_digest(_asset('page.css'))}; script-src {_digest(_asset(script))}; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def document(overview: Mapping[str, Any], samples: Mapping[str, Any], script: str = REPORT_SCRIPT) -> str:
    """Return the whole page as text."""
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            policy=policy(script),
            style=Markup(_asset("page.css")),  # noqa: S704 - our own constant, pinned by its hash
            script=Markup(_asset(script)),  # noqa: S704 - as above
            live=script == VIEW_SCRIPT,
            **overview,
            **samples,
        )
    )


def fragment(name: str, values: Mapping[str, Any]) -> str:
    """Return a part of the page, `overview` or `samples`, for the view's script to put in place."""
    return _environment().get_template(f"{name}.html.j2").render(live=True, **values)


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("harvester.observe.report") / "templates" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("harvester.observe.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.globals["zip"] = zip
    return environment
