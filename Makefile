PYTHON ?= python3
BIN := .venv/bin

.PHONY: env test lint demo

# Detectron2 is on no package index, and whoever registered its name there would run code here: it is taken
# from the folders that pip searches on this machine, or from $(DETECTRON2).
env: .venv/.stamp

.venv/.stamp: pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install torch torchvision
	$(BIN)/python -m pip install -e '.[test,lint]'
	$(BIN)/python -m pip install 'setuptools<81'
	@$(if $(DETECTRON2),$(BIN)/python -m pip install --no-build-isolation '$(DETECTRON2)', \
	    $(BIN)/python -m pip download --quiet --no-index --no-deps --dest .venv/detectron2 detectron2 \
	    && $(BIN)/python -m pip install .venv/detectron2/detectron2-*) \
	    || echo 'make env: no Detectron2: what needs it is left out. make env DETECTRON2=URL-or-path installs it' \
	            '(https://detectron2.readthedocs.io/en/latest/tutorials/install.html)'
	$(BIN)/e3va info
	touch $@

test: env
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: env
	$(BIN)/python -m e3va.demo
