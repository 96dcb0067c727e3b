# make demo    environment, install, then the main job: optimize, run, benchmark
# make test    the whole test suite; make test-quick: without the files that take long
# make test-capture  every pipeline class of diffusers, which writes docs/capture-all.md
# make lint    ruff, import-linter and mypy
# make bench   the benchmarks behind docs/benchmarks.md; make bench-caching: docs/caching.md;
#              make bench-quantization: docs/quantization.md
#              make bench-pruning: docs/pruning.md; make bench-real: docs/real-sizes.md, an hour
#              make bench-serving: docs/serving.json
#
# Another environment than .venv, and another torch: make VENV=/path/to/venv TORCH=2.14.1 test

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := examples/models/fashion-sd

.PHONY: venv demo test test-quick test-capture lint bench bench-caching bench-quantization bench-pruning bench-real bench-serving clean

venv: $(VENV)/.installed

# torch first and by itself, one version of those that the package allows: a new release of it is
# tried on purpose, and another package's requirement must not pull one.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: venv
	$(BIN)/diffopt optimize $(MODEL) --passes "unroll(steps=25),hoist,simplify,fuse" --target cpu -o fashion.engine
	$(BIN)/diffopt run fashion.engine --prompt "ankle boot" --seed 0 -n 8 -o boots.png
	$(BIN)/diffopt bench fashion.engine --against eager,compile

# One thread each: two processes of one thread are faster than one of two. A file stays in one
# process, as what its tests share (engines, traced programs) is made once there. Which files go
# first is for tests/conftest.py to say.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-quick: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-capture: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/capture/test_every_pipeline.py -m every

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

bench: venv
	$(BIN)/python examples/benchmarks.py

bench-caching: venv
	$(BIN)/python -m examples.caching

bench-quantization: venv
	$(BIN)/python -m examples.quantization

bench-pruning: venv
	$(BIN)/python -m examples.pruning

bench-real: venv
	$(BIN)/python -m examples.real_sizes.models sd15 build/sd15
	$(BIN)/python -m examples.real_sizes.bench build/sd15

bench-serving: venv
	$(BIN)/python -m examples.serving.load

clean:
	rm -rf build dist *.egg-info fashion.engine boots.png
