# `make demo`, `make test`, `make lint`: each first makes the environment in .venv, once, by requirements.lock.
# `make lock` renews the lock; `make test-newest` runs the tests on newer versions than the lock's.
# Another Python than python3: make demo PY=python3.12

PY ?= python3
# How new a torch those two may take. Where a CPU build of torch is at hand, of this version that is; anything
# newer comes with gigabytes of CUDA. Without a cap: make test-newest TORCH="torch>=2.11"
TORCH ?= torch<2.14
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test test-newest lint lock clean

demo: $(READY)
	@$(BIN)/python -m retentive demo

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

# Warnings of other packages are listed at the end; of this one they stay errors.
test-newest:
	@sh scripts/environment.sh "$(PY)" .venv-newest "$(TORCH)"
	@echo "retentive: the lock's versions -> those of this run"
	@.venv-newest/bin/python -m pip freeze --all | .venv-newest/bin/python scripts/versions.py requirements.lock /dev/stdin
	@.venv-newest/bin/python -m pytest -m "not slow" -n 2 --dist loadfile -o filterwarnings=error:::retentive

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

lock:
	@sh scripts/lock.sh "$(PY)" "$(TORCH)"

$(READY): pyproject.toml requirements.lock
	@sh scripts/environment.sh "$(PY)" .venv

clean:
	rm -rf .venv .venv-newest
