"""The lighter adapters: a frozen model, 4-bit or not, steered by a few learned numbers. PEFT
folders both ways.

    IA3             k = l_k ⊙ (W_k x), v = l_v ⊙ (W_v x), down(l_ff ⊙ silu(gate x) * up x); every l is 1 at the start      Liu et al. 2022
    prompt tuning   P learned embeddings stand before every row's own                                              Lester et al. 2021
    prefix tuning   P learned keys and values stand before every row's own, in every layer                        Li & Liang 2021

Prompt and prefix are one thing to the model: a past that all rows share, a pair of keys and values
a layer (model.virtual). A prompt's is computed from its embeddings by the model itself, exactly as
if they stood in front, for they come first and nothing sees ahead. A prefix's keys are learned as
they are compared, without RoPE; the real tokens' positions start at P with both.
"""

import shutil
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file

from common.files import hub_name, read_json, write_json
from lora import read_tensors
from model import wide
from sampling import Cache

# Peak learning rates for AdamW, which moves a number by about the learning rate a step whatever its
# gradient. IA3's factors start at 1 and must move by tenths, in a few hundred steps here (Liu et
# al.: 3e-3 in thousands); a prompt must leave its words and is felt through every layer alone
# (PEFT's examples: 3e-2; Lester et al. 0.3, with Adafactor); a prefix is moved by all of its MLP's
# inputs at once, in every layer (Li & Liang: 5e-5). Chosen among a few by short single runs on
# SmolLM2.
LEARNING_RATE = {"ia3": 3e-2, "prompt": 3e-2, "prefix": 5e-4}
PEFT_TYPE = {"ia3": "IA3", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
SCALED, FEEDFORWARD = ("k_proj", "v_proj", "down_proj"), ("down_proj",)


class IA3Linear(nn.Module):
    """A linear layer with a learned factor on each output, l ⊙ (W x + b), or (feedforward) on each
    input, W (l ⊙ x) + b.
    """

    def __init__(self, base, feedforward: bool, device):
        super().__init__()
        self.base, self.feedforward = base, feedforward
        self.scale = nn.Parameter(
            torch.ones(base.in_features if feedforward else base.out_features, device=device)
        )

    def forward(self, x):
        if self.feedforward:
            return self.base((x * self.scale).to(x.dtype))
        y = self.base(x)
        return (y * self.scale).to(y.dtype)

    def stored(self):
        """The factors as PEFT stores them: (out,1) or (1,in), which is also how they multiply the
        weight.
        """
        return self.scale[None] if self.feedforward else self.scale[:, None]

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that does the same, on the host, multiplied in float32.
        A factor on the outputs is one on the bias too."""
        weight, bias = (
            self.base.weight if isinstance(self.base, nn.Linear) else self.base.dequantize(),
            self.base.bias,
        )
        weight, scale = weight.cpu(), self.scale.cpu()
        new = nn.Linear(*weight.shape[::-1], bias is not None, "cpu", weight.dtype)
        new.requires_grad_(False)
        new.weight.copy_(wide(weight) * self.stored().cpu())
        if bias is not None:
            new.bias.copy_(bias if self.feedforward else wide(bias.cpu()) * scale)
        return new


class Prompt(nn.Module):
    """P virtual tokens given by their embeddings, rows (P,D)."""

    def __init__(self, rows):
        super().__init__()
        self.tokens, self.rows = len(rows), nn.Parameter(rows)

    def stored(self):
        return self.rows

    def past(self, model):
        """Keys and values of the P embeddings: a pair (1,kv_heads,P,head_dim) a layer, with their
        gradient.
        """
        cache, positions = (
            Cache(model, 1, self.tokens),
            torch.arange(self.tokens, device=model.device)[None],
        )
        model.blocks(self.rows[None].to(model.embed_tokens.weight.dtype), positions, cache=cache)
        return cache.kv


class Prefix(nn.Module):
    """P virtual tokens given by their keys and values: rows (P, layers · 2 · kv_heads · head_dim),
    key before value in each layer.

    With the reparametrisation (Li & Liang, section 4.3) the rows are (P,D), and an MLP that all
    share makes of them what is added to the keys and values of the start; both serve the training
    alone and are dropped when the adapter is saved.
    """

    def __init__(self, rows, start=None, mlp=None):
        super().__init__()
        self.tokens, self.rows, self.mlp = len(rows), nn.Parameter(rows), mlp
        self.register_buffer("start", start, persistent=False)

    def stored(self):
        return self.rows if self.mlp is None else self.start + self.mlp(self.rows)

    def past(self, model):
        c = model.config
        kv = (
            self.stored()
            .view(self.tokens, c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
            .permute(1, 2, 3, 0, 4)
        )
        return [(k[None], v[None]) for k, v in kv]


@torch.no_grad()
def add_adapter(
    model, kind: str, tokens=20, text=None, tokenizer=None, reparametrise=True, generator=None
):
    """Freezes the model and gives it a float32 adapter to train: "ia3", or "prompt" or "prefix" of
    `tokens` virtual tokens.

    A prompt starts as embeddings drawn from the vocabulary, or as a text's (repeated or cut to
    `tokens`); random numbers would lie far from all embeddings. A prefix starts as the keys and
    values of the same, with `reparametrise` too: the MLP's last layer starts at 0 (PEFT's starts at
    random, and the model with it far from where it was). generator: a CPU one, which decides what
    is drawn. ValueError where that is impossible. → the model
    """
    check(model)
    if kind not in PEFT_TYPE:
        raise ValueError(f"{kind!r} is no kind of adapter: {', '.join(PEFT_TYPE)} are")
    if kind != "ia3" and not 0 < tokens < model.context:
        raise ValueError(
            f"{tokens} virtual tokens were asked for: the model's context leaves room for 1 to"
            f" {model.context - 1}"
        )
    if text is not None and kind == "ia3":
        raise ValueError("a text starts a prompt or a prefix: give no text")
    if kind == "ia3":
        return wrap(model.requires_grad_(False))
    c = model.config
    ids = (
        torch.randint(c.vocab_size, (tokens,), generator=generator).tolist()
        if text is None
        else tokenizer.encode(text)
    )
    if not ids:
        raise ValueError("the text that starts a prompt is empty")
    model.requires_grad_(False)
    virtual = Prompt(
        wide(model.embed_tokens(torch.tensor((ids * tokens)[:tokens], device=model.device)))
    )
    if kind == "prefix":
        # (layers, 2, kv_heads, P, head_dim)
        kv = torch.stack([torch.cat(pair) for pair in virtual.past(model)])
        start = wide(kv.permute(3, 0, 1, 2, 4).flatten(1))
        virtual = Prefix(start)
    if kind == "prefix" and reparametrise:
        D = c.hidden_size
        mlp = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, width(c))).to(model.device)
        # nn.Linear's own distribution, drawn from the generator; zeros
        for layer, bound in ((mlp[0], D**-0.5), (mlp[2], 0.0)):
            for p in layer.parameters():
                p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        virtual = Prefix(torch.randn(tokens, D, generator=generator).to(model.device), start, mlp)
    model.virtual = virtual
    return model


def check(model, loading=False):
    """ValueError where a model cannot take an adapter of this kind. A reward model is given none,
    but may have been made from a model that has one."""
    if model.config.num_labels and not loading:
        raise ValueError(
            "IA3, prompts and prefixes are for language models: this one has a scalar head"
        )
    if parts(model):
        raise ValueError("the model has an adapter already: merge it, or load the model anew")


def width(c) -> int:
    """Numbers in a prefix token: a key and a value for each layer and key/value head."""
    return c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim


def linears(model) -> list:
    """(name, module) of the key, value and down projections."""
    return [(n, m) for n, m in model.named_modules() if n.endswith(SCALED)]


def wrap(model):
    """IA3 around them, all factors 1. → the model"""
    for name, base in linears(model):
        put(model, name, IA3Linear(base, name.endswith(FEEDFORWARD), model.device))
    return model


def put(model, name: str, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def parts(model):
    """(name, module) of what was added to the model: its IA3 layers, or its prompt or prefix."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, IA3Linear | Prompt | Prefix)]


