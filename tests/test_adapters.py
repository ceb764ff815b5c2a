"""IA3, prompts and prefixes against their definitions, PEFT's own numbers (golden), and by
invariance; gradient checkpointing.
"""

import copy
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import chat_tokenizer, lm
from torch import nn

import adapters as A
import lora
import model as M
from common import hub, peft
from common.run import _tensors, adamw
from packing import by_segments, pad
from sampling import Cache, generate, prompt_room
from sft import sft_loss

GOLDEN = Path(__file__).parent / "golden"
KINDS = {
    "ia3": dict(kind="ia3"),
    "prompt": dict(kind="prompt", tokens=5),
    "prefix": dict(kind="prefix", tokens=5),
}
KINDS |= {"direct prefix": dict(kind="prefix", tokens=5, reparametrise=False)}
VIRTUAL = ["prompt", "prefix", "direct prefix"]


def base(seed=0, **changes):
    shape = dict(
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=64,
    )
    return lm(seed, **shape | changes)


def adapted(name, seed=0, far=True, **changes):
    """A model with an adapter; far: whose numbers have left their start."""
    model, generator = (
        A.add_adapter(base(seed, **changes), generator=seeded(1), **KINDS[name]),
        seeded(2),
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and far:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def seeded(n):
    return torch.Generator().manual_seed(n)


def rows(lengths=(5, 1, 9, 3), seed=0):
    return [torch.randint(280, (n,), generator=seeded(seed + n)).tolist() for n in lengths]


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance, (a - b).abs().max()


def written_out(model, x, start=0, past=None):
    """Hidden states (T,D) of one row of embeddings x (T,D), from the definition in float64: full
    attention, a head at a time.

    start: the first position; past: (layers, 2, P, kv_heads, head_dim), keys and values that stand
    before the row's own. Written for a base without adapters.
    """
    c, w, T = model.config, {k: v.double() for k, v in model.state_dict().items()}, len(x)
    angle = torch.arange(start, start + T).double()[:, None] * c.rope_theta ** (
        -torch.arange(0, c.head_dim, 2).double() / c.head_dim
    )

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name + ".weight"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def turned(x):  # (T,head_dim)
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    x = x.double()
    for n in range(c.num_hidden_layers):
        at, h, heads = f"layers.{n}.", norm(x, f"layers.{n}.input_layernorm"), []
        q, k, v = (
            linear(h, f"{at}self_attn.{p}_proj").unflatten(1, (-1, c.head_dim)) for p in "qkv"
        )
        for head in range(c.num_attention_heads):
            shared = head * c.num_key_value_heads // c.num_attention_heads
            keys, values = turned(k[:, shared]), v[:, shared]
            if past is not None:
                keys, values = (
                    torch.cat((past[n, 0, :, shared], keys)),
                    torch.cat((past[n, 1, :, shared], values)),
                )
            ahead = torch.ones(T, len(keys), dtype=torch.bool).triu(len(keys) - T + 1)
            logits = (turned(q[:, head]) @ keys.T / c.head_dim**0.5).masked_fill(
                ahead, float("-inf")
            )
            heads.append(logits.softmax(-1) @ values)
        x = x + linear(torch.cat(heads, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        x = x + linear(
            F.silu(linear(h, at + "mlp.gate_proj")) * linear(h, at + "mlp.up_proj"),
            at + "mlp.down_proj",
        )
    return norm(x, "norm")


# -- the definitions


def test_ia3_starts_as_the_base():
    model, plain = adapted("ia3", far=False), base()
    tokens, mask = pad(rows())
    assert torch.equal(model(tokens, mask), plain(tokens, mask))
    assert generate(model, rows(), 6) == generate(plain, rows(), 6)
    assert all(
        (p == 1).all() and p.dtype == torch.float32 for p in model.parameters() if p.requires_grad
    )


def test_ia3_scales_keys_values_and_what_enters_down():
    model, by_hand = adapted("ia3"), base()
    factors, weights = dict(A.parts(model)), by_hand.state_dict()
    assert len(factors) == 6 and {n.split(".")[-1] for n in factors} == {
        "k_proj",
        "v_proj",
        "down_proj",
    }
    with torch.no_grad():
        for i in range(2):
            for p in ("k", "v"):
                name = f"layers.{i}.self_attn.{p}_proj"
                for part in ("weight", "bias"):  # an output's row and its bias
                    for row, factor in enumerate(factors[name].scale):
                        weights[f"{name}.{part}"][row] *= factor
            name = f"layers.{i}.mlp.down_proj"
            for column, factor in enumerate(factors[name].scale):
                weights[f"{name}.weight"][:, column] *= factor
    tokens, mask = pad(rows())
    close(model.hidden(tokens, mask)[mask], by_hand.hidden(tokens, mask)[mask])
    assert (model.hidden(tokens, mask) - base().hidden(tokens, mask))[mask].abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ia3_merged_is_unmerged(dtype):
    model, tokens = adapted("ia3"), torch.tensor(rows((9,)))
    for _, module in A.parts(model):
        module.base.to(dtype).to(torch.float32)
    before = model(tokens)
    for _, module in A.parts(model):
        module.base.to(dtype)
    for name, module in A.parts(model):
        model.set_submodule(name, module.merged())
    merged = model
    # multiplied in float32, rounded once
    assert merged.layers[0].mlp.down_proj.weight.dtype == dtype
    close(
        merged.float()(tokens),
        before,
        (0.05 if dtype == torch.bfloat16 else 1e-5) * before.abs().max(),
    )
    assert (
        merged.state_dict().keys() == base().state_dict().keys()
        and type(merged.layers[1].mlp.down_proj) is nn.Linear
    )


def test_merging_frees_a_layer_before_the_next(monkeypatch):
    model = adapted("ia3")
    gone = [weakref.ref(m) for _, m in A.parts(model)]
    real, alive = A.IA3Linear.merged, []

    def merged(layer):
        alive.append(sum(ref() is not None for ref in gone))
        return real(layer)

    monkeypatch.setattr(A.IA3Linear, "merged", merged)
    lora.merge(model)
    assert alive == [*range(6, 0, -1)]


def test_ia3_around_weights_that_are_no_linear_layer():
    """A 4-bit layer has sizes, a bias and dequantize()."""

    class Packed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features, self.bias = (
                linear.in_features,
                linear.out_features,
                linear.bias,
            )
            self.register_buffer("packed", linear.weight.detach())

        def dequantize(self):
            return self.packed

        def forward(self, x):
            return F.linear(x, self.packed, self.bias)

    model, tokens = base(), torch.tensor(rows((7,)))
    for name, module in A.scaled(model):
        model.set_submodule(name, Packed(module))
    A.add_adapter(model, "ia3")
    for _, module in A.parts(model):
        module.scale.data += torch.randn(module.scale.shape, generator=seeded(3)) * 0.3
    before = model(tokens)
    close(lora.merge(model)(tokens), before, 1e-5 * before.abs().max())
    assert type(model.layers[0].self_attn.k_proj) is nn.Linear


def test_a_prompt_is_its_embeddings_in_front():
    model, row = adapted("prompt"), torch.tensor(rows((9,))[0])
    x = torch.cat((model.virtual.rows, model.embed_tokens(row)))
    virtual, model.virtual = model.virtual, None
    expected = written_out(model, x)
    without = model.hidden(row[None])[0]
    model.virtual = virtual
    hidden = model.hidden(row[None])[0]
    close(hidden.double(), expected[5:], 1e-5 * expected.abs().max())
    assert (hidden - without).abs().amax(-1).min() > 0.01  # each token sees it


def test_a_prompt_s_gradient_is_that_of_embeddings_in_front():
    model, row = adapted("prompt"), torch.tensor(rows((9,))[0])
    target, virtual = torch.randn(9, 16, generator=seeded(4)), model.virtual
    (model.hidden(row[None])[0] * target).sum().backward()
    grad, virtual.rows.grad = virtual.rows.grad, None
    model.virtual = None
    (
        written_out(model, torch.cat((virtual.rows, model.embed_tokens(row))))[5:] * target
    ).sum().backward()
    close(grad, virtual.rows.grad, 1e-4 * grad.abs().max())


@pytest.mark.parametrize("name", ["prefix", "direct prefix"])
def test_a_prefix_is_keys_and_values_in_front(name):
    model, row = adapted(name), torch.tensor(rows((9,))[0])
    # (layers, key or value, P, heads, head_dim)
    kv = peft.state(model)["prompt_embeddings"].view(5, 2, 2, 2, 8).permute(1, 2, 0, 3, 4)
    virtual, model.virtual = model.virtual, None
    expected = written_out(model, model.embed_tokens(row), 5, kv.double())
    other = written_out(model, model.embed_tokens(row), 0, kv.double())
    model.virtual = virtual
    close(model.hidden(row[None])[0].double(), expected, 1e-5 * expected.abs().max())
    assert (other - expected).abs().max() > 0.01  # positions go on from the prefix


def test_starts():
    """A prompt is made of real embeddings, a prefix of their keys and values; seeds decide."""
    plain, tok = base(), chat_tokenizer()
    words = plain.embed_tokens.weight
    for n in (3, 50):
        model = A.add_adapter(base(), "prompt", tokens=n, generator=seeded(0))
        assert (
            all((row == words).all(-1).any() for row in model.virtual.rows)
            and len(model.virtual.rows.unique(dim=0)) > 2
        )
    ids = tok.encode("the capital of Peru is Lima.")
    for n in (2, len(ids), 2 * len(ids) + 1):
        model = A.add_adapter(base(), "prompt", n, "the capital of Peru is Lima.", tok)
        assert torch.equal(model.virtual.rows, words[torch.tensor((ids * 3)[:n])])
    tokens = torch.tensor(rows((9,)))
    prompt = A.add_adapter(base(), "prompt", 5, "Lima, Peru", tok)
    for reparametrise in (False, True):
        prefix = A.add_adapter(base(), "prefix", 5, "Lima, Peru", tok, reparametrise)
        close(prefix.hidden(tokens), prompt.hidden(tokens))
    for name in VIRTUAL:
        one, two = (
            [p for p in adapted(name, far=False).parameters() if p.requires_grad] for _ in range(2)
        )
        assert all(
            torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(one, two, strict=True)
        )
        other = A.add_adapter(base(), generator=seeded(9), **KINDS[name])
        assert not torch.equal(other.virtual.rows, one[0])


def test_adapters_are_float32_on_a_bf16_base():
    for name in KINDS:
        model = A.add_adapter(base().to(torch.bfloat16), generator=seeded(1), **KINDS[name])
        if name == "prefix":
            # it starts at 0, and nothing before it counts yet
            nn.init.normal_(model.virtual.mlp[2].weight, generator=seeded(2))
        model(torch.tensor(rows((9,)))).float().logsumexp(-1).sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in trained)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


# -- virtual tokens under padding, packing and the cache


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_padded_is_unpadded(name, left):
    model = adapted(name)
    tokens, mask = pad(rows(), left=left)
    hidden = model.hidden(tokens, mask)
    for i, row in enumerate(rows()):
        close(hidden[i][mask[i]], model.hidden(torch.tensor([row]))[0])
    assert torch.equal(
        model(tokens, mask)[mask], model(torch.where(mask, tokens, tokens + 1), mask)[mask]
    )


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_packed_is_separate_and_shared_prompts_too(name):
    model, texts = adapted(name), rows((4, 3, 5, 1))
    packed = torch.tensor([sum(texts, []) + [9, 9]])
    segments = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5 + [3, -1, -1]])
    hidden = model.packed(by_segments(packed, segments))
    for n, row in enumerate(texts):
        close(hidden[0][segments[0] == n], model.hidden(torch.tensor([row]))[0])
    prompts, answers = [texts[0]] * 2 + [texts[2]], rows((3, 1, 7))
    states, logps = M.states(model, prompts, answers), M.logprobs(model, prompts, answers)
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = model.hidden(torch.tensor([prompt + answer]))[0, len(prompt) - 1 :]
        close(states[n, : len(answer) + 1], alone)
        p = model.lm_head(alone[:-1]).log_softmax(-1)
        close(logps[n, : len(answer)], p.gather(1, torch.tensor(answer)[:, None])[:, 0], 1e-4)
    labels = torch.where(segments >= 0, packed, -100)
    nll = M.nll(model, packed, labels, segments)
    lone = [
        M.nll(model, torch.tensor([t]), torch.tensor([t]), torch.zeros(1, len(t))) for t in texts
    ]
    close(nll[segments >= 0], torch.cat(lone, 1)[0], 1e-4)
    assert (nll != 0).sum() == 9


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_generation_is_the_forward_s(name, monkeypatch):
    model, prompts, calls = adapted(name), rows((5, 1, 9, 3, 7)), []
    if model.virtual is not None:
        past = type(model.virtual).past
        monkeypatch.setattr(type(model.virtual), "past", lambda *a: calls.append(1) or past(*a))
    answers = generate(model, prompts, 12, temperature=0, eos_id=7)
    assert len(calls) == (name in VIRTUAL)  # a generation computes it once
    for prompt, answer in zip(prompts, answers, strict=True):
        plain = []
        while len(plain) < len(answer):
            plain.append(model(torch.tensor([prompt + plain]))[0, -1].argmax().item())
        assert answer == plain
    model.virtual = None
    assert name == "ia3" or generate(model, prompts, 12, temperature=0, eos_id=7) != answers


