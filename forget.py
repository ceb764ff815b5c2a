"""Catastrophic forgetting: what a network learns next overwrites what it knew, and what helps.

The gradient of a new task's loss L_new says nothing about the old task: every weight that lowers
L_new moves, needed elsewhere or not (McCloskey & Cohen 1989). What helps, cheapest first:

1. Small steps: a low rate, with warmup and decay, ends nearer to the start θ*.
2. LoRA: W stays, s·BA has rank r. It learns less and forgets less (Biderman et al. 2024), yet it
   bounds the change's rank, not its size.
3. Replay: old data among the new, a share ρ of the target tokens (`sft.py --replay FILE
   --replay-ratio ρ`). The loss stays one mean over all targets, and that is

       L = (1 - ρ) L_new + ρ L_old                       at ρ / (1 - ρ) more target tokens per step

   PPO-ptx is replay in PPO: each update adds γ ∇L_old, a mean per token, to PPO's gradient
   (Ouyang et al. 2022, eq. 2; `ppo.py --ptx FILE --ptx-coef γ`).
4. EWC: without old data, a spring holds each weight, stiff where the old task needs it
   (Kirkpatrick et al. 2017, eq. 3; `sft.py --ewc DIR --ewc-lambda λ`):

       L = L_new + ½ λ Σ_i F_i (θ_i - θ*_i)²
       F_i = E_x E_{y ~ p(·|x)} [ (∂ log p(y|x) / ∂θ_i)² ]

   The old loss, expanded around its optimum θ*: its gradient is 0 there, its curvature about the
   Fisher information, of which the diagonal F is kept. Old tasks add up: --ewc A,B.

This script computes F. An example is a conversation, log p(y|x) a sum over its target tokens.

    true          each target is drawn from the model, given the data's own prefix, as E_y says
    empirical     the data's targets: F is large where the model is wrong, whatever the curvature
                  (Kunstner et al. 2019)
    mean-squared  wrong, to compare with: the square of the mean gradient, not the mean of squares.
                  At θ* the mean gradient is 0, so it goes to 0 as 1/N
    identity      F = 1, plain decay to θ* (L2-SP: Li et al. 2018)

Under LoRA, W + s·BA, the penalty reads the change of the product: A and B alone mean nothing. Each
layer's BA is written out, 2·r·out·in operations: few beside a batch of tokens. But F is as large as
the weights in float32, eight times a 4-bit base. What rounding to 4 bits moved is not pulled back.

What to watch: the old task's score, before and after, on items that neither task trained; the new
loss does not show it. λ, ρ and the rate all trade old for new: compare at an equal new score.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common import hub, tuning
from common.pieces import in_pieces
from common.run import Run, autocast, fingerprint, lineage, main, make_room, opt, pick_device
from data import records, templates
from lora import LoRALinear
from model import nll, nll_of, predicted
from packing import SHORTEST, count_targets, pack, usable
from sampling import sample

KINDS = ("true", "empirical", "mean-squared", "identity")
FILE = "fisher.safetensors"


@dataclass
class Options:
    model: str = opt("out/sft", "checkpoint that has learnt the old task: θ*", hub="all")
    data: str = opt("out/world/sft.jsonl", "the old task: chats or plain text")
    out: str = opt("out/fisher", f"folder for {FILE}")
    fisher: str = opt("true", "what F is; the last two only to compare with", choices=KINDS)
    examples: int = opt(1000, "conversations or texts, at random; 0: all", at_least=0)
    length: int = opt(256, "tokens of a conversation; longer texts are cut", at_least=2)
    seed: int = opt(0, "seed of the examples and of their labels", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    save_every: int = opt(500, "examples between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")


# ---------------------------------------------------------------- old data: replay and PPO-ptx
def examples(path, tok, length: int, **allowed):
    """Chats or plain text → [(ids, labels)]. Of chats the training split, as in sft.py; text is cut
    into pieces of `length` tokens, each of them a target, the document's end too."""
    if not records.is_text(path):
        train, held = records.split(records.conversations(path, **allowed))
        found, what = [templates.render(tok, c["messages"]) for c in train], "conversations"
    else:
        documents = [templates.document(tok, text) for text in records.texts(path, **allowed)]
        pieces = [ids[i : i + length] for ids in documents for i in range(0, len(ids), length)]
        found, held, what = [(ids, ids) for ids in pieces if len(ids) > 1], [], "pieces of text"
    kept, dropped = usable(found, length)
    records.report(path, len(kept), dropped, what, len(held))
    return kept