def state(model) -> dict:
    """The adapter's numbers as PEFT names and shapes them, copies in float32 on the CPU."""
    with torch.no_grad():
        found = {
            "prompt_embeddings" if n == "virtual" else ia3_key(n): m.stored()
            for n, m in parts(model)
        }
        return {k: v.to("cpu", torch.float32, copy=True).contiguous() for k, v in found.items()}


def ia3_key(name: str) -> str:
    return f"base_model.model.{hub_name(name)}.ia3_l"


# ---------------------------------------------------------------- PEFT folders
def save_adapter(model, path, base=None):
    """Writes adapter_config.json and adapter_model.safetensors as PEFT does. base: the folder or
    hub name of the model.
    """
    c, path, tensors = model.config, Path(path), state(model)
    if not tensors:
        raise ValueError(f"{path}: the model has no IA3, prompt or prefix to save")
    kind = type(model.virtual).__name__.lower() if model.virtual is not None else "ia3"
    said = {"peft_type": PEFT_TYPE[kind], "task_type": task_type(model), "inference_mode": True}
    said |= {"base_model_name_or_path": base and str(base)}
    if kind == "ia3":
        said |= {
            "target_modules": list(SCALED),
            "feedforward_modules": list(FEEDFORWARD),
            "fan_in_fan_out": False,
            "modules_to_save": None,
        }
    else:
        said |= shape_of(c, kind) | {"num_virtual_tokens": model.virtual.tokens}
        said |= (
            {"prompt_tuning_init": "RANDOM"} if kind == "prompt" else {"prefix_projection": False}
        )
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    write_json(path / "adapter_config.json", said)
    # safetensors makes it the owner's alone
    shutil.copymode(path / "adapter_config.json", path / "adapter_model.safetensors")


