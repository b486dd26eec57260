# Needs make and Python 3.11 to 3.14; everything else goes into .venv. `make help` lists the targets.
#   make lab PORT=9000 ARGS=--no-browser        another port, more arguments for JupyterLab
#   make lab PYTHON=/some/bin/python3.11        another Python
#   make lab PIP_ARGS='--index-url ...'         another package index, for example one with CPU builds of torch
#   make unit ARGS='-k heun -x'                 more arguments for pytest

SHELL := /bin/bash
VENV ?= .venv
PORT ?= 8888
ARGS ?=
PIP_ARGS ?=
PYTHON ?=
TORCH ?= 2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
START := notebooks/00_start_here.ipynb

export PANEL_INLINE = true
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help lab app install test lint types pytest unit numeric notebooks browser figures bench lock clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | while IFS=$$'\t' read -r n t; do printf '  make %-10s %s\n' "$$n" "$$t"; done

# The first of $(PYTHON), python3.11, ... that runs and is of a version that will do.
define find_python
py=; for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python); do \
  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1; then py=$$candidate; break; fi; \
done; \
if [ -z "$$py" ]; then \
  echo "This needs Python 3.11 to 3.14, and none was found$(if $(PYTHON), at $(PYTHON))." >&2; \
  echo "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv; macOS: brew install python@3.11)," >&2; \
  echo "or name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; \
fi; \
if ! "$$py" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
  echo "$$py lacks venv or ensurepip. Debian, Ubuntu: apt install $$("$$py" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; \
fi
endef

install: $(INSTALLED)  ## make .venv and install requirements.lock into it, once

$(INSTALLED): requirements.lock pyproject.toml
	@if ! "$(BIN)/python" -m pip --version >/dev/null 2>&1; then \
	  $(find_python); \
	  echo "== making $(VENV) with $$("$$py" --version)"; \
	  "$$py" -m venv --clear "$(VENV)" || exit 1; \
	fi
	@echo "== installing $$(grep -c == requirements.lock) pinned packages into $(VENV): some minutes the first time, and only then"
	@"$(BIN)/python" -m pip install --quiet $(PIP_ARGS) -r requirements.lock
	@"$(BIN)/python" -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch "$@"
	@echo "== installed"

lab: $(INSTALLED)  ## JupyterLab on the start notebook, on this machine only
	@echo "== JupyterLab on port $(PORT), this machine only; Ctrl-C twice ends it"
	@JUPYTER_CONFIG_PATH="$(CURDIR)/binder/jupyter:$$JUPYTER_CONFIG_PATH" exec "$(BIN)/python" -m jupyterlab --ServerApp.ip=127.0.0.1 --ServerApp.port=$(PORT) --ServerApp.root_dir="$(CURDIR)" \
	  --LabApp.default_url=/lab/tree/$(START) --LabApp.news_url=None \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

STAGES := lint types unit numeric notebooks browser

app: $(INSTALLED)  ## the explorer as a page of its own, on this machine only (PORT=...)
	@exec "$(BIN)/python" -m widgets.app --port $(PORT) $(ARGS)

test: $(INSTALLED)  ## everything CI runs: lint, types, unit and contract tests, notebooks, browser; all, whichever fails
	@failed=; for stage in $(STAGES); do $(MAKE) --no-print-directory $$stage || failed="$$failed $$stage"; done; \
	echo "== verdicts"; for stage in $(STAGES); do \
	  case " $$failed " in *" $$stage "*) echo "   $$stage: FAILED";; *) echo "   $$stage: passed";; esac; done; \
	test -z "$$failed"

pytest: unit numeric notebooks browser  ## all tests, without lint and types

lint: $(INSTALLED)  ## ruff
	@echo "== [1/6] lint: ruff"
	@"$(BIN)/python" -m ruff check .

types: $(INSTALLED)  ## mypy
	@echo "== [2/6] types: mypy"
	@"$(BIN)/python" -m mypy

# One process for each core, each with one thread: two threads in each of two processes would wait for each other.
unit: $(INSTALLED)  ## the tests without notebooks and browser (FAMILY=...: those of one family alone)
	@echo "== [3/6] unit and contract tests"
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -m "not notebook and not browser" --numprocesses=auto --dist=worksteal $(if $(FAMILY),--family=$(FAMILY)) $(ARGS)

# Other CPUs, as far as this one can play them: the lesser instruction sets of torch and of oneDNN, two threads and one. With
# all that the CPU has the unit stage has run the same tests. Threads that wait must not spin: there are more than cores.
numeric: $(INSTALLED)  ## the tests that compare floats, as lesser CPUs would compute them
	@echo "== [4/6] float comparisons as on other CPUs"
	@best=$$("$(BIN)/python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())'); \
	status=0; for kind in default:SSE41:2 avx2:AVX2:1; do \
	  IFS=: read -r torch onednn threads <<< "$$kind"; \
	  if [ $$torch = "$$best" ] || [ "$$best" != avx512 -a $$torch != default ]; then echo "-- torch $$torch: no less than this CPU's $$best, left out"; continue; fi; \
	  echo "-- torch $$torch, oneDNN $$onednn, $$threads thread(s); this CPU: $$best"; \
	  OMP_WAIT_POLICY=passive ATEN_CPU_CAPABILITY=$$torch DNNL_MAX_CPU_ISA=$$onednn OMP_NUM_THREADS=$$threads "$(BIN)/python" -m pytest -q \
	    -m "numeric and not slow" --numprocesses=auto --dist=worksteal $(ARGS) || status=1; \
	done; exit $$status

notebooks: $(INSTALLED)  ## the notebooks at their defaults, and with other small parameters
	@echo "== [5/6] notebooks"
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -m notebook --numprocesses=auto --dist=worksteal $(ARGS)

browser: $(INSTALLED)  ## JupyterLab in a browser
	@echo "== [6/6] JupyterLab in a browser"
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -m browser --numprocesses=2 --dist=worksteal $(ARGS)

figures: $(INSTALLED)  ## run every notebook at full parameters; figures and executed notebooks go to build/figures
	@echo "== every notebook at full parameters, into build/figures"
	@"$(BIN)/python" notebooks/run_all.py --out build/figures $(ARGS)

bench: $(INSTALLED)  ## pytest-benchmark over tests/benchmarks
	@echo "== benchmarks"
	@"$(BIN)/python" -m pytest tests/benchmarks --benchmark-enable $(ARGS)

lock:  ## resolve pyproject.toml afresh and rewrite requirements.lock (TORCH=... names the torch release)
	@$(find_python); \
	echo "== resolving pyproject.toml in a new environment, build/lock, with $$("$$py" --version) and torch $(TORCH)"; \
	"$$py" -m venv --clear build/lock && \
	build/lock/bin/python -m pip install --quiet $(PIP_ARGS) -e '.[test]' 'torch==$(TORCH)' && \
	build/lock/bin/python -m pip check && \
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude sampling-workbench --exclude-editable \
	  | sed -E 's/^([A-Za-z0-9._-]+==[^+]+)\+.*$$/\1/' > build/frozen && \
	{ sed -n '/^#/p' requirements.lock; cat build/frozen; } > build/requirements.lock && \
	mv build/requirements.lock requirements.lock && rm -rf build/frozen build/lock
	@echo "== requirements.lock: $$(grep -c == requirements.lock) packages"

clean:  ## remove what was built, except .venv
	@echo "== removing build and caches; $(VENV) stays"
	@rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .benchmarks *.egg-info
	@find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
