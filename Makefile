# make demo: see it work.  make test: check that it does.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test install clean

demo: $(VENV)/installed
	$(BIN)/quantkit gptq demo --bits 4 --group 128 --out demo-gptq --overwrite
	$(BIN)/quantkit verify demo-gptq
	@for model in demo demo-gptq; do \
	  echo; echo "== $$model"; \
	  $(BIN)/quantkit generate $$model "The history of the city" --raw -n 40 -q; \
	  $(BIN)/quantkit generate $$model "日本の首都はどこですか。" -n 40 -q; \
	done

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-gptq demo-gptq.partial
