"""What a config.json means: a family of models is a row of settings, which model.py follows.

    read(where, config)    config.json's words → Config's; one that is not known is refused by name
    write(c)               Config → the words of its family again

Both spellings are read, and both are written: transformers 5 has rope_parameters where earlier ones
have rope_theta and rope_scaling. A new family is a new row; what it computes otherwise is a new
setting in Config. Sources: transformers' code for each family. Scaled RoPE: Chen et al. 2023
(linear), Meta 2024 (llama3), Ding et al. 2024 (longrope).
"""

import json
import math
from dataclasses import fields

from model import Config

SLIDING, FULL = "sliding_attention", "full_attention"

# fmt: off
# What must be there; what any family may have, with the default; what some have besides.
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads")
COMMON = dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, rope_theta=10000.0,
              max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None,
              eos_token_id=None, pad_token_id=None, rope_scaling=None, rope_parameters=None)
BIAS = dict(attention_bias=False)
QWEN = dict(max_position_embeddings=32768, use_sliding_window=False, sliding_window=4096,
            max_window_layers=28, layer_types=None)
GEMMA = BIAS | dict(max_position_embeddings=8192, tie_word_embeddings=True, head_dim=256)
# with a sliding_window_pattern of n every n-th layer sees all, the others a window
GEMMA2 = GEMMA | dict(query_pre_attn_scalar=256, sliding_window=4096, layer_types=None,
                      sliding_window_pattern=2, final_logit_softcapping=30.0,
                      attn_logit_softcapping=50.0)
GEMMA3 = GEMMA | dict(query_pre_attn_scalar=256, sliding_window=4096, layer_types=None,
                      sliding_window_pattern=6, final_logit_softcapping=None, rope_theta=1e6,
                      rope_local_base_freq=10000.0, max_position_embeddings=131072)
PHI3 = dict(rms_norm_eps=1e-5, max_position_embeddings=4096, sliding_window=None,
            partial_rotary_factor=1.0, original_max_position_embeddings=4096)
LIKE_GEMMA = dict(gelu=True, norm_offset=True, scaled_embeddings=True)
FAMILIES = {  # model_type: how transformers' classes begin, its words, its settings in Config
    "llama": ("Llama", BIAS | dict(mlp_bias=False), {}),
    "mistral": ("Mistral", dict(num_key_value_heads=8, max_position_embeddings=131072,
                                sliding_window=4096), {}),
    "qwen2": ("Qwen2", QWEN, dict(qkv_bias=True)),
    "qwen3": ("Qwen3", QWEN | BIAS | dict(head_dim=128), dict(qk_norm=True)),
    "gemma": ("Gemma", GEMMA, LIKE_GEMMA),
    "gemma2": ("Gemma2", GEMMA2, LIKE_GEMMA | dict(post_norm=True)),
    "gemma3_text": ("Gemma3Text", GEMMA3, LIKE_GEMMA | dict(post_norm=True, qk_norm=True)),
    "phi3": ("Phi3", PHI3, dict(fused=True)),
}
# null is a value of these; of others it means the default
NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "final_logit_softcapping",
            "attn_logit_softcapping")
NUMBERS = {"sliding_window", "sliding_window_pattern", "query_pre_attn_scalar",
           "final_logit_softcapping", "attn_logit_softcapping", "original_max_position_embeddings"}
# Words that must have these values where a family does not read them. Gemma's first configs say
# gelu, and mean its tanh form.
ALLOWED = {"partial_rotary_factor": (1,), "full_attn_mod": (1,), "interpolate_factor": (1,)}
SILU = {"hidden_act": ("silu", "swish")}
GELU = {"hidden_act": ("gelu_pytorch_tanh", "gelu"), "hidden_activation": ("gelu_pytorch_tanh",)}
# Words that change nothing here: about the file and its making, the head, other programs' sampling
HARMLESS = set("""
    model_type architectures auto_map transformers_version _name_or_path dtype torch_dtype use_cache
    initializer_range pretraining_tp quantization_config num_labels id2label label2id problem_type
    reward_mean reward_std finetuning_task tokenizer_class cache_implementation attn_implementation
    _attn_implementation _attn_implementation_autoset is_llama_config unsloth_version unsloth_fixed
    transformers.js_config task_specific_params prefix return_dict is_decoder max_length min_length
    do_sample temperature top_k top_p typical_p num_beams num_beam_groups diversity_penalty
    early_stopping repetition_penalty length_penalty num_return_sequences sep_token_id
    decoder_start_token_id _sliding_window_pattern
""".split())
STALE = ("dtype", "torch_dtype", "quantization_config", "auto_map", "rope_scaling", "num_labels",
         "id2label", "label2id", "reward_mean", "reward_std")  # written anew, or not at all
