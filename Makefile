# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
#
#   make demo TORCH_INDEX=URL     take torch from an index with CPU builds
#   make demo ARGS='--seed 1'     options of `lamina demo` (see `lamina demo --help`)

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-arm64 lint format docs bench bench-engines bench-memory bench-transfers bench-reductions bench-accuracy \
	bench-fit bench-fidelity bench-minilm bench-methods chaos clean

demo: $(VENV)/.ready
	$(BIN)/lamina demo $(ARGS)

# One thread for arithmetic in each of the two processes: more only get into each other's way on two cores.
PYTEST = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/.ready
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.ready
	$(PYTEST) -m slow $(ARGS)

# The engine tests on an emulated arm64 device (docs/device.md, "Other processors"). Error 3: not run, and the output says why.
test-arm64: $(VENV)/.ready
	$(BIN)/python -m tests.arm64.run $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.ready
	$(BIN)/python -m lamina.cli.reference

bench: bench-engines bench-memory bench-transfers bench-reductions bench-accuracy bench-fit bench-fidelity bench-minilm bench-methods

bench-engines: $(VENV)/.ready
	$(BIN)/python -m benchmarks.engines

# Without ExecuTorch for the pair: lowering its 18 blocks end to end takes many minutes.
bench-memory: $(VENV)/.ready
	$(BIN)/lamina bench memory --workload vit12 --engine eager,onnxruntime,executorch --micro-batch 1 --steps 3 \
		--output benchmarks/results/memory.json
	$(BIN)/lamina bench memory --workload pair --engine eager,onnxruntime --case full,cut,+micro --steps 2 \
		--output benchmarks/results/memory-pair.json
	$(BIN)/python -m benchmarks.client_memory
	$(BIN)/python -m benchmarks.demo_memory

bench-transfers: $(VENV)/.ready
	$(BIN)/python -m benchmarks.transfers

bench-reductions: $(VENV)/.ready
	$(BIN)/python -m benchmarks.reductions

bench-accuracy: $(VENV)/.ready
	$(BIN)/python -m benchmarks.accuracy

bench-fit: $(VENV)/.ready
	$(BIN)/python -m benchmarks.fit_predictions

bench-fidelity: $(VENV)/.ready
	$(BIN)/python -m benchmarks.fidelity

bench-minilm: $(VENV)/.ready
	$(BIN)/python -m benchmarks.minilm

# Hours; it goes on where it was stopped. ARGS='--minutes 60 --workers 2'
bench-methods: $(VENV)/.ready
	$(BIN)/python -m benchmarks.methods $(ARGS)

# A quarter of an hour: kills, broken connections, full disks. Its short form is in `make test`. ARGS='--kills 20 --seed 1'
chaos: $(VENV)/.ready
	$(BIN)/python -m benchmarks.chaos $(ARGS)

# torch first, from the index that the user names; then lamina with its extras. ExecuTorch declares about 40 packages that
# nothing here imports, so the few that it does import are named, and it is installed without the others. pip would warn of each
# that is lacking, in red.
$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "lamina needs Python 3.11 or 3.12 (PYTHON=...)"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --no-warn-conflicts -e '.[export,coordinator,onnxruntime,torch,bench,data,dev]' \
		flatbuffers ruamel.yaml tabulate pyyaml packaging
	$(BIN)/pip install --quiet --no-deps executorch==1.5.1 'torchao>=0.18,<0.19' timm==1.0.31 torchvision==0.28.0
	touch $@

clean:
	rm -rf $(VENV) lamina-demo build *.egg-info
