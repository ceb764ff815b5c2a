"""How fast and how large, beside the peers.

    python -m tools.bench TASK        (make bench has the peers)

    sampling     generate beside transformers': 128 ragged prompts, answers of up to 40 tokens that
                 end where they end
    sft          a training step, every weight, beside a careful loop over transformers: ours packs,
                 theirs pads; in both the head runs on the targets' places alone
    lora         a training step, LoRA on every linear layer, beside a loop over PEFT: ours packs,
                 theirs pads
    qlora        the same on NF4, double-quantised, beside PEFT and bitsandbytes
    dpo          a DPO step, every weight, on pairs of --data, beside TRL's DPOTrainer; both have
                 the reference's log-probabilities from before
    dequantise   double-quantised weights of two sizes and types, beside bitsandbytes
    choices      the first 100 records {query, choices, gold} of --data, beside lm-eval at several
                 batch sizes
    agree        alone: the same choices as lm-eval's in 200 such records, but for ties within 1e-4
    memory       alone, counted: --model's linear layers in bf16 and NF4; PPO's four networks over
                 one 4-bit base and as four models
    make …       alone: minutes and the largest process's peak memory of a make command, as in
                 `python -m tools.bench make all OUT=out/timed`

Each side is a process of its own, both of the same interpreter, and they take turns, so that a busy
machine is busy for both; the first round warms up. Both have the same weights, adapters and data,
and must start at the same loss. Where the peers are not installed, ours runs alone.

With --size the model is random, of that shape, and so are the sequences, all of --length tokens:
nothing is left to pad or to pack. A tensor's name decides its numbers, on both sides alike.

On a GPU both sides work as they do elsewhere: trained weights and adapters are float32 under bf16
autocast, frozen ones and those that sample bf16, where there is bf16; optimizer (fused AdamW) and
TF32 (off) are the same; transformers has sdpa attention, and samples with its dynamic or its static
cache, for which it compiles the model, whichever is faster there. Ours compiles as the stages do,
from 100 M parameters on (--compile off: it does not).

Beside the speed stands what it is a share of: for training, the arithmetic that a step needs
(tools/mfu.py; of DPO's prompts, once) per second, over that of one large matrix product; for
dequantise and sampling, the bytes that must be read and written (weights once a token, and the keys
and values of all before it), over those of a large copy. Both limits are measured by each side
before it starts. Memory is the rounds' peak on a GPU, elsewhere the process's.
"""

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

import dpo as preferences
import lora
from common import compiled, files, hub
from common.memory import SIZES, UNIT, count, measured, nf4_bytes, shape
from common.run import adamw, autocast, has_bf16, main, opt, pick_device
from data import records, templates
from data.tokenizer import Tokenizer
from metrics import multiple_choice
from model import Transformer, scalar_model, share
from packing import SHORTEST
from paged import PagedAdamW
from quant import Linear4bit, block_linears, quantize_nf4, tables
from sampling import generate
from sft import count_targets, pack, sft_loss
from tools import mfu, peers

SIZES = SIZES | {"tiny": shape(500, 64, 96, 2, 4, 2, 16)}  # runs without a GPU too
RANK, LR = 16, 1e-4


@dataclass
class Options:
    model: str = opt("smollm2", "checkpoint folder; with --size only DPO's tokenizer", hub="all")
    size: str = opt("", "a random model of this shape, not --model", choices=("", *SIZES))
    data: str = opt(
        "out/world/sft.jsonl", "conversations; for sampling, those that end in a user's turn"
    )
    batch: int = opt(
        0, "conversations or pairs per training step, 0: 8; prompts, 0: 128", at_least=0
    )
    length: int = opt(
        1024, "tokens of a sequence; for sampling, of a prompt", needs="size", at_least=4
    )
    tokens: int = opt(40, "sampling: tokens of an answer, at most", at_least=1)
    rank: int = opt(RANK, "of LoRA", at_least=1)
    checkpointing: bool = opt(False, "recompute each block in the backward pass")
    compile: str = opt(
        "auto", "torch.compile for ours, as in a stage", choices=("auto", "on", "off")
    )
    limit: float = opt(
        0.0, "GB of GPU memory that ours may use, alone and paged; 0: all", at_least=0
    )
    rounds: int = opt(10, "rounds after the first", at_least=1)
    device: str = opt("auto", "cpu, cuda or auto")
    case: str = opt("", "which case of the task this is (set by the parent)")
    side: str = opt(
        "", "which side this process is (set by the parent)", choices=("", "ours", "theirs")
    )


# ---------------------------------------------------------------- what both sides are given
def config(o):
    return SIZES[o.size] if o.size else hub.read_config(Path(o.model))


