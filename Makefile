SHELL := /bin/bash
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check install bench soak clean demo-checkpoint

help:  ## Show what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

demo: install  ## From nothing to pictures: start a farm, render, leave PNGs and a contact sheet in ./latentfarm-demo
	@$(BIN)/latentfarm demo

test: install  ## Run every test: unit, conformance, integration, acceptance
	@$(BIN)/pytest tests/unit tests/conformance tests/integration tests/acceptance

check: install  ## Lint, check formatting, types and import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

install: $(INSTALLED)  ## Create .venv and install everything, torch first (TORCH_INDEX=URL picks PyTorch's index)

$(INSTALLED): pyproject.toml demo/pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch …"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "installing latentfarm and its tools …"
	@$(PIP) --editable ./demo --editable '.[dev]'
	@touch $@

bench: install  ## Measure memory and speed on this machine; results in bench/results
	@$(BIN)/python -m bench

soak: install  ## The long form of the fault suite and of the ledger's model (an hour)
	@STORM_S=600 FAULT_S=120 $(BIN)/pytest tests/acceptance/test_storm.py tests/acceptance/test_recovery.py tests/acceptance/test_scheduling.py -s --timeout 3000
	@$(BIN)/pytest tests/integration/test_ledger_model.py --hypothesis-profile=soak --timeout 0

demo-checkpoint: install  ## Make the demo checkpoint again from nothing (hours; resumable)
	@PYTHONPATH=tools $(BIN)/python -m demo_checkpoint

clean:  ## Remove everything that was made here
	rm -rf $(VENV) latentfarm-demo bench/results dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
