# make fit-van     train, fit and evaluate, or continue where a run was stopped
# make test        the tests that a contributor runs after every change
# make test-all    those, the exhaustive tables, and whole programs: fit_van end to end, tutorials, benchmarks, the wheel
# make test-peers  compare with other packages, which it installs
# make test-campaign   feed in what is damaged, forged or wrong, and print counts of what became of it, by kind
# make docs        build the documentation into site/
# make measure     run the commands of docs/results.md whose records this machine lacks; ARGS=--list says how long
# make results     write the tables of docs/results.md and README.md from the records of this machine
#
# Every target creates .venv first. A stage of the installation ends with a stamp, so what an interruption leaves half
# done is done again.

PYTHON ?= python3
ARGS ?=
WORKDIR ?= checkpoints/van_digits
VENV := .venv/bin
INSTALL := $(VENV)/python -m pip install --quiet --disable-pip-version-check --editable
# A file stays on one worker: its tests share fixtures and compiled programs.
PYTEST := $(VENV)/python -m pytest --numprocesses auto --dist loadfile --max-worker-restart 1

.PHONY: fit-van test test-all test-peers test-campaign docs readme-figure measure results clean

fit-van: .venv/installed-training
	$(VENV)/python -m training.fit_van --workdir $(WORKDIR) --resume $(ARGS)

test: .venv/installed-test
	$(PYTEST) $(ARGS)

test-all: .venv/installed-test
	$(PYTEST) --override-ini norecursedirs='peers campaign' -m 'exhaustive or not exhaustive' $(ARGS)

test-peers: .venv/installed-peers
	$(VENV)/python -m pytest tests/peers $(ARGS)

test-campaign: .venv/installed-test
	$(PYTEST) --override-ini faulthandler_timeout=1200 tests/campaign $(ARGS)

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/python -m mkdocs build --strict

readme-figure: .venv/installed-docs
	$(VENV)/python docs/readme_figure.py

measure: .venv/installed-peers
	$(VENV)/python docs/measure.py $(ARGS)

results: .venv/created
	$(VENV)/python docs/results.py $(ARGS)

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python 3.11 or newer is needed; $(PYTHON) is older; try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed-training: .venv/created pyproject.toml
	$(INSTALL) '.[training]'
	@touch $@

.venv/installed-test: .venv/installed-training
	$(INSTALL) '.[test]'
	@touch $@

.venv/installed-peers: .venv/installed-test
	$(INSTALL) '.[peers]'
	$(VENV)/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision  # of another build: torch breaks
	@touch $@

.venv/installed-docs: .venv/installed-training
	$(INSTALL) '.[docs]'
	@touch $@

clean:
	rm -rf .venv build site *.egg-info
