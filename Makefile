# make install | demo | demo-serve | test | test-slow | browser-check | checks | lint | format | kernel-check | cuda-check | oldest-check | sanitize | arm-check | matrix | gpu-bundle | gpu-check | bench | docs | dist | dist-check.   PYTHON=python3.12 make install  chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.madformer-installed
FOLDERS := python kernels engine benchmarks docs examples tests setup.py
CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)
DEMO := sample --model assets/emoji64 --prompts assets/emoji64/prompts.txt --guidance 3 --num-images 64 --grid samples/grid.png

.PHONY: install demo demo-serve test test-slow browser-check checks lint format kernel-check cuda-check oldest-check sanitize arm-check matrix gpu-bundle gpu-check bench docs dist dist-check package-tree

install: $(STAMP)

# torch comes first and by itself: the extension is compiled against it, hence no build isolation.
$(STAMP): constraints.txt pyproject.toml setup.py CMakeLists.txt $(CXX_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "make install needs Python 3.11, 3.12 or 3.13 as $(PYTHON); try PYTHON=python3.12 make install"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
		|| { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) 'setuptools>=77' wheel ninja 'pybind11>=3' $(if $(shell command -v cmake),,cmake)
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev,emoji,hf]'
	@$(BIN)/python -c 'from madformer.kernels.dispatch import report; print(*(f"{s.backend}: {s.reason}" for s in report()), sep="\n")'
	@touch $@

demo: install
	$(BIN)/madformer $(DEMO)

# The page's address is printed when it draws; Ctrl-C ends it. DEMO_SERVE='--port 8080' changes how.
demo-serve: install
	$(BIN)/madformer serve --model assets/emoji64 --guidance 3 --log-level warning $(DEMO_SERVE)

# One thread a process: two of them on two cores take little more than half the time of one with two threads. Bytecode is
# kept, whatever the environment says: some fifty processes are started, which need not compile the package each.
TEST_PROCESSES ?= 2
test: install
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/pytest -m slow

# The page of `madformer serve` in Debian's Chromium (or CHROMIUM=PATH), and axe-core's rules, which npm fetches where it is.
# BROWSER_CHECK="-k history" make browser-check  looks at that alone.
BROWSER := build/browser
browser-check: install
	$(PIP_INSTALL) playwright
	@test -f $(BROWSER)/node_modules/axe-core/axe.min.js || { mkdir -p $(BROWSER) && { command -v npm >/dev/null \
		&& npm install --silent --no-save --prefix $(BROWSER) axe-core@4 || echo 'browser-check: no npm here: axe-core does NOT look at it'; }; }
	$(BIN)/pytest -m browser -rs $(BROWSER_CHECK) tests/serving/test_page.py

# pytest-benchmark's table of what sampling is made of.
bench: install
	$(BIN)/pytest benchmarks/suites --benchmark-only

lint: install package-tree
	$(BIN)/ruff check $(FOLDERS)
	$(BIN)/ruff format --check $(FOLDERS)
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix $(FOLDERS)
	$(BIN)/ruff format $(FOLDERS)
	$(BIN)/clang-format -i $(CXX_SOURCES)

# What continuous integration looks at beside the tests.
checks: kernel-check lint cuda-check oldest-check docs

# Every Triton kernel as it would be launched, compiled for sm_80, sm_90 and sm_100: no GPU, no spills, all fit.
# KERNEL_CHECK='--sm 90 --dtype bf16' make kernel-check  is the short form.
kernel-check: install
	$(BIN)/python -m benchmarks.kernel_check $(KERNEL_CHECK)

# Every csrc/*.cu for sm_80, sm_90a and sm_100, linked into the extension: no GPU, no warnings, no spills. Where torch has
# no CUDA the result is complete but for torch's own streams, and is not run; so csrc/*.cpp are not optimised, which takes
# longer than all else, and which the install does.
CUDA_WARNINGS := -Werror all-warnings -Xptxas -warn-spills,-Werror -Xcompiler -Wall,-Wextra,-Werror
cuda-check: install
	@if ! command -v nvcc >/dev/null; then echo 'cuda-check: no nvcc here: csrc/*.cu are NOT compiled'; exit; fi; \
	PATH="$(CURDIR)/$(BIN):$$PATH"; \
	cmake -S . -B build/cuda-check -G Ninja -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DMADFORMER_CUDA=ON '-DCMAKE_CUDA_FLAGS=$(CUDA_WARNINGS)' --log-level=WARNING \
	&& cmake --build build/cuda-check \
	&& echo 'cuda-check: csrc/*.cu compiled and linked'

