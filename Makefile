# The front door. Every target sets up what it needs; `make help` lists them.
PYTHON     ?= python3
EXPERIMENT ?= stdlib
OVERRIDES  ?=
# Read by Python, not by the shell, to which brackets and parentheses of Hydra mean something else.
export OVERRIDES
FORCE      ?= false
DRY_RUN    ?= false
HOST       ?= 127.0.0.1
PORT       ?= 3000
UI_PORT    ?= 3001
MLFLOW_PORT ?= 5000
DEVICE     ?= cpu
EXTRAS     ?=
UPGRADE    ?=
# Not from the environment, where the name is common.
JOB        := llm_pipeline
NANOGPT    ?=

BIN       := .venv/bin
INSTALLED := .venv/.installed
export DAGSTER_HOME := $(CURDIR)/var/dagster
export BENTOML_DO_NOT_TRACK := True
# The installation compiles no bytecode; the first import of a module does. Without that bytecode each step of a run
# would import torch and transformers for 15 s instead of 4.
export PYTHONDONTWRITEBYTECODE :=
# The tracking UI alone, without its pool of evaluation workers.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
# As `model/__init__.py`, for programs that load torch before it.
export GOMP_SPINCOUNT ?= 20000
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export MLFLOW_UI_URL ?= http://127.0.0.1:$(MLFLOW_PORT)
export LLM_ASSETS_DAGSTER_URL ?= http://127.0.0.1:$(UI_PORT)
# Runs a command with dots where it prints nothing.
DOTS := @$(PYTHON) -m model.progress
# Packages whose files have other hashes than those of constraints.txt are refused.
INSTALL := PYTHONPATH=. $(BIN)/python -m llm_assets.instance.install
# Options of a run, and what follows it unless nothing is computed.
HOW = $(if $(filter true,$(FORCE)),--force) $(if $(filter true,$(DRY_RUN)),--dry-run)
WHICH = $(if $(filter-out llm_pipeline,$(JOB)),--job $(JOB))
AFTER = $(if $(filter true,$(DRY_RUN)),,$(BIN)/python -m llm_assets.latest $(EXPERIMENT) $(1))
# Tests of one file stay in one process, as they share fixtures.
SHARED = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
# Compose v2 is a plugin of docker's command line; the first version was a separate command.
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

.DEFAULT_GOAL := help
.PHONY: help setup pipeline sweep ui serve image stack-image up down logs test test-fast test-slow test-nightly harness cluster triton evaluation releases coverage aider vllm export-vllm lint docs screenshots lock bench bench-scale bench-gpu clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) $(DAGSTER_HOME)/dagster.yaml  ## Make the virtual environment and install the pinned packages

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else f"error: {sys.executable} is Python {sys.version.split()[0]}: 3.11 to 3.13 is needed; name one with PYTHON=/path/to/python3.12")'
	$(DOTS) 'making .venv' $(PYTHON) -m venv .venv
	@# torch first and pinned, so that nothing else chooses another build of it: its builds come from several indexes, so it
	@# has no hash here. What it needs is in the lock, with hashes. Bytecode is left to the first import: compiling twenty
	@# thousand files here takes a minute or more, and most are never imported.
	$(DOTS) 'installing torch' $(BIN)/pip install $$([ -t 1 ] || echo --quiet) --disable-pip-version-check --no-compile --no-deps torch==2.13.0
	@sed -n '/^uv==/,/[^\\]$$/p' constraints.txt >.venv/uv.txt
	$(DOTS) 'installing uv' $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes --requirement .venv/uv.txt
	@$(INSTALL) dev
	@# Generation in C++; without a compiler, one line names the consequence.
	@$(BIN)/python -m model.native.build
	@touch $@

$(DAGSTER_HOME)/dagster.yaml: dagster.yaml
	@mkdir -p $(@D) && cp $< $@

pipeline: setup  ## Materialize all seven assets of EXPERIMENT (default stdlib), with Hydra OVERRIDES if given; JOB=training_pipeline ends with the checkpoint, FORCE=true computes unchanged ones too, DRY_RUN=true checks the settings and computes nothing
ifeq ($(strip $(OVERRIDES)),)
	@$(BIN)/python -m llm_assets.instance.dagster_home
	@$(BIN)/python -m llm_assets.terminal.execute $(EXPERIMENT) $(WHICH) $(HOW)
else
	@$(BIN)/python -m llm_assets.sweep $(WHICH) $(HOW) experiment=$(EXPERIMENT) --overrides "$$OVERRIDES"
endif
	@$(if $(WHICH),,$(call AFTER))

