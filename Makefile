# `make demo` and `make test` do everything from a fresh clone, into .venv.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc bindings -type f 2>/dev/null) CMakeLists.txt pyproject.toml constraints.txt

# The tests of the vLLM connector need an environment of their own: vLLM pins what it imports.
VLLM_VENV ?= .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: demo test test-vllm test-all lint format types build dev clean
demo: $(STAMP)
	$(PY) -m hetkv demo

test: $(STAMP)
	$(PY) -m pytest -m "not slow"

# Meant to take ten minutes at most, with the installation; what is never imported is not compiled.
test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_PY) -m pytest tests/vllm -m "not slow"

test-all: $(STAMP)
	$(PY) -m pytest

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i

types: $(STAMP)
	$(PY) -m mypy

build: $(STAMP)

$(STAMP): $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev]" $(PIP_ARGS)
	touch $@

$(VLLM_STAMP): $(SOURCES) constraints-vllm.txt
	test -x $(VLLM_PY) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PY) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r constraints-vllm.txt
	$(VLLM_PY) -m pip install --quiet --disable-pip-version-check --no-deps -e . \
		-Ccmake.define.HETKV_CUDA=OFF -Ccmake.define.HETKV_HIP=OFF
	touch $@

# The extension alone, built in place with the tools of the interpreter PY: for work on csrc/.
dev:
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE=$(shell command -v $(PY))
	cmake --build build/dev
	cmake --install build/dev --prefix .

clean:
	rm -rf build $(VENV) $(VLLM_VENV) hetkv/*.so
