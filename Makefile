# Every target does its own set-up. Needed beforehand: Python 3.11 or newer (and, on Debian, python3-venv).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help venv tools demo test lint bench docs lock clean

help:
	@echo "make demo    the main job on real input, on this machine, in under two minutes"
	@echo "make test    every test (installs what it needs, where it may)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   measurements beside peers, into bench/results/latest.json"
	@echo "make docs    writes the pages that are made from the code"
	@echo "make lock    pins the dependencies anew"

venv: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv || { \
	    echo "A virtual environment could not be made. On Debian: sudo apt-get install -y python3-venv" >&2; \
	    rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

tools:
	@$(PYTHON) infra/tools.py

demo: venv
	$(BIN)/dr-cloud demo

test: venv tools
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv tools
	$(BIN)/python -m bench

docs: venv
	$(BIN)/python infra/docs.py

lock: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header --universal --extra dev \
	    --output-file requirements.lock pyproject.toml

clean:
	rm -rf .venv .tools build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
