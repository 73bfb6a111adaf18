# Two commands matter: `make reproduce` and `make test`. NOTEBOOK=1_lbp_wht restricts them to one notebook, PYTHON=python3.12 names
# another Python. Everything is installed into .venv/ and nothing outside of this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NOTEBOOK ?=
ONE := $(if $(NOTEBOOK),--notebook $(NOTEBOOK))
CHECK := import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit( \
  "leanvit needs Python 3.11, 3.12 or 3.13, this is %d.%d; name another one: make PYTHON=python3.12 ..." % v)

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test lint unit smoke nbval lab report gpu

help:
	@echo "make reproduce   set up, run every notebook on the embedded data, render outputs/site/, print the table"
	@echo "make test        set up, lint, unit tests, smoke tier of every notebook, nbval on outputs/smoke"
	@echo "make lab         set up, open JupyterLab with the project's kernel"
	@echo "make report      render outputs/ as outputs/site/index.html"
	@echo "make gpu         set up, measure what needs a CUDA device (7_speed)"
	@echo "NOTEBOOK=1_lbp_wht restricts reproduce and test to one notebook, and chooses that of gpu; PYTHON=python3.12 chooses the Python"

# Versions are those of requirements.lock, no others. PyTorch's small CPU wheels, when they are there already, stay: then the CUDA part
# of the lock is left out. The stamp makes a second call do nothing.
setup:
	@set -e; \
	test -x $(BIN)/python || { $(PYTHON) -c '$(CHECK)'; echo "creating $(VENV)/"; $(PYTHON) -m venv $(VENV); }; \
	$(BIN)/python -c '$(CHECK)'; \
	stamp="$$(cat requirements.lock pyproject.toml | cksum)"; \
	if [ "$$stamp" != "$$(cat $(VENV)/leanvit.stamp 2>/dev/null)" ]; then \
	  torch="$$($(PIP) list --format=freeze 2>/dev/null | sed -n 's/^torch==//p')"; \
	  locked="$$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' requirements.lock)"; \
	  case "$$torch" in \
	    "$$locked+cpu") skip='^(nvidia-|cuda-|cupy-|triton=|torch=|torchvision=)'; size="without CUDA: torch $$torch is installed" ;; \
	    *) skip='^$$'; size="on Linux about 3 GB, the CUDA libraries included" ;; \
	  esac; \
	  echo "installing the versions of requirements.lock into $(VENV)/ ($$size); some minutes the first time"; \
	  grep -Ev "$$skip" requirements.lock > $(VENV)/requirements.txt; \
	  $(PIP) install --quiet --no-deps -r $(VENV)/requirements.txt; \
	  $(PIP) install --quiet --no-deps --no-build-isolation -e .; \
	  $(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name leanvit >/dev/null 2>&1; \
	  echo "$$stamp" > $(VENV)/leanvit.stamp; \
	fi

reproduce: setup
	@$(BIN)/leanvit run --tier embedded $(ONE) --report

test: setup
	@set -e; for step in lint unit smoke nbval; do \
	  echo "== $$step"; began=$$(date +%s); \
	  $(MAKE) --no-print-directory $$step; \
	  echo "== $$step: $$(($$(date +%s) - began)) s"; \
	done

lint:
	@$(BIN)/ruff check .

# one test file a core, one thread each: small tensors gain nothing from two
SPREAD := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

unit:
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SPREAD)

smoke:
	@$(BIN)/leanvit run --tier smoke $(ONE)

# on the executed copies: on notebooks without outputs nbval could only pass
nbval:
	@TQDM_DISABLE=1 PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SPREAD) -p tests.conftest -W default \
	  --nbval-lax --nbval-current-env --nbval-cell-timeout 300 outputs/smoke/$(or $(NOTEBOOK),[0-9]*).ipynb

lab: setup
	@$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks

report: setup
	@$(BIN)/leanvit report

# every claim that needs a GPU is in 7_speed; NOTEBOOK=1_lbp_wht trains on one, too, and needs data and weights
gpu: setup
	@$(BIN)/leanvit run --tier gpu --notebook $(or $(NOTEBOOK),7_speed) --report
