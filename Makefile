.DEFAULT_GOAL := help
.PHONY: help setup lock demo test test-failures check bench docs serve release audit clean

BIN := .venv/bin
READY := .venv/.trimtab-ready
BENCHES := $(wildcard bench/*.py)
# The three folders as the one package that they are once installed, for tools that read files.
LINKED := rm -rf .venv/linked && mkdir -p .venv/linked/trimtab && \
	ln -s $(CURDIR)/platform/trimtab/* $(CURDIR)/jobs $(CURDIR)/serve .venv/linked/trimtab/

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make .venv from the pinned lists in locks/
	@sh locks/setup.sh

# For the other targets: make calls the script only when something it reads is newer than its mark.
$(READY): locks/setup.sh locks/cpu.txt locks/gpu.txt pyproject.toml
	@sh locks/setup.sh

lock: $(READY) ## Renew the pinned lists; ARGS=--upgrade takes newer versions
	@sh locks/lock.sh $(ARGS)

demo: $(READY) ## The whole story on this machine, in minutes
	@$(BIN)/trimtab demo

test: $(READY) ## Run the tests; ARGS='-k prefix' goes to pytest
	@$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

test-failures: $(READY) ## Kill processes, fill disks, fuzz longer; ARGS goes to pytest
	@TRIMTAB_FUZZ=$${TRIMTAB_FUZZ:-60} $(BIN)/python -m pytest tests/failure tests/integration/serve/test_fuzz.py $(ARGS)

check: $(READY) ## Style, format, types and import contracts
	@echo "ruff: style" && $(BIN)/ruff check .
	@echo "ruff: format" && $(BIN)/ruff format --check .
	@$(LINKED)
	@echo "pyright: types" && $(BIN)/pyright
	@echo "import-linter: contracts" && PYTHONPATH=.venv/linked $(BIN)/lint-imports --no-cache

ifneq ($(BENCHES),)
bench: $(READY) ## Run every benchmark, short form
	@set -e; for file in $(BENCHES); do echo "$$file --quick"; $(BIN)/python $$file --quick; done
endif

docs: $(READY) ## Build the documentation into .site/
	@$(LINKED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet && echo "docs: .site/index.html"

serve: $(READY) ## Serve the default model with its champions
	@$(BIN)/trimtab serve $(ARGS)

release: $(READY) ## Build and check wheel and sdist in dist/, with a bill of materials (CycloneDX)
	@rm -rf build dist
	@$(BIN)/python -m build --no-isolation . >/dev/null
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file dist/trimtab.cdx.json $(BIN)/python
	@ls -l dist

audit: $(READY) ## Look the pinned packages up in the list of known vulnerabilities
	@sed -e '/^ *--hash/d' -e 's/ *\\$$//' locks/cpu.txt | $(BIN)/pip-audit --requirement /dev/stdin --no-deps --disable-pip

clean: ## Remove what builds, tests and checks left; .venv and MLflow's data stay
	@rm -rf build dist .site *.egg-info platform/*.egg-info .pytest_cache .ruff_cache .import_linter_cache
	@find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
