"""What a stage trains, chosen once, before its loop: every weight, or an adapter on a frozen base, which may be 4-bit.

    model, tok = tuning.start(o, device)       what --model names, as the options ask
    …                                          the loop trains what wants a gradient, and never asks what that is
    tuning.save(o, path, model, tok)           OUT is a plain checkpoint, the adapter merged into it; OUT/adapter the adapter alone

A stage starts from the merged checkpoint of the one before it: a new adapter lies on a base that has learnt what came before. With
--keep-base it starts from the base, as it was, and goes on with the adapter. Then all stages share one base, PPO's four networks hold it in
memory once, and a 4-bit base is never rounded again: merged weights are not on the 4-bit grid, and another quantisation would undo part
of what was learnt.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

import adapters
import hub
import lora
import memory
from data.tokenizer import Tokenizer
from model import scalar_model, share
from quant import Linear4bit
from train import has_bf16, opt

KINDS = tuple(adapters.PEFT_TYPE)
LORA_LR = 5  # LoRA's rate over the weights' own, by single runs (RESULTS.md); Schulman et al. 2025 find about ten


@dataclass
class Tuning:
    """The options that say what is trained; each stage's own ones follow."""

    lora: int = opt(0, "rank of LoRA on the frozen weights; 0: every weight is trained", at_least=0)
    alpha: float = opt(0.0, "LoRA's α, its change counts α/rank; 0: twice the rank", needs="lora", at_least=0)
    targets: str = opt("all", "layers with LoRA: attention, mlp, all, lm_head (where a turn ends in a new token), modules; with commas",
                       needs="lora")  # fmt: skip
    quant: str = opt("none", "the frozen weights in 4 bits", choices=("none", "nf4"))
    paged: bool = opt(False, "optimizer state in pages that move to the CPU when the GPU is full")
    checkpointing: bool = opt(False, "keep each block's input alone and compute the rest again in the backward pass")
    keep_base: bool = opt(False, "go on with the adapter of --model on the base below it, not from the two merged")


def kind(o) -> str:
    """What is trained: "weights", "lora" or one of KINDS."""
    adapter = getattr(o, "adapter", "none")
    return "lora" if o.lora or o.keep_base else adapter if adapter != "none" else "weights"


def check(o):
    """ValueError for options that do not go together."""
    if kind(o) == "weights" and o.quant != "none":
        raise ValueError(f"--quant {o.quant}: 4-bit weights cannot be trained; give --lora R (or --keep-base) too")
    if o.keep_base and o.lora:
        raise ValueError("--keep-base goes on with the adapter that is there, --lora makes a new one: give one of them")
    if getattr(o, "adapter", "none") != "none" and (o.lora or o.keep_base):
        raise ValueError(f"--adapter {o.adapter} stands for itself: leave --lora and --keep-base out")


def learning_rate(o, weights: float) -> float:
    """--lr, or where that is 0 what fits what is trained."""
    return o.lr or {"weights": weights, "lora": LORA_LR * weights, **adapters.LEARNING_RATE}[kind(o)]


# ---------------------------------------------------------------- checkpoint folders
load = hub.language_model


def base_of(path) -> str:
    """The folder of the model that the adapter of a stage's folder lies on."""
    file = Path(path) / "adapter" / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no adapter: --keep-base goes on with one; train it with --lora, or leave --keep-base out")
    base = hub.read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{file}: base_model_name_or_path is {json.dumps(base)}: the folder of the model that "
            "the adapter lies on was expected; write it there, or leave --keep-base out"
        )
    return base


def inputs(o) -> list[str]:
    """The folders that a run of a stage reads its model from."""
    check(o)
    return [o.model, *([base_of(o.model)] if o.keep_base else [])]