@torch.no_grad()
def test_a_cache_read_in_parts():
    model, (tokens, mask) = adapted("prefix"), pad(rows(), left=True)
    cache = Cache(model, 4, 9)
    parts = [
        model.hidden(tokens[:, :4], mask[:, :4], cache=cache),
        model.hidden(tokens[:, 4:], mask[:, 4:], cache=cache),
    ]
    close(torch.cat(parts, 1)[mask], model.hidden(tokens, mask)[mask])


def test_virtual_tokens_take_their_part_of_the_context():
    model = adapted("prompt")
    assert base().context == 64 and model.context == 59 and prompt_room(model, 9) == 50
    assert len(generate(model, [[1] * 50], 9)[0]) == 9
    with pytest.raises(ValueError, match="60 tokens exceed the model's context of 59"):
        generate(model, [[1] * 50], 10)
    with pytest.raises(ValueError, match="the model's context is 59 tokens"):
        prompt_room(model, 59)


# -- training


def step(model, lr=1e-2):
    """One step on a packed batch; the loss, and the gradients by name."""
    torch.manual_seed(0)
    optimizer, (tokens, mask) = adamw(model, lr), pad(rows())
    loss = sft_loss(model, tokens, torch.where(mask, tokens, -100), torch.where(mask, 0, -1))
    (loss / (mask.sum() - len(tokens))).backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return loss.item(), grads


