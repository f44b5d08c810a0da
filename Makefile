# Every target makes the virtual environment it needs in .venv and uses it again until the requirements change.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# One thread: the models of the tests are so small that threads cost more than they give.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest

.PHONY: help demo test test-slow models lint format bench clean

help:
	@echo "make demo       the whole way on the embedded tiny backbone, into runs/demo"
	@echo "make test       the test suite"
	@echo "make test-slow  long checks"
	@echo "make models     docs/models.md, from a run over all model families"
	@echo "make lint       ruff and mypy"
	@echo "make bench      prefill time by insert layer, into runs/bench"

demo: $(VENV)/installed
	$(VENV)/bin/deepinsert demo --out runs/demo

test: $(VENV)/installed-dev
	$(PYTEST)

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m slow

models: $(VENV)/installed-dev
	$(PYTEST) tests/backbones/test_models.py --models-page docs/models.md

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/installed
	$(RUN) benchmarks/prefill.py --out runs/bench

clean:
	rm -rf $(VENV)

$(RUN):
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(RUN)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(RUN)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/installed
