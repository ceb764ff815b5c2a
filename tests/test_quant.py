"""NF4: bitsandbytes' own numbers (golden), the definition, and a layer that keeps its weight in 4
bits.
"""

import copy
import gc
import json
import weakref
from pathlib import Path
from statistics import NormalDist

import pytest
import tiny
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from common import hub
from quant import (
    DYNAMIC_VALUES,
    NF4,
    NF4_VALUES,
    Linear4bit,
    block_linears,
    quantize_model,
    quantize_nf4,
)

GOLDEN = Path(__file__).parent / "golden"
PEER = load_file(GOLDEN / "nf4.safetensors")
CASES = sorted(k.removesuffix(".codes") for k in PEER if k.endswith(".codes"))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(out=48, width=80, bias=True, seed=0, **options):
    linear = nn.Linear(width, out, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(normal(out, width, seed=seed) * 0.1)
        if bias:
            linear.bias.copy_(normal(out, seed=seed + 1))
    return Linear4bit(linear, **options)


# -- the format


def test_the_table_is_quantiles_of_the_normal_distribution():
    first = 1 - (1 / 30 + 1 / 32) / 2
    up, down = (
        [NormalDist().inv_cdf(first + (0.5 - first) * i / n) for i in range(n)] for n in (8, 7)
    )
    derived = torch.tensor([-x for x in down] + [0.0] + up[::-1]) / up[0]
    assert len(derived) == 16 and (derived - NF4_VALUES).abs().max() < 2e-7
    assert NF4_VALUES[[0, 7, 15]].tolist() == [-1, 0, 1] and (NF4_VALUES.diff() > 0).all()


def test_the_map_of_the_second_quantisation():
    assert len(DYNAMIC_VALUES) == 256 and (DYNAMIC_VALUES.diff() > 0).all()
    assert DYNAMIC_VALUES[[0, 127, 255]].tolist() == [pytest.approx(-0.99296875), 0, 1]
    assert DYNAMIC_VALUES[126].item() == pytest.approx(-0.55e-6) and DYNAMIC_VALUES[
        254
    ].item() == pytest.approx(0.99296875)


@pytest.mark.parametrize("case", CASES)
def test_bitsandbytes_own_numbers(case):
    """Codes, absmax and what they stand for are equal. The 8-bit codes of absmax it looks up in a
    table of 65,536, so that some are not the nearest ones: no further from ours than its step
    there, or two steps of that table."""
    w, codes = PEER[case], PEER[f"{case}.codes"]
    for double in (False, True):
        if f"{case}.absmax{1 + double}" not in PEER:
            continue
        ours, absmax, whole = (
            quantize_nf4(w, 64, double),
            PEER[f"{case}.absmax{1 + double}"],
            PEER[f"{case}.whole{1 + double}"],
        )
        nested, offset = (
            (PEER[f"{case}.nested"], PEER[f"{case}.offset"].item()) if double else (None, 0.0)
        )
        assert (
            torch.equal(ours.codes, codes)
            and ours.dtype == w.dtype
            and ours.absmax.shape == absmax.shape
        )
        theirs = NF4(codes, absmax, nested, offset, 64, tuple(w.shape), w.dtype).dequantize()
        assert theirs.dtype == w.dtype and torch.equal(theirs, whole)
        if not double:
            assert torch.equal(ours.absmax, absmax) and torch.equal(ours.dequantize(), whole)
            continue
        # it stores 0 where a block has only zeros
        assert ours.offset == offset and (ours.nested_absmax - nested).abs().max() < 1.1e-38
        scale = nested.repeat_interleave(256)[: len(absmax)]
        # the larger one of its two sides
        step = nn.functional.max_pool1d(DYNAMIC_VALUES.diff()[None], 2, 1, 1)[0][absmax.int()]
        apart = (DYNAMIC_VALUES[ours.absmax.int()] - DYNAMIC_VALUES[absmax.int()]).abs() * scale
        assert (apart <= step.clamp(min=4 / 65535) * scale + 1e-12).all()
        # of a weight of one block nothing is left without the mean
        assert (ours.absmax != absmax).sum() <= 1 or scale.max() < 1e-30


def test_the_case_of_double_quantisation_has_two_blocks_and_few_differences():
    ours = quantize_nf4(PEER["nested.bfloat16"])
    assert (
        len(ours.nested_absmax) == 2 and (ours.absmax != PEER["nested.bfloat16.absmax2"]).sum() < 3
    )


def by_hand(w, size=64):
    """Each block of a flat weight by the definition, one number at a time, in float64."""
    out = []
    for block in w.flatten().double().split(size):
        absmax = block.abs().max()
        nearest = (
            ((block / absmax if absmax > 0 else block)[:, None] - NF4_VALUES.double())
            .abs()
            .argmin(1)
        )
        out.append(NF4_VALUES.double()[nearest] * absmax)
    return torch.cat(out).view(w.shape)


@pytest.mark.parametrize("shape", [(48, 64), (7, 33), (3, 5, 11), (130,), (1,)])
def test_each_number_goes_to_the_nearest(shape):
    w = normal(*shape)
    assert (quantize_nf4(w, double_quant=False).dequantize() - by_hand(w)).abs().max() < 1e-6
    assert (
        quantize_nf4(w, 32, double_quant=False).dequantize() - by_hand(w, 32)
    ).abs().max() < 1e-6


def test_the_scales_go_to_the_nearest_too():
    w = normal(700, 64) * normal(700, 1, seed=1).exp()
    exact, ours = quantize_nf4(w, double_quant=False).absmax, quantize_nf4(w)
    assert ours.offset == exact.mean().item()
    for part, codes, scale in zip(
        (exact - exact.mean()).split(256), ours.absmax.split(256), ours.nested_absmax, strict=True
    ):
        assert scale == part.abs().max()
        distance = (part[:, None] / scale - DYNAMIC_VALUES).abs()
        assert (
            distance.gather(1, codes.long()[:, None])[:, 0] - distance.min(1).values
        ).max() < 1e-6


def test_the_expected_error_on_normal_weights():
    w = normal(1024, 1024)
    assert (
        quantize_nf4(w, double_quant=False).dequantize() - w
    ).abs().mean().item() == pytest.approx(0.0728, abs=2e-4)
    assert (quantize_nf4(w).dequantize() - w).abs().mean().item() == pytest.approx(0.0728, abs=4e-4)


def test_the_packing():
    w = torch.tensor([-1.0, 1.0, 0.0, NF4_VALUES[9], 0.9])
    q = quantize_nf4(w, double_quant=False)
    # the first in the high half; a spare half is 0
    assert q.codes.tolist() == [[0x0F], [0x79], [0xF7]] and q.absmax.tolist() == [1.0]
    assert torch.equal(q.dequantize(), torch.tensor([-1.0, 1.0, 0.0, NF4_VALUES[9], 1.0]))


def test_ties_take_the_lower_code():
    ties = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2
    w = torch.cat((torch.ones(1), ties, torch.nextafter(ties, torch.ones(15)), torch.zeros(33)))
    codes = quantize_nf4(w).codes
    codes = torch.cat((codes >> 4, codes & 15), 1).flatten()
    assert codes[1:16].tolist() == list(range(15)) and codes[16:31].tolist() == list(range(1, 16))


def test_a_short_last_block_is_divided_by_its_absmax():
    """Whole blocks are multiplied by its reciprocal, as bitsandbytes does: where a number is almost
    a tie the codes differ.
    """
    middles, absmax = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2, torch.tensor(0.013)
    block = torch.cat((absmax[None], middles * absmax, torch.zeros(48)))
    codes = quantize_nf4(torch.cat((block, block[:20]))).codes
    codes = torch.cat((codes >> 4, codes & 15), 1).flatten()
    whole, short = (
        torch.bucketize(block * (1 / absmax), middles),
        torch.bucketize(block[:20] / absmax, middles),
    )
    assert (
        codes[:64].tolist() == whole.tolist()
        and codes[64:].tolist() == short.tolist()
        and (whole[:20] != short).any()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_goes_in_pieces(dtype):
    """More than 2^20 numbers, and not whole blocks at the end, against the same weight in parts of
    whole blocks.
    """
    w = normal(1100, 1000).to(dtype).flatten()[:-3]
    parts = [quantize_nf4(p, double_quant=False).dequantize() for p in w.split(64 * 3000)]
    assert torch.equal(quantize_nf4(w, double_quant=False).dequantize(), torch.cat(parts))
    assert torch.cat(parts).dtype == dtype and (torch.cat(parts) - w).abs().max() < 1


def test_what_cannot_be_quantised():
    with pytest.raises(ValueError, match="a weight of torch.float64 is not quantised: float32"):
        quantize_nf4(normal(8, 8).double())
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            quantize_nf4(torch.tensor([1.0, bad]))


# -- the layer


def test_forward_and_gradient_are_those_of_the_dequantised_weight():
    for bias, dtype in ((True, torch.float32), (False, torch.float32), (True, torch.bfloat16)):
        ours = layer(bias=bias)
        plain = nn.Linear(80, 48, bias=bias)
        plain.weight.data, plain.bias = ours.dequantize(), copy.deepcopy(ours.bias)
        ours, plain = ours.to(dtype), plain.to(dtype)
        x = normal(2, 5, 80, seed=3).to(dtype)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), plain(b)
        assert y.dtype == dtype
        for t, p in ((y, a), (z, b)):
            t.float().square().sum().backward()
            assert p.grad.abs().sum() > 0
        limit = 1e-5 if dtype == torch.float32 else 0.05
        assert (y - z).abs().max() < limit and (a.grad - b.grad).abs().max() < limit * 10
        if bias:
            assert (ours.bias.grad - plain.bias.grad).abs().max() < limit * 20


def test_finite_differences():
    ours = layer(out=6, width=10).double()
    x = normal(3, 10).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(x).tanh(), x)
    with torch.no_grad():
        assert (ours(x) - x @ ours.dequantize().double().T - ours.bias).abs().max() < 1e-12


