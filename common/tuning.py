"""What a stage trains, chosen once, before its loop: every weight, or an adapter on a frozen base,
which may be 4-bit.

    model, tok = tuning.start(o, device)          --model, prepared as the options say
    report = tuning.Report(o, device, [model])    before the run's state is restored
    report.batch(tokens=…, targets=…)             in the loop: prints the memory table, once
    report.finish()                               after the loop
    tuning.save(o, path, model, tok)              path: a plain checkpoint, adapter merged;
                                                  path/adapter: the adapter alone

Only trainable parameters require grad, so the loop never asks which they are.

A stage starts from the merged checkpoint of the stage before it: a new adapter lies on a base that
has learnt what came before. With --keep-base it starts from the untouched base and trains the
earlier stage's adapter further. Then all stages share one base, PPO's four networks hold it in
memory once, and a 4-bit base is never rounded again: merged weights are not on the 4-bit grid, so
quantising them again would undo part of what was learnt.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import adapters
import lora
from common import compiled, download, hub, memory, peft
from common.run import SCHEDULES, has_bf16, load_function, opt
from data import templates
from data.tokenizer import Tokenizer
from metrics import deviation, running
from model import Block, scalar_model, share
from quant import Linear4bit

KINDS = adapters.KINDS
# LoRA's learning rate over the weights', by single runs (RESULTS.md); Schulman et al. 2025 find
# about ten
LORA_LR = 5


@dataclass
class Tuning:
    """The options that choose what is trained; each stage adds its own."""

    lora: int = opt(0, "rank of LoRA on the frozen weights; 0: train every weight", at_least=0)
    alpha: float = opt(
        0.0, "LoRA's α: its change is scaled by α/rank; 0: twice the rank", needs="lora", at_least=0
    )
    targets: str = opt(
        "all",
        "layers with LoRA, separated by commas: attention, mlp, all, lm_head (needed where a turn"
        " ends in a new token), names of modules",
        needs="lora",
    )
    quant: str = opt("none", "keep the frozen weights in 4 bits", choices=("none", "nf4"))
    paged: bool = opt(False, "optimizer state in pages that move to the CPU when the GPU is full")
    checkpointing: bool = opt(
        False, "keep only each block's input and recompute the rest in the backward pass"
    )
    compile: str = opt(
        "auto",
        "torch.compile for the blocks and the head; auto: on a GPU, from 100 M parameters on",
        choices=("auto", "on", "off"),
    )
    keep_base: bool = opt(
        False, "train --model's own adapter further, on its base, not a merged copy of the two"
    )
    allow_dropped: bool = opt(
        False, "go on where more than 5 % of the records are odd, such as with an empty turn"
    )
    allow_markers: bool = opt(
        False, "train on records with chat formats' markers in their text, such as [INST]"
    )
    schedule: str = opt(
        "linear",
        "learning rate after --warmup: down to 0 along a line or half a cosine, or constant",
        choices=SCHEDULES,
    )

    def settled(self, device) -> dict:
        """What --compile comes to: compiled code rounds elsewhere, so a run is known by it."""
        config = hub.read_config(Path(self.model))
        return dict(compile="on" if compiled.wanted(self.compile, device, config) else "off")


def kind(o) -> str:
    """What is trained: "weights", "lora" or one of KINDS."""
    adapter = getattr(o, "adapter", "none")
    return "lora" if o.lora or o.keep_base else adapter if adapter != "none" else "weights"


def allowed(o, tok=None) -> dict:
    """What the readers of records let pass, by its keywords there. tok: whose chat format may write
    tool calls."""
    written = () if tok is None else templates.of(tok).calls
    return dict(allow_dropped=o.allow_dropped, allow_markers=o.allow_markers, written=written)


def check(o):
    """ValueError for options that do not go together."""
    if kind(o) == "weights" and o.quant != "none":
        raise ValueError(
            f"--quant {o.quant}: 4-bit weights cannot be trained; give --lora R (or"
            " --keep-base) too"
        )
    if o.keep_base and o.lora:
        raise ValueError(
            "--keep-base goes on with the adapter that is there, --lora makes a new one: give one"
            " of them"
        )
    if getattr(o, "adapter", "none") != "none" and (o.lora or o.keep_base):
        raise ValueError(
            f"--adapter {o.adapter} stands for itself: leave --lora and --keep-base out"
        )


def learning_rate(o, weights: float) -> float:
    """--lr; where that is 0, the default for what is trained. weights: the one for all weights."""
    defaults = {"weights": weights, "lora": LORA_LR * weights, **adapters.LEARNING_RATE}
    return o.lr or defaults[kind(o)]


def quantisation(o) -> str | None:
    return None if o.quant == "none" else o.quant


# ---------------------------------------------------------------- checkpoint folders
load = hub.language_model


def base_of(path) -> str:
    """The folder of the model that the adapter of a stage's folder lies on."""
    file = Path(path) / "adapter" / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no adapter: --keep-base goes on with one; train it with --lora, or leave"
            " --keep-base out"
        )
    config = hub.read_json(file)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{file}: base_model_name_or_path is {json.dumps(base)}: the folder of the adapter's"
            " base was expected; write it there, or leave --keep-base out"
        )
    if revision and not Path(base).exists():
        base = f"{base}@{revision}"
    return download.folder(base)


