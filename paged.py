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

import math

import torch


class PagedAdamW(torch.optim.Optimizer):
    """AdamW in pages: see above."""

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
