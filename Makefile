# Every task of the project. `make demo` and `make test` set up what they need on a fresh machine.

PYTHON ?= python3
VENV ?= .venv
DEV_VENV ?= .venv-dev
DEV := $(DEV_VENV)/bin
WORKERS ?= 2
# Tests start hundreds of processes: what one has compiled is there for the next.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo setup check machine-code test bench docs demo-model clean

demo: $(VENV)/.installed  ## Serve the packaged model and its live page
	$(VENV)/bin/rankd demo

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet .
	touch $@

setup: $(DEV_VENV)/.installed  ## Everything that developing and testing need

$(DEV_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEV_VENV)
	$(DEV)/pip install --quiet --no-compile torch==2.13.0
	$(DEV)/pip install --quiet --no-compile --editable '.[dev]'
	$(DEV)/python -m compileall -qq -j 0 -x '/tests?/' $(DEV_VENV)/lib || true  # pip does it on one core; not all is Python 3
	touch $@

check: setup  ## Formatting, lint, types
	$(DEV)/ruff format --check .
	$(DEV)/ruff check .
	$(DEV)/mypy

machine-code: setup  ## Compile what tests would else compile once in each of their processes
	$(DEV)/python -m tests.machine_code_kept

test: setup  ## All checks and all tests, file by file in WORKERS processes
	$(MAKE) --jobs=2 --output-sync=target check machine-code
	$(DEV)/pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=25

bench: setup  ## The serving benchmark on this machine
	$(DEV)/rankd bench serve --workload small

demo-model: setup  ## Train and build the packaged model again, from its seeded log
	rm -rf runs/demo src/rankd/demo/models/demo
	mkdir -p runs
	$(DEV)/python -m rankd.train.synthetic runs/demo.parquet
	$(DEV)/rankd train --data runs/demo.parquet --describe demo --recipe demo --out runs/demo
	$(DEV)/rankd eval runs/demo
	$(DEV)/rankd build runs/demo --out src/rankd/demo/models --name demo --version 1

clean:
	rm -rf $(VENV) $(DEV_VENV) build dist runs
