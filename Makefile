# Two commands do everything: `make serve` and `make test`. `make` alone lists all.

PYTHON ?= python3
COMMA := ,
ARGS ?=
FUZZ_SECONDS ?= 60

PIP_INSTALL = -m pip install -qq --disable-pip-version-check --root-user-action=ignore
REQUIREMENTS = requirements/torch-cpu.txt requirements/torchrec-cpu.txt
# .venv serves too once it is complete and up to date; until then a light one without torch is enough.
NEWER = $(foreach file,pyproject.toml $(REQUIREMENTS),-newer $(file))
SERVE_VENV = $(if $(shell find .venv/.complete $(NEWER) 2>/dev/null),.venv,.venv-serve)

# What computes on an NVIDIA GPU is installed where there is one.
GPU = $(shell command -v nvidia-smi)

define CHECK_PYTHON
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "narsil-stream needs Python 3.11 or newer; $(PYTHON) is none. Name another: make PYTHON=python3.12 ..." >&2; \
  exit 1; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
  echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
  exit 1; }
endef

# Two workers whose products use all cores each spend most of their time waiting for each other.
ONE_THREAD = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
# The tests start hundreds of processes: where the environment forbids it, each would compile the package anew.
COMPILED_ONCE = PYTHONDONTWRITEBYTECODE=

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup serve test gate chaos fuzz lint format clean distclean

help: ## List what make can do (this)
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do \
	  printf '  make %-10s %s\n' "$$name" "$$what"; done

setup: .venv/.complete ## Make .venv, with the tools, torch and TorchRec for CPU

serve: $(SERVE_VENV)/.complete ## Run the whole pipeline here; needs no GPU and no torch (options: make serve ARGS='--http-port 9000')
	@exec $(SERVE_VENV)/bin/narsil serve $(ARGS)

test: setup ## Run the tests, two at a time (options: make test ARGS='-k batch'; one at a time: ARGS='-n 0')
	@$(ONE_THREAD) $(COMPILED_ONCE) .venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

gate: setup ## Hold the hot path to limits, half a minute (options: make gate ARGS='--only scheduler')
	@.venv/bin/narsil bench gate $(ARGS)

chaos: setup ## Load, kill and freeze a whole system, about 5 minutes (options: make chaos ARGS='--json chaos.json')
	@.venv/bin/narsil bench chaos $(ARGS)

fuzz: setup ## Fuzz every decoder, FUZZ_SECONDS=60 each (options: make fuzz ARGS=http)
	@FUZZ_SECONDS=$(FUZZ_SECONDS) .venv/bin/python -m tests.fuzz $(ARGS)

lint: setup ## Check style, types and the direction of imports
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-logo

format: setup ## Correct style where a tool can
	@.venv/bin/ruff check --quiet --fix .
	@.venv/bin/ruff format --quiet .

clean: ## Remove caches and build outputs
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## Remove these and the virtual environments
	@rm -rf .venv .venv-serve

.venv/.complete: pyproject.toml $(REQUIREMENTS)
	@$(CHECK_PYTHON)
	@echo "Setting up .venv (a minute or more the first time) ..."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP_INSTALL) -e '.[dev$(if $(GPU),$(COMMA)cuda)]'
	@echo "Adding torch and TorchRec for CPU ..."
	@.venv/bin/python $(PIP_INSTALL) -r requirements/torch-cpu.txt
	@.venv/bin/python $(PIP_INSTALL) --no-deps -r requirements/torchrec-cpu.txt
	@touch $@

.venv-serve/.complete: pyproject.toml
	@$(CHECK_PYTHON)
	@echo "Setting up .venv-serve (about half a minute the first time) ..."
	@$(PYTHON) -m venv .venv-serve
	@.venv-serve/bin/python $(PIP_INSTALL) -e '.$(if $(GPU),[cuda])'
	@touch $@
