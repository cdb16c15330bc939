# make demo   the whole job on real clips: trains, samples, evaluates, writes runs/demo/report/index.html
# make test   the test suite
# PYTHON=python3.12 chooses the interpreter; TORCH=... another pinned torch (2.11 to 2.13).

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Idle OpenMP threads that spin make a shared CPU ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/lvdm demo

test: .venv/installed-dev
	$(BIN)/pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
	  { echo "error: needs Python 3.11 or 3.12; name one with PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv

# torch first and pinned, so that no other package chooses its build.
.venv/torch: | .venv/bin/python
	$(BIN)/python -c 'import torch' 2> /dev/null || $(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	touch $@

.venv/installed: pyproject.toml .venv/torch
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-dev: pyproject.toml .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
