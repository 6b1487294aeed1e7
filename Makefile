# Two commands on a fresh machine: make quickstart, make test. Python >= 3.11; PYTHON=... picks another.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# An NVIDIA GPU that answers gets jax[cuda12].
REQUIREMENTS := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo requirements.txt || echo requirements-cpu.txt)
BIN := .venv/bin
# Tests at a time. Many wait for processes that they start, so two cores are busy with four.
WORKERS ?= 4

.PHONY: quickstart test test-slow check format docs notebooks clean

quickstart: .venv/installed
	$(BIN)/python -m experiments.cifar --flagfile=experiments/flags/quickstart.cfg --workdir=runs/quickstart --overwrite

test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Into build/site.
docs: .venv/installed
	$(BIN)/pip install --quiet -e .[docs]
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo open build/site/index.html

# Runs the notebooks anew and stores them; two quiet cores give the nicest timelines.
notebooks: .venv/installed
	PYTHONPATH=$(CURDIR) $(BIN)/python notebooks/run.py notebooks/*.ipynb

.venv/installed: pyproject.toml requirements.txt requirements-cpu.txt requirements-base.txt
	@test -n "$(PYTHON)" || { echo "Python >= 3.11 is needed; name one with make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r $(REQUIREMENTS)
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
