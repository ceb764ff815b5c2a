"""Paged AdamW: optimizer state that moves between the GPU and the host (the idea: Dettmers et al.
2023, section 3).

    m = β₁ m + (1-β₁) g
    v = β₂ v + (1-β₂) g²
    p = (1 - lr λ) p - lr m/(1-β₁ᵗ) / (sqrt(v/(1-β₂ᵗ)) + ε)

A page is one parameter's m and v (exp_avg, exp_avg_sq), one tensor (2, *shape). It is resident,
beside the parameter, or on the host: for a GPU in pinned memory, so that copies run beside the
computation, on a stream for each direction. Wherever the pages are, updates equal
torch.optim.AdamW(foreach=False) bit for bit.

A step visits the parameters in turn. Before one is updated, the pages of the next `ahead` start
towards the GPU. To make room, the resident page that is needed last leaves. In a cycle that is the
one just used: evicting the least recently used one would make every page miss (Belady 1966).

bitsandbytes works differently: states of 100,000 numbers or more live in CUDA's managed memory
(cudaMallocManaged), whose pages of 4 KB to 2 MB the driver moves when one side touches them, before
or during any kernel, in a forward pass too; a prefetch before each update only speeds that up. Here
whole tensors move, in plain sight, and only within step() and make_room().
"""

import math

import torch


