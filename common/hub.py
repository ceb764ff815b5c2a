"""Hugging Face folders ↔ our weights: config.json, model.safetensors, the tokenizer's files.

What is written here transformers and vLLM open as it is, llama.cpp as tools/gguf.py puts it into a
file; what they write is read here when it is of a family of common/families.py: `…ForCausalLM`, or
`…ForSequenceClassification` with one label (the reward model, the critic). An unsupported setting
is refused by name, never ignored. Pickled weights are not read: they can run code.

(llama.cpp's own converter knows tokenizers by the hash of a text's ids, and stops at the embedded
one: "BPE pre-tokenizer was not recognized".)
"""

import json
import math
import shutil
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import families, peft
from common.files import hub_name, read_json, write_json
from data.tokenizer import Tokenizer
from model import Config, Transformer
from quant import Linear4bit, block_linears, quantize_model, quantize_nf4

LARGEST, MOST_LAYERS = 2**31 - 1, 10_000  # no model has more: the file is damaged
# What a quantization_config must hold. The tensors themselves show the rest: double quantisation,
# skipped layers.
PACKED = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "uint8",
}


def load(path, device="cpu", dtype=torch.float32, quant=None):
    """A folder's model, its weights in `dtype` on `device`, and its tokenizer (None where there is
    no tokenizer.json).

    The virtual tokens of a prompt or prefix in path/adapter are part of the model; any other
    adapter there has been merged into the weights.

    quant="nf4": the blocks' linear layers in 4 bits, each quantised as it is read, so that the
    whole model is never in memory in `dtype`. Layers that bitsandbytes has quantised stay as they
    are.

    FileNotFoundError where a file is missing, ValueError where one cannot be used.
    """
    path = Path(path)
    config = read_config(path)
    if quant not in (None, "nf4"):
        raise ValueError(
            f'quant = {json.dumps(quant)} is unknown: "nf4" was expected, or nothing for {dtype}'
            " weights"
        )
    with torch.device("meta"):  # shapes only: the weights below are the first to take memory
        model = Transformer(config)
    tokenizer = Tokenizer.load(path) if (path / "tokenizer.json").exists() else None
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding"
            f" {config.vocab_size}: they are not a pair"
        )
    weights = read_weights(path, model, device, dtype, quant)
    linears = block_linears(model)
    quantize_model(model, [n for n in linears if weights[f"{n}.weight"].dtype == torch.uint8])
    try:
        model.load_state_dict(weights, assign=True)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if config.tie_word_embeddings and not config.num_labels:
        model.lm_head.weight = model.embed_tokens.weight
    spare = sorted(set(range(config.vocab_size)) - tokenizer.ids) if tokenizer is not None else []
    if spare:
        model.spare = torch.tensor(spare, device=device)
    add_virtual(model, path / "adapter")
    return model, tokenizer


def add_virtual(model, folder):
    """Adds the prompt or prefix that lies beside the weights: neither means anything without the
    other.
    """
    file = folder / "adapter_config.json"
    if file.exists() and read_json(file).get("peft_type") in ("PROMPT_TUNING", "PREFIX_TUNING"):
        peft.load_adapter(model, folder).requires_grad_(True)


def language_model(path, device="cpu", dtype=torch.float32, quant=None):
    """load() for a stage that starts from a chat model: a reward model, or a folder without a
    tokenizer, is a ValueError.
    """
    model, tokenizer = load(path, device, dtype, quant)
    expect_language_model(path, model, tokenizer)
    return model, tokenizer


def expect_language_model(path, model, tokenizer):
    if model.config.num_labels:
        raise ValueError(
            f"{path} is a reward model: a language model was expected, such as sft.py writes"
        )
    if tokenizer is None:
        raise ValueError(
            f"{path} has no tokenizer.json: get the checkpoint's own tokenizer.json and"
            " tokenizer_config.json"
        )


