"""tools/gguf.py and tools/vocabulary.py: keys, names, orders and refusals, without llama.cpp
(tests/parity/test_gguf.py has it), most of them without the package gguf too.
"""

import sys
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, chat_tokenizer, family, folder, lm

from common import hub
from data.tokenizer import DIGITS, Tokenizer
from lora import add_lora
from model import rotate, scalar_model
from quant import quantize_model
from tools import gguf, smollm2, vocabulary

GOLDEN = Path(__file__).parent / "golden"
TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
SCALE = dict(query_pre_attn_scalar=12)  # llama.cpp's in Gemma, for heads of 12


def test_the_order_of_q_and_k_keeps_their_products():
    """RoPE on neighbours, as llama.cpp turns them, gives the same scores."""
    heads, d, generator = 2, 8, torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads * d, 16, generator=generator) for _ in range(2))
    x = torch.randn(16, generator=generator)
    angle = torch.rand(d // 2, generator=generator)
    here = rotate((q @ x).view(1, heads, 1, d), angle.repeat(2).cos(), angle.repeat(2).sin())
    expected = (here * (k @ x).view(1, heads, 1, d)).sum(-1).flatten()
    a, b = (gguf.pairs(q, heads) @ x).view(heads, d // 2, 2).unbind(-1)
    there = torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
    found = (there * (gguf.pairs(k, heads) @ x).view(heads, d // 2, 2)).sum((1, 2))
    assert torch.allclose(found, expected, atol=1e-5)
    assert (smollm2.halves(gguf.pairs(q, heads).numpy(), heads) == q.numpy()).all()
    assert torch.equal(gguf.pairs(q, heads)[:, 0], gguf.pairs(q[:, 0], heads))  # a bias


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_of_every_family_has_a_place(name):
    model = family(name, **SCALE if name in ("gemma2", "gemma3") else {})
    c, found = model.config, dict(gguf.tensors(model, 60))
    rope = {n: found.pop(n) for n in list(found) if "rope" in n}
    tied = c.tie_word_embeddings
    assert len(found) == len(list(model.parameters())) and ("output.weight" in found) != tied
    assert all(len(found[n]) == 60 for n in ("token_embd.weight", "output.weight") if n in found)
    assert torch.equal(found["output_norm.weight"], model.norm.weight + c.norm_offset)
    part = "attn_qkv" if c.fused else "attn_k"
    ours = model.layers[1].self_attn.qkv_proj if c.fused else model.layers[1].self_attn.k_proj
    paired = gguf.architecture(c) == "llama"
    k = gguf.pairs(ours.weight, c.num_key_value_heads) if paired else ours.weight
    assert torch.equal(found[f"blk.1.{part}.weight"], k)
    kinds = {"llama3": ["rope_freqs.weight"]} | dict.fromkeys(
        ("phi3.5", "phi4"), ["rope_factors_short.weight", "rope_factors_long.weight"]
    )
    assert list(rope) == kinds.get(name, [])


def test_keys_of_shapes(capsys):
    def keys(name, **changes):
        c = family(name, **changes).config
        return gguf.architecture(c), gguf.hyperparameters(c)

    arch, found = keys("gemma3", **SCALE)
    assert arch == "gemma3" and found["attention.sliding_window_pattern"] == 3
    assert (found["attention.sliding_window"], found["rope.freq_base_swa"]) == (6, 10.0)
    assert (found["rope.scaling.type"], found["rope.scaling.factor"]) == ("linear", 8.0)
    assert found["attention.key_length"] == 12 and found["context_length"] == 96
    assert not capsys.readouterr().err
    arch, found = keys("mistral")
    assert (arch, found["context_length"]) == ("llama", 6)
    assert "first, at 6 tokens" in capsys.readouterr().err
    arch, found = keys("phi4")
    assert found["rope.dimension_count"] == 6 and found["rope.scaling.type"] == "longrope"
    assert found["rope.scaling.original_context_length"] == 16
    assert found["rope.scaling.attn_factor"] > 1


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("gemma2", {}, "gemma2 model with this attention scale"),
        ("gemma2", SCALE | {"attn_logit_softcapping": None}, "with these soft caps"),
        ("gemma3", SCALE | {"layer_types": TYPES}, "with these windows"),
        ("gemma", {"tie_word_embeddings": False}, "with a head that is not the embedding"),
        ("qwen3", {"attention_bias": True}, "qwen3 model with biases"),
        ("qwen2", {"rope_scaling": FAMILIES["llama3"]["rope_scaling"]}, "with this RoPE scaling"),
    ],
)
def test_models_that_llama_cpp_lacks(name, changes, words):
    with pytest.raises(ValueError, match=f"llama.cpp has no .*{words}"):
        gguf.architecture(family(name, **changes).config)


def test_keys_of_a_byte_level_tokenizer(capsys):
    tok = Tokenizer.load(GOLDEN / "qwen_kind")
    found = vocabulary.vocabulary(tok, family("qwen2", eos_token_id=[2, 0]).config)
    assert (found["model"], found["pre"]) == ("gpt2", "qwen2")
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    think, end = kinds["<think>"], kinds["<|im_end|>"]
    assert (think, end, kinds["a"]) == (4, 3, 1) and len(kinds) == tok.vocab_size
    assert (found["eos_token_id"], found["eot_token_id"]) == (2, 0) and "eom_token_id" not in found
    assert not found["add_bos_token"] and "bos_token_id" not in found
    assert "NFC" in capsys.readouterr().err
    llama = Tokenizer.load(GOLDEN / "llama3_kind")
    found = vocabulary.vocabulary(llama, family("llama").config)
    assert found["add_bos_token"] and found["bos_token_id"] == llama.bos_id
    smol = Tokenizer.load(GOLDEN / "smollm2_kind")
    assert vocabulary.PRE[smol.coder.encoding._pat_str] == "smollm" == vocabulary.PRE[DIGITS]


def test_scores_of_merges():
    vocab = {t: i for i, t in enumerate(["a", "b", "▁", "ab", "aba", "▁▁", "▁▁▁", "▁▁▁▁"])}
    runs = [("▁▁▁", "▁"), ("▁▁", "▁▁"), ("▁▁", "▁"), ("▁", "▁▁▁"), ("▁", "▁▁"), ("▁", "▁")]
    found = vocabulary.scores([("a", "b"), ("ab", "a"), *runs], vocab, set(), 8)
    assert found[3] > found[4] > found[6] == found[7] > found[5]
    with pytest.raises(ValueError, match="'aba' stand among those to 'ab'"):
        vocabulary.scores([("a", "b"), ("ab", "a"), ("a", "b")], vocab, set(), 8)
    model = {"type": "BPE", "byte_fallback": True, "vocab": vocab}
    model["merges"] = [["a", "b"], ["ab", "a"], *map(list, runs)]
    spec = {"normalizer": {"type": "Prepend", "prepend": "▁"}, "model": model}
    assert vocabulary.sentencepiece(spec, set(), 8) == {"model": "llama", "scores": found}
    vocab["ba"] = 8
    with pytest.raises(ValueError, match=r"no merge of \('b', 'a'\)|no merge of \('a', 'ba'\)"):
        vocabulary.sentencepiece(spec, set(), 9)
    for odd in ({"normalizer": {"type": "NFKC"}}, {"pre_tokenizer": {"type": "Metaspace"}}):
        with pytest.raises(ValueError, match="no tokenizer of this kind"):
            vocabulary.sentencepiece(spec | odd, set(), 9)


def test_the_template_and_the_name(capsys):
    tok = chat_tokenizer()
    assert vocabulary.template(tok) == {"tokenizer.chat_template": tok.chat_template}
    tok.chat_template = "{{ bos_token }}x"
    assert vocabulary.template(tok)["tokenizer.chat_template"] == "{{ bos_token }}x"
    del tok.config["bos_token"]
    found = vocabulary.template(tok)["tokenizer.chat_template"]
    assert found == "{% set bos_token = '' %}{{ bos_token }}x"
    assert vocabulary.title("out/my-Phi3-sft", tok) == "my-phi 3-sft"
    assert vocabulary.title("x", Tokenizer.load(GOLDEN / "phi4_kind")) == "x"
    assert "white space" in capsys.readouterr().err


def test_refusals(tmp_path, monkeypatch):
    model = folder(tmp_path / "model")
    hub.save(tmp_path / "reward", scalar_model(lm()), chat_tokenizer())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="install the package gguf"):
        gguf.export(gguf.Options(model=model, out=str(tmp_path / "a.gguf")))
    monkeypatch.undo()
    pytest.importorskip("gguf")
    (tmp_path / "there.gguf").write_text("mine")
    for name, out, words in (
        ("reward", "a.gguf", "is a reward model"),
        ("model", "there.gguf", "is there already"),
        ("nowhere", "a.gguf", "is no folder"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            gguf.export(gguf.Options(model=str(tmp_path / name), out=str(tmp_path / out)))
    assert (tmp_path / "there.gguf").read_text() == "mine" and not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("kind", gguf.FILE_TYPE)
def test_what_is_written_is_read_back(kind, tmp_path, capsys):
    package = pytest.importorskip("gguf")
    model = lm(hidden_size=64, head_dim=32, intermediate_size=24, vocab_size=283)
    hub.save(tmp_path / "model", model, chat_tokenizer())
    out = tmp_path / "new" / "a.gguf"
    gguf.export(gguf.Options(model=str(tmp_path / "model"), out=str(out), type=kind))
    reader = package.GGUFReader(out)
    ours, types = dict(gguf.tensors(model, 280)), {}
    for t in reader.tensors:
        x = torch.tensor(package.quants.dequantize(t.data, t.tensor_type).copy())
        gap, largest = (x - ours[t.name]).abs().max(), ours[t.name].abs().max()
        assert x.shape == ours[t.name].shape
        assert gap <= {"f32": 0, "bf16": 2**-8, "q8_0": 1 / 200}[kind] * largest
        types[t.name] = t.tensor_type.name
    assert types.keys() == ours.keys() and types["output_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == kind.upper()
    # rows of 24 are no blocks of 32
    assert types["blk.0.ffn_down.weight"] == ("F32" if kind == "q8_0" else kind.upper())
    read = {k: f.contents() for k, f in reader.fields.items()}
    assert read["llama.context_length"] == 128 and len(read["tokenizer.ggml.tokens"]) == 280
    assert read["tokenizer.chat_template"] == chat_tokenizer().chat_template
    assert read["tokenizer.ggml.pre"] == "gpt-2"
    assert "llama, 280 tokens" in capsys.readouterr().out
    assert [f.name for f in out.parent.iterdir()] == ["a.gguf"]


def test_four_bits_are_written_as_what_they_stand_for():
    model = quantize_model(lm(hidden_size=64, head_dim=32))
    found = dict(gguf.tensors(model, 280))
    expected = model.layers[0].mlp.down_proj.dequantize()
    assert torch.equal(found["blk.0.ffn_down.weight"], expected)


def test_a_prefix_has_no_place(tmp_path, monkeypatch):
    model = lm()
    model.virtual = add_lora  # any: nothing but its presence is asked
    monkeypatch.setattr(hub, "language_model", lambda _: (model, chat_tokenizer()))
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="has a prompt or prefix"):
        gguf.export(gguf.Options(model="m", out=str(tmp_path / "a.gguf")))
