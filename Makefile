# make app    sets up an environment and opens the app on the weights in the repository
# make test   sets up an environment and passes all tests, in a real browser too
# make publish SPACE=user/name   puts the app on a Hugging Face Space (after `.venv/bin/hf auth login`)
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: app test publish setup setup-dev browser

app: setup
	$(BIN)/python app.py $(ARGS)

# Browser tests run by themselves: they have a server and a browser to share the cores with
test: setup-dev browser
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --ignore tests/e2e --numprocesses logical --maxprocesses 4 --dist loadfile
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/e2e

# `hf upload` and not git: the Hub refuses plain pushes of large files
publish: setup
	@test -n "$(SPACE)" || { echo "give the Space: make publish SPACE=user/name" >&2; exit 2; }
	$(BIN)/hf repos create $(SPACE) --type space --space-sdk gradio --exist-ok
	$(BIN)/hf upload $(SPACE) . . --type space --commit-message "ViLex" \
		--include "app.py" --include "app/*" --include "vilex/*" --include "assets/*" --include "*.md" \
		--include "LICENSE*" --include "requirements.txt" --exclude "*__pycache__*" --exclude "$(VENV)/*"

setup: $(VENV)/installed

setup-dev: $(VENV)/installed-dev

$(VENV)/installed: requirements.txt pyproject.toml
	@echo "Installing into $(VENV): one to three minutes ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# An installed Chromium is used as it is; else Playwright's own, else the system's package.
browser: setup-dev
	command -v chromium chromium-browser google-chrome >/dev/null 2>&1 \
		|| $(BIN)/python -m playwright install --with-deps chromium \
		|| (apt-get update -qq && apt-get install -y -qq chromium)
