"""Every family: transformers' own numbers (golden), our own invariances, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_memory import build, saved
from tiny import FAMILIES, SMALL, close, family, score_rows

import adapters
import lora
import model as M
from common import families, hub, memory
from model import Config
from packing import by_segments, pad
from sampling import generate

GOLDEN = Path(__file__).parent / "golden"
GENERATOR = torch.Generator().manual_seed(2)
ROWS = [torch.randint(3, 64, (n,), generator=GENERATOR).tolist() for n in (26, 13, 1, 16)]
# one of each kind of attention, norm and RoPE
KINDS = ("mistral", "gemma2", "gemma3", "phi4")


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "families.json").read_text()), load_file(
        GOLDEN / "families.safetensors"
    )


def alone(model, row):
    return model(torch.tensor([row]))[0]


# -- transformers' own


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_transformers_own_logits_and_answer(name, golden):
    told, tensors = golden
    model, tokens = family(name), tensors["tokens"].tolist()
    theirs = Config(**families.read("config.json", told[name]["config"]))
    assert theirs == model.config  # the newer spelling
    got = alone(model, tokens)[[0, 5, 6, 15, 16, 29]], alone(model, tokens[:12])[[7, 11]]
    assert tensors[name].std() > 0.5
    close(torch.cat(got), tensors[name], 1e-4)
    assert generate(model, [tokens[:12]], 20, temperature=0)[0] == told[name]["answer"]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_saved_is_its_family_s(name, golden, tmp_path):
    model = family(name, initializer_range=0.5)
    hub.save(tmp_path, model)
    ours, theirs = json.loads((tmp_path / "config.json").read_text()), golden[0][name]["config"]
    assert ours["architectures"] == theirs["architectures"] and ours["initializer_range"] == 0.5
    assert ours["dtype"] == ours["torch_dtype"] == "float32"
    assert ours["rope_parameters"].keys() == theirs["rope_parameters"].keys() - {"type"}
    scaling = FAMILIES[name].get("rope_scaling", {})
    kind = {"type", "rope_type"}
    assert ours.get("rope_scaling", {}).keys() - kind == scaling.keys() - kind
    again, _ = hub.load(tmp_path)
    assert again.config == model.config
    assert torch.equal(alone(again, ROWS[0]), alone(model, ROWS[0]))
    old = json.loads(json.dumps(SMALL | FAMILIES[name]))
    assert Config(**families.read("", old)) == model.config  # the older spelling


# -- invariances


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_padded_packed_and_cached_are_alone(name):
    """Among neighbours that are long examples, and that are not."""
    model = family(name)
    expected = [alone(model, row) for row in ROWS]
    for left in (False, True):
        tokens, mask = pad(ROWS, left=left)
        logits = model(tokens, mask)
        for i, e in enumerate(expected):
            close(logits[i][mask[i]], e, 1e-4)
    tokens = torch.tensor([sum(ROWS, [])])
    segments = torch.tensor([sum(([i] * len(row) for i, row in enumerate(ROWS)), [])])
    packed = model.logits(model.packed(by_segments(tokens, segments)))[0]
    close(packed, torch.cat(expected), 1e-4)
    prompts = [ROWS[1]] * 3 + [ROWS[0]]  # behind one prompt: answers that pass 16 tokens, or do not
    answers = [ROWS[3][:n] for n in (3, 12, 7, 5)]
    p = M.logprobs(model, prompts, answers)
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        row = alone(model, prompt + answer)[len(prompt) - 1 : -1].log_softmax(-1)
        close(p[n, : len(answer)], row.gather(1, torch.tensor(answer)[:, None])[:, 0], 1e-4)
    for row, answer in zip(ROWS, generate(model, ROWS, 6, temperature=0), strict=True):
        for token in answer:
            assert alone(model, row)[-1].argmax() == token
            row = row + [token]


@torch.no_grad()
def test_a_window_holds_its_tokens_and_no_more():
    """Of one layer: token 9 sees 4 to 9 where the window is 6."""
    model, row = family("mistral", num_hidden_layers=1), list(range(10, 20))
    before = alone(model, row)[9]
    for i in range(10):
        changed = [*row[:i], 5, *row[i + 1 :]]
        assert (torch.equal(alone(model, changed)[9], before)) == (i < 4), i


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_no_gradient(name):
    model, grads = family(name), []
    for model.checkpointing in (False, True):
        model.zero_grad()
        alone(model, ROWS[0]).logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*grads, strict=True))


# -- adapters, heads, 4 bits, memory


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@torch.no_grad()
def test_virtual_tokens_stand_in_front(name, kind):
    """A prompt of real embeddings is these tokens: in windows, in the cache and in packed rows."""
    model, first = family(name), ROWS[3][:7]
    rows, limit = ([ROWS[1][:3], ROWS[2]], 6) if name == "phi4" else (ROWS, 12)
    expected = [alone(model, first + row)[7:] for row in rows]
    answers = generate(model, [first + row for row in rows], limit, temperature=0)
    model.virtual = adapters.Prompt(model.embed(torch.tensor(first)).clone())
    if kind == "prefix":
        model.virtual = adapters.prefix(model, model.virtual, False, None)
    tokens, mask = pad(rows, left=True)
    logits = model(tokens, mask)
    for i, e in enumerate(expected):
        close(logits[i][mask[i]], e, 1e-4)
        close(alone(model, rows[i]), e, 1e-4)
    tokens = torch.tensor([rows[0] + rows[1]])
    segments = torch.tensor([[0] * len(rows[0]) + [1] * len(rows[1])])
    packed = model.logits(model.packed(by_segments(tokens, segments)))[0]
    close(packed, torch.cat(expected[:2]), 1e-4)
    assert generate(model, rows, limit, temperature=0) == answers
    assert model.context == (9 if name == "phi4" else 89)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_ia3_and_lora_merge(name):
    for kind in ("ia3", "lora"):
        model = family(name)
        start = alone(model, ROWS[0])
        if kind == "lora":
            lora.add_lora(model, 3, 6, "all", generator=torch.Generator().manual_seed(0))
        else:
            adapters.add_adapter(model, "ia3")
        assert torch.equal(alone(model, ROWS[0]), start)
        for n, p in model.named_parameters():
            if n.endswith(".scale") or ".B." in n:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
        trained = {n.rpartition(".")[2] for n, _ in adapters.parts(model)}
        if kind == "ia3":
            assert trained == {*adapters.targets(model)}
            assert trained == {"qkv_proj", "down_proj"} if name == "phi4" else "v_proj" in trained
        changed = alone(model, ROWS[0])
        assert (changed - start).abs().max() > 0.1
        close(alone(lora.merge(model), ROWS[0]), changed, 2e-4)


def test_targets_are_the_family_s():
    def names(model):
        return {n.rpartition(".")[2] for n, m in lora.linears(model).items() if hasattr(m, "A")}

    assert names(lora.add_lora(family("phi3"), 2, 2, "attention")) == {"qkv_proj", "o_proj"}
    assert names(lora.add_lora(family("phi3"), 2, 2, "mlp")) == {"gate_up_proj", "down_proj"}
    assert names(lora.add_lora(family("qwen3"), 2, 2, "all")) == {
        *(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))
    }
    with pytest.raises(ValueError, match="targets names 'q_proj'.*did you mean qkv_proj"):
        lora.add_lora(family("phi3"), 2, 2, "q_proj")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_reward_model_and_4_bits(name, tmp_path):
    """Also after hub.load: a scalar head has no soft cap."""
    model = M.scalar_model(family(name), torch.Generator().manual_seed(0))
    hub.save(tmp_path / "reward", model)
    again, _ = hub.load(tmp_path / "reward")
    assert again.config == model.config
    tokens, mask = pad(ROWS)
    h = [model.hidden(torch.tensor([row]))[0, -1] @ model.score.weight[0] for row in ROWS]
    close(score_rows(again, tokens, mask), torch.stack(h), 1e-4)
    hub.save(tmp_path / "lm", family(name))
    coarse, fine = (hub.load(tmp_path / "lm", quant=q)[0] for q in ("nf4", None))
    linears = lora.linears(coarse)
    assert all(hasattr(linears[n], "dequantize") for n in linears if n != "lm_head")
    for n, layer in linears.items():
        if n != "lm_head":
            fine.get_submodule(n).weight.copy_(layer.dequantize())
    close(alone(coarse, ROWS[0]), alone(fine, ROWS[0]), 1e-4)


def test_a_tied_folder_that_holds_the_head_alone(tmp_path):
    model = family("gemma")
    hub.save(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors")
    again, _ = hub.load(tmp_path)
    assert again.lm_head.weight is again.embed_tokens.weight
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_memory(name):
    wide = dict(hidden_size=192, intermediate_size=512, num_attention_heads=6, head_dim=32)
    c = family(name, **wide, vocab_size=512, num_hidden_layers=2).config
    for rank in (0, 4):
        model = build(c, rank)
        assert memory.predict(c, rank) == memory.count(model)
        found = max(memory.contents(c, 128, 64, rank).values())
        assert abs(found / saved(model, 2, 64, False) - 1) < 0.08


# -- what is not known


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("mistral", {"model_type": "mixtral"}, 'model_type = "mixtral" .* only "llama", .* are'),
        ("mistral", {"attention_bias": True}, "only models without attention_bias are"),
        ("qwen2", {"use_mrope": True}, "use_mrope = true .* only models without use_mrope are"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types = .* for each layer is"),
        ("qwen3", {"num_experts": 8}, "num_experts = 8 is not supported"),
        ("gemma", {"hidden_activation": "gelu"}, 'only "gelu_pytorch_tanh" is'),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, a number above 0"),
        ("gemma2", {"sliding_window": "6"}, 'sliding_window is "6", a number above 0'),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1 is not supported"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2}}, 'rope_type = "yarn" .* longrope'),
        ("phi3", {"partial_rotary_factor": 0.7}, "RoPE needs to turn an even part of a head"),
        ("phi3.5", {"partial_rotary_factor": 0.5}, "longrope RoPE needs short_factor, long_factor"),
        ("llama3", {"rope_scaling": {"rope_type": "llama3", "factor": 0}}, "llama3 RoPE needs"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -1}}, "linear RoPE needs factor"),
        ("llama", {"logit_scale": 0.5}, "logit_scale = 0.5 .* only models without logit_scale are"),
    ],
)
def test_what_is_not_known_is_refused_by_name(name, changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | FAMILIES[name] | changes))
    with pytest.raises(ValueError, match=message) as e:
        hub.read_config(tmp_path)
    assert str(e.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(e.value)


def test_words_that_change_nothing(tmp_path):
    """Of the hub's own folders: null, off, or known to mean nothing."""
    plain = dict(use_cache=True, transformers_version="4.40.0", auto_map={"AutoConfig": "x.C"})
    plain |= dict(attention_dropout=0.0, embd_pdrop=0.0, lm_head_bias=False, interpolate_factor=1)
    plain |= dict(use_bidirectional_attention=None, cache_implementation="hybrid")
    for name in FAMILIES:
        (tmp_path / "config.json").write_text(json.dumps(SMALL | FAMILIES[name] | plain))
        assert hub.read_config(tmp_path) == family(name).config
    # null is no window, absent the family's own
    for word, window in (({"sliding_window": None}, 0), ({}, 4096)):
        config = SMALL | {"model_type": "mistral"} | word
        assert families.read("", config).get("window", 0) == window


def test_settings_of_no_family_are_not_saved(tmp_path):
    model = M.Transformer(Config(64, 32, 48, 1, 4, 2, 8, qk_norm=True))
    with pytest.raises(ValueError, match="cannot be saved: no llama model has all of its settings"):
        hub.save(tmp_path, model)
