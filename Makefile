# Each target is one call of a public tool. The first call makes .venv; later calls install nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup train test docs readme clean
setup: .venv/installed
.venv/installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,fid,study]'
	@touch $@

train: setup
	@mkdir -p runs/tiny
	$(BIN)/papermill nbs/05_train.ipynb runs/tiny/out.ipynb -p T 100 --log-output

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_test --n_workers 1
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

docs: setup
	@command -v quarto >/dev/null || { echo "The docs site needs Quarto (https://quarto.org/docs/get-started/); the notebooks in nbs/ read well without it."; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs
	$(BIN)/python tests/readme.py   # nbdev_docs writes README.md in Quarto's way

readme: setup
	$(BIN)/python tests/readme.py
	$(BIN)/python tests/api.py

clean:
	rm -rf runs _docs _proc build dist *.egg-info
