# make demo | test | bench | lint, each on its own and in any order.
#
# Everything is installed into one virtual environment and nothing into the system:
#   PYTHON=... given: its environment; a new one on top of it (build/venv-...) where it is not in one
#   an active virtual environment with torch in it: that one
#   else .venv, made on the first call
# TORCH=... asks for a certain torch; else the torch that is there is taken, and $(TORCH) where there is none.
# ARGS=... goes to the program that is run: make test ARGS="-k lengths -x".

TORCH_ASKED := $(filter command line environment,$(origin TORCH))
TORCH ?= torch==2.13.0
DEMO_NEEDS := numpy scikit-learn matplotlib tqdm ninja
TEST_NEEDS := numpy ninja "setuptools>=77" pybind11 pytest pytest-xdist pytest-benchmark hypothesis matplotlib triton
LINT_NEEDS := ruff

BASE := python3
ifneq ($(PYTHON),)
  BASE := $(shell command -v $(PYTHON))
  $(if $(BASE),,$(error PYTHON=$(PYTHON) is not a program))
  ENV := $(shell $(BASE) -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else "")')
  ifeq ($(ENV),)
    ENV := build/venv$(subst /,-,$(BASE))
    ON_TOP := --system-site-packages
  endif
else ifneq ($(and $(VIRTUAL_ENV),$(shell $(VIRTUAL_ENV)/bin/python -c 'import importlib.util as u; print(u.find_spec("torch") or "")' 2>/dev/null)),)
  ENV := $(VIRTUAL_ENV)
else
  ENV := .venv
endif

PY := $(ENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check
STAMP := $(ENV)/.convfast
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo test bench lint FORCE

demo: $(STAMP)-demo
	$(PY) -m convfast.info
	$(PY) examples/moving_digits.py $(ARGS)
	$(PY) examples/digit_rows.py $(ARGS)

# Two processes of two threads each: waiting threads should sleep, not spin on each other's processor. Each begins with a half of its
# own, so that neither waits while the other builds what a file's tests share.
TESTS := -m pytest -n 2 --dist worksteal $(ARGS)
test: export OMP_WAIT_POLICY ?= passive
test: $(STAMP)-test
	$(PY) $(TESTS)
	TRITON_INTERPRET=1 $(PY) $(TESTS) $(if $(ARGS),|| test $$? -eq 5  # 5: ARGS chose nothing of Triton's)
	CONVFAST_EMULATE_CUDA=1 $(PY) $(TESTS) $(if $(ARGS),|| test $$? -eq 5)
	$(if $(ARGS),,CONVFAST_EMULATE_TILES=1 $(PY) $(TESTS) tests/test_split_gemm.py)

bench: $(STAMP)-test
	$(PY) -m pytest bench $(ARGS)

lint: $(STAMP)-lint
	$(PY) -m ruff check .

$(STAMP)-env:
	$(PY) -m pip --version >/dev/null 2>&1 || { test -x $(PY) && $(PY) -m ensurepip; } || \
	  $(BASE) -m venv $(ON_TOP) $(ENV) || { echo "make: no virtual environment (on Debian: apt install python3-venv)"; exit 1; }
	$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python >= 3.10 needed, {sys.version} found")'
	touch $@

$(STAMP)-torch: $(STAMP)-env $(if $(TORCH_ASKED),FORCE)
	$(if $(TORCH_ASKED),,$(PY) -c 'import torch' 2>/dev/null ||) $(INSTALL) "$(TORCH)"
	touch $@

$(STAMP)-demo: $(STAMP)-torch Makefile
	$(INSTALL) $(DEMO_NEEDS)
	touch $@

$(STAMP)-test: $(STAMP)-torch Makefile
	$(INSTALL) $(TEST_NEEDS)
	touch $@

$(STAMP)-lint: $(STAMP)-env Makefile
	$(INSTALL) $(LINT_NEEDS)
	touch $@
