"""Measuring: two processes that take turns, and the tables of what is trained, on a tiny world. No
time is asserted.
"""

import contextlib
import dataclasses
import json
import math
import sys
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import stages
import torch
from tiny import chat_tokenizer, folder, lm, user, write

import quant
from common import memory
from common.run import parse
from metrics import bootstrap, ratio
from tools import bench, lighter, mfu, runs

ROOT = Path(__file__).parent.parent
SIDE = """
import sys, time
from tools import bench
first, name = float(sys.argv[1]), sys.argv[2]

def turn(r):
    if name == "breaks" and r == 1:
        raise SystemExit("out of luck")
    open(sys.argv[3], "a").write(f"{name} {r}\\n")
    return 10 + r, 100

def setup():
    print("a library says hello")
    return turn, first

bench.work(setup, lambda: 1e12)
"""


def sides(tmp_path, monkeypatch, first=(1.5, 1.5), names=("a", "b")):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "side.py").write_text(SIDE)
    return {
        n: [sys.executable, str(tmp_path / "side.py"), str(f), n, str(tmp_path / "log")]
        for f, n in zip(first, names, strict=True)
    }


# ---------------------------------------------------------------- bench
def test_the_sides_take_turns_and_the_first_round_is_left_out(tmp_path, monkeypatch, capsys):
    found = bench.alternate(sides(tmp_path, monkeypatch), 3)
    assert (tmp_path / "log").read_text().split("\n")[:-1] == [
        "a 0",
        "b 0",
        "b 1",
        "a 1",
        "a 2",
        "b 2",
        "b 3",
        "a 3",
    ]
    assert {side: [a["units"] for a in answers] for side, answers in found.items()} == {
        "a": [11, 12, 13],
        "b": [11, 12, 13],
    }
    assert all(
        a["seconds"] > 0 and a["peak"] > 2**20 and (a["needed"], a["limit"]) == (100, 1e12)
        for answers in found.values()
        for a in answers
    )
    assert capsys.readouterr().out == "first, a 1.5, b 1.5\n"  # and not what a library said


def test_sides_that_compute_something_else_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="do not compute the same"):
        bench.alternate(sides(tmp_path, monkeypatch, (1.5, 1.51)), 1)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    "first, rounding, same",
    [(1.502, 1e-3, False), (1.501, 1e-3, True), (1.502, 2e-2, True), (math.nan, 1e-3, False)],
)
def test_bf16_rounds_more(first, rounding, same):
    one, two = dict(first=1.5, rounding=1e-3), dict(first=first, rounding=rounding)
    for said in (dict(a=one, b=two), dict(a=two, b=one)):
        with contextlib.nullcontext() if same else pytest.raises(ValueError, match="the same"):
            bench.compare(said)


def test_a_side_that_breaks_is_an_error_and_leaves_no_process(tmp_path, monkeypatch, capfd):
    with pytest.raises(ValueError, match=r"exit status 1.*breaks"):
        bench.alternate(sides(tmp_path, monkeypatch, names=("a", "breaks")), 1)
    assert "out of luck" in capfd.readouterr().err


def test_the_ratio_is_of_each_round():
    def rounds(*seconds, limit=0):
        return [dict(units=8, seconds=s, peak=2**30, needed=1e12, limit=limit) for s in seconds]

    ours, theirs = rounds(1, 2, 4, limit=2e12), rounds(2, 4, 4, limit=1e12)
    text = bench.report({"tinytune": ours, "peers": theirs}, "tokens", "FLOP")
    lines = [
        "tinytune     4.0 tokens/s, 25.0% of 2 TFLOP/s, peak memory 1.00 GB",
        "peers        2.0 tokens/s, 12.5% of 2 TFLOP/s, peak memory 1.00 GB",  # the same limit
        "ratio        2.00 of their speed, 0.50 of their time (median of 3 rounds; speed 1.00 to"
        " 2.00)",
    ]
    assert text.splitlines() == lines
    alone = bench.report({"tinytune": rounds(1)}, "tokens")
    assert alone == "tinytune     8.0 tokens/s, peak memory 1.00 GB"


