.DEFAULT_GOAL := help
.PHONY: help demo lint quick test test-extra coverage versions docs diagrams notebooks packaging

EXTRA ?= core
core := tests/test_contrastive.py tests/test_identities.py tests/test_import.py tests/test_metrics.py \
	tests/test_objectives.py tests/test_properties.py tests/test_queue.py tests/temperature tests/engine
cli := tests/test_cli.py tests/experiment/test_pretrain.py tests/experiment/test_settings.py tests/experiment/test_inspect.py
lightly := tests/frameworks/test_lightly_losses.py tests/frameworks/test_lightly_modules.py
sentences := tests/frameworks/test_sentence_transformers.py
solo := tests/frameworks/test_solo_methods.py tests/frameworks/test_solo_settings.py
open-clip := tests/frameworks/test_open_clip.py
lightly-train := tests/frameworks/test_lightly_train.py
stable-pretraining := tests/frameworks/test_stable_pretraining.py

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: ## train DySTreSS on digits: 2 minutes
	bash scripts/demo.sh

lint: ## style, spelling, floors, types
	ruff check .
	ruff format --check .
	codespell
	lint-imports --no-cache
	mypy

quick: ## the quick tests: 2 minutes on two cores
	python -m pytest -q --numprocesses 2 -m "not slow and not distributed and not host and not gpu"

test: ## everything, as CI runs it: 15 minutes
	bash scripts/test.sh

test-extra: ## the tests of one extra alone: make test-extra EXTRA=cli
	pip install $(if $(filter core,$(EXTRA)),.,'.[$(EXTRA)]') pytest hypothesis scikit-learn
	python -m pytest -q $($(EXTRA))

coverage: ## everything, and at least 85 % of the package's lines
	bash scripts/test.sh --cov dystress_plugin --cov-report term:skip-covered --cov-fail-under 85

versions: ## oldest and newest versions, each in an environment of its own: an hour
	bash scripts/test_versions.sh

docs: ## build the site, strictly
	bash scripts/docs.sh

diagrams: ## draw docs/images anew
	python scripts/site/diagrams.py

notebooks: ## make and run docs/notebooks anew
	python scripts/site/notebooks.py

packaging: ## wheel and sdist, checked, and installed into clean environments
	bash scripts/test_packaging.sh
