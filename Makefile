# Everything a new machine needs is set up by the targets themselves, in ./.venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Processes that share the files of tests, each file whole: fixtures of a module are made once.
# One that dies ends the suite: its file, dealt out anew, would take the next one along.
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist loadfile --max-worker-restart 0

.PHONY: setup train test test-slow test-slurm check bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

# The main job: handwritten digits, two processes, about a minute.
train: setup
	test -e shards/digits || $(BIN)/bigbatch shard digits shards/digits
	$(BIN)/bigbatch train digits --nproc 2

test: setup
	$(BIN)/python -m pytest $(SHARED)

# Minutes long: more seeds, more kills, more world sizes.
test-slow: setup
	$(BIN)/python -m pytest $(SHARED) -m slow --timeout 1800

# On a real SLURM of four nodes on this machine; skipped with a reason where it cannot be.
test-slurm: setup
	sh tests/install_slurm.sh
	$(BIN)/python -m pytest -m slurm --timeout 1200

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p bigbatch
	$(BIN)/lint-imports
	$(BIN)/python tests/check_wheel.py

# The scripts that say on what machine they ran; the other files there are parts of them.
bench: setup
	for script in $$(grep -l "^from machine import" benchmarks/*.py); do $(BIN)/python $$script --quick || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info
