"""LoRA: a frozen linear layer learns a low-rank change beside it (Hu et al. 2021, equation 3).

    y = W x + s B A x        A (r,in), B (out,r);  s = α/r, or α/√r (rsLoRA: Kalajdzievski 2023)

B starts at zero: a model with a fresh adapter is the model without it, bit for bit, and the first
step moves B alone. A and B are float32 whatever W is: bf16, or 4-bit (QLoRA: Dettmers et al. 2023).
Several adapters can lie side by side on one model. use() switches between them; use(model, None) is
the bare base: DPO's and PPO's reference. model.share() makes further models over the same frozen
weights. A layer that the active adapter does not have computes its base alone. Dropout follows
train() and eval(), as everywhere in torch.
"""

import difflib
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.files import hub_name
from model import wide

GROUPS = {  # of their layers a model has those of its family
    "attention": ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "gate_up_proj", "down_proj"],
}
GROUPS["all"] = GROUPS["attention"] + GROUPS["mlp"]


class LoRALinear(nn.Module):
    """A linear layer, nn.Linear or 4-bit, as `base`, and its adapters by name; `active` names the
    one in use.
    """

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.active = None
        self.in_features, self.out_features = base.in_features, base.out_features
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()  # (r,in), (out,r)
        self.settings = {}  # of each adapter, under PEFT's names

    def scale(self):
        s = self.settings[self.active]
        return s["lora_alpha"] / (s["r"] ** 0.5 if s["use_rslora"] else s["r"])

    def forward(self, x):
        y = self.base(x)
        if self.active not in self.A:
            return y
        A, B = self.A[self.active], self.B[self.active]
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype)
        x = F.dropout(x, self.settings[self.active]["lora_dropout"], self.training)
        return (y + F.linear(F.linear(x, A) * self.scale(), B)).to(y.dtype)


# -- add, switch, merge


def add_lora(
    model, rank, alpha, targets="all", dropout=0.0, rslora=False, name="default", generator=None
):
    """Puts a fresh adapter on the linear layers that `targets` names, activates it, and freezes
    everything else → the model.

    targets: attention, mlp, all (both), lm_head, names of modules (q_proj, layers.0.mlp.up_proj),
    or several of these, as a list or with commas. A scalar model's `score` head is trained in full
    beside the adapter. ValueError for an unknown target, with the nearest one.
    """
    settings = checked(
        "add_lora", dict(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora)
    )
    layers = targeted(model, targets)
    most = max((min(m.in_features, m.out_features) for m in layers.values()), default=0)
    if rank > most:
        raise ValueError(f"add_lora: r is {rank}: these layers have ranks up to {most}, give fewer")
    fresh = {}
    for n, layer in layers.items():
        A = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(A, a=5**0.5, generator=generator)
        fresh[n] = A, torch.zeros(layer.out_features, rank)
    return attach(model, name, settings, fresh)


def targeted(model, targets) -> dict:
    """{name: layer} of the layers that add_lora's `targets` names."""
    words = targets.split(",") if isinstance(targets, str) else targets
    layers = linears(model)
    there = {n.rpartition(".")[2] for n in layers}
    groups = {name: [w for w in group if w in there] for name, group in GROUPS.items()}
    words = [w for word in words for w in groups.get(word.strip(), [word.strip()])]
    for word in words:
        if not any(matches(n, [word]) for n in layers):
            known = [*GROUPS, *dict.fromkeys(n.rpartition(".")[2] for n in layers), *layers]
            near = difflib.get_close_matches(word, known, 1, 0)[0]
            given = f"add_lora: targets names {word!r}"
            raise ValueError(f"{given}, no linear layer of this model (did you mean {near}?)")
    return {n: layer for n, layer in layers.items() if matches(n, words)}


def attach(model, name: str, settings: dict, tensors: dict, score=None, trainable=True):
    """Puts an adapter's tensors {layer: (A, B)} on the layers and activates it → the model.

    score: the scalar head that goes with it, by default the model's own.
    """
    if "." in name or not name:
        raise ValueError(f"an adapter's name is {name!r}: one without a dot was expected")
    if name in adapters(model):
        raise ValueError(f"the model has an adapter named {name} already: give another name")
    if trainable:
        model.requires_grad_(False)
        score = model.score.weight if model.config.num_labels and score is None else score
    layers = linears(model)
    for n, (A, B) in tensors.items():
        layer = layers[n]
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer).train(model.training)
            model.set_submodule(n, layer)
        layer.A[name], layer.B[name] = (
            nn.Parameter(t.to(model.device, torch.float32), trainable) for t in (A, B)
        )
        layer.settings[name] = settings
    if score is not None:  # a new parameter: another model may share the old one
        model.score.weight = nn.Parameter(
            score.detach().to(model.device, torch.float32, copy=True), trainable
        )
    use(model, name)
    return model


