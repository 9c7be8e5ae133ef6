# Everything starts with a bare checkout: the first target called makes the environment.
#
#   make demo                           a first run
#   make test                           everything a change has to pass
#   make help                           the rest
#
# PYTHON=python3.12   interpreter the environment is made from
# VENV=path           where the environment lives
# PIPFLAGS=...        passed on to pip, e.g. --no-compile (faster set-up)
# WORKERS=2           test processes
# TORCH=2.11.0        version of torch for `make wheel`; the newest without
# JAX=path            where the environment of `make jax` lives

PYTHON   ?= python3
VENV     ?= .venv
PIPFLAGS ?=
WORKERS  ?= 2
TORCH    ?=
JAX      ?= .venv-jax

BIN  := $(VENV)/bin
OK   := $(VENV)/.ok
LOOK := $(VENV)/.look
PIP  := -m pip install --quiet --disable-pip-version-check $(PIPFLAGS)
# One thread each, or the test processes fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet
CODE := bilevel methods tests $(wildcard examples benchmarks docs)

.DEFAULT_GOAL := help
.PHONY: help setup demo test format lint types unit doctest examples docs faults wheel constraints jax clean
.NOTPARALLEL:

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(OK)  ## make the environment
	@:

# An environment with an extra of pyproject.toml. The stamp is written last: an interrupted set-up is
# taken up again by the next call.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "bilevel needs Python 3.11 or newer as '$(PYTHON)'; name another one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV); the first time takes some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[$(1)]'
	@touch $@
endef

$(OK): pyproject.toml constraints.txt
	$(call install,dev)

# For a first look: what a user needs, without linters, tests and documentation tools.
$(LOOK): pyproject.toml constraints.txt
	$(call install,report)

demo: $(if $(wildcard $(OK)),$(OK),$(LOOK))  ## train a small model and show what comes out
	@$(BIN)/python -m bilevel demo

test: lint types unit doctest docs  ## everything: style, types, tests, examples, documentation
	@echo "All checks passed"

format: $(OK)  ## rewrite the code in the house format
	@$(BIN)/ruff format --quiet $(CODE)
	@$(BIN)/ruff check --quiet --fix $(CODE)

lint: $(OK)  ## format and lint, without changing anything
	@$(BIN)/ruff format --quiet --diff $(CODE)
	@$(BIN)/ruff check --quiet $(CODE)

types: $(OK)  ## mypy --strict
	@$(BIN)/mypy

unit: $(OK)  ## the tests; every example runs as one of them
	@$(PYTEST) --numprocesses $(WORKERS) --dist loadgroup

doctest: $(OK)  ## the examples in docstrings
	@$(PYTEST) --doctest-modules bilevel

examples: $(OK)  ## only the examples and the documents' code, at small size
	@$(PYTEST) --numprocesses $(WORKERS) --dist loadgroup tests/test_examples.py

docs: $(OK)  ## build the site, every warning an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

faults: $(OK)  ## before a release: hundreds of damaged files and signals, some minutes
	@$(PYTEST) -m faults --capture no tests/test_faults.py

wheel: $(OK)  ## before a release: use the built wheel in a clean environment of PYTHON and TORCH
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && \
	$(BIN)/python -m build --wheel --outdir "$$dir" . > "$$dir/log" 2>&1 || { cat "$$dir/log"; exit 1; } && \
	$(PYTHON) -m venv "$$dir/venv" && \
	"$$dir/venv/bin/python" $(PIP) "$$dir"/bilevel-*.whl $(if $(TORCH),'torch==$(TORCH)') && \
	"$$dir/venv/bin/python" -W error::DeprecationWarning:bilevel tests/installed.py README.md

constraints:  ## renew constraints.txt: the newest versions that install together
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && \
	$(PYTHON) -m venv "$$dir" && \
	"$$dir/bin/python" $(PIP) --editable '.[dev]' && \
	{ sed -n '/^#/p' constraints.txt && \
	  "$$dir/bin/python" -m pip freeze --disable-pip-version-check --exclude-editable \
	  | sed 's/+[a-z0-9.]*$$//' | grep -Ev '^(nvidia-|cuda-|triton=)'; } > "$$dir/constraints.txt" && \
	cp "$$dir/constraints.txt" constraints.txt

# The versions are those that `pip freeze` gave after `pip install jax jaxopt optimistix optax`.
$(JAX)/.ok: benchmarks/jax.txt
	@echo "Setting up $(JAX)"
	@$(PYTHON) -m venv $(JAX)
	@$(JAX)/bin/python $(PIP) --requirement $<
	@touch $@

jax: $(JAX)/.ok  ## JAX and its libraries, for python -m benchmarks.compiled_speed
	@:

clean:  ## remove caches and build products; keeps the environment and runs/
	@rm -rf site dist build .coverage htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find bilevel methods tests $(wildcard examples benchmarks docs) -name __pycache__ -prune -exec rm -rf {} +
