"""Puts known bugs back, one at a time, and wants a test to fail: python tests/mutants.py [NUMBER ...]   (make mutants)

Each bug was found in a neighbouring project; the numbers are those of the list that this project keeps of them, its sections on
losses and masks (1-13), tokens (14-23), reward models (37-41), PPO (42-53) and DPO (54-63); those with a 0 are not in it. A bug is
a change of one place of one file in a copy of the repository: the old text must be there exactly once, so the table cannot fall behind
the code unnoticed. Exit status 1 where a bug survives, where the old text is gone, or where the tests fail without any bug.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent

# (number, what is wrong, file, tests of which one must fail,
#  old text,
#  new text)
BUGS = [
    # ---- losses, accumulation, masks
    (1, "mean of the micro-batches' means", "sft.py", "sft",
     "nll, _ = sft_loss(model, tokens, labels, segments)\n"
     "            (nll / targets).backward()",
     "nll, n = sft_loss(model, tokens, labels, segments)\n"
     "            (nll / max(1, n) / o.accumulate).backward()"),
    (1, "the loss grows with the accumulation", "sft.py", "sft",
     "(nll / targets).backward()",
     "(nll / targets * o.accumulate).backward()"),
    (1, "DPO: mean of the micro-batches' means", "dpo.py", "dpo",
     "((losses + o.nll * nll).sum() / pairs).backward()",
     "((losses + o.nll * nll).mean() / o.accumulate).backward()"),
    (1, "targets of the last micro-batch alone", "sft.py", "sft",
     "(nll / targets).backward()",
     "(nll / sum(label != IGNORE for _, labels in some for label in labels[1:] or [0])).backward()"),
    (2, "learning rate moves with the micro-batches", "sft.py", "sft",
     "lr_at(step, o.steps, o.lr, o.warmup)",
     "lr_at(step * o.accumulate, o.steps * o.accumulate, o.lr, o.warmup)"),
    (2, "the last, smaller micro-batch is dropped", "sft.py", "sft",
     "for i in range(0, len(examples), part):",
     "for i in range(0, len(examples) - part + 1, part):"),
    (2, "the last, smaller batch of an epoch is dropped", "data/records.py", "sft",
     "epoch, place = divmod(i, len(records))",
     "epoch, place = divmod(i, len(records) // size * size or len(records))"),
    (3, "every token is trained", "data/templates.py", "templates",
     "labels += new if trained else [-100] * len(new)",
     "labels += new"),
    (4, "conversations without a target are kept", "sft.py", "sft",
     "kept = [e for e in short if any(label != IGNORE for label in e[1][1:])]",
     "kept = short"),
    (4, "0/0 where nothing is trained", "sft.py", "sft",
     'labels[row, column + 1], reduction="sum"), len(row)',
     'labels[row, column + 1], reduction="mean") * len(row), len(row)'),
    (4, "0/0 where nothing can be compared", "reward.py", "reward",
     "/ pairs.clamp(min=1)",
     "/ pairs"),
    (5, "SFT: a target is predicted from itself", "sft.py", "sft",
     "labels[row, column + 1]",
     "labels[row, column]"),
    (5, "SFT: shifted twice", "sft.py", "sft",
     "(labels[:, 1:] != IGNORE) & (segments[:, 1:]",
     "(labels[:, :-1] != IGNORE) & (segments[:, 1:]"),
    (5, "log-probabilities: a token is predicted from itself", "model.py", "model dpo",
     "target = tokens[row, column + 1]",
     "target = tokens[row, column]"),
    (5, "the first token of an answer is left out", "model.py", "dpo",
     ">= start[:, None])",
     "> start[:, None])"),
    (5, "the last token of the prompt is trained", "model.py", "dpo",
     ">= start[:, None])",
     ">= start[:, None] - 1)"),
    (6, "a mask on the mean instead of on its terms", "ppo.py", "ppo",
     "return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)",
     "return x.mean() * mask.any()"),
    (7, "labels are written into the tokens", "sft.py", "sft",
     "labels, segments = torch.full_like(tokens, IGNORE), torch",
     "labels, segments = tokens.fill_(IGNORE), torch"),
    (8, "DPO: the mask is inverted", "dpo.py", "dpo",
     "logprobs(model, tokens, mask, where).sum(1)",
     "logprobs(model, tokens, mask, mask & ~where).sum(1)"),
    (8, "DPO: the chosen answer also stands for the rejected one", "dpo.py", "dpo",
     "(start + w, start + l)",
     "(start + w, start + w)"),
    (8, "DPO: a mean over the padded length", "dpo.py", "dpo",
     "logprobs(model, tokens, mask, where).sum(1)",
     "logprobs(model, tokens, mask, where).mean(1)"),
    (9, "padding counts as part of the answer", "model.py", "dpo",
     "return tokens, mask, mask & (torch",
     "return tokens, mask, (torch"),
    (10, "the prompt counts as part of the answer", "model.py", "dpo",
     "return tokens, mask, mask & (torch",
     "return tokens, mask, mask | (torch"),
    (11, "packed: places of later examples are wrong", "model.py", "model dpo",
     "column = place[:, 1:] + torch.where(lead",
     "column = 0 * place[:, 1:] + torch.where(lead"),
    (11, "log-probabilities split among the wrong answers", "dpo.py", "dpo",
     "start += len(answers)",
     "start += len(pairs)"),
    (12, "packed examples see each other", "model.py", "model sft",
     "(segments[:, :, None] == segments[:, None]) & (here",
     "(segments[:, :, None] >= -1) & (here"),
    (12, "positions run on through a packed row", "model.py", "model",
     "positions = here - torch.where(first, here, 0).cummax(1).values",
     "positions = here.expand_as(segments)"),
    (12, "an example's first token is predicted from its neighbour", "sft.py", "sft",
     "!= IGNORE) & (segments[:, 1:] == segments[:, :-1])",
     "!= IGNORE) & (segments[:, 1:] >= 0)"),
    (13, "SFT: the head runs on every token", "sft.py", "sft",
     "model.lm_head(model.hidden(tokens, segments=segments)[row, column])",
     "model.lm_head(model.hidden(tokens, segments=segments))[row, column]"),
    (13, "log-probabilities: the head runs on every token", "model.py", "model",
     "model.lm_head(dense_hidden(model, tokens, mask, where)[row, column])",
     "model.lm_head(dense_hidden(model, tokens, mask, where))[row, column]"),
    # ---- tokens
    (14, "the end token is not trained", "data/templates.py", "templates",
     "(format.end, True, trained)",
     "(format.end, True, False)"),
    (14, "labels are masked by the padding's id, so ends are not trained", "sft.py", "sft",
     "wanted = (labels[:, 1:] != IGNORE) & ",
     "wanted = (labels[:, 1:] != IGNORE) & (tokens[:, 1:] != 0) & "),
    (15, "what is padding is told by its id", "model.py", "model dpo",
     "return tokens.to(device), mask.to(device)",
     "return tokens.to(device), (tokens != fill).to(device)"),
    (16, "a beginning token too many", "data/templates.py", "templates",
     "    ids, labels = [], []\n"
     "    for piece, own",
     "    ids, labels = [tokenizer.bos_id], [-100]\n"
     "    for piece, own"),
    (18, "an answer is encoded together with what stands before it", "data/templates.py", "templates",
     '(format.before.format(role=m["role"]), True, False), (m["content"], False, trained),',
     '(format.before.format(role=m["role"])[:-1], True, False), ("\\n" + m["content"], False, trained),'),
    (18, "user text can say special tokens", "data/tokenizer.py", "tokenizer templates",
     "return self.encoding.encode_ordinary(text)",
     'return self.encoding.encode(text, allowed_special="all")'),
    (19, "the chat template is not saved with the model", "data/tokenizer.py", "templates",
     "json.dumps(self.config, ensure_ascii=False, indent=2)",
     'json.dumps({k: v for k, v in self.config.items() if k != "chat_template"}, indent=2)'),
    (20, "SmolLM2 without its default system message", "data/templates.py", "templates",
     "system=SMOLLM2_SYSTEM),",
     "system=None),"),
    (21, "generation: positions count the padding", "model.py", "model",
     "positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]",
     "positions = torch.arange(mask.shape[1]).expand_as(mask)[:, start:]"),
    (21, "generation: a new token sees padding in the cache", "model.py", "model",
     "return positions, mask[:, None, None]",
     "return positions, torch.ones_like(mask)[:, None, None]"),
    (21, "generation: rows that have ended stay in the cache", "model.py", "model",
     "cache.keep(going)",
     "cache.keep(going.sort(descending=True).values)"),
    (23, "padding is seen", "model.py", "model",
     "(before & mask[:, None, None] | itself)",
     "(before | itself)[None, None]"),
    # ---- reward model
    (37, "the score is read at the last column", "model.py", "reward model",
     "last = torch.where(mask, torch.arange(tokens.shape[1], device=tokens.device), 0)",
     "last = torch.arange(tokens.shape[1]).expand_as(tokens)"),
    (0, "an answer sees the other answers to its prompt", "model.py", "model",
     "allowed = ((own[:, :, None] == own[:, None]) | (begins[:, :, None] == own[:, None])) & (here <= here[:, None])",
     "allowed = (begins[:, :, None] == begins[:, None]) & (here <= here[:, None])"),
    (0, "every answer's positions go on from the one before it", "model.py", "model",
     "tokens[mask], (mask.long().cumsum(1) - 1)[mask]",
     "tokens[mask], column[mask]"),
    (38, "texts are scored without their end", "evals.py", "reward",
     "last_score(model, *join(*zip(*ids[i : i + size], strict=True), model.device))",
     "last_score(model, *join([p for p, _ in ids[i : i + size]], [a[:-1] for _, a in ids[i : i + size]], model.device))"),
    (38, "the reward model learns from answers without their end", "data/templates.py", "reward",
     "[*tokenizer.encode(answer), end_id(tokenizer)]",
     "[*tokenizer.encode(answer)]"),
    (39, "the score is read at the first end token", "model.py", "reward",
     ".amax(1, keepdim=True)\n"
     "    return scores(",
     ".amax(1, keepdim=True)\n"
     "    last = (tokens == tokens.gather(1, last)).int().argmax(1, keepdim=True)\n"
     "    return scores("),
    (40, "accuracy on pairs of like length is that on all pairs", "evals.py", "evals",
     "(length[:, :, None] - length[:, None]).abs() <= 1",
     "(length[:, :, None] - length[:, None]).abs() >= 0"),
    (40, "the correlation of score and length is one of score and score", "evals.py", "evals",
     "[0, 1].item()",
     "[0, 0].item()"),
    # ---- PPO
    (42, "the sampler cuts its distribution", "ppo.py", "ppo",
     "generate(policy, asked, o.max_new_tokens, o.temperature, eos_id",
     "generate(policy, asked, o.max_new_tokens, o.temperature, 0.9, eos_id"),
    (42, "the sampler forgets the temperature", "model.py", "model",
     "torch.softmax(logits.float() / temperature, -1)",
     "torch.softmax(logits.float(), -1)"),
    (42, "PPO samples at another temperature than it scores", "ppo.py", "ppo",
     "generate(policy, asked, o.max_new_tokens, o.temperature,",
     "generate(policy, asked, o.max_new_tokens, 1.0,"),
    (43, "the update forgets the temperature", "ppo.py", "ppo",
     "new = logp_of(policy, tokens[b], real[b], mask[b])",
     "new = logprobs(policy, tokens[b], real[b], mask[b])"),
    (43, "the reference forgets the temperature", "ppo.py", "ppo",
     "lambda *rows: logp_of(reference, *rows)",
     "lambda *rows: logprobs(reference, *rows)"),
    (43, "DPO's reference is another one", "dpo.py", "dpo",
     "        out[i] = part\n",
     "        out[i] = part + 0.1 * len(part)\n"),
    (44, "the score lands behind the end", "ppo.py", "ppo",
     "real.sum(1) - 1",
     "real.sum(1).clamp(max=tokens.shape[1] - 1)"),
    (44, "the score lands before the end", "ppo.py", "ppo",
     "real.sum(1) - 1",
     "real.sum(1) - 2"),
    (44, "an answer without an end gets its score", "ppo.py", "ppo",
     'torch.where(finished, judge(tokens, real, [r["messages"] for r in batch], texts), o.no_end_score)',
     'judge(tokens, real, [r["messages"] for r in batch], texts)'),
    (45, "the critic learns rewards instead of returns", "ppo.py", "ppo",
     "value_loss(value, values[b], returns[b],",
     "value_loss(value, values[b], rewards[b],"),
    (45, "returns from whitened advantages", "ppo.py", "ppo",
     "            advantages = whiten(advantages, mask)\n",
     "            advantages = whiten(advantages, mask)\n"
     "            returns = advantages + values\n"),
    (45, "GAE: what lies off the mask leaks in", "ppo.py", "ppo",
     "rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)",
     "rewards, values = rewards + 0.0, values + 0.0"),
    (45, "GAE: prompts get an advantage", "ppo.py", "ppo",
     "after = torch.where(mask[:, t], delta + gamma * lam * after, 0.0)",
     "after = delta + gamma * lam * after"),
    (45, "KL: a mean over the padded batch", "ppo.py", "ppo",
     "d = torch.where(mask, old - ref, 0.0)",
     "d = old - ref"),
    (46, "multiplied by the mask, NaN stays NaN", "ppo.py", "ppo",
     "return torch.where(mask, x, 0.0).sum() /",
     "return (x * mask).sum() /"),
    (46, "the ratio off the mask", "ppo.py", "ppo",
     "torch.exp(torch.where(mask, logp - old_logp, 0.0))",
     "torch.exp(logp - old_logp)"),
    (47, "KL is paid in the loss too", "ppo.py", "ppo",
     "(pg + o.vf * vf).backward()",
     "(pg + o.vf * vf + beta * masked_mean((new - ref[b]) ** 2 / 2, mask[b])).backward()"),
    (47, "KL is not paid", "ppo.py", "ppo",
     "torch.where(mask, -beta * (old - ref), 0.0)",
     "torch.zeros_like(old)"),
    (48, "KL has the wrong sign in the reward", "ppo.py", "ppo",
     "-beta * (old - ref)",
     "-beta * (ref - old)"),
    (48, "KL is that of the reference to the policy", "ppo.py", "ppo",
     "d = torch.where(mask, old - ref, 0.0)",
     "d = torch.where(mask, ref - old, 0.0)"),
    (48, "k3 has its exponent the wrong way round", "ppo.py", "ppo",
     "(torch.expm1(-d) + d)",
     "(torch.expm1(d) - d)"),
    (48, "KL is a mean over tokens", "ppo.py", "ppo",
     "return d.sum(1).mean(),",
     "return d.mean(1).mean(),"),
    (50, "rewards are shifted by one", "ppo.py", "ppo",
     "delta = rewards[:, t] +",
     "delta = rewards[:, t - 1] +"),
    (50, "values are read after their token", "ppo.py", "ppo",
     "return F.pad(read[:, :-1], (1, 0))",
     "return read"),
    (50, "a shape that broadcasts", "ppo.py", "ppo",
     "torch.maximum((values - returns) ** 2, (near",
     "torch.maximum((values - returns[:, :1]) ** 2, (near"),
    (50, "the advantage has the wrong sign", "ppo.py", "ppo",
     "plain, clipped = -advantages * ratio, -advantages * ratio.clamp",
     "plain, clipped = advantages * ratio, advantages * ratio.clamp"),
    (50, "the better of the two surrogates instead of the worse", "ppo.py", "ppo",
     "masked_mean(torch.maximum(plain, clipped), mask)",
     "masked_mean(torch.minimum(plain, clipped), mask)"),
    (50, "GAE: the next value is not discounted in", "ppo.py", "ppo",
     "+ gamma * next_value - values[:, t]",
     "- values[:, t]"),
    (50, "whitening keeps the mean where it should go", "ppo.py", "ppo",
     "scaled if shift_mean else scaled + mean",
     "scaled + mean if shift_mean else scaled"),
    (50, "the last value follows the answer", "ppo.py", "ppo",
     "real.sum(1) - 1\n",
     "real.sum(1) - 1\n"
     "            mask = mask | torch.zeros_like(mask).scatter(1, real.sum(1, keepdim=True).clamp(max=mask.shape[1] - 1), True)\n"),
    (51, "no GAE: each token is paid for its own step alone", "ppo.py", "ppo",
     "torch.where(mask[:, t], delta + gamma * lam * after, 0.0)",
     "torch.where(mask[:, t], delta, 0.0)"),
    (51, "one advantage for the whole answer", "ppo.py", "ppo",
     "            advantages = whiten(advantages, mask)\n",
     "            advantages = whiten(torch.where(mask, advantages.sum(1, keepdim=True) / mask.sum(1, keepdim=True), 0.0), mask)\n"),
    (52, "the logged length counts the prompt", "ppo.py", "ppo",
     "length=mask.sum() / len(mask)",
     "length=real.sum() / len(mask)"),
    (52, "answers that did not end count as finished", "ppo.py", "ppo",
     "finished=finished.float().mean()",
     "finished=real.any(1).float().mean()"),
    # ---- DPO and its kin
    (54, "the log shows the chosen log-probability twice", "dpo.py", "dpo",
     "logp_rejected=logps[rejected]",
     "logp_rejected=logps[chosen]"),
    (54, "the likelihood term is the rejected answer's", "dpo.py", "dpo",
     "nll = -(logps / lengths)[chosen]",
     "nll = -(logps / lengths)[rejected]"),
    (55, "answers are learnt without their end", "data/templates.py", "dpo",
     "[*tokenizer.encode(answer), end_id(tokenizer)]",
     "[*tokenizer.encode(answer)]"),
    (57, "DPO on means", "dpo.py", "dpo",
     "return logprobs(model, tokens, mask, where).sum(1), where.sum(1)",
     "return logprobs(model, tokens, mask, where).sum(1) / where.sum(1), where.sum(1)"),
    (57, "labels are smoothed the wrong way", "dpo.py", "dpo",
     "-(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F",
     "-label_smoothing * F.logsigmoid(beta * h) - (1 - label_smoothing) * F"),
    (57, "rewards are not detached", "dpo.py", "dpo",
     "beta * (policy_chosen - ref_chosen).detach()",
     "beta * (policy_chosen - ref_chosen)"),
    (58, "SimPO on sums", "dpo.py", "dpo",
     "margin = chosen_logps / chosen_lengths - rejected_logps / rejected_lengths",
     "margin = chosen_logps - rejected_logps"),
    (59, "SimPO's γ is taken for γ/β", "dpo.py", "dpo",
     "-F.logsigmoid(beta * margin - gamma)",
     "-F.logsigmoid(beta * (margin - gamma))"),
    (60, "IPO on means", "dpo.py", "dpo",
     "            chosen, rejected = places(groups, device)\n"
     "            if",
     "            chosen, rejected = places(groups, device)\n"
     "            logps = logps / lengths if o.loss == \"ipo\" else logps\n"
     "            if"),
    (60, "IPO's target is 1/β", "dpo.py", "dpo",
     "(h - 1 / (2 * beta)) ** 2",
     "(h - 1 / beta) ** 2"),
    (61, "answers that do not fit are kept", "dpo.py", "dpo",
     "if len(p) + len(a) <= length]",
     "if len(p) <= length]"),
    (62, "evaluation counts the prompt's log-probability", "evals.py", "evals",
     "x for i in range(0, len(ids), size) for x in logprobs(model, *join(",
     "x for i in range(0, len(ids), size) for x in (lambda m, t, r, _: logprobs(m, t, r, r))(model, *join("),
    # ---- the ranking loss, which none of the neighbours has: theirs are pairs
    (0, "the worse answer is preferred", "reward.py", "reward",
     "(ranks[:, :, None] < ranks[:, None, :])",
     "(ranks[:, :, None] > ranks[:, None, :])"),
    (0, "ties form pairs", "reward.py", "reward",
     "(ranks[:, :, None] < ranks[:, None, :])",
     "(ranks[:, :, None] <= ranks[:, None, :])"),
    (0, "a prompt weighs as many times as it has pairs", "reward.py", "reward",
     "per_prompt.sum() / (pairs > 0).sum().clamp(min=1)",
     "torch.where(better, nll, 0.0).sum() / pairs.sum().clamp(min=1)"),
    (0, "an absent answer's score counts", "reward.py", "reward",
     "& present[:, :, None] & present[:, None, :]",
     ""),
    (0, "reference answers are not at mean 0", "ppo.py", "reward",
     "(last_score(model, tokens, mask) - c.reward_mean) / c.reward_std",
     "last_score(model, tokens, mask) / c.reward_std"),
]  # fmt: skip

# the rest of the list: what has no counterpart here, and why
DO_NOT_APPLY = {
    17: "nothing is searched for in token ids: prompts and answers are encoded apart, piece by piece (the bugs of 18)",
    22: "positions are learnt nowhere; under RoPE a constant shift of a row changes nothing (padding on the left is tested: 21, 23)",
    41: "no embedding is ever resized or padded to a multiple",
    49: "no exact KL is computed from whole vocabularies; the estimates are compared with it on a toy (48)",
    53: "no other library's Adam is imitated",
    56: "no paper's dataset or judge is reproduced: the embedded world has its own gold rater",
    63: "documentation: each stage is one file that reads top to bottom",
}
LISTED = {*range(1, 24), *range(37, 64)}


def copy_to(folder: Path):
    leave = shutil.ignore_patterns(".*", "out", "smollm2", "__pycache__", "*.pyc", "state")
    shutil.copytree(ROOT, folder, ignore=leave)


def run_tests(folder: Path, names: str):
    """pytest on tests/test_NAME.py → (exit status, the first failure in a line)."""
    files = [f"tests/test_{name}.py" for name in names.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) \S*?::(.*)", done.stdout, re.M)
    return done.returncode, found.group(1)[:110] if found else done.stdout[-500:] + done.stderr[-500:]


def try_bug(folder: Path, bug) -> tuple[bool, str]:
    """→ (was it caught?, a line that says so)."""
    number, what, file, tests, old, new = bug
    path = folder / file
    text = path.read_text("utf-8")
    if text.count(old) != 1:
        return False, f"STALE     #{number} {what}: {file} has the old text {text.count(old)} times: {old!r}"
    path.write_text(text.replace(old, new), "utf-8")
    try:
        status, said = run_tests(folder, tests)
    finally:
        path.write_text(text, "utf-8")
    if status == 1:
        return True, f"caught    #{number} {what}: {said}"
    return False, f"{'SURVIVED ' if status == 0 else 'BROKEN   '} #{number} {what} ({file}): {said}"


def main():
    wanted = {int(a) for a in sys.argv[1:]}
    numbers = {b[0] for b in BUGS} - {0}
    if LISTED != numbers | DO_NOT_APPLY.keys() or numbers & DO_NOT_APPLY.keys():
        sys.exit(f"mutants.py: every number once: missing {LISTED - numbers - DO_NOT_APPLY.keys()}, twice {numbers & DO_NOT_APPLY.keys()}")
    bugs = [b for b in BUGS if not wanted or b[0] in wanted]
    with tempfile.TemporaryDirectory() as tmp:
        copies, mine = [Path(tmp) / str(i) for i in range(2)], threading.local()
        for c in copies:
            copy_to(c)
        status, said = run_tests(copies[0], " ".join(sorted({t for b in bugs for t in b[3].split()})))
        if status:
            sys.exit(f"mutants.py: the tests fail without any bug: {said}")
        free = list(copies)

        def work(bug):
            if not hasattr(mine, "copy"):
                mine.copy = free.pop()
            caught, line = try_bug(mine.copy, bug)
            print(line, flush=True)
            return caught

        with ThreadPoolExecutor(len(copies)) as pool:
            caught = list(pool.map(work, bugs))
    if not wanted:
        for number, why in DO_NOT_APPLY.items():
            print(f"n/a       #{number} {why}")
    print(f"{sum(caught)} of {len(bugs)} bugs caught, {len(DO_NOT_APPLY)} do not apply")
    sys.exit(sum(caught) < len(bugs))


if __name__ == "__main__":
    main()