def unmoved(model, before):
    """Names in state(model) of which a row (a factor, a virtual token) is what it was."""
    return [k for k, v in peft.state(model).items() if (v == before[k]).all(-1).any()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_number_moves_and_the_base_does_not(name, checkpointing):
    model = adapted(name, far=False)
    model.checkpointing = checkpointing
    before, weights = peft.state(model), copy.deepcopy(base().state_dict())
    assert set(unmoved(model, before)) == before.keys()
    step(model)
    assert not unmoved(model, before)
    after = peft.state(model)
    if name == "ia3":
        assert all((after[k] != v).all() for k, v in before.items())
    now = {k.replace(".base", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(now[k], v) for k, v in weights.items())
    with torch.no_grad():
        part = next(p for p in model.parameters() if p.requires_grad)
        # one factor, one virtual token
        part[0] = next(p for p in adapted(name, far=False).parameters() if p.requires_grad)[0]
    assert name == "prefix" or list(unmoved(model, before)) == list(before)[:1]


@pytest.mark.parametrize("name", ["full", *KINDS])
def test_gradient_checkpointing_changes_no_gradient(name):
    losses, grads = zip(*(step(with_checkpointing(name, on)) for on in (False, True)), strict=True)
    assert losses[0] == losses[1] and grads[0].keys() == grads[1].keys() and grads[0]
    for k, g in grads[0].items():
        close(g, grads[1][k], 1e-6)
        assert g.abs().sum() > 0 or k.endswith("k_proj.bias")  # which softmax ignores


def with_checkpointing(name, on):
    model = base() if name == "full" else adapted(name)
    model.checkpointing = on
    return model


def test_checkpointing_keeps_only_the_blocks_inputs():
    model, tokens, calls, saved = with_checkpointing("full", True), torch.tensor(rows((9,))), [], []
    model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))

    def backward_saves():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            loss = model.hidden(tokens).sum()
        return loss, sum(saved)

    loss, few = backward_saves()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2  # computed again
    with torch.no_grad():
        model.hidden(tokens, cache=Cache(model, 1, 9))
    assert len(calls) == 3
    model.checkpointing = False
    _, many = backward_saves()
    assert few < many / 3


