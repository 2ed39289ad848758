# Each target first installs what it needs into .venv, so that all of them work on a fresh machine.

PYTHON ?= python3
PY := .venv/bin/python
# INSTALL="uv pip install" is faster, and takes torch's CPU build where there is no GPU
INSTALL ?= $(PY) -m pip install --quiet --disable-pip-version-check
ARGS ?=
# The folder that `make train` writes to and draws its text from
OUT := $(or $(patsubst --out_dir=%,%,$(lastword $(filter --out_dir=%,$(ARGS)))),out-11)

.PHONY: help train test test-slow faults lint bench compare encrypted clean

help:  ## list the targets; ARGS passes options on: make train ARGS="--max_iters=500"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: .venv/run  ## train a model with one layer and one head, then draw a text from it
	$(PY) train.py config/train_11.py $(ARGS)
	$(PY) sample.py --out_dir=$(OUT) --start="The object" --num_samples=1 --max_new_tokens=200
	@echo
	@echo "Next, train the same model with softmax, and draw both losses in loss.png:"
	@echo "    $(PY) train.py config/train_11.py --attn_type=SM --out_dir=out-SM"
	@echo "    $(PY) plot.py loss $(OUT) out-SM"

test: .venv/dev  ## run the tests, except the slow ones, in two processes
	$(PY) -m pytest -n 2 -m "not slow and not exhaustive" $(ARGS)

test-slow: .venv/dev  ## run the tests that `make test` leaves out
	$(PY) -m pytest -n 2 -m slow $(ARGS)

faults: .venv/dev  ## kill, fill, damage and mislead real runs, and count what survives
	$(PY) tests/faults.py $(ARGS)

lint: .venv/dev  ## check style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: .venv/run  ## time a training step of the small model with softmax and the Gaussian kernel
	$(PY) bench.py config/train_11.py --attn_type=SM $(ARGS)
	$(PY) bench.py config/train_11.py --attn_type=GK $(ARGS)

compare: .venv/run  ## train nine attentions side by side, 54 runs; half an hour or more
	$(PY) compare.py config/compare_11.py $(ARGS)

encrypted: .venv/dev  ## predict the next character of three encrypted prompts; train if need be
	test -e out-he/ckpt.pt || $(PY) train.py config/train_he.py
	printf 'The object\nReturn the val\nimport \n' > out-he/prompts.txt
	$(PY) encrypt.py --out_dir=out-he --prompts=out-he/prompts.txt $(ARGS)

clean:  ## remove .venv and Python's caches; runs and data stay
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(INSTALL) -r requirements-dev.txt
	@touch $@
