# Every target sets up what it needs in a virtual environment of its own. `make help` lists them.
PYTHON ?= python3
TEST := .venv/bin/python
PADDLE := .venv-paddle/bin/python
DEMO := .venv-demo/bin/python
BENCH_TORCH := .venv-bench-torch/bin/python
BENCH_WEIGHTS := .venv-bench-weights/bin/python
BENCH_ONNX := .venv-bench-onnx/bin/python
BENCH_CERTIFICATE := .venv-bench-certificate/bin/python
MINUTES ?= 10
BACKENDS ?= jax tensorflow torch
PYTEST := $(TEST) -m pytest -n 2

.PHONY: help demo test test-core test-onnx test-torch test-keras test-paddle fuzz lint look docs experiments \
  bench bench-certificate bench-keras bench-torch bench-onnx bench-weights clean

help:
	@echo "make demo    train a rich network, fold it, prove it, and write a report (a minute or two)"
	@echo "make test    run all tests, on every Keras backend in BACKENDS ($(BACKENDS)), and on Paddle"
	@echo "make fuzz    damaged ONNX files for MINUTES ($(MINUTES)), from SEED (a new one each time)"
	@echo "make lint    check style, format and types"
	@echo "make look    write report pages, screenshots and prints, where a Chromium is installed"
	@echo "make docs    build the documentation site; warnings are errors"
	@echo "make experiments  train what the tutorial on weight normalization shows, and draw it (some minutes)"
	@echo "make bench   run every benchmark, into benchmarks/results/, and write docs/benchmarks.md (an hour, gigabytes)"
	@echo "make bench-certificate  what checks of equality find on right and wrong folds, and what that takes"
	@echo "make bench-keras    networks of train-time blocks in Keras, before and after folding"
	@echo "make bench-torch    published networks, against timm's folds and torch's (installs gigabytes)"
	@echo "make bench-onnx     ONNX files, against the tools that simplify them and the runtimes that optimize them"
	@echo "make bench-weights  what weight normalization costs in each framework, against its peers (installs gigabytes)"
	@echo "make clean   remove the environments and caches"

.venv/ready: pyproject.toml
	@echo "Setting up .venv for the tests: some minutes, once"
	$(PYTHON) -m venv .venv
	$(TEST) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(TEST) -m pip install --quiet --disable-pip-version-check --group test --group lint --group docs --editable '.[keras]'
	$(TEST) -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python --group test-files
	touch $@

.venv-paddle/ready: pyproject.toml
	@echo "Setting up .venv-paddle for the tests: a minute or so, once"
	$(PYTHON) -m venv .venv-paddle
	$(PADDLE) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(PADDLE) -m pip install --quiet --disable-pip-version-check --group test-paddle --editable .
	touch $@

.venv-demo/ready: pyproject.toml
	@echo "Setting up .venv-demo: a minute or so, once"
	$(PYTHON) -m venv .venv-demo
	$(DEMO) -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

# timm needs torchvision, which has its own idea of torch: gigabytes, for the benchmark only.
.venv-bench-torch/ready: pyproject.toml
	@echo "Setting up .venv-bench-torch: gigabytes, once"
	$(PYTHON) -m venv .venv-bench-torch
	$(BENCH_TORCH) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BENCH_TORCH) -m pip install --quiet --disable-pip-version-check --group bench-torch --editable .
	touch $@

.venv-bench-weights/ready: pyproject.toml
	@echo "Setting up .venv-bench-weights: some minutes, once"
	$(PYTHON) -m venv .venv-bench-weights
	$(BENCH_WEIGHTS) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BENCH_WEIGHTS) -m pip install --quiet --disable-pip-version-check --group bench-weights --editable '.[keras]'
	touch $@

.venv-bench-onnx/ready: pyproject.toml
	@echo "Setting up .venv-bench-onnx: a minute or so, once"
	$(PYTHON) -m venv .venv-bench-onnx
	$(BENCH_ONNX) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BENCH_ONNX) -m pip install --quiet --disable-pip-version-check --group bench-onnx --editable .
	$(BENCH_ONNX) -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python --group test-files
	touch $@

