# Every target sets up what it needs: a fresh clone and `make see` are enough.
# Works with GNU make 3.81 and a POSIX shell.

# The sentence that `make see` shows. It reaches the command through the environment, never
# through this file's own text, so quotes, dollar signs and any script may stand in it.
TEXT ?= The animal didn't cross the street because it was too tired.
override TEXT := $(value TEXT)
export TEXT

PYTHON = .venv/bin/python
HEADSCOPE = .venv/bin/headscope
# The versions that were tested; `make … CONSTRAINTS=` takes the newest ones instead.
CONSTRAINTS = constraints.txt
INSTALL = $(PYTHON) -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %)

PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal --durations=10

.PHONY: help see test quick long check format bench clean

help:
	@echo 'make see TEXT="…"   what the heads of a real model attend to in a text'
	@echo 'make quick          the fast tests: what one runs all day'
	@echo 'make test           the tests, as continuous integration runs them'
	@echo 'make long           the tests that take longer'
	@echo 'make check          formatting, style and types'
	@echo 'make format         put the formatting right'
	@echo 'make bench          the measurements'
	@echo 'make clean          remove what the targets made, except the environment .venv'

see: .venv/.installed
	@$(HEADSCOPE) pull smollm2
	@mkdir -p out
	@$(HEADSCOPE) see --figure out/heads.png -- "$$TEXT"

test: .venv/.models
	$(PYTEST) -m 'not long' $(ARGS)

quick: .venv/.models
	$(PYTEST) -m 'not slow and not long' $(ARGS)

long: .venv/.models
	$(PYTEST) -m long $(ARGS)

check: .venv/.installed-dev
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

format: .venv/.installed-dev
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

bench: .venv/.installed-dev
	@$(INSTALL) -e '.[bench]'
	@ls benchmarks/*.py >/dev/null 2>&1 || { echo 'There is no benchmarks/*.py to run.' >&2; exit 1; }
	@for script in benchmarks/*.py; do echo "$$script"; $(PYTHON) "$$script" || exit 1; done

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. A stamp is touched last, so a step that was cut short is done again.
.venv/.installed: pyproject.toml constraints.txt .venv/.made
	@echo 'Installing headscope (the first time takes some minutes) …'
	@$(INSTALL) -e '.[all]'
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt .venv/.made
	@echo 'Installing headscope with its tests and checks (the first time takes some minutes) …'
	@$(INSTALL) -e '.[all,test,check]'
	@touch .venv/.installed $@

.venv/.models: .venv/.installed-dev
	@$(HEADSCOPE) pull smollm2
	@$(HEADSCOPE) pull minilm
	@touch $@

.venv/.made:
	@if .venv/bin/python -m pip --version >/dev/null 2>&1; then touch $@; exit 0; fi; \
	for python in python3.14 python3.13 python3.12 python3.11 python3; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "Making .venv with $$python"; \
	    if rm -rf .venv && "$$python" -m venv .venv && touch $@; then exit 0; fi; \
	    echo "$$python could not make a virtual environment." >&2; \
	    echo 'On Debian and Ubuntu install the package python3-venv, then run make again.' >&2; \
	    rm -rf .venv; exit 1; \
	  fi; \
	done; \
	echo 'No Python 3.11 or newer found (tried python3.14, python3.13, python3.12, python3.11, python3).' >&2; \
	echo 'Install one, then run make again.' >&2; exit 1
