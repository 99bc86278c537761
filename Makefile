# Two commands do it all:  make quickstart  (the whole main job)  and  make test  (the test suite).
# Both make .venv first, and do nothing twice.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
# The package under its name, for tools that read the source without running it: no folder here is called scq. One link
# for each room, because a link to the whole repository would hold itself.
ROOMS := $(patsubst %/__init__.py,%,$(wildcard */__init__.py))
LINKS := $(addprefix build/src/scq/,$(ROOMS) __init__.py __main__.py py.typed)

.PHONY: quickstart test test-all test-lowest rehearse lint format docs links clean

quickstart: $(VENV)/.quickstart
	$(RUN)/scq quickstart $(if $(OUT),--out $(OUT))

# Two workers, each beginning with half of the tests: most of the time goes into commands that start up on one core.
PYTEST := python -m pytest --numprocesses 2 --dist worksteal

test: $(VENV)/.test
	$(RUN)/$(PYTEST) -m "not slow"

test-all: $(VENV)/.test
	$(RUN)/$(PYTEST)

# The oldest Python and the oldest of every direct dependency that pyproject.toml allows: what keeps these floors true.
LOWEST := .venv-lowest
test-lowest: $(LOWEST)/.test
	$(LOWEST)/bin/$(PYTEST) -m "not slow"

$(LOWEST)/.test: pyproject.toml | $(LINKS)
	test -x $(LOWEST)/bin/python || python3.11 -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable ".[test]"
	touch $@

# The half hour on a GPU of configs/benchmarks/cifar10_gpu.yaml, played on a CPU; docs/gpu.md says what that is.
PYTHON312 ?= python3.12
rehearse: $(VENV)/.test
	$(RUN)/python tests/rehearse.py --folder build/rehearsal --python $(PYTHON312) --source $(SOURCE) \
		$(if $(LPIPS),--lpips $(LPIPS)) $(if $(INCEPTION),--inception $(INCEPTION))

lint: $(VENV)/.test
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/basedpyright --pythonpath $(RUN)/python

format: $(VENV)/.test
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

# A site of the pages in docs/ and of the docstrings, to be opened from the disk: build/site/index.html.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet --strict
	@echo "built: build/site/index.html"

# One stamp for each set of extras, renewed when pyproject.toml changes. The test extras contain the quickstart's.
$(VENV)/.%: pyproject.toml | $(LINKS)
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

links: $(LINKS)

$(LINKS): build/src/scq/%:
	@mkdir -p $(@D)
	ln -s ../../../$* $@

clean:
	rm -rf $(VENV) $(LOWEST) build/src build/site .pytest_cache .ruff_cache .hypothesis
