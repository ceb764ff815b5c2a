"""LoRA: nothing changes at step 0, what trains and what does not, switching, merging (tied heads
too), sharing, and PEFT's folders.
"""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import chat_tokenizer, lm, score_rows

import lora
from common import hub, run, tuning
from common.peft import load_adapter, save_adapter
from lora import LoRALinear, add_lora, merge, use
from model import scalar_model, score, share, states, values
from ppo import value
from quant import quantize_model
from sampling import generate

ROOT, GOLDEN = Path(__file__).parent.parent, Path(__file__).parent / "golden"
LORAS = {"list": "tied", "pattern": "biases", "head": "tied", "scores": "scores"}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(280, (2, 12), generator=torch.Generator().manual_seed(9))
BIASES = dict(attention_bias=True, mlp_bias=True)


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def fill(model, name="default", seed=1, std=0.3):
    """Sets an adapter to numbers that matter → the model."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith((f".A.{name}", f".B.{name}")):
                p.copy_(torch.randn(p.shape, generator=seeded(seed)) * std)
    return model


def step(model, lr=0.05):
    """One step of AdamW on whatever trains; → what it was before."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = run.adamw(model, lr)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    return before


def wrapped(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() < tolerance, (a - b).abs().max()


# ---------------------------------------------------------------- the layer
@pytest.mark.parametrize("rslora, scale", [(False, 12 / 4), (True, 12 / 2)])
def test_the_layer_is_its_definition(rslora, scale):
    model = fill(add_lora(lm(**BIASES), 4, 12, "up_proj", rslora=rslora))
    layer, x = model.layers[1].mlp.up_proj, torch.randn(3, 5, 16, generator=seeded())
    W, A, B = (t.double() for t in (layer.base.weight, layer.A["default"], layer.B["default"]))
    assert A.shape == (4, 16) and B.shape == (24, 4)
    close(layer(x).double(), x.double() @ (W + scale * B @ A).T + layer.base.bias.double(), 1e-4)


def test_a_starts_kaiming_uniform_and_b_at_zero():
    model = add_lora(lm(), 16, 8, "down_proj,q_proj", generator=seeded(3))
    for layer in wrapped(model).values():
        A, bound = layer.A["default"], layer.in_features**-0.5  # sqrt(6 / ((1 + 5) in))
        assert 0.9 * bound < A.abs().max() <= bound and A.std().item() == pytest.approx(
            bound / 3**0.5, rel=0.15
        )
        assert not layer.B["default"].any()
    again = add_lora(lm(), 16, 8, "down_proj,q_proj", generator=seeded(3))
    assert all(
        torch.equal(a.A["default"], b.A["default"])
        for a, b in zip(wrapped(model).values(), wrapped(again).values(), strict=True)
    )


def test_dropout_is_on_the_adapters_input_alone():
    x = torch.randn(2, 5, 16, generator=seeded())
    model = add_lora(lm(), 4, 8, "up_proj", dropout=0.5)
    layer, base = model.layers[0].mlp.up_proj, lm().layers[0].mlp.up_proj
    assert torch.equal(layer(x), base(x))  # the base's input is whole
    fill(model)
    A, B = layer.A["default"], layer.B["default"]
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    close(got, base(x) + 2 * F.dropout(x, 0.5) @ A.T @ B.T)
    model.eval()
    close(layer(x), base(x) + 2 * x @ A.T @ B.T)


def test_finite_differences():
    layer = fill(add_lora(lm(), 2, 3, "q_proj")).double().layers[0].self_attn.q_proj
    A, B, x = (
        layer.A["default"],
        layer.B["default"],
        torch.randn(3, 16, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda *tensors: layer(x), (x, A, B))


# ---------------------------------------------------------------- which layers, and what trains
@pytest.mark.parametrize(
    "targets, expected",
    [
        ("attention", ATTENTION),
        ("mlp", MLP),
        ("all", ATTENTION + MLP),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (["mlp", "k_proj"], [*MLP, "k_proj"]),
    ],
)
def test_targets(targets, expected):
    names = {
        f"layers.{i}.{'mlp' if p in MLP else 'self_attn'}.{p}" for i in range(2) for p in expected
    }
    model = add_lora(lm(), 2, 4, targets)
    assert wrapped(model).keys() == names
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert (
        trained == {f"{n}.{k}.default" for n in names for k in "AB"} == run._tensors(model).keys()
    )
    assert wrapped(add_lora(lm(), 2, 4, f"{','.join(expected)}, lm_head")).keys() == names | {
        "lm_head"
    }


def test_one_layer_by_its_whole_name():
    assert wrapped(add_lora(lm(), 2, 4, ["layers.1.mlp.up_proj"])).keys() == {
        "layers.1.mlp.up_proj"
    }
    assert wrapped(add_lora(lm(), 2, 4, "1.self_attn.q_proj,lm_head")).keys() == {
        "layers.1.self_attn.q_proj",
        "lm_head",
    }


@pytest.mark.parametrize(
    "targets, near",
    [
        ("atention", "attention"),
        ("q_proj,v_prj", "v_proj"),
        (["lmhead"], "lm_head"),
        ("roj", "proj"),
        ("", "."),
    ],
)
def test_unknown_targets_are_refused_with_the_nearest(targets, near):
    model = lm()
    with pytest.raises(ValueError, match=f"no linear layer of this model .did you mean .*{near}"):
        add_lora(model, 2, 4, targets)
    assert not wrapped(model) and all(p.requires_grad for p in model.parameters())
    for name in ("embed_tokens", "norm", "score"):
        with pytest.raises(ValueError, match=f"targets names '{name}'"):
            add_lora(scalar_model(lm()), 2, 4, name)


@pytest.mark.parametrize(
    "said, message",
    [
        (dict(rank=0, alpha=1), "r is 0, a whole number from 1"),
        (dict(rank=2, alpha=-1.0), "lora_alpha is -1.0, a number above 0"),
        (dict(rank=2, alpha=1, dropout=1.0), "lora_dropout is 1.0, a number from 0, below 1"),
        (dict(rank=2, alpha=1, name="a.b"), "name is 'a.b': one without a dot"),
    ],
)
def test_impossible_settings_are_refused(said, message):
    model = lm()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **said)
    assert not wrapped(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True)])
