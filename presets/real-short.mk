# make real: SmolLM2-135M on two cores in about eleven minutes, with 7.3 GB (RESULTS.md). The model
# is sixty times the embedded one's size, so its learning rates are a tenth of those and less; and
# batches are of 8 rows, or of 16 where nothing is trained, to fit a laptop's memory.

# 512 tokens hold nearly every short instruction. The rate for adapters is measured, not five times.
SFT_ARGS     = --steps 40 --batch 8 $(call LR,5e-5,1e-3) --length 512
# Without PREFS= the model answers 100 prompts, 4 times each: InstructGPT's fewest.
COMPARE_ARGS = --prompts 100 --k 4
REWARD_ARGS  = --steps 25 --batch 8 $(call LR,2e-5,1e-4) --length 512
# One epoch over each round's answers: sampling is cheap beside an update here.
PPO_ARGS     = --iterations 4 --batch 16 --minibatch 8 --epochs 1 $(call LR,5e-6,2.5e-5)
DPO_ARGS     = --steps 25 --batch 8 $(call LR,1e-5,5e-5) --length 512
EVAL_ARGS    = --n 100 --batch 16
