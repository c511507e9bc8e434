# Every target creates `.venv` and installs into it when needed; afterwards it works offline.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
HUB_FILES := $(wildcard *_spaceexplore.py)

.DEFAULT_GOAL := help
.PHONY: help quickstart test benchmark lint

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile
	@echo 'Pass options with ARGS, for example: make quickstart ARGS="--tickers AAPL,MSFT"'

quickstart: $(STAMP) ## train, evaluate and draw a forecast on the sample prices
	$(BIN)/python scripts/quickstart.py $(ARGS)

test: $(STAMP) ## run the tests
	$(BIN)/python tests/fetch_transformers_tests.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 $(ARGS)

benchmark: $(STAMP) ## measure the benchmarks' ratios beside the committed ones
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/check.py $(ARGS)

# mlinter searches a directory recursively, .venv included: it is given the Hub files that it has rules for. There is no
# exception to a rule.
lint: $(STAMP) ## check style (ruff) and transformers' modeling conventions (mlinter)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mlinter --enable-all-trf-rules --no-progress $(filter-out front_end_% indicators_% legacy_% paths_% pipeline_% t2t_%,$(HUB_FILES))

# The stamp is written last: an installation that was interrupted is resumed by the next call.
$(STAMP): pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is missing or older than Python 3.11; choose one with: make PYTHON=/path/to/python3" >&2; \
		exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (the first time this downloads PyTorch and takes minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@
