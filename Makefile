# make demo   set up, then train entropy model, patches and a BLT on the bundled sample; results in demo/
# make test   set up, then run the tests
# Both make a virtual environment in .venv and install requirements.txt into it, with the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
# Without a GPU the scripts run their cpu preset; with one, pass PRESET=colab_t4, rtx4090 or h200 (the default there).
PRESET ?= $(shell nvidia-smi > /dev/null 2>&1 && echo rtx4090 || echo cpu)
.PHONY: demo test clean

$(VENV)/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

demo: $(VENV)/ready
	mkdir -p $(DEMO)
	cd $(DEMO) && ../$(VENV)/bin/python ../entropy_llm.py --preset $(PRESET)
	cd $(DEMO) && ../$(VENV)/bin/python ../create_patches.py --preset $(PRESET)
	cd $(DEMO) && ../$(VENV)/bin/python ../llm.py --preset $(PRESET)
	@echo "pictures: $(DEMO)/entropy_model_run/curves.png $(DEMO)/patch_cache/entropy.png $(DEMO)/patch_cache/patch_sizes.png $(DEMO)/patch_cache/patches.html $(DEMO)/checkpoints/curves.png"

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest

clean:
	rm -rf $(VENV) $(DEMO)
