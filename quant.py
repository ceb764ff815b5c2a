"""QLoRA's two savings (Dettmers et al. 2023): 4-bit weights, with the linear layer that computes
from them, and the paged optimizer.

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
import math
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


# ---------------------------------------------------------------- the paged optimizer
class PagedAdamW(torch.optim.Optimizer):
    """AdamW in pages. A page is one parameter's exp_avg and exp_avg_sq, one tensor (2, *shape); it
    is resident (beside the parameter) or on the host (on a GPU in pinned memory, so that copies run
    beside the computation, on a stream of their own).

        m = β₁ m + (1-β₁) g          v = β₂ v + (1-β₂) g²          p = (1 - lr λ) p - lr m/(1-β₁ᵗ) / (sqrt(v/(1-β₂ᵗ)) + ε)

    Updates equal torch.optim.AdamW(foreach=False) bit for bit, wherever the pages are.

    A step visits the parameters in turn. Before one is updated, the pages of the next `ahead` set
    out for the GPU; to make room, the resident page that is needed last leaves. In a cycle that is
    the one used just now: throwing out the least recently used one would make every page miss
    (Belady 1966).

    budget: bytes that resident pages may hold; there is always room for the one in use. None: on a
    GPU what the rest of the training has left free so far, and where memory runs out all the same,
    pages leave and the step goes on; elsewhere no limit. On a CPU resident and host memory are the
    same kind: paging gains nothing there, but runs (and is tested) the same way.

    bitsandbytes pages otherwise: its state of 100,000 numbers and more lies in CUDA's managed
    memory (cudaMallocManaged), whose pages of 4 KB to 2 MB the driver moves when one side touches
    them, before or during any kernel, forward pass included; a prefetch before each update only
    speeds that up. Here whole tensors move, in plain sight, and only within step() and make_room().
    Pages take what all passes so far have left free, so a larger one could fail: make_room() before
    it sends them away.

    The state dict is AdamW's: {index: {step, exp_avg, exp_avg_sq}}. Raises ValueError for a
    negative budget, and on loading a state of another shape.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        budget: int | None = None,
        ahead: int = 2,
    ):
        if budget is not None and budget < 0:
            raise ValueError(f"PagedAdamW: budget is {budget} bytes, it must be at least 0")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.budget, self.ahead = budget, ahead
        self.device = next(
            (p.device for group in self.param_groups for p in group["params"]), torch.device("cpu")
        )
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # by parameter: pages, pages, the events that end the copies under way
        self.resident, self.host, self.arrival = {}, {}, {}
        self.held = 0  # bytes of resident pages
        # the most memory ever in use, and how much of that was not pages
        self.peak, self.others = 0, 0
        self.largest = {}  # of the sizes that make_room() was told, the largest of each name

    @torch.no_grad()
    def step(self):
        """Updates every parameter that has a gradient."""
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        self.place, self.room = {p: i for i, (p, _) in enumerate(params)}, self._room()
        turns = [(p, group) for p, group in params if p.grad is not None]
        for i, (p, group) in enumerate(turns):
            self.now = p
            self._fetch(p)
            scratch = self._empty(p, p.shape)  # all memory is there before the first number changes
            try:
                for q, _ in turns[i + 1 : i + 1 + self.ahead]:
                    self._fetch(q)
            except torch.OutOfMemoryError:
                pass  # it comes when its turn does
            if arrival := self.arrival.pop(p, None):
                torch.cuda.current_stream(self.device).wait_event(arrival)
            self._update(p, group, self.state[p], scratch)

    def _update(self, p, group, state, scratch):
        """The equation above, in torch's order of operations."""
        (beta1, beta2), g, m, v = group["betas"], p.grad, state["exp_avg"], state["exp_avg_sq"]
        t = state["step"].add_(1).item()
        p.mul_(1 - group["lr"] * group["weight_decay"])
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = torch.sqrt(v, out=scratch).div_((1 - beta2**t) ** 0.5).add_(group["eps"])
        p.addcdiv_(m, denominator, value=-(group["lr"] / (1 - beta1**t)))

    # ---------------------------------------------------------------- pages
    def _wait(self, p) -> int:
        """How many turns until p's page is needed; the parameter in use waits 0."""
        return (self.place[p] - self.place[self.now]) % len(self.place)

    def _fetch(self, p):
        """Makes p's page resident: new (zeros), or from the host. Without room for it, one that is
        not in use yet stays away.
        """
        size = 2 * p.nbytes
        while p not in self.resident and self.held + size > self.room and self._evict(p):
            pass
        if p in self.resident or (self.held + size > self.room and p is not self.now):
            return
        page = self._empty(p, (2, *p.shape))
        if p in self.host:
            self.arrival[p] = self._copy(page, self.host[p])
        else:
            page.zero_()
            self.state[p]["step"] = torch.tensor(0.0)
        self.resident[p] = page
        self.held += size
        self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = page

    def _evict(self, p) -> bool:
        """Sends the page that is needed last to the host; False where none is needed later than
        p's.
        """
        last = max(self.resident, key=self._wait, default=p)
        if self._wait(last) <= self._wait(p):
            return False
        self._leave(last)
        return True

    def _leave(self, p):
        page = self.resident.pop(p)
        self._copy(self._host_page(p), page)
        self.held -= page.nbytes
        self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = self.host[p]

    def _host_page(self, p):
        """p's memory on the host, kept once it is there: pinning is slow."""
        if p not in self.host:
            self.host[p] = torch.empty(
                (2, *p.shape), dtype=p.dtype, pin_memory=self.stream is not None
            )
        return self.host[p]

    def _empty(self, p, shape):
        """Memory beside p; where the GPU has none left, pages needed later than p's leave one by
        one until there is.
        """
        while True:
            try:
                return torch.empty(shape, dtype=p.dtype, device=p.device)
            except torch.OutOfMemoryError:
                if not self._evict(p):
                    raise

    def _copy(self, to, source):
        """Copies a page. On a GPU the copy is only ordered: on the side stream, after all that the
        main one was told so far; the allocator keeps the memory of a page that is let go until the
        copy has read it. → the event that ends it."""
        if self.stream is None:
            to.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
        (to if to.is_cuda else source).record_stream(self.stream)
        return self.stream.record_event()

    def _room(self) -> float:
        """Bytes for resident pages: the budget, or the GPU's memory (or this process's share) less
        a sixteenth, and less the most that anything but pages has taken so far, which is the peak
        of a forward and backward pass."""
        if self.budget is not None or self.stream is None:
            return math.inf if self.budget is None else self.budget
        if (peak := torch.cuda.max_memory_allocated(self.device)) > self.peak:
            self.peak, self.others = peak, peak - self.held
        free, total = torch.cuda.mem_get_info(self.device)
        mine = min(
            free + torch.cuda.memory_reserved(self.device),
            torch.cuda.get_per_process_memory_fraction(self.device) * total,
        )
        return mine * 15 / 16 - self.others

    # ---------------------------------------------------------------- between steps
    def make_room(self, **sizes: int):
        """Before a forward and backward pass of these sizes (tokens, targets): all pages leave
        where one of them is larger than ever before."""
        grown = {name: n for name, n in sizes.items() if n > self.largest.get(name, 0)}
        if grown:
            self.largest |= grown
            self.offload()

    def offload(self):
        """Sends every page to the host."""
        for p in list(self.resident):
            self._leave(p)

    def state_dict(self):
        if self.stream is not None:
            # what is on its way to the host is there before anyone reads it
            self.stream.synchronize()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """Takes an AdamW state, paged or not. Its pages begin on the host."""
        if self.stream is not None:
            self.stream.synchronize()
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.resident, self.host, self.held = {}, {}, 0
        params = (p for group in self.param_groups for p in group["params"])
        indices = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, p in zip(indices, params, strict=True):
            if saved := state_dict["state"].get(i):
                if saved["exp_avg"].shape != p.shape:
                    raise ValueError(
                        f"PagedAdamW: parameter {i} has a state {list(saved['exp_avg'].shape)},"
                        f" {list(p.shape)} was expected"
                    )
                m, v = self._host_page(p)
                self.state[p] = {
                    "step": saved["step"].detach().to("cpu", copy=True),
                    "exp_avg": m,
                    "exp_avg_sq": v,
                }
                m.copy_(saved["exp_avg"])
                v.copy_(saved["exp_avg_sq"])
