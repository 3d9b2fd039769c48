# librobot's commands. `make demo` and `make test` do all the set-up that they need.
PYTHON  := python3.12
BIN     := .venv/bin
STAMP   := .venv/.installed
EXTRAS  ?= dev

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint type wheel bench clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(STAMP)  ## make .venv with everything that development needs

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "librobot needs $(PYTHON) on the PATH"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $(STAMP)

demo: install  ## record, train and evaluate a language-conditioned policy on the embedded suite
	rm -rf outputs/demo
	$(BIN)/librobot-train experiment=tabletop/act run_dir=outputs/demo/train
	$(BIN)/librobot-eval ckpt=outputs/demo/train episodes=100 execute_steps=8 output_dir=outputs/demo

test: install  ## the fast tests
	$(BIN)/python -m pytest

test-slow: install  ## the end-to-end tests of minutes
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout=1800

lint: install  ## ruff's checks and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: install  ## mypy on src
	$(BIN)/mypy

wheel: install  ## build dist/librobot-*.whl
	$(BIN)/python -m build --wheel --installer uv

bench: install  ## measure librobot against a bare PyTorch loop
	$(BIN)/librobot-bench step

clean:  ## remove what the other commands made, but not .venv
	rm -rf build dist outputs src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
