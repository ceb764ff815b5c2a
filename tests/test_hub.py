"""Hugging Face folders: transformers' own files and numbers (golden), our own round trip, and
whatever a folder can be wrong in.
"""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import score_rows

from common import hub
from data.tokenizer import Tokenizer
from model import Config, Transformer, scalar_model
from pretrain import init_weights
from sampling import generate

GOLDEN = Path(__file__).parent / "golden"
LLAMAS = ["tied", "biases", "wide", "scores"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(GOLDEN / "gpt2_kind")


def tiny(vocab_size=500, **changes):
    shape = dict(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = Transformer(Config(**shape | dict(num_key_value_heads=2, head_dim=4) | changes))
    init_weights(model, torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def folder(tmp_path):
    """A tied Llama that transformers wrote, to be spoilt."""
    shutil.copytree(GOLDEN / "llama_tied", tmp_path / "llama")
    (tmp_path / "llama" / "expected.safetensors").unlink()
    return tmp_path / "llama"


def edit(folder, remove=(), **changes):
    said = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in said.items() if k not in remove})
    )


def edit_weights(folder, **changes):
    """Sets tensors by name ("__" for a dot); None removes one."""
    weights = load_file(folder / "model.safetensors") | {
        k.replace("__", "."): v for k, v in changes.items()
    }
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "model.safetensors")


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- transformers' folders


@pytest.mark.parametrize("name", LLAMAS)
def test_transformers_own_logits(name):
    model, tokenizer = hub.load(GOLDEN / f"llama_{name}")
    expected = load_file(GOLDEN / f"llama_{name}" / "expected.safetensors")
    tokens, mask, out = expected["tokens"], expected["mask"].bool(), expected["out"]
    assert tokenizer is None and model.embed_tokens.weight.dtype == torch.float32
    assert out.std() > 0.5
    if name == "scores":
        assert (score_rows(model, tokens, mask) - out[:, 0]).abs().max() < 1e-4
    else:
        assert (model(tokens, mask) - out)[mask].abs().max() < 1e-4
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_the_config_is_read_whole():
    biases, wide, scores = (
        hub.load(GOLDEN / f"llama_{name}")[0].config for name in ("biases", "wide", "scores")
    )
    assert (
        biases.attention_bias,
        biases.mlp_bias,
        biases.rms_norm_eps,
        biases.num_key_value_heads,
    ) == (True, True, 0.1, 2)
    assert (
        wide.head_dim,
        wide.rope_theta,
        wide.tie_word_embeddings,
        wide.max_position_embeddings,
    ) == (12, 500.0, False, 2048)
    assert (scores.num_labels, scores.bos_token_id, scores.eos_token_id, scores.pad_token_id) == (
        1,
        1,
        2,
        0,
    )


def test_both_spellings(folder):
    old, _ = hub.load(folder)
    edit(
        folder,
        remove=["rope_parameters", "dtype", "head_dim"],
        rope_theta=77.0,
        torch_dtype="bfloat16",
        rope_scaling=None,
    )
    assert hub.load(folder)[0].config.rope_theta == 77.0
    # as in transformers, it outweighs rope_theta
    edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    new, _ = hub.load(folder)
    assert new.config == old.config and same(new, old) and new.config.head_dim == 8


def test_what_a_config_may_leave_out(folder):
    edit(
        folder,
        remove=[
            "rope_parameters",
            "rms_norm_eps",
            "head_dim",
            "num_key_value_heads",
            "bos_token_id",
            "architectures",
        ],
    )
    with pytest.raises(
        ValueError, match=r"k_proj.weight has the shape \(16, 32\), config.json asks for \(32, 32\)"
    ):
        hub.load(folder)  # no num_key_value_heads: as many as heads
    edit(folder, num_key_value_heads=2)
    config = hub.load(folder)[0].config
    assert (config.rope_theta, config.rms_norm_eps, config.head_dim, config.bos_token_id) == (
        10000.0,
        1e-6,
        8,
        None,
    )


