PYTHON ?= python3
BIN := .venv/bin

.PHONY: env test lint demo

env: .venv/.stamp

.venv/.stamp: pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install torch torchvision
	$(BIN)/python -m pip install -e '.[test,lint]'
	@$(BIN)/python -m pip install 'setuptools<81' detectron2 \
	    || echo 'make env: pip finds no Detectron2 here: what needs it is left out' \
	            '(https://detectron2.readthedocs.io/en/latest/tutorials/install.html)'
	$(BIN)/e3va info
	touch $@

test: env
	$(BIN)/python -m pytest -n 2

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: env
	$(BIN)/python -m e3va.demo
