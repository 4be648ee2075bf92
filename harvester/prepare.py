"""Everything that can fail for free: configuration, prompts, terms, key. Sends nothing, writes nothing."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from harvester import config as settings
from harvester import outlook, prompts, terms
from harvester.config import HarvestConfig
from harvester.errors import ConfigError
from harvester.metrics import PassLimits
from harvester.permissions import load_permissions
from harvester.registry import load_registry

_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Flags:
    """Ceilings given on the command line; None leaves the file's value."""

    rows: int | None = None
    usd: float | None = None
    tokens: int | None = None
    runtime_s: float | None = None
    grace_s: float | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that may start: configuration read, prompts checked, terms permitted."""

    path: Path
    config: HarvestConfig
    flags: Flags
    rows_total: int
    verdict: terms.Verdict
    key: str | None

    @property
    def root(self) -> Path:
        """The folder that paths in the configuration are relative to."""
        return self.path.resolve().parent

    @property
    def store(self) -> Path:
        """The store's folder."""
        return self.root / self.config.store.path

    def limits(self) -> PassLimits:
        """The flags as the pass wants them."""
        grace_s = self.config.run.grace_s if self.flags.grace_s is None else self.flags.grace_s
        flags = self.flags
        return PassLimits(flags.rows, flags.usd, flags.tokens, flags.runtime_s, grace_s)

    def lines(self) -> list[str]:
        """What is about to happen, for people."""
        teacher = self.config.teacher
        return [
            f"teacher {teacher.model} at {teacher.base_url}",
            f"terms   {self.verdict.summary()}",
            f"rows    {self.rows_total:,} (prompts x samples) into {self.store}",
        ]


def seconds(text: str | None) -> float | None:
    """`90`, `90s`, `30m`, `2h`, `1.5d` in seconds; None stays None.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a duration", remedy="as in 90s, 30m, 2h")
    return float(match[1]) * _UNITS_S[match[2]]


def prepare(path: Path, flags: Flags | None = None) -> Prepared:
    """Read, check and gate; sends nothing and writes nothing.

    Raises:
        ConfigError, PromptError, TermsRefused: before anything could cost.
    """
    config = settings.load(path)
    root = path.resolve().parent
    verdict = gate(config, root)
    verdict.require()
    config = _with_trust(_with_wire_fields(config, verdict), root)
    if flags is not None and flags.epoch is not None:  # ask again on purpose: other keys, same prompts
        run = config.run.model_copy(update={"epoch": flags.epoch})
        config = config.model_copy(update={"run": run})
    key = settings.api_key(config.teacher)
    rows = sum(1 for _ in prompts.read(config.prompts.files, root)) * config.sampling.samples
    return Prepared(path, config, flags or Flags(), rows, verdict, key)


def _with_wire_fields(config: HarvestConfig, verdict: terms.Verdict) -> HarvestConfig:
    """The configuration with the fields that a router's terms want in every body; theirs win."""
    if not verdict.body:
        return config
    extra = {**config.sampling.extra, **verdict.body}
    return config.model_copy(update={"sampling": config.sampling.model_copy(update={"extra": extra})})


def _with_trust(config: HarvestConfig, root: Path) -> HarvestConfig:
    """The configuration with `ca_file` found beside it, and found fit."""
    if config.teacher.ca_file is None:
        return config
    path = root / config.teacher.ca_file
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ConfigError(
            f"can't be read as certificates: {error.strerror or error}",
            place=str(path),
            remedy="[teacher] ca_file names a PEM file of the certificates to trust",
        ) from None
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"ca_file": str(path)})})


def gate(config: HarvestConfig, root: Path) -> terms.Verdict:
    """Ask the terms gate for the use `harvest`, for every address of the teacher; the worst answer counts.

    Folders beside the configuration count: `terms` overlays the registry, `permissions` holds recorded ones.
    """
    registry, permissions = load_registry(root / "terms"), load_permissions(root / "permissions")
    verdicts = [
        terms.allows(
            registry,
            host=host,
            model=config.teacher.model,
            declared=config.teacher.terms,
            use="harvest",
            purpose=config.run.purpose,
            today=datetime.now(UTC).date(),
            permissions=permissions,
        )
        for host in dict.fromkeys(urlsplit(url).hostname or "" for url in config.teacher.base_urls)
    ]
    return next((verdict for verdict in verdicts if not verdict.permitted), verdicts[0])


def look_ahead(path: Path) -> outlook.Outlook:
    """`harvester plan`: what a run would do. Also for teachers the gate would refuse."""
    config = settings.load(path)
    root = path.resolve().parent
    return outlook.outlook(config, root, gate(config, root))