def test_dtype_is_the_caller_s(folder):
    model, _ = hub.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    again, _ = hub.load(folder)
    assert {p.dtype for p in again.parameters()} == {torch.float32} and torch.equal(
        again.norm.weight, model.norm.weight.float()
    )


def test_a_head_beside_a_tied_embedding(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    plain, _ = hub.load(folder)
    edit_weights(folder, lm_head__weight=embedding.clone())
    model, _ = hub.load(folder)
    assert same(model, plain) and model.lm_head.weight is model.embed_tokens.weight
    edit_weights(folder, lm_head__weight=embedding + 1)
    with pytest.raises(ValueError, match="tie_word_embeddings is true, yet lm_head.weight differs"):
        hub.load(folder)


def test_rotary_buffers_of_old_folders_are_passed_over(folder):
    plain, _ = hub.load(folder)
    edit_weights(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert same(hub.load(folder)[0], plain)


def test_several_end_tokens_are_kept(folder, tmp_path):
    edit(folder, eos_token_id=[2, 5])
    model, _ = hub.load(folder)
    hub.save(tmp_path / "again", model, None)
    assert hub.load(tmp_path / "again")[0].config.eos_token_id == [2, 5]
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())[
        "eos_token_id"
    ] == [2, 5]


# -- our own


BIASES = dict(attention_bias=True, mlp_bias=True, head_dim=6, rope_theta=5.0)


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), BIASES])
def test_saved_is_loaded(changes, tokenizer, tmp_path):
    model = tiny(**changes, eos_token_id=3, max_position_embeddings=99)
    hub.save(tmp_path, model, tokenizer)
    again, its = hub.load(tmp_path)
    assert (
        same(again, model)
        and its.json == tokenizer.json
        and its.chat_template == tokenizer.chat_template
    )
    # the config's, else the tokenizer's
    assert again.config.eos_token_id == 3 and again.config.bos_token_id == tokenizer.bos_id
    model.config.bos_token_id, model.config.pad_token_id = tokenizer.bos_id, tokenizer.pad_id
    assert again.config == model.config
    hub.save(tmp_path / "b", again, its)
    for file in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (tmp_path / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_saved_folder_is_transformers_own_kind(tokenizer, tmp_path):
    hub.save(tmp_path, tiny(tie_word_embeddings=True, rope_theta=500.0), tokenizer, torch.bfloat16)
    said = json.loads((tmp_path / "config.json").read_text())
    assert (
        said["architectures"] == ["LlamaForCausalLM"]
        and said["model_type"] == "llama"
        and said["hidden_act"] == "silu"
    )
    assert said["dtype"] == said["torch_dtype"] == "bfloat16"
    assert said["rope_theta"] == 500.0 and said["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 500.0,
    }
    assert "num_labels" not in said and "reward_mean" not in said
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        names = set(f.keys())
        assert (
            f.metadata() == {"format": "pt"}
            and f.get_tensor("model.norm.weight").dtype == torch.bfloat16
        )
    with safe_open(GOLDEN / "llama_tied" / "model.safetensors", "pt") as f:
        assert names == set(f.keys())
    assert (tmp_path / "model.safetensors").stat().st_mode == (
        tmp_path / "config.json"
    ).stat().st_mode
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (
        generation["top_k"],
        generation["top_p"],
        generation["temperature"],
        generation["do_sample"],
    ) == (0, 1.0, 1.0, True)


def test_bf16_weights_survive_a_round_trip(tmp_path):
    hub.save(tmp_path / "a", tiny(), None, torch.bfloat16)
    model, tokenizer = hub.load(tmp_path / "a")
    assert tokenizer is None and model.norm.weight.dtype == torch.float32
    hub.save(tmp_path / "b", model, None, torch.bfloat16)
    # as it is in memory
    hub.save(tmp_path / "c", hub.load(tmp_path / "a", dtype=torch.bfloat16)[0], None)
    for file in ("model.safetensors", "config.json"):
        assert (
            (tmp_path / "a" / file).read_bytes()
            == (tmp_path / "b" / file).read_bytes()
            == (tmp_path / "c" / file).read_bytes()
        )


def test_a_loaded_model_does_not_hold_its_file(tmp_path):
    hub.save(tmp_path, tiny(), None)
    model, _ = hub.load(tmp_path)
    before = model.norm.weight.clone()
    with open(tmp_path / "model.safetensors", "r+b") as f:
        f.write(b"\xff" * (tmp_path / "model.safetensors").stat().st_size)
    assert torch.equal(model.norm.weight, before)
    assert len(generate(model, [[1, 2]], 3)[0]) == 3


# the second pads with its end token, as SmolLM2 does
@pytest.mark.parametrize("kind", ["gpt2_kind", "smollm2_kind"])
def test_reward_model(kind, tmp_path):
    tokenizer = Tokenizer.load(GOLDEN / kind)
    end = tokenizer.special["<|im_end|>"]
    lm = tiny(tokenizer.vocab_size, tie_word_embeddings=True, eos_token_id=end, pad_token_id=end)
    model = scalar_model(lm)
    model.config.reward_mean, model.config.reward_std = 0.25, 2.5
    hub.save(tmp_path, model, tokenizer)
    said = json.loads((tmp_path / "config.json").read_text())
    assert (
        said["architectures"] == ["LlamaForSequenceClassification"]
        and said["num_labels"] == len(said["id2label"]) == 1
    )
    assert said["pad_token_id"] == tokenizer.special["<|endoftext|>"] != said["eos_token_id"]
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert "score.weight" in f.keys() and "lm_head.weight" not in f.keys()
    again, _ = hub.load(tmp_path)
    assert same(again, model) and (
        again.config.reward_mean,
        again.config.reward_std,
        again.config.num_labels,
    ) == (0.25, 2.5, 1)
    assert lm.config.pad_token_id == lm.config.eos_token_id  # saving changes nothing in memory


def test_a_reward_model_straight_from_a_base(tokenizer, tmp_path):
    start = tokenizer.special["<|endoftext|>"]  # a base's beginning, end and padding
    hub.save(
        tmp_path,
        scalar_model(tiny(bos_token_id=start, eos_token_id=start, pad_token_id=start)),
        tokenizer,
    )
    config = hub.load(tmp_path)[0].config
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.special["<|im_end|>"], start)