def options(**changes):
    return bench.Options(**dict(device="cpu", length=64, tokens=6, side="ours") | changes)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    at = tmp_path_factory.mktemp("talks")
    rows = [
        {
            "messages": [
                *user("what is one" + " and two" * i),
                {"role": "assistant", "content": "three " * (1 + i)},
            ]
        }
        for i in range(6)
    ]
    asked = [{"messages": user("what is two")}]
    said = [r["messages"][1]["content"] for r in rows]
    pairs = [{"prompt": "what is one", "chosen": c, "rejected": said[0]} for c in said[1:]]
    files = {"chats": rows, "asked": asked, "pairs": pairs}
    model = folder(at / "m")
    return {n: dict(model=model, data=write(at / f"{n}.jsonl", r)) for n, r in files.items()}


def sides_of(task, **given):
    return bench.TASKS[task][0](options(**given), True)


@pytest.mark.parametrize("task", ("sft", "lora", "dpo", "qlora", "sampling", "dequantise"))
def test_our_side_of_each_task(task, talks):
    given = talks[{"sampling": "asked", "dpo": "pairs"}.get(task, "chats")]
    case = "512 1024 float32" if task == "dequantise" else ""
    turn, first = sides_of(task, batch=4, case=case, **given)
    units, needed = turn(0)
    assert units > 0 and needed > 0
    if task == "dequantise":  # of a number half a byte is read, and 4 written, but for the scales
        assert needed / units == pytest.approx(2**19 * 4.516, rel=1e-3)
    if task == "dpo":  # the reference's other answers are likelier by a nat
        assert first == pytest.approx(math.log1p(math.exp(-0.1)), abs=1e-5)
    if task in ("lora", "qlora"):
        (_, again), (_, more) = (sides_of(task, batch=b, **given) for b in (4, 6))
        assert first == again != more and 0 < first < 50
    if task != "dequantise":  # and of a random model, which needs no file
        turn, first = sides_of(task, batch=4, size="tiny", model="none", rank=4, checkpointing=True)
        tokens = dict(dpo=4 * 2 * 64, sampling=4 * 6).get(task, 4 * 64)
        assert turn(0)[0] == tokens and (first is None or 0 < first < 10)


def test_what_a_round_needs(talks):
    """In numbers of the tiny shape: two layers, whose matrices hold n, and a head."""
    n, head, squares = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96), 500 * 64, 6 * 2 * 64
    given, both = dict(batch=2, size="tiny"), 2 * 64 * 64
    assert sides_of("sft", **given)[0](0)[1] == 6 * (128 * n + 126 * head) + squares * both
    assert sides_of("lora", **given)[0](0)[1] == 4 * (128 * n + 126 * head) + squares * both
    # a prompt of 32 tokens is read once for its two answers of 32
    pairs = 6 * (2 * 96 * n + 2 * 64 * head) + squares * 2 * (2 * 64**2 - 32**2)
    assert sides_of("dpo", **given)[0](0)[1] == pairs
    columns = 2 * sum(range(65, 71)) * 2 * 2 * 32  # a token's: keys and values of two layers
    assert sides_of("sampling", **given)[0](0)[1] == 4 * (6 * (n + head) + columns)


def test_what_ours_is_told(talks, monkeypatch):
    kept = []
    monkeypatch.setattr(bench.compiled, "compile_model", lambda model, **_: kept.append(model))
    for task in ("sft", "lora", "dpo"):
        for o in (dict(compile="on", checkpointing=True), {}):  # on a CPU auto is off
            sides_of(task, size="tiny", batch=1, **o)
    assert len(kept) == 3 and all(model.checkpointing for model in kept)


def test_prompts_come_over_and_over(talks):
    found, end = bench.prompts(options(batch=3, **talks["asked"]))
    assert len(found) == 3 and found[0] == found[2] and isinstance(end, int)


def test_a_task_without_its_peers_runs_alone(monkeypatch, capsys):
    """As does one whose memory is limited. What is given goes on to both sides."""
    monkeypatch.setattr(bench, "alternate", lambda sides, rounds: kept.append(sides) or {})
    monkeypatch.setattr(bench, "report", lambda *_: "")
    there = dict(peft=1, bitsandbytes=1)
    monkeypatch.setattr(bench.importlib.util, "find_spec", there.get)
    kept = []
    bench.beside("qlora", options(checkpointing=True))
    bench.beside("qlora", options(limit=48.0))
    del there["bitsandbytes"]
    bench.beside("qlora", options())
    assert [list(k) for k in kept] == [["tinytune", "peers"], ["tinytune"], ["tinytune"]]
    said = capsys.readouterr().out
    assert said.count("alone: this Python lacks bitsandbytes;") == 1
    words = kept[0]["peers"]
    assert parse(bench.Options, "", words[4:]) == options(checkpointing=True, side="theirs")


