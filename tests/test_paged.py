"""PagedAdamW: torch's AdamW bit for bit wherever the pages are, within its budget at every moment,
through running out of memory.
"""

import contextlib

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

from common.run import _restore, _tensors, make_room
from paged import PagedAdamW

SHAPES = [(40, 30), (7,), (30, 40), (), (40, 30), (3, 5, 7), (2000,)]
PAGE = [8 * torch.Size(s).numel() for s in SHAPES]  # bytes of each one's page


def parameters(device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in SHAPES]


def groups(params):
    matrices, others = (
        dict(params=params[:3], weight_decay=0.1, lr=3e-2),
        dict(params=params[3:], weight_decay=0.0, betas=(0.8, 0.95)),
    )
    return [matrices, dict(params=[]), others]


def gradients(params, step):
    """Gradients of step `step`, of sizes from 1e-8 to 1e8; at some steps some parameters have none,
    the last one from step 4 on alone.
    """
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator) * 10.0 ** torch.randint(
            -8, 9, p.shape, generator=generator
        )
        p.grad = (
            None if (step + i) % 5 == 0 or (i == len(params) - 1 and step < 4) else g.to(p.device)
        )


def train(optimizer, params, steps):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1) + (0.02 if group["weight_decay"] else 0)
        gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()


def everything(optimizer, params):
    """Parameters and state, bit by bit."""
    state = {
        (i, k): v.cpu().clone()
        for i, s in optimizer.state_dict()["state"].items()
        for k, v in s.items()
    }
    return {i: p.detach().cpu().clone() for i, p in enumerate(params)} | state


def equal(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]), k


@pytest.fixture(scope="module")
def expected():
    """What torch's AdamW makes of 24 steps."""
    params = parameters()
    optimizer = torch.optim.AdamW(groups(params), lr=1e-3, foreach=False, fused=False)
    train(optimizer, params, range(24))
    return everything(optimizer, params)


@pytest.mark.parametrize("budget", [None, 0, 2 * max(PAGE), sum(PAGE) - 1, sum(PAGE)])
@pytest.mark.parametrize("ahead", [0, 2, 9])
def test_equals_torch_bit_for_bit_under_any_budget(budget, ahead, expected):
    params = parameters()
    optimizer = PagedAdamW(groups(params), lr=1e-3, budget=budget, ahead=ahead)
    train(optimizer, params, range(24))
    equal(everything(optimizer, params), expected)
    assert bool(optimizer.host) == (budget is not None and budget < sum(PAGE)), (
        "pages have been on the host, or never"
    )


