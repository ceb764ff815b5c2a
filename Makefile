# make all: base → SFT → comparisons → reward model → PPO; SFT → DPO, SimPO; then figures and a report. make help lists the targets.
OUT       ?= out
SEED      ?= 0
SEEDS     ?= 3
DEVICE    ?= auto
MODEL     ?= data/base
DATA      ?=
PREFS     ?=
FULL      ?=
OVERWRITE ?=
PY        ?= .venv/bin/python
PYTHON    ?= python3

COMMON = --seed $(SEED) --device $(DEVICE) $(if $(OVERWRITE),--overwrite)
WORLD  = $(OUT)/world

.PHONY: all quick real base world sft comparisons reward ppo dpo simpo eval report chat smollm2 controls results test parity lint golden mutants clean help
.DEFAULT_GOAL := help

all: eval report ## the whole pipeline on the embedded world

quick: ## the same in about a minute, tiny settings, into OUT/quick
	$(MAKE) all OUT=$(OUT)/quick QUICK=1

ifdef QUICK
SFT_ARGS     = --steps 100 --batch 48
COMPARE_ARGS = --prompts 400 --k 4
REWARD_ARGS  = --steps 45
PPO_ARGS     = --iterations 6 --batch 64
DPO_ARGS     = --steps 30 --batch 32
SIMPO_ARGS   = --steps 30 --batch 32
EVAL_ARGS    = --n 300
endif

# ---- what every target stands on: an interpreter with the packages. PY=python uses one that is there
ifeq ($(PY),.venv/bin/python)
READY = .venv/ready
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@
endif

world: $(READY)
	@test -f $(WORLD)/heldout.jsonl || $(PY) -m data.world --out $(WORLD) --seed $(SEED)

sft: world ## stage 1
	$(PY) sft.py --model $(MODEL) --data $(WORLD)/sft.jsonl --out $(OUT)/sft $(COMMON) $(SFT_ARGS)

comparisons: sft ## stage 2a
	$(PY) compare.py --model $(OUT)/sft --data $(WORLD)/prompts.jsonl --out $(OUT)/comparisons.jsonl $(COMMON) $(COMPARE_ARGS)

reward: comparisons ## stage 2b
	$(PY) reward.py --model $(OUT)/sft --data $(OUT)/comparisons.jsonl --reference $(WORLD)/sft.jsonl --out $(OUT)/reward $(COMMON) $(REWARD_ARGS)

ppo: reward ## stage 3
	$(PY) ppo.py --model $(OUT)/sft --reward $(OUT)/reward --data $(WORLD)/prompts.jsonl --out $(OUT)/ppo $(COMMON) $(PPO_ARGS)

dpo: comparisons ## the short cut
	$(PY) dpo.py --model $(OUT)/sft --data $(OUT)/comparisons.jsonl --out $(OUT)/dpo $(COMMON) $(DPO_ARGS)

simpo: comparisons
	$(PY) dpo.py --loss simpo --beta 2.5 --gamma 1.0 --model $(OUT)/sft --data $(OUT)/comparisons.jsonl --out $(OUT)/simpo $(COMMON) $(SIMPO_ARGS)

eval: ppo dpo simpo
	$(PY) evals.py --out $(OUT) --base $(MODEL) --seed $(SEED) --device $(DEVICE) $(EVAL_ARGS)

base: $(READY) ## train the base model again
	$(PY) pretrain.py --out data/base --overwrite --device $(DEVICE)
