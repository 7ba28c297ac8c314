# Two commands on a fresh machine: `make demo` shows what Atoll does, `make test` proves that it works here. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := smollm2-135m-instruct
DEMO_OUT ?= runs/demo

.PHONY: demo test check lint types lock setup clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Atoll needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps lorax-client==0.6.3 # the tests' client; it asks for a huggingface_hub from before 1.0, which it does not use
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

demo: setup ## train and measure a land of small adapters, then say what to try next
	@$(BIN)/atoll pull $(BASE)
	@$(BIN)/atoll land examples/land.yaml --out $(DEMO_OUT)
	@echo
	@echo "What to try next:"
	@echo "  $(BIN)/atoll generate --adapter support_intents \"hi, the parcel came but one cup is broken, what now?\""
	@echo "  $(BIN)/atoll hub show support_intents"
	@echo "  $(BIN)/atoll train examples/train.yaml"
	@echo "  $(BIN)/atoll serve"

test: setup ## everything: unit, integration and, where the base can be had, the real model
	-@$(BIN)/atoll pull $(BASE)
	$(BIN)/python -m pytest

check: setup lint types ## what to run before each commit: lint, types and the quick tests
	$(BIN)/python -m pytest -m "not slow" -x -q

lint: setup
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench

types: setup
	$(BIN)/mypy

lock: ## pin what is installed in .venv now
	$(BIN)/python -m pip freeze --exclude-editable --all | sed -E 's/^torch(==| @ ).*/torch==2.13.0/' | grep -v -E '^(pip|atoll|lorax-client)(==| )' > requirements.lock

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
