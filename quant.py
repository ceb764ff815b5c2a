"""4-bit weights, with the linear layer that computes from them (QLoRA: Dettmers et al. 2023).

A weight is cut, row after row, into blocks of 64 numbers (a block may span rows). What is kept of a
block is its largest absolute value and for each number which of the 16 values of NF4 is nearest to
its share of it:

    absmax = max |w|          code = argmin_k |w / absmax - NF4[k]|          w ≈ NF4[code] · absmax

Double quantisation does the same once more to the absmax, less their mean, with 256 values in
blocks of 256; a weight then takes 4 + 8/64 + 32/(64·256) = 4.127 bits. The arithmetic is
bitsandbytes', whose state dicts are read and written as they are.

Where the 16 values come from: a weight is nearly normal, and a code says most where all its values
are equally likely. They are quantiles of N(0, 1) at evenly spaced probabilities, 8 above zero, 7
below and zero itself, so that zero is exact; the outermost probability is 1 - (1/30 + 1/32)/2 =
0.9677083, the half way between the half steps of 15 and of 16 values; divided by the largest:

    0, Φ⁻¹(p) at 8 of 9 points from 0.9677083 to 1/2, -Φ⁻¹(p) at 7 of 8 such points (the last one,
    1/2, is the zero)
"""

import functools
import json
from dataclasses import dataclass
from math import prod

import torch
import torch.nn as nn
import torch.nn.functional as F

NF4_VALUES = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
NESTED = 256  # absmax in a block of the second quantisation


def dynamic_map():
    """The 256 values of the second quantisation (Dettmers 2015): of each sign seven decades from
    1e-6 to 1, the k-th cut into 2^k equal parts, of which the middles are taken; and 0 and 1. Finer
    near 1 than near 0, and not symmetric: from -0.993 to 1."""
    edges = [torch.linspace(0.1, 1, 2**k + 1, device="cpu") for k in range(7)]
    middles = torch.cat([10.0 ** (k - 6) * (e[:-1] + e[1:]) / 2 for k, e in enumerate(edges)])
    return torch.cat((middles, -middles, torch.tensor([0.0, 1.0], device="cpu"))).sort().values


DYNAMIC_VALUES = dynamic_map()


def to_codes(x, values, size: int):
    """Each number's share of its block's absmax → index of the nearest of the sorted values, the
    lower one in a tie.

    x (n,) float32 → codes (n,) uint8, absmax (ceil(n/size),) float32. The last block may be
    shorter.
    """
    rest = -x.numel() % size
    blocks = (F.pad(x, (0, rest)) if rest else x).view(-1, size)
    absmax = blocks.abs().amax(1)
    if not absmax.isfinite().all():
        raise ValueError(
            "a weight to be quantised has values that are not finite (inf or nan); get the"
            " checkpoint again"
        )
    share = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    if rest:  # bitsandbytes divides in a last, shorter block: other roundings, other ties
        absmax[-1].clamp_(min=1e-38)
        share[-1] = blocks[-1] / absmax[-1]
    middles = ((values[:-1] + values[1:]) / 2).to(x.device)
    return (
        torch.bucketize(share.clamp_(-1, 1).view(-1)[: x.numel()], middles, out_int32=True).to(
            torch.uint8
        ),
        absmax,
    )


@functools.cache
def tables(device):
    """What codes are looked up in: the two NF4 values (float32, the high half's first) of each
    byte, as one int64, and DYNAMIC_VALUES.
    """
    byte = torch.arange(256, device="cpu")
    pairs = (
        torch.stack((NF4_VALUES[byte >> 4], NF4_VALUES[byte & 15]), 1).view(torch.int64).view(-1)
    )
    return pairs.to(device), DYNAMIC_VALUES.to(device)