def test_step_0_is_the_base_bit_for_bit(dtype, changes):
    model = lm(**changes).to(dtype)
    before = model(TOKENS)
    assert torch.equal(add_lora(model, 4, 32, "all,lm_head")(TOKENS), before)


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_step_every_b_has_moved_and_the_base_has_not(scalar, dtype):
    model = lm().to(dtype)
    model = (
        add_lora(scalar_model(model, seeded()), 4, 8, "all", generator=seeded())
        if scalar
        else add_lora(model, 4, 8, "all,lm_head")
    )
    before, start = step(model), tuning.trained(model)
    for n, p in model.named_parameters():
        moved = ".B." in n or n == "score.weight"  # A's gradient is 0 while B is
        assert p.requires_grad == (".A." in n or moved) and torch.equal(p, before[n]) != moved, n
        assert p.dtype == (torch.float32 if p.requires_grad else dtype), n
    step(model)
    assert tuning.unmoved(model, start) == []
    assert not any(
        torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad
    )


def test_unmoved_names_those_that_stayed():
    model = add_lora(lm(), 2, 4, "all")
    model.layers[1].mlp.up_proj.B["default"].register_hook(torch.zeros_like)
    step(model)
    start = tuning.trained(model)
    assert len(tuning.unmoved(model, start)) == 28  # it goes on from here: nothing has moved since
    step(model)
    # A's gradient is 0 while B is
    assert tuning.unmoved(model, start) == [f"layers.1.mlp.up_proj.{k}.default" for k in "AB"]