def test_a_training_step_moves_every_tensor_of_the_adapter(talks, monkeypatch):
    kept, real = [], bench.step
    monkeypatch.setattr(
        bench, "step", lambda o, model, *rest: (kept.append(model), real(o, model, *rest))[1]
    )
    turn, _ = sides_of("qlora", batch=4, **talks["chats"])
    trained = [p for p in kept[0].parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    turn(0)
    assert len(trained) == 2 * 7 * 2 and all(
        p.any() and not torch.equal(p, b) for p, b in zip(trained, before, strict=True)
    )


def test_a_replaced_layer_is_freed_before_the_next():
    """In a model that is built on the device, and in one that is quantised in place."""
    with torch.device("meta"):
        model = bench.Transformer(bench.SIZES["tiny"])
    names, whole, most = bench.block_linears(model), [], []

    def four_bit(linear):
        whole.append(weakref.ref(linear.weight))
        most.append(sum(ref() is not None for ref in whole))
        return bench.Linear4bit(linear)

    mfu.build(model, torch.device("cpu"), torch.float32, names, four_bit)
    assert len(most) == 14 and max(most) <= 2  # its own, and the one before as a loop's variable
    plain = lm()
    gone = [weakref.ref(plain.get_submodule(n).weight) for n in quant.block_linears(plain)]
    real, alive = quant.quantize_nf4, []

    def quantize(*a):
        alive.append(sum(ref() is not None for ref in gone))
        return real(*a)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant, "quantize_nf4", quantize)
        quant.quantize_model(plain)
    assert alive == [*range(14, 0, -1)]


def test_a_random_tensor_is_known_by_its_name():
    """In transformers' model, whose blocks stand below `model`, too."""
    size = dataclasses.replace(bench.SIZES["tiny"], tie_word_embeddings=True)
    with torch.device("meta"):
        ours, theirs = bench.Transformer(size), torch.nn.Module()
        theirs.lm_head, theirs.model, theirs.config = (
            torch.nn.Linear(64, 500),
            torch.nn.Module(),
            size,
        )
        theirs.model.layers = bench.Transformer(size).layers
        theirs.model.embed_tokens = torch.nn.Embedding(500, 64)
    for model in (ours, theirs):
        mfu.build(model, torch.device("cpu"), torch.float32)
        assert model.lm_head.weight is getattr(model, "model", model).embed_tokens.weight
    assert torch.equal(ours.embed_tokens.weight, theirs.model.embed_tokens.weight)
    a, b = ours.layers[0].mlp.up_proj.weight, theirs.model.layers[0].mlp.up_proj.weight
    assert torch.equal(a, b) and not torch.equal(a, ours.layers[1].mlp.up_proj.weight)
    assert 0.018 < a.std() < 0.022 and ours.norm.weight.mean() > 0.9


def test_memory_is_counted(tmp_path, capsys):
    bench.memory(
        Namespace(
            model=folder(
                tmp_path / "m",
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=3,
                head_dim=32,
            )
        )
    )
    bf16, one, wide, _ = capsys.readouterr().out.splitlines()
    n = 3 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)
    linears = [64 * 64] * 2 + [64 * 32] * 2 + [64 * 128] * 3
    packed = 3 * sum(sum(memory.nf4_bytes(size).values()) for size in linears)
    assert (
        f"bfloat16 {2 * n:,} bytes, NF4 {packed:,}: ratio {2 * n / packed:.2f}" in bf16
        and f"float32 {4 * n:,} bytes" in wide
    )
    rest, heads = 280 * 64 + 64 * 7, 280 * 64  # embedding and norms; the head
    # the scalar heads are float32
    four = 2 * (2 * (n + rest + heads) + 2 * (n + rest)) + 2 * 4 * 64
    adapter = 4 * 16 * 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    shared = packed + 2 * (rest + heads) + 4 * adapter + 2 * 4 * 64
    assert (
        f"four models {four:,} bytes" in one
        and f"4-bit base {shared:,}: ratio {shared / four:.3f}" in one
    )


