# make demo          sets itself up, trains for some minutes, shows before and after, opens the chat
# make demo FRESH=1  starts over
# make test          sets itself up, runs every test on all cores
# make mutants       puts realistic mistakes into the code and sees whether tests notice; an hour
#                    ONLY=trainer: in these files alone
# make mutants-random N=400 SEED=1   random mistakes, tried with the tests that reach their line
# make lint          ruff, rules and format
# make bench DATA=F TEXT=G  speed, side by side with others; F: GSM8K's training file, G: Tiny Shakespeare
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
PY := .venv/Scripts/python
else
PY := .venv/bin/python
endif

.PHONY: demo test mutants mutants-random lint bench

demo: .venv/ready
	@$(PY) demo.py $(if $(FRESH),--fresh)

test: .venv/ready-dev
	$(PY) -m pytest -n auto --dist worksteal -rs

mutants: test
	$(PY) tests/mutants.py --only "$(ONLY)"

mutants-random: .venv/ready-dev
	$(PY) tests/mutants_random.py --count $(or $(N),400) --seed $(or $(SEED),1) --only "$(ONLY)"

lint: .venv/ready-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: .venv/ready-dev
	$(PY) bench/speed.py $(if $(DATA),--data $(DATA)) $(if $(TEXT),--text $(TEXT))
	$(if $(DATA),$(PY) bench/data.py $(DATA))

.venv/ready: requirements.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or newer is needed; try make PYTHON=python3.12')"
	$(PYTHON) -c "import time; print(time.time())" > .setup-began
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -r requirements.txt -c constraints.txt
	$(PY) -c "import time; print(time.time() - float(open('.setup-began').read()))" > .venv/setup-seconds
	@$(PY) -c "import os; os.remove('.setup-began'); open('.venv/ready', 'w').close()"

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(PY) -m pip install --disable-pip-version-check -q -r requirements-dev.txt -c constraints.txt
	@$(PY) -c "open('.venv/ready-dev', 'w').close()"
