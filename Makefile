# Everything below sets itself up: the first call makes .venv and installs requirements.lock into it.
# Locks hold versions and hashes, and no address: pip finds files where it is set up to, and refuses any other content.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := build/tools
PIP := -m pip --quiet --disable-pip-version-check
export SECATEUR_DATA ?= $(abspath $(wildcard ../shared/data))
export PYTHONUNBUFFERED = 1

.PHONY: help install demo test faults lint format bench docs schema lock sbom clean

help:
	@echo "make demo    prune a real network on real digits, through every stage (about 2 minutes)"
	@echo "make test    all tests"
	@echo "make faults  every fault that a run should survive, made; ends with a table (two and a half hours on 2 cores)"
	@echo "make lint    ruff, the layers of imports, mypy"
	@echo "make bench   benchmarks, each prints a table (half an hour on 2 cores); ONLY=images,gpu takes those named"
	@echo "make docs    build/site/index.html: the pages of docs/ and the reference"
	@echo "make install only the environment in $(VENV)"
	@echo "make lock    the locks again, as pyproject.toml wants; UPGRADE=--upgrade takes newer versions"
	@echo "make sbom    build/sbom.json: what is installed in $(VENV), in CycloneDX's form"

install: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) install --require-hashes -r requirements.lock
	$(BIN)/python $(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/secateur demo

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

faults: install
	$(BIN)/python -m pytest -v -n 2 --dist loadfile -m "" tests/faults tests/pipeline/train/test_world_sizes.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Those that are done in half an hour together, and need neither a GPU nor root nor more packages; the last two need
# SECATEUR_DATA, the folder of real data.
BENCHES := manifest checkpoint packed imagenet overhead $(if $(SECATEUR_DATA),images compact)
comma := ,
bench: install
	$(BIN)/python benchmarks/run.py $(if $(ONLY),$(subst $(comma), ,$(ONLY)),$(BENCHES))

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html; its search wants a server: $(BIN)/python -m http.server -d build/site"

schema: install
	$(BIN)/python -c 'import json; from pipeline.settings.config import Config; print(json.dumps(Config.model_json_schema(), indent=1))' > pipeline/settings/schema.json
	$(BIN)/python -c 'import json; from pipeline.run.result import schema; print(json.dumps(schema(), indent=1))' > pipeline/results/result.schema.json

# Tools that are not the project's own, and so stay out of its environment.
$(TOOLS)/installed: requirements-tools.lock
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python $(PIP) install --require-hashes -r requirements-tools.lock
	touch $@

# Versions stay as they are in the locks, unless pyproject.toml no longer takes them. The images' locks hold parts of
# requirements.lock: what an image needs, at the same versions.
COMPILE = $(TOOLS)/bin/uv pip compile --quiet --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock"

lock: $(TOOLS)/installed
	$(COMPILE) $(UPGRADE) pyproject.toml --extra dev -o requirements.lock
	$(COMPILE) $(UPGRADE) --group pyproject.toml:tools -o requirements-tools.lock
	$(COMPILE) pyproject.toml -c requirements.lock -o infra/docker/requirements.lock
	$(COMPILE) $(UPGRADE) infra/mlflow/requirements.txt -c requirements.lock -o infra/mlflow/requirements.lock

sbom: install $(TOOLS)/installed
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON \
		-o build/sbom.json $(BIN)/python

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
