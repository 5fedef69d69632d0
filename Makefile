# The commands that people and CI use. `make run` and `make test` need Python 3.11 or later and the
# package registry, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := src tests tools handler.py
# Named, since pytest rewrites the whole packages of plugins that it finds by itself, hypothesis and
# schemathesis among them: seconds in every process. Of these it rewrites one module each.
PLUGINS := --disable-plugin-autoload -p pytest_timeout -p xdist.plugin -p _hypothesis_pytestplugin -p schemathesis.pytest.plugin

.PHONY: run test check format test-gpu bench bench-forward bench-formats bench-job bench-cold-start bench-memory bench-streaming bench-quality bench-load bench-loop-lag bench-throughput miniature image clean

run: $(VENV)/run.stamp  ## set up, and edit one picture (on the miniature where there is no GPU)
	$(BIN)/python handler.py --test_input "$$(cat test_input.json)"

test: $(VENV)/dev.stamp  ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PLUGINS) -m "not gpu" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/dev.stamp  ## formatting, lint, types, Dockerfile, shell scripts
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck build.sh tools/*.sh .ci/run

format: $(VENV)/dev.stamp  ## rewrite the code as `make check` wants it
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

test-gpu: $(VENV)/dev.stamp  ## the tests that need a CUDA card (full size: 80 GB of it)
	$(BIN)/python -m pytest -m gpu tests/gpu tests/kernels

bench: bench-forward bench-job  ## stock diffusers and ours in turns, at full size, on a CUDA card

bench-forward: $(VENV)/dev.stamp  ## one forward of the transformer, by precision, size and references
	$(BIN)/python -m image_worker.bench.forward --json bench-forward.json
	$(BIN)/python -m image_worker.bench.forward --outliers inputs --cases 0 --precisions bf16 fp8 8bit 4bit --json bench-outliers.json

bench-formats: $(VENV)/dev.stamp  ## the same for files' formats and SVDQuant, all in turns, with outliers
	$(BIN)/python -m image_worker.bench.forward --together --outliers inputs --cases 0 --precisions 4bit svdq svdq-ranges svdq-r128 Q4_K_M
	$(BIN)/python -m image_worker.bench.forward --together --outliers weights --cases 0 --precisions 4bit svdq svdq-r128 Q4_K_M
	$(BIN)/python -m image_worker.bench.forward --together --cases 0 --precisions Q8_0 fp8 fp8-file bf16 --lora 64

bench-job: $(VENV)/dev.stamp  ## a whole job, JSON in to PNG out, by stage
	$(BIN)/python -m image_worker.bench.whole_job bench-checkpoint --precisions 4bit fp8 --json bench-job.json

bench-cold-start: $(VENV)/dev.stamp  ## from a process' start to its first picture, ours and stock
	$(BIN)/python -m image_worker.bench.cold_start bench-checkpoint

bench-memory: $(VENV)/dev.stamp  ## cold start, memory and speed by PRECISION_MODE and GPU_MAX_GIB
	$(BIN)/python -m image_worker.bench.full_size bench-checkpoint

bench-streaming: $(VENV)/dev.stamp  ## forwards whose weights pass through the card, diffusers' way and ours
	$(BIN)/python -m image_worker.bench.streaming --resident --gib 6 4 2
	$(BIN)/python -m image_worker.bench.streaming --precision bf16 --stock --gib 24 --limit

bench-quality: $(VENV)/dev.stamp  ## which held-out edits the miniature passes, per precision and sampler
	$(BIN)/python -m tools.miniature.quality bench-quality

bench-load: $(VENV)/dev.stamp  ## 500 mixed jobs through a whole worker, behind a stand-in queue
	$(BIN)/python -m image_worker.bench.load --jobs 500

bench-loop-lag: $(VENV)/dev.stamp  ## how long large requests hold the standalone server's event loop
	$(BIN)/python -m image_worker.bench.loop_lag

bench-throughput: $(VENV)/dev.stamp  ## jobs per second and latency by BATCH_SIZE, on a CUDA card
	$(BIN)/python -m image_worker.bench.throughput bench-checkpoint

miniature: $(VENV)/dev.stamp  ## train the embedded miniature again, on a CUDA card (about 22 minutes)
	$(BIN)/python -m tools.miniature.train miniature-run
	$(BIN)/python -m tools.miniature.package miniature-run src/image_worker/miniature
	$(BIN)/python -m tools.miniature.ranges

image:  ## the linux/amd64 container
	./build.sh

clean:  ## remove what the other targets made
	rm -rf $(VENV) generated-images .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/run.stamp: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
