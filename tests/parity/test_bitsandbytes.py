"""Against live bitsandbytes on the CPU, both ways: codes and scales, state dicts, the layer's
product and gradient, whole folders.

Run in the peers' environment. Weights here have rows of whole blocks, or of no multiple of 16: for
other rows bitsandbytes 0.50.2 dequantises with wrong scales on CPUs with AVX-512
(test_where_the_peer_errs). Its layer is in train(): eval() may compute in bf16.
"""

from pathlib import Path

import pytest
import torch
import torch.nn as nn

from common import hub
from model import Config, Transformer
from quant import DYNAMIC_VALUES, NF4, NF4_VALUES, Linear4bit, block_linears, quantize_nf4

bnb = pytest.importorskip("bitsandbytes")
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute  # noqa: E402
from bitsandbytes.functional import (  # noqa: E402
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    quantize_4bit,
)  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * 0.05
    return (w * torch.randn(shape[:1] + (1,) * (len(shape) - 1), generator=generator).exp()).to(
        dtype
    )


def theirs(w, double):
    codes, state = quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type="nf4")
    nested, offset = (state.state2.absmax, state.offset.item()) if double else (None, 0.0)
    return NF4(codes, state.absmax, nested, offset, 64, tuple(w.shape), w.dtype), dequantize_4bit(
        codes, state
    ).view(w.shape)


def compare(w, double):
    """The largest distance of a restored absmax, in steps of the 8-bit map there (at least two
    steps of bitsandbytes' own look-up table, which is coarser than the map near zero), and the
    share of 8-bit codes that differ."""
    ours, (peer, whole) = quantize_nf4(w, 64, double), theirs(w, double)
    assert torch.equal(ours.codes, peer.codes) and torch.equal(peer.dequantize(), whole)
    if not double:
        assert torch.equal(ours.absmax, peer.absmax) and torch.equal(ours.dequantize(), whole)
        return 0.0, 0.0
    assert (
        ours.offset == peer.offset
        and (ours.nested_absmax - peer.nested_absmax).abs().max() < 1.1e-38
    )
    # the larger side's
    step = nn.functional.max_pool1d(DYNAMIC_VALUES.diff()[None], 2, 1, 1)[0][
        peer.absmax.int()
    ].clamp(min=4 / 65535)
    apart = (DYNAMIC_VALUES[ours.absmax.int()] - DYNAMIC_VALUES[peer.absmax.int()]).abs() / step
    apart = apart[peer.nested_absmax.repeat_interleave(256)[: len(apart)] > 1e-30]
    return apart.max().item() if len(apart) else 0.0, (
        ours.absmax != peer.absmax
    ).float().mean().item()


def test_the_tables():
    assert torch.equal(NF4_VALUES, get_4bit_type("nf4", "cpu")) and torch.equal(
        DYNAMIC_VALUES, create_dynamic_map()
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "shape", [(300, 128), (192, 576), (7, 9), (65, 3), (10, 50), (1,), (64,), (3, 5, 7)]
)
def test_codes_and_scales(shape, dtype):
    for seed in range(3):
        w = weight(*shape, dtype=dtype, seed=seed)
        compare(w, False)
        steps, share = compare(w, True)
        assert steps <= 1 + 1e-5 and (share < 0.01 or w.numel() < 30000)
    print(
        f"\n{shape} {dtype}: scales {steps:.2g} steps, {share:.2%} of 8-bit codes differ", end=" "
    )


def test_smollm2():
    """All linear layers of three of its blocks, as the folder holds them and in float32."""
    if not (ROOT / "smollm2" / "model.safetensors").exists():
        pytest.skip("no smollm2/: make smollm2")
    from safetensors import safe_open

    with safe_open(ROOT / "smollm2" / "model.safetensors", "pt") as f:
        names = [
            n
            for n in f.keys()
            if n.endswith("proj.weight") and n.split(".")[2] in ("0", "14", "29")
        ]
        assert len(names) == 21
        worst = [
            compare(w, double)
            for n in names
            for w in (f.get_tensor(n), f.get_tensor(n).float())
            for double in (False, True)
        ]
    assert max(s for s, _ in worst) <= 1 + 1e-5 and max(s for _, s in worst) < 0.01
    print(
        f"\nscales {max(s for s, _ in worst):.2g} steps, {max(s for _, s in worst):.2%} of 8-bit"
        " codes differ",
        end=" ",
    )