def test_factors_do_not_decay_and_a_run_s_state_is_the_adapter():
    model = adapted("ia3")
    decayed = adamw(model, 1e-3, weight_decay=0.1).param_groups[0]["params"]
    assert not decayed
    for name in KINDS:
        model = adapted(name)
        assert {k for k, p in model.named_parameters() if p.requires_grad} == _tensors(model).keys()
        other = adapted(name, far=False)
        other.load_state_dict({k: v.clone() for k, v in _tensors(model).items()}, strict=False)
        tokens = torch.tensor(rows((9,)))
        assert torch.equal(model(tokens), other(tokens))


# -- folders


@pytest.mark.parametrize(
    "name, llama", [("ia3", "biases"), ("prompt", "tied"), ("prefix", "biases")]
)
def test_peft_s_own_logits_and_gradients(name, llama):
    model = peft.load_adapter(hub.load(GOLDEN / f"llama_{llama}")[0], GOLDEN / f"peft_{name}")
    expected = load_file(GOLDEN / f"peft_{name}" / "expected.safetensors")
    tokens, mask = expected.pop("tokens"), expected.pop("mask").bool()
    logits, out = model(tokens, mask), expected.pop("out")
    assert out.std() > 0.5 and (logits - out)[mask].abs().max() < 1e-4
    F.cross_entropy(logits[:, :-1][mask[:, 1:]], tokens[:, 1:][mask[:, 1:]]).backward()
    parts = {
        "prompt_embeddings" if n == "virtual" else peft.ia3_key(n): m for n, m in A.parts(model)
    }
    assert parts.keys() == expected.keys()
    for key, grad in expected.items():
        ours = parts[key].scale.grad if name == "ia3" else parts[key].rows.grad
        close(ours.flatten(), grad.flatten(), 1e-4)
        assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_saved_and_loaded(name, tmp_path):
    model, tokens = adapted(name), torch.tensor(rows((9,)))
    peft.save_adapter(model, tmp_path, "some/base")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "some/base" and said["inference_mode"] is True
    for trainable in (True, False):
        again = peft.load_adapter(base(), tmp_path, trainable=trainable)
        close(again(tokens), model(tokens), 1e-5)
        assert any(p.requires_grad for p in again.parameters()) == trainable
        assert all(
            not p.requires_grad
            for n, p in again.named_parameters()
            if "virtual" not in n and "scale" not in n
        )
    # the reparametrisation is gone
    assert not any("mlp" in n for n, _ in again.named_parameters() if "virtual" in n)
    peft.save_adapter(again, tmp_path / "twice", None)
    one, two = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "twice"))
    assert one.keys() == two.keys() and all(
        torch.equal(one[k], two[k]) and one[k].dtype == torch.float32 for k in one
    )
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode == (
        tmp_path / "adapter_config.json"
    ).stat().st_mode


