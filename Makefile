# Everything that developers and CI run. Needs Python 3.11 or later, git and make;
# the rest is installed into .venv from requirements-dev.lock.
#
#   make test ARGS="-m 'not slow' -k replica"     ARGS goes to pytest, the demo or the benchmarks
#   make test PYTHON=python3.13 VENV=.venv-3.13   another Python, in an environment of its own

VENV ?= .venv
ARGS ?=

STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python
NODE_STAMP := $(if $(wildcard examples/node/package-lock.json),examples/node/node_modules/.package-lock.json)

# A stamp from another place does not count: an environment cannot be moved.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.PHONY: help
help: ## Say what there is to make
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{ printf "%-12s %s\n", $$1, $$2 }'

.PHONY: demo
demo: $(STAMP) ## Two replicas edit offline, conflict, delete, are refused, and converge
	$(RUN) examples/demo.py $(ARGS)

.PHONY: test
test: $(STAMP) $(NODE_STAMP) ## Run the tests
	$(RUN) -m pytest $(ARGS)

.PHONY: simulate
simulate: $(STAMP) ## Run simulated worlds: SEEDS=0-999
	$(RUN) -m tests.simulation --seeds $(or $(SEEDS),0-99) $(ARGS)

.PHONY: cuts
cuts: $(STAMP) ## Cut a session between processes after every byte
	$(RUN) -m tests.cuts $(ARGS)

.PHONY: kill
kill: $(STAMP) ## Kill processes at random instants: ARGS="--rounds 2000 --seed 7"
	$(RUN) -m tests.kill $(ARGS)

.PHONY: fuzz
fuzz: $(STAMP) ## Fuzz the decoders: SECONDS=60 for each, TARGETS="values patches"
	$(RUN) -m tests.fuzz $(TARGETS) --seconds $(or $(SECONDS),60) $(ARGS)

.PHONY: coverage
coverage: $(STAMP) $(NODE_STAMP) ## Run the tests and report what they did not reach
	$(RUN) -m coverage erase
	$(RUN) -m coverage run -m pytest $(ARGS)
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage report

.PHONY: bench
bench: $(STAMP) ## Measure
	$(RUN) -m benchmarks $(ARGS)

.PHONY: format
format: $(STAMP) ## Put sources and protos into their usual form
	$(RUN) -m ruff check --fix-only --quiet
	$(RUN) -m ruff format
	$(VENV)/bin/buf format --write proto

.PHONY: lint
lint: $(STAMP) proto-lint ## Check form, rules and protos
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check

.PHONY: types
types: $(STAMP) ## Check types with mypy and pyright
	$(RUN) -m mypy
	$(RUN) -m pyright --pythonpath $(RUN)

.PHONY: proto
proto: $(STAMP) ## Generate the Python stubs from proto/
	$(RUN) scripts/generate_stubs.py

.PHONY: proto-lint
proto-lint: $(STAMP) ## Check the protos, that old clients can still talk, and that the stubs are fresh
	VENV=$(VENV) scripts/check-protos
	$(RUN) scripts/generate_stubs.py --check

.PHONY: wheel
wheel: $(STAMP) ## Build the wheel, install it on its own and import it
	VENV=$(VENV) scripts/check-wheel

.PHONY: check
check: lint types wheel test ## All that CI checks

.PHONY: lock
lock: ## Pin the newest versions of all dependencies in requirements-dev.lock
	@PYTHON='$(PYTHON)' scripts/lock --upgrade

.PHONY: clean
clean: ## Remove what was built or cached, except the environment
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* examples/node/node_modules
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

$(STAMP): requirements-dev.lock pyproject.toml scripts/install
	@PYTHON='$(PYTHON)' scripts/install $(VENV)

# The program in examples/node speaks to a server in the tests, which skip it where there is no Node.
examples/node/node_modules/.package-lock.json: examples/node/package-lock.json
	@if command -v npm >/dev/null; then cd examples/node && npm ci --no-audit --no-fund && touch node_modules/.package-lock.json; \
	else echo "npm was not found: the tests will skip the Node example"; fi
