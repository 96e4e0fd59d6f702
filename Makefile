# make demo   phantoms -> cache -> two small models -> submission.csv, report.html and an honest score
# make test   the tests        make lint   ruff        make clean   what the demo wrote
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = demo
SERIES ?= 180
HELD_OUT ?= 80

.PHONY: install demo test lint clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(DEMO)