def test_adapters_are_float32_on_a_bf16_base():
    model = fill(add_lora(lm().bfloat16(), 4, 8, "all,lm_head"))
    layer, x = model.layers[0].mlp.up_proj, torch.randn(5, 16, generator=seeded()).bfloat16()
    A, B = layer.A["default"], layer.B["default"]
    assert (
        A.dtype == B.dtype == torch.float32
        and layer(x).dtype == torch.bfloat16 == model(TOKENS).dtype
    )
    expected = layer.base(x).double() + 2 * x.double() @ A.double().T @ B.double().T
    # one rounding, at the end
    assert ((layer(x).double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()
    with torch.autocast("cpu", torch.bfloat16):
        logits = fill(add_lora(lm(), 4, 8))(TOKENS)
    close(logits.float(), fill(add_lora(lm(), 4, 8))(TOKENS), 0.5)


def test_resume_restores_an_adapter():
    model, again = (add_lora(lm(), 2, 4) for _ in range(2))
    step(model)
    saved = run._tensors(model)
    run._restore(again, saved)
    assert len(saved) == 28 and torch.equal(again(TOKENS), model(TOKENS))


# ---------------------------------------------------------------- several adapters
def test_switching():
    model = add_lora(lm(), 4, 8, "attention,lm_head", generator=seeded(1), name="a")
    fill(model, "a", 1)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith(".a")
    }
    fill(add_lora(model, 2, 6, "mlp,v_proj", rslora=True, name="b"), "b", 2)
    assert lora.adapters(model) == ["a", "b"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith(".b")
    }
    alone = (
        fill(add_lora(lm(), 4, 8, "attention,lm_head", name="a"), "a", 1),
        fill(add_lora(lm(), 2, 6, "mlp,v_proj", rslora=True), seed=2),
    )
    a, b, base = alone[0](TOKENS), alone[1](TOKENS), lm()(TOKENS)
    assert (a - b).abs().max() > 0.1 < (a - base).abs().max()
    for name, expected in (("b", b), ("a", a), (None, base), ("b", b)):
        use(model, name)
        assert torch.equal(model(TOKENS), expected)
    with pytest.raises(ValueError, match="no adapter named c: it has a, b"):
        use(model, "c")
    with pytest.raises(ValueError, match="an adapter named a already"):
        add_lora(model, 4, 8, name="a")
    with pytest.raises(ValueError, match="no adapter named x: it has none"):
        use(lm(), "x")


def test_the_reference_is_the_base_while_the_policy_trains():
    model = add_lora(lm(), 4, 8)
    for _ in range(2):
        step(model)
    use(model, None)
    assert torch.equal(model(TOKENS), lm()(TOKENS))
    use(model, "default")
    assert (model(TOKENS) - lm()(TOKENS)).abs().max() > 0.01


def test_generation_with_an_adapter():
    model, prompts = fill(add_lora(lm(), 4, 8, "all,lm_head")), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    answers = generate(model, prompts, 12, temperature=0)
    assert answers != generate(lm(), prompts, 12, temperature=0)
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            for t, token in enumerate(answer):
                assert model(torch.tensor([prompt + answer[:t]]))[0, -1].argmax() == token
    use(model, None)
    assert generate(model, prompts, 12, temperature=0) == generate(lm(), prompts, 12, temperature=0)


# ---------------------------------------------------------------- merging
class FourBit(nn.Module):
    """A stand-in for a quantised layer: its weights are whole sixteenths, and it can say them in
    float32.
    """

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features, self.bias = (
            layer.in_features,
            layer.out_features,
            layer.bias,
        )
        self.register_buffer("codes", (layer.weight.detach() * 16).round().to(torch.int8))

    def dequantize(self):
        return self.codes.float() / 16

    def forward(self, x):
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


def four_bit(**changes):
    model = lm(**changes)
    for n, layer in lora.linears(model).items():
        if n != "lm_head":
            model.set_submodule(n, FourBit(layer))
    return model


@pytest.mark.parametrize("make", [lm, four_bit])
@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), BIASES])
def test_merged_is_unmerged(make, changes, capsys):
    model = fill(add_lora(make(**changes), 4, 8, "attention,lm_head", dropout=0.1), std=0.1)
    before = model.eval()(TOKENS)
    assert merge(model) is model and not model.training
    close(model(TOKENS), before)
    assert (before - make(**changes)(TOKENS)).abs().max() > 0.1
    assert {type(m) for n, m in model.named_modules() if n.endswith(("_proj", "lm_head"))} == {
        nn.Linear
    }
    assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in lm(**changes).state_dict().items()
    }
    said = capsys.readouterr().out
    assert "logits of 128 tokens differ by at most" in said and ("untied" in said) == bool(
        changes.get("tie_word_embeddings")
    )
    assert 0 <= float(said.split("at most ")[1].split(",")[0]) < 1e-4


