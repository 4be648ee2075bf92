# Every target works from a fresh clone: it creates .venv first. PYTHON names the interpreter (>= 3.11),
# WORKERS the number of test processes.
PYTHON ?= python3
WORKERS ?= 4
SOAK_SECONDS ?= 720
# Hundreds of the tests' processes would otherwise compile the package anew, a third of a second each.
unexport PYTHONDONTWRITEBYTECODE
# pip compiles what it installs on one core, and all of it: `compileall` takes them all. What is left out here, hundreds
# of models above all, is compiled when it is first imported: of most of it that is never.
UNCOMPILED := /(models|tests?|testing|benchmarks|examples|_inductor|onnx|moto|sqlalchemy|selenium|debugpy|pip|mypyc?|networkx)/
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: help demo docs test test-slow test-all test-long torture torture-trainer soak bench fuzz bench-trainer quality quality-smoke quality-real test-families test-harness test-trackers test-qlora test-ray test-gguf architectures check lint types layers format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[train,dev,docs]'
	@$(BIN)/python -m compileall -q -j 0 -x '$(UNCOMPILED)' $(VENV)/lib >/dev/null 2>&1 || :
	@touch $@

demo: $(STAMP)  ## everything once, offline: mock teacher -> corpus -> student -> scorecard -> report
	$(BIN)/python -m harvester demo

test: $(STAMP)  ## the default test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow and not long and not torture and not families and not harness and not gguf and not trackers and not qlora and not ray'

test-slow: $(STAMP)  ## the tests marked `slow`
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'slow and not long'

test-all: $(STAMP)  ## both in one session, as CI does: what the tests share is loaded once
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not long and not torture and not families and not harness and not gguf and not trackers and not qlora and not ray'

test-long: $(STAMP)  ## the tests marked `long`: a soak, fifty kills, a compiler, 200 simulated servers; minutes each
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m long

torture: $(STAMP)  ## hundreds of kills and faults, for hours (TORTURE_KILLS=N for another number)
	$(BIN)/python -m pytest -m torture -s

torture-trainer: $(STAMP)  ## kill a training 200 times; each time it must resume to the same bits
	$(BIN)/python -m pytest -m torture tests/trainer

bench: $(STAMP)  ## throughput and memory beside a bare loop: 15 minutes on an idle machine; uses nginx if installed
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/cancelled.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/limit_share.py
	$(BIN)/python benchmarks/shared_limits.py
	$(BIN)/python benchmarks/replicas.py

soak: $(STAMP)  ## a day's faults and kills in 12 minutes (SOAK_SECONDS=N for another length)
	$(BIN)/python benchmarks/soak.py --seconds $(SOAK_SECONDS)

fuzz: $(STAMP)  ## a million mutated answers, streams, headers and prompts: an hour; may be interrupted
	@mkdir -p build
	$(BIN)/python benchmarks/fuzz.py --inputs 1000000 --state build/fuzz.json

bench-trainer: $(STAMP)  ## compare the trainer with TRL 1.16 on the CPU; creates an environment for TRL once
	$(BIN)/python benchmarks/trainer_vs_trl.py

quality: $(STAMP)  ## distil small neural teachers by every method (E0 to E13): about 19 minutes on two cores, cached
	$(BIN)/python -m benchmarks.quality

quality-smoke: $(STAMP)  ## a few small students of `make quality`, in half a minute; the slow tests run it, too
	$(BIN)/python -m benchmarks.quality --smoke --out build/quality-smoke

quality-real: $(STAMP)  ## distil SmolLM2-135M behind llama.cpp's server on the CPU: 15 minutes on an idle machine
	$(BIN)/python benchmarks/quality_real.py

test-families: $(STAMP)  ## take a tiny student of every family through every command (about 10 minutes)
	$(BIN)/python -m pytest -n $(WORKERS) -m families

architectures: $(STAMP)  ## take every causal model of transformers through every command (about an hour; may be interrupted)
	$(BIN)/python -m tests.trainer.architectures.sweep trainer/ARCHITECTURES.md build/architectures.json

test-harness: $(STAMP)  ## score a tiny student by lm-evaluation-harness, which it installs (hundreds of MB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev,docs,harness]'
	$(BIN)/python -m pytest -m harness

TRACKERS := build/trackers

test-trackers: $(STAMP)  ## train with Weights & Biases and MLflow, offline; it installs both into build/trackers (900 MB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(TRACKERS) $$(grep -E '^(wandb|mlflow)==' constraints.txt)
	PYTHONPATH=$(TRACKERS) $(BIN)/python -m pytest -m trackers

QLORA := build/qlora

test-qlora: $(STAMP)  ## train on a base in 4 bits with bitsandbytes, which it installs into build/qlora (100 MB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(QLORA) -c constraints.txt bitsandbytes
	PYTHONPATH=$(QLORA) $(BIN)/python -m pytest -m qlora

RAY := build/ray

test-ray: $(STAMP)  ## run fleets on a Ray cluster of this machine, which it installs into build/ray (250 MB); 5 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(RAY) $$(grep -E '^(ray|msgpack)==' constraints.txt)
	PYTHONPATH=$(RAY) $(BIN)/python -m pytest -n 0 -m ray

GGUF := build/gguf

test-gguf: $(STAMP)  ## serve GGUF files of small students by llama.cpp, which it installs into build/gguf (140 MB)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(GGUF) -c constraints.txt cyllama xllamacpp
	PYTHONPATH=$(GGUF) $(BIN)/python -m pytest -m gguf

docs: $(STAMP)  ## build the pages of docs/ into build/docs, without a network; a warning is an error
	$(BIN)/python docs/build.py build/docs

check: lint types layers  ## ruff, mypy, import contracts

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

layers: $(STAMP)
	$(BIN)/lint-imports

format: $(STAMP)  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets created; never removes answers
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
