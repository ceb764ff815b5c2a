"""How fast and how large, beside the peers.

    python -m tools.bench TASK        (make bench has the peers)

    sampling     generate beside transformers': 128 ragged prompts, answers of up to 40 tokens that
                 end where they end
    sft          a training step of --model, every weight, beside a careful loop over transformers:
                 ours packs, theirs pads; in both the head runs on the targets' places alone
    lora         a training step of --model, LoRA r = 16 on every linear layer, beside a loop over
                 PEFT: ours packs, theirs pads
    dpo          a DPO step of --model, every weight, on --batch pairs of --data, beside TRL's
                 DPOTrainer; both have the reference's log-probabilities from before
    qlora        the same as lora on NF4, double-quantised, beside PEFT and bitsandbytes
    dequantise   double-quantised weights of two sizes and types, beside bitsandbytes
    qlora7b      a training step on a GPU: random weights of --size, LoRA r = 64, one row of 512
                 tokens, checkpointed. With --limit GB the process has no more than that and the
                 optimizer's state is paged; then, and without the peers, it runs alone
    choices      the first 100 records {query, choices, gold} of --data, beside lm-eval at several
                 batch sizes
    agree        alone: the same choices as lm-eval's in 200 such records, but for ties within 1e-4
    memory       alone, counted: --model's linear layers in bf16 and NF4; PPO's four networks over
                 one 4-bit base and as four models
    make …       alone: minutes and the largest process's peak memory of a make command, as in
                 `python -m tools.bench make all OUT=out/timed`

Each side is a process of its own, both of the same interpreter, and they take turns, so that a busy
machine is busy for both; the first round warms up. Both have the same weights, adapters and data,
and must start at the same loss.
"""

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import dpo as preferences
import lora
from common import files, hub
from common.memory import SIZES, UNIT, count, measured, shape
from common.run import adamw, autocast, has_bf16, main, opt, pick_device
from data import records, templates
from metrics import multiple_choice
from model import IGNORE, Transformer, scalar_model, share
from packing import SHORTEST, pad
from paged import PagedAdamW
from quant import Linear4bit, block_linears, quantize_nf4
from sampling import generate
from sft import count_targets, pack, sft_loss

SIZES = SIZES | {"tiny": shape(500, 64, 96, 2, 4, 2, 16)}  # runs without a GPU too
RANK, LR = 16, 1e-4


@dataclass
class Options:
    model: str = opt("smollm2", "checkpoint folder", hub="all")
    data: str = opt(
        "out/world/sft.jsonl", "conversations; for sampling, those that end in a user's turn"
    )
    batch: int = opt(8, "conversations per training step", at_least=1)
    rounds: int = opt(10, "rounds after the first", at_least=1)
    size: str = opt("7B", "qlora7b: the model's shape", choices=tuple(SIZES))
    limit: float = opt(
        0.0, "qlora7b: GB of GPU memory that the process may use; 0: all", at_least=0
    )
    device: str = opt("auto", "cpu, cuda or auto")
    case: str = opt("", "which case of the task this is (set by the parent)")
    side: str = opt("", "which side this process is (set by the parent)")


# ---------------------------------------------------------------- the sides
# each sets up → (a round: its number → units of work, a number that both sides must agree on)
def sampling(o, ours: bool):
    device = pick_device(o.device)
    model, tok = hub.load(o.model, device)
    asked = records.conversations(o.data, "prompt")[:128]
    prompts = [templates.render(tok, r["messages"], add_generation_prompt=True)[0] for r in asked]
    end = templates.end_id(tok)
    if ours:
        return lambda seed: sum(map(len, generate(model, prompts, 40, eos_id=end, seed=seed))), None
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32).to(device)
    tokens, mask = pad(prompts, left=True, device=device)
    options = dict(
        max_new_tokens=40, do_sample=True, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=0
    )

    def turn(seed):
        torch.manual_seed(seed)
        rows = peer.generate(tokens, attention_mask=mask.long(), **options)
        answers = rows[:, tokens.shape[1] :].tolist()
        return sum(a.index(end) + 1 if end in a else len(a) for a in answers)

    return turn, None


def alike(model):
    """Fills the trained tensors, A before B in each layer on both sides, with the same random
    numbers: B is not 0, so that both count.
    """
    seeded = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=seeded) * 0.02)
    return model


def step(model, loss_of, optimizer, tokens: int, device):
    """A training step as a round."""

    def turn(_):
        with autocast(device):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return tokens

    with torch.no_grad(), autocast(device):
        return turn, loss_of(model).item()


