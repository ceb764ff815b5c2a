"""4-bit weights, and the linear layer that computes with them (QLoRA: Dettmers et al. 2023).

A weight is cut, row after row, into blocks of 64 numbers (a block may span rows). A block keeps its
largest absolute value, absmax, and for each number the code of whichever of NF4's 16 values is
nearest to number / absmax:

    absmax = max |w|          code = argmin_k |w / absmax - NF4[k]|          w ≈ NF4[code] · absmax

Double quantisation does the same to the absmax values, minus their mean: 256 values, in blocks of
256. A number then takes 4 + 8/64 + 32/(64·256) = 4.127 bits. The arithmetic is bitsandbytes', and
its state dicts are read and written as they are.

Where the 16 values come from: weights are nearly normal, and codes carry most information where all
are equally likely. So the values are quantiles of N(0, 1) at evenly spaced probabilities, 8 above
zero, 7 below, and zero itself, which is exact. The outermost probability is 1 - (1/30 + 1/32)/2 =
0.9677083, half way between the half steps of 15 and of 16 values. All are divided by the largest:

    0        Φ⁻¹(p) at 8 of 9 points from 0.9677083 to 1/2       -Φ⁻¹(p) at 7 of 8 such points
             (the last point, 1/2, is the zero)
"""

import json
from dataclasses import dataclass
from math import prod

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

NF4_VALUES = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip
NESTED = 256  # absmax in a block of the second quantisation


def dynamic_map():
    """The 256 values of the second quantisation (Dettmers 2015): 0, 1, and of each sign seven
    decades from 1e-6 to 1, the k-th cut into 2^k equal parts, whose middles are taken. Finer near 1
    than near 0, and not symmetric: from -0.993 to 1.
    """
    edges = [torch.linspace(0.1, 1, 2**k + 1, device="cpu") for k in range(7)]
    middles = torch.cat([10.0 ** (k - 6) * (e[:-1] + e[1:]) / 2 for k, e in enumerate(edges)])
    return torch.cat((middles, -middles, torch.tensor([0.0, 1.0], device="cpu"))).sort().values


DYNAMIC_VALUES = dynamic_map()


def to_codes(x, values, size: int):
    """x / its block's absmax → the index of the nearest of the sorted values; ties go to the lower.

    x (n,) float32 → codes (n,) uint8, absmax (ceil(n/size),) float32. The last block may be
    shorter. ValueError for inf and nan.
    """
    n = x.numel()
    rest = -n % size
    blocks = (F.pad(x, (0, rest)) if rest else x).view(-1, size)  # (blocks,size)
    absmax = blocks.abs().amax(1)  # (blocks,)
    if not absmax.isfinite().all():
        raise ValueError("a weight to be quantised is not finite (inf or nan): get it again")
    share = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    if rest:  # bitsandbytes divides in a last, shorter block: other rounding, other ties
        absmax[-1].clamp_(min=1e-38)
        share[-1] = blocks[-1] / absmax[-1]
    share = share.clamp_(-1, 1).view(-1)[:n]
    middles = ((values[:-1] + values[1:]) / 2).to(x.device)
    codes = torch.bucketize(share, middles, out_int32=True).to(torch.uint8)
    return codes, absmax


TABLES = {}  # what tables() made, by device: compiled code can read it here


def tables(device):
    """The tables for look_up: pairs (256,2), of each byte the two NF4 values (the high half's
    first), and DYNAMIC_VALUES (256,1).
    """
    if device not in TABLES:
        byte = torch.arange(256, device="cpu")
        pairs = torch.stack((NF4_VALUES[byte >> 4], NF4_VALUES[byte & 15]), 1)
        TABLES[device] = pairs.to(device), DYNAMIC_VALUES[:, None].to(device)
    return TABLES[device]


