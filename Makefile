# Developer commands. Each sets the machine up by itself, then runs the nox session of its name: a virtual environment in
# .venv, qcore installed into it in editable form, and the native CPU backend where a C++ compiler is found. What is set
# up is remembered in .venv/stamps, so that a second run starts at once. Needs python3 (3.10 or newer) and make.
#
#   make demo     quantize a real language model to int8, NF4 and FP4, and let it write
#   make test     everything that CI runs: lint, types, tests, conformance, mutants, templates, sanitizers, the GPU
#                 kernels emulated, and compiled for three GPUs (needs a C++ compiler)
#   make lint     ruff, clang-format, mypy;  make format  mends what they can mend
#   make bench    qcore bench cpu: every op and layer beside torch, bitsandbytes and this machine's limits
#   make sanitizers   the whole suite under ASan and UBSan, on each path;  make aarch64  on an emulated aarch64
#   make clean    removes build outputs and caches;  make distclean  also removes .venv
#
# ARGS="..." is handed to the session: make demo ARGS="--prompt 'Hello'".

PYTHON ?= python3
VENV := .venv
STAMPS := $(VENV)/stamps
NOX = $(VENV)/bin/python -m nox -s
COMPILER := $(shell command -v $(firstword $(CXX)) 2>/dev/null)
NATIVE_SOURCES := $(shell find backends/cpu backends/common qcore/include -type f -not -path '*/build/*' -not -name '*.pyc' \
	-not -name '*.so' 2>/dev/null)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DELETE_ON_ERROR:
.PHONY: demo test lint format bench sanitizers aarch64 build env native compiler clean distclean

demo: env $(if $(COMPILER),native,no-compiler)
	$(NOX) demo -- $(ARGS)

test: compiler env native
	@rm -rf build/reports
	$(NOX) lint types tests conformance amx mutants templates sanitizers_lean simt simt_asan_lean isa_lean smoke summary -- $(ARGS)

lint: env
	$(NOX) lint types

format: env
	$(NOX) format

bench: env $(if $(COMPILER),native,no-compiler)
	$(NOX) bench -- $(ARGS)

sanitizers: compiler env native
	$(NOX) sanitizers

aarch64: env native
	$(NOX) aarch64

build: env
	$(NOX) build

env: $(STAMPS)/qcore
native: $(STAMPS)/native

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "qcore needs Python 3.10 or newer; set PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/requirements: requirements/dev.txt | $(STAMPS)/venv
	@echo "Installing requirements/dev.txt into $(VENV): once, a few minutes."
	$(VENV)/bin/python -m pip install -qq -r requirements/dev.txt
	@touch $@

$(STAMPS)/qcore: pyproject.toml hatch_build.py qcore/include/qcore_backend.h $(STAMPS)/requirements
	$(VENV)/bin/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

$(STAMPS)/native: $(NATIVE_SOURCES) $(STAMPS)/qcore
	$(VENV)/bin/python -m pip install -qq --no-deps --no-build-isolation ./backends/cpu
	@touch $@

.PHONY: no-compiler
no-compiler:
	@echo "No C++ compiler ($(CXX)) was found, so the native CPU backend is not built: qcore runs on cpu_reference," >&2
	@echo "the NumPy meaning of each op, which is right but far slower. Install g++ and run this again." >&2

compiler:
	@test -n "$(COMPILER)" || { echo "make $(MAKECMDGOALS): no C++ compiler ($(CXX)) was found. The tests of the native" \
		"backends need one: install g++ (or set CXX) and run this again." >&2; exit 2; }

clean:
	rm -rf build dist backends/*/build backends/*/dist demo-out out .nox .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	find . -name '*.so' -type f -not -path './$(VENV)/*' -delete

distclean: clean
	rm -rf $(VENV)
