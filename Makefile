# `make demo` draws images and scores them, `make test` runs the fast tests. Both make their environment in .venv first,
# both can be repeated, and an installation that was cut off is begun anew. Without a GPU, this saves a large download:
#     make demo PIP_INSTALL_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
PIP_INSTALL_FLAGS ?=
PYTEST_FLAGS ?= -n 2
DEMO_FOLDER ?= outputs/demo
DEMO_LABELS ?= "red cube" "blue sphere, gray cylinder" "cyan cube, yellow sphere, purple cylinder" "green sphere"
DEMO_SAMPLE_FLAGS ?= --seed 1
DEMO_EVALUATE_FLAGS ?= --protocols test new_test --seeds 1

# Stands beside a new environment from the first step of its installation to the last.
unfinished := $(VENV).unfinished

# With a newer pyproject.toml or constraints.txt than the stamp, pip is asked again; it changes only what differs.
define install
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no $(PYTHON) here; try: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed and $(PYTHON) is $$("$(PYTHON)" --version 2>&1); try: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@if [ -e $(unfinished) ]; then echo "The last installation was cut off; beginning anew."; rm -rf $(VENV); fi
	@[ -d "$(VENV)" ] || touch $(unfinished)
	"$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_FLAGS) --constraint constraints.txt --editable "$(1)"
	@touch $@
	@rm -f $(unfinished)
endef

.PHONY: demo test

demo: $(VENV)/.installed
	$(VENV)/bin/iclevr-sample $(DEMO_LABELS) $(DEMO_SAMPLE_FLAGS) --out $(DEMO_FOLDER)/samples
# The last demo's scores may be of other weights, and an evaluation goes on only with its own.
	rm -rf "$(DEMO_FOLDER)/scores"
	$(VENV)/bin/iclevr-evaluate $(DEMO_EVALUATE_FLAGS) --out $(DEMO_FOLDER)/scores
	@echo "The drawn images lie in $(DEMO_FOLDER)/samples, their scores in $(DEMO_FOLDER)/scores."

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,.)

$(VENV)/.installed-test: $(VENV)/.installed
	$(call install,.[test])
