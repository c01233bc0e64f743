PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: demo test cluster staging lint bench lock clean

# Everything that config.yaml asks for, with all the set-up that it needs.
demo: $(VENV)/.demo
	$(BIN)/snakemake --cores all
	@$(BIN)/retune summary results/demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

# The profiles on a real SLURM, which is installed (root, Debian) and started for the time of the tests.  MARKED='not long'
# leaves out what trains.
cluster: $(VENV)/.test $(VENV)/.cluster
	$(BIN)/python -m pytest -n0 -rs -m "$(MARKED)" tests/cluster/test_slurm.py

# Results in an object store: an S3-compatible server on this machine.
staging: $(VENV)/.test $(VENV)/.cluster $(VENV)/.kubernetes $(VENV)/.staging
	$(BIN)/python -m pytest -n0 -rs tests/cluster/test_staging.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

bench: $(VENV)/.test
	@for script in $(filter-out %/peers.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Newest versions of everything, written down exactly.
lock:
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install torch==2.13.0
	$(PIP) install --editable '.[demo,test,lint,cluster,kubernetes,staging]'
	(echo '# Exact versions of everything that retune is tested with; made by `make lock`.'; \
	 $(PIP) list --format=freeze --exclude-editable | grep -v '^pip==\|^setuptools==' | sed 's/+cpu$$//') > requirements.lock

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "retune needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch goes first: alone it takes the build that the package index offers for this machine.
$(addprefix $(VENV)/.,demo test lint cluster kubernetes staging): $(VENV)/.%: $(BIN)/python requirements.lock pyproject.toml
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PIP) install --constraint requirements.lock torch
	$(PIP) install --constraint requirements.lock --editable '.[$*]'
	@touch $@
