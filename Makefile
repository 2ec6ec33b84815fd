# Two commands do everything, set-up included: `make quickstart` and `make test`.
SHELL := /bin/bash
UV := $(shell command -v uv || echo .tools/bin/uv)
# A real Python 3.12: on PATH, else the newest of pyenv, else whatever uv finds or downloads.
PY312 := $(shell (python3.12 -c 'import sys; print(sys.executable)' || ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python3.12 | tail -1) 2>/dev/null)
PYTHON_ARG := $(if $(PY312),--python $(PY312))
BIN := .venv/bin

.PHONY: setup quickstart api engines test test-fast test-newest test-slurm faults bench bench-convert lint types check lock clean
setup: .venv/.ok

.tools/bin/uv:
	python3 -m venv .tools
	.tools/bin/pip install -q 'uv>=0.9'

.venv/.ok: pyproject.toml uv.lock $(filter .tools/%,$(UV))
	$(UV) sync --frozen --compile-bytecode $(PYTHON_ARG)
	@touch $@

quickstart: setup
	$(BIN)/elastic-megatron quickstart

test: setup
	@mkdir -p build
	$(BIN)/pytest -q -n 2 --dist loadfile --durations 60 | tee build/durations.txt; exit $${PIPESTATUS[0]}

# mlx-lm on exported directories, in an environment of its own; docs/engines.md
engines: setup
	tests/engines/install.sh mlx
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/engines --engine-results docs/engine_results.json
	$(BIN)/python tools/engines_table.py

# what a change of arithmetic needs, in minutes
test-fast: setup
	$(BIN)/pytest -q -n 2 --dist loadfile $(addprefix tests/,architecture space cost recipe ops blocks router quantization)

# the tests whose truth is another library's, against the newest releases, in an environment of their own
test-newest:
	$(UV) venv --clear $(PYTHON_ARG) build/newest
	$(UV) pip install --python build/newest/bin/python --link-mode copy -e . pytest pytest-timeout hypothesis zstandard
	$(UV) pip install --python build/newest/bin/python --link-mode copy -U transformers nvidia-modelopt safetensors
	build/newest/bin/python -m pytest -q tests/checkpoint tests/quantization tests/conversion

# against a real Slurm on this machine, with time limits and lost nodes; its daemons: tests/slurm/install.sh
test-slurm: setup
	$(BIN)/pytest -q tests/slurm -m slurm

# commands that are killed, starved of disk, raced and fed with damage: half an hour on two cores; docs/reliability.md
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/run.py

# kernels and bytes of a step at true shapes, counted; ratios of steps, of the distillation loss and of the importance
# pass: under 20 minutes; tools/benchmarks/README.md
bench: setup
	@status=0; for b in launches steps distillation ranking; do \
	  OMP_NUM_THREADS=1 $(BIN)/python tools/benchmarks/$$b.py || status=1; done; exit $$status

# conversions beside cp, also at several sizes: 40 minutes on an idle machine
bench-convert: setup
	OMP_NUM_THREADS=1 $(BIN)/python tools/benchmarks/convert.py --sweep

# the pages of the public names, from their docstrings: build/api
api: setup
	$(BIN)/python tools/api_page.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: setup
	$(BIN)/pyright

check: lint types test

lock: $(filter .tools/%,$(UV))
	$(UV) lock $(PYTHON_ARG)

clean:
	rm -rf .venv .tools quickstart build *.egg-info
