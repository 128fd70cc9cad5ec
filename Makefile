# `make demo` and `make test` need nothing but Python 3.11 or newer, and make.
PYTHON ?= python3
BIN = .venv/bin
# The reference pins torch 2.9 but runs with 2.13, so it is installed with --no-deps.
TORCH = torch==2.13.0
REFERENCE = pufferlib-core==3.0.23
# What depends on Flax's module mode (the marker `tree`) also runs in the other mode, compiled as it
# is for users (the first run skips LLVM's optimiser where it can) and without the CPU kernels, as on
# machines without a C++ compiler. Ray's clusters wait most of the time, so they start beside that.
MODULES = $(addprefix policies/test_,models check cleanrl) $(addprefix weights/test_,weights rules) \
	test_golden parity/test_parity

# Python 3.11 with the oldest releases that pyproject.toml allows, and 3.13 with the newest, each in a
# venv of its own. For 3.13 there is no CPU wheel of torch, and gymnax rules out jax 0.12: the tests
# that need either are left out there, and named. PettingZoo's oldest release cannot be installed
# beside the others' oldest. `make -j2 test-matrix` does both at once.
OLDEST = environments/test_jaxenv run/test_written_files policies/test_cleanrl cli/test_cli
NEWEST = test_golden environments/test_jaxenv environments/test_environments
# File by file, in the order of conftest.py.
BY_FILE = -n 2 --dist loadfile --no-loadscope-reorder
PIP = pip install --quiet --disable-pip-version-check

.PHONY: demo test test-ray test-tree test-matrix test-oldest test-newest accelerators \
	accelerators-cuda accelerators-tpu onnx sbx lint table docs dist clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(BIN)/python -m pytest $(BY_FILE) --ignore parity_tests/vector/test_ray.py --ignore parity_tests/rllib
	$(MAKE) -j2 test-ray test-tree

test-ray: .venv/installed
	$(BIN)/python -m pytest parity_tests/vector/test_ray.py parity_tests/rllib

test-tree: .venv/installed
	NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false PUFFER_JAX_OPTIMISED=1 PUFFER_JAX_NATIVE=0 \
	$(BIN)/python -m pytest -n 2 -m tree $(MODULES:%=parity_tests/%.py)

test-matrix: test-oldest test-newest

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -k "not pettingzoo" $(OLDEST:%=parity_tests/%.py)

test-newest: .venv-newest/installed
	PUFFER_JAX_GOLDEN_ONLY=1 PUFFER_JAX_NO_GYMNAX=1 \
	.venv-newest/bin/python -m pytest $(NEWEST:%=parity_tests/%.py)
	rm .venv-newest/installed  # made anew next time, since what is newest changes

# Compiled for an H100 and a TPU v5e, without either; `make -j2 accelerators` does both at once.
# EVERY=--every compiles every program in every precision.
accelerators: accelerators-cuda accelerators-tpu

accelerators-cuda accelerators-tpu: accelerators-%: .venv/installed build/compilers/installed
	$(BIN)/python -m pytest -p no:cacheprovider --confcutdir parity_tests/accelerators \
	parity_tests/accelerators --platform $* $(EVERY)

# Every policy as ONNX, where jax2onnx is installed: it pins an older orbax-checkpoint than the tests'.
onnx: .venv-onnx/installed
	PUFFER_JAX_GOLDEN_ONLY=1 .venv-onnx/bin/python -m pytest parity_tests/export/check_onnx.py

# Stable-Baselines3 in JAX, whose tensorflow-probability is a nightly build.
sbx: .venv-sbx/installed
	.venv-sbx/bin/python -m pytest parity_tests/vector/check_sbx.py

lint: .venv/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

table: .venv/installed
	$(BIN)/python parity_tests/table.py

# The API reference, from the docstrings: build/docs/index.html.
docs: .venv/docs
	$(BIN)/python -W error .ci/docs.py build/docs

# Source distribution and wheel, the wheel built from the former; then the wheel where nothing else is.
dist: .venv/dist
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	$(BIN)/python -m venv "$$scratch/venv" && \
	"$$scratch/venv/bin/"$(PIP) dist/*.whl && \
	"$$scratch/venv/bin/python" -I .ci/smoke.py dist/*.tar.gz dist/*.whl

.venv/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'puffer_jax needs Python 3.11+; say make PYTHON=...')"
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) "$(TORCH)"
	$(BIN)/$(PIP) -e ".[test]"
	$(BIN)/$(PIP) --no-deps "$(REFERENCE)"
	touch $@

.venv-oldest/installed: pyproject.toml .ci/oldest.py
	python=$$(.ci/python 3.11) && "$$python" -m venv --clear .venv-oldest
	.venv-oldest/bin/python .ci/oldest.py > .venv-oldest/oldest.txt
	.venv-oldest/bin/$(PIP) "$(TORCH)"
	.venv-oldest/bin/$(PIP) -e ".[train,gymnax,vector,tools]" psutil -c .venv-oldest/oldest.txt
	.venv-oldest/bin/$(PIP) --no-deps "$(REFERENCE)"
	touch $@

.venv-newest/installed: pyproject.toml
	python=$$(.ci/python 3.13) && "$$python" -m venv --clear .venv-newest
	.venv-newest/bin/$(PIP) -e ".[train,vector,pettingzoo,atari,minigrid,tools]"
	touch $@

.venv-onnx/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-onnx
	.venv-onnx/bin/$(PIP) -e ".[train,onnx,tools]"
	touch $@

.venv-sbx/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-sbx
	.venv-sbx/bin/$(PIP) "$(TORCH)"
	.venv-sbx/bin/$(PIP) -e ".[train,sbx,tools]" psutil
	.venv-sbx/bin/$(PIP) --no-deps "$(REFERENCE)"
	touch $@

# The compilers' own libraries, about 440 MB, beside any environment.
build/compilers/installed: .venv/installed .ci/compilers.py
	rm -rf build/compilers && mkdir -p build/compilers
	$(BIN)/python .ci/compilers.py > build/compilers/versions.txt
	$(BIN)/$(PIP) --no-deps --target build/compilers -r build/compilers/versions.txt
	touch $@

.venv/linters: .venv/installed
	$(BIN)/$(PIP) -e ".[lint]"
	touch $@

.venv/docs .venv/dist: .venv/%: .venv/installed
	$(BIN)/$(PIP) -e ".[$*]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-onnx .venv-sbx build dist
