# Each target is one call of a public tool. The first call makes .venv; later calls install nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup train lint test docs book readme clean
setup: .venv/installed
.venv/installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,fid,study]'
	@touch $@

train: setup
	@mkdir -p runs/repair
	$(BIN)/papermill nbs/05b_repair.ipynb runs/repair/out.ipynb --log-output

lint: setup
	$(BIN)/ruff format --check --quiet nbs tests setup.py
	$(BIN)/ruff check nbs tests masked_ldm
	$(BIN)/mypy

IN_VENV := PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1
# nbdev_test keeps what its pages held until it ends: several calls need less memory than one.
# What pages and tests write, gigabytes together, lies in a folder that goes with the run.
test: lint
	set -e; export $(IN_VENV) TMPDIR="$$(mktemp -d)"; trap 'rm -rf "$$TMPDIR"' EXIT; trap 'exit 130' INT TERM; \
	nbdev_test --timing --n_workers 2 --skip_folder_re '^[_.]|^(experiments|howto|training)$$'; \
	nbdev_test --timing --n_workers 2 --path nbs/training; \
	nbdev_test --timing --n_workers 2 --path nbs/howto; \
	nbdev_test --timing --n_workers 2 --path nbs/experiments --file_re '^[a-d]'; \
	nbdev_test --timing --n_workers 2 --path nbs/experiments --file_re '^[e-z]'; \
	python -m pytest -n 2 --dist worksteal

docs: setup
	@command -v quarto >/dev/null || { echo "The docs site needs Quarto (https://quarto.org/docs/get-started/); the notebooks in nbs/ read well without it."; exit 1; }
	set -e; trap '$(BIN)/python tests/readme.py' EXIT; trap 'exit 130' INT TERM; \
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=tests $(BIN)/nbdev_docs; \
	$(BIN)/python tests/book.py _docs/book.html

book: setup   # the pages at the top of the sidebar as one to print
	@mkdir -p runs
	$(BIN)/python tests/book.py runs/book.html

readme: setup
	$(BIN)/python tests/readme.py
	$(BIN)/python tests/api.py

clean:
	rm -rf runs _docs _proc build dist *.egg-info
