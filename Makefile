.DEFAULT_GOAL := help
.PHONY: help env demo test lint format clean
RUN := source scripts/environment.sh && use_environment dev &&
SHELL := bash

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: ## make .venv with everything the trainer and its tests need
	bash scripts/environment.sh dev

demo: ## train and evaluate a tiny model on this machine
	bash scripts/demo.sh

test: ## linters, type check, import contract, tests
	bash scripts/test.sh

lint: ## linters, type check and import contract alone
	@$(RUN) ruff check . && ruff format --check . && mypy && lint-imports

format: ## format the code and fix what ruff can fix
	@$(RUN) ruff check --fix . && ruff format .

clean: ## remove caches and build leftovers; .venv and outputs stay
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
