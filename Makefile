# make demo and make test set everything up: they need Python 3.11 or later and make .venv themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WHEEL := build/wheel
WHEEL_STAMP := $(WHEEL)/.installed

# The real data sets, where they lie beside the checkout.
ifneq ($(wildcard ../shared/data),)
export OPTRELAX_DATA ?= $(abspath ../shared/data)
endif

# Tests of real data are selected where the data is; all else writes its own files.
ifneq ($(and $(OPTRELAX_DATA),$(wildcard $(OPTRELAX_DATA)/mnist)),)
SELECT ?=
else
SELECT ?= not data
endif

# Threads that wait for each other sleep: where other work shares the cores, spinning ones slow small networks tenfold.
demo test: export OMP_WAIT_POLICY ?= passive
# As many processes as cores, so one thread each.
test test-wheel: export OMP_NUM_THREADS ?= 1
WORKERS ?= auto
PYTEST := pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint types docs bench wheel test-wheel clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(STAMP)  ## make .venv with the development set

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "optrelax needs Python 3.11 or later; got $$($(PYTHON) --version). Set PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV): torch and the rest take a few minutes the first time."
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

demo: $(STAMP)  ## train a small network with the triangle LP layer, compare LP with closed form (2 minutes)
	$(BIN)/optrelax demo --out runs/demo

test: $(STAMP)  ## all tests, on all cores (WORKERS=0: in one process)
	$(BIN)/python -m $(PYTEST) -m '$(SELECT)' $(ARGS)

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

docs: $(STAMP)  ## the documentation site (site/), strictly, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --clean

bench: $(STAMP)  ## the benchmarks
	$(BIN)/python -m benchmarks

# The wheel stands apart, in an environment of its own that sees the packages of .venv but not the checkout:
# a .pth file puts a folder on the path without reading the .pth files in it, so no editable mapping is there.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(WHEEL_STAMP): $(STAMP) README.md LICENSE $(shell find optrelax layers -name '*.[pc]*' -not -path '*/__pycache__/*')
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist > /dev/null
	$(BIN)/python -m venv --without-pip $(WHEEL)
	$(BIN)/python -m pip --python $(WHEEL)/bin/python install --quiet --disable-pip-version-check --no-deps dist/*.whl
	$(BIN)/python $(PURELIB) > "$$($(WHEEL)/bin/python $(PURELIB))/development-set.pth"
	touch $@

wheel: $(WHEEL_STAMP)  ## build the wheel (dist/) and install it in an environment of its own

types: $(WHEEL_STAMP)  ## mypy on the installed wheel
	cd $(WHEEL) && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) \
	  --python-executable $(abspath $(WHEEL))/bin/python --cache-dir $(abspath .mypy_cache)

test-wheel: $(WHEEL_STAMP)  ## the smoke tests on the installed wheel
	rm -rf $(WHEEL)/checks && mkdir $(WHEEL)/checks && cp -r tests examples pyproject.toml *.md $(WHEEL)/checks
	cd $(WHEEL)/checks && $(abspath $(WHEEL))/bin/python -m $(PYTEST) -m 'smoke and not slow$(if $(SELECT), and $(SELECT))' $(ARGS)

clean:  ## remove what was built, but not .venv
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
