# What is typed while developing. Each makes .venv first where there is none.
SHELL := /bin/bash
in_environment := source run_scripts/_environment.sh &&

.PHONY: check lint format types test patches lock

check: lint types test patches ## everything a change must pass

lint:
	$(in_environment) ruff format --check . && ruff check .

format:
	$(in_environment) ruff check --fix . ; ruff format .

types:
	$(in_environment) mypy

test:
	bash run_scripts/test.sh all

patches:
	bash run_scripts/run.sh patches verify

# Needs uv. Keeps what is locked already where it still fits; one version of each package for every Python.
lock:
	uv pip compile --quiet --universal --python-version 3.10 --fork-strategy fewest --extra dev --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