def test_a_scalar_head_on_what_was_a_tied_model(tmp_path):
    shutil.copytree(GOLDEN / "llama_scores", tmp_path / "m")
    # transformers keeps the word in the config, and there is no head to tie
    edit(tmp_path / "m", tie_word_embeddings=True)
    hub.save(tmp_path / "again", hub.load(tmp_path / "m")[0], None)
    assert same(hub.load(tmp_path / "again")[0], hub.load(GOLDEN / "llama_scores")[0])


def test_reward_model_without_a_free_padding_token(tmp_path):
    for pad in (None, 2):
        with pytest.raises(ValueError, match="a padding token that is not the end token"):
            hub.save(tmp_path, scalar_model(tiny(eos_token_id=2, pad_token_id=pad)), None)
    assert not (tmp_path / "model.safetensors").exists()
    hub.save(tmp_path, scalar_model(tiny(eos_token_id=2, pad_token_id=0)), None)


def test_the_config_is_written_last(tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        hub.save(tmp_path, tiny(), tokenizer)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        hub.load(tmp_path)


# -- bad folders: one sentence each, naming what is wrong

REFUSED = {
    "model_type": ("gpt2", 'model_type = "gpt2".* only "llama", "mistral", .* are'),
    "rope_scaling": ({"rope_type": "llama3", "factor": 8.0}, "llama3 RoPE needs factor, low_freq"),
    "rope_parameters": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
        r'rope_parameters.rope_type = "yarn"',
    ),
    "sliding_window": (4096, "sliding_window = 4096.* only models without sliding_window are"),
    "hidden_act": ("gelu", 'hidden_act = "gelu".* only "silu" is'),
    "quantization_config": ({"quant_method": "gptq"}, "quantization_config"),
    "partial_rotary_factor": (0.5, "partial_rotary_factor = 0.5"),
    "attention_dropout": (0.1, "attention_dropout = 0.1"),
    "architectures": (["LlamaForTokenClassification"], "architecture LlamaForTokenClassification"),
    "vocab_size": ("60", 'vocab_size is "60", a number was expected'),
    "num_attention_heads": (0, "num_attention_heads is 0"),
    "num_key_value_heads": (3, "4 heads must be a multiple of 3"),
    "head_dim": (7, "head_dim = 7 even"),
    "rms_norm_eps": ("small", 'rms_norm_eps is "small", float was expected'),
    "max_position_embeddings": (True, "max_position_embeddings is true, int was expected"),
    "tie_word_embeddings": ("yes", 'tie_word_embeddings is "yes", bool was expected'),
    "num_hidden_layers": (
        3,
        "the checkpoint lacks model.layers.2.input_layernorm.weight and 8 more tensors",
    ),
    "intermediate_size": (
        41,
        r"down_proj.weight has the shape \(32, 40\), config.json asks for \(32, 41\)",
    ),
    "attention_bias": (True, "lacks model.layers.0.self_attn.q_proj.bias and 7 more"),
}