def checked(where, settings: dict) -> dict:
    """An adapter's settings, under PEFT's names; a ValueError for one that is out of range."""
    for k, kinds, fits, what in (
        ("r", int, lambda v: v >= 1, "a whole number from 1"),
        ("lora_alpha", (int, float), lambda v: 0 < v < float("inf"), "a number above 0"),
        ("lora_dropout", (int, float), lambda v: 0 <= v < 1, "a number from 0, below 1"),
        ("use_rslora", bool, lambda v: True, "true or false"),
    ):
        v = settings[k]
        if not isinstance(v, kinds) or isinstance(v, bool) != (kinds is bool) or not fits(v):
            raise ValueError(f"{where}: {k} is {v!r}, {what} was expected")
    return settings


def linears(model) -> dict:
    """{name: layer} of the layers that an adapter can lie on: every linear one but the scalar head,
    a wrapped one as its LoRALinear.
    """
    found = {}
    for n, m in model.named_modules():
        linear = isinstance(m, nn.Linear | LoRALinear) or hasattr(m, "dequantize")
        if linear and n != "score" and not n.endswith(".base"):
            found[n] = m
    return found


def matches(layer: str, wanted) -> bool:
    """Whether PEFT's target_modules name this layer: a pattern matches the whole of transformers'
    name; a list holds that name or its last parts.
    """
    layer = hub_name(layer)
    if isinstance(wanted, str):
        return bool(re.fullmatch(wanted, layer))
    return any(("." + layer).endswith("." + w) for w in wanted)


def adapters(model) -> list[str]:
    """The names of the adapters on a model, in the order in which they were added."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    return list(dict.fromkeys(name for m in layers for name in m.A))


def use(model, name: str | None):
    """Activates an adapter; None: the bare base. A scalar head stays as it is."""
    there = adapters(model)
    if name is not None and name not in there:
        has = ", ".join(there) or "none"
        raise ValueError(f"the model has no adapter named {name}: it has {has}")
    for m in model.modules():
        if isinstance(m, LoRALinear):
            m.active = name


@torch.no_grad()
def merge(model):
    """Merges the adapter in use into the weights, W + s B A in float32, then rounded once to W's
    dtype → the model, of plain linear layers.

    Quantised weights are dequantised first; other adapters are dropped. A tied head with an adapter
    is untied. IA3's layers merge themselves. Prints the drift: how far the merged model's logits
    over a fixed page of random tokens are from those before.

    A GPU that trained a model in 4 bits may have no room for it in 16. So the layers are merged one
    by one on the host, each frees what it replaces, and for the drift they visit the GPU one at a
    time. The model ends on the host, and so does all that it shares with another model.
    """
    if adapters(model) and not any(m.active for m in model.modules() if isinstance(m, LoRALinear)):
        names = ", ".join(adapters(model))
        raise ValueError(f"merge: no adapter is in use: call use(model, name) with one of {names}")
    c, training = model.config, model.training
    seeded = torch.Generator().manual_seed(0)
    page = torch.randint(c.vocab_size, (1, min(256, c.max_position_embeddings)), generator=seeded)
    page = page.to(model.device)
    before = wide(model.eval()(page))  # (1,T,V), a scalar model's (1,T)
    hooks = []
    # names, not layers: a list of layers would keep alive what is replaced
    for n in [*linears(model), *(n for n, m in model.named_modules() if hasattr(m, "merged"))]:
        new = merged(model.get_submodule(n))
        model.set_submodule(n, new)
        hooks += visits(new, page.device)
        if n == "lm_head" and c.tie_word_embeddings and new.weight is not model.embed_tokens.weight:
            c.tie_word_embeddings = False
            print("merged: the head has an adapter, the embedding none: they are untied now")
    drift = (wide(model(page)) - before).abs()
    for hook in hooks:
        hook.remove()
    what = "scores" if c.num_labels else "logits"
    most, mean = f"{drift.max():.2g}", f"{drift.mean():.2g}"
    print(f"merged: {what} of {page.numel()} tokens differ by at most {most}, {mean} on average")
    return model.cpu().train(training)


def merged(layer) -> nn.Linear:
    """The plain linear layer that does what this one does with its adapter in use: new and on the
    host, or the layer itself where there is nothing to merge.
    """
    if hasattr(layer, "merged"):
        return layer.merged()
    base = layer.base if isinstance(layer, LoRALinear) else layer
    weight = base.dequantize() if hasattr(base, "dequantize") else base.weight
    if base is not layer and layer.active in layer.A:
        weight = weight.cpu()
        A, B = layer.A[layer.active].cpu(), layer.B[layer.active].cpu()
        delta = layer.scale() * wide(B) @ wide(A)
        weight = (wide(weight) + delta).to(weight.dtype)
    elif isinstance(base, nn.Linear):
        return base
    new = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    new.weight, new.bias = nn.Parameter(weight.cpu(), False), base.bias
    return new


def visits(layer, device):
    """Moves a layer to the device for each call and back to the host after it → the hooks."""

    def move(to):
        def hook(*_):
            layer.to(to)

        return hook

    return layer.register_forward_pre_hook(move(device)), layer.register_forward_hook(move("cpu"))