def expect_lora(path):
    """ValueError where a stage's folder has another adapter than LoRA: --keep-base trains no
    other.
    """
    file = Path(path) / "adapter" / "adapter_config.json"
    found = hub.read_json(file).get("peft_type")
    if found != "LORA":
        raise ValueError(f"{file}: peft_type is {json.dumps(found)}, LORA was expected")


def inputs(o) -> list[str]:
    """The folders from which a run reads its model, and the benchmark that it watches."""
    check(o)
    watched = getattr(o, "watch", "")
    return [o.model, *([base_of(o.model)] if o.keep_base else []), *([watched] if watched else [])]


def start(o, device):
    """The stage's model and tokenizer. Only trainable parameters require grad.

    Dropout, which an adapter of --model may have, is off: log-probabilities, scores and ratios are
    those of the whole model, not of a random part of it, or policy and reference would differ
    before the first step. Only sft.py turns it on.
    """
    quant, frozen = quantisation(o), kind(o) != "weights"
    if o.paged and device.type == "cpu":
        print("--paged has no effect on a CPU, whose memory is one", file=sys.stderr)
    if device.type == "cuda" and not has_bf16(device):
        print("this GPU has no bf16: all is computed and held in float32", file=sys.stderr)
    dtype = torch.bfloat16 if frozen and has_bf16(device) else torch.float32
    if not o.keep_base:
        model, tok = load(o.model, device, dtype, quant)
        if not frozen and in_4_bits(model):
            raise ValueError(
                f"{o.model} is in 4 bits (bitsandbytes), which cannot be trained; give --lora R"
            )
        if frozen and model.virtual is not None:
            raise ValueError(
                f"{o.model} starts with a prompt or prefix: it cannot take another adapter"
            )
        return ready(o, tune(o, model, tok), device), tok
    model, _ = hub.load(base_of(o.model), device, dtype, quant)
    tok = Tokenizer.load(Path(o.model))
    model.config.eos_token_id = hub.read_config(Path(o.model)).eos_token_id
    expect_lora(o.model)
    peft.load_adapter(model, f"{o.model}/adapter")
    model.checkpointing = o.checkpointing
    return ready(o, model, device), tok


def ready(o, model, device):
    """The model, compiled where --compile says so, without dropout."""
    if compiled.wanted(o.compile, device, model.config):
        compiled.compile_model(model)
    return model.eval()


def in_4_bits(model) -> bool:
    return any(isinstance(m, Linear4bit) for m in model.modules())


NO_HEAD = (
    "the adapter lies on lm_head alone, which a reward model and a critic do not have: it must lie"
    " on other layers too (--targets all,lm_head)"
)


def tune(o, model, tok=None):
    """Adds the adapter that the options choose and freezes the rest → the model."""
    if kind(o) == "lora":
        targets = o.targets.split(",")
        if model.config.num_labels:  # a critic has no lm_head
            targets = [t for t in targets if t.strip() != "lm_head"]
        if not targets:
            raise ValueError(NO_HEAD)
        lora.add_lora(model, o.lora, o.alpha or 2 * o.lora, targets)
    elif kind(o) in KINDS:
        adapters.add_adapter(model, kind(o), o.virtual_tokens, tokenizer=tok)
    model.checkpointing = o.checkpointing
    return model