def start(o, device):
    """The stage's model and tokenizer; what is to be trained wants a gradient, and nothing else.

    Dropout, which an adapter of --model may have, is off: a log-probability, a score, a ratio is
    the whole model's, not a random part's, or policy and reference differ before the first step.
    Only sft.py turns it on.
    """
    quant, frozen = (None if o.quant == "none" else o.quant), kind(o) != "weights"
    dtype = torch.bfloat16 if frozen and has_bf16(device) else torch.float32
    if not o.keep_base:
        model, tok = load(o.model, device, dtype, quant)
        if not frozen and in_4_bits(model):
            raise ValueError(
                f"{o.model} is in 4 bits (bitsandbytes), which cannot be trained; give --lora R"
            )
        if model.virtual is not None and kind(o) != "weights":
            raise ValueError(f"{o.model} has a prompt or prefix before it: another adapter does not go with it")
        return tune(o, model, tok).eval(), tok
    model, tok = hub.load(base_of(o.model), device, dtype, quant)[0], Tokenizer.load(Path(o.model))
    model.config.eos_token_id = hub.read_config(Path(o.model)).eos_token_id
    lora.load_adapter(model, f"{o.model}/adapter")
    model.checkpointing = o.checkpointing
    return model.eval(), tok


def in_4_bits(model) -> bool:
    return any(isinstance(m, Linear4bit) for m in model.modules())


NO_HEAD = (
    "the adapter lies on lm_head alone, which a reward model and a critic lack: it must lie on "
    "other layers too (--targets all,lm_head)"
)


def tune(o, model, tok=None):
    """Adds the adapter that the options ask for, and freezes the rest. → the model"""
    if kind(o) == "lora":
        targets = [t for t in o.targets.split(",") if t.strip() != "lm_head" or not model.config.num_labels]  # a critic has none
        if not targets:
            raise ValueError(NO_HEAD)
        lora.add_lora(model, o.lora, o.alpha or 2 * o.lora, targets)
    elif kind(o) in KINDS:
        adapters.add_adapter(model, kind(o), o.virtual_tokens, tokenizer=tok)
    model.checkpointing = o.checkpointing
    return model


def reward_model(o, path, reference, device):
    """PPO's reward model: a folder, or with --keep-base its adapter on the reference's base. What a critic will train wants a gradient."""
    if not o.keep_base:  # with --lora it stays frozen, in the dtype of the policy's base
        dtype = reference.embed_tokens.weight.dtype if o.lora else torch.float32
        return hub.load(path, device, dtype, None if o.quant == "none" else o.quant)
    if Path(base_of(path)).resolve() != Path(base_of(o.model)).resolve():
        raise ValueError(f"--keep-base: {path} lies on {base_of(path)}, {o.model} on {base_of(o.model)}: one base was expected")
    model, said = scalar_model(reference), hub.read_config(Path(path))
    model.config.reward_mean, model.config.reward_std = said.reward_mean, said.reward_std
    return lora.load_adapter(model, f"{path}/adapter", name="reward"), Tokenizer.load(Path(path))


def check_spread(where, mean: float, std: float):
    """ValueError where the scores of a reward model's reference answers differ by rounding alone:
    PPO divides by their deviation."""
    if not std > max(1e-6, 1e-4 * abs(mean)):
        raise ValueError(
            f"{where}: the scores of the reference answers do not differ (deviation {std:.1g}, "
            f"mean {mean:.3g}), and PPO divides by it; run reward.py with others, or a lower --lr"
        )


def critic_of(o, reward):
    """A network that starts as the reward model, which is frozen from here on, and trains what the policy trains."""
    if o.lora:
        return tune(o, share(reward.requires_grad_(False)))
    if not o.keep_base and in_4_bits(reward):
        raise ValueError(
            "the reward model is in 4 bits (bitsandbytes), and a critic that starts from it would "
            "train every weight; give --lora R"
        )
    critic = share(reward)
    reward.requires_grad_(False)
    return critic


