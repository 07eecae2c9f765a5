# `make demo`, `make test`, `make lint`: each makes the environment in .venv first, once.
# Another Python than python3: make demo PY=python3.12

PY ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint clean

demo: $(READY)
	@$(BIN)/python -m retentive demo

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

$(READY): pyproject.toml constraints.txt
	@sh scripts/environment.sh "$(PY)"

clean:
	rm -rf .venv
