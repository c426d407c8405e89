# make demo | test | bench | clean. Everything lives in .venv, made from the system's python3.

PYTHON ?= python3
VENV   ?= .venv
# A machine without an NVIDIA GPU takes torch's CPU build where pip's indexes have one, else the default build.
TORCH  ?= torch==2.13.0

BIN   := $(VENV)/bin
# Without --no-compile, pip compiles thousands of modules that are never imported.
PIP   := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile
READY := $(VENV)/ds_fp6-ready

# Processes that may not keep what they compile compile thousands of modules each, and the tests start dozens of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test bench clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(READY)
	$(BIN)/ds-fp6 bench linear $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache
	find ds_fp6 op_builder tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/ds_fp6-torch: | $(BIN)/python
	@if nvidia-smi >/dev/null 2>&1; then $(PIP) "$(TORCH)"; \
	else $(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) "$(TORCH)"; fi
	$(PIP) numpy setuptools wheel
	@touch $@

# The requirements come from the table of supported versions.
$(READY): setup.py ds_fp6/integrations/versions.py $(VENV)/ds_fp6-torch
	DS_BUILD_OPS=0 $(PIP) -e ".[test]"
	@touch $@
