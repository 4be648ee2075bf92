# Every target works from a fresh clone: it makes .venv first. PYTHON picks the interpreter (>= 3.11),
# WORKERS how many processes the default suite runs in.
PYTHON ?= python3
WORKERS ?= 2
SOAK_SECONDS ?= 720
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: help demo test test-slow torture torture-trainer soak bench bench-trainer check lint types layers format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

demo: $(STAMP)  ## the whole journey, offline: mock teacher -> corpus -> student -> scorecard
	$(BIN)/python -m harvester demo

test: $(STAMP)  ## the default suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow and not torture'

test-slow: $(STAMP)  ## what the default suite leaves out
	$(BIN)/python -m pytest -m 'slow and not torture'

torture: $(STAMP)  ## a thousand kills under way (TORTURE_KILLS=N for another number)
	$(BIN)/python -m pytest -m torture -s

torture-trainer: $(STAMP)  ## 200 kills of a training, each resumed to the same bits
	$(BIN)/python -m pytest -m torture tests/trainer

bench: $(STAMP)  ## ratios against bare loops: about 15 minutes on an idle machine, with nginx if installed
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/cancelled.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/limit_share.py

soak: $(STAMP)  ## a scaled day of faults, storms, kills: 12 minutes (SOAK_SECONDS=N for another length)
	$(BIN)/python benchmarks/soak.py --seconds $(SOAK_SECONDS)

bench-trainer: $(STAMP)  ## our trainer beside TRL 1.16 on this CPU; makes an environment for TRL once
	$(BIN)/python benchmarks/trainer_vs_trl.py

check: lint types layers  ## ruff, mypy, import contracts

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

layers: $(STAMP)
	$(BIN)/lint-imports

format: $(STAMP)  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the targets generated, never answers
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
