# make demo       set up, then train entropy model, patches and a BLT on the bundled sample; results in demo/
# make test       set up, then run the tests that a change must pass before it is pushed: a few minutes on 2 cores
# make test-all   set up, then check the style and run all tests, the long ones too; this is what CI runs
# make gpu        on a machine with an NVIDIA GPU: tests, speeds and a training run, 9 minutes; see docs/bench.md
# All but the last make a virtual environment in .venv and install requirements.txt into it, with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
PYTEST = $(VENV)/bin/python -m pytest -n auto --dist loadscope --no-loadscope-reorder
# make gpu installs nothing: without .venv it uses the Python that has torch.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON))
.PHONY: demo test test-all gpu lint clean

$(VENV)/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

demo: $(VENV)/ready
	mkdir -p $(DEMO)
	cd $(DEMO) && ../$(VENV)/bin/python ../entropy_llm.py --overwrite
	cd $(DEMO) && ../$(VENV)/bin/python ../create_patches.py
	cd $(DEMO) && ../$(VENV)/bin/python ../llm.py --overwrite
	@echo "pictures: $(DEMO)/entropy_model_run/curves.png $(DEMO)/patch_cache/entropy.png $(DEMO)/patch_cache/patch_sizes.png $(DEMO)/patch_cache/patches.html $(DEMO)/checkpoints/curves.png"

test: $(VENV)/ready
	$(PYTEST) -m "not slow"

# With Triton, which torch's CUDA builds bring along: it interprets the kernels for GPUs on a CPU.
test-all: $(VENV)/ready lint
	$(VENV)/bin/python -m pip install --quiet "triton; sys_platform == 'linux'"
	$(PYTEST)

gpu:
	$(GPU_PYTHON) tests/gpu_card.py

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO)
