# Two commands do all set-up on a machine with Python 3.10 or newer:
#
#   make demo   train on real MRI, predict, evaluate, draw a picture (demo/run.py)
#   make test   the whole test suite
#
# Both use the virtual environment .venv; a second call reuses what is done. `make test-fast` runs what takes under three
# minutes, `make lint` the linters, `make docs` builds the pages into build/site, `make clean` removes the environment and
# what the demo wrote.
#
#   make PYTHON=python3.12 demo    another Python
#   make CONSTRAINTS= test         the newest versions of all dependencies instead of the tested ones

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
SOURCES := $(shell find nnunet_lgms trainers plans studies workflow models -type f -not -path '*/__pycache__/*') setup.py pyproject.toml

.PHONY: demo test test-fast lint docs install clean

demo: $(VENV)/.installed
	$(BIN)/python demo/run.py

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations=15

test-fast: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m 'not slow' $(FAST)

# style, layers, types
lint: $(VENV)/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy
	@[ ! -x $(BIN)/hadolint ] || $(BIN)/hadolint --failure-threshold warning Dockerfile

docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

install: $(VENV)/.installed

clean:
	rm -rf $(VENV) demo/work build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " \
		+ sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# What an earlier build left in build/ would be installed along with what is there now. torchvision cannot be imported
# where its build does not fit torch's (a CPU build of torch beside the index's torchvision): see tools/.
$(VENV)/.installed: $(BIN)/python $(SOURCES) $(CONSTRAINTS)
	rm -rf build *.egg-info
	$(PIP_INSTALL) .
	rm -rf build *.egg-info
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || $(PIP_INSTALL) ./tools/torchvision_without_ops
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP_INSTALL) '.[test]'
	rm -rf build *.egg-info
	touch $@
