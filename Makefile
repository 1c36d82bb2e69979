# make train | make test | make check | make slow-test | make clean
#
# The environment is .venv. If the interpreter already has torch 2.11 or later, .venv sees the
# system's packages and pip is held to that torch; else constraints.txt says which torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
ARGS ?=
# Processes that share the tests, each some files of them; 0: none but make's own.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: train test slow-test check install clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup_venv.py
	$(PYTHON) setup_venv.py $(VENV)
	touch $(STAMP)

train: $(STAMP)
	$(BIN)/python -m launch.train experiment=gpt_quickstart $(ARGS)

test: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

slow-test: $(STAMP)
	$(PYTEST) -m slow $(ARGS)

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m codespell_lib
	$(BIN)/python -m pyright

clean:
	rm -rf $(VENV) data runs dist
