# make            set up .venv in this folder (pinned versions)
# make demo       real text -> shards -> a tiny BERT and GPT, plain and sifted -> a table and a picture
# make test       every law and table at small size, under 6 minutes on 2 cores
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-all check format bench wheel-check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/python tools/make_shards.py shards/demo/embedded_pd.txt.xz --out shards/built/mlm-128 \
	    --tokenizer shards/demo/tokenizer.json --objective mlm --seq-len 128 --val-fraction 0.05 --seed 0
	$(BIN)/python tools/make_shards.py shards/demo/embedded_pd.txt.xz --out shards/built/clm-128 \
	    --tokenizer shards/demo/tokenizer.json --objective clm --seq-len 128 --val-fraction 0.05 --seed 0
	$(BIN)/python tools/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

# minutes, not seconds: large fuzz, kills, the demo itself; GPU tests skip themselves where there is none
test-all: $(READY)
	SIFTLOADER_EXAMPLES=10 $(BIN)/python -m pytest -n 2 --timeout 1800

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python tools/bench_stream.py
	$(BIN)/python tools/bench_scoring.py
	$(BIN)/python tools/bench_positions.py
	$(BIN)/python tools/bench_exits.py
	$(BIN)/python tools/noise.py

# The wheel in an empty environment outside the tree: what a user gets, without our extras.
wheel-check: $(READY)
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir "$$folder" . && \
	$(PYTHON) -m venv "$$folder/env" && \
	"$$folder/env/bin/python" -m pip install --quiet --constraint constraints.txt "$$folder"/*.whl && \
	cp tools/wheel_smoke.py "$$folder" && cd "$$folder" && env/bin/python wheel_smoke.py && \
	env/bin/siftloader --help > /dev/null && echo "wheel-check: passed"

clean:
	rm -rf .venv build dist runs shards/built .pytest_cache .mypy_cache .ruff_cache .hypothesis
