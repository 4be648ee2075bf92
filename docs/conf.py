"""Configure Sphinx for the pages that `docs/build.py` puts together; everything is built without a network."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

_ROOT = Path(os.environ["DOCS_ROOT"])
project = "Black-box distillation"
version = release = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "version"
]
author = "the contributors"
copyright = "the contributors, Apache-2.0"

extensions = ["myst_nb", "sphinx_copybutton"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
suppress_warnings: list[str] = []
nitpicky = True
smartquotes = False  # it would turn the dashes of options into one
# "off", or "force" with `docs/build.py --execute`.
nb_execution_mode = os.environ.get("DOCS_EXECUTE", "off")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

html_theme = "furo"
html_title = "Black-box distillation"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"source_view_link": "", "top_of_page_buttons": []}
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
