# The commands of the project; `make` alone lists them. What the book makes lies in .venv and build.
PYTHON ?= python3
RUN = .venv/bin/python book/build.py
export TORCH_INDEX
.DEFAULT_GOAL = help
.PHONY: help env book smoke test nb results poster weights student serve sync status hooks clean

help:  ## this list
	@awk -F ':[^#]*## *' '/^[a-z]+:.*##/ {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## install everything into .venv, once (TORCH_INDEX=URL takes torch from there)
	@command -v "$(PYTHON)" >/dev/null || { echo "make env: no $(PYTHON): install Python 3.11 or newer"; exit 1; }
	@"$(PYTHON)" book/env.py

book: env  ## run what is out of date and build the site in build/site
	@$(RUN) book

test: env  ## check sync, run all notebooks small, pytest, build that run strictly
	@$(RUN) sync --check
	@$(RUN) smoke
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal
	@$(RUN) site smoke

smoke: env  ## run all notebooks at a small size into build/smoke (FORCE=1: all of them again)
	@$(RUN) smoke $(if $(FORCE),--force)

nb: env  ## run one notebook again at digits size: make nb NB=02_ddpm
	@$(RUN) nb "$(NB)"

status: env  ## which runs are fresh, and why the others are not
	@$(RUN) status

results: env  ## make the records that are missing or out of date in diffcourse/results (ONLY=03_ddim: those of one experiment)
	@.venv/bin/python -m diffcourse.experiments $(ONLY)

poster: env  ## draw the summary of the records: build/poster.svg and build/poster.png
	@.venv/bin/python -m diffcourse.leaderboard build/poster

weights: env  ## publish the trained runs of build/digits as the package's weights (NAME=faces32/flow: that of a recipe)
	@$(RUN) weights "$(NAME)"

student: env  ## the chapters for a class: with stubs, with solutions, for otter-grader, in build/student
	@.venv/bin/python book/student.py

serve:  ## show build/site at http://localhost:8000 (PORT=)
	@test -f build/site/index.html || { echo "make serve: there is no site yet: make book"; exit 1; }
	@echo "http://localhost:$(or $(PORT),8000)"
	@"$(PYTHON)" -m http.server $(or $(PORT),8000) --bind 127.0.0.1 --directory build/site

sync: env  ## export the modules and clean the notebooks
	@$(RUN) sync

hooks: env  ## once in a clone: merge notebooks cell by cell (git config of this clone)
	@git config merge.nbdev-merge.name "merge of notebooks, cell by cell"
	@git config merge.nbdev-merge.driver 'if [ -x .venv/bin/nbdev_merge ]; then .venv/bin/nbdev_merge %O %A %B %P; else git merge-file %A %O %B; fi'
	@echo "hooks: git merges notebooks with .venv/bin/nbdev_merge"

clean:  ## remove what was made: build, with its trained runs (.venv stays)
	rm -rf build dist *.egg-info
