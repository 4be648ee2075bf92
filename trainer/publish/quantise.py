"""Quantise a GGUF file by llama.cpp's own `llama_model_quantize`, as the package `cyllama` wraps it.

    python -m trainer.publish.quantise IN OUT TYPE THREADS

It is a process of its own: what llama.cpp can't do ends its process.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from trainer.errors import ConfigError, StudentError

# Numbers of `llama_ftype` in llama.cpp's include/llama.h.
FILE_TYPES = {"q4_k_m": 15}


def require_quantiser() -> None:
    """Do nothing where llama.cpp's quantiser can be imported.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("cyllama") is None:
        raise ConfigError(
            "llama.cpp's quantiser is not installed (cyllama)",
            place="--gguf",
            remedy="pip install 'blackbox-distillation[gguf]', or export f16 and run llama-quantize on it",
        )


def quantise(source: Path, file: Path, kind: str, threads: int = 1) -> None:
    """Write a quantised copy of a GGUF file.

    llama.cpp mixes types: a tensor whose rows are no multiple of 256 gets a type with blocks of 32.

    Args:
        source: with weights of f32, bf16 or f16.
        kind: a key of `FILE_TYPES`.

    Raises:
        StudentError: llama.cpp fails; has its last line.
    """
    command = [sys.executable, "-m", __spec__.name, str(source), str(file), kind, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode or not file.is_file():
        raise StudentError(
            f"llama.cpp can't quantise the student as {kind}: {_reason(done.stderr, done.returncode)}",
            place=str(source),
            remedy="export f16 or q8_0; q4_k_m needs rows of a multiple of 32",
        )


def _reason(log: str, code: int) -> str:
    """Return what llama.cpp says of a failure; else the last line of its log."""
    if match := re.search(r"failed to quantize: (.+)", log):
        return match[1].strip()
    lines = log.strip().splitlines()
    return lines[-1] if lines else f"exit {code}"


def main() -> None:
    """Quantise as the command line says."""
    from cyllama.llama import llama_cpp

    source, file, kind, threads = sys.argv[1:]
    parameters = llama_cpp.LlamaModelQuantizeParams()
    parameters.ftype = FILE_TYPES[kind]
    parameters.nthread = int(threads)
    llama_cpp.model_quantize(source, file, parameters)


if __name__ == "__main__":
    main()