def test_the_drift_is_what_it_says(capsys):
    model = fill(add_lora(lm().bfloat16(), 4, 8), std=0.05)
    page = torch.randint(280, (1, 128), generator=seeded())
    before = model.eval()(page).float()
    drift = (merge(model)(page).float() - before).abs()
    assert (
        f"at most {drift.max():.2g}, {drift.mean():.2g} on average" in capsys.readouterr().out
        and drift.max() > 0
    )


def test_bf16_weights_are_rounded_once():
    model = fill(add_lora(lm().bfloat16(), 4, 8))
    layer = model.layers[0].mlp.up_proj
    expected = (
        layer.base.weight.double() + 2 * layer.B["default"].double() @ layer.A["default"].double()
    ).bfloat16()
    got = merge(model).layers[0].mlp.up_proj.weight
    # but for float32's own rounding
    assert got.dtype == torch.bfloat16 and (got != expected).float().mean() < 0.01


def test_what_is_merged_is_the_adapter_in_use():
    model = fill(add_lora(lm(), 4, 8, "attention", name="a"), "a", std=0.1)
    fill(add_lora(model, 2, 8, "mlp", name="b"), "b")
    use(model, "a")
    close(merge(model)(TOKENS), fill(add_lora(lm(), 4, 8, "attention"), std=0.1)(TOKENS))
    assert torch.equal(model.layers[0].mlp.up_proj.weight, lm().layers[0].mlp.up_proj.weight)
    model = add_lora(lm(), 4, 8)
    use(model, None)
    with pytest.raises(ValueError, match="no adapter is in use.*default"):
        merge(model)


def test_a_quantised_model_without_adapters_becomes_plain():
    model = four_bit()
    before = model(TOKENS)
    close(merge(model)(TOKENS), before)
    assert model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_merging_frees_a_layer_before_the_next(monkeypatch):
    """Of the layers that are replaced one at most is alive, or a model in 4 bits and one in 16
    would lie side by side.
    """
    model = add_lora(four_bit(), 4, 8, "attention")
    gone = {n: weakref.ref(m) for n, m in lora.linears(model).items() if n != "lm_head"}
    real, alive = lora.merged, []

    def merged(layer):
        alive.append(sum(ref() is not None for ref in gone.values()))
        return real(layer)

    monkeypatch.setattr(lora, "merged", merged)
    merge(model)
    assert alive == [*range(14, 0, -1), 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_merging_needs_no_second_model(capsys):
    """12 MB a layer in bf16: the end of a run fits where its training did."""
    model = (
        lm(std=0.02, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, head_dim=512)
        .bfloat16()
        .cuda()
    )
    model = fill(add_lora(quantize_model(model), 4, 8), std=0.02)
    page = torch.randint(280, (1, 128), generator=seeded()).cuda()
    before = model.eval()(page).float()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    assert merge(model).device.type == "cpu"
    largest = 2 * 1024 * 4096
    assert torch.cuda.max_memory_allocated() - held < 6 * largest + 4 * 2**20
    assert (
        float(capsys.readouterr().out.split("at most ")[1].split(",")[0]) < 0.1 * before.abs().max()
    )
    close(model.cuda()(page).float(), before, 0.1 * before.abs().max())


@pytest.mark.parametrize("targets", ["lm_head", "all,lm_head", "all"])
def test_a_tied_head_merged_saved_and_loaded(targets, tmp_path):
    model = add_lora(lm(tie_word_embeddings=True), 4, 8, targets)
    step(model)
    logits = model(TOKENS)
    assert (
        model.embed_tokens.weight
        is (model.lm_head.base if "lm_head" in targets else model.lm_head).weight
    )
    with pytest.raises(ValueError, match="has adapters: lora.merge"):
        hub.save(tmp_path, model)
    hub.save(tmp_path, merge(model), chat_tokenizer())
    again, _ = hub.load(tmp_path)
    close(again(TOKENS), logits)
    assert torch.equal(again.embed_tokens.weight, lm(tie_word_embeddings=True).embed_tokens.weight)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] == (
        targets == "all"
    )
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (targets != "all")