def peer_layer(width, out, bias, double, dtype=torch.float32):
    peer = bnb.nn.Linear4bit(width, out, bias=bias, compress_statistics=double, quant_type="nf4")
    peer.weight.data = weight(out, width, dtype=dtype)
    return peer.to("cpu").train()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_state_dicts_both_ways(double, bias, dtype):
    peer = peer_layer(192, 40, bias, double, dtype)
    ours = Linear4bit(nn.Linear(192, 40, bias=bias))
    ours.load_state_dict(peer.state_dict())
    whole = dequantize_4bit(peer.weight.data, peer.weight.quant_state)
    assert whole.dtype == ours.dequantize().dtype == dtype
    assert (ours.dequantize().float() - whole.float()).abs().max() < 1e-6
    linear = nn.Linear(192, 40, bias=bias)
    linear.weight.data = weight(40, 192, dtype=dtype, seed=1)
    ours = Linear4bit(linear, double_quant=double)
    state = ours.state_dict()
    assert set(state) == set(peer.state_dict())
    assert all(state[k].dtype == v.dtype for k, v in peer.state_dict().items() if k != "bias")
    parts = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    back = bnb.nn.Params4bit.from_prequantized(state["weight"], parts, device="cpu")
    assert (
        dequantize_4bit(back.data, back.quant_state).float() - ours.dequantize().float()
    ).abs().max() < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient(bias):
    peer = peer_layer(192, 40, bias, True)
    ours = Linear4bit(nn.Linear(192, 40, bias=bias))
    ours.load_state_dict(peer.state_dict())
    a, b = (weight(5, 3, 192, seed=4).requires_grad_() for _ in range(2))
    y, z = ours(a), peer(b)
    y.sin().sum().backward()
    z.sin().sum().backward()
    assert (
        (y - z).abs().max() < 1e-5
        and (a.grad - b.grad).abs().max() < 1e-5
        and a.grad.abs().max() > 0.1
    )


@pytest.mark.parametrize("double", [True, False])
def test_a_folder_that_transformers_quantised(tmp_path, double):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    shape = dict(
        vocab_size=90,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    plain, generator = (
        Transformer(Config(**shape, head_dim=16, tie_word_embeddings=True)),
        torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * 0.2 + (1.0 if p.dim() == 1 else 0.0)
            )
    hub.save(tmp_path / "plain", plain)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=config, dtype=torch.float32
    ).train()
    peer.save_pretrained(tmp_path / "nf4")
    read, made = hub.load(tmp_path / "nf4")[0], hub.load(tmp_path / "plain", quant="nf4")[0]
    assert block_linears(read) == block_linears(made) == []
    tokens = torch.randint(90, (2, 20), generator=generator)
    logits = peer(tokens).logits
    assert (read(tokens) - logits).abs().max() < 1e-4 and logits.std() > 1
    assert (plain(tokens) - logits).abs().max() > 0.1
    if double:  # ours takes the nearest 8-bit code, the peer not always
        assert (made(tokens) - logits).abs().max() < 0.05


def test_where_the_peer_errs():
    """Rows of 96: its fast kernel takes another block's scale, its own plain PyTorch code agrees
    with ours.
    """
    w = weight(8, 96)
    codes, state = quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = quantize_nf4(w, double_quant=False)
    assert torch.equal(codes, ours.codes) and torch.equal(state.absmax, ours.absmax)
    plain = _dequantize_4bit_compute(
        codes.view(-1), state.absmax, NF4_VALUES, 64, w.shape, torch.float32
    )
    assert torch.equal(plain, ours.dequantize())
    error = [
        (x - w).abs().mean().item() for x in (ours.dequantize(), dequantize_4bit(codes, state))
    ]
    print(
        f"\nmean error with rows of 96: ours {error[0]:.4f}, bitsandbytes {error[1]:.4f}", end=" "
    )
