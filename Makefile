# Everything a machine with Python 3.10 or newer and a C++20 compiler needs, from two commands:
# `make demo` and `make test`. What they install goes into .venv; only GoogleTest, when it is missing,
# comes from the system's package manager.

PYTHON ?= python3
# Any requirement of torch works; TORCH= (empty) keeps the one that is in the environment already.
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
CXX ?= c++

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

bin := $(abspath $(VENV))/bin
pip := $(bin)/python -m pip install -q --disable-pip-version-check
cmake := $(bin)/cmake
ctest := $(bin)/ctest

python_sources := $(shell find flash_attn -name '*.py' -o -name '*.pyi' -o -name py.typed)
core_sources := $(shell find include src cmake -type f) CMakeLists.txt
package_sources := pyproject.toml README.md flash_attn_2_cuda.py $(python_sources) $(core_sources)
cpp_files := $(shell find include src tests examples -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' -o -name '*.c')

# ---- environment ----------------------------------------------------------------------------------

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	test -z "$(TORCH)" || $(pip) "$(TORCH)"
	touch $@

$(VENV)/.tools: $(VENV)/.torch tests/requirements.txt
	$(pip) -r tests/requirements.txt
	touch $@

$(VENV)/.examples: $(VENV)/.torch examples/requirements.txt
	$(pip) -r examples/requirements.txt
	touch $@

$(VENV)/.package: $(VENV)/.torch $(package_sources)
	@echo "Installing the package (pip install .)"
	$(pip) .
	touch $@

.PHONY: setup
setup: $(VENV)/.package $(VENV)/.tools $(VENV)/.examples  ## install torch, the package and every tool into .venv

# ---- demo and benchmarks --------------------------------------------------------------------------

.PHONY: demo
demo: $(VENV)/.package $(VENV)/.examples  ## attention checked and timed, then a language model trained on it
	$(bin)/python examples/check_and_time.py
	$(bin)/python examples/language_model.py --plot build/language_model.png

.PHONY: bench
bench: $(VENV)/.package $(VENV)/.examples  ## the benchmark table beside scaled_dot_product_attention (BENCH= adds options)
	$(bin)/python -m flash_attn bench --output build/bench $(BENCH)

# ---- build ----------------------------------------------------------------------------------------

cmake_flags := -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(bin)/ninja -DPython_EXECUTABLE=$(bin)/python \
	-DFLASH_ATTN_PLUS_WERROR=ON -DFLASH_ATTN_PLUS_TESTS=ON

.PHONY: googletest
googletest:
	@echo '#include <gtest/gtest.h>' | $(CXX) -x c++ -E - >/dev/null 2>&1 || { \
	  echo "Installing GoogleTest"; \
	  sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	  if command -v apt-get >/dev/null; then \
	    { $$sudo apt-get update -qq && \
	      $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libgtest-dev >/dev/null; }; \
	  else false; fi || { \
	    echo "GoogleTest is missing and could not be installed: install it with your system's package" \
	         "manager (Debian: libgtest-dev, Fedora: gtest-devel, macOS: brew install googletest)."; \
	    exit 1; }; }

.PHONY: build
build: $(VENV)/.tools googletest  ## the core and its tests in build/release, for work on the C++
	$(cmake) -B build/release $(cmake_flags) -DCMAKE_BUILD_TYPE=Release
	$(cmake) --build build/release -j $(JOBS)

.PHONY: wheel
wheel: $(VENV)/.torch  ## one wheel for every Python, in dist/
	$(bin)/python -m pip wheel -q --disable-pip-version-check --no-deps -w dist .
	ls -l dist

# ---- tests ----------------------------------------------------------------------------------------

.PHONY: test
test: lint test-cpp test-sanitizers test-kernels test-python test-triton  ## everything below, as CI runs it

.PHONY: lint
lint: $(VENV)/.tools  ## formatting and static checks
	$(bin)/clang-format --dry-run -Werror $(cpp_files)
	$(bin)/ruff check .
	$(bin)/ruff format --check .

.PHONY: test-cpp
test-cpp: build  ## GoogleTest, the symbol check, and a C program against the installed library
	$(ctest) --test-dir build/release --progress --output-on-failure -j $(JOBS)
	rm -rf build/prefix
	$(cmake) --install build/release --prefix build/prefix >/dev/null
	$(cmake) -S examples/c_api -B build/c_api -G Ninja -DCMAKE_MAKE_PROGRAM=$(bin)/ninja \
	  -DCMAKE_PREFIX_PATH=$(abspath build/prefix) >/dev/null
	$(cmake) --build build/c_api
	build/c_api/attention

# Everything that the fuzz, error and poison tests reach is run under AddressSanitizer and
# UndefinedBehaviorSanitizer. The interpreter is not built with them, so their runtime is preloaded, and
# libstdc++ with it, because exceptions are intercepted there.
sanitizer_env = ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
sanitized_tests := $(wildcard $(addprefix tests/python/test_,fuzz_*.py errors*.py environment.py poison.py))

.PHONY: test-sanitizers
test-sanitizers: $(VENV)/.package $(VENV)/.tools googletest  ## C++ tests and a part of the Python tests under the sanitizers
	$(cmake) -B build/sanitize $(cmake_flags) -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -DFLASH_ATTN_PLUS_SANITIZE=address,undefined
	$(cmake) --build build/sanitize -j $(JOBS)
	$(sanitizer_env) $(ctest) --test-dir build/sanitize --progress --output-on-failure -j $(JOBS)
	$(sanitizer_env) FLASH_ATTN_PLUS_CORE=$(abspath build/sanitize/lib/_core.so) \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(bin)/pytest -q -p no:cacheprovider -n $(JOBS) $(sanitized_tests)

.PHONY: test-python
test-python: $(VENV)/.package $(VENV)/.tools  ## the Python suite against the installed package, with coverage
	$(bin)/pytest -n $(JOBS) --cov --cov-report=term tests/python

# Triton's own wheels are for Linux; elsewhere there is nothing to test.
$(VENV)/.triton: $(VENV)/.torch tests/triton/requirements.txt
	$(bin)/python -c 'import triton' 2>/dev/null || $(pip) -r tests/triton/requirements.txt
	touch $@

.PHONY: test-triton
ifeq ($(shell uname -sm),Linux x86_64)
test-triton: $(VENV)/.package $(VENV)/.tools $(VENV)/.triton  ## the Triton kernels, interpreted and compiled, without a GPU
	$(bin)/pytest -n $(JOBS) tests/triton
else
test-triton:
	@echo "The Triton kernels are tested on Linux x86_64"
endif

# Only where apt-get is: the compiler, the emulator and GoogleTest's sources are Debian's packages.
aarch64_packages := g++-aarch64-linux-gnu qemu-user-static libgtest-dev
aarch64_flags := -G Ninja -DCMAKE_MAKE_PROGRAM=$(bin)/ninja -DCMAKE_BUILD_TYPE=Release \
	-DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/tests/cpp/aarch64.cmake

.PHONY: test-aarch64
test-aarch64: $(VENV)/.tools  ## the C++ tests built for aarch64 and emulated (slow; not part of test)
	dpkg -s $(aarch64_packages) >/dev/null 2>&1 || { \
	  echo "Installing $(aarch64_packages)"; \
	  sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	  $$sudo apt-get update -qq; \
	  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(aarch64_packages) >/dev/null; }
	$(cmake) -S /usr/src/googletest -B build/aarch64/googletest $(aarch64_flags) \
	  -DCMAKE_INSTALL_PREFIX=build/aarch64/prefix
	$(cmake) --build build/aarch64/googletest -j $(JOBS) --target install
	$(cmake) $(cmake_flags) $(aarch64_flags) -B build/aarch64/core -DFLASH_ATTN_PLUS_PYTHON=OFF \
	  -DGTest_ROOT=$(CURDIR)/build/aarch64/prefix
	$(cmake) --build build/aarch64/core -j $(JOBS)
	$(ctest) --test-dir build/aarch64/core --progress --output-on-failure -j $(JOBS)

# Ten minutes or so; build/kernels keeps what was compiled for the next run.
.PHONY: test-kernels
test-kernels: $(VENV)/.package $(VENV)/.tools  ## the CUDA kernels compiled for every architecture, without a GPU
	$(bin)/python tests/kernels/compile_matrix.py --jobs $(JOBS)
	$(bin)/pytest -n $(JOBS) tests/kernels

# Needs an NVIDIA GPU and a CUDA build of torch in .venv: make test-gpu TORCH=torch. Every process has a
# CUDA context of its own, which takes half a gigabyte of the GPU's memory.
GPU_JOBS ?= 8
# FlashAttention-2's tests/test_flash_attn.py, to run a sample of its cases too.
FA2 ?=

.PHONY: test-gpu
test-gpu: export FLASH_ATTENTION_USE_FLAGGEMS = FALSE
test-gpu: $(VENV)/.package $(VENV)/.tools  ## everything that needs an NVIDIA GPU (TORCH=torch, FA2=path)
	$(bin)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch sees no NVIDIA GPU")'
	$(bin)/python benchmarks/check_gpu.py --part correctness --workers $(GPU_JOBS)
	$(bin)/pytest -n $(GPU_JOBS) --dist worksteal --device cuda tests/python
	$(bin)/pytest -n $(GPU_JOBS) --dist worksteal tests/gpu
	$(bin)/python tests/gpu/random_configurations.py --workers $(GPU_JOBS)
	$(bin)/python tests/gpu/sanitize.py --workers $(GPU_JOBS)
	test -z "$(FA2)" || $(bin)/python tests/gpu/flash_attention_2.py "$(FA2)" --workers $(GPU_JOBS)

# C++ and Python tests together; in one process, because the workers of pytest-xdist do not exit in the
# way that writes the counters.
.PHONY: coverage
coverage: $(VENV)/.package $(VENV)/.tools googletest  ## lines of C++ that no test reaches (slow; not part of test)
	$(cmake) -B build/coverage $(cmake_flags) -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 --coverage -fprofile-update=atomic"
	$(cmake) --build build/coverage -j $(JOBS)
	$(ctest) --test-dir build/coverage --progress --output-on-failure -j $(JOBS)
	FLASH_ATTN_PLUS_CORE=$(abspath build/coverage/lib/_core.so) $(bin)/pytest tests/python
	$(bin)/gcovr --root . --filter src/ --merge-lines build/coverage --txt

# ---- housekeeping ---------------------------------------------------------------------------------

.PHONY: format
format: $(VENV)/.tools  ## format C++ and Python
	$(bin)/clang-format -i $(cpp_files)
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

.PHONY: clean
clean:  ## remove what was built; .venv stays (distclean removes it too)
	rm -rf build dist flash_attn/lib flash_attn/include .coverage .pytest_cache .ruff_cache .hypothesis $(VENV)/.package

.PHONY: distclean
distclean: clean
	rm -rf $(VENV)

.PHONY: help
help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