def refused(folder, error, match):
    with pytest.raises(error, match=match) as e:
        hub.load(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


@pytest.mark.parametrize("key", REFUSED)
def test_what_we_lack_is_refused_by_name(folder, key):
    value, message = REFUSED[key]
    edit(folder, **{key: value})
    refused(folder, ValueError, message)


def test_other_ropes(folder):
    for key, value in (
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "beta_fast": 32}),
        ("rope_parameters", {"partial_rotary_factor": 0.5}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("rope_parameters", "plain"),
    ):
        edit(folder, **{"rope_scaling": None, "rope_parameters": None} | {key: value})
        refused(folder, ValueError, rf"{key}\..* is not supported: only")
    edit(folder, rope_scaling={"type": "default"}, rope_parameters=None)
    hub.load(folder)


def test_missing_keys(folder):
    edit(folder, remove=["model_type"])
    refused(folder, ValueError, "model_type = null")
    edit(folder, remove=["hidden_size"], model_type="llama")
    refused(folder, ValueError, "hidden_size is null, a number was expected")


def test_several_labels(tmp_path):
    shutil.copytree(GOLDEN / "llama_scores", tmp_path / "m")
    edit(tmp_path / "m", id2label={"0": "a", "1": "b", "2": "c"})
    refused(tmp_path / "m", ValueError, "3 labels")
    edit(tmp_path / "m", remove=["id2label"])
    refused(tmp_path / "m", ValueError, "2 labels")  # transformers' default
    edit(tmp_path / "m", remove=["id2label"], num_labels=1)
    assert hub.load(tmp_path / "m")[0].config.num_labels == 1


def test_tensors_that_do_not_fit(folder):
    edit_weights(folder, model__norm__weight=None)
    refused(
        folder,
        ValueError,
        "the checkpoint lacks model.norm.weight; config.json and weights are not a pair",
    )
    edit_weights(folder, model__norm__weight=torch.ones(33))
    refused(
        folder, ValueError, r"model.norm.weight has the shape \(33,\), config.json asks for \(32,\)"
    )
    edit_weights(folder, model__norm__weight=torch.ones(32, dtype=torch.int8))
    refused(folder, ValueError, "model.norm.weight is torch.int8: of quantised weights only NF4")
    edit_weights(
        folder,
        model__norm__weight=torch.ones(32),
        model__layers__0__self_attn__q_norm__weight=torch.ones(8),
    )
    refused(folder, ValueError, "unexpected tensor model.layers.0.self_attn.q_norm.weight;")


