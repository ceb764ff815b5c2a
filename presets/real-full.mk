# make real FULL=1: SmolLM2-135M on a GPU, with batches and lengths usual for models of its size.
# The learning rates are the short form's, and adapters get five times the weights' everywhere.

# A state of 135 million trained parameters is 1.6 GB, PPO's twice that: few are saved.
# 9,600 conversations of up to 1,024 tokens.
SFT_ARGS     = --steps 300 --batch 32 $(call LR,5e-5,2.5e-4) --length 1024 --save-every 150
# Without PREFS= the model answers 1,000 prompts, 4 times each: 6 pairs a prompt.
COMPARE_ARGS = --prompts 1000 --k 4
REWARD_ARGS  = --steps 200 --batch 16 $(call LR,2e-5,1e-4) --length 1024 --save-every 100
# The embedded model's batch, twice its rounds at a fortieth of its rate; answers twice as long.
PPO_ARGS     = --iterations 40 --batch 128 --minibatch 32 $(call LR,5e-6,2.5e-5) \
               --max-new-tokens 128 --save-every 20
DPO_ARGS     = --steps 150 --batch 32 $(call LR,1e-5,5e-5) --length 1024 --save-every 150
# Judged with answers as long as those that PPO was trained on.
EVAL_ARGS    = --n 1000 --max-new-tokens 128