def test_a_model_trains_alike(tmp_path):
    """Real gradients, tied weights, and train.py's groups: matrices decay, norms do not."""
    out = []
    for paged in (True, False):
        model = tiny.lm(3, tie_word_embeddings=True)
        matrices = [p for p in model.parameters() if p.dim() == 2]
        both = [
            dict(params=matrices, weight_decay=0.1),
            dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0),
        ]
        make = PagedAdamW if paged else torch.optim.AdamW
        optimizer = make(
            both,
            lr=1e-2,
            betas=(0.9, 0.95),
            **(dict(budget=9000) if paged else dict(foreach=False, fused=False)),
        )
        tokens = torch.randint(0, 280, (2, 12), generator=torch.Generator().manual_seed(0))
        for _ in range(5):
            torch.nn.functional.cross_entropy(
                model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
        out.append(everything(optimizer, list(model.parameters())))
    equal(*out)


# ---------------------------------------------------------------- the budget
class Probe:
    """Every page that is really alive on the device, whatever the optimizer believes; `most` is the
    largest sum of their bytes.
    """

    def __init__(self, monkeypatch):
        self.pages, self.most, self.fail, self.empty = [], 0, [], torch.empty
        monkeypatch.setattr(torch, "empty", self.new)

    def new(self, shape, **how):
        if "pin_memory" in how:  # the host's
            return self.empty(shape, **how)
        if self.fail and self.fail.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
        t = self.empty(shape, **how)
        if len(shape) and shape[0] == 2:  # not scratch
            self.pages.append((StorageWeakRef(t.untyped_storage()), t.nbytes))
            self.most = max(self.most, self.alive())
        return t

    def alive(self):
        return sum(n for ref, n in self.pages if not ref.expired())


@pytest.mark.parametrize(
    "budget", [0, max(PAGE), max(PAGE) + 8, 2 * max(PAGE), 40_000, sum(PAGE) - 1]
)
def test_resident_pages_never_exceed_the_budget(budget, monkeypatch):
    probe, params = Probe(monkeypatch), parameters()
    optimizer = PagedAdamW(groups(params), budget=budget)
    for step in range(12):
        train(optimizer, params, [step])
        assert probe.alive() == optimizer.held == sum(p.nbytes for p in optimizer.resident.values())
    assert probe.most <= max(budget, max(PAGE)), "one page is always allowed"
    assert probe.most > budget - max(PAGE), "and what the budget allows is used"
    assert len(probe.pages) > len(SHAPES), "pages have gone and come back"


def equal_pages(n=6, **how):
    params = [torch.ones(10, requires_grad=True) for _ in range(n)]
    return params, PagedAdamW(params, **how)


def numbers(pages, params):
    """Which parameters' pages these are."""
    return [i for i, p in enumerate(params) if p in pages]


def test_what_leaves_is_needed_last():
    """Six pages, room for three, one ahead: the page that was used just now gives way, the ones
    first in line next time stay.
    """
    params, optimizer = equal_pages(budget=3 * 80, ahead=1)
    inside, update = [], optimizer._update
    optimizer._update = lambda *a: (inside.append(numbers(optimizer.resident, params)), update(*a))
    for p in params:
        p.grad = torch.ones(10)
    optimizer.step()
    assert inside == [[0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5], [0, 4, 5]]
    inside.clear()
    optimizer.step()  # for 1, 5 gives way: 4 is needed sooner, and 0 is in use
    assert inside == [[0, 1, 4], [1, 2, 4], [2, 3, 4], [2, 3, 4], [2, 4, 5], [2, 4, 5]]


@pytest.mark.parametrize("room", [1, 2, 3, 5, 6])
def test_steps_move_no_more_pages_than_they_must(room):
    """n pages in a cycle, room for k: no order of eviction moves fewer than n (n-k) pages each way
    in n-1 steps (Belady), throwing out the least recently used moves n (n-1). A page ahead takes
    one place."""
    for ahead, places in ((0, room), (1, max(1, room - 1))):
        params, optimizer = equal_pages(6, budget=room * 80, ahead=ahead)
        moved, copy = [], optimizer._copy
        optimizer._copy = lambda *a, moved=moved, copy=copy: (moved.append(a), copy(*a))
        for step in range(11):
            if step == 1:  # the first one only makes pages
                moved.clear()
            for p in params:
                p.grad = torch.ones(10)
            optimizer.step()
        least, most = 2 * 2 * 6 * (6 - room), 2 * 2 * 6 * (6 - places) * (room < 6)
        assert least <= len(moved) <= most


def test_a_page_is_there_before_its_turn():
    """With room for more than one, every page but a step's first is resident when the parameter
    before it is updated.
    """
    params, optimizer = equal_pages(budget=2 * 80)
    update = optimizer._update

    def check(p, *rest):
        i = next(i for i, q in enumerate(params) if q is p)
        assert i == 5 or params[i + 1] in optimizer.resident
        update(p, *rest)

    optimizer._update = check
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(10)
        optimizer.step()


# ---------------------------------------------------------------- out of memory
@pytest.mark.parametrize("seed", range(6))
def test_a_step_that_runs_out_of_memory_evicts_and_goes_on(seed, monkeypatch, expected):
    """Allocations fail at random; what is left is the same numbers, and pages have been evicted
    though no budget asked for it.
    """
    probe, params = Probe(monkeypatch), parameters()
    optimizer = PagedAdamW(groups(params), lr=1e-3)
    train(optimizer, params, range(6))  # failing begins where there is something to evict
    assert not optimizer.host
    probe.fail = (torch.rand(40, generator=torch.Generator().manual_seed(seed)) < 0.3).tolist()
    probe.fail = [
        now and not before for before, now in zip([True, *probe.fail], probe.fail, strict=False)
    ]
    train(optimizer, params, range(6, 24))
    assert not probe.fail and optimizer.host
    equal(everything(optimizer, params), expected)


def test_running_out_of_memory_evicts_what_is_needed_last_and_no_more(monkeypatch):
    probe = Probe(monkeypatch)
    params, optimizer = equal_pages(ahead=0)
    for p in params[:5]:
        p.grad = torch.ones(10)
    optimizer.step()
    for p in params[:5]:
        p.grad = None
    params[5].grad, probe.fail = torch.ones(10), [True, True]
    optimizer.step()  # the new page of the last one: 4 and then 3 give way
    assert numbers(optimizer.resident, params) == [0, 1, 2, 5] and numbers(
        optimizer.host, params
    ) == [3, 4]


def test_out_of_memory_with_nothing_to_evict_is_said_and_changes_nothing(monkeypatch):
    probe = Probe(monkeypatch)
    params, optimizer = equal_pages(1)
    params[0].grad = torch.ones(10)
    for fail in ([True], [False, True]):  # the page, then the scratch memory of the update
        probe.fail = fail
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        assert params[0].eq(1).all()
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1 and params[0].lt(1).all()


def test_a_page_ahead_that_finds_no_memory_comes_when_its_turn_does(monkeypatch, expected):
    probe, params = Probe(monkeypatch), parameters()
    optimizer = PagedAdamW(groups(params), lr=1e-3, ahead=1)
    probe.fail = [False, False, True]  # the first page, its scratch memory, the second page
    train(optimizer, params, range(24))
    equal(everything(optimizer, params), expected)


def test_offload_sends_all_pages_away_and_changes_nothing(expected):
    params = parameters()
    optimizer = PagedAdamW(groups(params), lr=1e-3)
    for step in range(24):
        train(optimizer, params, [step])
        if step % 3 == 0:
            optimizer.offload()
            assert optimizer.held == 0 and not optimizer.resident
    equal(everything(optimizer, params), expected)


def test_pages_leave_before_a_pass_that_is_larger_than_any_before():
    params, optimizer = equal_pages(3)
    for p in params:
        p.grad = torch.ones(10)
    left = []
    for sizes in (
        dict(tokens=8, targets=4),
        dict(tokens=8, targets=4),
        dict(tokens=7, targets=5),
        dict(tokens=7, targets=4),
        dict(cached=3),
        dict(tokens=8, targets=5),
        dict(tokens=9),
    ):
        make_room(optimizer, **sizes)
        left.append(not optimizer.resident)
        optimizer.step()
        assert optimizer.resident
    assert left == [True, False, True, False, True, True, True], "8 and 5 were never in one pass"


# ---------------------------------------------------------------- two streams
class Side:
    """A side stream whose work is done as late as may be: when something waits for it, or when the
    dice say so."""

    def __init__(self, gpu):
        self.gpu, self.queue, self.done, self.seen = gpu, [], 0, -1

    def add(self, work):
        self.queue.append(work)

    def run(self, until):
        while self.done < until:
            self.done += 1
            self.queue[self.done - 1]()

    def wait_stream(self, main):
        self.seen = self.gpu.clock

    def wait_event(self, event):
        self.add(lambda: event[0].run(event[1]))

    def record_event(self):
        return self, len(self.queue)

    def synchronize(self):
        self.run(len(self.queue))


class GPU:
    """torch.cuda's streams on the host. The main stream works at once; what a side stream copies
    must be behind all of it, and no page may leave whose reader is not recorded."""

    def __init__(self, monkeypatch, optimizer, probe, seed=0):
        self.clock, self.inside, self.unrecorded = 0, None, None
        self.dice = torch.Generator().manual_seed(seed)
        self.sides = optimizer.streams = [Side(self), Side(self)]
        copy, update, empty, hosts = torch.Tensor.copy_, optimizer._update, torch.empty, []

        def copy_(to, source, non_blocking=False):
            if self.inside is None:
                return copy(to, source)
            side, self.unrecorded = self.inside, source if source.is_cuda else None
            assert non_blocking and side.seen == self.clock, "behind the main stream's work"
            assert side is self.sides[to.is_cuda], "each direction has its own"
            side.add(lambda: copy(to, source))

        def new(shape, **how):
            self.tick()
            if how.pop("pin_memory", False):
                hosts.append(probe.empty(shape, **how).fill_(7.0))
                return hosts[-1]
            return empty(shape, **how)

        patch = monkeypatch.setattr
        patch(torch.Tensor, "copy_", copy_)
        patch(torch.Tensor, "is_cuda", property(lambda t: not any(t is h for h in hosts)))
        patch(torch.Tensor, "record_stream", lambda page, side: self.record(page, side))
        patch(torch, "empty", new)
        patch(torch.cuda, "stream", self.enter)
        patch(torch.cuda, "current_stream", lambda device: self)
        patch(torch.cuda, "max_memory_allocated", lambda device: 0)
        patch(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        patch(optimizer, "_update", lambda *a: (self.tick(), update(*a)))

    def tick(self):
        """The main stream works; a side stream may have gone on by now."""
        assert self.unrecorded is None, "memory may be taken again before the copy has read it"
        self.clock += 1
        side = self.sides[int(torch.randint(2, (), generator=self.dice))]
        side.run(int(torch.randint(side.done, len(side.queue) + 1, (), generator=self.dice)))

    def record(self, page, side):
        assert page is self.unrecorded and side.queue
        self.unrecorded = None

    @contextlib.contextmanager
    def enter(self, side):
        self.inside = side
        yield
        self.inside = None

    def wait_event(self, event):
        event[0].run(event[1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0, 2 * max(PAGE), 40_000, 10**9])
def test_a_page_on_its_way_is_waited_for(budget, seed, monkeypatch, expected):
    """By its update, and by its next copy: it may be needed again, or leave again, before it has
    arrived."""
    probe, params = Probe(monkeypatch), parameters()
    optimizer = PagedAdamW(groups(params), lr=1e-3, budget=budget)
    gpu = GPU(monkeypatch, optimizer, probe, seed)
    train(optimizer, params, range(6))
    fail = (torch.rand(40, generator=torch.Generator().manual_seed(seed)) < 0.3).tolist()
    fail = [now and not before for before, now in zip([True, *fail], fail, strict=False)]
    probe.fail = fail if budget else []  # there must be something to evict
    for step in range(6, 24):
        train(optimizer, params, [step])
        if not probe.fail and step % 2:
            optimizer.offload()
    equal(everything(optimizer, params), expected)
    assert all(side.done == len(side.queue) > 0 for side in gpu.sides)


def test_a_fetch_waits_for_no_other_page_s_eviction(monkeypatch):
    """What comes does not queue behind what goes."""
    params, optimizer = equal_pages(6, budget=2 * 80)
    gpu = GPU(monkeypatch, optimizer, Probe(monkeypatch))
    gpu.tick = lambda: setattr(gpu, "clock", gpu.clock + 1)  # nothing is done but what is needed
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(10)
        optimizer.step()
    there, back = gpu.sides
    assert back.done == len(back.queue)
    assert len(there.queue) - there.done == 4, "what has left in this step is needed in the next"


def test_pages_fill_what_the_largest_pass_leaves(monkeypatch):
    """Also when that pass came after pages had filled the memory: then it reaches no new peak."""
    probe = Probe(monkeypatch)
    params, optimizer = equal_pages(10)
    GPU(monkeypatch, optimizer, probe)
    card, peak = 1600, [0]

    def use(others):  # a pass that holds so much beside the pages
        peak[0] = max(peak[0], others + optimizer.held)
        assert peak[0] <= card

    def reset(device):
        peak[0] = optimizer.held

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (card, card))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(PagedAdamW, "most", 0)
    held = []
    small, large = (1, 700), (2, 1200)  # tokens, and the bytes of their pass
    for passes in ([small], [small], [small, large], [large], [small], [large, small]):
        for tokens, others in passes:
            make_room(optimizer, tokens=tokens)
            use(others)
        for p in params:
            p.grad = torch.ones(10)
        optimizer.step()
        held.append(optimizer.held)
    assert held == [800, 800, 240, 240, 240, 240] and PagedAdamW.most == 1500


# ---------------------------------------------------------------- save and resume
@pytest.mark.parametrize(
    "before, after", [(None, None), (0, 0), (40_000, 0), (0, None), (None, 2 * max(PAGE))]
)
def test_resumed_equals_uninterrupted(before, after, expected, tmp_path):
    """Through train.py's own way of saving, with pages resident, on the host and in both places."""
    params = parameters()
    optimizer = PagedAdamW(groups(params), lr=1e-3, budget=before)
    train(optimizer, params, range(13))
    assert {k.split(".")[1] for k in _tensors(optimizer)} == {"step", "exp_avg", "exp_avg_sq"}
    save_file(
        {k: v.contiguous() for k, v in _tensors(optimizer).items()}, tmp_path / "state.safetensors"
    )
    params = [p.detach().clone().requires_grad_() for p in params]
    optimizer = PagedAdamW(groups(params), lr=1e-3, budget=after)
    _restore(optimizer, load_file(tmp_path / "state.safetensors"))
    assert optimizer.held == 0, "nothing is put on the device before its turn"
    train(optimizer, params, range(13, 24))
    equal(everything(optimizer, params), expected)


@pytest.mark.parametrize("first", ["torch", "paged"])
def test_states_of_torch_and_paged_are_interchangeable(first, expected):
    def torchs(g):
        return torch.optim.AdamW(g, lr=1e-3, foreach=False, fused=False)

    def paged(g):
        return PagedAdamW(g, lr=1e-3, budget=max(PAGE))

    one, two = (torchs, paged) if first == "torch" else (paged, torchs)
    params = parameters()
    optimizer = one(groups(params))
    train(optimizer, params, range(11))
    # the groups' settings come with the state
    again = two([dict(params=group["params"]) for group in groups(params)])
    again.load_state_dict(optimizer.state_dict())
    train(again, params, range(11, 24))
    equal(everything(again, params), expected)


def test_loading_copies():
    """What was loaded does not change under the feet of who loaded it."""
    params, optimizer = equal_pages(2)
    for p in params:
        p.grad = torch.ones(10)
    optimizer.step()
    saved = optimizer.state_dict()
    before = {k: v.clone() for k, v in saved["state"][0].items()}
    other, again = equal_pages(2)
    again.load_state_dict(saved)
    for p in other:
        p.grad = torch.ones(10)
    again.step()
    assert all(torch.equal(saved["state"][0][k], before[k]) for k in before)


def test_impossible_input_is_refused():
    with pytest.raises(ValueError, match="budget is -1 bytes, it must be at least 0"):
        PagedAdamW([torch.ones(2, requires_grad=True)], budget=-1)
    params, optimizer = equal_pages(1)
    params[0].grad = torch.ones(10)
    optimizer.step()
    with pytest.raises(ValueError, match=r"parameter 0 has a state \[10\], not \[3\]"):
        PagedAdamW([torch.ones(3, requires_grad=True)]).load_state_dict(optimizer.state_dict())


# ---------------------------------------------------------------- on a GPU
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("budget", [None, 0, 2 * max(PAGE), 40_000])
def test_on_a_gpu_pages_change_nothing(budget):
    out = []
    for make in (torch.optim.AdamW, PagedAdamW):
        params = parameters("cuda")
        optimizer = make(
            groups(params),
            lr=1e-3,
            **(dict(budget=budget) if make is PagedAdamW else dict(foreach=False, fused=False)),
        )
        train(optimizer, params, range(24))
        out.append(everything(optimizer, params))
    equal(*out)
    assert all(page.is_pinned() for page in optimizer.host.values()) and all(
        page.is_cuda for page in optimizer.resident.values()
    )
    assert bool(optimizer.host) == (budget is not None)


@gpu
def test_on_a_gpu_copies_and_updates_keep_their_order():
    """Large pages and a main stream that is kept busy: a copy that did not wait, or was not waited
    for, would move stale numbers.
    """
    out = []
    for make in (torch.optim.AdamW, PagedAdamW):
        torch.manual_seed(0)
        params = [torch.randn(1 << 22, device="cuda", requires_grad=True) for _ in range(6)]
        how = dict(budget=2 * 8 << 22) if make is PagedAdamW else dict(foreach=False, fused=False)
        optimizer, busy = make(params, lr=1e-2, **how), torch.randn(4096, 4096, device="cuda")
        for _ in range(6):
            for p in params:
                p.grad = torch.randn_like(p)
            for _ in range(10):
                busy = torch.tanh(busy @ busy)
            optimizer.step()
        out.append(everything(optimizer, params))
    equal(*out)


@gpu
def test_on_a_gpu_that_is_full_a_step_completes():
    """The process may use 1 GB; parameters and gradients take half of it, their state would take
    another GB.
    """
    # set_per_process_memory_fraction wants an index
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + 2**30) / total, device
    )
    try:
        params = [torch.randn(1 << 23, device=device, requires_grad=True) for _ in range(8)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = PagedAdamW(params, lr=1e-2)
        for _ in range(3):
            optimizer.step()
        assert optimizer.host and optimizer.held < 2**29
        assert all(optimizer.state[p]["step"] == 3 for p in params)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
