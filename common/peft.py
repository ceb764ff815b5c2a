"""PEFT's adapter folders, both ways: adapter_config.json and adapter_model.safetensors."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import adapters
import lora
from common.files import hub_name, read_json, write_json
from model import wide

PEFT_TYPE = {"ia3": "IA3", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}


def save_adapter(model, path, base=None, name="default"):
    """Writes the adapter on a model as PEFT's folder; base: the name or folder of the model that it belongs to."""
    if lora.adapters(model) or not adapters.parts(model):
        save_lora(model, path, base, name)
    else:
        save_light(model, path, base)


def load_adapter(model, path, name="default", trainable=True):
    """Puts a PEFT folder's adapter on the model → the model."""
    file = Path(path) / "adapter_config.json"
    if file.is_file() and read_json(file).get("peft_type") in PEFT_TYPE.values():
        return load_light(model, path, trainable)
    return load_lora(model, path, name, trainable)


# -- LoRA

# of A and B alone; PiSSA, OLoRA, LoftQ, CorDA change the base too
INITS = (True, False, "gaussian", "orthogonal", "eva")
HARMLESS = {
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "layers_pattern",
}
# they say nothing unless another key does
HARMLESS |= {"megatron_core", "qalora_group_size", "eva_config"}
READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
}


def save_lora(model, path, base: str | None = None, name="default"):
    """Writes an adapter as PEFT's folder; base: the name or folder of the model that it belongs to."""
    layers = {
        n: m
        for n, m in lora.linears(model).items()
        if isinstance(m, lora.LoRALinear) and name in m.A
    }
    if not layers:
        raise ValueError(
            f"the model has no adapter named {name}: it has {', '.join(lora.adapters(model)) or 'none'}"
        )
    path, scalar = Path(path), bool(model.config.num_labels)
    tensors = {
        key(n, k): p[name] for n, m in layers.items() for k, p in (("lora_A", m.A), ("lora_B", m.B))
    }
    tensors |= {key("score"): model.score.weight} if scalar else {}
    targets = sorted({n.rpartition(".")[2] for n in layers})
    # the short names would mean more layers than these
    if {n for n in lora.linears(model) if lora.matches(n, targets)} != layers.keys():
        targets = [hub_name(n) for n in layers]
    said = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": base,
    }
    said |= next(iter(layers.values())).settings[name] | {
        "target_modules": targets,
        "modules_to_save": ["score"] if scalar else None,
    }
    said |= {
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
        path / "adapter_model.safetensors",
        {"format": "pt"},
    )
    write_json(path / "adapter_config.json", said | {"rank_pattern": {}, "alpha_pattern": {}})
    # safetensors makes it the owner's alone
    shutil.copymode(path / "adapter_config.json", path / "adapter_model.safetensors")


def load_lora(model, path, name="default", trainable=True):
    """Puts a PEFT folder's adapter on the model and takes it into use → the model.

    trainable: everything else is frozen; otherwise the adapter is, and the rest stays as it was.
    FileNotFoundError where a file is missing; ValueError, before anything changes, where the config
    asks for what we lack or the tensors are not this model's.
    """
    path = Path(path)
    said, chosen = read_lora(path, model)
    wanted = {key(n, "lora_A"): (said["r"], layer.in_features) for n, layer in chosen.items()}
    wanted |= {key(n, "lora_B"): (layer.out_features, said["r"]) for n, layer in chosen.items()}
    if said["modules_to_save"]:
        wanted[key("score")] = tuple(model.score.weight.shape)
    tensors = read_tensors(path / "adapter_model.safetensors", wanted, model)
    pairs = {n: (tensors[key(n, "lora_A")], tensors[key(n, "lora_B")]) for n in chosen}
    settings = {k: said[k] for k in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    return lora.attach(model, name, settings, pairs, tensors.get(key("score")), trainable)


def key(layer: str, part="") -> str:
    """A tensor's name in PEFT's file: what it wraps is "base_model.model", then transformers' name
    of the layer.
    """
    return "base_model.model." + hub_name(".".join(filter(None, (layer, part, "weight"))))


def read_lora(path: Path, model) -> tuple[dict, dict]:
    """adapter_config.json → what it says, defaults filled in, and the layers that it means. Refuses
    by name what we lack.
    """
    where = path / "adapter_config.json"
    if not where.is_file():
        raise FileNotFoundError(
            f"{path} has no adapter_config.json: an adapter's folder was expected, such as PEFT"
            " writes"
        )
    said = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "modules_to_save": None,
        "exclude_modules": None,
    }
    said |= {k: v for k, v in read_json(where).items() if v is not None}
    if said.get("peft_type") != "LORA":
        raise ValueError(
            f"{where}: peft_type is {json.dumps(said.get('peft_type'))}, LORA was expected"
        )
    targets, skipped, heads = (
        said.get("target_modules"),
        said["exclude_modules"] or [],
        said["modules_to_save"] or [],
    )
    for k, v in (
        ("target_modules", targets),
        ("exclude_modules", skipped),
        ("modules_to_save", heads),
    ):
        if not (isinstance(v, str) or isinstance(v, list) and all(isinstance(w, str) for w in v)):
            raise ValueError(f"{where}: {k} is {json.dumps(v)}, names or a pattern were expected")
    lacking = {
        k: v
        for k, v in said.items()
        if k not in HARMLESS | READ and v not in (False, "none", "", [], {})
    }
    lacking |= (
        {"init_lora_weights": init}
        if (init := lacking.pop("init_lora_weights", True)) not in INITS
        else {}
    )
    # PEFT itself always adds "classifier"
    heads = [m for m in heads if not (model.config.num_labels and m in ("score", "classifier"))]
    lacking |= {"modules_to_save": heads} if heads else {}
    for k, v in lacking.items():
        raise ValueError(
            f"{where} asks for {k} = {json.dumps(v)}, which tinytune does not know for this model:"
            " plain LoRA is"
        )
    lora.checked(where, said)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = lora.GROUPS["all"]
    try:
        chosen = {
            n: m
            for n, m in lora.linears(model).items()
            if lora.matches(n, targets) and not lora.matches(n, skipped)
        }
    except re.error as e:
        raise ValueError(
            f"{where}: target_modules or exclude_modules is no regular expression ({e})"
        ) from None
    if not chosen:
        raise ValueError(
            f"{where}: target_modules = {json.dumps(targets)} means no linear layer of this model"
        )
    return said, chosen


