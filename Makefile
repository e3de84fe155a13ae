# Everything here works on a machine that has only Python >= 3.10, pip and make.
#
#   make demo            what merging keeps and what it saves, on clips (ARGS="--video my.mp4" for one of yours)
#   make test            the tests (ARGS="tests/laws -k zero" to say less)
#   make quality         accuracy of merged models at equal GFLOPs, half an hour (ARGS="--help" to say what, or less)
#   make lint            ruff and mypy
#
# A torch >= 2.11 that PYTHON can already import is kept. Otherwise TORCH is installed before anything else can ask for
# torch and be given a build with several GB of CUDA libraries. It is what `pip install` is told, so it takes options too.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=

VENV := .venv
RUN  := $(VENV)/bin/python

# A trained model on a test clip, at about half its GFLOPs.
TRAINED := --model benchmarks/quality/checkpoint --video benchmarks/quality/digit-5-to-NE.mkv --schedule 0.22

# One process per core and one thread per process: the models of the tests are small. Tests that follow one another share
# what they captured, so each process begins with a stretch of them.
TEST_ENV := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1

# Prints the folder from which PYTHON imports a torch that is new enough, or nothing.
define FIND_TORCH
import importlib.metadata as metadata
try: torch = metadata.distribution("torch")
except metadata.PackageNotFoundError: raise SystemExit
if tuple(map(int, torch.version.split(".")[:2])) >= (2, 11): print(torch.locate_file(""))
endef
export FIND_TORCH

.PHONY: demo test quality lint clean

demo: $(VENV)/.demo
ifdef ARGS
	$(VENV)/bin/tldr run $(ARGS)
else
	@echo "1 of 2: is the answer kept? A small trained model on a clip that it has never seen: a 5 moves to the north-east."
	@echo "It is too small for its latency and memory to say much."
	$(VENV)/bin/tldr run $(TRAINED)
	@echo "2 of 2: what is saved at full size? Weights are random: tokens, GFLOPs and latency count, the answer does not."
	$(VENV)/bin/tldr run --out tldr-full-size.png
endif

test: $(VENV)/.test
	$(TEST_ENV) $(RUN) -m pytest -n auto --dist worksteal $(or $(ARGS),tests)

quality: $(VENV)/.quality
	$(RUN) -m benchmarks.quality.compare $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(VENV)/.torch: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is older than Python 3.10; name another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c "$$FIND_TORCH" > $$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_python.pth
	$(RUN) -c "import torch" 2> /dev/null || $(RUN) -m pip install $(TORCH)
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.quality $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch
	$(RUN) -m pip install --quiet --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis tldr.png tldr-full-size.png