def look_up(codes, table, scale, size: int, dtype=torch.float32):
    """table[codes], each block of `size` numbers times its scale, rounded to dtype: flat, whole
    blocks.

    table (256,numbers per code). A large weight is processed in pieces that fit a processor's
    cache, so that it takes little more memory than the result; compiled, all is one kernel.
    """
    per = table.shape[1]
    if torch.compiler.is_compiling():
        numbers = table[codes.view(-1).int()].view(-1)
        return (numbers * scale[:, None].expand(-1, size).reshape(-1)[: len(numbers)]).to(dtype)
    table = table.view(-1) if per == 1 else table.view(torch.int64).view(-1)
    if rest := -codes.numel() % (size // per):
        codes = F.pad(codes.view(-1), (0, rest))

    def values(codes):
        return table.index_select(0, codes.view(-1).int()).view(torch.float32).view(-1, size)

    piece = max(1, 2 ** (19 if codes.device.type == "cpu" else 24) // size)
    if len(scale) <= 2 * piece:
        return values(codes).mul_(scale[:, None]).to(dtype).view(-1)
    out = torch.empty(len(scale), size, dtype=dtype, device=codes.device)
    pieces = codes.split(piece * size // per), scale.split(piece), out.split(piece)
    for c, s, o in zip(*pieces, strict=True):
        torch.mul(values(c), s[:, None], out=o)
    return out.view(-1)


@dataclass
class NF4:
    """A quantised weight: n numbers in blocks of block_size."""

    codes: torch.Tensor  # (ceil(n/2), 1) uint8: two codes per byte, the first in the high half
    absmax: torch.Tensor  # (blocks,) float32; uint8 codes where it is quantised itself
    nested_absmax: torch.Tensor | None  # (ceil(blocks/256),) float32, of absmax - offset
    offset: torch.Tensor | None  # (1,) float32, the mean of absmax
    block_size: int
    shape: tuple
    dtype: torch.dtype  # the weight's own

    def dequantize(self, dtype=None):
        """The weight (shape) in its own dtype, then cast to `dtype`: NF4[code] · absmax is taken in
        float32 and rounded.
        """
        pairs, dynamic = tables(self.codes.device)
        absmax = self.absmax
        if self.nested_absmax is not None:
            absmax = look_up(absmax, dynamic, self.nested_absmax, NESTED)
            absmax = absmax[: len(self.absmax)] + self.offset
        weight = look_up(self.codes, pairs, absmax, self.block_size, self.dtype)
        return weight[: prod(self.shape)].view(self.shape).to(dtype or self.dtype)

    def state_dict(self, name: str) -> dict:
        """bitsandbytes' tensors of the weight `name`; constants are JSON in a tensor of bytes."""
        device = self.codes.device
        constants = {"quant_type": "nf4", "blocksize": self.block_size}
        constants |= {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape)}
        tensors = {"": self.codes, ".absmax": self.absmax}
        tensors[".quant_map"] = NF4_VALUES.to(device, copy=True)
        if self.nested_absmax is not None:
            constants |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
            constants["nested_offset"] = float(self.offset)
            tensors[".nested_absmax"] = self.nested_absmax
            tensors[".nested_quant_map"] = DYNAMIC_VALUES.to(device, copy=True)
        text = list(json.dumps(constants).encode())
        tensors[".quant_state.bitsandbytes__nf4"] = torch.tensor(text, dtype=torch.uint8)
        return {name + k: v for k, v in tensors.items()}

    @classmethod
    def from_state_dict(cls, state: dict, name: str):
        """The weight `name` from bitsandbytes' tensors; ValueError where one is missing, or of
        another kind.
        """

        def tensor(part, shape, dtype, values=None):
            t = state.get(name + part)
            if t is None or t.shape != shape or t.dtype != dtype:
                there = "missing" if t is None else f"{t.dtype} {tuple(t.shape)}"
                expected = f"{dtype} {shape} was expected, as bitsandbytes writes an NF4 weight"
                raise ValueError(f"{name}{part} is {there}: {expected}")
            if values is not None and not torch.allclose(t.cpu(), values, rtol=0, atol=1e-6):
                raise ValueError(f"{name}{part} is not bitsandbytes' own table")
            return t

        try:
            constants = json.loads(bytes(state[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
            shape = tuple(map(int, constants["shape"]))
            size = int(constants["blocksize"])
            dtype = getattr(torch, constants["dtype"])
            offset = constants.get("nested_offset")  # None: absmax is not quantised
            assert constants.get("nested_blocksize", NESTED) == NESTED
            assert size % 2 == 0 and dtype.is_floating_point
        except (KeyError, ValueError, TypeError, AttributeError, AssertionError):
            wrong = "is missing, or not what bitsandbytes writes for an NF4 weight"
            raise ValueError(f"{name}.quant_state.bitsandbytes__nf4 {wrong}") from None
        n = prod(shape)
        blocks = -(-n // size)
        codes = tensor("", (-(-n // 2), 1), torch.uint8)
        tensor(".quant_map", (16,), torch.float32, NF4_VALUES)
        if offset is None:
            absmax = tensor(".absmax", (blocks,), torch.float32)
            return cls(codes, absmax, None, None, size, shape, dtype)
        absmax = tensor(".absmax", (blocks,), torch.uint8)
        tensor(".nested_quant_map", (256,), torch.float32, DYNAMIC_VALUES)
        nested = tensor(".nested_absmax", (-(-blocks // NESTED),), torch.float32)
        mean = torch.tensor([offset], dtype=torch.float32, device=codes.device)
        return cls(codes, absmax, nested, mean, size, shape, dtype)


def quantize_nf4(weight, block_size=64, double_quant=True) -> NF4:
    """A weight of any shape in float32, bf16 or fp16 → NF4. ValueError for another dtype, and for
    inf and nan.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        expected = "float32, bfloat16 or float16 was expected"
        raise ValueError(f"a weight of {weight.dtype} is not quantised: {expected}")
    codes, absmax = to_codes(weight.detach().reshape(-1).float(), NF4_VALUES, block_size)
    if codes.numel() % 2:
        codes = F.pad(codes, (0, 1), value=7)  # the code of 0
    packed = (codes[::2] << 4 | codes[1::2])[:, None]
    nested = offset = None
    if double_quant:
        offset = absmax.mean().view(1)
        absmax, nested = to_codes(absmax - offset, DYNAMIC_VALUES, NESTED)
    return NF4(packed, absmax, nested, offset, block_size, tuple(weight.shape), weight.dtype)


class Product(torch.autograd.Function):
    """y = x Wᵀ with W in 4 bits. Only the codes are saved; the backward pass, dL/dx = dL/dy W,
    dequantises W again. W is never trained.
    """

    @staticmethod
    def forward(ctx, x, codes, absmax, nested_absmax, offset, *constants):
        tensors = codes, absmax, nested_absmax, offset
        ctx.save_for_backward(*tensors)
        ctx.constants = constants
        return F.linear(x, NF4(*tensors, *constants).dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        dx = grad @ NF4(*ctx.saved_tensors, *ctx.constants).dequantize(grad.dtype)
        return dx, *[None] * (4 + len(ctx.constants))


class Linear4bit(nn.Module):
    """nn.Linear with its weight in NF4: 4 bits in memory, whole only within a forward or backward
    call.

    Made from a linear layer; on the meta device it is empty until a state dict with bitsandbytes'
    keys is loaded. Computes in x's dtype, under autocast in autocast's.
    """

    TENSORS = ("codes", "absmax", "nested_absmax", "offset")
    CONSTANTS = ("block_size", "shape", "dtype")

    def __init__(self, linear: nn.Linear, block_size=64, double_quant=True):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        for name in self.TENSORS:  # the state dict has them under bitsandbytes' names
            self.register_buffer(name, None, persistent=False)
        if not linear.weight.is_meta:
            self.hold(quantize_nf4(linear.weight, block_size, double_quant))

    def hold(self, weight: NF4):
        for name in self.TENSORS + self.CONSTANTS:
            setattr(self, name, getattr(weight, name))

    @property
    def weight(self) -> NF4:
        return NF4(*(getattr(self, name) for name in self.TENSORS + self.CONSTANTS))

    def dequantize(self, dtype=None):
        """The weight (out_features, in_features)."""
        return self.weight.dequantize(dtype)

    def forward(self, x):
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if torch.compiler.is_compiling():  # the compiler, too, shall keep only the codes
            y = F.linear(x, checkpoint(self.dequantize, x.dtype, use_reentrant=False))
        else:
            y = Product.apply(x, *(getattr(self, name) for name in self.TENSORS + self.CONSTANTS))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        """.to(device) moves the codes, but .bfloat16() and .double() must not round absmax: fn gets
        bytes, which nothing casts.
        """
        buffers = [id(b) for b in self.buffers(recurse=False)]

        def move(t):
            return fn(t.view(torch.uint8)).view(t.dtype) if id(t) in buffers else fn(t)

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.codes is not None:
            destination.update(self.weight.state_dict(prefix + "weight"))

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, *rest):
        name = prefix + "weight"
        own = {k: v for k, v in state.items() if k == name or k.startswith(name + ".")}
        others = {k: v for k, v in state.items() if k not in own}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing, *rest)
        if not own:
            return missing.append(name)
        weight = NF4.from_state_dict(own, name)
        shape = self.out_features, self.in_features
        if weight.shape != shape:
            raise ValueError(f"{name} has the shape {weight.shape}, {shape} was expected")
        if not metadata.get("assign_to_params_buffers"):  # load_state_dict(assign=False) copies
            device = weight.codes.device if self.codes is None else self.codes.device
            for k in self.TENSORS:
                t = getattr(weight, k)
                setattr(weight, k, t if t is None else t.to(device, copy=True))
        self.hold(weight)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def block_linears(model) -> list[str]:
    """Names of the blocks' linear layers, which are quantised; embedding, norms, heads are not."""
    modules = model.layers.named_modules()
    return [f"layers.{name}" for name, module in modules if isinstance(module, nn.Linear)]


def quantize_model(model, names=None):
    """Puts these linear layers (None: block_linears) in 4 bits, one after another → the model."""
    for name in block_linears(model) if names is None else names:
        model.set_submodule(name, Linear4bit(model.get_submodule(name)))
    return model
