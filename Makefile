# `make demo` and `make test` do everything on a machine with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := runs/demo
PEERS  := .venv-peers
GPU_PYTHON ?= python3
# GCC before 13 miscompiles llama.cpp's AMX code, which then crashes.
NO_AMX := $(if $(filter 1 2 3 4 5 6 7 8 9 10 11 12,$(shell gcc -dumpversion | cut -d. -f1)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)

.DEFAULT_GOAL := help
.PHONY: help demo test test-thorough test-slow test-ptx full-size lint format cuda cuda-check gpu bench-cpu notebook tensorboard clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	@touch $@

demo: $(VENV)/.ready  ## the whole chain on the embedded model: no network, no GPU
	$(BIN)/python -m pipeline run --recipe demo --out $(RUN)

test: $(VENV)/.ready-dev  ## the test suite (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-thorough: $(VENV)/.ready-dev  ## what rarely breaks: the notebook, and faults put into kernels
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m thorough

test-slow: $(VENV)/.ready-dev  ## the proofs that take minutes, full-size among them
	$(BIN)/python -m pytest -q -m slow

test-ptx: $(VENV)/.ready-dev  ## the CUDA kernels as nvcc compiles them, run from their PTX on the CPU (needs nvcc, no GPU)
	$(BIN)/python tests/ptx_proof.py $(ARGS)

full-size: $(VENV)/.ready-dev  ## the chain on GPT-2 124M's shape, in under 16 GiB
	$(BIN)/python -m pytest -q -m slow tests/test_full_size.py

lint: $(VENV)/.ready-dev  ## ruff, ruff-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cuda:  ## compile the CUDA kernels ahead of their first use (HEADROOM_CUDA_ARCHS="80;90a" without a GPU)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m cuda_ext.build

cuda-check: $(VENV)/.ready  ## compile all kernels for sm_75 to sm_120, no GPU needed; fails on register spills
	$(BIN)/python -m cuda_ext.build --check

gpu:  ## on a machine with a GPU, in at most 25 minutes: build, tests, timings, traces, sanitizer; ARGS="--only build"
	@$(GPU_PYTHON) -c 'import torch, pytest' 2>/dev/null || \
	    { echo "error: $(GPU_PYTHON) has no torch or no pytest; name one that has, as in GPU_PYTHON=$(BIN)/python" >&2; exit 2; }
	$(GPU_PYTHON) -m benchmarks.gpu_all $(ARGS)

# One by one: a peer that does not install is left out. Its environment sees ours through the .pth file.
$(PEERS)/.ready: requirements-peers.txt $(VENV)/.ready
	$(PYTHON) -m venv $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/headroom.pth
	for peer in $$(grep -o '^[^# ]*' $<); do \
	    CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)'" \
	        $(PEERS)/bin/pip install --quiet $$peer || echo "$$peer was not installed; its row will say so"; \
	done
	@touch $@

bench-cpu: $(PEERS)/.ready  ## our INT8 beside llama.cpp, CTranslate2, ONNX Runtime, ...; ARGS=--quick to try it
	$(BIN)/python -m benchmarks.cpu $(ARGS)

notebook: $(VENV)/.ready  ## run project.ipynb from top to bottom and keep its outputs
	$(BIN)/python -m benchmarks.notebook project.ipynb

tensorboard: $(VENV)/.ready  ## profile the demo's stages and open the traces
	$(BIN)/python -m pipeline profile $(RUN) --out $(RUN)/traces
	$(BIN)/tensorboard --logdir $(RUN)/traces

clean:  ## remove the virtual environment and caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