# csrc/*.cpp against the headers of the oldest PyTorch that is supported; of its wheel only these are kept. It is the one
# for macOS, a sixth of the size of Linux's: what csrc includes is the same in both.
OLDEST_TORCH := 2.11.0
OLDEST_HEADERS := build/oldest/torch-$(OLDEST_TORCH)
# What is for CUDA alone is looked at too where there is an nvcc, which knows its headers.
OLDEST_CUDA = $$(nvcc --dryrun -c csrc/denoise_step.cu 2>&1 | sed -n 's/^.*[ ]INCLUDES="-I\([^"]*\)".*/-DMADFORMER_WITH_CUDA="80" -DUSE_CUDA -isystem \1/p')
oldest-check: install
	@test -d $(OLDEST_HEADERS)/torch/include || { mkdir -p build/oldest/wheel \
	&& $(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 --platform macosx_11_0_arm64 \
		--dest build/oldest/wheel torch==$(OLDEST_TORCH) \
	&& $(BIN)/python -c 'import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); z.extractall(sys.argv[2], [name for name in z.namelist() if name.startswith("torch/include/")])' \
		build/oldest/wheel/torch-*.whl $(OLDEST_HEADERS) && rm -r build/oldest/wheel; }
	@for source in csrc/*.cpp; do \
		$${CXX:-c++} -std=c++20 -fsyntax-only -Wall -Wextra -fopenmp-simd -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020b000000000000 \
			$(OLDEST_CUDA) \
			-isystem $$($(BIN)/python -c 'import pybind11; print(pybind11.get_include())') \
			-isystem $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') \
			-isystem $(OLDEST_HEADERS)/torch/include $$source || exit 1; \
	done; echo 'oldest-check: csrc/*.cpp compile against torch $(OLDEST_TORCH)'

# The kernels for CPUs without PyTorch, over cases with PyTorch's results in float64: under sanitizers, with this machine's
# vectors and without; and compiled for Arm, in an emulator (Debian: libhwy-dev, g++-aarch64-linux-gnu, qemu-user).
DRIVER := build/driver
DRIVER_SOURCES := csrc/vector_kernels.cpp tests/csrc/kernel_driver.cpp
DRIVER_FLAGS := -std=c++20 -O1 -g1 -pthread -Wall -Wextra -Wno-unknown-pragmas -Icsrc -DMADFORMER_CLONES=
HIGHWAY := $(dir $(wildcard /usr/include/hwy/highway.h))
DRIVER_VECTORS := $(if $(HIGHWAY),-isystem $(DRIVER)/include -DMADFORMER_HIGHWAY -DHWY_COMPILE_ONLY_STATIC)
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64 -L /usr/aarch64-linux-gnu
$(DRIVER)/cases: tests/csrc/kernel_cases.py | install
	@mkdir -p $(DRIVER)/include && $(if $(HIGHWAY),ln -sfn $(HIGHWAY) $(DRIVER)/include/hwy)
	@$(BIN)/python -m tests.csrc.kernel_cases $@

sanitize: $(DRIVER)/cases
	@$(if $(HIGHWAY),,echo 'sanitize: Highway is not here (Debian: libhwy-dev): kernels with vectors are NOT looked at')
	@for kind in 'address -march=native $(DRIVER_VECTORS)' 'address,undefined' 'thread'; do \
		set -- $$kind; sanitizer=$$1; shift; echo "sanitize: $$sanitizer$${1:+, with vectors}"; \
		$${CXX:-c++} $(DRIVER_FLAGS) "$$@" -fsanitize=$$sanitizer -fno-sanitize-recover=all -Wno-tsan $(DRIVER_SOURCES) \
			-o $(DRIVER)/sanitized && $(DRIVER)/sanitized $< || exit 1; \
	done

arm-check: $(DRIVER)/cases
	@command -v $(ARM_CXX) $(firstword $(ARM_RUN)) >/dev/null || { echo 'arm-check: no $(ARM_CXX) or no emulator here: NOT run'; exit; }; \
	$(ARM_CXX) $(DRIVER_FLAGS) -march=armv8-a+crypto $(DRIVER_VECTORS) $(DRIVER_SOURCES) -o $(DRIVER)/arm && $(ARM_RUN) $(DRIVER)/arm $<

# The oldest and the newest PyTorch that are supported, each in an environment of its own in build/matrix: no GPU.
# MATRIX_VENVS=FOLDER takes its venv-oldest and venv-newest.
matrix:
	.ci/matrix

# What a GPU machine without a network lacks, into build/gpu-bundle, with the oldest environment of `make matrix`, whose
# Python and PyTorch are that machine's. MADFORMER_RELEASED=FOLDER adds the released implementation's source.
GPU_BUNDLE_PYTHON ?= $(or $(MATRIX_VENVS),build/matrix)/venv-oldest/bin/python
gpu-bundle: package-tree
	@test -x $(GPU_BUNDLE_PYTHON) || { echo "gpu-bundle: no $(GPU_BUNDLE_PYTHON): make matrix makes it"; exit 1; }
	$(GPU_BUNDLE_PYTHON) -m benchmarks.gpu_bundle make $(GPU_BUNDLE)

# On a machine with a GPU: the extension into the links, out of build/gpu-bundle or compiled, then the stages of
# docs/gpu-visit.md. It needs no install where $(PYTHON) and the bundle have what it imports and builds with.
# GPU_CHECK='--stages kernels,peers --budget 300' make gpu-check
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check: export PYTHONPATH := $(CURDIR)/build/package:$(PYTHONPATH):$(CURDIR)/build/gpu-site
gpu-check: package-tree
	$(GPU_PYTHON) -m benchmarks.gpu_bundle use || MADFORMER_EXTENSION=$${MADFORMER_EXTENSION:-require} \
		$(GPU_PYTHON) setup.py --quiet build_ext --build-lib build/package
	$(GPU_PYTHON) -m benchmarks.gpu_check $(GPU_CHECK)

# A source distribution, and of it, which proves it whole, the wheel for this Python. The ops use torch's stable ABI, so that
# one wheel serves every PyTorch from 2.11 on; its module is pybind11's, which has no stable ABI of Python's: one wheel for
# each Python, by make dist PYTHON=python3.12 VENV=.venv-3.12. Built with nvcc it has the GPU's code, too.
dist: install
	rm -rf dist madformer.egg-info
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null
	MADFORMER_EXTENSION=$${MADFORMER_EXTENSION:-require} $(BIN)/pip wheel --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --wheel-dir dist dist/madformer-*.tar.gz
	@ls -l dist

# The same in a scratch folder, then the wheel in a clean environment: madformer info, and a picture in two steps.
dist-check: install
	$(BIN)/pytest tests/test_packaging.py -m slow

# The documentation as a site in build/docs, in an environment of its own: the API pages are read from the sources, which
# are not imported. A link or a name that leads nowhere is an error.
DOCS_VENV := build/docs-venv
$(DOCS_VENV)/.installed: pyproject.toml
	@test -x $(DOCS_VENV)/bin/pip || $(PYTHON) -m venv $(DOCS_VENV)
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(DOCS_VENV)/requirements.txt
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement $(DOCS_VENV)/requirements.txt
	@touch $@

docs: $(DOCS_VENV)/.installed package-tree
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo 'docs: build/docs/index.html'

# The folders laid out by links as they are installed: for mypy, which does not follow an editable install with mapped
# folders (setuptools' strict mode, which it does follow, misses new files), and for a run without an install. What is no
# link stays: the extension that was built into it.
TREE ?= build/package
package-tree:
	@mkdir -p $(TREE)/madformer && find $(TREE)/madformer -type l -delete
	@ln -sf "$(CURDIR)"/python/madformer/* "$(CURDIR)/kernels" "$(CURDIR)/engine" $(TREE)/madformer/
