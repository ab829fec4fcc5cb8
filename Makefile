# Two commands do everything on a machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
# The networks are small: more threads mostly wait for each other, for minutes if the machine does something else too.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all test-matrix stress stress-kills stress-others lint docs figures examples bench quality lock clean

demo: $(STAMP)
	$(BIN)/specprune demo --out results/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(STAMP) $(DOCS_STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

# Hostile numbers and files, kills, full disks, lost ranks, a bare environment: counts in results/stress, docs/reliability.md.
stress: $(STAMP)
	$(MAKE) --no-print-directory -j 2 --output-sync=target stress-kills stress-others

stress-kills stress-others: $(STAMP)
stress-kills: PARTS := kills
stress-others: PARTS := numerics files resources package
stress-kills stress-others:
	@set -e; for part in $(PARTS); do \
		echo "== $$part"; $(BIN)/python benchmarks/stress/$$part.py --out results/stress; done

# Several Pythons with the oldest, the pinned and the newest libraries; environments are kept in .matrix.
test-matrix: $(STAMP)
	$(BIN)/python benchmarks/stress/versions.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages, the reference, the examples with their output and all figures: docs/_build/html/index.html.
docs: $(STAMP) $(DOCS_STAMP)
	$(BIN)/python -m sphinx -b html -n -W --keep-going docs docs/_build/html

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

# Versions are chosen in constraints.txt; this looks up the SHA-256 of their files.  torch is left out, see the file's head.
lock: $(STAMP)
	$(BIN)/python -m pip install --quiet pip-tools
	$(BIN)/python benchmarks/stress/lock.py

$(STAMP): pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "specprune needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[test,dev]'
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[docs]'
	touch $(DOCS_STAMP)

clean:
	rm -rf $(VENV) .matrix results docs/_build docs/_scripts docs/api docs/commands docs/examples docs/figures
