# What can be done with a checkout. Everything is installed into VENV, on first use.
#
#   make demo                  runs the main job on this machine
#   make test                  runs every test
#   make check                 lint, types and the fast tests
#   make parity PARITY=folder  compares with reference cases in a folder
#   make faults                tries what can happen to a run: kills, full disks, damaged files …
#   make bench                 compares every schedule and sampler on an exact denoiser
#   make proofs                every proof; make proof-NAME one of them, SEED=n another seed
#   make ablate-NAME           a proof and its retrained controls with three seeds
#   make clean                 removes .venv and everything built
#
# PYTHON=python3.12 chooses the interpreter, VENV=folder another environment, WORKERS=4 the
# processes that run tests, ARGS="…" adds arguments to the command of `demo`, `test`, `faults`,
# `parity`, `bench`, `proof-…`, `ablate-…`.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
PARITY ?=
SEED ?= 0

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
DEMO_READY := $(VENV)/.diffusion_jax-demo
TEST_READY := $(VENV)/.diffusion_jax-test

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check parity faults bench proofs clean

PROOFS := ddpm classifier_guidance classifier_free
RESULTS := --results experiments/RESULTS.md

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(DEMO_READY)
	$(BIN)/diffusion-jax demo $(ARGS)

test: $(TEST_READY)
	$(PYTEST) $(ARGS)

check: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(PYTEST) -q -m "not slow"

parity: $(TEST_READY)
	@test -n "$(PARITY)" || { echo "make parity needs a folder of reference cases:" \
		"make parity PARITY=folder"; exit 2; }
	$(BIN)/python -m tests.parity "$(PARITY)" $(ARGS)

faults: $(TEST_READY)
	$(BIN)/python -m tests.faults $(ARGS)

bench: $(DEMO_READY)
	$(BIN)/diffusion-jax bench order
	$(BIN)/diffusion-jax bench schedules $(ARGS)

proofs: $(PROOFS:%=proof-%)

proof-%: $(DEMO_READY)
	$(BIN)/diffusion-jax proof $* --seed $(SEED) $(RESULTS) $(ARGS)

ablate-%: $(DEMO_READY)
	$(BIN)/diffusion-jax ablate $* $(RESULTS) $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# pip is the last thing that venv creates, so an interrupted creation is taken up again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or \
		sys.exit(f"Python 3.11 or newer is needed, $(PYTHON) is {v}: make PYTHON=python3.12")'
	@echo "Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv "$(VENV)"

# The command and its packages only, or also what the tests need.
$(DEMO_READY): EXTRAS := demo
$(TEST_READY): EXTRAS := demo,test
$(DEMO_READY) $(TEST_READY): setup.py pyproject.toml | $(BIN)/pip
	@echo "Installing diffusion_jax [$(EXTRAS)] into $(VENV); this takes some minutes once"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $(if $(findstring test,$(EXTRAS)),$(DEMO_READY)) $@
