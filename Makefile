# Every target creates the virtual environment that it needs in .venv, again only when the requirements change.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
RUN := $(VENV)/bin/python
# Each worker has one thread, because the models of the tests are too small to gain from more.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-oldest test-versions test-slow models lint format bench bench-full bench-gpu bench-docs clean

help:
	@echo "make demo           run all commands on the embedded tiny backbone, into runs/demo"
	@echo "make test           run the test suite"
	@echo "make test-slow      run the long checks"
	@echo "make test-oldest    run the core tests with the oldest transformers, in two minutes"
	@echo "make test-versions  test with other versions of transformers and write docs/versions.md; EVERY=1 tests all"
	@echo "make models         test all model families and write docs/models.md"
	@echo "make lint           run ruff and mypy"
	@echo "make format         fix what ruff can fix"
	@echo "make bench          measure time and memory by insert layer against the stock model, into runs/bench"
	@echo "make bench-full     measure large batches too, in most of an hour, into runs/bench-full"
	@echo "make bench-gpu      measure published models with random weights on a GPU, into runs/bench-gpu"
	@echo "make bench-docs     write docs/performance.md from the runs above"
	@echo "make clean          remove the virtual environment"

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
