# Everything runs inside .venv, which is made on the first call; nothing else is needed but
# python3 (3.11 or newer), make and a compiler.
.DEFAULT_GOAL := help
.PHONY: help setup hooks demo starter quick test test-slow test-gpu check fix smoke bench clean

# What a change most often breaks: the arithmetic and the files of every room, who may import whom,
# and one small run that goes on, is judged, reported and scores (test_before_move.py).
QUICK := tests/test_layout.py tests/test_names.py \
  tests/shards/splits tests/shards/test_manifest.py tests/shards/test_read.py \
  tests/shards/test_sample_table.py tests/shards/test_tar.py tests/shards/build/test_reshard.py \
  tests/pipeline/test_boxes.py tests/pipeline/test_sampler.py tests/pipeline/test_counter_rng.py \
  tests/pipeline/test_loader.py tests/kernels/test_validation.py tests/kernels/test_contrastive.py \
  tests/lmcl/method tests/lmcl/models tests/lmcl/evaluation tests/lmcl/test_config.py \
  tests/lmcl/test_configs.py tests/lmcl/cli/test_main.py tests/lmcl/training/test_checkpoint.py \
  tests/lmcl/training/test_logger.py tests/lmcl/test_before_move.py

# Tests start many processes: without compiled modules each of them compiles lmcl again.
quick test test-slow test-gpu smoke: export PYTHONDONTWRITEBYTECODE :=
# One thread a worker: a plug-in of pytest's loads numpy before tests/conftest.py can say so.
quick test test-slow test-gpu smoke: export OMP_NUM_THREADS := 1

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(STAMP) ## .venv with everything

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@

hooks: $(STAMP) ## formatting and lint before every commit, from .githooks
	@set=$$(git config --local --get core.hooksPath); \
	if [ -n "$$set" ] && [ "$$set" != .githooks ]; then \
	  echo "git looks for hooks in $$set already; git config --unset core.hooksPath gives it up"; exit 2; \
	fi; git config --local core.hooksPath .githooks

demo: $(STAMP) ## the whole method on an embedded synthetic set; leaves runs/demo/report.html
	$(BIN)/lmcl demo

STARTER_DATA ?= ../shared/data/biq2021
starter: $(STAMP) ## lmcl/starter again, from the photographs of biq2021 in STARTER_DATA
	$(BIN)/python scripts/make_starter.py --images $(STARTER_DATA)

quick: $(STAMP) ## what a change most often breaks, in under a minute on two cores
	$(BIN)/python -m pytest -q -n 2 --dist loadscope -m "not slow and not gpu" $(QUICK)

test: $(STAMP) ## everything that needs no GPU but the slow ones
	$(BIN)/python -m pytest -q -n 2 --dist loadscope -m "not slow and not gpu"

test-slow: $(STAMP) ## those marked slow, and the long fuzzing
	$(BIN)/python -m pytest -q -m "slow and not gpu" --ignore tests/safety
	LMCL_FUZZ_CASES=10000 $(BIN)/python -m pytest -q tests/safety tests/shards/test_fuzz.py --timeout 7200

test-gpu: $(STAMP) ## those that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

check: $(STAMP) ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(STAMP) ## repair what can be repaired
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

smoke: $(STAMP) ## the whole method in under a minute
	$(BIN)/python -m pytest -q tests/test_smoke.py

bench: $(STAMP) ## benchmarks of this machine, appended to benchmarks/results
	$(BIN)/lmcl bench loader
	$(BIN)/lmcl bench contrastive

clean: ## remove .venv and caches; runs stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