def test_loaded_in_a_fresh_process(tmp_path):
    hub.save(tmp_path / "base", base())
    tokens = rows((9,))
    for name in KINDS:
        peft.save_adapter(adapted(name), tmp_path / name, tmp_path / "base")
    code = (
        "import sys, torch\nfrom common import hub, peft\n"
        "from safetensors.torch import save_file\nat, *names = sys.argv[1:]\n"
        "def out(name):\n"
        "    model = peft.load_adapter(hub.load(at + '/base')[0], at + '/' + name)\n"
        f"    return model(torch.tensor({tokens})).detach()\n"
        "save_file({name: out(name) for name in names}, at + '/out.safetensors')"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *KINDS]
    subprocess.run(command, check=True, cwd=Path(A.__file__).parent)
    out = load_file(tmp_path / "out.safetensors")
    for name in KINDS:
        close(out[name], adapted(name)(torch.tensor(tokens)), 1e-5)


def edited(tmp_path, name, **changes):
    shutil.copytree(GOLDEN / f"peft_{name}", tmp_path / name)
    file = tmp_path / name / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return tmp_path / name


# fmt: off
REFUSED = [
    ("ia3", dict(peft_type="LORA"), 'bias = "none"|feedforward_modules = .* is not supported'),
    ("ia3", dict(target_modules=["q_proj", "v_proj", "down_proj"]), "target_modules is .*q_proj"),
    ("ia3", dict(target_modules="all-linear"), 'target_modules is "all-linear"'),
    ("ia3", dict(target_modules=["k_proj", 3]), "target_modules is"),
    ("ia3", dict(feedforward_modules=[]), "feedforward_modules is"),
    ("ia3", dict(modules_to_save=["score"]), "modules_to_save = .* is not supported"),
    ("ia3", dict(exclude_modules=["layers.0"]), "exclude_modules = .* is not supported"),
    ("ia3", dict(fan_in_fan_out=True), "fan_in_fan_out = true is not supported"),
    ("ia3", dict(task_type="SEQ_CLS"), 'task_type is "SEQ_CLS"'),
    ("prompt", dict(num_virtual_tokens=6), r"embeddings is \(5, 32\) in torch.float32, floating"),
    ("prompt", dict(num_virtual_tokens=None), "num_virtual_tokens is null"),
    ("prompt", dict(num_virtual_tokens=5000), "num_virtual_tokens is 5000, a number from 1 to"),
    ("prompt", dict(token_dim=16), "token_dim is 16, 32 was expected"),
    ("prefix", dict(num_attention_heads=4), "num_attention_heads is 4, 2 was expected"),
    ("prefix", dict(num_transformer_submodules=2), "num_transformer_submodules is 2"),
    ("prefix", dict(some_new_option=1), "some_new_option = 1 is not supported"),
]
# fmt: on


