# make demo    phantoms -> cache -> a small locator -> submission.csv, report.html and a score on other patients
# make test    the tests (10 minutes on two cores)      make lint    ruff      make clean    what the demo wrote
# make shell   a shell in which `python` and `accelerate` are those of .venv
# make ablation    what helps to find more, a table (hours); can be stopped and run again
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
LAUNCH = $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
INFER = $(BIN)/python infer.py --outputs demo/outputs
PHANTOMS = --matrix 128 --plain

.PHONY: install demo test lint clean ablation shell picture

install: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

shell: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $${SHELL:-sh}

# Graded down so that two cores learn something in minutes: 112 pixels, ten epochs of a third of the slabs.
demo: install
	rm -rf demo
	@echo "== 1/6 writing 420 phantom series to train on and 100 of other patients to test"
	$(BIN)/python tests/phantom.py --dst demo/dicoms --series 420 --seed 0 $(PHANTOMS)
	$(BIN)/python tests/phantom.py --dst demo/held_out --series 100 --seed 1 $(PHANTOMS)
	@echo "== 2/6 preprocessing"
	$(BIN)/python preprocess.py --src demo/dicoms --dst demo/cache --config configs/demo.yaml
	@echo "== 3/6 training the small locator from ImageNet weights"
	$(LAUNCH) train.py --config configs/demo.yaml
	@echo "== 4/6 predicting the held-out series from their DICOM files"
	$(INFER) --src demo/held_out --labels demo/held_out/train.csv > demo/submission.csv
	@echo "== 5/6 control: the same heads with their aneurysms erased must score at chance"
	$(BIN)/python tests/phantom.py --dst demo/erased --series 100 --seed 1 $(PHANTOMS) --no-aneurysms-drawn
	$(INFER) --src demo/erased --labels demo/held_out/train.csv > demo/control.csv
	@echo "== 6/6 the report"
	$(BIN)/python eda.py --src demo/dicoms --cache demo/cache --outputs demo/outputs > demo/report.html
	$(BIN)/python -m pytest tests/test_end_to_end.py -k demo
	@echo "== done. The scores are of 100 phantom series of patients that training never saw: 4/6 is the ensemble's,"
	@echo "   5/6 is the control. No annotated point was used in either."
	@echo "   predictions: demo/submission.csv    report: demo/report.html"

# The README's picture: the first positive series of the demo's held-out patients.
POSITIVE = $$(awk -F, 'NR > 1 && $$NF == 1 {print $$1; exit}' demo/held_out/train.csv)
picture:
	rm -rf demo/picture
	$(INFER) --src demo/held_out/series/$(POSITIVE) --explain demo/picture > demo/picture.csv
	$(BIN)/python -c "from PIL import Image; import sys; Image.open(sys.argv[1]).quantize(256).save(sys.argv[2])" \
		demo/picture/*.png docs/explain.png

# Weights, slabs, box, crops: what helps? docs/results.md
ablation: install
	$(BIN)/python tests/ablation.py

clean:
	rm -rf demo
