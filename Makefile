# Two commands are enough: `make quickstart` and `make test`. Each makes .venv and installs what it needs, once.

VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help quickstart dev test check bench learn faults hostile clean

# One MLX backend, never two: on a Mac it is part of mlx; on Linux CUDA where a driver answers, else the CPU.
ifeq ($(shell uname -s),Darwin)
BACKEND ?=
else
BACKEND ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda13 || echo cpu)
endif

empty :=
comma := ,
extras = $(if $(strip $(1)),[$(subst $(empty) $(empty),$(comma),$(strip $(1)))])

# Another backend makes the environment anew; changed dependencies in pyproject.toml are installed into it.
NAME := $(if $(BACKEND),$(BACKEND),metal)
MADE := $(VENV)/.made-$(NAME)
RUN_STAMP := $(VENV)/.installed-$(NAME)
DEV_STAMP := $(RUN_STAMP)-dev

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(RUN_STAMP) ## From data to an evaluated GRPO model, in minutes
	PYTHONWARNINGS="ignore:Function" $(BIN)/dagster job execute -m pipeline.definitions -j quickstart -c configs/runs/quiet.yaml
	@$(BIN)/mlx-rl leaderboard quickstart

dev: $(RUN_STAMP) ## Dagster's UI on http://127.0.0.1:3000
	PYTHONWARNINGS="ignore:Function" $(BIN)/dagster dev -w workspace.yaml

test: check ## Lint, types and the whole test suite
	$(BIN)/pytest

check: $(DEV_STAMP) ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: $(DEV_STAMP) ## The benchmarks, beside the peers that are installed
	$(BIN)/python -m tests.benchmarks

learn: $(DEV_STAMP) ## Train every algorithm from one start: table, curves, claims (half an hour on two cores)
	$(BIN)/python -m tests.learning

faults: $(DEV_STAMP) ## Kill 200 short trainings, flip 200 bytes, fill 50 disks (as root), take 2,000 steps
	$(BIN)/python -m tests.faults.kills 200
	$(BIN)/python -m tests.faults.flips 200
	@if [ "$$(id -u)" = 0 ]; then $(BIN)/python -m tests.faults.disk 50; else echo "full disks: left out, only root may mount one"; fi
	$(BIN)/python -m tests.faults.long 2000

audit: $(DEV_STAMP) ## Known vulnerabilities of what is installed
	@$(BIN)/pip-audit --version >/dev/null 2>\&1 || if command -v uv >/dev/null 2>\&1; then uv pip install --quiet --python $(BIN)/python pip-audit; else $(BIN)/python -m pip install --quiet pip-audit; fi
	$(BIN)/pip-audit --skip-editable --progress-spinner off
	$(BIN)/pytest -s -m slow tests/faults/test_dagster.py

hostile: $(DEV_STAMP) ## Hostile programs against every sandbox that works here, as root and as a user
	$(BIN)/python -m tests.rewards.hostile --own $(SNIPPETS)

ui-tour: $(DEV_STAMP) ## Look at Dagster's UI in Chromium, act in it, keep screenshots in docs/images
	@$(BIN)/python -c "import playwright" 2>/dev/null || $(BIN)/python -m pip install --quiet playwright
	$(BIN)/python -m tests.ui.tour docs/images

clean: ## Remove .venv and caches; artifacts and Dagster's history stay
	rm -rf $(VENV) .ruff_cache .pytest_cache .hypothesis

# uv where it is, else the venv and pip of the newest Python that is new enough. An environment that somebody else made is
# used as it is; one for another backend is thrown away.
$(MADE):
	@if ls $(VENV)/.made-* >/dev/null 2>&1; then rm -rf $(VENV); fi
	@if [ -x $(BIN)/python ]; then \
	  echo "using the $(VENV) that is here"; \
	elif command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --python '>=3.11' $(VENV); \
	else \
	  python=; \
	  for candidate in $(PYTHON) python3.14 python3.13 python3.12 python3.11 python3 python; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "No Python >= 3.11 found. Install one (https://www.python.org/downloads, or 'brew install python', or your" >&2; \
	    echo "distribution's python3 and python3-venv), or uv (https://docs.astral.sh/uv), or say 'make PYTHON=/path/to/python'." >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$python --version)"; \
	  $$python -m venv $(VENV) || { echo "venv fails: on Debian and Ubuntu install python3-venv" >&2; exit 1; }; \
	fi
	@touch $@

define install
@rm -f $(VENV)/.installed-*
@echo "installing mlx-rl-trainer$(call extras,$(1))"
@if command -v uv >/dev/null 2>&1; then uv pip install --quiet --python $(BIN)/python -e '.$(call extras,$(1))'; \
else $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.$(call extras,$(1))'; fi
endef

$(RUN_STAMP): pyproject.toml $(MADE)
	$(call install,$(BACKEND))
	@touch $@

$(DEV_STAMP): pyproject.toml $(MADE)
	$(call install,$(BACKEND) dev)
	@touch $@ $(RUN_STAMP)
