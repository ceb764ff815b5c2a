# make quick: the whole chain in about five minutes on two cores. Enough steps that PPO and DPO end
# above SFT, too few for good figures. What is not set here is the stage's own default.

# 100 of 440 steps: SFT stops early.
SFT_ARGS     = --steps 100
# 800 of 2,000 prompts make a weak reward model. 100 steps of 8 prompts are about one epoch, and a
# second one learns the labellers' noise (RESULTS.md).
COMPARE_ARGS = --prompts 800
REWARD_ARGS  = --steps 100
# 6 of 20 rounds: at the usual learning rate PPO hardly leaves SFT, so twice that.
PPO_ARGS     = --iterations 6 $(call LR,4e-4,2e-3)
# 25 of 125 steps of 16 prompts: about half of the comparisons.
DPO_ARGS     = --steps 25
SIMPO_ARGS   = $(DPO_ARGS)
# 400 of 1,000 held-out prompts: intervals 1.6 times as wide.
EVAL_ARGS    = --n 400
