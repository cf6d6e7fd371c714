# `make demo` and `make test` do everything from a fresh clone, into .venv.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc bindings -type f 2>/dev/null) CMakeLists.txt pyproject.toml constraints.txt

.PHONY: demo test test-all lint format types build dev clean
demo: $(STAMP)
	$(PY) -m hetkv demo

test: $(STAMP)
	$(PY) -m pytest -m "not slow"

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

# The extension alone, built in place with the tools of the interpreter PY: for work on csrc/.
dev:
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE=$(shell command -v $(PY))
	cmake --build build/dev
	cmake --install build/dev --prefix .

clean:
	rm -rf build $(VENV) hetkv/*.so
