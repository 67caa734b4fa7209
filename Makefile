# `make demo` and `make test` need only Python 3.11+, pip and make: they create .venv and install into it.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
# glibc gives large blocks back to the kernel whenever they are freed, and every page of the next one faults: half of the
# time of a training step on a CPU (docs/LOG.md). Elsewhere the variable means nothing.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456

.PHONY: demo test check bench clean

demo: $(READY)
	$(BIN)/xloom demo

test: $(READY)  # several processes of one thread each: small models gain nothing by more
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_imports.py

bench: $(READY)
	$(BIN)/xloom bench decode
	$(BIN)/xloom bench prefill
	$(BIN)/xloom bench train

# Made anew when what is to be installed changes. torch goes first and by itself: the exact version is a CPU build
# where one is at hand, and the rest then finds it installed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,data,quantised,report,suite,tensorboard]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info