# ---------------------------------------------------------------- lighter
def test_every_way_on_a_tiny_world(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "call", lambda script, **words: stages.done(script, **words).out)
    # no layer of the tiny world has rank 64
    monkeypatch.setitem(lighter.WAYS, "lora64", dict(lora=32))
    page = tmp_path / "R.md"
    page.write_text(
        "above\n<!-- lighter -->\nold\n<!-- /lighter -->\n<!-- qlora -->\n<!-- /qlora -->\nbelow\n"
    )
    o = lighter.Options(
        small["sft"]["model"],
        small["sft"]["data"],
        small["dpo"]["data"],
        str(tmp_path / "l"),
        str(page),
        steps=3,
        batch=4,
        length=140,
        n=12,
        documents=3,
        seeds=2,
        lr=1e-3,
        device="cpu",
    )
    lighter.lighter(o)
    result, text = json.loads((tmp_path / "l" / "lighter.json").read_text()), page.read_text()
    assert list(result["ways"]) == ["base", "base4", *lighter.WAYS]
    for way, f in result["ways"].items():
        for k in ("held", "corpus", "manual"):
            assert (
                0 < abs(f[k]["mean"]) < 20
                and f[k]["ci"] > 0
                and len(f[k]["seeds"]) == (2 if f["cost"] else 1)
            )
        assert ("to_full" in f) == (way not in ("base", "base4", "full")) and f["held"][
            "items"
        ] == result["ways"]["base"]["held"]["items"]
    assert len({result["ways"][way]["manual"]["mean"] for way in ("base", "base4")}) == 2
    assert (
        not list((tmp_path / "l").glob("*-[01].losses*"))
        and (tmp_path / "l" / "ia3-1" / "losses-12-3-140.json").exists()
    )
    full, lora = result["ways"]["full"], result["ways"]["lora16"]
    pages = lighter.other_texts(3)["manual"]
    after, before = (
        lighter.text_losses(*lighter.tuning.load(f), pages, 140, "cpu")
        for f in (tmp_path / "l" / "full-1", o.model)
    )
    assert full["manual"]["seeds"][1] == pytest.approx(
        runs.ratio(after) - runs.ratio(before), abs=1e-5
    )
    assert lora["to_full"]["mean"] == pytest.approx(lora["held"]["mean"] - full["held"]["mean"])
    assert (
        full["held"]["mean"] < result["ways"]["base"]["held"]["mean"]
        and full["cost"][0]["share"] == 100.0
    )
    trained = {way: f["cost"][0]["trained"] for way, f in result["ways"].items() if f["cost"]}
    assert (
        trained["ia3"] < trained["prompt"] < trained["lora4"]
        and trained["lora64"] == 2 * trained["lora16"] == 8 * trained["lora4"]
    )
    assert trained["qlora16"] == trained["lora16"]
    assert set(result["qlora"]) == {"loss", "accuracy"}
    for f in result["qlora"].values():
        assert f["difference"]["mean"] == pytest.approx(f["qlora16"]["mean"] - f["lora16"]["mean"])
    assert 0 <= result["qlora"]["accuracy"]["lora16"]["mean"] <= 1
    assert (
        text.startswith("above\n")
        and text.endswith("below\n")
        and "old" not in text
        and text.count("seeds: 2, 3 steps of 4") == 2
    )
    for row in (
        "| before | – |",
        "| every weight | 100.00 |",
        "| IA3 |",
        "| QLoRA r = 16 |",
        "| held-out loss |",
        "| pairs in order % |",
    ):
        assert row in text, row
    capsys.readouterr()
    # all runs are finished: the same figures, and the costs are those of the first time
    lighter.lighter(o)
    assert json.loads((tmp_path / "l" / "lighter.json").read_text()) == result


def test_a_resumed_run_has_no_time_and_a_failed_one_is_an_error(small, tmp_path):
    out = tmp_path / "l" / "full-0"
    o = lighter.Options(
        small["sft"]["model"],
        small["sft"]["data"],
        out=str(tmp_path / "l"),
        steps=6,
        batch=4,
        length=140,
    )
    words = dict(
        model=o.model,
        data=o.data,
        steps=6,
        batch=4,
        length=140,
        warmup=1,
        seed=0,
        device="auto",
        lr=o.lr,
        save_every=1,
    )
    stages.kill_after(2, out / "state", "sft.py", out=out, **words)
    cost = lighter.tune(o, "full", 0)[1]
    assert (
        cost["minutes"] is None
        and cost["gb"] > 0
        and lighter.cost([cost], "minutes", "{:.1f}") == "–"
    )
    with pytest.raises(ValueError, match="sft.py into .* failed"):
        lighter.tune(
            lighter.Options(o.model, o.data, out=o.out, steps=7, batch=4, length=140), "full", 0
        )


