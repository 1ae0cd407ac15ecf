# One command each: `make demo` to read a report, `make test` to see the tests pass, `make lab` to explore.
# PYTHON=python3.11 chooses the interpreter; PIP_EXTRA_INDEX_URL and the like are honoured, as pip always does.
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

help:
	@echo "make demo         install into $(VENV), make the demo data, run every analysis, print the front page's path"
	@echo "make test         install, then all tests"
	@echo "make lab          JupyterLab on the notebooks, kernels registered"
	@echo "make prepare      export, clean, README: before a commit"
	@echo "make constraints  resolve constraints.txt anew from settings.ini and constraints.in"

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, '$(PYTHON)' is not: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into $(VENV): about 2 GB, a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet "$$(grep '^pip==' constraints.txt)" "$$(grep '^setuptools==' constraints.txt)" "$$(grep '^wheel==' constraints.txt)"
	@$(INSTALL) torch
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@$(BIN)/perturbnb kernels --install
	@if git rev-parse --git-dir >/dev/null 2>&1; then PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-install-hooks; fi
	@touch $(STAMP)

setup: $(STAMP)

demo: $(STAMP)
	@$(BIN)/perturbnb demo

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

lab: $(STAMP)
	@$(BIN)/perturbnb kernels --install
	@$(BIN)/jupyter lab nbs

prepare: $(STAMP)
	@$(BIN)/jupyter nbconvert --log-level ERROR --clear-output --inplace nbs/analysis/*.ipynb
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev-export && PATH="$(CURDIR)/$(BIN):$$PATH" nbdev-clean && $(BIN)/python tests/project.py --write-readme

constraints: $(STAMP)
	@$(BIN)/python tests/project.py --constraints

.PHONY: help setup demo test lab prepare constraints
