PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo flower test test-deep test-flower docs lint format clean

# To compile all that is installed takes half of the set-up. Most of it is never imported, and the rest is compiled then,
# and only once, unless this is set.
export PYTHONDONTWRITEBYTECODE :=

# the demos need less than the tests, and should start soon
EXTRAS = $*
$(VENV)/.flower: EXTRAS = demo,flower
$(VENV)/.demo $(VENV)/.flower $(VENV)/.docs $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt
	@echo "Setting up $(VENV), which takes a minute or two."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

demo: $(VENV)/.demo  ## set up, and run the federation of examples/federated_digits.py
	@$(BIN)/python examples/federated_digits.py --output-dir outputs/digits

flower: $(VENV)/.flower  ## set up, and run the demo's federation over Flower, with three nodes on this machine
	@$(BIN)/python examples/flower_digits/compare.py --output-dir outputs/flower-digits

# each file is run by one worker, so that what its tests share is made once
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint  ## set up, and run the checks and all tests
	$(PYTEST)

test-deep: lint  ## the same with all combinations, and with other random examples each time, 50 times as many
	$(PYTEST) -m "deep or not deep" --hypothesis-profile deep

test-flower: $(VENV)/.dev  ## of the tests, those with real processes of Flower, some of which are killed
	$(PYTEST) -m "deep or not deep" tests/trainers/flower/test_loopback.py tests/trainers/flower/test_trust.py

docs: $(VENV)/.docs  ## set up, and build the pages of docs/ into site/, with every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs site
