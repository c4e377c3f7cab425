# make            set up .venv in this folder (pinned versions)
# make demo       real text -> shards -> a tiny BERT and GPT, plain and sifted -> a table and a picture
# make probe      would sifting pay for the models of the demo, and at which layer? after `make demo`
# make compare    which half trains better? paired seeds, equal samples and equal time: a table and a page
# make test       every law and table at small size, under 6 minutes on 2 cores
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Text of which tools/compare.py makes its shards, and the tools that run without an installation.
TEXT ?= shards/demo/embedded_pd.txt.xz
RUN ?= $(BIN)/python
GPT := --tokenizer shards/demo/bpe-2048.json --objective clm --seq-len 128 --val-fraction 0.05 --seed 0
BERT := --tokenizer shards/demo/tokenizer.json --objective mlm --seq-len 128 --val-fraction 0.05 --seed 0
TEXTS := gpt gpt-repeated-0.5 gpt-repeated-0.25 gpt-repeated-0.1
SHOW := --tokenizer shards/demo/bpe-2048.json

.PHONY: setup demo probe test test-all check format bench wheel-check clean compare compare-full gpu-arms gpu-tests gpu-bench gpu-compare

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

# Under two minutes: which layers would pay from where the plain models of the demo ended.
probe: $(READY)
	test -e runs/demo/gpt-none.pt || { echo "first: make demo"; exit 1; }
	$(RUN) -m siftloader.cli probe --model tools/demo.py:bert --shards shards/built/mlm-128 \
	    --batch-size 16 --out runs/demo/probe-bert.png
	$(RUN) -m siftloader.cli probe --model tools/demo.py:gpt --shards shards/built/clm-128 \
	    --batch-size 8 --out runs/demo/probe-gpt.png

# Twenty minutes on two idle cores: prose as it is, and the same with half of it repeated. Stopped, it goes on.
compare: $(READY) shards/built/gpt/manifest.jsonl shards/built/gpt-repeated-0.5/manifest.jsonl
	$(RUN) tools/compare.py --shards shards/built/gpt $(SHOW) --name "GPT, prose" \
	    --out runs/compare/prose --seeds 3 --minutes 11
	$(RUN) tools/compare.py --shards shards/built/gpt-repeated-0.5 $(SHOW) --name "GPT, half of it repeated" \
	    --out runs/compare/repeated --seeds 3 --minutes 11
	$(RUN) -m siftloader.cli report runs/compare

# Days: every arm until its interval is narrow, on prose, on prose that repeats itself, causal and masked.
compare-full: $(READY) $(foreach s,bert $(TEXTS),shards/built/$(s)/manifest.jsonl)
	$(foreach s,$(TEXTS),$(RUN) -m siftloader.cli bigrams shards/built/$(s) &&) true
	$(foreach s,$(TEXTS), \
	    $(RUN) tools/compare.py --shards shards/built/$(s) $(SHOW) --suite full --out runs/full/$(s) --seeds 12 &&) true
	$(RUN) tools/compare.py --subject bert --shards shards/built/bert --suite masked --out runs/full/bert --seeds 12
	$(RUN) -m siftloader.cli report runs/full

# For a machine with a GPU, where nothing is installed: make gpu-arms RUN=python3 TEXT=corpus.txt.xz GPU_OUT=somewhere
# What fails keeps none of the others from running. The three can be called alone, of ten minutes each.
MINUTES ?= 4
BENCH_MINUTES ?= 5
GPU_OUT ?= runs/gpu
gpu-arms:
	failed=0; for part in gpu-tests gpu-bench gpu-compare; do $(MAKE) $$part || failed=1; done; exit $$failed

# The tests that need a GPU, and the head alone.
gpu-tests:
	mkdir -p $(GPU_OUT)
	failed=0; \
	$(RUN) -m pytest -q -m gpu $$(grep -ls 'mark\.gpu' tests/test_*.py) > $(GPU_OUT)/tests.txt 2>&1 || failed=1; \
	tail -n 40 $(GPU_OUT)/tests.txt; \
	$(RUN) tools/bench_head.py > $(GPU_OUT)/bench_head.txt 2>&1 || failed=1; cat $(GPU_OUT)/bench_head.txt; \
	$(RUN) tools/bench_head.py --tune > $(GPU_OUT)/tune.txt 2>&1 || failed=1; cat $(GPU_OUT)/tune.txt; \
	exit $$failed

# What scoring costs, of three shapes.
gpu-bench:
	mkdir -p $(GPU_OUT)
	$(RUN) tools/bench_scoring.py --minutes $(BENCH_MINUTES) --out $(GPU_OUT)/scoring

# As many runs of a minute as fit into MINUTES each, added to those in tools/results; first what some positions cost.
gpu-compare:
	$(RUN) tools/make_shards.py $(TEXT) --out shards/built/gpu-bert $(BERT)
	$(RUN) tools/make_shards.py $(TEXT) --out shards/built/gpu-gpt $(GPT)
	$(RUN) tools/bench_positions.py --shards shards/built/gpu-gpt --preset small --batch-size 64 --out $(GPU_OUT)/positions
	mkdir -p $(GPU_OUT)/bert $(GPU_OUT)/gpt
	@# Where a plan went on here, older results must not take its place.
	for s in bert gpt; do test -e $(GPU_OUT)/$$s/plan.json || ! test -d tools/results/gpu-$$s || \
	    cp tools/results/gpu-$$s/* $(GPU_OUT)/$$s || exit 1; done
	$(RUN) tools/compare.py --subject bert --preset gpu --suite gpu --shards shards/built/gpu-bert \
	    --out $(GPU_OUT)/bert --name "BERT, one GPU" --seconds 60 --seeds 12 --minutes $(MINUTES)
	$(RUN) tools/compare.py --subject gpt --preset gpu --suite gpu --shards shards/built/gpu-gpt \
	    --out $(GPU_OUT)/gpt --name "GPT, one GPU" --seconds 60 --seeds 12 --minutes $(MINUTES)

# The manifest comes last: where it is, the shards are whole.
shards/built/gpt/manifest.jsonl:
	$(RUN) tools/make_shards.py $(TEXT) --out $(@D) $(GPT)

shards/built/bert/manifest.jsonl:
	$(RUN) tools/make_shards.py $(TEXT) --out $(@D) $(BERT)

shards/built/gpt-repeated-%/manifest.jsonl: shards/built/repeated-%.txt
	$(RUN) tools/make_shards.py $(TEXT) repeated=$< --out $(@D) $(GPT)

.PRECIOUS: shards/built/repeated-%.txt
shards/built/repeated-%.txt:
	mkdir -p shards/built
	$(RUN) tools/repeat_documents.py $(TEXT) --share $* --out $@

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

# minutes, not seconds: large fuzz, kills, the demo itself; GPU tests skip themselves where there is none
test-all: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,emulators]'
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
	$(BIN)/python tools/shuffle_quality.py
	$(BIN)/python tools/simulate_scale.py
	$(BIN)/python tools/fuzz_shards.py
	$(BIN)/python tools/bench_scoring.py --minutes 4
	$(BIN)/python tools/bench_head.py
	$(BIN)/python tools/bench_positions.py
	$(BIN)/python tools/bench_exits.py
	$(BIN)/python tools/bench_ranks.py
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
