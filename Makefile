# Every target creates the virtual environment and installs what it needs by itself. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# Test processes; each runs on one thread.
WORKERS ?= 2
# What to test, and options for the demo's training, such as --training.steps 100.
TESTS ?= tests
DEMO_OPTIONS ?=
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format gpu bench docs clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS="$$(printf '\t')" \
		read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: $(VENV)/.installed ## Create .venv and install the package with its development tools.

# The stamps keep a second call free; a change of the dependencies makes them stale.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[dev]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) -e ".[docs]"
	@touch $@

demo: setup ## Train the tiny preset on real text, compare it with baselines, plot it, let it write (under 10 minutes).
	$(BIN)/resnet-bk demo --config configs/demo.yaml $(DEMO_OPTIONS)

test: setup ## Run the tests, without the slow ones.
	$(PYTEST) -n $(WORKERS) -m "not slow" $(TESTS)

test-all: setup ## Run every test and report the coverage of src.
	$(PYTEST) -n $(WORKERS) --cov --cov-report=term $(TESTS)

check: setup ## Lint, format, types and the layering of imports.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: setup ## Rewrite the sources in the project's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu: setup ## Test the kernels: natively, with all GPU tests, on a GPU; in Triton's interpreter elsewhere.
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(PYTEST) -m gpu $(TESTS) && $(PYTEST) -k triton -m "not gpu" $(TESTS); \
	else \
		echo "No GPU: torch.cuda.is_available() is False. Kernels run in Triton's interpreter, GPU tests do not run."; \
		$(PYTEST) -n $(WORKERS) -k triton -m "not gpu" $(TESTS); \
	fi

bench: setup ## Measure on this machine's GPU, or else its CPU; adds rows to benchmarks/results. Keep it quiet.
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python benchmarks/mixer_speed.py --budget 3600 && $(BIN)/python benchmarks/model_speed.py --budget 3600; \
	else \
		$(BIN)/python benchmarks/mixer_cpu.py && $(BIN)/python benchmarks/memory_cpu.py; \
	fi
	$(BIN)/python -m resnet_bk.evaluation.ledger

docs: $(VENV)/.installed-docs ## Build the documentation into docs/_build/html; a warning is an error.
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

clean: ## Remove everything that the other targets made, the virtual environment included.
	rm -rf $(VENV) docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
