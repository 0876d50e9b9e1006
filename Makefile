# `make demo` and `make test` are all a newcomer needs; both first install what is missing.
#
#   PYTHON=python3.12   the interpreter that .venv is made from
#   SCATTER=0           test without torch_scatter, whose first build takes minutes
#   TEST_WORKERS=N      test processes; each computes on one thread
#   PYTEST_ARGS=...     for instance PYTEST_ARGS="tests/metrics -x"

PYTHON ?= python3
VENV ?= .venv
MIN_VENV ?= .venv-min
SCATTER ?= 1
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INPUTS := setup.py pyproject.toml constraints.txt
# One thread per process. Worksteal: the tests of a file share what they set up, and stay in one process with few
# exceptions. Compiled tests are kept: to write their asserts anew takes each process 9 seconds.
PYTEST_OPTIONS := -m pytest -n $(TEST_WORKERS) --dist worksteal
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST_OPTIONS)

.PHONY: demo test test-full test-min test-slurm lint scatter
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/python -m launch.demo

test: $(VENV)/.installed-test scatter lint
	$(PYTEST) $(PYTEST_ARGS)

# Hours: every combination of the switches on 2, 3 and 4 ranks. In slices: PYTEST_ARGS="-k 'ranks2 and slice00'".
test-full: $(VENV)/.installed-test scatter
	$(PYTEST) -m full $(PYTEST_ARGS)

# The oldest versions that setup.py allows, in an environment of their own (Python 3.11); without torch_scatter.
test-min: $(MIN_VENV)/.installed-min
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(MIN_VENV)/bin/python $(PYTEST_OPTIONS) $(PYTEST_ARGS)

# Needs root and Debian's slurmctld slurmd slurm-client munge: starts a SLURM of two nodes on this machine.
test-slurm: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slurm -v tests/slurm

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

scatter: $(VENV)/.installed-test
ifeq ($(SCATTER),0)
	@echo "SCATTER=0: not building torch_scatter; its tests are skipped if it is missing"
else
	tools/build_scatter.sh $(BIN)/python
endif

# Stamps newer than the inputs make a second run skip pip.
$(VENV)/.installed-demo: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV) (the first time takes minutes: torch is large)"
	$(PIP) --editable '.[glyphs,report]'
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/python
	@echo "installing into $(VENV) (the first time takes minutes: torch is large)"
	$(PIP) --editable '.[glyphs,test]'
	@touch $@

$(MIN_VENV)/.installed-min: setup.py pyproject.toml constraints-min.txt | $(MIN_VENV)/bin/python
	@echo "installing into $(MIN_VENV) (the first time takes minutes: torch is large)"
	$(MIN_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-min.txt \
		--editable '.[glyphs,test]'
	@touch $@

$(MIN_VENV)/bin/python:
	tools/create_venv.sh $(PYTHON) $(MIN_VENV)

$(BIN)/python:
	tools/create_venv.sh $(PYTHON) $(VENV)
