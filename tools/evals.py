"""How good a checkpoint is: gold score, win rates and KL to the SFT model, or --task.

Where the records have no gold rater: held-out loss and preference accuracy.

    python -m tools.evals --out OUT        evaluates the base and every stage's folder in OUT
    python -m tools.evals --task FILE --model DIR        a benchmark: tools/tasks.py

A stage is any folder of OUT that holds a finished language model: sft, ppo, dpo, simpo, and after
them your own by name. OUT/reward, the reward model, is evaluated as one.

Every answer is kept: OUT/answers/STAGE.jsonl (temperature 1) and STAGE.greedy.jsonl, one {prompt,
answer, finished, gold, right, reasons} per line, and what ROUGE-L, exact match and token F1 say of
it beside the perfect answer. OUT/results.json has the figures; where a figure is a mean over
prompts, FIGURE_ci is half the width of its 95 % interval. Two checkpoints are
compared on the same prompts (metrics.py says why). One model at a time is in memory: each stage's
answers and their log-probabilities are kept, and the SFT model, from which KL is measured, is read
once more after all stages.
"""

import math
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from common import files, tuning
from common.files import write_jsonl
from common.run import main, opt, pick_device
from data import records, templates
from data.world import world
from metrics import bootstrap, finite, hits, kl, mean, pair_accuracy, points, ratio, win_rate
from model import IGNORE, logprobs, nll, score
from packing import in_turn, pad
from sampling import prompt_room
from tools import tasks
from tools.answers import beside, order_counts, respond, show, with_interval, write_results

STAGES = ("base", "sft", "ppo", "dpo", "simpo")
NOT_STAGES = ("reward", "perfect", "measures")  # results.json's other entries
MEASURES = ("rougeL", "exact_match", "token_f1")  # which see a reference instead of the rubric


