# Two commands do everything on a machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The networks are small: more threads mostly wait for each other, for minutes if the machine does something else too.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint figures examples bench quality clean

demo: $(STAMP)
	$(BIN)/specprune demo --out results/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: $(STAMP)
	$(BIN)/specprune figures all --out results/figures

examples: $(STAMP)
	@set -e; for script in examples/*.py; do echo "== $$script"; MPLBACKEND=Agg $(BIN)/python $$script; done

bench: $(STAMP)
	$(BIN)/python benchmarks/greedy_speed.py --out results/benchmarks
	$(BIN)/python benchmarks/collection_speed.py --out results/benchmarks

quality: $(STAMP)
	$(BIN)/python benchmarks/pruning_quality.py --part tune
	$(BIN)/python benchmarks/pruning_quality.py
	$(BIN)/python benchmarks/pruning_quality.py --part finetune --keeps 0.3
	$(BIN)/python benchmarks/pruning_quality.py --part distill --keeps 0.3

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "specprune needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) results
