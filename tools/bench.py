"""How fast: python -m tools.bench sampling | make …

sampling: tokens a second of model.generate and of transformers' generate, alternating in one process, as a ratio: 128 ragged prompts,
answers of up to 40 tokens that end where they end. Needs transformers (`make bench` has it).
make …: minutes and the largest process's peak memory of a make command, `python -m tools.bench make all OUT=out/timed`.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

import torch

import hub
from data import records, templates
from model import generate, pad


def sampling(folder: str, data: str, rounds: int):
    from transformers import AutoModelForCausalLM

    model, tok = hub.load(folder)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    some = records.conversations(data, "prompt")[:128]
    prompts = [templates.render(tok, r["messages"], add_generation_prompt=True)[0] for r in some]
    end = templates.end_id(tok)
    tokens, mask = pad(prompts, left=True)

    def ours(seed):
        return sum(map(len, generate(model, prompts, 40, eos_id=end, seed=seed)))

    def theirs(seed):
        torch.manual_seed(seed)
        out = peer.generate(
            tokens, attention_mask=mask.long(), max_new_tokens=40, do_sample=True, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=0
        )
        answers = out[:, tokens.shape[1] :].tolist()
        return sum(a.index(end) + 1 if end in a else len(a) for a in answers)

    speeds = {ours: [], theirs: []}
    for r in range(rounds + 1):  # the first round warms up
        for run in (ours, theirs):
            start = time.perf_counter()
            count = run(r)
            speeds[run].append(count / (time.perf_counter() - start))
    a, b = speeds[ours][1:], speeds[theirs][1:]
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    print(f"tinytune {statistics.median(a):,.0f} tokens/s, transformers {statistics.median(b):,.0f} tokens/s")
    print(f"ratio {statistics.median(ratios):.2f} (median of {rounds}; {min(ratios):.2f} to {max(ratios):.2f})")


def make(words):
    start = time.time()
    subprocess.run(["make", *words], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"make {' '.join(words)}: {(time.time() - start) / 60:.1f} minutes, peak memory {peak:.2f} GiB, {os.cpu_count()} cores")


def main():
    if sys.argv[1:2] == ["make"]:
        return make(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["sampling"])
    parser.add_argument("--model", default="out/sft", help="checkpoint folder")
    parser.add_argument("--data", default="out/world/heldout.jsonl", help="conversations that end in a user's turn")
    parser.add_argument("--rounds", type=int, default=10)
    o = parser.parse_args()
    sampling(o.model, o.data, o.rounds)


if __name__ == "__main__":
    main()
