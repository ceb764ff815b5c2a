"""PEFT's adapter folders, both ways: adapter_config.json and adapter_model.safetensors.

    save_adapter(model, path)      writes the adapter that lies on the model
    load_adapter(model, path)      puts the folder's adapter on the model

Both do LoRA, IA3, prompt and prefix alike. PEFT reads what is written here. What PEFT writes is
read here, or refused by the name of the setting that is not supported. PEFT wraps a model twice, so
a tensor's name is "base_model.model.", then transformers' name of the layer, then the part.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import adapters
import lora
from common import download
from common.files import hub_name, read_json, write_json
from model import wide

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE = {"lora": "LORA", "ia3": "IA3", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}


def save_adapter(model, path, base=None, name="default"):
    """Writes the model's adapter as a PEFT folder.

    base: the name or folder of the model below the adapter. name: which one, where several LoRA
    adapters lie side by side. ValueError where there is none.
    """
    path = Path(path)
    if lora.adapters(model) or not adapters.parts(model):
        config, tensors = lora_config(model, name), lora_tensors(model, name)
    else:
        config, tensors = light_config(model), state(model)
    config["task_type"] = task_type(model)
    config["base_model_name_or_path"] = base and str(base)
    if origin := download.origin(base):
        config["base_model_name_or_path"], config["revision"] = origin
    config["inference_mode"] = True
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    write_json(path / CONFIG, config)
    # safetensors lets the owner alone read it
    shutil.copymode(path / CONFIG, path / WEIGHTS)


def load_adapter(model, path, name="default", trainable=True):
    """Puts a PEFT folder's adapter on the model and activates it → the model.

    trainable: everything else is frozen. Otherwise the adapter is frozen; LoRA leaves the rest as
    it was, the others freeze it. name: a LoRA adapter's name on the model; the others have none.
    FileNotFoundError where a file is missing; ValueError where a setting is not supported or a
    tensor is not this model's. Both come before anything changes.
    """
    path = Path(path)
    config = read_config(path)
    if config["peft_type"] == "LORA":
        return load_lora(model, path, config, name, trainable)
    return load_light(model, path, config, trainable)


def read_config(path: Path) -> dict:
    """adapter_config.json without its nulls, which are PEFT's defaults."""
    where = path / CONFIG
    if not where.is_file():
        raise FileNotFoundError(
            f"{path} has no {CONFIG}: an adapter's folder was expected, such as PEFT writes"
        )
    config = {k: v for k, v in read_json(where).items() if v is not None}
    if config.get("peft_type") not in PEFT_TYPE.values():
        got = json.dumps(config.get("peft_type"))
        known = ", ".join(PEFT_TYPE.values())
        raise ValueError(f"{where}: peft_type is {got}, one of {known} was expected")
    return config


def read_tensors(file: Path, wanted: dict, model) -> dict:
    """The tensors {name: tensor} of a file, which must be those that are wanted: {name: shape}."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: an adapter's weights were expected there, as PEFT's"
            " save_pretrained() writes them"
        )
    try:
        with safe_open(file, "pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except SafetensorError as e:
        raise ValueError(f"{file} is damaged or no safetensors file ({e}); get it again") from None
    if key("lm_head", "lora_A") in wanted:
        check_head(file, tensors.pop(key("lm_head", "base_layer"), None), model)
    missing, extra = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    for what, names in (("lacks", missing), ("has the unexpected tensor", extra)):
        if names:
            raise ValueError(
                f"{file} {what} {min(names)}: the adapter and this model are not a pair"
            )
    for k, shape in wanted.items():
        t = tensors[k]
        if tuple(t.shape) != shape or not t.is_floating_point():
            raise ValueError(
                f"{file}: {k} is {tuple(t.shape)} in {t.dtype}, floating point of {shape} was"
                " expected"
            )
    return tensors


def check_head(file: Path, theirs, model):
    """PEFT also writes the base of an adapted head: it must be ours, up to rounding to 16 bits."""
    if theirs is None:
        return
    head = getattr(model.lm_head, "base", model.lm_head).weight
    if theirs.shape != head.shape or not torch.allclose(
        wide(theirs), wide(head).cpu(), rtol=0.01, atol=1e-3
    ):
        raise ValueError(
            f"{file}: its lm_head is not this model's: the adapter belongs to another model"
        )


def key(layer: str, part="") -> str:
    """The name in PEFT's file of a layer's weight, or of a part of it: lora_A, lora_B."""
    return "base_model.model." + hub_name(".".join(filter(None, (layer, part, "weight"))))


def task_type(model) -> str:
    return "SEQ_CLS" if model.config.num_labels else "CAUSAL_LM"


# ---------------------------------------------------------------- LoRA
SETTINGS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}  # PEFT's defaults
READ = {*SETTINGS, "peft_type", "target_modules", "exclude_modules", "modules_to_save"}
HARMLESS = {
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "layers_pattern",
    # these matter only where another setting is on, which is refused
    "megatron_core",
    "qalora_group_size",
    "eva_config",
}
OFF = (False, "none", "", [], {})
# of A and B alone; PiSSA, OLoRA, LoftQ and CorDA change the base too
INITS = (True, False, "gaussian", "orthogonal", "eva")


def lora_layers(model, name: str) -> dict:
    """{layer: LoRALinear} of the layers that have this adapter."""
    layers = {n: m for n, m in lora.linears(model).items() if isinstance(m, lora.LoRALinear)}
    layers = {n: m for n, m in layers.items() if name in m.A}
    if not layers:
        there = ", ".join(lora.adapters(model)) or "none"
        raise ValueError(f"the model has no adapter named {name}: it has {there}")
    return layers


def lora_tensors(model, name: str) -> dict:
    """A (r,in) and B (out,r) of each layer, and the scalar head, under PEFT's names, on the CPU."""
    tensors = {}
    for n, layer in lora_layers(model, name).items():
        tensors[key(n, "lora_A")] = layer.A[name]
        tensors[key(n, "lora_B")] = layer.B[name]
    if model.config.num_labels:
        tensors[key("score")] = model.score.weight
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}


