PYTHON ?= python3

# Tools are run as `python -m tool`: the scripts beside it hold the absolute path of the place where they were installed.
VENV_PYTHON := .venv/bin/python

# Named after the place for the same reason: a moved checkout installs itself again.
PLACE := $(shell pwd | cksum | cut -d ' ' -f 1)
INSTALLED := .venv/installed-in-$(PLACE)
RECIPES_INSTALLED := .venv-recipes/installed-in-$(PLACE)

# From a fresh environment each time: what Sphinx has cached is not warned of again.
SPHINX := $(VENV_PYTHON) -m sphinx --fresh-env --quiet --fail-on-warning --keep-going

PYTEST_WITH_COVERAGE := $(VENV_PYTHON) -m pytest --cov --numprocesses=auto --maxprocesses=4 --dist=worksteal

# Only long tests run all of these, because they need a real C++ compiler: the doctor's processes, healing and autotuning.
# The hundredth percent of the others needs several processes: votes of ranks that fail or disagree.
LEFT_OUT_OF_QUICK_COVERAGE := */_doctor/child.py,*/_doctor/process.py,*/_compile/healing.py,*/_torch/inductor.py,*/_torch/autotuning.py

.PHONY: help test test-all gpu bench faults demo recipes lint types docs snippets wheel ci clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' Makefile

test: $(INSTALLED) ## run the tests that are not marked as long, and measure their coverage (eight minutes)
	$(PYTEST_WITH_COVERAGE) -m 'not long' --cov-report= --cov-fail-under=0
	$(VENV_PYTHON) -m coverage report --omit='$(LEFT_OUT_OF_QUICK_COVERAGE)' --fail-under=99

test-all: test ## run `make test`, then the long tests, and measure the coverage of all (half an hour)
	$(PYTEST_WITH_COVERAGE) -m long --cov-append --cov-fail-under=99

# The torch in constraints.txt may have no CUDA: PYTHON_GPU=python uses another environment, which needs only pytest.
PYTHON_GPU ?= $(VENV_PYTHON)
gpu: ## run the tests that need an NVIDIA GPU, and write docs/gpu-table.md (at most 8 minutes on one card)
	PYTHONPATH=src:tests timeout 480 $(PYTHON_GPU) -m pytest tests/gpu -q --confcutdir=tests/gpu \
	    -p no:cacheprovider -o filterwarnings=default --durations=0 $(ARGS)

bench: $(INSTALLED) ## measure and write docs/performance-tables.md (an hour; ARGS="-k compiled": some of it)
	mkdir -p docs/_build
	$(VENV_PYTHON) -m pytest benchmarks/bench_*.py -q -p no:xdist -o filterwarnings=default \
	    -o faulthandler_timeout=1200 --benchmark-columns=min,median \
	    --benchmark-json=docs/_build/bench-$$(date +%s).json $(ARGS)
	$(VENV_PYTHON) benchmarks/tables.py docs/_build/bench-*.json

faults: $(INSTALLED) ## make every fault for real and write docs/reliability-table.md (most of an hour)
	PYTHONPATH=tests $(VENV_PYTHON) -m faults.matrix $(ARGS)

demo: $(INSTALLED) ## train a network while its compiler breaks and is repaired (ARGS=--smoke: quickly)
	$(VENV_PYTHON) examples/demo.py $(ARGS)

# In an environment of their own: the frameworks bring a hundred packages, which `make test` does not need. Inductor
# would precompile its headers for each program, which takes longer than it saves.
recipes: $(RECIPES_INSTALLED) ## run examples/recipes, each with its framework (five minutes)
	@for recipe in examples/recipes/*.py; do \
	    printf '\n--- %s\n' "$$recipe"; \
	    TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS=0 .venv-recipes/bin/python "$$recipe" || exit 1; done

lint: $(INSTALLED) ## check style, format, and that imports between rooms only point down
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -c "from importlinter.cli import lint_imports_command as check; check()"

# Pyright looks up its newest version on the network unless its warnings are off.
types: $(INSTALLED) ## check types with mypy, and the public API with mypy and pyright as a user's project sees it
	$(VENV_PYTHON) -m mypy
	$(VENV_PYTHON) -m mypy --config-file tests/typing/pyproject.toml
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV_PYTHON) -m pyright --project tests/typing --pythonpath $(VENV_PYTHON)

docs: $(INSTALLED) ## build docs/_build/html and run the doctests
	$(SPHINX) -b html docs docs/_build/html
	$(SPHINX) -b doctest docs docs/_build/doctest

snippets: $(INSTALLED) ## run the code blocks of README.md and docs/
	$(VENV_PYTHON) -m pytest README.md docs --ignore docs/_build

wheel: $(INSTALLED) ## build and check what a package index gets: dist/*.whl and dist/*.tar.gz
	rm -rf dist
	$(VENV_PYTHON) -m build
	$(VENV_PYTHON) -m twine check --strict dist/*

ci: ## run every check
	.ci/run

clean: ## remove what the other targets made, except .venv and .venv-recipes
	rm -rf build dist docs/_build .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# Also made anew: an environment that was left half-made, or whose Python is gone.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into .venv (from nothing: a minute or two)"
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(VENV_PYTHON) -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(RECIPES_INSTALLED): pyproject.toml constraints.txt
	@echo "installing into .venv-recipes (from nothing: a minute)"
	@.venv-recipes/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv-recipes
	@.venv-recipes/bin/python -m pip install -qq --constraint constraints.txt --editable '.[recipes]'
	@touch $@
