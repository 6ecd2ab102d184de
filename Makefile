# Two commands do everything on a fresh machine with Python 3.11 to 3.13 and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export VIRTUAL_ENV := $(CURDIR)/.venv

.PHONY: demo test install lint lock clean

demo: $(STAMP)  ## train ResNet-20 on the embedded digits with two Ray workers, evaluate, write a report
	@echo "==> Training ResNet-20 on scikit-learn's digits with two Ray workers (runs/demo)"
	@rm -rf runs/demo
	$(BIN)/longhaul train digits --name demo --workers 2
	$(BIN)/longhaul verify demo

test: $(STAMP) lint  ## lint, types, and the whole test suite
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(STAMP)  ## create .venv from the pinned requirements

$(STAMP): requirements.txt pyproject.toml
	@echo "==> Creating .venv from requirements.txt (uv does the installing; the CUDA libraries are about 3 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.8,<1"
	@$(BIN)/uv pip install --quiet --requirement requirements.txt
	@$(BIN)/uv pip install --quiet --no-deps --editable .
	@echo "==> Byte-compiling .venv, so that every later start is seconds faster"
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	@touch $@

lock:  ## pin requirements.txt anew (no addresses are recorded)
	@printf '# Exact versions of everything Longhaul runs with, for Python 3.11 to 3.13. Made by `make lock`; do not edit.\n' > requirements.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-annotate --no-header --quiet >> requirements.txt

clean:
	rm -rf .venv runs