def save(o, path, model, tok):
    """A plain checkpoint, and beside it in path/adapter what was trained, if that was an adapter.
    A base in 4 bits is written dequantised, in the type that it was loaded in. A prompt or prefix
    is no change of the weights: its folder is the one place where it is."""
    folder = path / "adapter"
    if names := lora.adapters(model):
        lora.save_adapter(model, folder, base_of(o.model) if o.keep_base else o.model, names[0])
    elif adapters.parts(model):
        adapters.save_adapter(model, folder, o.model)
    if in_4_bits(model) or any(hasattr(m, "base") for m in model.modules()):
        lora.merge(model)
    hub.save(path, model, tok)


# ---------------------------------------------------------------- for programs that train nothing
@dataclass(kw_only=True)
class Reading:
    """The options of a program that answers or scores: it holds a model as the stages hold it."""

    quant: str = opt("none", "the weights in 4 bits", choices=("none", "nf4"))
    keep_base: bool = opt(False, "the adapter on the base below it, not the two merged")


def read(o, path, device, reward=False):
    """A language model's folder, or a reward model's → model and tokenizer, frozen, in bf16 on a GPU that
    has it. With --keep-base the adapter in path/adapter lies on its own base, 4-bit with --quant nf4:
    to quantise the merged weights would undo part of what was learnt."""
    quant = None if o.quant == "none" else o.quant
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    model, tok = (on_base if o.keep_base else hub.load)(path, device, dtype, quant)
    if reward and not model.config.num_labels:
        raise ValueError(f"{path} is a language model: a reward model was expected, such as reward.py writes")
    if not reward:
        hub.expect_language_model(path, model, tok)
    return model.requires_grad_(False).eval(), tok


def on_base(path, device, dtype, quant):
    """The adapter in path/adapter on the model below it, whatever its kind. → model, tokenizer"""
    folder, config, tok = Path(path) / "adapter", hub.read_config(Path(path)), Tokenizer.load(path)
    model = hub.load(base_of(path), device, dtype, quant)[0].requires_grad_(False)
    if config.num_labels:
        model = scalar_model(model)
    for key in ("eos_token_id", "reward_mean", "reward_std"):
        setattr(model.config, key, getattr(config, key))
    is_lora = hub.read_json(folder / "adapter_config.json").get("peft_type") == "LORA"
    return (lora if is_lora else adapters).load_adapter(model, folder, trainable=False), tok


# ---------------------------------------------------------------- what is said about it
class Watch:
    """The memory table before the loop; after it the memory that was really used, and the adapters that have not moved."""

    def __init__(self, o, device, models: list, tokens: float, targets: float, length=128):
        """models: all that the stage holds, the trained one first; of a pass: tokens, targets, and how long packed rows are."""
        first, self.device = models[0], device
        for model in models if kind(o) == "lora" else []:  # before the first step, not at the save
            if any(p.requires_grad for p in model.parameters()) and not lora.adapters(model):
                raise ValueError(NO_HEAD)
        self.model, self.start = first, lora.trained(first) if kind(o) != "weights" else None
        rows, c, dtype = memory.count(*models), first.config, first.embed_tokens.weight.dtype
        adapted = {n.rpartition(".")[2]: m.settings[m.active]["r"] for n, m in first.named_modules() if isinstance(m, lora.LoRALinear)}
        rank = max(adapted.values(), default=int(kind(o) != "weights"))
        how = dict(rank=rank, targets=list(adapted), dtype=dtype, quant=None if o.quant == "none" else o.quant)
        rows["activations (estimate)"] = memory.activations(c, int(tokens), length, **how, autocast=has_bf16(device),
                                                            checkpointing=o.checkpointing, gpu=device.type == "cuda")  # fmt: skip
        rows["logits (estimate)"] = memory.logits(c, int(targets))
        print(memory.table(rows, c))

    def finish(self):
        print(f"memory: {memory.measured(self.device) / memory.UNIT:.2f} GB at most" + (
            "" if self.device.type == "cuda" else ", with Python and its libraries"))  # fmt: skip
        still = lora.unmoved(self.model, self.start) if self.start else []
        if 0 < len(still) < len(self.start):  # where nothing moved no step was left to make
            print(f"warning: {len(still)} of the adapter's tensors have not moved ({still[0]}): are they used?")