# ---------------------------------------------------------------- models over one base
def test_share_copies_what_trains_and_nothing_else():
    model = fill(add_lora(four_bit(tie_word_embeddings=True), 4, 8, "all,lm_head"))
    other = share(model)
    theirs = dict(other.named_parameters()) | dict(other.named_buffers())
    for n, t in [*model.named_parameters(), *model.named_buffers()]:
        assert (theirs[n] is t) != t.requires_grad and torch.equal(theirs[n], t), n
    logits = model(TOKENS)
    step(other)
    assert torch.equal(model(TOKENS), logits) and not torch.equal(other(TOKENS), logits)
    use(other, None)
    assert not torch.equal(model(TOKENS), other(TOKENS))
    assert other.lm_head.base.weight is other.embed_tokens.weight is model.embed_tokens.weight
    whole = share(lm())  # nothing is frozen: nothing is shared
    assert all(p.requires_grad for p in whole.parameters())


def test_four_models_over_one_base(tmp_path):
    """PPO's: policy, reference (no adapter), reward model (frozen) and critic, which starts as the
    reward model.
    """
    policy = add_lora(four_bit(), 4, 8)
    reward = scalar_model(share(policy), seeded())
    assert (
        not hasattr(reward, "lm_head")
        and reward.config.num_labels == 1
        and policy.config.num_labels == 0
    )
    step(reward)
    save_adapter(reward, tmp_path)
    bare = share(four_bit().requires_grad_(False))
    critic = load_adapter(scalar_model(bare), tmp_path)
    judge = load_adapter(scalar_model(bare), tmp_path, trainable=False)
    assert not any(p.requires_grad for p in judge.parameters()) and len(run._tensors(critic)) == 29
    base = {id(t) for t in [*bare.parameters(), *bare.buffers()]} - {id(bare.lm_head.weight)}
    for model in (critic, judge):
        assert base <= {id(t) for t in [*model.parameters(), *model.buffers()]}
    scores = reward(TOKENS)
    assert torch.equal(critic(TOKENS), scores) and torch.equal(judge(TOKENS), scores)
    step(critic)
    assert torch.equal(judge(TOKENS), scores) and not torch.equal(critic(TOKENS), scores)
    # its score trains, the one it came with stays
    again = add_lora(share(judge), 2, 4, name="new")
    step(again)
    assert torch.equal(judge(TOKENS), scores) and not judge.score.weight.requires_grad


def test_a_scalar_model_of_an_adapted_one():
    model = fill(add_lora(lm(tie_word_embeddings=True), 4, 8, "all,lm_head"))
    scalar = scalar_model(model, seeded())
    assert torch.equal(scalar.hidden(TOKENS), model.hidden(TOKENS))
    assert (
        scalar.embed_tokens.weight is model.embed_tokens.weight
        and scalar.score.weight.requires_grad
    )
    step(scalar)
    assert (
        not torch.equal(scalar.hidden(TOKENS), model.hidden(TOKENS))
        and model.config.tie_word_embeddings
    )


def test_a_scalar_head_is_float32_over_a_bf16_base():
    model = scalar_model(lm().bfloat16(), seeded())
    assert (
        model.score.weight.dtype == torch.float32
        and model.embed_tokens.weight.dtype == torch.bfloat16
    )
    close(score(model, TOKENS.tolist(), [[]] * len(TOKENS)), model(TOKENS)[:, -1], 0.05)
    model.score.bfloat16()
    assert model(TOKENS).dtype == torch.float32
    assert add_lora(model, 2, 4).score.weight.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_scalar_head_is_float32_under_autocast(base):
    """forward(), values(), score() and what PPO reads: the product of hidden states and head,
    unrounded, wherever it stands.
    """
    model = scalar_model(lm().to(base), seeded())
    head, rows = model.score.weight[0].double(), TOKENS.tolist()
    texts = [row[:1] for row in rows], [row[1:] for row in rows]
    with torch.autocast("cpu", torch.bfloat16):
        h, read = model.hidden(TOKENS), states(model, *texts)
        found = model(TOKENS), values(model, *texts), score(model, *texts), value(model, *texts)
    assert all(x.dtype == torch.float32 for x in found)
    expected, before = (h.double() @ head).float(), (read.double() @ head).float()
    rounded = (h.bfloat16() @ head.bfloat16()).float()
    assert (rounded - expected).abs().max() > 1e-3
    close(found[0], expected, 1e-5)
    close(found[1], before[:, :-1], 1e-5)
    close(found[2], before[:, -1], 1e-5)
    close(found[3], before[:, :-1], 1e-5)  # its deviations are 0 and 1