def look_up(codes, table, scale, size: int, dtype=torch.float32):
    """table[codes], each block of `size` numbers times its scale, rounded to dtype: flat, whole
    blocks. A large weight goes piece by piece, small enough for a processor's cache, so that the
    result is nearly all the memory that it takes."""
    per = table.element_size() // 4  # numbers to a code
    if rest := -codes.numel() % (size // per):
        codes = F.pad(codes.view(-1), (0, rest))

    def values(codes):
        return table.index_select(0, codes.view(-1).int()).view(torch.float32).view(-1, size)

    piece = max(1, 2 ** (19 if codes.device.type == "cpu" else 24) // size)
    if len(scale) <= 2 * piece:
        return values(codes).mul_(scale[:, None]).to(dtype).view(-1)
    out = torch.empty(len(scale), size, dtype=dtype, device=codes.device)
    for c, s, o in zip(
        codes.split(piece * size // per), scale.split(piece), out.split(piece), strict=True
    ):
        torch.mul(values(c), s[:, None], out=o)
    return out.view(-1)


@dataclass
class NF4:
    """A quantised weight: n numbers in blocks of block_size."""

    codes: torch.Tensor  # (ceil(n/2), 1) uint8: two codes a byte, the first in the high half
    absmax: torch.Tensor  # (blocks,) float32; uint8 codes of it where it is quantised in its turn
    nested_absmax: torch.Tensor | None  # (ceil(blocks/256),) float32, of absmax - offset
    offset: float  # the mean of absmax
    block_size: int
    shape: tuple
    dtype: torch.dtype  # the weight's own

    def dequantize(self, dtype=None):
        """The weight (shape) in its own dtype, or that one cast to `dtype`: code · absmax in
        float32, then rounded.
        """
        pairs, dynamic = tables(self.codes.device)
        absmax = self.absmax
        if self.nested_absmax is not None:
            absmax = (
                look_up(absmax, dynamic, self.nested_absmax, NESTED)[: len(absmax)] + self.offset
            )
        weight = look_up(self.codes, pairs, absmax, self.block_size, self.dtype)[: prod(self.shape)]
        return weight.view(self.shape).to(dtype or self.dtype)

    def state_dict(self, name: str) -> dict:
        """bitsandbytes' tensors of the weight `name`, whose numbers and words are JSON in a tensor
        of bytes.
        """
        said = {
            "quant_type": "nf4",
            "blocksize": self.block_size,
            "dtype": str(self.dtype)[6:],
            "shape": list(self.shape),
        }
        tensors = {
            "": self.codes,
            ".absmax": self.absmax,
            ".quant_map": NF4_VALUES.to(self.codes.device, copy=True),
        }
        if self.nested_absmax is not None:
            said |= {
                "nested_blocksize": NESTED,
                "nested_dtype": "float32",
                "nested_offset": self.offset,
            }
            tensors |= {".nested_absmax": self.nested_absmax}
            tensors |= {".nested_quant_map": DYNAMIC_VALUES.to(self.codes.device, copy=True)}
        tensors[".quant_state.bitsandbytes__nf4"] = torch.tensor(
            list(json.dumps(said).encode()), dtype=torch.uint8
        )
        return {name + k: v for k, v in tensors.items()}

    @classmethod
    def from_state_dict(cls, state: dict, name: str):
        """The weight `name` among bitsandbytes' tensors; ValueError where something is missing, or
        quantised in another way.
        """

        def tensor(part, shape, dtype, values=None):
            t = state.get(name + part)
            if t is None or t.shape != shape or t.dtype != dtype:
                there = "missing" if t is None else f"{t.dtype} {tuple(t.shape)}"
                raise ValueError(
                    f"{name}{part} is {there}: {dtype} {shape} was expected, as bitsandbytes writes"
                    " an NF4 weight"
                )
            if values is not None and not torch.allclose(t.cpu(), values, rtol=0, atol=1e-6):
                raise ValueError(
                    f"{name}{part} is another table than bitsandbytes' own: only that one is known"
                )
            return t

        try:
            said = json.loads(bytes(state[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
            shape, size, dtype = (
                tuple(map(int, said["shape"])),
                int(said["blocksize"]),
                getattr(torch, said["dtype"]),
            )
            nested, offset = "nested_offset" in said, said.get("nested_offset", 0.0)
            assert (
                size % 2 == 0
                and said.get("nested_blocksize", NESTED) == NESTED
                and dtype.is_floating_point
            )
        except (KeyError, ValueError, TypeError, AttributeError, AssertionError):
            raise ValueError(
                f"{name}.quant_state.bitsandbytes__nf4 is missing, or not what bitsandbytes writes"
                " of an NF4 weight"
            ) from None
        n = prod(shape)
        blocks = -(-n // size)
        codes = tensor("", (-(-n // 2), 1), torch.uint8)
        absmax = tensor(".absmax", (blocks,), torch.uint8 if nested else torch.float32)
        tensor(".quant_map", (16,), torch.float32, NF4_VALUES)
        if nested:
            tensor(".nested_quant_map", (256,), torch.float32, DYNAMIC_VALUES)
        nested = (
            tensor(".nested_absmax", (-(-blocks // NESTED),), torch.float32) if nested else None
        )
        return cls(codes, absmax, nested, offset, size, shape, dtype)


def quantize_nf4(weight, block_size=64, double_quant=True) -> NF4:
    """A weight of any shape, in float32, bf16 or fp16, → NF4. ValueError for another dtype, and for
    inf and nan.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"a weight of {weight.dtype} is not quantised: float32, bfloat16 or float16 was"
            " expected"
        )
    codes, absmax = to_codes(weight.detach().reshape(-1).float(), NF4_VALUES, block_size)
    if codes.numel() % 2:
        codes = F.pad(codes, (0, 1), value=7)  # the code of 0
    packed, nested, offset = (codes[::2] << 4 | codes[1::2])[:, None], None, 0.0
    if double_quant:
        mean = absmax.mean()
        (absmax, nested), offset = to_codes(absmax - mean, DYNAMIC_VALUES, NESTED), mean.item()
    return NF4(packed, absmax, nested, offset, block_size, tuple(weight.shape), weight.dtype)


class Product(torch.autograd.Function):
    """x Wᵀ with W in 4 bits. It saves the codes; W itself is made anew in the backward pass: dL/dx
    = dL/dy W. W is never trained.
    """

    @staticmethod
    def forward(ctx, x, codes, absmax, nested_absmax, *constants):
        ctx.save_for_backward(codes, absmax, nested_absmax)
        ctx.constants = constants
        return F.linear(x, NF4(codes, absmax, nested_absmax, *constants).dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ NF4(*ctx.saved_tensors, *ctx.constants).dequantize(grad.dtype), *[None] * (
            3 + len(ctx.constants)
        )


class Linear4bit(nn.Module):
    """nn.Linear with its weight in NF4: 4 bits in memory, whole only inside a forward or a backward
    call.

    Made from a linear layer; on the meta device it is empty until a state dict with bitsandbytes'
    keys is loaded. Computes in x's dtype, under autocast in autocast's.
    """

    TENSORS = ("codes", "absmax", "nested_absmax")
    CONSTANTS = ("offset", "block_size", "shape", "dtype")

    def __init__(self, linear: nn.Linear, block_size=64, double_quant=True):
        super().__init__()
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            linear.bias,
        )
        for name in self.TENSORS:
            # the state dict has them under bitsandbytes' names
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
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        y = Product.apply(x, *(getattr(self, name) for name in self.TENSORS + self.CONSTANTS))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse=True):
        """.to(device) moves the codes; .bfloat16() and .double() must not round absmax: fn sees
        bytes, which nothing casts.
        """
        buffers = [id(b) for b in self.buffers(recurse=False)]
        return super()._apply(
            lambda t: fn(t.view(torch.uint8)).view(t.dtype) if id(t) in buffers else fn(t), recurse
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.codes is not None:
            destination.update(self.weight.state_dict(prefix + "weight"))

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, *rest):
        name = prefix + "weight"
        own = {k: v for k, v in state.items() if k == name or k.startswith(name + ".")}
        super()._load_from_state_dict(
            {k: v for k, v in state.items() if k not in own},
            prefix,
            metadata,
            strict,
            missing,
            *rest,
        )
        if not own:
            return missing.append(name)
        weight = NF4.from_state_dict(own, name)
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"{name} has the shape {weight.shape}, {(self.out_features, self.in_features)} was"
                " expected"
            )
        # load_state_dict(assign=True) takes the tensors themselves
        if not metadata.get("assign_to_params_buffers"):
            device = weight.codes.device if self.codes is None else self.codes.device
            for k in self.TENSORS:
                t = getattr(weight, k)
                setattr(weight, k, t if t is None else t.to(device, copy=True))
        self.hold(weight)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def block_linears(model) -> list[str]:
    """Names of the linear layers of the blocks: what is quantised. Embedding, norms and heads stay
    as they are.
    """
    return [
        f"layers.{name}"
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear)
    ]


def quantize_model(model, names=None):
    """The model with these linear layers (None: block_linears) in 4 bits, changed in place, one
    after another.
    """
    for name in block_linears(model) if names is None else names:
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, child, Linear4bit(getattr(parent, child)))
    return model
