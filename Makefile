# make bench | test | headline: everything from a bare machine; afterwards use .venv/bin/pytest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= $(shell n=$$(nproc); echo $$((n > 4 ? 4 : n)))
STAMP := $(VENV)/.installed

.PHONY: bench test headline kernels report lint install compilers clean

bench: install kernels  ## the default profile: table, saved JSON, HTML report (its path comes last)
	@$(BIN)/python -m reports bench -- $(ARGS)

test: compilers  ## correctness, effect and quality of the smoke cells, and every other test
	@$(BIN)/python -m kernels --every-isa
	$(BIN)/pytest --profile smoke --benchmark-skip --benchmark-disable -n $(WORKERS) -q $(ARGS)

headline: install kernels  ## the headline cells in three fresh processes; the worst of the three counts
	@$(BIN)/python -m reports headline --measure -- $(ARGS)

kernels: install
	@$(BIN)/python -m kernels

report: install
	@$(BIN)/python -m reports build

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

compilers: $(VENV)/.compilers  ## what compiles CUDA kernels where there is no GPU

$(STAMP): pyproject.toml .ci/constraints.txt .ci/install.py
	@$(PYTHON) .ci/install.py $(VENV)
	@touch $@

$(VENV)/.compilers: $(STAMP)
	@$(PYTHON) .ci/install.py $(VENV) compilers
	@touch $@

clean:
	rm -rf $(VENV) .benchmarks