def save(path, model, tokenizer=None, dtype=None):
    """Writes the folder: weights in `dtype` (None: the embedding's), config, generation_config and
    the tokenizer's files.
    """
    if any(name.endswith(".base") for name, _ in model.named_modules()):
        raise ValueError(
            f"{path}: the model has adapters: lora.merge() merges them into the weights,"
            " peft.save_adapter() writes them alone"
        )
    path, dtype = Path(path), dtype or model.embed_tokens.weight.dtype
    if any(isinstance(m, Linear4bit) for m in model.modules()):
        raise ValueError(
            f"{path}: a model in 4 bits is not written: put its layers back into 16 or 32 bits"
            " first (Linear4bit.dequantize)"
        )
    path.mkdir(parents=True, exist_ok=True)
    ids = token_ids(model.config, tokenizer)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    # a prompt or prefix has a folder of its own
    weights = {k: v for k, v in weights.items() if not k.startswith("virtual.")}
    weights = {hub_name(k): v.detach().to("cpu", dtype).contiguous() for k, v in weights.items()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    # as the stages sample; transformers' default top_k is 50
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    write_json(path / "generation_config.json", ids | sampling)
    # safetensors lets the owner alone read it
    shutil.copymode(path / "generation_config.json", path / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save(path)
        if model.config.num_labels:
            # transformers pads with the tokenizer's pad token, and looks for the config's
            pad = next(text for text, i in tokenizer.special.items() if i == ids["pad_token_id"])
            file = path / "tokenizer_config.json"
            write_json(file, read_json(file) | {"pad_token": pad})
    write_json(path / "config.json", config_json(model.config, dtype) | ids)


# -- config.json


def read_config(path: Path) -> Config:
    """config.json → Config. ValueError for an unsupported setting, by its name."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(no_checkpoint(path))
    where = path / "config.json"
    config = read_json(where)
    values = families.read(where, config)
    if config.get("quantization_config") is not None:
        check_packed(where, config["quantization_config"])
    values |= {k: config[k] for k in ("reward_mean", "reward_std") if config.get(k) is not None}
    values["num_labels"] = labels(where, config)
    return checked(where, add_end_ids(path, Config(**values)))


def listed(ids) -> list:
    """One id, several, or None, as a list."""
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def add_end_ids(path: Path, c: Config) -> Config:
    """The config, with the end tokens that generation_config.json names beside its own: a chat
    model's turns often end with one that config.json lacks.
    """
    file = path / "generation_config.json"
    theirs = read_json(file).get("eos_token_id") if file.is_file() else None
    own, more = map(listed, (c.eos_token_id, theirs))
    if more := [i for i in more if i not in own]:
        c.eos_token_id = [*own, *more] if own or more[1:] else more[0]
    return c


def check_packed(where: Path, quantization):
    """ValueError where a quantization_config is not bitsandbytes' NF4."""
    packed = {"bnb_4bit_quant_storage": "uint8"}
    packed |= quantization if isinstance(quantization, dict) else {}
    for key, value in PACKED.items():
        if packed.get(key) != value:
            got = f"quantization_config.{key} = {json.dumps(packed.get(key))}"
            raise ValueError(f"{where}: {got} is not supported: only {json.dumps(value)} is")


def classes(model_type: str) -> tuple[str, str]:
    """transformers' class of a language model, and of one with a scalar head."""
    name = families.FAMILIES[model_type][0]
    return name.removesuffix("Text") + "ForCausalLM", name + "ForSequenceClassification"


def labels(where: Path, config: dict) -> int:
    """0 for a language model, 1 for a scalar head. transformers stores the number of labels as the
    length of id2label.
    """
    causal, scalar = classes(config["model_type"])
    kinds = config.get("architectures") or [causal]
    if not isinstance(kinds, list) or not isinstance(kinds[0], str):
        raise ValueError(
            f"{where}: architectures is {json.dumps(kinds)}, a list of names was expected"
        )
    kind = kinds[0]
    if kind == causal:
        return 0
    if kind != scalar:
        raise ValueError(
            f"{where}: the architecture {kind} is not supported: {causal} and {scalar} are"
        )
    names = config.get("id2label")
    count = len(names) if isinstance(names, dict | list) else config.get("num_labels", 2)
    if count != 1:
        raise ValueError(
            f"{where} has {count} labels (id2label): a reward model with one label was expected"
        )
    return 1


def checked(where: Path, c: Config) -> Config:
    """The config; a ValueError where a value is of the wrong type or does not fit the others."""
    for f in fields(Config):
        value, kind = getattr(c, f.name), f.type | int if f.type is float else f.type
        if (
            not isinstance(value, kind)
            or (isinstance(value, bool) and kind is not bool)
            or (f.type is int and f.default is MISSING and value < 1)
        ):
            raise ValueError(
                f"{where}: {f.name} is {json.dumps(value)}, {getattr(f.type, '__name__', f.type)}"
                " was expected"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: {f.name} is {value}, a finite number was expected")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"{where}: {f.name} is {value}, at most {LARGEST:,} was expected")
    for name in ("max_position_embeddings", "rms_norm_eps", "rope_theta"):
        if getattr(c, name) <= 0:
            raise ValueError(
                f"{where}: {name} is {getattr(c, name)}, a number above 0 was expected"
            )
    if c.num_hidden_layers > MOST_LAYERS:
        raise ValueError(
            f"{where}: num_hidden_layers is {c.num_hidden_layers}, at most {MOST_LAYERS:,} was"
            " expected"
        )
    ends = c.eos_token_id if isinstance(c.eos_token_id, list) else []
    if not all(type(i) is int for i in ends):
        raise ValueError(
            f"{where}: eos_token_id is {json.dumps(ends)}, a number or a list of numbers was"
            " expected"
        )
    heads, kv = c.num_attention_heads, c.num_key_value_heads
    if heads % kv or c.head_dim % 2:
        raise ValueError(
            f"{where}: {heads} heads must be a multiple of {kv} key/value heads, and head_dim ="
            f" {c.head_dim} even"
        )
    return c


def config_json(c: Config, dtype) -> dict:
    """Config → config.json, read alike by transformers 4 and 5: each spelling that one of them
    needs.
    """
    config = families.write(c)
    config["architectures"] = [classes(config["model_type"])[c.num_labels]]
    config |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    if c.num_labels:
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        config |= {"reward_mean": c.reward_mean, "reward_std": c.reward_std}
    return config


def token_ids(c: Config, tokenizer) -> dict:
    """The ids of beginning, end and padding: the config's, else the tokenizer's. transformers takes
    a sequence's score at its last token that is not padding: a reward model's padding must not be
    the end token, whose score is the one wanted."""
    special = tokenizer.special if tokenizer is not None else {}
    ids = {f"{k}_token_id": getattr(c, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    if tokenizer is not None:
        ids = {
            k: getattr(tokenizer, k.replace("token_", "")) if i is None else i
            for k, i in ids.items()
        }
    # what it scores are chats, whose end is the turn's, also where its base ended texts with
    # another token
    if c.num_labels:
        ids["eos_token_id"] = special.get("<|im_end|>", ids["eos_token_id"])
        ends = (
            ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else [ids["eos_token_id"]]
        )
        inside = {special.get("<|im_start|>"), *ends}
        choice = (
            [special.get("<|endoftext|>"), *special.values()] if special else [ids["pad_token_id"]]
        )
        ids["pad_token_id"] = next((i for i in choice if i is not None and i not in inside), None)
        if ids["pad_token_id"] is None:
            raise ValueError(
                "a reward model needs a padding token that is not the end token, and the tokenizer"
                f" has no special token left ({', '.join(special) or 'it has none'}): add one, such"
                ' as <|pad|> with "special": true, to the added_tokens of tokenizer.json, with'
                f" an id below vocab_size = {c.vocab_size} (a row more in the embedding where all"
                " are taken)"
            )
    return ids


# -- weights


def read_weights(path: Path, model, device, dtype, quant=None) -> dict:
    """The model's tensors, read one by one. ValueError where one is missing, unexpected or of
    another shape.

    A weight in 4 bits, the folder's or quantised here, is the several tensors of bitsandbytes'
    state dict, which Linear4bit checks.
    """
    wanted = {hub_name(k): (k, tuple(v.shape)) for k, v in model.state_dict().items()}
    linears = {f"{name}.weight" for name in block_linears(model)}
    weights, extra = {}, []
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as f:
                for name in f.keys():
                    # "….weight.absmax" and the like belong to "….weight"
                    owner = name[: name.find(".weight.") + 7] if ".weight." in name else name
                    key, expected = wanted.get(owner, (None, None))
                    if key is None or owner != name and key not in linears:
                        if not name.endswith("rotary_emb.inv_freq"):  # in old folders; known here
                            extra.append(name)
                        continue
                    tensor = f.get_tensor(name)
                    if owner != name or tensor.dtype == torch.uint8 and key in linears:
                        weights[key + name[len(owner) :]] = tensor.to(device, copy=True)
                        continue
                    check_tensor(f"{file}: {name}", tensor, expected)
                    if quant and key in linears:
                        try:
                            weights |= quantize_nf4(tensor.to(device, dtype)).state_dict(key)
                        except ValueError as e:
                            raise ValueError(f"{file}: {name}: {e}") from None
                    else:
                        kept = dtype
                        if key == "score.weight":  # one row: bf16 would only blur the scores
                            kept = torch.promote_types(dtype, torch.float32)
                        # a copy, which does not keep the file's memory map
                        weights[key] = tensor.to(device, kept, copy=True)
        except SafetensorError as e:
            raise ValueError(
                f"{file} is damaged or no safetensors file ({e}); get it again"
            ) from None
    return complete(path, model.config, wanted, weights, extra)


def check_tensor(where: str, tensor, expected: tuple):
    if tensor.shape != expected:
        raise ValueError(
            f"{where} has the shape {tuple(tensor.shape)}, config.json asks for {expected}"
        )
    if not tensor.is_floating_point():
        raise ValueError(
            f"{where} is {tensor.dtype}: of quantised weights only NF4 in the blocks' layers is"
            " read"
        )


def complete(path: Path, c: Config, wanted: dict, weights: dict, extra: list) -> dict:
    """The weights, a tied head among them; a ValueError where they are not the model's."""
    tied = c.tie_word_embeddings and not c.num_labels
    if tied:
        head = weights.pop("lm_head.weight", None)
        if head is not None and not torch.equal(
            head,
            weights.setdefault("embed_tokens.weight", head),  # some folders hold the head alone
        ):
            raise ValueError(
                f"{path}: tie_word_embeddings is true, yet lm_head.weight differs from the"
                " embedding; set it to false"
            )
        wanted.pop("lm_head.weight")
    missing = [name for name, (key, _) in wanted.items() if key not in weights]
    for what, names in (("lacks", missing), ("has the unexpected tensor", extra)):
        if names:
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            raise ValueError(
                f"{path}: the checkpoint {what} {names[0]}{more}; config.json and weights are not a"
                " pair"
            )
    if tied:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    return weights


def weight_files(path: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    pickled = [
        f.name for f in sorted(path.iterdir()) if f.suffix in (".bin", ".pt", ".pth", ".ckpt")
    ]
    if not index.is_file():
        there = f"pickled weights only ({pickled[0]})" if pickled else "no weights"
        raise FileNotFoundError(
            f"{path} has {there}: model.safetensors was expected, as transformers'"
            " save_pretrained() writes it"
        )
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} has no weight_map; get the file again")
    files = [path / name for name in sorted(set(map(str, shards.values())))]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{missing[0]} is missing, {index.name} names it; get the whole checkpoint"
        )
    return files


def no_checkpoint(path: Path) -> str:
    """Why a path without config.json is no checkpoint, and what to do."""
    if not path.is_dir():
        return (
            f"{path} is no folder: a checkpoint (config.json, model.safetensors, tokenizer.json)"
            " was expected"
        )
    if (path / "adapter_config.json").exists():
        return (
            f"{path} is an adapter without its model: give the merged checkpoint, the folder above"
            " it"
        )
    if (path / "state").exists():
        return (
            f"{path} has no config.json yet: its run has not finished; run the stage again to"
            " finish it"
        )
    return (
        f"{path} has no config.json: a checkpoint (config.json, model.safetensors, tokenizer.json)"
        " was expected"
    )