@dataclass
class Options(tuning.Reading):
    out: str = opt("out", "folder with the stages' checkpoints")
    base: str = opt("data/base", "the base model's folder", hub="all")
    data: str = opt(
        "",
        "your own conversations: held-out loss instead of gold; default: OUT/world/heldout.jsonl",
    )
    prefs: str = opt(
        "", "with --data: your preference pairs, for held-out preference accuracy", needs="data"
    )
    n: int = opt(1000, "how many held-out prompts", at_least=2)
    max_new_tokens: int = opt(64, "longest answer in tokens", at_least=1)
    batch: int = opt(128, "answers sampled together", at_least=1)
    seed: int = opt(0, "seed of the answers", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    task: str = opt(
        "",
        "a benchmark's records, or FILE.py:function that scores answers to the prompts of --data",
    )
    model: str = opt("", "the checkpoint that --task evaluates", needs="task", hub="all")
    against: str = opt(
        "", "another one, compared with it record by record", needs="task", hub="all"
    )
    shots: int = opt(0, "solved questions before each one", needs="task", at_least=0)
    chat: bool = opt(False, "choices and code in the chat format, not as plain text", needs="task")
    samples: int = opt(1, "programs per problem; one alone is greedy", needs="task", at_least=1)
    temperature: float = opt(0.8, "of several programs", needs="task", above=0)
    allow_code_execution: bool = opt(False, "run the programs that a model writes", needs="task")
    unconfined: bool = opt(
        False, "also where the system cannot confine them", needs="allow_code_execution"
    )


# ---------------------------------------------------------------- the stages of a run
def in_order(names) -> list[str]:
    """Stages' names: the known ones in their order, then the others alphabetically."""
    return [s for s in STAGES if s in names] + sorted(set(names) - set(STAGES))


def evaluated(results: dict) -> list[str]:
    """The stages in a results.json, in order."""
    return in_order([s for s in results if s not in NOT_STAGES])


def own_stages(out: Path, base="") -> list[str]:
    """The names of OUT's folders that hold a finished language model and are not tinytune's own
    stages. ValueError where one's name is taken in results.json.
    """
    folders = sorted(out.iterdir()) if out.is_dir() else []
    folders = [f for f in folders if f.name not in STAGES and f.name != "reward"]
    names = [
        f.name for f in folders if is_language_model(f) and f.resolve() != Path(base).resolve()
    ]
    for name in set(names) & set(NOT_STAGES):
        raise ValueError(f"{out / name}: results.json needs the name {name}; rename this folder")
    return names


def is_language_model(folder: Path) -> bool:
    """Whether a folder holds a finished checkpoint (config.json is written last) that answers: a
    reward model's config names the other architecture.
    """
    if not (folder / "config.json").is_file():
        return False
    architectures = files.read_json(folder / "config.json").get("architectures") or []
    return not any("SequenceClassification" in str(a) for a in architectures)


def stage_folders(o) -> dict[str, Path]:
    """{stage: folder} of what there is to evaluate, in order."""
    out = Path(o.out)
    known = {s: Path(o.base) if s == "base" else out / s for s in STAGES}
    known = {s: path for s, path in known.items() if (path / "config.json").exists()}
    return known | {s: out / s for s in own_stages(out, o.base)}


def reward_folder(o) -> Path | None:
    """The reward model's folder, if there is one."""
    path = Path(o.out) / "reward"
    return path if (path / "config.json").exists() else None


def read(o, stage, path, device):
    """A stage's model and tokenizer. The base has no adapter, with --keep-base neither."""
    plain = replace(o, keep_base=o.keep_base and stage != "base")
    return tuning.read(plain, path, device, reward=stage == "reward")


# ---------------------------------------------------------------- answers and their gold score
def answer(model, tok, prompts, o, temperature: float, seed: int):
    """Prompts (lists of messages) → [(text, ids, finished)] in the same order."""
    ids = [templates.render(tok, p, add_generation_prompt=True)[0] for p in prompts]
    return respond(model, tok, ids, o, temperature, seed)


def rate(held, answers):
    """Records with an `item`, and their answers → the lines of an answers file."""
    lines = []
    for r, (text, _, finished) in zip(held, answers, strict=True):
        score, reasons = world.gold(r["item"], text, finished)
        line = {"prompt": r["messages"], "answer": text, "finished": finished, "gold": score}
        found = beside(text, [world.perfect(r["item"])])
        lines.append(line | {"right": reasons["right"], "reasons": reasons})
        lines[-1] |= {name: found[name] for name in MEASURES}
    return lines


@torch.no_grad()
def token_logps(model, tok, held, answers, size=32):
    """The log-probability of each token of the answers, on the CPU: for every `size` of them a
    tensor (size,A), 0 past an end.
    """
    out = []
    asked = [templates.render(tok, r["messages"], add_generation_prompt=True)[0] for r in held]
    both = [(ids, said) for ids, (_, said, _) in zip(asked, answers, strict=True)]
    for i in range(0, len(both), size):
        some = both[i : i + size]
        read = partial(logprobs, model, width=max(len(said) for _, said in some))
        parts = in_turn([len(p) + len(a) for p, a in some], size)
        out.append(torch.cat([read(*zip(*some[part], strict=True)).cpu() for part in parts]))
    return out


def stage_figures(sampled, greedy, sampled_sft=None, kls=None):
    """The lines of a stage's two answers files → its entry in results.json. sampled_sft: the SFT
    model's lines, to compare with; kls: metrics.kl of the sampled answers.
    """
    gold = [a["gold"] for a in sampled]
    out = {"n": len(sampled)}
    out |= with_interval("gold_sampled", gold)
    out |= with_interval("gold_greedy", [a["gold"] for a in greedy])
    out["right_sampled"] = mean([a["right"] for a in sampled])
    out |= with_interval("right_greedy", [float(a["right"]) for a in greedy])
    for name in MEASURES:
        out |= with_interval(name, [a[name] for a in sampled])
    out["finished"] = mean([a["finished"] for a in sampled])
    out["mean_length"] = mean([len(a["answer"].split()) for a in sampled])
    if sampled_sft:
        gold_sft = [a["gold"] for a in sampled_sft]
        out |= with_interval("win_vs_sft", points(gold, gold_sft))
        out["win_vs_sft_decided"] = win_rate(gold, gold_sft)[1]
        out |= with_interval("gain_vs_sft", [a - b for a, b in zip(gold, gold_sft, strict=True)])
    if kls:
        out |= with_interval("kl_vs_sft", kls)
    return out


# ---------------------------------------------------------------- the reward model
@torch.no_grad()
def score_texts(model, tok, prompts, answers, sampled=None, size=64):
    """Raw scores of answers (str) to prompts (lists of messages). sampled: the answers' own ids,
    where they were sampled: an answer that was cut off has no end, and its last character may be
    half a one.
    """
    ids = with_ids(tok, prompts, answers, sampled)
    out = []
    for part in in_turn([len(p) + len(a) for p, a in ids], size):
        out += score(model, *zip(*ids[part], strict=True)).tolist()
    return finite(out, "scores")


def with_ids(tok, prompts, answers, sampled=None):
    """[(prompt ids, answer ids)]: the answers (str) encoded, or as they were sampled."""
    ids = [templates.answer_ids(tok, p, a) for p, a in zip(prompts, answers, strict=True)]
    return ids if sampled is None else [(p, a) for (p, _), a in zip(ids, sampled, strict=True)]


def fresh_answers(sft, tok, held, o, k=4):
    """What reward_figures() scores: the SFT model's k answers to each held-out prompt, one prompt
    after another.
    """
    return answer(sft, tok, [r["messages"] for r in held for _ in range(k)], o, 1.0, o.seed + 7)


def order(x):
    """(N,K) → (N,K,K): 1 where answer i has more than answer j, -1 where it has less, else 0."""
    return (x[:, :, None] - x[:, None]).sign()


def average(x):
    """The mean of a tensor, None of an empty one."""
    return x.float().mean().item() if x.numel() else None


def rubric(held, rows):
    """The gold rater on rows of K answers to each prompt → three tensors (N,K): the gold scores,
    whether an answer is right, and a number that is equal for answers of equal manner.
    """
    gold, right, manner = [], [], []
    for r, row in zip(held, rows, strict=True):
        rated = [world.gold(r["item"], text, finished) for text, _, finished in row]
        gold.append([score for score, _ in rated])
        right.append([int(why["right"]) for _, why in rated])
        manner.append([4 * w["courteous"] + 2 * w["rude"] + w["finished"] for _, w in rated])
    return torch.tensor(gold), torch.tensor(right), torch.tensor(manner)


def labelled(held, rows, who: str):
    """A labeller's ranks (N,K) of the same answers."""
    ranks = []
    for r, row in zip(held, rows, strict=True):
        labeller = world.Labeller(f"eval {who}")
        ranks.append(labeller.rank(r["item"], [a[0] for a in row], [a[2] for a in row]))
    return torch.tensor(ranks)


def reward_figures(reward, tok, held, answers, o):
    """The reward model's entry in results.json, and beside it labellers on the same pairs.

    answers: fresh_answers(). Pairs of equal gold are left out. `truth` are the pairs of one right
    and one wrong answer of the same manner; minimal pairs are demonstrations in the very same words
    but for the answer.
    """
    k = len(answers) // len(held)
    prompts, ids = [r["messages"] for r in held for _ in range(k)], [a[1] for a in answers]
    rows = [answers[i : i + k] for i in range(0, len(answers), k)]
    texts = [a[0] for a in answers]
    gold, right, manner = rubric(held, rows)
    first, second = labelled(held, rows, "a"), labelled(held, rows, "b")
    ranks = (gold[:, :, None] < gold[:, None]).sum(2)  # 0 the best
    better = order(ranks) < 0  # (N,K,K)

    scores = torch.tensor(score_texts(reward, tok, prompts, texts, ids)).view(-1, k)
    others = prompts[k:] + prompts[:k]
    swapped = torch.tensor(score_texts(reward, tok, others, texts, ids)).view(-1, k)
    length = torch.tensor([len(t.split()) for t in texts]).view(-1, k)
    near = (length[:, :, None] - length[:, None]).abs() <= 1
    correlation = torch.corrcoef(torch.stack((scores.flatten(), length.flatten().float())))
    correlation = correlation[0, 1].item()  # NaN where one of the two never differs
    decided = better & (order(first) != 0) & (order(second) != 0)
    truth = (order(right) > 0) & (order(manner) == 0)
    won = ((order(scores) + 1) / 2 * truth).sum((1, 2))
    by_prompt = list(zip(won.tolist(), truth.sum((1, 2)).tolist(), strict=True))
    return {
        "pair_accuracy": pair_accuracy(scores, ranks),
        "labeller_gold_accuracy": pair_accuracy(-first.float(), ranks),
        "labeller_agreement": average((order(first) == order(second))[decided]),
        "truth_accuracy": ratio(by_prompt),
        "truth_accuracy_ci": bootstrap(by_prompt, ratio),
        "truth_pairs": int(truth.sum()),
        **with_interval("minimal_pairs_accuracy", truth_pairs(reward, tok, held, o.seed)),
        "length_matched_accuracy": average(order(scores)[near & better] > 0),
        "score_length_correlation": correlation if math.isfinite(correlation) else None,
        "swapped_prompts_accuracy": pair_accuracy(swapped, ranks),
        "pairs": int(better.sum()),
    }


def truth_pairs(reward, tok, held, seed, asked=None):
    """A right and a wrong answer to each item, both in the very same polite words: 1 where the
    right one scores higher, ½ for a tie. asked: the prompts they are read under; default: the
    items' own.
    """
    asked, items = asked or [r["messages"] for r in held], [r["item"] for r in held]
    right, wrong = [], []
    for i, item in enumerate(items):
        lie = dict(item, answer=random.Random(f"{seed} {i}").choice(item["wrong"]))
        # the same seed for both: the same words
        right.append(world.demonstrate(item, random.Random(f"{seed} {i}"), "polite")[0])
        wrong.append(world.demonstrate(lie, random.Random(f"{seed} {i}"), "polite")[0])
    return hits(score_texts(reward, tok, asked * 2, right + wrong))


# ---------------------------------------------------------------- records without a gold rater
@torch.no_grad()
def held_out_losses(model, tok, conversations, size=8):
    """[(sum of the targets' negative log-likelihoods, their number)], one for each conversation
    that fits the context.
    """
    ids = [templates.render(tok, c["messages"]) for c in conversations]
    ids = sorted(((i, lab) for i, lab in ids if len(i) <= model.context), key=lambda x: len(x[0]))
    out = []
    for part in in_turn([len(i) for i, _ in ids], size):
        tokens, mask = pad([i for i, _ in ids[part]])
        labels, _ = pad([lab for _, lab in ids[part]], fill=IGNORE)
        losses = nll(model, tokens, labels, mask.long() - 1).sum(1)
        targets = (labels[:, 1:] != IGNORE).sum(1)
        out += zip(finite(losses.tolist(), "losses"), targets.tolist(), strict=True)
    return out


@torch.no_grad()
def answer_logps(model, tok, prompts, answers, sampled=None, size=8):
    """The summed log-probability of each answer (str); sampled: as in score_texts."""
    ids = with_ids(tok, prompts, answers, sampled)
    out = []
    for part in in_turn([len(p) + len(a) for p, a in ids], size):
        out += logprobs(model, *zip(*ids[part], strict=True)).sum(1).tolist()
    return finite(out, "log-probabilities")


def in_pairs(tok, pairs):
    """Preference pairs → (prompts, answers (str), their ids): all chosen answers, then all rejected
    ones.
    """
    ids = [templates.ranked_ids(tok, p, (p["chosen"], p["rejected"]))[1] for p in pairs]
    texts = [p["chosen"] for p in pairs] + [p["rejected"] for p in pairs]
    return [p["prompt"] for p in pairs] * 2, texts, [c for c, _ in ids] + [r for _, r in ids]


def stage_records(o, stage, path, held, pairs, device):
    """A stage's held-out losses, its log-probabilities of the pairs' answers (none for the base),
    and its answers to the first prompts, to read.
    """
    model, tok = read(o, stage, path, device)
    losses, logps = held_out_losses(model, tok, held), []
    if pairs and stage != "base":
        asked, texts, ids = in_pairs(tok, pairs)
        logps = answer_logps(model, tok, asked, texts, ids)
    room = prompt_room(model, o.max_new_tokens)
    prompts = []
    for c in held:
        ids, _ = templates.render(tok, c["messages"][:-1], add_generation_prompt=True)
        if len(ids) <= room:
            prompts.append(c["messages"][:-1])
    prompts = prompts[:20]
    answers = answer(model, tok, prompts, o, 0.0, o.seed)
    lines = [
        {"prompt": p, "answer": text, "finished": finished}
        for p, (text, _, finished) in zip(prompts, answers, strict=True)
    ]
    return losses, logps, lines


def loss_figures(losses, before):
    """Held-out loss per token; and its change from the losses `before`, where those are of another
    model on the same tokens.
    """
    out = {
        "n": len(losses),
        "loss_per_token": ratio(losses),
        "loss_per_token_ci": bootstrap(losses, ratio),
    }
    if before is not losses and [n for _, n in before] == [n for _, n in losses]:
        change = [(a - b, n) for (a, n), (b, _) in zip(losses, before, strict=True)]
        out |= {"loss_change": ratio(change), "loss_change_ci": bootstrap(change, ratio)}
    return out


def evaluate_records(o, conversations, device):
    """Anyone's records: every stage's held-out loss per token, the held-out preference accuracy of
    the reward model and of DPO's implicit reward log π - log π_sft, and answers to read.
    """
    if o.prefs and not (Path(o.out) / "sft" / "config.json").exists():
        raise FileNotFoundError(
            f"{o.out}/sft: no checkpoint; --prefs needs it, as the reference of the implicit reward"
        )
    held = records.split(conversations)[1][: o.n]
    pairs = records.split(records.pairs(o.prefs))[1][: o.n] if o.prefs else []
    results, before, reference = {}, None, None
    for stage, path in stage_folders(o).items():
        losses, logps, lines = stage_records(o, stage, path, held, pairs, device)
        records.report(o.data, len(losses), {}, "held-out conversations")
        before = before or losses  # the first stage's, as a rule the base's
        results[stage] = loss_figures(losses, before)
        if logps:
            reference = reference or logps  # SFT's
            won = hits([a - b for a, b in zip(logps, reference, strict=True)])
            results[stage] |= with_interval("implicit_accuracy", won) | {"pairs": len(pairs)}
        write_jsonl(Path(o.out) / "answers" / f"{stage}.greedy.jsonl", lines)
        show(stage, results[stage])
    if pairs and reward_folder(o):
        model, tok = read(o, "reward", reward_folder(o), device)
        won = hits(score_texts(model, tok, *in_pairs(tok, pairs)))
        results["reward"] = with_interval("pair_accuracy", won) | {"pairs": len(pairs)}
        show("reward", results["reward"])
    return results


# ---------------------------------------------------------------- the embedded world
def stage_answers(o, stage, path, held, device):
    """The lines of a stage's two answers files, and for the KL (its sampled answers, their
    log-probabilities, its vocabulary's hash).
    """
    model, tok = read(o, stage, path, device)
    asked = [r["messages"] for r in held]
    sampled = answer(model, tok, asked, o, 1.0, o.seed)
    greedy = answer(model, tok, asked, o, 0.0, o.seed)
    logps = None if stage == "base" else token_logps(model, tok, held, sampled)
    return rate(held, sampled), rate(held, greedy), (sampled, logps, tok.hash)


def measures(every) -> dict:
    """{stage: lines} → {measure: what it makes of gold's order, over the pairs of two stages'
    answers to one prompt that gold tells apart}. The base's answers, which all of them put last,
    are left out.

    untold        the share of the pairs that the measure cannot tell apart
    differently   of the others, the share that it orders otherwise than gold; ½ is guessing
    """
    rows, out = [*zip(*(lines for s, lines in every.items() if s != "base"), strict=True)], {}
    for name in MEASURES if rows and len(rows[0]) > 1 else ():
        counts = []
        for row in rows:  # 0.1 + 0.2 ties with 0.3
            counts.append(order_counts([a[name] for a in row], [round(a["gold"], 9) for a in row]))
        out[name] = {"n": len(rows), "pairs": sum(c + d + m for c, d, m, _ in counts)}
        shares = {"differently": [(d, c + d) for c, d, _, _ in counts]}
        shares["untold"] = [(m, c + d + m) for c, d, m, _ in counts]
        for share, parts in shares.items():
            out[name] |= {share: ratio(parts), f"{share}_ci": bootstrap(parts, ratio)}
    return out


def right_by_kind(held, lines) -> dict:
    """{kind of instruction: the share of its answers that are right}."""
    right = {}
    for r, line in zip(held, lines, strict=True):
        right.setdefault(r["item"]["kind"], []).append(line["right"])
    return {kind: mean(right[kind]) for kind in sorted(right)}


def evaluate_world(o, held, device):
    """The embedded world's prompts: the gold score of every stage's answers, and how well the
    reward model judges.
    """
    results, samples, every, sampled_sft = {"perfect": world.PERFECT}, {}, {}, None
    for stage, path in stage_folders(o).items():
        lines, greedy, sample = stage_answers(o, stage, path, held, device)
        if stage == "sft":
            sampled_sft = lines
        if sampled_sft:
            samples[stage] = sample
        every[stage] = lines
        results[stage] = stage_figures(lines, greedy, sampled_sft)
        results[stage]["right_greedy_by_kind"] = right_by_kind(held, greedy)
        write_jsonl(Path(o.out) / "answers" / f"{stage}.jsonl", lines)
        write_jsonl(Path(o.out) / "answers" / f"{stage}.greedy.jsonl", greedy)
        show(stage, results[stage])
    if samples:
        compare_with_sft(o, results, samples, held, device)
    return results | {"measures": measures(every)}


def compare_with_sft(o, results, samples, held, device):
    """Adds to the results what needs the SFT model once more: the KL of every stage's sample, and
    the reward model's figures on fresh answers.
    """
    folder = Path(o.out) / "sft"
    sft, tok = read(o, "sft", folder, device)
    for stage, (sampled, logps, vocabulary) in samples.items():
        if vocabulary != tok.hash:
            print(f"{stage}: no KL, its vocabulary is not that of {folder}", flush=True)
            continue
        kls = kl(logps, token_logps(sft, tok, held, sampled))
        results[stage] |= with_interval("kl_vs_sft", kls)
        show(stage, {k: v for k, v in results[stage].items() if k.startswith("kl")})
    if reward_folder(o):
        fresh = fresh_answers(sft, tok, held[:400], o)
        del sft
        reward, own = read(o, "reward", reward_folder(o), device)
        if own is None or own.hash != tok.hash:
            raise ValueError(
                f"{reward_folder(o)}: its vocabulary is not that of {folder}; train it on the same"
                " model"
            )
        results["reward"] = reward_figures(reward, tok, held[:400], fresh, o)
        show("reward", results["reward"])


# ---------------------------------------------------------------- the script
def evaluate(o: Options):
    if o.task:
        return tasks.evaluate(o)
    device = pick_device(o.device)
    if not stage_folders(o):
        raise FileNotFoundError(
            f"{o.out}: no stage's checkpoint in it ({', '.join(STAGES[1:])} or your own)"
        )
    if o.data:
        results = evaluate_records(o, records.conversations(o.data), device)
    else:
        held = records.conversations(f"{o.out}/world/heldout.jsonl", "prompt")[: o.n]
        results = evaluate_world(o, held, device)
    write_results(Path(o.out) / "results.json", results)


if __name__ == "__main__":
    main(evaluate, Options, __doc__)