def reward_model(o, path, reference, tok):
    """A reward model for PPO: a folder, or with --keep-base its adapter on the reference's base.

    The parameters that a critic started from it would train require grad. ValueError where it is a
    language model, of another vocabulary than tok, or scores all its reference answers alike.
    """
    if o.keep_base:
        model, own = on_shared_base(o, path, reference)
    else:  # with --lora it stays frozen, in the dtype of the policy's base
        dtype = reference.embed_tokens.weight.dtype if o.lora else torch.float32
        model, own = hub.load(path, reference.device, dtype, quantisation(o))
        model.block = reference.block  # compiled, or not
    if not model.config.num_labels:
        expected = "a reward model (reward.py) or FILE.py:function was expected"
        raise ValueError(f"--reward {path}: a language model; {expected}")
    if own is None or own.hash != tok.hash:
        advice = "train it on the same model (reward.py --model)"
        raise ValueError(f"--reward {path}: its vocabulary is not the policy's; {advice}")
    check_spread(f"--reward {path}", model.config.reward_mean, model.config.reward_std)
    return model


def own_reward(o, seen: list):
    """--reward FILE.py:function → a scorer for PPO (ppo.load_reward). Scores are divided by the
    deviation of all so far, kept in `seen`; an answer without an end does not count there: its
    score is not used. ValueError for a score that is not finite.
    """
    judge = load_function(o.reward)

    def scorer(_prompts, _answers, texts, found, finished):
        scores = judge([r["messages"] for r in found], texts, found)
        scores = torch.tensor(scores).to(finished.device)
        if not scores.isfinite().all():
            raise ValueError(f"--reward {o.reward}: a score is not finite in float32")
        if not o.raw_reward:
            seen[:] = running(seen, scores[finished])
        return scores if o.raw_reward else scores / deviation(seen)

    return scorer


def on_shared_base(o, path, reference):
    """A reward model's adapter on the base that the reference lies on → model, tokenizer."""
    theirs, ours = base_of(path), base_of(o.model)
    if Path(theirs).resolve() != Path(ours).resolve():
        bases = f"{path} lies on {theirs}, {o.model} on {ours}"
        raise ValueError(f"--keep-base: {bases}: one base was expected")
    model, config = scalar_model(reference), hub.read_config(Path(path))
    model.config.reward_mean, model.config.reward_std = config.reward_mean, config.reward_std
    expect_lora(path)
    return peft.load_adapter(model, f"{path}/adapter", name="reward"), Tokenizer.load(Path(path))


def check_spread(where, mean: float, std: float):
    """ValueError where the scores of the reference answers differ by rounding alone: PPO divides by
    their standard deviation.
    """
    if not std > max(1e-6, 1e-4 * abs(mean)):
        raise ValueError(
            f"{where}: the scores of the reference answers do not differ (deviation {std:.1g}, mean"
            f" {mean:.3g}), and PPO divides by their deviation; run reward.py with other"
            " answers, or a lower --lr"
        )


def critic_of(o, reward, reference, tok):
    """A network that starts as the frozen reward model and trains what the policy trains."""
    if o.lora:
        return tune(o, share(reward))
    if not o.keep_base and in_4_bits(reward):
        starts = "a critic that starts from it would train every weight"
        raise ValueError(
            f"the reward model is in 4 bits (bitsandbytes), and {starts}; give --lora R"
        )
    return reward_model(o, o.reward, reference, tok)


def save(o, path, model, tok):
    """Writes a plain checkpoint, and the adapter, if one was trained, into path/adapter.

    A 4-bit base is written dequantised, in the dtype that it was loaded with. A prompt or prefix
    does not change the weights: it is in path/adapter alone.
    """
    folder = path / "adapter"
    if names := lora.adapters(model):
        peft.save_adapter(model, folder, base_of(o.model) if o.keep_base else o.model, names[0])
    elif adapters.parts(model):
        peft.save_adapter(model, folder, o.model)
    if in_4_bits(model) or any(hasattr(m, "base") for m in model.modules()):
        model.block = Block.__call__  # its layers move and are read: nothing is compiled for that
        lora.merge(model)
    hub.save(path, model, tok)


# ---------------------------------------------------------------- for programs that train nothing
@dataclass(kw_only=True)
class Reading:
    """The options of a program that answers or scores: it loads a model as the stages do."""

    quant: str = opt("none", "keep the weights in 4 bits", choices=("none", "nf4"))
    keep_base: bool = opt(False, "read the adapter on its base, not a merged copy of the two")