@pytest.mark.parametrize("name, changes, message", REFUSED)
def test_what_a_config_asks_for_and_we_lack(name, changes, message, tmp_path):
    model = hub.load(GOLDEN / ("llama_tied" if name == "prompt" else "llama_biases"))[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        peft.load_adapter(model, edited(tmp_path, name, **changes))
    assert not A.parts(model) and all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == before.keys() and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )


@pytest.mark.parametrize(
    "changes",
    [dict(target_modules=None), dict(init_ia3_weights=False, revision="main", use_x=False)],
)
def test_what_changes_nothing_is_read(changes, tmp_path):
    one, two = (
        peft.load_adapter(hub.load(GOLDEN / "llama_biases")[0], f)
        for f in (edited(tmp_path, "ia3", **changes), GOLDEN / "peft_ia3")
    )
    assert peft.state(one).keys() == peft.state(two).keys() and all(
        torch.equal(v, peft.state(two)[k]) for k, v in peft.state(one).items()
    )


def test_a_stored_projection_is_keys_and_values(tmp_path):
    folder = edited(tmp_path, "prefix", prefix_projection=True, encoder_hidden_size=16)
    one, two = (
        peft.load_adapter(hub.load(GOLDEN / "llama_biases")[0], f)
        for f in (folder, GOLDEN / "peft_prefix")
    )
    assert torch.equal(one.virtual.rows, two.virtual.rows)


def test_spoilt_folders(tmp_path):
    model, folder = hub.load(GOLDEN / "llama_biases")[0], edited(tmp_path, "ia3")
    file, tensors = (
        folder / "adapter_model.safetensors",
        load_file(folder / "adapter_model.safetensors"),
    )
    name = sorted(tensors)[0]
    for spoilt, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"lacks {name}"),
        (
            tensors | {"extra.ia3_l": torch.ones(1)},
            "has the unexpected tensor extra.ia3_l",
        ),
        (tensors | {name: tensors[name].T.contiguous()}, "floating point of .* was expected"),
    ):
        save_file(spoilt, file)
        with pytest.raises(ValueError, match=message):
            peft.load_adapter(model, folder)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="damaged"):
        peft.load_adapter(model, folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        peft.load_adapter(model, folder)
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        peft.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="floating point of"):  # another model's
        peft.load_adapter(base(), GOLDEN / "peft_ia3")


def test_what_is_impossible_is_refused():
    with pytest.raises(ValueError, match="'ia4' is no kind of adapter"):
        A.add_adapter(base(), "ia4")
    for n in (0, 64):
        with pytest.raises(
            ValueError,
            match=f"{n} virtual tokens: the model's context leaves room for 1 to 63",
        ):
            A.add_adapter(base(), "prompt", tokens=n)
    with pytest.raises(ValueError, match="a text starts a prompt"):
        A.add_adapter(base(), "ia3", text="a", tokenizer=chat_tokenizer())
    with pytest.raises(ValueError, match="is empty"):
        A.add_adapter(base(), "prompt", text="", tokenizer=chat_tokenizer())
    with pytest.raises(ValueError, match="for language models"):
        A.add_adapter(M.scalar_model(base()), "ia3")
    for name in KINDS:
        with pytest.raises(ValueError, match="has an adapter already"):
            A.add_adapter(adapted(name), "ia3")
    with pytest.raises(ValueError, match="no adapter named default: it has none"):
        peft.save_adapter(base(), "nowhere")
