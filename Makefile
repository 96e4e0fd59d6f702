# make demo    phantoms -> cache -> two small models -> submission.csv, report.html and a score on held-out series
# make test    the tests (10 minutes on two cores)      make lint    ruff      make clean    what the demo wrote
# make ablation    the README's table of crops (half an hour on two cores)
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PHANTOMS = --matrix 128 --modality CTA --plane axial --plain

.PHONY: install demo test lint clean ablation

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

# Graded down so that two cores learn something in minutes: one modality, one plane, 96 pixels.
demo: install
	rm -rf demo
	@echo "== 1/6 writing 320 phantom series to train on and 100 of other patients to test (CTA, axial)"
	$(BIN)/python tests/phantom.py --dst demo/dicoms --series 320 --seed 0 $(PHANTOMS)
	$(BIN)/python tests/phantom.py --dst demo/held_out --series 100 --seed 1 $(PHANTOMS)
	@echo "== 2/6 preprocessing"
	$(BIN)/python preprocess.py --src demo/dicoms --dst demo/cache --config configs/demo.yaml
	@echo "== 3/6 training a small MaxViT"
	$(BIN)/accelerate launch --num_processes 1 train.py --config configs/demo.yaml
	@echo "== 4/6 training the locator"
	$(BIN)/accelerate launch --num_processes 1 train.py --config configs/demo_locator.yaml
	@echo "== 5/6 predicting the held-out series from their DICOM files"
	$(BIN)/python infer.py --src demo/held_out --outputs 'demo/outputs/*_seed*_fold*' \
		--labels demo/held_out/train.csv > demo/submission.csv
	@echo "== 6/6 the report"
	$(BIN)/python eda.py --src demo/dicoms --cache demo/cache --outputs demo/outputs \
		--submission demo/submission.csv > demo/report.html
	@echo "== done. The score above is of 100 phantom series (axial CTA) that training never saw."
	@echo "   predictions: demo/submission.csv    report: demo/report.html"

clean:
	rm -rf demo