def read(o, path, device, reward=False):
    """A language model's folder, or with `reward` a reward model's → model and tokenizer, frozen,
    in bf16 on a GPU that has it.

    With --keep-base the adapter in path/adapter lies on its own base, 4-bit with --quant nf4:
    quantising the merged weights would undo part of what was learnt.
    """
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    model, tok = (on_base if o.keep_base else hub.load)(path, device, dtype, quantisation(o))
    if reward and not model.config.num_labels:
        raise ValueError(
            f"{path} is a language model: a reward model was expected, such as reward.py writes"
        )
    if not reward:
        hub.expect_language_model(path, model, tok)
    return model.requires_grad_(False).eval(), tok


def on_base(path, device, dtype, quant):
    """The adapter in path/adapter, of any kind, on its base → model and tokenizer."""
    config, tok = hub.read_config(Path(path)), Tokenizer.load(path)
    model, _ = hub.load(base_of(path), device, dtype, quant)
    model.requires_grad_(False)
    if config.num_labels:
        model = scalar_model(model)
    for key in ("eos_token_id", "reward_mean", "reward_std"):
        setattr(model.config, key, getattr(config, key))
    return peft.load_adapter(model, Path(path) / "adapter", trainable=False), tok


# ---------------------------------------------------------------- what a run prints about it
class Report:
    """The memory table, measured from the first micro-batch; after the loop the memory that was
    used, and the adapter's tensors that have not moved.

    Made before the run's state is restored: an adapter has moved if it differs from what it was
    then, however often the run was interrupted.
    """

    def __init__(self, o, device, models: list):
        """models: all that the stage holds, the trained one first."""
        self.o, self.device, self.models = o, device, models
        for model in models if kind(o) == "lora" else []:  # before the first step, not at the save
            if any(p.requires_grad for p in model.parameters()) and not lora.adapters(model):
                raise ValueError(NO_HEAD)
        self.before = trained(models[0]) if kind(o) != "weights" else {}
        self.shown = False

    def batch(self, tokens: int, targets: int, length=128, cached=0):
        """Prints the memory table of a step's fullest moment, the first time that it is called.

        tokens, targets: of one forward and backward pass; length: of its packed rows; cached:
        columns of a sampler's cache, of all rows.
        """
        if self.shown:
            return
        self.shown = True
        learning = [m for m in self.models if any(p.requires_grad for p in m.parameters())]
        shape = dict(tokens=tokens, length=length, target_tokens=targets)
        passes = [shape | self.way(model) for model in learning]
        first = passes[0]
        size = 2 if first["autocast"] else first["dtype"].itemsize
        again = getattr(self.o, "accumulate", 1) > 1
        cache = memory.cache(first["c"], cached, size)
        rows = memory.fullest(memory.count(*self.models), *passes, again=again, cache=cache)
        estimated = ("activations", "logits", "keys and values", "workspaces")
        rows = {f"{k} (estimate)" if k in estimated else k: n for k, n in rows.items()}
        print("the fullest moment of a step; 0: not there yet, or no longer")
        print(memory.table(rows, self.models[0].config))

    def way(self, model) -> dict:
        """How a network is trained, as memory.contents() asks for it."""
        ranks = {
            n.rpartition(".")[2]: m.settings[m.active]["r"]
            for n, m in model.named_modules()
            if isinstance(m, lora.LoRALinear)
        }
        return dict(
            c=model.config,
            rank=max(ranks.values(), default=int(kind(self.o) != "weights")),
            targets=list(ranks),
            dtype=model.embed_tokens.weight.dtype,
            quant="nf4" if in_4_bits(model) else None,
            autocast=has_bf16(self.device),
            checkpointing=self.o.checkpointing,
            gpu=self.device.type == "cuda",
            masked=True,
        )

    def finish(self):
        used = memory.measured(self.device) / memory.UNIT
        whole = "" if self.device.type == "cuda" else ", with Python and its libraries"
        print(f"memory: {used:.2f} GB at most{whole}")
        still = unmoved(self.models[0], self.before) if self.before else []
        first = getattr(self.o, "steps", 2) == 1  # of LoRA, which has no gradient for A: B is 0
        if still and not first:
            print(
                f"warning: {len(still)} of the adapter's tensors have not moved ({still[0]}): are"
                " they used?"
            )


def trained(model) -> dict:
    """Copies of the trained parameters, on the host, for unmoved()."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.detach().to("cpu", copy=True) for n, p in found.items()}


def unmoved(model, before: dict) -> list[str]:
    """The trained parameters that are what they were in `before`, trained() of the model then."""
    now = trained(model)
    return [n for n, p in now.items() if torch.equal(p, before[n])]