class PagedAdamW(torch.optim.Optimizer):
    """AdamW in pages.

    budget: bytes that resident pages may hold; the page in use is always resident. None: on a GPU
    the memory that the rest of the training has left free so far (where it runs out all the same,
    pages leave and the step goes on), elsewhere no limit. On a CPU both kinds of memory are one:
    paging gains nothing, but runs, and is tested, the same way.

    The state dict is AdamW's: {index: {step, exp_avg, exp_avg_sq}}. ValueError for a negative
    budget, and for a loaded state of another shape.
    """

    most = 0  # bytes that this process has held on a GPU, until torch's peak last began anew

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
        params = [p for group in self.param_groups for p in group["params"]]
        self.device = params[0].device if params else torch.device("cpu")
        gpu = self.device.type == "cuda"  # streams: to the host, to the GPU
        self.streams = [torch.cuda.Stream(self.device) for _ in range(2)] if gpu else None
        self.resident, self.host = {}, {}  # {parameter: page}
        self.moving = {}  # {parameter: the event that ends its page's last copy}
        self.held = 0  # bytes of resident pages
        self.others = 0  # the most memory that anything else has held between steps
        self.passes = []  # the sizes for which make_room() made room
        self._count(passes=False)  # of what was before, such as loading

    @torch.no_grad()
    def step(self):
        """Updates every parameter that has a gradient."""
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        self.place = {p: i for i, (p, _) in enumerate(params)}
        self.room = self._room()
        turns = [(p, group) for p, group in params if p.grad is not None]
        for i, (p, group) in enumerate(turns):
            self.now = p
            self._fetch(p)
            scratch = self._empty(p, p.shape)  # allocated before the first number changes
            try:
                for q, _ in turns[i + 1 : i + 1 + self.ahead]:
                    self._fetch(q)
            except torch.OutOfMemoryError:
                pass  # it is fetched in its own turn
            if arrival := self.moving.pop(p, None):
                torch.cuda.current_stream(self.device).wait_event(arrival)
            self._update(p, group, self.state[p], scratch)
        self._count(passes=False)

    def _update(self, p, group, state, scratch):
        """The equation above, in torch's order of operations. scratch: memory shaped like p."""
        g, m, v = p.grad, state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
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
        """Makes p's page resident: new (zeros), or from the host. Where there is no room, it is not
        fetched unless p is in use.
        """
        size = 2 * p.nbytes
        while p not in self.resident and self.held + size > self.room and self._evict(p):
            pass
        if p in self.resident or (self.held + size > self.room and p is not self.now):
            return
        page = self._empty(p, (2, *p.shape))
        if p in self.host:
            self._copy(p, page, self.host[p])
        else:
            page.zero_()
            self.state[p]["step"] = torch.tensor(0.0)
        self.resident[p] = page
        self.held += size
        self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = page

    def _evict(self, p) -> bool:
        """Sends the page that is needed last to the host → False where it is needed before p's."""
        last = max(self.resident, key=self._wait, default=p)
        if self._wait(last) <= self._wait(p):
            return False
        self._leave(last)
        return True

    def _leave(self, p):
        page = self.resident.pop(p)
        self._copy(p, self._host_page(p), page)
        self.held -= page.nbytes
        self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = self.host[p]

    def _host_page(self, p):
        """p's memory on the host, kept once it is there: pinning is slow."""
        if p not in self.host:
            pinned = self.streams is not None
            self.host[p] = torch.empty((2, *p.shape), dtype=p.dtype, pin_memory=pinned)
        return self.host[p]

    def _empty(self, p, shape):
        """Memory on p's device. While it has none left, pages needed after p's leave in turn."""
        while True:
            try:
                return torch.empty(shape, dtype=p.dtype, device=p.device)
            except torch.OutOfMemoryError:
                if not self._evict(p):
                    raise

    def _copy(self, p, to, source):
        """Copies p's page. On a GPU that is only queued, on its direction's stream: behind all work
        of the main stream so far, and behind the page's last copy, which may still be on its way.
        record_stream keeps the memory of a page that leaves until the copy has read it.
        """
        if self.streams is None:
            to.copy_(source)
            return
        stream = self.streams[to.is_cuda]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if before := self.moving.get(p):
            stream.wait_event(before)
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        if source.is_cuda:
            source.record_stream(stream)
        self.moving[p] = stream.record_event()

    def _count(self, passes=True):
        """Notes what passes have held beside the pages. torch's peak begins anew with each look: it
        would hide a pass that took what pages had left."""
        if self.streams is None:
            return
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        PagedAdamW.most = max(PagedAdamW.most, peak)
        if passes:
            self.others = max(self.others, peak - self.held)

    def _room(self) -> float:
        """Bytes for resident pages: the budget, or the GPU's memory (or this process's share) less
        a sixteenth, less the most that anything else has taken so far: the peak of a forward and
        backward pass.
        """
        self._count()
        if self.budget is not None:
            return self.budget
        if self.streams is None:
            return math.inf
        free, total = torch.cuda.mem_get_info(self.device)
        share = torch.cuda.get_per_process_memory_fraction(self.device) * total
        mine = min(free + torch.cuda.memory_reserved(self.device), share)
        return mine * 15 / 16 - self.others

    # ---------------------------------------------------------------- between steps
    def make_room(self, **sizes: int):
        """Call before a forward and backward pass of these sizes (tokens, targets): unless a pass
        before was as large in each of them, all pages leave. They fill the memory that earlier
        passes left free, so a larger pass could fail.
        """
        if not any(
            all(n <= seen.get(name, 0) for name, n in sizes.items()) for seen in self.passes
        ):
            self.passes.append(sizes)
            self.offload()

    def offload(self):
        """Sends every page to the host."""
        self._count()
        for p in list(self.resident):
            self._leave(p)

    def state_dict(self):
        for stream in self.streams or ():
            stream.synchronize()  # pages on their way have arrived
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """Loads an AdamW state, paged or not. Its pages start on the host."""
        for stream in self.streams or ():
            stream.synchronize()
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.resident, self.host, self.moving, self.held = {}, {}, {}, 0
        params = (p for group in self.param_groups for p in group["params"])
        indices = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, p in zip(indices, params, strict=True):
            saved = state_dict["state"].get(i)
            if not saved:
                continue
            if saved["exp_avg"].shape != p.shape:
                found, own = list(saved["exp_avg"].shape), list(p.shape)
                raise ValueError(f"PagedAdamW: parameter {i} has a state {found}, not {own}")
            m, v = self._host_page(p)
            m.copy_(saved["exp_avg"])
            v.copy_(saved["exp_avg_sq"])
            step = saved["step"].detach().to("cpu", copy=True)
            self.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