def replay(new, old, ratio: float, size: int, seed: int):
    """→ at(step): the old examples that go with step's batch of `size` new ones. Their share of all
    target tokens so far is `ratio`, to within one example; they come in shuffled epochs."""
    if not old:
        return lambda step: []
    counts = [[count_targets([e]) for e in examples] for examples in (new, old)]
    ends, wanted, used = [0], 0.0, 0  # ends[s]: how many old ones come before step s

    def at(step):
        nonlocal wanted, used
        while len(ends) < step + 2:  # the steps before too: a resumed run goes the same way
            targets = sum(records.batch(counts[0], len(ends) - 1, size, seed))
            wanted += targets * ratio / (1 - ratio)
            ends.append(ends[-1])
            while used < wanted:
                used += records.batch(counts[1], ends[-1], 1, seed)[0]
                ends[-1] += 1
        return [records.batch(old, i, 1, seed)[0] for i in range(ends[step], ends[step + 1])]

    return at


def mix_in(policy, old, coef: float, optimizer):
    """Adds γ ∇L_old to the gradients, L_old the mean of -log p per target → L_old (PPO-ptx)."""
    tokens, labels, segments = pack(old, max(SHORTEST, *(len(ids) for ids, _ in old)))
    n = count_targets(old)  # room by words of their own: PPO's passes hold a critic too
    make_room(optimizer, ptx=tokens.numel(), ptx_length=tokens.shape[1], ptx_targets=n)
    with autocast(policy.device):
        loss = nll(policy, tokens, labels, segments).sum() / n
    (coef * loss).backward()
    return loss.detach()


# ---------------------------------------------------------------- the Fisher information
def log_likelihood(model, ids, labels, generator=None):
    """Σ_t log p(y_t | y_<t) over an example's targets, a scalar. With a generator each y_t that is
    scored is drawn from the model; what it is conditioned on stays the data's."""
    row = torch.tensor([ids])
    h, targets, _ = predicted(model, row, torch.tensor([labels]), torch.zeros_like(row))
    if generator is not None:
        draw = lambda h, uniform: sample(model.logits(h), 1.0, 1.0, uniform)  # noqa: E731
        uniform = torch.rand(len(targets), generator=generator).to(h.device)
        targets = in_pieces(draw, h.detach(), uniform, model.config.vocab_size)
    return -nll_of(model, h, targets).sum()


def add_gradient(sums, model, log_p, squared=True):
    """Adds the square of one example's gradient (or the gradient) to `sums`, shaped like model."""
    gradients = torch.autograd.grad(log_p, list(model.parameters()))
    for total, g in zip(sums.parameters(), gradients, strict=True):
        total.data += g**2 if squared else g


@torch.no_grad()
def fisher_of(kind: str, sums, n: int) -> dict:
    """Sums over n examples → {name: F}, a tied weight once. ValueError where F is not finite."""
    if kind == "identity":
        return {name: torch.ones_like(total) for name, total in sums.named_parameters()}
    means = {name: total / n for name, total in sums.named_parameters()}
    if bad := [name for name, mean in means.items() if not mean.isfinite().all()]:
        raise ValueError(f"the Fisher of {bad[0]} is not finite: take another checkpoint")
    return {k: m**2 for k, m in means.items()} if kind == "mean-squared" else means


