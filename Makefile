# `make help` lists what can be made. Everything installs into VENV and nowhere else.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
HAS_NVIDIA := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)

NO_PYTHON = Python 3.11 or newer is needed; found: $(shell python3 --version 2>&1 || echo none). \
Install it with 'sudo apt-get install python3 python3-venv' (Debian, Ubuntu), 'sudo dnf install python3.12' (Fedora) \
or 'brew install python' (macOS), then run make again, or name one: make PYTHON=/path/to/python3.12
NO_VENV = $(PYTHON) has no venv module. Install it with 'sudo apt-get install python3-venv' \
(or python3.11-venv, matching '$(PYTHON) --version'), then run make again.
NO_INDEX = Installing failed; pip's message above says why. Without a network to a package index, connect or point \
pip at a mirror (PIP_INDEX_URL, PIP_FIND_LINKS), then run make again: it continues where it stopped.

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types bench report sanitize package clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.runtime ## set up, then run the whole way through on the small model in the package
	$(VENV)/bin/tq-mcp demo $(DEMO_ARGS)

test: $(VENV)/.dev ## set up, then run the tests (PYTEST_ARGS="--cov" measures coverage)
	$(PY) -m pytest -n auto $(PYTEST_ARGS)

lint: $(VENV)/.dev ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.dev ## put the code into the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.dev ## check types, strictly
	$(PY) -m pyright --pythonpath $(PY)

bench: $(VENV)/.dev ## measure quality and speed on this machine, and write README's table
	$(PY) -m benchmarks $(BENCH_ARGS)
	$(PY) benchmarks/render_readme.py
	$(PY) -m benchmarks.render_performance

report: $(VENV)/.dev ## run tests and benchmarks and write one JSON file to send back, for instance from a Mac
	$(PY) -m benchmarks.send_back

sanitize: $(VENV)/.dev ## run the tests of GPU kernels under NVIDIA's compute-sanitizer: races, wrong addresses
	$(PY) -m tests.metal_kernels.sanitize

package: $(VENV)/.dev ## build wheel and sdist, install the wheel into an empty environment, run the demo there
	rm -rf dist build/empty
	$(PY) -m build --outdir dist .
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip --quiet --disable-pip-version-check install dist/*.whl
	cd build/empty && bin/tq-mcp demo --home demo-home

clean: ## remove what make made, the environment too
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*

# pip writes its own files; the stamps say that it finished, so that a second run does nothing.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(NO_VENV)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml
	$(call install,.)
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(call install,.[dev])
	@touch $@

# The CPU and the CUDA build of MLX both bring mlx/lib/libmlx.so, so only one may be there. Linux gets the
# CPU build with the package; where an NVIDIA GPU is seen it makes room for the CUDA build.
define install
	@echo "Installing $(1) into $(VENV)"
	@$(PIP) install --editable '$(1)' || { echo "$(NO_INDEX)" >&2; exit 1; }
	$(if $(HAS_NVIDIA),@echo "NVIDIA GPU seen: installing MLX's CUDA build"
	@$(PIP) uninstall --yes mlx-cpu mlx-cuda-13
	@$(PIP) install "mlx[cuda13]==$$($(PY) -c 'from importlib.metadata import version; print(version("mlx"))')" \
	|| { echo "$(NO_INDEX)" >&2; exit 1; })
endef
