"""A checkpoint as one GGUF file, which llama.cpp, Ollama and LM Studio open.

    python -m tools.gguf --model out/ppo --out ppo.gguf --type q8_0

The file holds the model's shape, its tokenizer, chat template and end tokens, and the weights: f32,
bf16, or q8_0 (each 32 numbers of a row in 8 bits, with one scale). A stage's folder has its adapter
merged already; 4-bit layers are written as the weights that they stand for.

A model that llama.cpp computes otherwise is refused; where it reads some texts otherwise, a line
says which. One thing holds always: there, a special token that a user types is that token. Keys and
names are those of llama.cpp's converter; the optional package `gguf` writes them.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import hub
from common.files import optional
from common.run import main, opt
from quant import Linear4bit
from tools.smollm2 import LAYER
from tools.vocabulary import say, template, title, vocabulary

# fmt: off
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
                 "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3"}
NAMES = {ours: theirs for theirs, ours in LAYER.items()} | {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
POST_NORM = {"post_attention_layernorm": "post_attention_norm",
             "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
FILE_TYPE = {"f32": 0, "bf16": 32, "q8_0": 7}
# fmt: on


@dataclass
class Options:
    model: str = opt("out/ppo", "checkpoint folder")
    out: str = opt("", "file to write; empty: the folder's name with .gguf, here")
    type: str = opt("f32", "of the weights; norms and biases stay f32", choices=tuple(FILE_TYPE))


# ---------------------------------------------------------------- the model's shape
def architecture(c) -> str:
    """llama.cpp's name of the family. ValueError where it has no such model."""
    name, scale = ARCHITECTURES[c.source.get("model_type", "llama")], c.head_dim
    if (name, c.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62)):  # the two of 27B
        scale = c.hidden_size / c.num_attention_heads
    lacks = {
        "a head that is not the embedding": "gemma" in name and not c.tie_word_embeddings,
        "biases": name != "llama" and (c.attention_bias or c.mlp_bias),
        "this attention scale": abs((c.attention_scale or scale**-0.5) * scale**0.5 - 1) > 1e-6,
        "these soft caps": [bool(c.attention_cap), bool(c.logit_cap)] != 2 * [name == "gemma2"],
        "these windows": c.post_norm and not pattern(c),
        "heads that turn in part": c.rotary_dims and name != "phi3",
        "this RoPE scaling": (c.long_factors or len(set(c.rope_factors)) > 1)
        and name != ("phi3" if c.long_factors else "llama"),
    }
    for what, there in lacks.items():
        if there:
            raise ValueError(f"llama.cpp has no {name} model with {what}")
    return name


def pattern(c) -> int | None:
    """n where every n-th layer sees all and the others a window, else None."""
    n = c.local.index(False) + 1 if False in c.local else len(c.local) + 1
    regular = all(local == bool((i + 1) % n) for i, local in enumerate(c.local))
    return n if c.local and regular else None


def hyperparameters(c) -> dict:
    """Config → the architecture's keys."""
    keys = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
        "rope.dimension_count": c.rotary_dims or c.head_dim,
        "rope.freq_base": float(c.rope_theta),
        "rope.freq_base_swa": c.local_theta,
    }
    if c.post_norm:  # Gemma 2 and 3, whose windows llama.cpp has
        keys["attention.sliding_window"] = c.window
        keys["attention.sliding_window_pattern"] = pattern(c)
    elif any(c.local) and c.window < c.max_position_embeddings:
        keys["context_length"] = c.window
        say(f"this family has no windows: its context ends with the first, at {c.window:,} tokens")
    if c.long_factors:
        keys |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": c.rope_scale}
        keys["rope.scaling.original_context_length"] = c.long_from
        say(
            f"with a context of more than {c.long_from:,} tokens (-c) short texts turn as long ones"
        )
    elif len(set(c.rope_factors)) == 1:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": c.rope_factors[0]}
    return {k: v for k, v in keys.items() if v is not None}


# ---------------------------------------------------------------- weights
def tensors(model, tokens: int):
    """Yields llama.cpp's name and the tensor of each weight. tokens: rows of embedding and head
    beyond so many only pad the vocabulary."""
    c = model.config
    paired = ARCHITECTURES[c.source.get("model_type", "llama")] == "llama"
    names = NAMES | (POST_NORM if c.post_norm else {})
    for path, module in model.named_modules():
        layer, _, part = path.removeprefix("layers.").partition(".")
        block, part = (f"blk.{layer}.", part) if path.startswith("layers.") else ("", path)
        if part not in names or part == "lm_head" and c.tie_word_embeddings:
            continue
        packed = isinstance(module, Linear4bit)
        weight = module.dequantize(torch.float32) if packed else module.weight
        for kind, x in (("weight", weight), ("bias", getattr(module, "bias", None))):
            if x is None:
                continue
            if part in ("embed_tokens", "lm_head"):
                x = x[:tokens]
            if paired and part in ("self_attn.q_proj", "self_attn.k_proj"):
                x = pairs(x, x.shape[0] // c.head_dim)
            if c.norm_offset and "norm" in part:
                x = x + 1
            yield f"{block}{names[part]}.{kind}", x.detach()
    if c.long_factors:
        yield "rope_factors_short.weight", torch.tensor(c.rope_factors)
        yield "rope_factors_long.weight", torch.tensor(c.long_factors)
    elif len(set(c.rope_factors)) > 1:
        yield "rope_freqs.weight", torch.tensor(c.rope_factors)


def pairs(x, heads: int):
    """Rows of q or k (heads·d,…), reordered: RoPE turns i with i + d/2 here, and neighbours, 2i
    with 2i + 1, in llama.cpp's llama."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# ---------------------------------------------------------------- the file
def write(gguf, path, keys: dict, weights, kind: str):
    """weights() yields names and tensors, each time anew: no second copy of them is held."""
    writer, types = gguf.GGUFWriter(path, keys.pop("general.architecture")), {}
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        add[type(value)](key, value)
    for name, x in weights():
        plain = x.dim() == 1 or kind == "q8_0" and x.shape[-1] % 32
        types[name] = gguf.GGMLQuantizationType["F32" if plain else kind.upper()]
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        size *= prod(x.shape) // block
        writer.add_tensor_info(name, x.shape, np.dtype("f4"), size, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, x in tqdm(weights(), "tensors", len(types), dynamic_ncols=True):
        writer.write_tensor_data(gguf.quants.quantize(x.float().contiguous().numpy(), types[name]))
    writer.close()


def export(o):
    gguf = optional("gguf", "tools.gguf writes with a package")
    out = Path(o.out or Path(o.model).resolve().name + ".gguf")
    if out.exists():
        raise ValueError(f"{out} is there already: choose another --out")
    model, tok = hub.language_model(o.model)
    if model.virtual is not None:
        raise ValueError(f"{o.model} has a prompt or prefix, for which llama.cpp has no place")
    c = model.config
    arch = architecture(c)
    keys = {"general.architecture": arch, "general.name": title(o.model, tok)}
    keys |= {"general.file_type": FILE_TYPE[o.type], "general.quantization_version": 2}
    keys |= {f"{arch}.{k}": v for k, v in hyperparameters(c).items()}
    keys |= {f"tokenizer.ggml.{k}": v for k, v in vocabulary(tok, c).items()} | template(tok)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".part")
    try:
        write(gguf, aside, keys, lambda: tensors(model, tok.vocab_size), o.type)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    print(f"{out}: {arch}, {tok.vocab_size:,} tokens, {out.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main(export, Options, __doc__)