def read_tensors(file: Path, wanted: dict, model) -> dict:
    """The tensors that are wanted, by name and shape, and no others. (PEFT writes an adapted head's
    base along: it must be ours.)
    """
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
    theirs = tensors.pop(key("lm_head", "base_layer"), None)
    if theirs is not None and key("lm_head", "lora_A") in wanted:
        head = getattr(model.lm_head, "base", model.lm_head).weight
        # but for 16 bits
        if theirs.shape != head.shape or not torch.allclose(
            wide(theirs), wide(head).cpu(), rtol=0.01, atol=1e-3
        ):
            raise ValueError(
                f"{file}: its lm_head is not this model's: the adapter belongs to another model"
            )
    for what, names in (
        ("lacks", wanted.keys() - tensors),
        ("has, and its config does not ask for,", tensors.keys() - wanted),
    ):
        if names:
            raise ValueError(
                f"{file} {what} {min(names)}: the adapter and this model are not a pair"
            )
    for k, shape in wanted.items():
        if tuple(tensors[k].shape) != shape or not tensors[k].is_floating_point():
            raise ValueError(
                f"{file}: {k} is {tuple(tensors[k].shape)} in {tensors[k].dtype}, floating point of"
                f" {shape} was expected"
            )
    return tensors


# -- IA3, prompt, prefix


def state(model) -> dict:
    """The adapter's numbers as PEFT names and shapes them, copies in float32 on the CPU."""
    with torch.no_grad():
        found = {
            "prompt_embeddings" if n == "virtual" else ia3_key(n): m.stored()
            for n, m in adapters.parts(model)
        }
        return {k: v.to("cpu", torch.float32, copy=True).contiguous() for k, v in found.items()}


def ia3_key(name: str) -> str:
    return f"base_model.model.{hub_name(name)}.ia3_l"


def save_light(model, path, base=None):
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
            "target_modules": list(adapters.SCALED),
            "feedforward_modules": list(adapters.FEEDFORWARD),
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


def load_light(model, path, trainable=True):
    """Reads a PEFT folder into the model, which is frozen; the adapter too where not `trainable`. →
    the model

    FileNotFoundError or ValueError, before anything changes, where a file is missing, asks for what
    we lack, or is another model's.
    """
    adapters.check(model, loading=True)
    path = Path(path)
    kind, tokens = read_light(path, model)
    if kind == "ia3":
        shapes = {
            ia3_key(n): (1, m.in_features)
            if n.endswith(adapters.FEEDFORWARD)
            else (m.out_features, 1)
            for n, m in adapters.linears(model)
        }
    else:
        shapes = {
            "prompt_embeddings": (
                tokens,
                model.config.hidden_size if kind == "prompt" else adapters.width(model.config),
            )
        }
    tensors = {
        k: v.to(model.device, torch.float32)
        for k, v in read_tensors(path / "adapter_model.safetensors", shapes, model).items()
    }
    model.requires_grad_(False)
    if kind == "ia3":
        for name, module in adapters.parts(adapters.wrap(model)):
            module.scale.data = tensors[ia3_key(name)].flatten()
    else:
        model.virtual = {"prompt": adapters.Prompt, "prefix": adapters.Prefix}[kind](
            tensors["prompt_embeddings"]
        )
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


def read_light(path: Path, model) -> tuple[str, int]:
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
    ia3 = {
        "target_modules": sorted(adapters.SCALED),
        "feedforward_modules": sorted(adapters.FEEDFORWARD),
    }
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