def test_autocast_computes_in_its_type():
    ours, x = layer(), normal(3, 80).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
        z = nn.functional.linear(x, ours.dequantize(), ours.bias)
    assert y.dtype == torch.bfloat16 and (y - z).abs().max() < 0.01 * z.abs().max()
    y.float().sum().backward()
    whole = ours.dequantize().sum(0)
    assert (
        x.grad.dtype == torch.float32
        and 0 < (x.grad - whole).abs().max() < 0.01 * whole.abs().max()
    )


def live_tensors():
    gc.collect()
    return [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]


def large_tensors(numbers):
    return {t.data_ptr() for t in live_tensors() if t.numel() >= numbers and t.is_floating_point()}


def test_no_full_precision_copy_is_alive():
    """Neither among the live tensors nor in what autograd saves, nor after the backward pass."""
    ours = nn.Sequential(layer(256, 256), nn.Tanh(), layer(256, 256, seed=1))
    x, before, saved = normal(3, 256).requires_grad_(), large_tensors(256 * 256), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ours(x)
    assert large_tensors(256 * 256) == before
    own = {b.data_ptr() for b in ours.buffers()}
    rest = [t for t in saved if t.data_ptr() not in own]
    # tanh's output alone
    assert len(saved) - len(rest) >= 6 and sum(t.nbytes for t in rest) <= 3 * 256 * 4
    held = sum(b.nbytes for b in ours.buffers())
    assert held < 2 * 256 * 256 * 0.52
    y.sum().backward()
    assert large_tensors(256 * 256) == before and sum(b.nbytes for b in ours.buffers()) == held
    assert not [p for p in ours.parameters() if p.dim() > 1]


