"""Write the folder of `harvester init`; it runs as it is, with the mock teacher."""

from __future__ import annotations

import contextlib
from pathlib import Path

from harvester.errors import ConfigError
from harvester.system import output_path
from harvester.system.path_names import require_utf8

HARVEST_TOML = """\
[teacher]
base_url = "http://127.0.0.1:8000/v1"    # `harvester mock-teacher --port 8000`, or your own server
model = "mock-teacher"
terms = "mock-teacher"                   # a terms record: `harvester terms list`
# api_key_env = "TEACHER_API_KEY"        # the NAME of an environment variable, never the key
# max_n = 8                              # samples that one request may ask for: one prompt fee for all (`n`)

[teacher.limits]                         # all optional; learned from the teacher if absent
max_concurrency = 64
# requests_per_minute = 600
# tokens_per_minute = 100_000

[teacher.price]                          # USD per million tokens, and the day you read it
input = 0.0
output = 0.0
as_of = 2026-11-01

[prompts]
files = ["prompts/*.jsonl"]
# system = "You answer briefly."

[sampling]
temperature = 0.0
max_tokens = 256
# samples = 4                            # answers to each prompt; raise temperature for them

# [verify.sum]                           # how answers to prompts with this tag or task are judged
# kind = "numeric"
# [accept]                               # instead of samples: ask further ones until enough pass
# per_prompt = 1
# of = 8

[store]
path = "store"

[budget]                                 # limits of one run, which stops before it exceeds them
tokens = 1_000_000
# [budget.store]                         # of all runs together; also [budget.day], [budget.month] (UTC)
# usd = 20.0

[run]
max_failed = 0
# transport = "batch"                    # the provider's Batch API: half price, in up to a day; or "hybrid"
"""

PROMPTS = """\
{"prompt": "What is 124 + 57?", "reference": "181", "tags": ["sum"]}
{"prompt": "Reverse the letters of planet.", "reference": "tenalp", "tags": ["reverse"]}
{"messages": [{"role": "system", "content": "Answer with one word."}, {"role": "user", "content": "Write hello in upper case."}], "reference": "HELLO"}
"""  # noqa: E501 - a JSON line is one line

README = """\
# A harvest

    harvester mock-teacher --port 8000     # in another terminal; or point harvest.toml at your teacher
    harvester plan harvest.toml            # counts, cost, terms; sends nothing
    harvester run harvest.toml             # Ctrl-C at any time; the same command resumes
    harvester status store
    harvester report store

Answers are in `store/shards/*.parquet`. A prompt line is {"prompt": "..."} or {"messages": [...]},
with optional `id`, `reference`, `tags`. `tools` and `response_format` are sent with it; other fields are
stored with the answer and never sent. `harvester import FILE` converts files of other tools.
"""


def write_starter(folder: Path) -> tuple[Path, ...]:
    """Write the files into `folder` and return their paths.

    Raises:
        ConfigError: one of the files exists already, the folder can't be written, or its name is no UTF-8.
        StoreFull: the disk is full.
    """
    require_utf8(folder, "name another folder")
    files = {"harvest.toml": HARVEST_TOML, "prompts/first.jsonl": PROMPTS, "README.md": README}
    paths = {folder / name: text for name, text in files.items()}
    if folder.exists() and not folder.is_dir():
        raise ConfigError("is a file", place=str(folder), remedy="name a new folder")
    for path in paths:
        if path.exists():
            raise ConfigError("file exists already", place=str(path), remedy="name a new folder")
    try:
        for path, text in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        for path in paths:  # none was there before; half of them would refuse the next try
            with contextlib.suppress(OSError):
                path.unlink()
        raise output_path.refused(error, folder, "name a new folder") from None
    return tuple(paths)
