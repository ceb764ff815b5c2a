"""--compile: one code for all layers, eager's numbers, no weight kept that 4 bits stand for, and a
run that goes on without a compiler. Most of it needs none: the graphs run as they are. Each takes
seconds to trace, so they are few; tests/parity has more, really compiled."""

import copy
import shutil
from argparse import Namespace

import pytest
import tiny
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn

import lora
import sampling
import sft
from common import compiled, tuning
from common.run import Run
from model import Block, losses, nll, scalar_model, share
from packing import pack
from quant import TABLES, Linear4bit, quantize_model, tables

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "said", [])
    yield
    torch._dynamo.reset()


def qlora():
    model, generator = (
        quantize_model(tiny.lm(num_hidden_layers=3)),
        torch.Generator().manual_seed(0),
    )
    lora.add_lora(model, 2, 4, generator=generator)
    for name, p in model.named_parameters():
        if ".B." in name:
            nn.init.normal_(p, std=0.1, generator=generator)
    model.checkpointing = True
    return model


def read(model, lengths, width):
    """The loss and the gradients of packed texts of these lengths."""
    rows = pack([(ids, ids) for ids in tiny.ragged(lengths)], width)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nll(model, *rows).sum()
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return found


def test_one_code_serves_all_layers_and_sizes():
    """Each layer has its own 4-bit weights and adapter, and the first one's input no gradient."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    sizes, ours = [((5, 9, 3), 12), ((12, 4, 15, 3), 17), ((6, 6), 6)], qlora()
    expected = [read(ours, *size) for size in sizes]
    TABLES.clear()
    theirs = compiled.compile_model(qlora(), backend)
    for size, found in zip(sizes, expected, strict=True):
        assert all(map(torch.equal, found, read(theirs, *size)))
    # a block of one size, of any size, of rows that need no mask; a loss of one size, and of any
    assert len(graphs) <= 5 and any("cross_entropy" in graph.code for graph in graphs)


def test_decoding_is_not_compiled():
    def fail(*_):
        raise AssertionError

    model, prompts = tiny.decoder(), tiny.ragged()
    expected = sampling.generate(model, prompts, 5, 0)
    model.block = fail
    assert sampling.generate(model, prompts, 5, 0) == expected


def compiles_to(shapes: list):
    """A backend that runs graphs as they are; of those before a backward pass `shapes` lists what
    is kept for it."""

    def forward(graph, _):
        output = next(n for n in graph.graph.nodes if n.op == "output").args[0]
        shapes.extend(tuple(node.meta["val"].shape) for node in output)
        return make_boxed_func(graph)

    return torch._dynamo.backends.common.aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )


@pytest.mark.parametrize("size", [(33, 21), (32, 64)])
def test_of_4_bits_only_the_codes_are_kept(size):
    """The compiler, too, computes the weight again; the last, shorter block has its scale too."""
    torch.manual_seed(0)
    linear = nn.Linear(*size[::-1]).bfloat16().requires_grad_(False)
    ours, shapes = Linear4bit(linear), []
    tables(CPU)
    x = torch.randn(5, size[1], requires_grad=True)
    expected = ours(x)
    gradient = torch.autograd.grad(expected.square().sum(), x)
    y = torch.compile(ours.forward, backend=compiles_to(shapes))(x)
    assert shapes and size not in shapes and size[::-1] not in shapes
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], gradient[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_4_bit_weight_is_one_kernel():
    from torch._inductor import metrics

    ours = Linear4bit(nn.Linear(96, 72).bfloat16())
    tables(CPU)
    metrics.reset()
    whole = torch.compile(ours.dequantize, backend=compiled.inductor)(torch.bfloat16)
    assert not compiled.said and metrics.generated_kernel_count == 1
    assert torch.equal(whole, ours.dequantize(torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_on_a_gpu_is_eager_there():
    ours, theirs = qlora().cuda(), compiled.compile_model(qlora().cuda())
    for lengths, width in [((5, 9, 3), 12), ((12, 4, 15, 3), 17), ((6, 6), 6)]:
        for a, b in zip(*(read(m, lengths, width) for m in (ours, theirs)), strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm()
    assert not compiled.said


def test_without_a_compiler_a_run_goes_on(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr("torch._inductor.compile", fail)
    model = compiled.compile_model(tiny.lm())
    rows = pack([(ids, ids) for ids in tiny.ragged()], 16)
    assert torch.equal(nll(model, *rows), nll(tiny.lm(), *rows))
    said = "--compile: goes on without a compiler: RuntimeError: no compiler\n"
    assert capsys.readouterr().err == said


def test_what_is_made_from_a_compiled_model_is_compiled(tmp_path):
    """All of PPO's networks, for they are compared; a model that is only read is not."""
    folder = tiny.folder(tmp_path / "lm")
    policy, _ = tuning.start(options(folder, compile="on"), CPU)
    critic = scalar_model(policy)
    assert policy.block is critic.block is share(policy).block is not Block.__call__
    assert policy.losses is critic.losses is not losses
    tuning.hub.save(tmp_path / "reward", critic, tiny.chat_tokenizer())
    o = options(folder, reward=str(tmp_path / "reward"))
    reward = tuning.reward_model(o, o.reward, policy, tiny.chat_tokenizer())
    assert reward.block is policy.block
    assert policy.state_dict().keys() == tiny.lm().state_dict().keys()
    assert tuning.start(options(folder), CPU)[0].block is Block.__call__
    assert copy.deepcopy(policy).losses is policy.losses


def options(model, **changes):
    o = dict(model=model, lora=0, quant="none", paged=False, checkpointing=False, keep_base=False)
    return Namespace(**o | dict(compile="auto") | changes)


@pytest.mark.parametrize(
    "choice, device, layers, expected",
    [
        ("auto", CPU, 1000, False),
        ("auto", GPU, 2, False),
        ("auto", GPU, 1000, True),
        ("auto", GPU, 700, False),
        ("on", CPU, 2, True),
        ("off", GPU, 1000, False),
    ],
)
def test_a_run_is_known_by_what_compile_comes_to(choice, device, layers, expected, tmp_path):
    c = tiny.lm().config
    c.hidden_size, c.intermediate_size, c.num_hidden_layers = 128, 256, layers
    assert (compiled.memory.parameters(c) > 1e8) == (layers == 1000)
    tuning.hub.write_json(tmp_path / "config.json", tuning.hub.config_json(c, torch.float32))
    o = tuning.Tuning(compile=choice)
    o.model = str(tmp_path)
    assert o.settled(device) == dict(compile="on" if expected else "off")
    assert compiled.wanted(choice, device, c) == expected


def test_a_run_goes_on_with_auto_spelt_out(tmp_path):
    """On a CPU auto is off, and only what it comes to is compared."""
    folder = tiny.folder(tmp_path / "lm")

    def begin(**changes):
        o = sft.Options(model=folder, device="cpu", out=str(tmp_path / "out"), **changes)
        return Run(o, sft.__file__, tuning.inputs(o))

    run = begin()
    for _ in run.steps(2):
        run.resume(model=tiny.lm())
        run.save(1)
    run.lock.close()
    again = begin(compile="off")
    assert again.start == 2
    again.lock.close()
    with pytest.raises(ValueError, match="compile was 'off', is 'on'"):
        begin(compile="on")
