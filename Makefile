# make demo | test | check | quick | docs | bench | gpu
#
# Everything runs in .venv, which the first call fills from PyPI with the pinned stack of
# .ci/constraints.txt. SETUP=0 uses $(PYTHON) as it is instead: no network, no installation.

PYTHON ?= python3
SETUP ?= 1
OUT ?= out
PYTEST_ARGS ?=

VENV := .venv
STAMP := $(VENV)/.installed

ifeq ($(SETUP),0)
RUN := $(PYTHON)
READY :=
DOCS_READY :=
PARALLEL :=
GPU_PARALLEL :=
else
RUN := $(VENV)/bin/python
READY := $(STAMP)
DOCS_READY := $(VENV)/.docs
PARALLEL := -n auto --dist worksteal  # as many as cores and memory allow: tests/conftest.py
GPU_PARALLEL := -n auto --dist loadgroup  # tests that look at memory are one group
endif

TEST_ENV := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test sweep check quick lint types docs bench publish gpu clean
.PHONY: ptx fuzz mutants fault-matrix gpu-doctor gpu-tests gpu-bench gpu-kernels gpu-sanitize

help:
	@echo "make demo    classify real digits in eager PyTorch and in fastres, time both, write report.html"
	@echo "make test    every test that this machine can run, a sample of each sweep"
	@echo "make sweep   the sweeps whole: every shipped configuration compiled, every network"
	@echo "make check   formatting, lint, types and the CPU tests that are not slow"
	@echo "make quick   one pass through each front door, in under a minute"
	@echo "make docs    these pages and the API reference as a site, $(OUT)/site; warnings are errors"
	@echo "make bench   time fastres against PyTorch, write $(OUT)/bench.{json,md,html}"
	@echo "make publish the same, kept under benchmarks/results and shown in README.md"
	@echo "make gpu     all that only a GPU can show: doctor, tests, times; about 10 minutes expected: $(OUT)/gpu"
	@echo "make gpu-kernels  each kernel against what it replaces, in one call of nine minutes: $(OUT)/gpu"
	@echo "make fuzz    random cases for MINUTES=30; what fails is kept in tests/regressions"
	@echo "make ptx     the kernels' PTX on a GPU in software, every shipped row: docs/ptx.md"
	@echo "make mutants inject known bugs, one by one; the tests must notice each: docs/mutants.md"
	@echo "make fault-matrix  what can go wrong, and the tests that would notice: docs/fault-matrix.md"
	@echo "make gpu-sanitize  the kernels under compute-sanitizer: memory, races, initialisation"
	@echo "SETUP=0 uses \$$(PYTHON) as it is; without it the first call makes $(VENV)"

setup: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: fastres needs Python 3.10 or newer; set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c .ci/constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(STAMP)
	$(VENV)/bin/python -m pip install --quiet -c .ci/constraints.txt -e '.[docs]'
	@touch $@

demo: $(READY)
	$(RUN) -m fastres demo --report report.html

test: $(READY)
	$(TEST_ENV) $(RUN) -m pytest -q $(PARALLEL) $(PYTEST_ARGS)

sweep: $(READY)
	$(TEST_ENV) $(RUN) -m pytest -q $(PARALLEL) --sweep -m sweep --ignore tests/ptx $(PYTEST_ARGS)

lint: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

types: $(READY)
	$(RUN) -m mypy

check: lint types
	$(TEST_ENV) $(RUN) -m pytest -q $(PARALLEL) -m "not gpu and not slow" $(PYTEST_ARGS)

quick: $(READY)
	$(TEST_ENV) $(RUN) -m pytest -q tests/test_tiny.py tests/test_imports.py $(PYTEST_ARGS)

docs: $(READY) $(DOCS_READY)
	$(RUN) -m sphinx --fail-on-warning --keep-going -q -b html -c docs -d $(OUT)/doctrees . $(OUT)/site

bench: $(READY)
	$(RUN) -m fastres bench --standard --output $(OUT)/bench

publish: bench
	$(RUN) benchmarks/publish.py $(OUT)/bench.json

# The kernels' tests come first; one part that fails does not stop the next, and make fails at the end.
gpu: $(READY)
	@mkdir -p $(OUT)/gpu
	@$(MAKE) --no-print-directory --keep-going gpu-doctor gpu-tests gpu-bench

gpu-doctor: $(READY)
	$(RUN) -m fastres doctor --output $(OUT)/gpu/doctor.json

GPU_FIRST := tests/gpu/test_kernels_gpu.py tests/gpu/test_sanitize_gpu.py
GPU_TESTS := $(GPU_FIRST) $(filter-out $(GPU_FIRST),$(wildcard tests/gpu/test_*.py))

gpu-tests: $(READY)
	$(TEST_ENV) $(RUN) -m pytest -q $(GPU_PARALLEL) --maxfail=25 --junitxml $(OUT)/gpu/tests.xml $(GPU_TESTS) $(PYTEST_ARGS)

gpu-bench: $(READY)
	$(RUN) -m fastres bench resnet50 --device cuda --batch 1,32,256 --dtype float16 --output $(OUT)/gpu/bench

gpu-kernels: $(READY)
	$(RUN) benchmarks/kernels_gpu.py --output $(OUT)/gpu

MINUTES ?= 30
SEED ?= 0

fuzz: $(READY)
	$(TEST_ENV) $(RUN) tests/tools/fuzz.py --minutes $(MINUTES) --seed $(SEED)

PTX_ARGS ?=

ptx: $(READY)
	$(TEST_ENV) $(RUN) tests/ptx $(PTX_ARGS)

MUTANTS_ARGS ?=

mutants: $(READY)
	$(TEST_ENV) $(RUN) tests/tools/mutants.py $(MUTANTS_ARGS)

fault-matrix: $(READY)
	$(TEST_ENV) $(RUN) tests/tools/fault_matrix.py

SANITIZER := compute-sanitizer --error-exitcode 1 --launch-timeout 120

gpu-sanitize: $(READY)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck $(RUN) tests/gpu/sanitize.py
	$(SANITIZER) --tool racecheck $(RUN) tests/gpu/sanitize.py
	$(SANITIZER) --tool initcheck $(RUN) tests/gpu/sanitize.py
	$(SANITIZER) --tool synccheck $(RUN) tests/gpu/sanitize.py

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info report.html