def training(o, ours: bool, quant=None):
    """A step as sft.py does it, or as a loop over PEFT is written by hand: a padded batch, labels
    of -100, the model's own loss.
    """
    device = pick_device(o.device)
    model, tok = hub.load(o.model, device, quant=quant if ours else None)
    examples, count = chats(o, tok)
    if ours:
        return our_step(alike(lora.add_lora(model, RANK, 2 * RANK)), examples, count, device)
    del model
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32).to(device)
    if quant:
        for name in blocks(peer):
            peer.set_submodule(name, bitsandbytes_linear(peer.get_submodule(name), torch.float32))
    tokens, mask, labels = padded(examples, device)
    batch = dict(input_ids=tokens, attention_mask=mask, labels=labels)
    model, optimizer = peft(peer, RANK)
    return step(model, lambda m: m(**batch).loss, optimizer, count, device)


def chats(o, tok):
    """--batch conversations of --data as [(ids, labels)], and their number of tokens."""
    templates.adopt(tok)
    read = records.batch(records.conversations(o.data), 0, o.batch, 0)
    examples = [templates.render(tok, r["messages"]) for r in read]
    return examples, sum(len(ids) for ids, _ in examples)


def our_step(model, examples, count: int, device):
    packed = pack(examples, max(SHORTEST, *(len(ids) for ids, _ in examples)))
    targets = count_targets(examples)
    loss = lambda m: sft_loss(m, *packed) / targets  # noqa: E731
    return step(model, loss, adamw(model, LR), count, device)


def padded(examples, device):
    tokens, mask = pad([ids for ids, _ in examples], device=device)
    labels, _ = pad([labels for _, labels in examples], fill=IGNORE, device=device)
    return tokens, mask.long(), labels


def sft(o, ours: bool):
    device = pick_device(o.device)
    model, tok = hub.load(o.model, device)
    examples, count = chats(o, tok)
    if ours:
        return our_step(model, examples, count, device)
    del model
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32).to(device).train()
    tokens, mask, labels = padded(examples, device)
    row, column = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # predicted from column
    target = labels[row, column + 1]

    def loss(m):
        h = m.model(tokens, attention_mask=mask).last_hidden_state
        return F.cross_entropy(m.lm_head(h[row, column]), target)

    options = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(peer.parameters(), LR, **options)
    return step(peer, loss, optimizer, count, device)


def dpo(o, ours: bool):
    """Its number is the loss under a reference that prefers each rejected answer by one nat."""
    device = pick_device(o.device)
    model, tok = hub.load(o.model, device)
    pairs = []
    for r in records.batch(records.pairs(o.data, "best_worst"), 0, o.batch, 0):
        prompt, answers = templates.ranked_ids(tok, r, (r["chosen"], r["rejected"]))
        pairs.append((prompt, *answers))
    with torch.no_grad():
        chosen, rejected, *_ = preferences.sums(model, pairs)
    count = sum(len(p) + len(answer) for p, *answers in pairs for answer in answers)
    if ours:

        def loss(m):
            policy = preferences.sums(m, pairs)[:2]
            return preferences.preference_loss(*policy, chosen, rejected + 1.0, 0.1)[0].mean()

        return step(model, loss, adamw(model, LR), count, device)
    del model
    trainer, batch = trl(o, pairs, chosen, rejected + 1.0, device)
    options = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), LR, **options)
    loss = lambda m: trainer.compute_loss(m, batch)  # noqa: E731
    return step(trainer.model.train(), loss, optimizer, count, device)


def trl(o, pairs, chosen, rejected, device):
    """TRL's DPOTrainer of --model, and its collator's batch of the pairs."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    peer = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as out:
        cpu, given = device.type == "cpu", dict(report_to=[], beta=0.1, bf16=False)
        config = DPOConfig(out, use_cpu=cpu, precompute_ref_log_probs=True, **given)
        some = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
        tok = AutoTokenizer.from_pretrained(o.model)
        trainer = DPOTrainer(peer, None, config, train_dataset=some, processing_class=tok)
    names = "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"
    before = zip(chosen.tolist(), rejected.tolist(), strict=True)
    rows = [(*pair, *logps) for pair, logps in zip(pairs, before, strict=True)]
    batch = trainer.data_collator([dict(zip(names, row, strict=True)) for row in rows])
    return trainer, {name: x.to(device) for name, x in batch.items()}


def qlora(o, ours: bool):
    return training(o, ours, "nf4")


def peft(peer, rank: int):
    """A transformers model with PEFT's LoRA, and torch's AdamW on that."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=lora.GROUPS["all"])
    model = alike(get_peft_model(peer, config).train())
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def blocks(peer) -> list[str]:
    """The names of the linear layers in a transformers model's blocks."""
    return [
        name for name, m in peer.named_modules() if isinstance(m, nn.Linear) and ".layers." in name
    ]


