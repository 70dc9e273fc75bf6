# make course   creates .venv, installs, executes every notebook into build/notebooks/
# make test     all tests, two files at a time; make lab      opens JupyterLab
# make outputs  executes the notebooks in place, as committed; ONLY="03 06" picks some
# make study    the experiments too long for a notebook: hours; goes on where it was stopped
# make explorer build/explorer.html: where a model looks, in a browser, without Python
# make colab    REPO=owner/name: what Colab opens and clones, in every notebook
# make full-size notebooks on coco-val with towers of full size and random weights: a quarter of an hour and more
# make readme   README's results       make bench    benchmarks      make clean   removes what was made
PYTHON ?= python3
BIN := .venv/bin
ONLY ?=
RUN := $(BIN)/python scripts/run_notebooks.py $(if $(ONLY),--only $(ONLY))

# PyTorch's large tensors stay with the process; handed back to the kernel, they would come anew in every step.
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184
export MALLOC_TOP_PAD_ ?= 268435456

.PHONY: course test full-size lab outputs study explorer readme colab bench clean

course: .venv/installed
	@mkdir -p build && ln -sfn ../assets build/assets
	@$(RUN) --out build/notebooks

test: .venv/installed-dev
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

full-size: .venv/installed-dev
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests/full_size.py

lab: .venv/installed
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

outputs: .venv/installed
	@$(RUN) --in-place

study: .venv/installed
	@$(BIN)/python -m scripts.run_study

explorer: .venv/installed
	@$(BIN)/python -m scripts.export_explorer

readme: .venv/installed
	@$(BIN)/python -m scripts.readme_table

colab:
	@$(PYTHON) scripts/stamp_colab.py "$(REPO)"

bench: .venv/installed
	@for script in benchmarks/*.py; do echo "== $$script"; PYTHONPATH=. $(BIN)/python $$script || exit 1; done

clean:  # downloaded COCO, committed results and .venv stay
	rm -rf build data/cache data/minicoco data/minicoco-smoke data/.minicoco*

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed (PyTorch asks \
	for it); this is " + sys.version.split()[0] + ". Say which to use: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# The tested versions, where all of them exist (see constraints.txt); otherwise nothing, and the ranges decide.
PINS = $$($(BIN)/python -c 'import sys, platform as p; sys.platform == "linux" and p.machine() == "x86_64" \
	and (3, 11) <= sys.version_info < (3, 14) and print("-c constraints.txt")')

.venv/installed: requirements.txt constraints.txt | .venv/bin/python
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt $(PINS)
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --disable-pip-version-check -r requirements-dev.txt $(PINS)
	@touch $@
