"""Keep libraries from importing, at a command's start, installed packages that no command uses."""

from __future__ import annotations

import importlib
import importlib.abc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# Who imports it, and what that costs:
UNUSED = (
    "pandas",  # pyarrow, at its first array: 0.4 s and 40 MiB
    "httpx._main",  # httpx, for its own command line: rich, click and pygments, 0.1 s
    "tornado",  # tenacity, for its own retries on tornado's loop, where it is installed: 10 ms
)


class _Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find the modules of `UNUSED`, and fail to import them.

    They are found, since `importlib.util.find_spec` must not raise: libraries ask it what is installed.
    (An entry of None in `sys.modules` would be simpler, but Cython would take None for the module.)
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in UNUSED else None

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(f"{module.__name__} is not used by this program", name=module.__name__)


def skip_unused_imports() -> None:
    """Make imports of `UNUSED` raise ImportError in this process; what is imported already stays.

    For processes of our own commands that run nobody else's code: anything else may need pandas. Plugins of
    pydantic are not looked for either, which would read what every installed package says of itself (25 ms).
    """
    sys.meta_path.insert(0, _Unused())
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def import_without_certificates(name: str) -> None:
    """Import a module that reads all public certificates for TLS contexts which this process does not use.

    aiohttp makes two such contexts (50 ms); every connection of ours has a context of its own. Those of the
    module trust nothing then, so call this only in processes of our own commands.
    """
    variable = "SSL_CERT_FILE"
    before = os.environ.get(variable)
    os.environ[variable] = os.devnull
    try:
        importlib.import_module(name)
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