# ---------------------------------------------------------------- PEFT's folders
@pytest.mark.parametrize("name", LORAS)
def test_the_peers_own_numbers(name):
    """PEFT's adapters: its outputs, and its gradients of everything that it trains."""
    expected, base = (
        load_file(GOLDEN / f"lora_{name}" / "expected.safetensors"),
        GOLDEN / f"llama_{LORAS[name]}",
    )
    rows, (model, _) = load_file(base / "expected.safetensors"), hub.load(base)
    plain = model(rows["tokens"], rows["mask"].bool())
    load_adapter(model, GOLDEN / f"lora_{name}")
    tokens, mask = rows["tokens"], rows["mask"].bool()
    out = score_rows(model, tokens, mask)[:, None] if name == "scores" else model(tokens, mask)
    where = slice(None) if name == "scores" else mask
    close(out[where], expected["out"][where], 1e-4)
    assert name == "scores" or (plain - out)[mask].abs().max() > 0.1
    out[where].square().sum().backward()
    seen = 0
    for n, p in model.named_parameters():
        if p.requires_grad:
            k = "base_model.model." + hub.hub_name(
                n.replace(".A.default", ".lora_A.weight").replace(".B.default", ".lora_B.weight")
            )
            assert (p.grad - expected[k]).abs().max() < 1e-4 * max(1, expected[k].abs().max()), k
            seen += 1
    assert seen == len(expected) - 1


@pytest.mark.parametrize("name", LORAS)
def test_theirs_written_again_is_theirs(name, tmp_path):
    folder, (model, _) = GOLDEN / f"lora_{name}", hub.load(GOLDEN / f"llama_{LORAS[name]}")
    save_adapter(load_adapter(model, folder), tmp_path, f"llama_{LORAS[name]}")
    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, folder))
    wrong = {
        k: (v, theirs[k])
        for k, v in ours.items()
        if v != theirs[k] and k not in ("target_modules", "modules_to_save")
    }
    assert not wrong and set(ours["modules_to_save"] or []) <= set(theirs["modules_to_save"] or [])
    a, b = (
        load_file(tmp_path / "adapter_model.safetensors"),
        load_file(folder / "adapter_model.safetensors"),
    )
    b.pop("base_model.model.lm_head.base_layer.weight", None)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode == (
        tmp_path / "adapter_config.json"
    ).stat().st_mode


@pytest.mark.parametrize(
    "targets, written",
    [
        ("attention", sorted(ATTENTION)),
        ("lm_head,q_proj", ["lm_head", "q_proj"]),
        (
            ["layers.1.mlp.up_proj", "q_proj"],
            [
                f"model.layers.{n}"
                for n in ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj")
            ],
        ),
    ],
)
def test_save_and_load(targets, written, tmp_path):
    model = fill(
        add_lora(lm(), 3, 5.5, targets, dropout=0.25, rslora=True, name="mine"), "mine"
    ).eval()
    save_adapter(model, tmp_path, "data/base", "mine")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        said["target_modules"] == written
        and said["base_model_name_or_path"] == "data/base"
        and said["task_type"] == "CAUSAL_LM"
    )
    again = load_adapter(lm(), tmp_path, "other").eval()
    assert (
        torch.equal(again(TOKENS), model(TOKENS)) and wrapped(again).keys() == wrapped(model).keys()
    )
    layer = next(iter(wrapped(again).values()))
    assert (
        layer.settings == {"other": dict(r=3, lora_alpha=5.5, lora_dropout=0.25, use_rslora=True)}
        and not layer.training
    )
    with pytest.raises(ValueError, match="no adapter named default: it has mine"):
        save_adapter(model, tmp_path)