def task_type(model) -> str:
    return "SEQ_CLS" if model.config.num_labels else "CAUSAL_LM"


def shape_of(c, kind: str) -> dict:
    """What PEFT's config says of the model: a prefix token is as wide as the key/value heads, not
    as the hidden state.
    """
    heads = c.num_attention_heads if kind == "prompt" else c.num_key_value_heads
    size = c.hidden_size if kind == "prompt" else heads * c.head_dim
    return {
        "num_layers": c.num_hidden_layers,
        "num_attention_heads": heads,
        "token_dim": size,
        "num_transformer_submodules": 1,
    }


def load_adapter(model, path, trainable=True):
    """Reads a PEFT folder into the model, which is frozen; the adapter too where not `trainable`. →
    the model

    FileNotFoundError or ValueError, before anything changes, where a file is missing, asks for what
    we lack, or is another model's.
    """
    check(model, loading=True)
    path = Path(path)
    kind, tokens = read_config(path, model)
    if kind == "ia3":
        shapes = {
            ia3_key(n): (1, m.in_features) if n.endswith(FEEDFORWARD) else (m.out_features, 1)
            for n, m in linears(model)
        }
    else:
        shapes = {
            "prompt_embeddings": (
                tokens,
                model.config.hidden_size if kind == "prompt" else width(model.config),
            )
        }
    tensors = {
        k: v.to(model.device, torch.float32)
        for k, v in read_tensors(path / "adapter_model.safetensors", shapes, model).items()
    }
    model.requires_grad_(False)
    if kind == "ia3":
        for name, module in parts(wrap(model)):
            module.scale.data = tensors[ia3_key(name)].flatten()
    else:
        model.virtual = {"prompt": Prompt, "prefix": Prefix}[kind](tensors["prompt_embeddings"])
    return model if trainable else model.requires_grad_(False)


# What a config may say without changing what is computed here (a stored prefix is the keys and
# values, however they were made).
SAID = (
    "peft_type base_model_name_or_path revision peft_version auto_mapping inference_mode"
    " init_ia3_weights num_virtual_tokens"
)
SAID += (
    " init_weights prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path"
    " tokenizer_kwargs"
)
SAID += " prefix_projection encoder_hidden_size"


def read_config(path: Path, model) -> tuple[str, int]:
    """adapter_config.json → the kind and the number of virtual tokens. Refuses by name whatever it
    asks for and we lack.
    """
    where = path / "adapter_config.json"
    if not where.is_file():
        raise FileNotFoundError(
            f"{where} is missing: a PEFT folder (adapter_config.json, adapter_model.safetensors)"
            " was expected"
        )
    said = read_json(where)
    kind = next((k for k, v in PEFT_TYPE.items() if v == said.get("peft_type")), None)
    if kind is None:
        raise ValueError(
            f"{where}: peft_type is {said.get('peft_type')!r}, one of"
            f" {', '.join(PEFT_TYPE.values())} was expected"
        )
    ia3 = {"target_modules": sorted(SCALED), "feedforward_modules": sorted(FEEDFORWARD)}
    known = {"task_type": task_type(model)} | (
        ia3 if kind == "ia3" else shape_of(model.config, kind)
    )
    for key, value in said.items():
        if key in known and (sorted(map(str, value)) if isinstance(value, list) else value) not in (
            known[key],
            None,
        ):
            raise ValueError(
                f"{where}: {key} is {value!r}, {known[key]!r} was expected of an adapter for this"
                " model"
            )
        if value and key not in known and key not in SAID.split():
            raise ValueError(f"{where} asks for {key} = {value!r}, which tinytune does not know")
    tokens = said.get("num_virtual_tokens")
    if kind != "ia3" and (type(tokens) is not int or not 0 < tokens < model.context):
        raise ValueError(
            f"{where}: num_virtual_tokens is {tokens!r}, a number from 1 to {model.context - 1} was"
            " expected"
        )
    return kind, tokens