sweep: setup  ## One run for each point of a Hydra sweep: make sweep EXPERIMENT=smoke OVERRIDES='training.seed=range(0,3)'
	@$(BIN)/python -m llm_assets.sweep $(WHICH) $(HOW) --multirun experiment=$(EXPERIMENT) --overrides "$$OVERRIDES"

ui: setup  ## Start Dagster (UI_PORT=3001, webserver and daemon) and the MLflow UI (MLFLOW_PORT=5000)
	@exec $(BIN)/python -m llm_assets.ui --port='$(UI_PORT)' --mlflow-port='$(MLFLOW_PORT)'

serve: export REX_VLLM_PYTHON ?= $(wildcard $(CURDIR)/.venv-vllm/bin/python)
serve: setup  ## Serve the packaged Bento of EXPERIMENT, or BENTO=NAME:VERSION, on HOST (127.0.0.1) and PORT (3000)
	@tag=$(or $(BENTO),$$($(BIN)/python -m llm_assets.latest $(EXPERIMENT) --bento)) && exec $(BIN)/bentoml serve "$$tag" --host $(HOST) --port $(PORT)

stack-image: setup  ## Build the image of the composed stack for DEVICE=cpu or gpu, with EXTRAS='s3 kubernetes ray' if given; the last line is its tag
	@$(BIN)/python -m llm_assets.containers.stack --device $(DEVICE) $(foreach extra,$(EXTRAS),--extra $(extra))

up: .env  ## Start the composed stack (Postgres, MLflow, Dagster, the service) and wait until it is healthy
	@image=$$(sed -n 's/^REX_PIPELINE_IMAGE=//p' .env); \
	docker image inspect "$${image:-rex-pipeline:cpu}" >/dev/null 2>&1 || $(MAKE) stack-image
	$(COMPOSE) up --detach
	@for second in $$(seq 180); do \
		states=$$(docker inspect --format '{{with .State.Health}}{{.Status}}{{end}} {{.Name}}' $$($(COMPOSE) ps -q)); \
		echo "$$states" | grep -q -e ^starting -e ^unhealthy || { echo "the stack is healthy"; exit 0; }; sleep 1; \
	done; echo "error: not healthy after 180 s (make logs):" >&2; echo "$$states" | grep -e ^starting -e ^unhealthy >&2; exit 1

down:  ## Stop the composed stack; its data stays in the volumes
	$(COMPOSE) down

logs:  ## Follow the logs of the composed stack
	$(COMPOSE) logs --follow --tail 100

.env:
	cp .env.example .env

image: setup  ## Build the container image of EXPERIMENT for DEVICE=cpu or gpu; the last line is its tag
	@$(if $(filter cpu gpu,$(DEVICE)),,echo "error: DEVICE=$(DEVICE): expected cpu or gpu" >&2; exit 2)
ifeq ($(strip $(OVERRIDES)),)
	@$(BIN)/python -m llm_assets.instance.dagster_home
	@$(BIN)/python -m llm_assets.terminal.execute $(EXPERIMENT) --module llm_assets.images --job container_image_$(DEVICE)_job $(HOW)
else
	@$(BIN)/python -m llm_assets.sweep $(HOW) --module llm_assets.images --job container_image_$(DEVICE)_job experiment=$(EXPERIMENT) --overrides "$$OVERRIDES"
endif
	@$(call AFTER,--image $(DEVICE))

evaluation: harness  ## Score the newest model of EXPERIMENT on tasks of lm-eval: OVERRIDES='evaluation.tasks=[piqa,arc_easy]'
	@$(BIN)/python -m llm_assets.sweep $(HOW) --module llm_assets.evaluation --job evaluation_report_job experiment=$(EXPERIMENT) --overrides "$$OVERRIDES"

# Two processes keep two cores busy as long as they compute. Tests of servers, Ray and the UI also wait, a tenth of their
# time or more.
test-fast test-nightly coverage releases: WORKERS ?= 2
test test-slow: WORKERS ?= 3

test: setup  ## Run all tests but the nightly ones on WORKERS=3 processes
	$(BIN)/pytest $(SHARED)

test-fast: setup  ## Run the tests that take less than a second each and start no process: most of them
	$(BIN)/pytest $(SHARED) -m 'not medium and not slow and not processes'

test-slow: setup  ## Run the other tests: slow ones, and those that start processes, containers or a browser
	$(BIN)/pytest $(SHARED) -m 'slow or processes' --durations 40 --durations-min 5

test-nightly: harness cluster  ## Run the nightly tests: two hosts (as root), every release of transformers, more deaths of runs
	$(BIN)/pytest $(SHARED) --nightly -m nightly --durations 10

harness: setup  ## Install lm-eval, whose log-likelihoods a test compares with ours
	$(INSTALL) harness