def test_the_same_logits_in_a_fresh_process(tmp_path):
    model = fill(add_lora(lm(), 4, 8, "all,lm_head"))
    hub.save(tmp_path / "base", lm())
    save_adapter(model, tmp_path / "adapter")
    code = f"""
import torch
from common import hub, peft
from safetensors.torch import load_file, save_file
model, _ = hub.load({str(tmp_path / "base")!r})
peft.load_adapter(model, {str(tmp_path / "adapter")!r})
logits = model(load_file({str(tmp_path / "tokens")!r})["tokens"]).detach()
save_file({{"logits": logits}}, {str(tmp_path / "logits")!r})
"""
    save_file({"tokens": TOKENS}, tmp_path / "tokens")
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    close(load_file(tmp_path / "logits")["logits"], model(TOKENS).detach(), 1e-6)


def test_loading_beside_another_adapter(tmp_path):
    """DPO that goes on from an adapter: the reference is what it began as, in either order."""
    save_adapter(fill(add_lora(lm(), 2, 4)), tmp_path)
    for first in (True, False):
        model = load_adapter(lm(), tmp_path, "policy" if first else "reference", trainable=first)
        load_adapter(model, tmp_path, "reference" if first else "policy", trainable=not first)
        assert all(p.requires_grad == n.endswith(".policy") for n, p in model.named_parameters())
        use(model, "policy")
        step(model)
        use(model, "reference")
        assert torch.equal(model(TOKENS), fill(add_lora(lm(), 2, 4))(TOKENS))


def test_an_adapter_of_a_language_model_under_a_scalar_head(tmp_path):
    save_adapter(fill(add_lora(lm(), 2, 4)), tmp_path)
    model = load_adapter(scalar_model(lm(), seeded()), tmp_path)
    assert model.score.weight.requires_grad
    close(model.hidden(TOKENS), fill(add_lora(lm(), 2, 4)).hidden(TOKENS))


@pytest.fixture
def adapter(tmp_path):
    """PEFT's adapter on q_proj and v_proj of llama_tied, to be spoilt."""
    return Path(shutil.copytree(GOLDEN / "lora_list", tmp_path / "adapter"))


def edit(folder, **changes):
    said = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(said))


def refused(folder, message, error=ValueError, base="tied"):
    """Says why in one line, and has changed nothing."""
    model, _ = hub.load(GOLDEN / f"llama_{base}")
    with pytest.raises(error, match=message) as e:
        load_adapter(model, folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)
    assert not wrapped(model) and all(p.requires_grad for p in model.parameters())


LACKING = dict(
    use_dora=True,
    rank_pattern={"q_proj": 2},
    alpha_pattern={"q_proj": 2},
    bias="all",
    fan_in_fan_out=True,
)
LACKING |= dict(
    layers_to_transform=[0],
    trainable_token_indices=[1],
    modules_to_save=["lm_head"],
    init_lora_weights="pissa",
)
LACKING |= dict(
    lora_bias=True,
    layer_replication=[[0, 1]],
    target_parameters=["x"],
    loftq_config={"loftq_bits": 4},
    a_new_one=3,
)