def test_figures_average_over_seeds_and_are_paired_over_items():
    ours, theirs = (
        [[(2.0, 1), (8.0, 4)], [(4.0, 1), (8.0, 4)]],
        [[(1.0, 1), (4.0, 4)], [(3.0, 1), (4.0, 4)]],
    )
    f, d = lighter.figure(ours), lighter.difference(ours, theirs)
    assert f["mean"] == pytest.approx(11 / 5) and f["seeds"] == [2.0, 2.4] and f["items"] == 2
    assert f["ci"] == bootstrap([(3.0, 1), (8.0, 4)], ratio)
    # paired: every item differs by its count
    assert d["mean"] == pytest.approx(1.0) and d["ci"] == 0.0 and d["seeds"] == [1.0, 1.0]
    assert (
        lighter.cell(d, 100, 1) == "100.0 ± 0.0 (100.0 to 100.0)"
        and lighter.cell(d | {"seeds": [1.0]}) == "1.000 ± 0.000"
    )


@torch.no_grad()
def test_losses_of_plain_text_are_the_sum_over_all_tokens_but_the_first():
    model, tok = lm(), chat_tokenizer()
    texts = ["the capital of Peru is Lima.", "sure", "what is one and two? three. " * 9]
    found = lighter.text_losses(model, tok, texts, 40, "cpu", size=2)
    for text, (nll, count) in zip(texts, found, strict=True):
        ids = torch.tensor([tok.encode(text)[:40]])
        logps = model(ids)[0, :-1].log_softmax(-1)
        assert count == ids.shape[1] - 1 and nll == pytest.approx(
            -logps[torch.arange(count), ids[0, 1:]].sum().item(), rel=1e-5
        )


def test_accuracy_is_by_the_implicit_reward_and_counted_by_prompt(tmp_path):
    a, b = folder(tmp_path / "a", std=0.5), folder(tmp_path / "b", seed=1, std=0.5)
    texts = ("one", "two", "no"), ("two", "a", "sure, of"), ("one", "x", "y z")
    pairs = [dict(prompt=user(asked), chosen=w, rejected=l) for asked, w, l in texts]
    # a model against itself: ties
    assert lighter.accuracies(a, a, pairs, "cpu") == [(1.0, 2), (0.5, 1)]
    swapped = [dict(p, chosen=p["rejected"], rejected=p["chosen"]) for p in pairs]
    found = lighter.accuracies(b, a, pairs, "cpu")
    assert (
        found
        == [(n - won, n) for won, n in lighter.accuracies(b, a, swapped, "cpu")]
        == [(n - won, n) for won, n in lighter.accuracies(a, b, pairs, "cpu")]
    )


def test_other_text_is_always_the_same():
    first = lighter.other_texts(5)
    assert first == lighter.other_texts(5) and all(len(set(texts)) == 5 for texts in first.values())


def test_an_unknown_way_and_a_file_without_held_out_records_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="names lora8: full"):
        lighter.lighter(
            lighter.Options(small["sft"]["model"], small["sft"]["data"], ways="full,lora8")
        )
    one = tmp_path / "one.jsonl"
    lines = (line for line in Path(small["sft"]["data"]).read_text().splitlines())
    with pytest.raises(ValueError, match="marks <!-- lighter -->"):
        o = lighter.Options(
            small["sft"]["model"],
            small["sft"]["data"],
            out=str(tmp_path / "l"),
            results=str(tmp_path / "R.md"),
        )
        lighter.lighter(o)
    assert not (tmp_path / "l").exists()
    one.write_text(
        next(x for x in lines if not lighter.records.held_out(json.loads(x)["messages"])) + "\n"
    )
    with pytest.raises(ValueError, match="one.jsonl: none of its records is held out"):
        lighter.lighter(lighter.Options(small["sft"]["model"], str(one), out=str(tmp_path)))