cluster: setup  ## Install Ray, S3's file system, an S3 server and Helm's renderer, which tests of several machines need
	$(INSTALL) cluster

triton: setup  ## Install Triton, whose interpreter and compiler test the GPU kernels without a GPU
	$(INSTALL) triton

releases: harness  ## Run a checkpoint's own code under every supported minor release of transformers, and under the newest
	$(BIN)/pytest --nightly --numprocesses $(WORKERS) tests/model/test_releases.py

coverage: setup  ## Run the fast and the medium tests with coverage; fails below the floor in pyproject.toml
	$(BIN)/pytest $(SHARED) -m 'not slow and not processes' --cov --cov-report=term:skip-covered

vllm: setup .venv-vllm/.installed  ## Make the environment of vLLM for DEVICE=cpu or gpu (2 GB; for a GPU, several): .venv-vllm/bin/python

export-vllm: vllm  ## Compare the export of EXPERIMENT in vLLM with its checkpoint
	$(BIN)/python -m model.export.vllm --python .venv-vllm/bin/python $(foreach asset,exported_model trained_checkpoint tokenized_dataset,"$$($(BIN)/python -m llm_assets.latest $(EXPERIMENT) --asset $(asset))")

aider: setup .venv-aider/.installed  ## Make the environment of aider (PYTHON 3.11 or 3.12), whose program a test then runs: .venv-aider/bin/python

.venv-aider/.installed: | setup
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info < (3, 13) else "error: aider needs Python 3.11 or 3.12: name one with PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv .venv-aider
	$(BIN)/uv pip install --quiet --python .venv-aider/bin/python $(if $(PIP_EXTRA_INDEX_URL),--extra-index-url '$(PIP_EXTRA_INDEX_URL)') aider-chat==0.86.2
	@touch $@

# vLLM pins its own torch and transformers. The lock is that of an image with vLLM, too.
.venv-vllm/.installed: bento/vllm-$(DEVICE).txt | setup
	$(PYTHON) -m venv .venv-vllm
	@# The CPU build of torch has its own index; a GPU takes that of the Python index.
	$(BIN)/uv pip sync --quiet --python .venv-vllm/bin/python $(if $(filter cpu,$(DEVICE)),--index-strategy unsafe-best-match \
		$(if $(PIP_EXTRA_INDEX_URL),--extra-index-url '$(PIP_EXTRA_INDEX_URL)') \
		$(if $(PIP_FIND_LINKS),--find-links '$(PIP_FIND_LINKS)') \
		$(if $(PIP_EXTRA_INDEX_URL)$(PIP_FIND_LINKS),,--torch-backend cpu)) $<
	@touch $@

docs: setup  ## Write the tables of options into the documentation
	PYTHONPATH=. $(BIN)/python docs/generate.py

screenshots: setup  ## Take the documentation's pictures of Dagster's pages with EXPERIMENT (after `make pipeline`)
	PYTHONPATH=. $(BIN)/python docs/screenshots.py $(EXPERIMENT)

lock: setup  ## Write constraints.txt, with the hashes of all files, from pyproject.toml; UPGRADE='NAME ...' takes newer releases of these
	$(INSTALL) --lock $(UPGRADE)

lint: setup  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry .

bench: setup  ## Measure tokenizing, orchestration, decoding, training, the engine, serving and roll-over (needs `make pipeline` first)
	$(BIN)/python -m bench.tokenizing
	$(BIN)/python -m bench.orchestration
	$(BIN)/python -m bench.decode "$$($(BIN)/python -m llm_assets.latest $(EXPERIMENT) --asset trained_checkpoint)" --tokens 1024
	$(BIN)/python -m bench.training speed
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.serving
	$(BIN)/python -m bench.rollover

bench-scale: setup  ## Measure Ray, several training processes, copies of checkpoints at URL=s3://BUCKET/PREFIX, and replicas
	$(BIN)/python -m bench.scale
	$(BIN)/python -m bench.training processes $(if $(URL),--url $(URL))
	$(BIN)/python -m bench.replicas

# Correctness before speed; a part that fails does not end the others.
bench-gpu: setup triton  ## On a GPU: test the model, then measure gradients, training and the engine; NANOGPT=DIR adds that peer
	-$(BIN)/pytest tests/model
	-$(BIN)/python -m bench.training gpu
	-$(BIN)/python -m bench.engine.graphs
ifneq ($(strip $(NANOGPT)),)
	-$(BIN)/python -m bench.training speed --gpu --nanogpt '$(NANOGPT)'
	-$(BIN)/python -m bench.training quality --gpu --nanogpt '$(NANOGPT)'
endif

clean:  ## Remove the virtual environment and everything that runs wrote
	rm -rf .venv .venv-aider .venv-vllm var