def test_damaged_weights(folder):
    file, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    page = b"<!doctype html><title>404</title>" * 9
    for damaged in (
        b"",
        whole[:5],
        whole[:-100],
        whole + b"more",
        page,
        whole[:8] + b"x" * header + whole[8 + header :],
        b"\xff" * 4096,
    ):
        file.write_bytes(damaged)
        refused(folder, ValueError, "is damaged or no safetensors file")


def test_damaged_config(folder):
    for text, message in (
        ("{", "is not JSON"),
        ("[1]", "holds a list, an object was expected"),
        ("", "is not JSON"),
    ):
        (folder / "config.json").write_text(text)
        refused(folder, ValueError, message)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, ValueError, "is not JSON")


def test_folders_that_are_no_checkpoint(folder, tmp_path):
    refused(tmp_path / "nowhere", FileNotFoundError, "is no folder: a checkpoint .* was expected")
    refused(folder / "config.json", FileNotFoundError, "is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", FileNotFoundError, "has no config.json: a checkpoint")
    (tmp_path / "run" / "state").mkdir(parents=True)
    refused(tmp_path / "run", FileNotFoundError, "its run has not finished")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "empty", FileNotFoundError, "an adapter without its model")
    (folder / "model.safetensors").unlink()
    refused(folder, FileNotFoundError, "has no weights: model.safetensors was expected")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    refused(folder, FileNotFoundError, r"has pickled weights only \(pytorch_model.bin\)")


def test_shards(tmp_path):
    shutil.copytree(GOLDEN / "llama_biases", tmp_path / "m")
    folder = tmp_path / "m"
    index, shards = (
        folder / "model.safetensors.index.json",
        sorted(folder.glob("model-*.safetensors")),
    )
    assert len(shards) > 1
    content = index.read_text()
    for text, message in (
        ("{}", "has no weight_map"),
        ('{"weight_map": 3}', "has no weight_map"),
        ("nonsense", "is not JSON"),
    ):
        index.write_text(text)
        refused(folder, ValueError, message)
    index.write_text(content)
    weights = shards[1].read_bytes()
    shards[1].write_bytes(weights[:-3])
    refused(folder, ValueError, f"{shards[1].name} is damaged")
    shards[1].unlink()
    refused(
        folder,
        FileNotFoundError,
        f"{shards[1].name} is missing, model.safetensors.index.json names it",
    )


def test_a_vocabulary_larger_than_the_embedding(tokenizer, tmp_path):
    hub.save(tmp_path, tiny(tokenizer.vocab_size - 1), tokenizer)
    refused(tmp_path, ValueError, "the tokenizer has 500 tokens, the embedding 499")
    hub.save(tmp_path, tiny(tokenizer.vocab_size + 12), tokenizer)  # spare rows do no harm
    assert hub.load(tmp_path)[0].config.vocab_size == 512


def test_a_damaged_tokenizer(tokenizer, tmp_path):
    hub.save(tmp_path, tiny(), tokenizer)
    (tmp_path / "tokenizer.json").write_text("{")
    refused(tmp_path, ValueError, "tokenizer.json is not JSON")


def test_a_language_model_was_expected(tokenizer, tmp_path):
    hub.save(tmp_path / "lm", tiny(), tokenizer)
    assert hub.language_model(tmp_path / "lm")[1].json == tokenizer.json
    hub.save(tmp_path / "reward", scalar_model(tiny()), tokenizer)
    with pytest.raises(ValueError, match="reward is a reward model: a language model was expected"):
        hub.language_model(tmp_path / "reward")
    with pytest.raises(ValueError, match="llama_tied has no tokenizer.json"):
        hub.language_model(GOLDEN / "llama_tied")