demo: .venv-demo/ready
	KERAS_BACKEND=jax $(DEMO) -m refold demo

test: test-core test-onnx test-torch test-keras test-paddle

test-core: .venv/ready
	$(PYTEST) tests --ignore=tests/on_keras --ignore=tests/on_onnx --ignore=tests/on_torch --ignore=tests/on_paddle

test-onnx: .venv/ready
	$(PYTEST) tests/on_onnx

test-torch: .venv/ready
	$(PYTEST) tests/on_torch

test-keras: .venv/ready
	@set -e; for backend in $(BACKENDS); do \
	  echo "== Keras on $$backend"; \
	  KERAS_BACKEND=$$backend $(PYTEST) tests/on_keras; \
	done

# In an environment of its own: TensorFlow imported beside Paddle crashes.
test-paddle: .venv-paddle/ready
	$(PADDLE) -m pytest -n 2 tests/on_paddle

fuzz: .venv/ready
	PYTHONPATH=src $(TEST) tests/on_onnx/fuzz.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

lint: .venv/ready
	$(TEST) -m ruff check .
	$(TEST) -m ruff format --check .
	$(TEST) -m mypy

look: .venv/ready
	PYTHONPATH=src $(TEST) tests/report/look.py

docs: .venv/ready
	KERAS_BACKEND=jax $(TEST) -m sphinx --fail-on-warning --quiet docs docs/_build
	@echo "The documentation is in docs/_build/index.html"

experiments: .venv/ready
	$(TEST) docs/experiments/normalized_training.py

# Every benchmark, one after the other: a new one is one name here and one target below.
BENCHMARKS := bench-certificate bench-keras bench-torch bench-onnx bench-weights
bench: $(BENCHMARKS)

.venv-bench-certificate/ready: pyproject.toml
	@echo "Setting up .venv-bench-certificate: gigabytes, once"
	$(PYTHON) -m venv .venv-bench-certificate
	$(BENCH_CERTIFICATE) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BENCH_CERTIFICATE) -m pip install --quiet --disable-pip-version-check --group bench-certificate --editable .
	touch $@

bench-certificate: .venv-bench-certificate/ready
	$(BENCH_CERTIFICATE) benchmarks/certificates.py
	$(BENCH_CERTIFICATE) benchmarks/tables.py

bench-keras: .venv/ready
	KERAS_BACKEND=jax $(TEST) benchmarks/keras_blocks.py
	$(TEST) benchmarks/tables.py

bench-torch: .venv-bench-torch/ready
	$(BENCH_TORCH) benchmarks/torch_models.py
	$(BENCH_TORCH) benchmarks/tables.py

# The networks are exported with the torch of the tests; the tools have an environment of their own.
bench-onnx: .venv/ready .venv-bench-onnx/ready
	$(TEST) benchmarks/exports.py build/onnx
	$(BENCH_ONNX) benchmarks/onnx_files.py
	$(BENCH_ONNX) benchmarks/onnx_proofs.py
	$(BENCH_ONNX) benchmarks/tables.py

# Each framework in a process of its own; timm's convolutions beside torch alone, Paddle in its environment.
bench-weights: .venv-bench-torch/ready .venv-bench-weights/ready .venv-paddle/ready
	$(BENCH_TORCH) benchmarks/weight_normalization.py torch
	$(BENCH_WEIGHTS) benchmarks/weight_normalization.py keras-jax
	$(BENCH_WEIGHTS) benchmarks/weight_normalization.py keras-tensorflow
	$(BENCH_WEIGHTS) benchmarks/weight_normalization.py keras-torch
	$(PADDLE) benchmarks/weight_normalization.py paddle
	$(BENCH_WEIGHTS) benchmarks/tables.py

clean:
	rm -rf .venv .venv-demo .venv-paddle .venv-bench-torch .venv-bench-weights .venv-bench-onnx .venv-bench-certificate build docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
