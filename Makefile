PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-deep test-flower lint format clean

# the demo needs less than the tests, and should start soon
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt
	@echo "Setting up $(VENV), which takes a minute or two."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	@touch $@

demo: $(VENV)/.demo  ## set up, and run the federation of examples/federated_digits.py
	@$(BIN)/python examples/federated_digits.py --output-dir outputs/digits

test: lint  ## set up, and run the checks and all tests
	$(BIN)/python -m pytest --numprocesses 2

test-deep: lint  ## the same with other random examples each time, and 50 times as many
	$(BIN)/python -m pytest --numprocesses 2 --hypothesis-profile deep

test-flower: $(VENV)/.dev  ## real processes of Flower on this machine, some of which are killed; takes minutes
	PEFT_RAVAN_LOOPBACK=1 $(BIN)/python -m pytest tests/trainers/flower/test_loopback.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs
