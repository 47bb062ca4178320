# Everything a person types to work on Drivebay; `make` alone lists it.
# The work itself is in tools/setup.py and tools/checks.py.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup build run check test soak bench check-images docs dev asan fuzz clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## install Debian packages, the virtual environment and the build; only what is missing
	@$(PYTHON) tools/setup.py

build: setup  ## the same: the build is part of the set-up, and is made again when a source changed

run: setup  ## boot a real guest in QEMU on a disk that we serve
	@$(BIN)/drivebay demo

check: setup  ## format, lint, types, style and unit tests: under two minutes
	@$(BIN)/python tools/checks.py check

AND ?=
test: setup  ## check, then spec, property, hostile and end-to-end tests and a short fuzz; CI runs it AND=asan
	@$(BIN)/python tools/checks.py test $(AND)

soak: setup  ## the crash tests at length: 100 kills for each kind of ring, 10,000 sessions
	@$(BIN)/python tools/checks.py soak

bench: setup  ## measure against other targets: a table, a chart, benchmarks/results
	@$(BIN)/python benchmarks/vhost_blk.py

check-images: setup  ## ask for each address of the cloud images that `image pull` knows; needs internet
	@$(BIN)/python tools/check_images.py

docs:  ## list the documents
	@for page in README.md CONTRIBUTING.md docs/*.md; do \
	  printf '  %-28s %s\n' "$$page" "$$(sed -n 's/^# //p;T;q' $$page)"; done

dev:  ## an editable install in .venv-dev, rebuilt when it is imported
	@$(PYTHON) tools/setup.py dev

asan: setup  ## the data plane's tests and a short fuzz with bounds checks, address and undefined-behaviour sanitizers
	@$(BIN)/python tools/checks.py asan

SECONDS ?= 600
SEED ?=
fuzz: setup  ## fuzz rings (under sanitizers) and messages (by coverage) for SECONDS=600; SEED= repeats
	@$(PYTHON) tools/setup.py asan
	@.venv-asan/bin/python tools/sanitized.py -m fuzz rings --seconds $$(($(SECONDS) / 2)) $(SEED:%=--seed %)
	@$(BIN)/python -m fuzz guided --seconds $$(($(SECONDS) / 2)) $(SEED:%=--seed %)

clean:  ## remove the environments, the build and every cache in the clone
	rm -rf .venv .venv-dev .venv-asan build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