# ---------------------------------------------------------------- the penalty
def old_tasks(o, model) -> list:
    """--ewc → [(weight, F, anchor)], the terms of the penalty F (read(weight) - anchor)².

    Called while the model is still --model. ValueError for a Fisher of another model, and for an
    adapter that the penalty cannot read.
    """
    terms, folders = [], list(filter(None, o.ewc.split(",")))
    if folders and o.adapter != "none":
        raise ValueError(f"--ewc holds weights or LoRA's product, not --adapter {o.adapter}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    held = {f"{n}.weight": m for n, m in layers.items() if m.active in m.A}
    start = dict(hub.load(o.model)[0].named_parameters()) if folders and held else {}
    held = held or dict(model.named_parameters())
    for folder in folders:
        fisher, anchors = load(folder, o.model)
        for name, weight in held.items():
            if name not in fisher:
                raise ValueError(f"--ewc {folder}: no {name} in it: it knows a tied weight as one")
            anchor = anchors[name].to(model.device)
            if start:  # W' - θ* = (s·BA - what that is now) + (--model's weights - θ*)
                anchor = read(weight).detach() + (anchor - start[name].detach().to(model.device))
                anchor = anchor if anchor.any() else 0.0  # of one's own Fisher: no zeros in memory
            terms.append((weight, fisher[name].to(model.device), anchor))
    return terms


def read(weight):
    """What the penalty is on: a parameter itself, or of a layer with LoRA s·BA (out,in)."""
    if not isinstance(weight, LoRALinear):
        return weight
    return weight.scale() * weight.B[weight.active] @ weight.A[weight.active]


def ewc(terms, strength: float) -> dict:
    """Adds the gradient of ½ λ Σ F (θ - θ*)² to the gradients → the penalty, for the log."""
    total = 0.0
    for weight, fisher, anchor in terms if strength else []:
        cost = 0.5 * strength * (fisher * (read(weight) - anchor) ** 2).sum()
        cost.backward()
        total += cost.detach()
    return {"penalty": total} if terms else {}


def save(path, o, model, fisher: dict):
    """PATH/fisher.safetensors: F and θ*, and the fingerprint of the model that they are of."""
    tensors = {f"fisher/{n}": f.contiguous() for n, f in fisher.items()}
    tensors |= {f"start/{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    save_file(tensors, path / FILE, {"model": fingerprint(o.model)})


def load(folder, model) -> tuple[dict, dict]:
    """A folder of forget.py → {name: F} and {name: θ*}, of `model` or of one that it was trained
    from, as its run.json tells; ValueError for another's."""
    if not (Path(folder) / FILE).is_file():
        raise FileNotFoundError(f"--ewc {folder}: it has no {FILE}, which forget.py writes")
    with safe_open(Path(folder) / FILE, "pt") as f:
        if (f.metadata() or {}).get("model") not in lineage(model):
            raise ValueError(f"--ewc {folder}: a Fisher of another model than {model}")
        found = {k: f.get_tensor(k) for k in f.keys()}
    parts = "fisher/", "start/"
    return tuple({k.removeprefix(p): t for k, t in found.items() if k.startswith(p)} for p in parts)


# ---------------------------------------------------------------- F of a checkpoint
def forget(o: Options):
    run = Run(o, __file__, [o.model, o.data], writes=(FILE,))
    model, tok = hub.language_model(o.model, pick_device(o.device))
    if tuning.in_4_bits(model) or model.virtual is not None:
        raise ValueError(f"{o.model}: plain weights were expected, no 4 bits, prompt or prefix")
    records.say_cut(o.length, model.context)
    data = examples(o.data, tok, min(o.length, model.context))
    n = 0 if o.fisher == "identity" else min(o.examples or len(data), len(data))
    data = records.batch(data, 0, n, o.seed)
    model.requires_grad_(True).eval()
    sums = copy.deepcopy(model)
    torch._foreach_zero_([total.data for total in sums.parameters()])
    run.resume(sums=sums)

    for i in run.steps(n, "example"):
        # a prime above any number of examples: no two pairs of seed and example share a seed
        seeded = torch.Generator().manual_seed(o.seed * 100_000_007 + i)
        with autocast(model.device):
            log_p = log_likelihood(model, *data[i], seeded if o.fisher == "true" else None)
        add_gradient(sums, model, log_p, squared=o.fisher != "mean-squared")
        run.log(i, loss=-log_p.detach() / count_targets([data[i]]))
        run.save(i)

    fisher = fisher_of(o.fisher, sums, n)
    run.finish(lambda path: save(path, o, model, fisher))


if __name__ == "__main__":
    main(forget, Options, __doc__)