def test_bytes_as_allocated():
    """bf16 over double-quantised NF4, SmolLM2's layers, with the 512 bytes to which a GPU rounds
    every tensor.
    """
    shapes = {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}
    bf16 = nf4 = 0
    for (out, width), times in shapes.items():
        ours = layer(out, width, bias=False)
        bf16 += 2 * out * width * times
        nf4 += sum(-(-b.nbytes // 512) * 512 for b in ours.buffers()) * times
    assert bf16 / nf4 >= 3.8
    one = layer(4096, 256, bias=False)
    assert sum(b.nbytes for b in one.buffers()) * 8 / (4096 * 256) == pytest.approx(4.127, abs=1e-3)


def test_casts_and_moves_leave_the_codes_as_they_are():
    ours = layer()
    before, whole = {k: v.clone() for k, v in ours.named_buffers()}, ours.dequantize()
    ours.bfloat16()
    assert ours.bias.dtype == torch.bfloat16
    ours.double().to("cpu")
    assert ours.bias.dtype == torch.float64 and all(
        torch.equal(v, before[k]) for k, v in ours.named_buffers()
    )
    assert (
        torch.equal(ours.dequantize(), whole)
        and ours.dequantize(torch.float64).dtype == torch.float64
    )


def test_a_copy_can_share_the_codes():
    ours = layer()
    memo = {id(b): b for b in ours.buffers()}
    shared, own = copy.deepcopy(ours, memo), copy.deepcopy(ours)
    assert [b.data_ptr() for b in shared.buffers()] == [b.data_ptr() for b in ours.buffers()]
    assert shared.bias is not ours.bias and own.codes.data_ptr() != ours.codes.data_ptr()
    assert torch.equal(shared.dequantize(), own.dequantize())


# -- state dicts


@pytest.mark.parametrize("double", [True, False])
def test_state_dict_as_bitsandbytes_has_it(double, tmp_path):
    ours = layer(double_quant=double)
    keys = {
        "bias",
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    }
    state = ours.state_dict()
    assert set(state) == keys | (
        {"weight.nested_absmax", "weight.nested_quant_map"} if double else set()
    )
    said = json.loads(bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist()))
    expected = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [48, 80]}
    assert said == expected | (
        {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": ours.offset}
        if double
        else {}
    )
    # it refuses tensors that share memory
    save_file(nn.Sequential(ours, layer(seed=2)).state_dict(), tmp_path / "two.safetensors")
    other = layer(seed=1)
    other.load_state_dict(state)
    assert (
        torch.equal(other.dequantize(), ours.dequantize())
        and other.codes.data_ptr() != ours.codes.data_ptr()
    )
    two = nn.Sequential(layer(seed=3), layer(seed=4))
    two.load_state_dict(load_file(tmp_path / "two.safetensors"), assign=True)
    assert torch.equal(two[0].dequantize(), ours.dequantize()) and torch.equal(
        two[1].dequantize(), layer(seed=2).dequantize()
    )
    assert two.load_state_dict({}, strict=False).missing_keys == [
        "0.bias",
        "0.weight",
        "1.bias",
        "1.weight",
    ]


def test_state_dicts_that_do_not_fit():
    good = layer().state_dict()
    name = "weight.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(good[name].tolist()))

    def words(**changes):
        return torch.tensor(list(json.dumps(said | changes).encode()), dtype=torch.uint8)

    for changes, message in (
        (
            {"weight": torch.zeros(48, 80)},
            r"weight is torch.float32 \(48, 80\): torch.uint8 \(1920, 1\) was expected",
        ),
        ({"weight": good["weight"][1:]}, r"weight is torch.uint8 \(1919, 1\)"),
        ({"weight.absmax": None}, "weight.absmax is missing"),
        ({"weight.absmax": good["weight.absmax"].float()}, "weight.absmax is torch.float32"),
        ({"weight.nested_absmax": None}, "weight.nested_absmax is missing"),
        (
            {"weight.quant_map": NF4_VALUES.flip(0)},
            "weight.quant_map is not bitsandbytes' own table",
        ),
        (
            {"weight.nested_quant_map": DYNAMIC_VALUES * 0.9},
            "weight.nested_quant_map is not bitsandbytes' own table",
        ),
        ({name: None}, "nf4 is missing, or not what"),
        ({name: torch.zeros(3, dtype=torch.uint8)}, "nf4 is missing, or not what"),
        ({name: words(shape="x")}, "nf4 is missing, or not what"),
        ({name: words(shape=None)}, "nf4 is missing, or not what"),
        ({name: words(dtype="int8")}, "nf4 is missing, or not what"),
        ({name: words(nested_blocksize=128)}, "nf4 is missing, or not what"),
        ({name: words(shape=[80, 48])}, r"the shape \(80, 48\), \(48, 80\) was expected"),
    ):
        state = {k: v for k, v in (good | changes).items() if v is not None}
        with pytest.raises(ValueError, match=message) as e:
            layer().load_state_dict(state)
        assert "\n" not in str(e.value)


# -- whole models


def test_transformers_own_logits_in_4_bits():
    """A Llama that transformers saved with bitsandbytes' NF4."""
    model, _ = hub.load(GOLDEN / "llama_nf4")
    assert all(
        isinstance(model.get_submodule(n), Linear4bit)
        for n in ("layers.0.self_attn.k_proj", "layers.1.mlp.down_proj")
    )
    assert isinstance(model.lm_head, nn.Linear) and block_linears(model) == []
    expected = load_file(GOLDEN / "llama_nf4" / "expected.safetensors")
    assert expected["out"].std() > 1
    assert (model(expected["tokens"]) - expected["out"]).abs().max() < 1e-4


def test_loading_quantises_the_blocks_layers_alone(tmp_path):
    folder = tiny.folder(tmp_path, attention_bias=True)
    plain, ours = hub.load(folder)[0], hub.load(folder, quant="nf4")[0]
    names = block_linears(plain)
    assert len(names) == 14 and {
        n.split(".")[0] for n, m in ours.named_modules() if isinstance(m, Linear4bit)
    } == {"layers"}
    for name, module in plain.named_modules():
        other = ours.get_submodule(name)
        if name in names:
            assert torch.equal(other.dequantize(), quantize_nf4(module.weight).dequantize())
        elif hasattr(module, "weight"):
            assert type(other) is type(module) and torch.equal(other.weight, module.weight)
    tokens = torch.randint(280, (2, 9), generator=torch.Generator().manual_seed(0))
    # quantised afterwards, in place
    assert torch.equal(ours(tokens), quantize_model(plain)(tokens))
    half = hub.load(folder, dtype=torch.bfloat16, quant="nf4")[0]
    assert (
        half.layers[0].mlp.up_proj.dequantize().dtype
        == half.embed_tokens.weight.dtype
        == torch.bfloat16
    )


def test_one_tensor_at_a_time_is_whole_while_loading(tmp_path, monkeypatch):
    folder, read, alive = tiny.folder(tmp_path), [], []
    quantize = hub.quantize_nf4

    def counted(weight):
        alive.append(sum(ref() is not None for ref in read))
        read.append(weakref.ref(weight))
        return quantize(weight)

    monkeypatch.setattr(hub, "quantize_nf4", counted)
    for dtype in (torch.float32, torch.bfloat16):
        model = hub.load(folder, dtype=dtype, quant="nf4")[0]
        alive.append(sum(ref() is not None for ref in read))
    # the one before, until its name is given to the next
    assert len(read) == 28 and max(alive) <= 1, alive
    assert alive[-1] == 0 and model is not None


def test_what_is_refused(tmp_path):
    folder = Path(tiny.folder(tmp_path))
    with pytest.raises(ValueError, match='quant = "int8" is unknown: "nf4" was expected'):
        hub.load(folder, quant="int8")
    model, tokenizer = hub.load(folder, quant="nf4")
    with pytest.raises(ValueError, match="a model in 4 bits is not written"):
        hub.save(tmp_path / "out", model, tokenizer)
    assert not (tmp_path / "out").exists()
    nf4 = tmp_path / "nf4"
    nf4.mkdir()
    config = json.loads((GOLDEN / "llama_nf4" / "config.json").read_text())
    weights = load_file(GOLDEN / "llama_nf4" / "model.safetensors")
    for changes, drop, message in (
        (
            {"bnb_4bit_quant_type": "fp4"},
            None,
            'quantization_config.bnb_4bit_quant_type = "fp4" is not supported: only "nf4" is',
        ),
        ({"load_in_4bit": False}, None, "quantization_config.load_in_4bit = false"),
        ({"quant_method": "gptq"}, None, 'quantization_config.quant_method = "gptq"'),
        ({"bnb_4bit_quant_storage": "bfloat16"}, None, 'bnb_4bit_quant_storage = "bfloat16"'),
        (
            {},
            "model.layers.1.mlp.up_proj.weight.absmax",
            "layers.1.mlp.up_proj.weight.absmax is missing",
        ),
        ({}, "model.layers.1.mlp.up_proj.weight", "lacks model.layers.1.mlp.up_proj.weight"),
    ):
        hub.write_json(
            nf4 / "config.json",
            config | {"quantization_config": config["quantization_config"] | changes},
        )
        save_file({k: v for k, v in weights.items() if k != drop}, nf4 / "model.safetensors")
        with pytest.raises(ValueError, match=message) as e:
            hub.load(nf4)
        assert str(nf4) in str(e.value)
    spoilt = weights | {"model.layers.0.mlp.up_proj.weight": torch.full((64, 64), float("nan"))}
    spoilt = {
        k: v for k, v in spoilt.items() if not k.startswith("model.layers.0.mlp.up_proj.weight.")
    }
    hub.write_json(nf4 / "config.json", config)
    save_file(spoilt, nf4 / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=("model.layers.0.mlp.up_proj.weight: a weight to be quantised is not finite"),
    ):
        hub.load(nf4, quant="nf4")
