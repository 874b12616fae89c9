# Every target creates the environment where it is missing. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/ready
RUN := $(VENV)/bin/python

.PHONY: help demo app test test-fast test-oldest bench notebooks mutants lint check lock clean

help:  ## this list
	@grep -E '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -t -s "$$(printf '\t')"

$(READY): pyproject.toml
	@echo "Setting up $(VENV): torch and the other packages, about 6 GB, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(READY)  ## adapt the bundled CLIP to synthetic radiology images and report, about 6 minutes on 2 slow cores
	$(RUN) train.py

app: $(READY)  ## a page in the browser to try the demo's run, or without it the bundled CLIP
	$(RUN) -m experiments.app

test: $(READY)  ## all tests, about 25 minutes on 2 cores
	$(RUN) -m pytest

test-fast: $(READY)  ## the tests that are not marked slow, about 6 minutes on 2 cores
	$(RUN) -m pytest -m "not slow"

test-oldest:  ## the fast tests with the lowest versions of the required packages; PYTHON=python3.10 or 3.11
	$(PYTHON) -m venv $(VENV)-oldest
	grep -oE '^    "[a-z_0-9]+>=[0-9.]+' pyproject.toml | tr -d ' "' | sed 's/>=/==/' > $(VENV)-oldest/lowest.txt
	test -s $(VENV)-oldest/lowest.txt
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check -e ".[dev]" -c $(VENV)-oldest/lowest.txt
	$(VENV)-oldest/bin/python -m pytest -m "not slow"

bench: $(READY)  ## speed and memory beside peft and full fine-tuning
	$(RUN) -m experiments.benchmark

notebooks: $(READY)  ## execute the notebook and store its outputs, about 2 minutes on 2 cores
	PYTHONWARNINGS=ignore $(VENV)/bin/jupyter execute --inplace experiments/notebooks/lora_from_scratch.ipynb

mutants: $(READY)  ## put known mistakes into a copy of the code and see a test fail on each; writes tests/MUTANTS.md
	$(RUN) tests/mutants.py

lint: $(READY)  ## ruff and mypy --strict
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

check: lint test-fast  ## what continuous integration runs; `make test` adds the slow tests

lock: $(READY)  ## the versions of every package in the environment
	$(VENV)/bin/pip freeze --exclude-editable

clean:  ## remove the environment and everything generated; runs/ stays
	rm -rf $(VENV) $(VENV)-oldest build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
