# Two commands: `make fit-van` trains, fits and evaluates, or continues where it was stopped; `make test` runs the tests.
# Both create .venv first.

PYTHON ?= python3
ARGS ?=
WORKDIR ?= checkpoints/van_digits
VENV := .venv/bin

.PHONY: fit-van test clean

fit-van: .venv/installed
	$(VENV)/python -m training.fit_van --workdir $(WORKDIR) --resume $(ARGS)

test: .venv/installed-test
	$(VENV)/python -m pytest $(ARGS)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python 3.11 or newer is needed; $(PYTHON) is older; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(VENV)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info