@pytest.mark.parametrize("name", LACKING)
def test_what_we_lack_is_refused_by_name(name, adapter):
    edit(adapter, **{name: LACKING[name]})
    refused(adapter, f"{name} = .* is not supported")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(peft_type="IA3"), 'bias = "none" is not supported'),
        (dict(peft_type=None), "peft_type is null"),
        (dict(r="4"), "r is '4', a whole number"),
        (dict(r=True), "r is True, a whole number"),
        (
            dict(r=5),
            (
                r"lora_A.weight is \(4, 32\) in torch.float32, floating point of \(5, 32\) was"
                r" expected"
            ),
        ),
        (dict(lora_alpha=None, use_rslora=1), "use_rslora is 1, true or false"),
        (dict(lora_dropout=2), "lora_dropout is 2"),
        (dict(target_modules=None), "target_modules is null, names or a pattern"),
        (dict(target_modules=[1]), r"target_modules is \[1\], names or a pattern"),
        (dict(modules_to_save=3), "modules_to_save is 3, names or a pattern"),
        (dict(target_modules="(q_proj"), "no regular expression"),
        # a pattern, and it must match the whole name
        (dict(target_modules="q_proj"), "means no linear layer"),
        (dict(target_modules=["c_attn"]), "means no linear layer"),
        (
            dict(target_modules=["q_proj", "v_proj", "o_proj"]),
            "lacks base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight",
        ),
        (
            dict(exclude_modules=["q_proj"]),
            "unexpected tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        ),
        (
            dict(exclude_modules=r".*\.1\..*"),
            "unexpected tensor base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
        ),
    ],
)
def test_bad_configs(changes, message, adapter):
    edit(adapter, **changes)
    refused(adapter, message)


def test_what_says_nothing_is_ignored(adapter):
    edit(
        adapter,
        bias="none",
        use_dora=None,
        a_new_one=None,
        another=[],
        a_third=False,
        eva_config={},
        lora_dropout=0,
        revision="main",
    )
    edit(
        adapter,
        target_modules=["q_proj", "v_proj", "c_attn"],
        init_lora_weights="gaussian",
        exclude_modules=["lm_head"],
    )
    load_adapter(hub.load(GOLDEN / "llama_tied")[0], adapter)
    edit(adapter, target_modules=r"model\.layers\.\d+\.self_attn\.[qv]_proj")
    load_adapter(hub.load(GOLDEN / "llama_tied")[0], adapter)


def test_all_linear_means_all_but_the_heads(tmp_path):
    for i, (base, targets) in enumerate((("tied", "all"), ("scores", "all"))):
        model = fill(add_lora(hub.load(GOLDEN / f"llama_{base}")[0], 2, 4, targets))
        save_adapter(model, tmp_path / str(i))
        edit(tmp_path / str(i), target_modules="all-linear")
        again = load_adapter(hub.load(GOLDEN / f"llama_{base}")[0], tmp_path / str(i))
        assert torch.equal(again(TOKENS % 60), model(TOKENS % 60)) and len(wrapped(again)) == 14


def test_bad_files(adapter, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for changed, message in (
        ({k: v for k, v in weights.items() if k != name}, f"lacks {name}"),
        (
            weights | {"base_model.model.model.embed_tokens.weight": torch.zeros(60, 32)},
            "unexpected tensor .*embed_tokens",
        ),
        (weights | {name: torch.zeros(32, 4)}, rf"{name} is \(32, 4\)"),
        (weights | {name: torch.zeros(4, 32, dtype=torch.int8)}, "in torch.int8, floating point"),
    ):
        save_file(changed, adapter / "adapter_model.safetensors")
        refused(adapter, message)
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    refused(adapter, "damaged or no safetensors file")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "adapter_model.safetensors is missing", FileNotFoundError)
    (adapter / "adapter_config.json").write_text("{")
    refused(adapter, "adapter_config.json is not JSON")
    (adapter / "adapter_config.json").unlink()
    refused(adapter, "has no adapter_config.json", FileNotFoundError)
    refused(GOLDEN / "lora_scores", "modules_to_save = .* is not supported", base="tied")
    refused(GOLDEN / "lora_head", "means no linear layer|unexpected tensor", base="scores")


def test_another_models_head_is_refused(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "lora_head", tmp_path / "adapter"))
    weights = load_file(folder / "adapter_model.safetensors")
    head = "base_model.model.lm_head.base_layer.weight"
    for other, fits in (
        (weights[head].half(), True),
        (weights[head] + 0.1, False),
        (weights[head][:50], False),
    ):
        save_file(weights | {head: other.contiguous()}, folder / "adapter_model.safetensors")
        if fits:
            load_adapter(hub.load(GOLDEN / "llama_tied")[0], folder)
        else:
            refused(folder, "its lm_head is not this model's")
