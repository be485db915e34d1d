# `make test` and `make demo` work on a fresh clone: they make .venv, install the pinned packages and run.
PYTHON ?= python3
# To use another torch, e.g. a CUDA build:  make venv TORCH="torch==2.13.0 --index-url <the index of that build>"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUTPUT ?= demo-output

.PHONY: help venv test demo lint format kernels-report clean

help:
	@echo "make venv | test | demo | lint | format | kernels-report | clean"

venv: $(STAMP)

# Torch comes first and pinned, so that nothing after it can pull another build.
$(STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,lora,tensorboard]'
	@touch $(STAMP)

# One thread per worker: two workers with two threads each only wait for one another.
test: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 -q

demo: $(STAMP)
	$(BIN)/layalign demo --output $(DEMO_OUTPUT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every kernel, every configuration, every chip: registers, spills, shared memory. Compiles only.
kernels-report: $(STAMP)
	for target in sm_80 sm_90 sm_100 gfx942; do \
	  $(BIN)/python benchmarks/kernels_report.py --targets $$target \
	    --output benchmarks/results/kernels/$$target.md || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
