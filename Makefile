# On a fresh machine: `make demo` shows the whole path, `make test` runs the tests.
# Both make the environment in .venv first if it is not there.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test lint docs docs-check bench clean

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
UV := $(shell command -v uv)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

help:  ## Say what there is
	@sed -n 's/^\([a-z-]*\):[^#]*## /make \1\t/p' Makefile | expand -t 18

install: $(STAMP)  ## Make the environment in .venv and install into it

# uv, where there is one, needs half of pip's two minutes. Compiled here as pip does it: else each
# command would spend its first seconds on it, every time where Python may not write beside itself.
$(STAMP): pyproject.toml
ifdef UV
	test -x $(VENV)/bin/python || uv venv --python $(PYTHON) $(VENV)
	uv pip install --compile-bytecode --python $(VENV)/bin/python -e '.[dev]'
else
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -e '.[dev]'
endif
	touch $@

# The demo remembers its own data, checkpoint and gallery, and leaves yours alone.
demo: export VICVLM_STATE := $(CURDIR)/demo/state.json
demo: export HF_HUB_OFFLINE := 1
demo: $(STAMP)  ## Prepare, pretrain, finetune, evaluate, embed, retrieve; 5 minutes at most
	@rm -rf demo
	vicvlm prepare scenes demo
	vicvlm pretrain --output demo/pretrained
	vicvlm finetune --output demo/finetuned
	vicvlm evaluate | tee demo/recall.txt
	vicvlm embed --split test --output demo/gallery
	vicvlm retrieve "a red circle, a yellow cross and a blue star on grass" --sheet demo/search.png
	@echo
	@cat demo/recall.txt
	@echo "what was found for the query: demo/search.png"

test: export HF_HUB_OFFLINE := 1
test: $(STAMP)  ## Run the tests; 6 minutes at most on 2 cores
	python -m pytest

lint: $(STAMP)  ## Check style, format and types
	ruff check .
	ruff format --check .
	mypy

docs: $(STAMP)  ## Write docs/cli.md from --help
	python docs/make_cli.py

docs-check: $(STAMP)  ## Check that docs/cli.md says what --help says
	python docs/make_cli.py --check

bench: export HF_HUB_OFFLINE := 1
bench: $(STAMP)  ## Measure what costs what, as docs/performance.md tells; ROWS="step" for some
	python benchmarks/bench.py --out benchmarks/results $(ROWS)

clean:  ## Remove what was built, measured or demonstrated; keep .venv and runs/
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache
