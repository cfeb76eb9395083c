# make run     everything from nothing: packages, set-up, a demo image, a container in a microVM
# make test    all tests; make test-unit, test-host, test-vm one tier
# make fuzz    hostile messages to the server of --map, for minutes (ARGS="--rounds N --seed N")
# make pjdfstest PJDFSTEST=DIR   the built suite in DIR, on a mount of a new directory; pjdfstest-guest: mapped into a VM
#                                (ARGS="--jobs N TEST...")
# make bench   measurements; make lint, make packages, make setup, make setup-btrfs, make clean

PYTHON ?= python3
VENV := .venv
FCVM := $(VENV)/bin/fcvm
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: run test test-unit test-host test-vm fuzz pjdfstest pjdfstest-guest bench lint packages packages-test setup setup-btrfs demo-image clean

run: demo-image
	$(FCVM) podman run --name hello localhost/fcvm-demo -- echo "Hello from a microVM"

test: packages-test $(VENV)/.dev setup
	$(VENV)/bin/python tools/tests.py unit host vm

test-unit: $(VENV)/.dev
	$(VENV)/bin/python tools/tests.py unit

test-host: packages-test $(VENV)/.dev setup
	$(VENV)/bin/python tools/tests.py host

test-vm: packages-test $(VENV)/.dev setup
	$(VENV)/bin/python tools/tests.py vm

fuzz: $(VENV)/.dev
	$(VENV)/bin/python tests/fuse_fuzz.py $(ARGS)

pjdfstest: $(VENV)/.dev
	$(VENV)/bin/python tests/pjdfstest.py $(PJDFSTEST) $(ARGS)

pjdfstest-guest: $(VENV)/.dev demo-image
	$(VENV)/bin/python tests/pjdfstest.py --guest $(PJDFSTEST) $(ARGS)

bench: packages-test $(VENV)/.dev setup
	$(VENV)/bin/python -m bench $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check src tests tools
	$(VENV)/bin/mypy

demo-image: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/build demo

setup: packages $(VENV)/.run
	$(FCVM) setup

setup-btrfs: packages $(VENV)/.run
	$(SUDO) $(FCVM) setup --storage-only

packages packages-test: tools/packages.py
	@command -v $(PYTHON) >/dev/null || { $(SUDO) apt-get -q update; $(SUDO) apt-get -qy install --no-install-recommends python3; }
	@$(PYTHON) tools/packages.py run $(if $(filter packages-test,$@),test)

# --upgrade-deps: the commands that Debian's pip installs import re, 5 ms of every start.
$(VENV)/bin/python: | packages
	$(PYTHON) -m venv --upgrade-deps $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e '.[dev]'
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
