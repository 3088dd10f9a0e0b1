# Everything below sets itself up: the first call makes .venv and installs requirements.lock into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export SECATEUR_DATA ?= $(abspath $(wildcard ../shared/data))
export PYTHONUNBUFFERED = 1

.PHONY: help install demo test faults lint format bench schema lock clean

help:
	@echo "make demo    prune a real network on real digits, through every stage (about 2 minutes)"
	@echo "make test    all tests"
	@echo "make faults  every fault that a run should survive, made; ends with a table (under an hour)"
	@echo "make lint    ruff, the layers of imports, mypy"
	@echo "make bench   benchmarks, each prints a table"
	@echo "make install only the environment in $(VENV)"

install: $(VENV)/installed

$(VENV)/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: install
	$(BIN)/secateur run configs/demo.yaml
	@echo "report: runs/demo/report.html    MLflow: $(BIN)/secateur ui"

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

faults: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "" tests/faults tests/pipeline/train/test_world_sizes.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

schema: install
	$(BIN)/python -c 'import json; from pipeline.settings.config import Config; print(json.dumps(Config.model_json_schema(), indent=1))' > configs/schema.json
	$(BIN)/python -c 'import json; from pipeline.run.result import schema; print(json.dumps(schema(), indent=1))' > pipeline/results/result.schema.json

lock: install
	(echo "# Exact versions of everything that is installed; made by \`make lock\`."; \
	$(BIN)/python -m pip freeze --exclude-editable) > requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