def lora_config(model, name: str) -> dict:
    layers = lora_layers(model, name)
    targets = sorted({n.rpartition(".")[2] for n in layers})
    if {n for n in lora.linears(model) if lora.matches(n, targets)} != layers.keys():
        targets = [hub_name(n) for n in layers]  # the short names would mean more layers
    return {
        "peft_type": PEFT_TYPE["lora"],
        **next(iter(layers.values())).settings[name],
        "target_modules": targets,
        "modules_to_save": ["score"] if model.config.num_labels else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def load_lora(model, path: Path, config: dict, name: str, trainable: bool):
    config = SETTINGS | config
    layers = chosen(path / CONFIG, config, model)
    wanted = {}
    for n, layer in layers.items():
        wanted[key(n, "lora_A")] = (config["r"], layer.in_features)
        wanted[key(n, "lora_B")] = (layer.out_features, config["r"])
    if config.get("modules_to_save"):
        wanted[key("score")] = tuple(model.score.weight.shape)
    tensors = read_tensors(path / WEIGHTS, wanted, model)
    pairs = {n: (tensors[key(n, "lora_A")], tensors[key(n, "lora_B")]) for n in layers}
    settings = {k: config[k] for k in SETTINGS}
    return lora.attach(model, name, settings, pairs, tensors.get(key("score")), trainable)


def chosen(where: Path, config: dict, model) -> dict:
    """{layer: module} of the layers that a LoRA config means; a ValueError for a setting that is
    not supported.
    """
    names = {
        "target_modules": config.get("target_modules"),
        "exclude_modules": config.get("exclude_modules") or [],
        "modules_to_save": config.get("modules_to_save") or [],
    }
    for k, v in names.items():
        if not (isinstance(v, str) or isinstance(v, list) and all(isinstance(w, str) for w in v)):
            raise ValueError(f"{where}: {k} is {json.dumps(v)}, names or a pattern were expected")
    for k, v in unsupported(config, model).items():
        raise ValueError(
            f"{where}: {k} = {json.dumps(v)} is not supported for this model: plain LoRA is"
        )
    lora.checked(where, config)
    targets, excluded = names["target_modules"], names["exclude_modules"]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = lora.GROUPS["all"]
    try:
        layers = {n: m for n, m in lora.linears(model).items() if lora.matches(n, targets)}
        layers = {n: m for n, m in layers.items() if not lora.matches(n, excluded)}
    except re.error as e:
        raise ValueError(
            f"{where}: target_modules or exclude_modules is no regular expression ({e})"
        ) from None
    if not layers:
        raise ValueError(
            f"{where}: target_modules = {json.dumps(targets)} means no linear layer of this model"
        )
    return layers


def unsupported(config: dict, model) -> dict:
    """The settings of a LoRA config that would change what is computed, and are not read."""
    found = {k: v for k, v in config.items() if k not in HARMLESS | READ and v not in OFF}
    if found.get("init_lora_weights", True) in INITS:
        found.pop("init_lora_weights", None)
    heads = config.get("modules_to_save") or []
    if model.config.num_labels:  # PEFT itself always adds "classifier"
        heads = [m for m in heads if m not in ("score", "classifier")]
    if heads:
        found["modules_to_save"] = heads
    return found


# ---------------------------------------------------------------- IA3, prompt, prefix
# Settings that change nothing here: a stored prefix is the keys and values, however they were made.
SAID = """
    peft_type base_model_name_or_path revision peft_version auto_mapping inference_mode
    init_ia3_weights num_virtual_tokens init_weights prompt_tuning_init prompt_tuning_init_text
    tokenizer_name_or_path tokenizer_kwargs prefix_projection encoder_hidden_size
"""


def state(model) -> dict:
    """The numbers of an IA3, prompt or prefix under PEFT's names and in its shapes: copies in
    float32 on the CPU.
    """
    tensors = {}
    with torch.no_grad():
        for n, part in adapters.parts(model):
            name = "prompt_embeddings" if n == "virtual" else ia3_key(n)
            tensors[name] = part.stored().to("cpu", torch.float32, copy=True).contiguous()
    return tensors


def ia3_key(layer: str) -> str:
    return f"base_model.model.{hub_name(layer)}.ia3_l"


def light_config(model) -> dict:
    if model.virtual is None:
        return {
            "peft_type": PEFT_TYPE["ia3"],
            "target_modules": adapters.targets(model),
            "feedforward_modules": list(adapters.FEEDFORWARD),
            "fan_in_fan_out": False,
            "modules_to_save": None,
        }
    kind = type(model.virtual).__name__.lower()
    start = {"prompt_tuning_init": "RANDOM"} if kind == "prompt" else {"prefix_projection": False}
    return {
        "peft_type": PEFT_TYPE[kind],
        "num_virtual_tokens": model.virtual.tokens,
        **shape_of(model.config, kind),
        **start,
    }


def shape_of(c, kind: str) -> dict:
    """A model's shape in PEFT's config. A prefix token is as wide as the key/value heads, not as
    the hidden state.
    """
    heads = c.num_attention_heads if kind == "prompt" else c.num_key_value_heads
    return {
        "num_layers": c.num_hidden_layers,
        "num_attention_heads": heads,
        "token_dim": c.hidden_size if kind == "prompt" else heads * c.head_dim,
        "num_transformer_submodules": 1,
    }


def load_light(model, path: Path, config: dict, trainable: bool):
    adapters.check(model, loading=True)
    kind = next(k for k, v in PEFT_TYPE.items() if v == config["peft_type"])
    check_light(path / CONFIG, config, kind, model)
    tensors = read_tensors(path / WEIGHTS, light_shapes(model, kind, config), model)
    tensors = {k: v.to(model.device, torch.float32) for k, v in tensors.items()}
    model.requires_grad_(False)
    if kind == "ia3":
        for name, layer in adapters.parts(adapters.wrap(model)):
            layer.scale.data = tensors[ia3_key(name)].flatten()
    else:
        virtual = adapters.Prompt if kind == "prompt" else adapters.Prefix
        model.virtual = virtual(tensors["prompt_embeddings"])
    return model if trainable else model.requires_grad_(False)


def light_shapes(model, kind: str, config: dict) -> dict:
    """{name: shape} of the tensors in the folder."""
    if kind == "ia3":
        return {
            ia3_key(n): (1, m.in_features)
            if n.endswith(adapters.FEEDFORWARD)
            else (m.out_features, 1)
            for n, m in adapters.scaled(model)
        }
    c = model.config
    width = c.hidden_size if kind == "prompt" else adapters.width(c)
    return {"prompt_embeddings": (config["num_virtual_tokens"], width)}


def check_light(where: Path, config: dict, kind: str, model):
    """ValueError for a setting that is not supported, or is not this model's."""
    known = {"task_type": task_type(model)}
    if kind == "ia3":
        known["target_modules"] = sorted(adapters.targets(model))
        known["feedforward_modules"] = sorted(adapters.FEEDFORWARD)
    else:
        known |= shape_of(model.config, kind)
    for k, v in config.items():
        got = sorted(map(str, v)) if isinstance(v, list) else v
        if k in known and got != known[k]:
            raise ValueError(
                f"{where}: {k} is {json.dumps(v)}, {json.dumps(known[k])} was expected of an"
                " adapter for this model"
            )
        if v and k not in known and k not in SAID.split():
            raise ValueError(f"{where}: {k} = {json.dumps(v)} is not supported")
    tokens = config.get("num_virtual_tokens")
    if kind != "ia3" and (type(tokens) is not int or not 0 < tokens < model.context):
        raise ValueError(
            f"{where}: num_virtual_tokens is {json.dumps(tokens)}, a number from 1 to"
            f" {model.context - 1} was expected"
        )