def random_ids(o, *shape) -> list:
    seeded = torch.Generator().manual_seed(0)
    return torch.randint(SIZES[o.size].vocab_size, shape, generator=seeded).tolist()


def conversations(o) -> list:
    """[(ids, labels), …]; random ones are targets from end to end."""
    if o.size:
        return [(ids, ids) for ids in random_ids(o, o.batch or 8, o.length)]
    tok = Tokenizer.load(Path(o.model))
    templates.adopt(tok)
    read = records.batch(records.conversations(o.data), 0, o.batch or 8, 0)
    return [templates.render(tok, r["messages"]) for r in read]


def pairs(o) -> list:
    """[(prompt, chosen, rejected), …]; each random part is half of --length."""
    if o.size:
        return [tuple(parts) for parts in random_ids(o, o.batch or 8, 3, o.length // 2)]
    tok, found = Tokenizer.load(Path(o.model)), records.pairs(o.data, "best_worst")
    found = records.batch(found, 0, o.batch or 8, 0)
    read = [templates.ranked_ids(tok, r, (r["chosen"], r["rejected"])) for r in found]
    return [(prompt, *answers) for prompt, answers in read]


def prompts(o):
    """→ prompts, those of --data over and over, and the id that ends an answer, or None."""
    n = o.batch or 128
    if o.size:
        return random_ids(o, n, o.length), None
    tok, found = Tokenizer.load(Path(o.model)), records.conversations(o.data, "prompt")
    asked = [found[i % len(found)]["messages"] for i in range(n)]
    read = [templates.render(tok, turns, add_generation_prompt=True)[0] for turns in asked]
    return read, templates.end_id(tok)


def load(o, ours: bool, device, dtype, quant=None):
    """The model of either side, its blocks' linear layers in 4 bits with quant="nf4"."""
    if not ours:
        if o.size:
            return peers.random(config(o), device, dtype, quant)
        peer = peers.load(o.model, dtype, device)
        return peers.quantise(peer, dtype) if quant else peer
    if not o.size:
        return hub.load(o.model, device, dtype, quant)[0]
    with torch.device("meta"):
        model = Transformer(config(o))
    return mfu.build(model, device, dtype, block_linears(model) if quant else (), Linear4bit)


def alike(model):
    """Fills the trained tensors, A before B in each layer on both sides, with the same random
    numbers: B is not 0, so that both count.
    """
    seeded = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn(p.shape, generator=seeded) * 0.02)
    return model


def prepare(o, ours: bool, model):
    """A side's model for training, as the options say."""
    if not ours:
        return peers.prepare(model, o.checkpointing)
    model.checkpointing = o.checkpointing
    if compiled.wanted(o.compile, model.device, model.config):
        compiled.compile_model(model, dynamic=None)
    return model


# ---------------------------------------------------------------- the sides
# each sets up → (a round: its number → units of work, and FLOPs or bytes that it needs; a number
# that both sides must agree on)
def step(o, model, loss_of, device, tokens: int, flops: float):
    """A training step as a round."""
    optimizer = adamw(model, LR, paged=bool(o.limit))

    def turn(_):
        with autocast(device):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return tokens, flops

    with autocast(device):  # with its gradient, as in a round: else one more code is compiled
        return turn, loss_of(model).item()


def training(o, ours: bool, kind: str):
    """A step as sft.py does it, or as a loop over transformers or PEFT is written by hand."""
    device, examples = pick_device(o.device), conversations(o)
    lengths, targets = [len(ids) for ids, _ in examples], count_targets(examples)
    frozen = kind != "weights"
    dtype = mfu.working(device) if frozen else torch.float32
    model = load(o, ours, device, dtype, "nf4" if kind == "qlora" else None)
    if ours:
        if frozen:
            alike(lora.add_lora(model, o.rank, 2 * o.rank))
        packed = pack(examples, max(SHORTEST, *lengths))
        loss = lambda m: sft_loss(m, *packed) / targets  # noqa: E731
    elif frozen:
        model = alike(peers.peft(model, o.rank))
        loss = peers.own_loss(examples, device)
    else:
        loss = peers.careful_loss(examples, device)
    flops = mfu.step_flops(config(o), lengths, targets, frozen)
    return step(o, prepare(o, ours, model), loss, device, sum(lengths), flops)


def dpo(o, ours: bool):
    """Its number is the loss under a reference that prefers each rejected answer by one nat."""
    device, found = pick_device(o.device), pairs(o)
    model = load(o, True, device, torch.float32)
    with torch.no_grad():
        chosen, rejected, *_ = preferences.sums(model, found)
    if ours:

        def loss(m):
            policy = preferences.sums(m, found)[:2]
            return preferences.preference_loss(*policy, chosen, rejected + 1.0, 0.1)[0].mean()
    else:
        del model
        model = load(o, False, device, torch.float32)
        model, loss = peers.trl(model, o.model, found, chosen, rejected + 1.0, device)
    c, asked = config(o), [len(prompt) for prompt, *_ in found]
    both = [len(prompt) + len(a) for prompt, *answers in found for a in answers]
    flops = mfu.step_flops(c, both, sum(both) - 2 * sum(asked)) - mfu.step_flops(c, asked, 0)
    return step(o, prepare(o, ours, model), loss, device, sum(both), flops)


def sampling(o, ours: bool):
    device, (asked, end) = pick_device(o.device), prompts(o)
    dtype, c = mfu.working(device), config(o)
    model = load(o, ours, device, dtype)
    if ours:
        answers = lambda seed: generate(model, asked, o.tokens, eos_id=end, seed=seed)  # noqa: E731
    else:
        answers = peers.sampler(model, asked, o.tokens, end)
    column = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # keys and values

    def turn(seed):
        found = answers(seed)
        ends = [(len(p), len(p) + len(a)) for p, a in zip(asked, found, strict=True)]
        columns = sum(end * (end + 1) - start * (start + 1) for start, end in ends) // 2
        numbers = max(map(len, found)) * mfu.matrices(c, 1) + columns * column
        return sum(map(len, found)), numbers * dtype.itemsize

    return turn, None


def dequantise(o, ours: bool):
    device, (rows, columns, dtype) = pick_device(o.device), o.case.split()
    seeded = torch.Generator().manual_seed(0)
    weight = torch.randn(int(rows), int(columns), generator=seeded)
    weight = weight.to(device, getattr(torch, dtype)) * 0.02
    whole = quantize_nf4(weight).dequantize if ours else peers.nf4(weight)
    if ours and device.type == "cuda":  # as in a block that is compiled
        tables(device)
        whole = torch.compile(whole, backend=compiled.inductor)
    times = -(-(2 ** (28 if device.type == "cpu" else 32)) // weight.numel())
    moved = weight.nbytes + sum(nf4_bytes(weight.numel()).values())

    def turn(_):
        for _ in range(times):
            whole()
        return times, times * moved

    return turn, whole().double().abs().sum().item()


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
        theirs = peers.lm_eval(o.model, o.data, len(items), int(o.case), device)

        def turn():
            return [lls for lls, *_ in theirs()]

    right = [lls[item["gold"]] for lls, item in zip(turn(), items, strict=True)]
    return lambda _: (len(turn()), 0), sum(right) / len(right)


def agree(o):
    device, items = pick_device(o.device), some_choices(o, 200)
    ours = multiple_choice(*hub.load(o.model, device), items)
    theirs = peers.lm_eval(o.model, o.data, len(items), o.batch or 8, device)()
    pairs = [zip(a["logprobs"], b, strict=True) for a, (b, *_) in zip(ours, theirs, strict=True)]
    worst = max(abs(a - b) for pair in pairs for a, b in pair)
    print(f"{o.data}, {len(items)} records: log-likelihoods differ by {worst:.1g} at most")
    if others := other_choices(items, ours, theirs):
        raise ValueError(f"{o.data}: lm-eval chooses otherwise in the records {others}")
    print("lm-eval makes the same choices by both scorings")


MATRICES = [
    "4096 4096 float32",
    "576 1536 float32",
    "4096 4096 bfloat16",
    "576 1536 bfloat16",
]
RANDOM = ("sampling", "sft", "lora", "qlora", "dpo")  # tasks that --size is for
# task: both sides, the unit of work, what its limit is counted in, the peers that it needs
TASKS = {
    "sampling": (sampling, "tokens", "B", ["transformers"]),
    "sft": (partial(training, kind="weights"), "tokens", "FLOP", ["transformers"]),
    "lora": (partial(training, kind="lora"), "tokens", "FLOP", ["peft"]),
    "qlora": (partial(training, kind="qlora"), "tokens", "FLOP", ["peft", "bitsandbytes"]),
    "dpo": (dpo, "tokens", "FLOP", ["trl"]),
    "dequantise": (dequantise, "matrices", "B", ["bitsandbytes"]),
    "choices": (choices, "records", "", ["lm_eval"]),
}
# the cases of a task, measured one after another; of choices, lm-eval's batch sizes
CASES = {"dequantise": MATRICES, "choices": ["1", "8", "32"]}
RATES = {"FLOP": mfu.matrix_rate, "B": mfu.copy_rate}


# ---------------------------------------------------------------- two processes that take turns
def work(setup, rate=None):
    """One side, in its own process: measures the rate that is its limit, sets up and prints
    {"first": …, "rounding": …}, then for each number on stdin runs that round and prints {"units",
    "seconds", "peak", "needed", "limit"}. What libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**words):
        print(json.dumps(words), file=answers, flush=True)

    limit = rate() if rate else 0
    turn, first = setup()
    cuda = torch.cuda.is_initialized()
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        PagedAdamW.most = 0
    say(first=first, rounding=2e-2 if has_bf16(device) else 1e-3)
    for line in sys.stdin:
        start = time.perf_counter()
        units, needed = turn(int(line))
        mfu.wait(device)
        seconds = time.perf_counter() - start
        say(units=units, seconds=seconds, peak=measured(device), needed=needed, limit=limit)


def hear(worker) -> dict:
    line = worker.stdout.readline()
    if not line:
        raise ValueError(
            f"a side has ended with exit status {worker.wait()}; its error stands above:"
            f" {' '.join(worker.args[1:])}"
        )
    return json.loads(line)


def compare(said: dict):
    """ValueError where what each side says first differs by more than rounding."""
    firsts = {side: s["first"] for side, s in said.items() if s["first"] is not None}
    if firsts:
        print("first, " + ", ".join(f"{side} {f:.6g}" for side, f in firsts.items()))
        one, *others = firsts.values()
        rounding = max(s["rounding"] for s in said.values()) * abs(one)
        if not all(abs(f - one) <= rounding for f in others):  # nan is near to nothing
            raise ValueError(f"the sides do not compute the same: {firsts}")


def alternate(commands: dict, rounds: int) -> dict:
    """{side: command} → {side: [what work() says of each round]}. The sides set up one after
    another, must agree on `first` but for rounding, and take turns; who starts changes every round;
    the first round, which warms up, is left out.
    """
    workers, said = {}, {}
    try:
        for side, command in commands.items():
            workers[side] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            said[side] = hear(workers[side])
        compare(said)
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


def report(found: dict, unit: str, of="") -> str:
    """Medians, the share of the limit, counted in `of`, and memory of each side; the ratio of the
    first one's speed to the second's, with its spread.
    """
    speeds = {side: [a["units"] / a["seconds"] for a in answers] for side, answers in found.items()}
    limit, lines = max(a["limit"] for answers in found.values() for a in answers), []
    for side, s in speeds.items():
        line = f"{side:12s} {statistics.median(s):,.1f} {unit}/s"
        if of:
            rate = statistics.median(a["needed"] / a["seconds"] for a in found[side])
            line += f", {rate / limit:.1%} of {limit / 1e12:.3g} T{of}/s"
        lines.append(f"{line}, peak memory {found[side][-1]['peak'] / UNIT:.2f} GB")
    if len(speeds) == 2:
        ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
        middle = statistics.median(ratios)
        lines.append(
            f"ratio        {middle:.2f} of their speed, {1 / middle:.2f} of their time"
            f" (median of {len(ratios)} rounds; speed {min(ratios):.2f} to {max(ratios):.2f})"
        )
    return "\n".join(lines)


def beside(task: str, o):
    _, unit, of, needed = TASKS[task]
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        print(f"alone: this Python lacks {' and '.join(missing)}; make bench has the peers")
    for case in CASES.get(task, [""]):
        print(" ".join(filter(None, (task, o.size, case))), flush=True)
        words = []
        for name, value in vars(o).items():
            if name not in ("case", "side") and value is not False:
                words += [f"--{name}"] + [str(value)] * (value is not True)
        command = [sys.executable, "-m", "tools.bench", task, *words, "--case", case, "--side"]
        sides = {"tinytune": [*command, "ours"]}
        if not missing and not o.limit:
            sides["peers"] = [*command, "theirs"]
        print(report(alternate(sides, o.rounds), unit, of), flush=True)


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


def side(task: str, o):
    """One of a task's two sides, in this process."""
    device, (sides, _, of, _) = pick_device(o.device), TASKS[task]
    if o.limit and device.type == "cuda":
        share_of_gpu = o.limit * UNIT / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share_of_gpu), device)
    work(lambda: sides(o, o.side == "ours"), partial(RATES[of], device) if of else None)


def bench(task: str, o: Options):
    if o.size and task not in RANDOM:
        raise ValueError(f"--size {o.size}: {task} has no random model; {', '.join(RANDOM)} have")
    if task in ALONE:
        ALONE[task](o)
    elif o.side:
        side(task, o)
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
