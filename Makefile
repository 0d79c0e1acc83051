# `make fit-van` trains, fits and evaluates, or continues where it was stopped; `make test` runs the tests; `make test-peers`
# compares with other packages, which it installs; `make docs` builds the documentation into site/. All create .venv first.
# Each of its stages ends with a stamp, so that what an interrupted one leaves is gone over again.

PYTHON ?= python3
ARGS ?=
WORKDIR ?= checkpoints/van_digits
VENV := .venv/bin
INSTALL := $(VENV)/python -m pip install --quiet --disable-pip-version-check --editable

.PHONY: fit-van test test-peers docs clean

fit-van: .venv/installed
	$(VENV)/python -m training.fit_van --workdir $(WORKDIR) --resume $(ARGS)

test: .venv/installed-test
	$(VENV)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

test-peers: .venv/installed-peers
	$(VENV)/python -m pytest tests/peers $(ARGS)

docs: .venv/installed-docs
	$(VENV)/python -m mkdocs build --strict

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python 3.11 or newer is needed; $(PYTHON) is older; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/created pyproject.toml
	$(INSTALL) .
	@touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) '.[test]'
	@touch $@

.venv/installed-peers: .venv/installed-test
	$(INSTALL) '.[peers]'
	$(VENV)/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision  # of another build: torch breaks
	@touch $@

.venv/installed-docs: .venv/installed
	$(INSTALL) '.[docs]'
	@touch $@

clean:
	rm -rf .venv build site *.egg-info
