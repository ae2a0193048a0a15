# Every target sets up what it needs in a virtual environment of its own. `make help` lists them.
PYTHON ?= python3
TEST := .venv/bin/python
DEMO := .venv-demo/bin/python
BACKENDS ?= jax tensorflow torch
PYTEST := $(TEST) -m pytest -n 2

.PHONY: help demo test test-core test-keras test-onnx lint bench clean

help:
	@echo "make demo    train a rich network, fold it, prove it, and write a report (a minute or two)"
	@echo "make test    run all tests, those of Keras on every backend in BACKENDS ($(BACKENDS))"
	@echo "make lint    check style, format and types"
	@echo "make bench   measure what folding gains, into benchmarks/results/"
	@echo "make clean   remove the environments and caches"

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(TEST) -m pip install --disable-pip-version-check --upgrade 'pip>=25.1'
	$(TEST) -m pip install --disable-pip-version-check --group test --group lint --editable '.[keras,onnx]'
	touch $@

.venv-demo/ready: pyproject.toml
	$(PYTHON) -m venv .venv-demo
	$(DEMO) -m pip install --disable-pip-version-check --editable '.[demo]'
	touch $@

demo: .venv-demo/ready
	KERAS_BACKEND=jax $(DEMO) -m refold demo

test: test-core test-keras test-onnx

test-core: .venv/ready
	$(PYTEST) tests --ignore=tests/on_keras --ignore=tests/on_onnx

test-keras: .venv/ready
	@set -e; for backend in $(BACKENDS); do \
	  echo "== Keras on $$backend"; \
	  KERAS_BACKEND=$$backend $(PYTEST) tests/on_keras; \
	done

test-onnx: .venv/ready
	$(PYTEST) tests/on_onnx

lint: .venv/ready
	$(TEST) -m ruff check .
	$(TEST) -m ruff format --check .
	$(TEST) -m mypy

bench: .venv/ready
	KERAS_BACKEND=jax $(TEST) benchmarks/keras_blocks.py

clean:
	rm -rf .venv .venv-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