def bitsandbytes_linear(linear, dtype):
    """bitsandbytes' layer with this weight, double-quantised, computing in dtype."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    new = Linear4bit(
        linear.in_features,
        linear.out_features,
        False,
        dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    new.weight = Params4bit(
        linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return new.to(linear.weight.device)


def dequantise(o, ours: bool):
    device, (rows, columns, dtype) = pick_device(o.device), o.case.split()
    seeded = torch.Generator().manual_seed(0)
    weight = torch.randn(int(rows), int(columns), generator=seeded)
    weight = weight.to(device, getattr(torch, dtype)) * 0.02
    if ours:
        whole = quantize_nf4(weight).dequantize
    else:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        whole = partial(dequantize_4bit, codes, state)
    times = -(-(2**28) // weight.numel())

    def turn(_):
        for _ in range(times):
            whole()
        return times

    return turn, whole().double().abs().sum().item()


def qlora7b(o, ours: bool):
    """The model is built on the device, layer by layer: it never exists whole in 16 bits."""
    device, c = pick_device(o.device), SIZES[o.size]
    if device.type != "cuda" and o.size != "tiny":
        raise ValueError(
            f"qlora7b: {o.size} needs a GPU, and there is none; --size tiny shows that it runs"
        )
    if o.limit and device.type == "cuda":
        share_of_gpu = o.limit * UNIT / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share_of_gpu), device)
    seeded = torch.Generator().manual_seed(0)
    tokens = torch.randint(c.vocab_size, (1, 512), generator=seeded)
    turn, _ = (our_7b if ours else their_7b)(c, tokens, o.limit, device)
    return turn, None


def our_7b(c, tokens, limit, device):
    with torch.device("meta"):
        model = Transformer(c)
    build(model, block_linears(model), Linear4bit, device)
    lora.add_lora(model, 64, 128)
    model.checkpointing, segments = True, torch.zeros_like(tokens)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW(trained, LR) if limit else adamw(model, LR)
    return step(
        model, lambda m: sft_loss(m, tokens, tokens, segments) / 511, optimizer, 512, device
    )


def their_7b(c, tokens, _limit, device):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = hub.config_json(c, torch.bfloat16)
    config = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    with torch.device("meta"):
        peer = LlamaForCausalLM(LlamaConfig(**config))
    compute = torch.bfloat16 if has_bf16(device) else torch.float32
    build(peer, blocks(peer), lambda m: bitsandbytes_linear(m, compute), device)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config).to(device)
    model, optimizer = peft(peer, 64)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = tokens.to(device)
    return step(model, lambda m: m(input_ids=ids, labels=ids).loss, optimizer, 512, device)


@torch.no_grad()
def lm_eval(folder, file, n: int, batch: int, device="cpu"):
    """lm-eval and a task of its own on the first n records of a file → a function that runs it:
    for each record its choices' log-likelihoods, acc and acc_norm.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    peer = HFLM(pretrained=peer, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch)
    fields = dict(doc_to_text="{{query}}", doc_to_choice="{{choices}}", doc_to_target="{{gold}}")
    fields["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    with tempfile.TemporaryDirectory() as cache:
        source = {"data_files": {"test": str(file)}, "cache_dir": cache, "keep_in_memory": True}
        fields |= dict(dataset_path="json", dataset_kwargs=source, test_split="test")
        task = ConfigurableTask(config=dict(task="own", output_type="multiple_choice", **fields))

    def turn():
        found = evaluate(peer, {"own": task}, limit=n, bootstrap_iters=0)["samples"]["own"]
        found.sort(key=lambda s: s["doc_id"])
        return [([ll for ll, _ in s["filtered_resps"]], s["acc"], s["acc_norm"]) for s in found]

    return turn


def other_choices(items, ours, theirs, tie=1e-4) -> list[int]:
    """Records for which lm-eval counts another choice than ours, by either scoring, although ours
    stands out by more than a tie; ours: multiple_choice's, theirs: lm_eval's.
    """
    found = []
    for i, (item, a, (_, *accs)) in enumerate(zip(items, ours, theirs, strict=True)):
        sizes = [len(c) for c in item["choices"]]
        each = [ll / size for ll, size in zip(a["logprobs"], sizes, strict=True)]
        for lls, chosen, acc in zip(
            (a["logprobs"], each), (a["choice"], a["choice_norm"]), accs, strict=True
        ):
            first, second = sorted(lls)[:-3:-1]
            if (chosen == item["gold"]) != acc and first - second > tie:
                found.append(i)
    return found


def some_choices(o, n: int) -> list[dict]:
    lines = Path(o.data).read_text("utf-8").splitlines()[:n]
    return [files.parse(line, o.data) for line in lines]


def choices(o, ours: bool):
    """The number that both must agree on: the mean log-likelihood of the right choices."""
    device, items = pick_device(o.device), some_choices(o, 100)
    if ours:
        model, tok = hub.load(o.model, device)

        def turn():
            return [a["logprobs"] for a in multiple_choice(model, tok, items)]
    else:
        theirs = lm_eval(o.model, o.data, len(items), int(o.case), device)

        def turn():
            return [lls for lls, *_ in theirs()]

    right = [lls[item["gold"]] for lls, item in zip(turn(), items, strict=True)]
    return lambda _: len(turn()), sum(right) / len(right)


def agree(o):
    device, items = pick_device(o.device), some_choices(o, 200)
    ours = multiple_choice(*hub.load(o.model, device), items)
    theirs = lm_eval(o.model, o.data, len(items), o.batch, device)()
    pairs = [zip(a["logprobs"], b, strict=True) for a, (b, *_) in zip(ours, theirs, strict=True)]
    worst = max(abs(a - b) for pair in pairs for a, b in pair)
    print(f"{o.data}, {len(items)} records: log-likelihoods differ by {worst:.1g} at most")
    if others := other_choices(items, ours, theirs):
        raise ValueError(f"{o.data}: lm-eval chooses otherwise in the records {others}")
    print("lm-eval makes the same choices by both scorings")


def build(model, linears, four_bit, device):
    """Gives a model of the meta device random weights: `linears` go through `four_bit`, the rest is
    in bf16.
    """
    for name in [name for name, _ in model.named_modules()]:  # names: what is replaced is freed
        m = model.get_submodule(name)
        if own := list(m.parameters(recurse=False)):
            m.to(torch.bfloat16 if has_bf16(device) else torch.float32).to_empty(
                device=device, recurse=False
            )
            for p in m.parameters(recurse=False):
                nn.init.normal_(p, 1.0 if own[0].dim() == 1 else 0.0, 0.02)
            if name in linears:
                model.set_submodule(name, four_bit(m))


MATRICES = [
    "4096 4096 float32",
    "576 1536 float32",
    "4096 4096 bfloat16",
    "576 1536 bfloat16",
]
# task: (both sides, the unit of work, the cases, measured one after another)
TASKS = {
    "sampling": (sampling, "tokens", [""]),
    "sft": (sft, "tokens", [""]),
    "lora": (training, "tokens", [""]),
    "dpo": (dpo, "tokens", [""]),
    "qlora": (qlora, "tokens", [""]),
    "dequantise": (dequantise, "matrices", MATRICES),
    "qlora7b": (qlora7b, "tokens", [""]),
    "choices": (choices, "records", ["1", "8", "32"]),  # lm-eval's batch sizes
}
PEERS = ("transformers", "peft", "bitsandbytes", "trl")


# ---------------------------------------------------------------- two processes that take turns
def work(setup):
    """One side, in its own process: sets up and prints {"first": …}, then for each number on stdin
    runs that round and prints {"units", "seconds", "peak"}. What libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**words):
        print(json.dumps(words), file=answers, flush=True)

    turn, first = setup()
    say(first=first)
    cuda = torch.cuda.is_initialized()
    for line in sys.stdin:
        start = time.perf_counter()
        units = turn(int(line))
        if cuda:
            torch.cuda.synchronize()
        say(
            units=units,
            seconds=time.perf_counter() - start,
            peak=measured("cuda" if cuda else "cpu"),
        )


def hear(worker) -> dict:
    line = worker.stdout.readline()
    if not line:
        raise ValueError(
            f"a side has ended with exit status {worker.wait()}; its error stands above:"
            f" {' '.join(worker.args[1:])}"
        )
    return json.loads(line)


def alternate(commands: dict, rounds: int) -> dict:
    """{side: command} → {side: [{"units", "seconds", "peak"} of each round]}. The sides set up one
    after another, must agree on `first`, and take turns; who starts changes every round; the first
    round, which warms up, is left out.
    """
    workers, firsts = {}, {}
    try:
        for side, command in commands.items():
            workers[side] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            firsts[side] = hear(workers[side])["first"]
        known = [f for f in firsts.values() if f is not None]
        if known:
            print("first, " + ", ".join(f"{side} {f:.6g}" for side, f in firsts.items()))
        if known and max(known) - min(known) > 1e-3 * abs(max(known)):
            raise ValueError(f"the sides do not compute the same: {firsts}")
        found = {side: [] for side in workers}
        for r in range(rounds + 1):
            for side in sorted(workers, reverse=bool(r % 2)):
                print(r, file=workers[side].stdin, flush=True)
                found[side].append(hear(workers[side]))
    finally:
        for w in workers.values():
            w.stdin.close()
            w.wait()
    return {side: answers[1:] for side, answers in found.items()}


def report(found: dict, unit: str) -> str:
    """Medians, the ratio of the first side to the second with its spread, peak memory."""
    speeds = {side: [a["units"] / a["seconds"] for a in answers] for side, answers in found.items()}
    lines = []
    for side, s in speeds.items():
        peak = found[side][-1]["peak"] / UNIT
        lines.append(f"{side:12s} {statistics.median(s):,.1f} {unit}/s, peak memory {peak:.2f} GB")
    if len(speeds) == 2:
        ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
        middle = statistics.median(ratios)
        lines.append(
            f"ratio        {middle:.2f} of their speed, {1 / middle:.2f} of their time"
            f" (median of {len(ratios)} rounds; speed {min(ratios):.2f} to {max(ratios):.2f})"
        )
    return "\n".join(lines)


def beside(task: str, o):
    _, unit, cases = TASKS[task]
    missing = [p for p in PEERS if not importlib.util.find_spec(p)]
    alone = task == "qlora7b" and (o.limit or missing)
    if missing and not alone:
        raise ValueError(
            f"{task}: needs {' and '.join(missing)}, which this Python lacks; `make bench` has them"
        )
    for case in cases:
        print(" ".join(filter(None, (task, case))), flush=True)
        words = []
        for name, value in vars(o).items():
            if name not in ("case", "side"):
                words += [f"--{name}", str(value)]
        command = [sys.executable, "-m", "tools.bench", task, *words, "--case", case, "--side"]
        sides = {"tinytune": [*command, "ours"]}
        if not alone:
            sides["peers"] = [*command, "theirs"]
        print(report(alternate(sides, o.rounds), unit), flush=True)


# ---------------------------------------------------------------- alone
def weights(*models) -> int:
    """Bytes of the models' weights as allocated; shared ones count once."""
    return sum(
        size
        for what, size in count(*models).items()
        if what == "trained" or what.startswith("frozen")
    )


def memory(o):
    c = hub.read_config(Path(o.model))
    for dtype in (torch.bfloat16, torch.float32):
        with torch.device("meta"):
            # policy, reference, reward model, critic
            models = [Transformer(c).to(dtype) for _ in range(4)]
        names = block_linears(models[0])
        models[2:] = [scalar_model(m.requires_grad_(False)).to("meta") for m in models[2:]]
        small, _ = hub.load(o.model, dtype=dtype, quant="nf4")
        whole, packed = (
            weights(nn.ModuleList(m.get_submodule(n) for n in names)) for m in (models[0], small)
        )
        policy = lora.add_lora(small, RANK, 2 * RANK)
        reference = share(policy).requires_grad_(False)
        reward = lora.add_lora(scalar_model(reference), RANK, 2 * RANK, name="reward")
        critic = share(reward)
        one, four = weights(policy, reference, reward, critic), weights(*models)
        print(
            f"{o.model}'s linear layers: {dtype} {whole:,} bytes, NF4 {packed:,}: ratio"
            f" {whole / packed:.2f}"
        )
        print(
            f"PPO, {dtype}: four models {four:,} bytes, LoRA r = {RANK} over one 4-bit base"
            f" {one:,}: ratio {one / four:.3f}"
        )


ALONE = {"memory": memory, "agree": agree}


def make(words):
    start = time.time()
    subprocess.run(["make", *words], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"make {' '.join(words)}: {(time.time() - start) / 60:.1f} minutes, peak memory {peak:.2f}"
        f" GiB, {os.cpu_count()} cores"
    )


def bench(task: str, o: Options):
    if task in ALONE:
        ALONE[task](o)
    elif o.side:
        work(lambda: TASKS[task][0](o, o.side == "ours"))
    else:
        beside(task, o)


if __name__ == "__main__":
    task = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if task == "make":
        make(sys.argv[1:])
    elif task in (*TASKS, *ALONE):
        main(lambda o: bench(task, o), Options, __doc__)
    elif task in ("", "-h", "--help"):
        sys.exit(__doc__)
    else:
        sys.exit(f"bench.py: no task {task}: {', '.join((*TASKS, *ALONE))} or make was expected")