PARTIAL, FIRST = "partial_rotary_factor", "original_max_position_embeddings"
# rope_type: the parameters that it needs, and that it may have
ROPES = {"default": (), "linear": ("factor",), "longrope": ("short_factor", "long_factor"),
         "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
OPTIONAL = {"llama3": (FIRST,), "longrope": (FIRST, "factor", "attention_factor")}
# fmt: on


def refusal(where, name: str, value, only: str) -> ValueError:
    return ValueError(f"{where}: {name} = {json.dumps(value)} is not supported: only {only}")


def read(where, config: dict) -> dict:
    """A config.json's content → the values of Config's fields. ValueError for a word that is not
    known, or a value that is not supported, by name; `where` begins each message."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise refusal(where, "model_type", kind, f"{', '.join(map(json.dumps, FAMILIES))} are")
    _, more, settings = FAMILIES[kind]
    words = COMMON | more
    check_words(where, config, words, GELU if "gelu" in settings else SILU)
    for key in SHAPE:
        if type(config.get(key)) is not int or config[key] < 1:
            expected = "a number was expected; get the checkpoint's own config.json"
            raise ValueError(f"{where}: {key} is {json.dumps(config.get(key))}, {expected}")
    w = words | {k: v for k, v in config.items() if v is not None or k in NULLABLE}
    heads = w["num_attention_heads"]
    for key, default in (("num_key_value_heads", heads), ("head_dim", w["hidden_size"] // heads)):
        w[key] = default if w[key] is None else w[key]
    for key in NUMBERS & w.keys():
        if w[key] is not None and (type(w[key]) not in (int, float) or w[key] <= 0):
            said = f"{key} is {json.dumps(w[key])}, a number above 0 was expected"
            raise ValueError(f"{where}: {said}")
    values = {f.name: w[f.name] for f in fields(Config) if f.name in {*SHAPE, *words}}
    values |= settings | windows(where, w) | scales(w) | {"source": config}
    return values | rope(where, w)


def check_words(where, config: dict, words: dict, activation: dict):
    """ValueError for a word that is neither read, nor off, nor known to change nothing."""
    for key, value in config.items():
        if key in words or key in HARMLESS or key in SHAPE:
            continue
        if only := (ALLOWED | activation).get(key):
            if value not in (None, *only):
                raise refusal(where, key, value, f"{json.dumps(only[0])} is")
        elif value:
            raise refusal(where, key, value, f"models without {key} are")


def windows(where, w: dict) -> dict:
    """Config's window, and which layers have it: all, or those of layer_types, or from the
    max_window_layers-th on, or all but every n-th of a pattern."""
    if not w.get("sliding_window") or not w.get("use_sliding_window", True):
        return {}
    layers, types = range(w["num_hidden_layers"]), w.get("layer_types")
    if types is None:
        start, pattern = w.get("max_window_layers", 0), w.get("sliding_window_pattern", math.inf)
        types = [SLIDING if i >= start and (i + 1) % pattern else FULL for i in layers]
    known = isinstance(types, list) and all(kind in (SLIDING, FULL) for kind in types)
    if not known or len(types) != len(layers):
        raise refusal(where, "layer_types", types, f"{SLIDING} or {FULL} for each layer is")
    return dict(window=w["sliding_window"], local=tuple(kind == SLIDING for kind in types))


def scales(w: dict) -> dict:
    """Config's soft caps, and the scale of attention's scores."""
    found = dict(
        logit_cap=w.get("final_logit_softcapping"), attention_cap=w.get("attn_logit_softcapping")
    )
    if "query_pre_attn_scalar" in w:
        found["attention_scale"] = w["query_pre_attn_scalar"] ** -0.5
    return {k: float(v) for k, v in found.items() if v is not None}


# ---------------------------------------------------------------- RoPE
def parameters(w: dict):
    """RoPE's parameters: of full layers, where they stand, and local layers' own (None: none)."""
    key = "rope_scaling" if w["rope_scaling"] else "rope_parameters"
    p, own = w[key] or {}, None
    p = p if isinstance(p, dict) else {"rope_type": p}
    if "rope_local_base_freq" in w:
        nested = w["rope_parameters"] or {}
        if FULL in nested:
            p = (nested[FULL] or {}) | (w["rope_scaling"] or {})
        own = {"rope_theta": w["rope_local_base_freq"]} | (nested.get(SLIDING) or {})
    p = {k: v for k, v in p.items() if v is not None}
    kind = p.get("rope_type", p.pop("type", "default"))
    kind = "longrope" if kind == "su" else kind  # its first name
    defaults = {k: w[k] for k in ("rope_theta", PARTIAL) if k in w}
    if FIRST in w and kind != "default":
        p[FIRST] = w[FIRST]
    return {"rope_type": kind} | defaults | p | {"rope_type": kind}, key, own


def rope(where, w: dict) -> dict:
    """Config's settings of RoPE. ValueError for a kind or parameter that is not supported."""
    try:
        p, key, own = parameters(w)
    except (TypeError, AttributeError):
        told = json.dumps(w["rope_parameters"])
        raise ValueError(f"{where}: rope_parameters is {told}, objects were expected") from None
    kind = p["rope_type"]
    if not isinstance(kind, str) or kind not in ROPES:
        raise refusal(where, f"{key}.rope_type", kind, f"{', '.join(ROPES)} are")
    for name in p.keys() - {"rope_type", "rope_theta", *ROPES[kind], *OPTIONAL.get(kind, ())}:
        if name != PARTIAL or PARTIAL not in w and p[name] != 1:
            raise refusal(where, f"{key}.{name}", p[name], f"{kind} RoPE without it is")
    if own and own.get("rope_type", "default") != "default":
        raise refusal(where, f"{key}.{SLIDING}.rope_type", own["rope_type"], "default is")
    try:
        dims = int(w["head_dim"] * p.get(PARTIAL, 1))
        settings = {"rope_theta": p["rope_theta"], "local_theta": own and float(own["rope_theta"])}
        settings["rotary_dims"] = dims if dims != w["head_dim"] else None
        settings |= scaled(kind, p, dims, w["max_position_embeddings"])
        factors = (*settings.get("rope_factors", ()), *settings.get("long_factors", ()))
        assert all(0 < f < math.inf for f in (*factors, settings["local_theta"] or 1))
        assert dims == w["head_dim"] or 0 < dims < w["head_dim"] and dims % 2 == 0
    except (KeyError, TypeError, ValueError, ArithmeticError, AssertionError):
        needs = ", ".join(ROPES[kind]) or "to turn an even part of a head"
        raise ValueError(f"{where}: {key} is {json.dumps(p)}: {kind} RoPE needs {needs}") from None
    return settings


def scaled(kind: str, p: dict, dims: int, longest: int) -> dict:
    """What each of the dims/2 frequencies θ^(-2i/dims) is divided by."""
    first = p.get(FIRST, longest)  # the context before scaling
    if kind == "linear":
        return {"rope_factors": (float(p["factor"]),) * (dims // 2)}
    if kind == "llama3":  # low frequencies by the factor, high ones not, between them smoothly
        low, high, factors = p["low_freq_factor"], p["high_freq_factor"], []
        for i in range(dims // 2):
            turns = first * p["rope_theta"] ** (-2 * i / dims) / (2 * math.pi)  # in that context
            share = min(max((turns - low) / (high - low), 0), 1)
            factors.append(1 / ((1 - share) / p["factor"] + share))
        return {"rope_factors": tuple(factors)}
    if kind == "longrope":
        factors = [tuple(map(float, p[name])) for name in ROPES[kind]]
        assert all(len(f) == dims // 2 for f in factors)
        grown = p.get("factor", longest / first)
        scale = (1 + math.log(grown) / math.log(first)) ** 0.5 if grown > 1 else 1.0
        settings = dict(rope_factors=factors[0], long_factors=factors[1], long_from=first)
        return settings | {"rope_scale": float(p.get("attention_factor", scale))}
    return {}


# ---------------------------------------------------------------- back
def write(c: Config) -> dict:
    """Config → its family's config.json, less what the head and the weights' type add. ValueError
    where it would be read as another model."""
    kind = c.source.get("model_type", "llama")
    words = COMMON | FAMILIES[kind][1]
    config = {"architectures": [], "model_type": kind} | (c.source or {"hidden_act": "silu"})
    config = {k: v for k, v in config.items() if k not in STALE}
    config |= {f.name: getattr(c, f.name) for f in fields(Config) if f.name in {*SHAPE, *words}}
    given = {k: v for k, v in c.source.items() if v is not None}
    p, _, own = parameters(words | given | {"rope_theta": c.rope_theta})
    config["rope_parameters"] = {FULL: p, SLIDING: {"rope_type": "default"} | own} if own else p
    if own:
        config["rope_local_base_freq"] = own["rope_theta"]
    if (scaling := p["rope_type"]) != "default":  # Phi-3's first code wants three words, type first
        name = "rope_type" if scaling == "llama3" else "type"
        beside = {"rope_type", "rope_theta", PARTIAL, *({FIRST} & words.keys())}
        config["rope_scaling"] = {name: scaling} | {k: v for k, v in p.items() if k not in beside}
    head = {k: getattr(c, k) for k in ("num_labels", "reward_mean", "reward_std")}
    if Config(**read("config.json", config), **head) != c:
        raise ValueError(f"the model cannot be saved: no {kind} model has all of its settings")
    return config
