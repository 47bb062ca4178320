# Everything a person types to work on Drivebay; `make` alone lists it.
# The work itself is in tools/setup.py and tools/checks.py.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup build run check test bench docs dev asan clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## install Debian packages, the virtual environment and the build; only what is missing
	@$(PYTHON) tools/setup.py

build: setup  ## the same: the build is part of the set-up, and is made again when a source changed

run: setup  ## boot a real guest in QEMU on a disk that we serve
	@$(BIN)/drivebay demo

check: setup  ## format, lint, types, style and unit tests: under two minutes
	@$(BIN)/python tools/checks.py check

test: setup  ## everything that CI runs: check, then spec, property, hostile and end-to-end tests
	@$(BIN)/python tools/checks.py test

bench: setup  ## measure against other targets: a table, a chart, benchmarks/results
	@$(BIN)/python benchmarks/vhost_blk.py

docs:  ## list the documents
	@for page in README.md CONTRIBUTING.md docs/*.md; do \
	  printf '  %-28s %s\n' "$$page" "$$(sed -n 's/^# //p;T;q' $$page)"; done

dev:  ## an editable install in .venv-dev, rebuilt when it is imported
	@$(PYTHON) tools/setup.py dev

asan:  ## unit tests with bounds checks, address and undefined-behaviour sanitizers
	@$(PYTHON) tools/setup.py asan
	@LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:handle_segv=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  .venv-asan/bin/python -m pytest -q tests/unit

clean:  ## remove the environments, the build and every cache in the clone
	rm -rf .venv .venv-dev .venv-asan build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
