"""Try tokenizer and chat template of a base in a child process first: they may take all memory, or never end.

A normalizer that doubles a text 34 times, or a template that centres a letter in five gigabytes, can't be
interrupted in this process: the work is one call of C or Rust. A child process with limits tells.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harvester.system.limited_child import LimitedChild
from trainer.errors import StudentError
from trainer.model.weights import read_chat_template, read_json

# Limits of one trial: the largest published tokenizers load in 3 s and 700 MiB.
TIMEOUT_S = 20.0
MEMORY_BYTES = 2 << 30

_TEXT = "The quick brown fox\n\n  jumps over 12 lazy dogs. Äpfel, 水, 🙂 <tag> aaaaaaaa"
_MESSAGES = [
    {"role": "user", "content": _TEXT},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "What is 2 + 2?"},
]
_child = LimitedChild(MEMORY_BYTES)
# What was tried: path, size and time of change of each file.
_tried: set[tuple[tuple[str, int, int], ...]] = set()


def require_harmless(folder: Path, template: Path | None = None) -> None:
    """Do nothing when tokenizer and template end within the limits; what else is wrong shows later.

    Raises:
        StudentError: they take too long or too much memory, or end the process.
    """
    named = [*sorted(folder.glob("token*")), *sorted(folder.glob("chat_template*")), template]
    files = [path for path in named if path is not None and path.is_file()]
    identity = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    if identity in _tried:
        return
    for part in ("tokenizer", "template"):
        try:
            _child.call(
                f"{__name__}:try_{part}",
                str(folder),
                None if template is None else str(template),
                timeout_s=TIMEOUT_S,
            )
        except (TimeoutError, MemoryError) as error:
            raise _refused(f"the {part}", error, folder) from None
        except Exception:  # noqa: BLE001, S112 - the loader says what is wrong with the files
            continue
    _tried.add(identity)


def require_harmless_targets(adapter: Path) -> None:
    """Do nothing when the regular expression of an adapter's target modules, if it is one, can be matched.

    Raises:
        StudentError: matching does not end within the limits.
    """
    targets = read_json(adapter / "adapter_config.json").get("target_modules")
    if not isinstance(targets, str) or targets.replace("-", "").isalnum():
        return
    try:
        _child.call(f"{__name__}:try_pattern", targets, timeout_s=TIMEOUT_S)
    except (TimeoutError, MemoryError) as error:
        raise _refused("the pattern target_modules", error, adapter) from None
    except Exception as error:  # noqa: BLE001 - no regular expression
        raise StudentError(f"target_modules is no pattern: {str(error)[:200]}", place=str(adapter)) from None


def try_pattern(pattern: str) -> None:
    """Match a pattern against names like those of modules (in the child)."""
    for name in ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.127.mlp.experts.255.down_proj"):
        re.fullmatch(pattern, name)


def _refused(what: str, error: Exception, folder: Path) -> StudentError:
    is_late = isinstance(error, TimeoutError)
    why = f"takes longer than {TIMEOUT_S:g} s" if is_late else "takes too much memory, or ends the process"
    return StudentError(f"{what} {why}", place=str(folder), remedy="use one from a source that you trust")


def try_tokenizer(folder: str, _: str | None) -> None:
    """Load the tokenizer and encode a text (in the child)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.decode(tokenizer.encode(_TEXT).ids)


def try_template(folder: str, template: str | None) -> None:
    """Render each template of the base (in the child)."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda _: "26 Jul 2024")
    for text in _templates(Path(folder), None if template is None else Path(template)):
        try:
            environment.from_string(text).render(messages=_MESSAGES, add_generation_prompt=True, tools=None)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001, S112 - what the template's author chose; the next may be a bomb
            continue


def _refuse(message: Any) -> None:
    raise ValueError(str(message)[:100])


def _templates(folder: Path, template: Path | None) -> Iterator[str]:
    paths = [*folder.glob("chat_template*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    for path in [*paths, *([template] if template is not None else [])]:
        yield read_chat_template(path)
    for name in ("tokenizer_config.json", "chat_template.json"):
        named = read_json(folder / name).get("chat_template")
        entries = named if isinstance(named, list) else [named]
        for entry in entries:
            text = entry.get("template") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                yield text
