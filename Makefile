# decodelab: everything a person does here, as one word. Needs make and Python 3.11 or newer; `make help` lists the words.
PYTHON ?= python3
# Index with CPU-only torch wheels, for machines without a GPU (smaller download): TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base
DEV := $(VENV)/.dev
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c constraints.txt
CHECKS := export-check lint workflows types unit wheel docs-check notebooks

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lab docs bench gpu slow dist hooks readme clean same-python $(CHECKS)

help:  ## this table
	@printf '\n  decodelab: a literate laboratory of decoding methods\n\n'
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile
	@printf '\n  Variables: PYTHON=python3.12   TORCH_INDEX=<index of torch wheels>   DECODELAB_DATA=<folder>   DECODELAB_PROFILE=tiny|small|gpu|paper\n             CHROMIUM=<browser that opens the site>\n\n'

# The environment, in two layers: what decodelab needs, and what working on it needs. A layer is renewed when a requirement changed.
$(BASE): pyproject.toml constraints.txt | same-python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "decodelab needs Python 3.11 or newer: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch (some minutes the first time) ...'
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo 'installing decodelab ...'
	@$(PIP) -e .
	@touch $@

same-python:
ifneq ($(origin PYTHON), file)  # a Python was named: the environment must have it
	@test ! -x $(BIN)/python || test "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" || \
	  { echo "$(VENV) has $$($(BIN)/python -V): remove that folder to use $$($(PYTHON) -V)"; exit 1; }
endif

$(DEV): $(BASE)
	@echo 'installing the laboratory: Jupyter, docs, tests ...'
	@$(PIP) -e '.[dev]'
	@touch $@

demo: $(BASE)  ## see a decoder work, in a minute
	@$(BIN)/decodelab demo

lab: $(DEV)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs $$(test "$$(id -u)" != 0 || echo --allow-root)  # root, as in most containers: Jupyter wants to be told

docs: $(DEV)  ## build the documentation into _site/
	@$(BIN)/python docs/build.py

bench: $(BASE)  ## measure decoders against plain generation, side by side
	@$(BIN)/decodelab bench

readme: $(DEV)  ## write README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

gpu: $(DEV)  ## run all notebooks and the bench on a GPU, results in runs/gpu/
	@$(BIN)/python tools/gpu.py

test: $(DEV)  ## all checks below, quick ones first, stopping at the first failure
	@$(BIN)/python tools/check.py all

export-check: $(DEV)  ## modules are what the notebooks export, notebooks are clean
lint: $(DEV)  ## ruff: lint and format, notebooks included
workflows: $(DEV)  ## workflows, forms and citation are valid; zizmor finds nothing
types: $(DEV)  ## mypy
unit: $(DEV)  ## pytest, two processes; a test that takes over five minutes fails
wheel: $(DEV)  ## build the wheel and use it from a clean environment
docs-check: $(DEV)  ## build the site without a warning and open it in a browser
notebooks: $(DEV)  ## run every notebook in profile tiny, without data and with data
slow: $(DEV)  ## the long tests, not part of `make test`: run nightly
$(CHECKS) slow:
	@$(BIN)/python tools/check.py $@

dist: $(DEV)  ## source distribution and wheel into dist/
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist

hooks: $(DEV)  ## git hooks that keep notebooks clean and mergeable
	@$(BIN)/nbdev-install-hooks

clean:  ## remove what was built (.venv stays)
	@rm -rf _site _docs _proc dist build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis demo.html
	@find decodelab nbs tests tools docs -name __pycache__ -type d -prune -exec rm -rf {} +
