# Every target makes the virtual environment it needs in .venv and uses it again until the requirements change.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
RUN := $(VENV)/bin/python
# One thread: the models of the tests are so small that threads cost more than they give.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-oldest test-versions test-slow models lint format bench bench-full bench-gpu bench-docs clean

help:
	@echo "make demo       the whole way on the embedded tiny backbone, into runs/demo"
	@echo "make test       the test suite"
	@echo "make test-slow  long checks"
	@echo "make test-oldest    core tests with the oldest transformers, two minutes"
	@echo "make test-versions  tests with other versions of transformers, and docs/versions.md; EVERY=1 for all"
	@echo "make models     docs/models.md, from a run over all model families"
	@echo "make lint       ruff and mypy"
	@echo "make bench      time and memory by insert layer against the stock model, into runs/bench"
	@echo "make bench-full the same with large batches, in the better part of an hour, into runs/bench-full"
	@echo "make bench-gpu  published models with random weights on a GPU, into runs/bench-gpu"
	@echo "make bench-docs docs/performance.md from the runs above"

demo: $(VENV)/installed
	$(VENV)/bin/deepinsert demo --out runs/demo

test: $(VENV)/installed-dev
	$(PYTEST)

test-oldest: $(VENV)/installed-dev
	$(RUN) tests/versions/matrix.py --oldest

test-versions: $(VENV)/installed-dev
	$(RUN) tests/versions/matrix.py $(if $(EVERY),--every)

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
	$(VENV)/bin/deepinsert bench --out runs/bench

bench-full: $(VENV)/installed
	$(VENV)/bin/deepinsert bench --full --out runs/bench-full

bench-gpu: $(VENV)/installed
	$(RUN) benchmarks/gpu.py --profile --out runs/bench-gpu
	$(RUN) benchmarks/gpu.py --out runs/bench-gpu

bench-docs: $(VENV)/installed
	$(RUN) benchmarks/write_docs.py $(wildcard runs/bench-full runs/bench-gpu)

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
