# Every target sets up what it needs: `make train` and `make test` work on a fresh machine.

PYTHON ?= python3
PY := .venv/bin/python
ARGS ?=

.PHONY: train test faults lint bench compare clean

train: .venv/run  ## train config/train_11.py; more arguments by ARGS="--max_iters=500"
	$(PY) train.py config/train_11.py $(ARGS)

test: .venv/dev  ## the whole test suite
	$(PY) -m pytest $(ARGS)

faults: .venv/dev  ## kill, fill, damage and mislead real runs: five minutes, one table
	$(PY) tests/faults.py $(ARGS)

lint: .venv/dev  ## style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: .venv/run  ## speed of a training step of the 1-layer model, softmax and Gaussian kernel
	$(PY) bench.py config/train_11.py --attn_type=SM $(ARGS)
	$(PY) bench.py config/train_11.py --attn_type=GK $(ARGS)

compare: .venv/run  ## nine attentions side by side, each at its best learning rate: an hour at most
	$(PY) compare.py config/compare_11.py $(ARGS)

clean:  ## the environment, and everything Python left; runs and data stay
	rm -rf .venv .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
