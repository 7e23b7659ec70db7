# Two commands on a fresh machine: `make demo` and `make test`. Each sets up its own .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
BENCH ?=

.PHONY: demo test test-long lint bench soak clean

demo: $(STAMP)
	$(BIN)/mmit demo --out demo_run

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not long"

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -rs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check mmit tests benchmarks

# about 15 minutes; make bench BENCH='--rounds 2 --steps 6,2 --write-docs' for all cells
bench: $(BENCH_STAMP)
	$(BIN)/python benchmarks/training.py $(BENCH)

# about half an hour on two cores
soak: $(STAMP)
	PYTHONPATH=tests $(BIN)/python tests/distributed/soak.py

clean:
	rm -rf $(VENV) demo_run build dist

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

$(BENCH_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $(BENCH_STAMP)
