"""The watched benchmark: evals' own figures, training untouched, alarms at planted falls, an end at
the last weights above one, and a run that is resumed as if it had never stopped.
"""

import json
import random
import sys

import pytest
import torch
from safetensors.torch import load_file
from stages import refused, run, script
from tiny import metrics, write

import dpo
import metrics as measured
import ppo
import sft
from common import hub, watch
from common.run import Run, main
from common.watch import Watch
from data import benchmarks
from data.world import watch as world_watch
from data.world import world
from paged import PagedAdamW
from tools import evals

STAGES = {"sft": sft, "dpo": dpo, "ppo": ppo}
FEW = dict(
    sft=dict(steps=5, batch=4, warmup=1, length=160, lr=0.02),
    dpo=dict(steps=5, batch=2, warmup=1, length=160, lr=0.02),
    ppo=dict(iterations=5, batch=4, minibatch=4, epochs=1, max_new_tokens=6, warmup=1, lr=0.02),
)
WORDS = "Lima Paris cat dog seven three red blue mother hat".split()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def go(small, tmp_path):
    """go(stage, name, **options) → its folder; run in this process."""

    def go(stage, name, **changes):
        options = STAGES[stage].Options
        given = {k: small[stage][k] for k in ("model", "data", "reward") if k in small[stage]}
        given |= FEW[stage] | dict(device="cpu", out=str(tmp_path / name)) | changes
        vars(STAGES[stage])[stage](options(**given))
        return tmp_path / name

    return go


@pytest.fixture(scope="module")
def watched(small, tmp_path_factory):
    """Files of choices, all of which DPO's and PPO's start gets right, and of texts."""
    at, draw = tmp_path_factory.mktemp("watched"), random.Random(1)
    model, tok = hub.load(small["dpo"]["model"])
    items = [{"query": f"{i} is", "choices": draw.sample(WORDS, 3), "gold": 0} for i in range(30)]
    found = measured.multiple_choice(model.eval(), tok, items)
    items = [x | {"gold": y["choice"]} for x, y in zip(items, found, strict=True)]
    texts = [
        {"text": f"{i} {' '.join(draw.sample(WORDS, 4))}. " * (1 + 20 * (i == 3))} for i in range(9)
    ]
    return {
        "choices": write(at / "choices.jsonl", items),
        "text": write(at / "text.jsonl", texts),
    }


def weights(out):
    return {k: v.tolist() for k, v in load_file(out / "model.safetensors").items()}


def seen(out):
    """The lines of the log that hold a scoring."""
    return [line for line in metrics(out) if "watch_fall" in line]


# ---------------------------------------------------------------- nobody notices
@pytest.mark.parametrize(
    ("stage", "kind"), [("sft", "choices"), ("sft", "text"), ("dpo", "text"), ("ppo", "choices")]
)
def test_watching_changes_nothing(stage, kind, go, watched):
    """Weights and the stage's own figures are those of an unwatched run, bit for bit."""
    alone = go(stage, "alone")
    looked = go(stage, "looked", watch=watched[kind], watch_every=2)
    assert weights(looked) == weights(alone)
    lines = [
        {k: v for k, v in x.items() if "watch_" not in k and k != "tokens_per_second"}
        for x in metrics(looked)
    ]
    mine = [{k: v for k, v in x.items() if k != "tokens_per_second"} for x in metrics(alone)]
    assert lines == [*mine, {"step": 5}]
    assert [x["step"] for x in seen(looked)] == [0, 2, 4, 5]
    assert (seen(looked)[0]["watch_fall"], seen(looked)[0]["watch_fall_ci"]) == (0, 0)
    assert seen(looked)[-1]["watch_fall"] != 0


def test_a_process_s_first_scoring_finds_room(go, watched, monkeypatch):
    """A resumed run's comes when pages have filled the memory that its own passes left."""
    told, make_room = [], PagedAdamW.make_room

    def note(optimizer, **sizes):
        before = len(optimizer.passes)
        make_room(optimizer, **sizes)
        told.append((sizes, len(optimizer.passes) > before))

    monkeypatch.setattr(PagedAdamW, "make_room", note)
    go("sft", "out", watch=watched["choices"], watch_every=2, paged=True)
    looks = [(sizes, left) for sizes, left in told if "watched" in sizes]
    assert looks == [({"watched": 30}, left) for left in (True, False, False, False)]


def test_dropout_is_off_in_a_scoring_and_on_behind_it(go, watched, small):
    """A scoring that drew random numbers would train another adapter."""
    first = go("sft", "first", lora=4)
    config = first / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": 0.5}))
    more = dict(model=str(first), keep_base=True)
    alone, looked = (
        go("sft", "alone", **more),
        go("sft", "looked", watch=watched["text"], watch_every=1, **more),
    )
    assert weights(looked) == weights(alone)
    plain = json.loads(config.read_text()) | {"lora_dropout": 0.0}
    config.write_text(json.dumps(plain))
    still = go("sft", "still", watch=watched["text"], watch_every=1, **more)
    assert weights(still) != weights(looked)
    names = [k for k in seen(still)[0] if k.startswith("watch_")]
    assert all(seen(still)[0][k] == seen(looked)[0][k] for k in names)


# ---------------------------------------------------------------- the figures
@pytest.mark.parametrize("kind", ("choices", "text"))
def test_figures_are_evals_own(kind, go, watched, tmp_path):
    """At the start on --model, at the end on OUT."""
    out = go("sft", "sft", watch=watched[kind])
    record = json.loads((out / "run.json").read_text())
    assert watched[kind] in record["inputs"]
    start = record["options"]["model"]
    for folder, line in ((start, seen(out)[0]), (str(out), seen(out)[-1])):
        o = evals.Options(out=str(tmp_path), task=watched[kind], model=folder, device="cpu")
        theirs = evals.evaluate(o)["model"]
        names = ("acc", "acc_norm") if kind == "choices" else ("perplexity_per_token",)
        for name in names:
            assert line[f"watch_{name}"] == float(f"{theirs[name]:.7g}")
    first, last = seen(out)
    if kind == "text":  # a fall of the likelihood per token
        a, b = (1 / x["watch_perplexity_per_token"] for x in (first, last))
    else:
        a, b = first["watch_acc"], last["watch_acc"]
    assert last["watch_fall"] == pytest.approx((a - b) / a, abs=1e-6)


def test_windows_read_together_are_windows_read_apart(small):
    model, tok = hub.load(small["dpo"]["model"])
    items = [{"text": "a b c " * n} for n in (1, 3, 200, 2, 60)]
    together, apart = watch.text(model, tok, items), [watch.text(model, tok, [x])[0] for x in items]
    for a, b in zip(together, apart, strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-5)
        assert (a["tokens"], a["bytes"]) == (b["tokens"], b["bytes"])


# ---------------------------------------------------------------- alarms
@pytest.fixture
def planted(go, watched, monkeypatch, capfd):
    """planted(scores at step 0, 1, …) of 200 items → folder, and the lines that were said."""

    def planted(*scores, name="out", **changes):
        left = list(scores)
        monkeypatch.setattr(
            Watch, "score", lambda _: ({"acc": measured.mean(left[0])}, left.pop(0))
        )
        out = go(
            "sft",
            name,
            watch=watched["choices"],
            watch_every=1,
            schedule="constant",
            warmup=0,
            **changes,
        )
        words = ("warning: step", "ALARM", "perhaps", "stopped")
        return out, [x for x in capfd.readouterr().out.splitlines() if x.startswith(words)]

    return planted


def right(*places, n=200):
    """Scores of n items that are wrong at these places."""
    return [float(i not in places) for i in range(n)]


def test_alarms_at_planted_falls(planted):
    """160 of 200 are right at the start; 5 % of that are 8 items, 10 % are 16."""
    start = right(*range(160, 200))
    scores = [right(*range(n), *range(160, 200)) for n in (7, 8, 15, 16)]
    out, said = planted(start, *scores, start)
    assert [x.split(": ")[:2] for x in said] == [
        ["warning", "step 2"],
        ["warning", "step 3"],
        ["ALARM", "step 4"],
    ]
    falls = [x["watch_fall"] for x in seen(out)]
    assert falls == pytest.approx([0, 7 / 160, 8 / 160, 15 / 160, 16 / 160, 0])
    assert "choices.jsonl: acc 0.72, fallen by 10.0 % ± 4" in said[-1]
    assert "watch" not in json.loads((out / "run.json").read_text())


def test_no_alarm_where_it_may_be_chance(planted):
    """36 items lost, 20 won: 10 % fewer, but the interval of 16 ± 15 or so holds 0."""
    start = right(*range(160, 200))
    some = right(*range(48), *range(192, 200))
    assert sum(start) - sum(some) == 16
    out, said = planted(start, some, start, start, start, start, watch_stop=True)
    assert len(said) == 1 and said[0].startswith("perhaps: step 1")
    n = int(said[0].split("about ")[1].split(" items")[0])
    assert 200 < n < 300 and "not 200" in said[0]
    line = seen(out)[1]
    assert line["watch_fall"] == pytest.approx(0.1) and line["watch_fall_ci"] > 0.1
    assert metrics(out)[-1]["step"] == 5, "it went on"


@pytest.mark.parametrize("way", ({}, dict(lora=2), dict(lora=2, quant="nf4")))
def test_an_alarm_ends_the_run_with_the_last_weights_above_it(way, planted, go):
    start = right(*range(160, 200))
    small, large = (right(*range(n), *range(160, 200)) for n in (10, 30))
    out, said = planted(start, start, small, large, watch_stop=True, **way)
    assert said[-1] == "stopped at step 3, with the weights of step 2"
    assert json.loads((out / "run.json").read_text())["watch"] == {
        "alarm_at_step": 3,
        "weights_of_step": 2,
    }
    assert [x["step"] for x in metrics(out)] == [0, 1, 2, 3] and "loss" not in metrics(out)[-1]
    two = go("sft", "two", steps=2, schedule="constant", warmup=0, **way)
    assert weights(two) == weights(out) and not (out / "state").exists()


def test_weights_of_a_doubtful_scoring_are_not_kept(planted, go):
    start = right(*range(160, 200))
    doubtful, large = right(*range(48), *range(192, 200)), right(*range(100))
    out, _ = planted(start, doubtful, large, watch_stop=True)
    assert json.loads((out / "run.json").read_text())["watch"]["weights_of_step"] == 0


# ---------------------------------------------------------------- resumed
@pytest.mark.parametrize(("stage", "stop"), [("sft", False), ("sft", True), ("ppo", True)])
def test_resumed_is_uninterrupted(stage, stop, go, watched, small, monkeypatch):
    """True scores, which fall; killed behind a scoring, before one, and at the end."""
    options = dict(watch=watched["choices"], watch_every=2, watch_stop=stop, save_every=1)
    options["model"] = small["dpo"]["model"]
    whole = go(stage, "whole", **options)
    falls = [x["watch_fall"] for x in seen(whole)]
    assert falls[-1] > 0.1 and ("watch" in json.loads((whole / "run.json").read_text())) == stop
    for at in (0, 1, None):

        def killed(run, step, *args, real=Run.save, at=at, **figures):
            real(run, step, *args, **figures)
            if step == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(Run, "save", killed)
            if at is None:
                m.setattr(Run, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            try:
                go(stage, "broken", **options)
            except KeyboardInterrupt:
                pass
    broken = go(stage, "broken", **options)
    names = {p.name for p in whole.iterdir()} - {"metrics.jsonl"}
    assert {p.name for p in broken.iterdir()} - {"metrics.jsonl"} == names
    assert all((broken / n).read_bytes() == (whole / n).read_bytes() for n in names)
    for a, b in zip(metrics(broken), metrics(whole), strict=True):
        assert {k: v for k, v in a.items() if k != "tokens_per_second"} == {
            k: v for k, v in b.items() if k != "tokens_per_second"
        }


# ---------------------------------------------------------------- refused
def test_bad_input(small, watched, tmp_path):
    def go(**changes):
        return run(script("sft"), out=tmp_path / "out", **small["sft"] | changes)

    shape = write(tmp_path / "shape.jsonl", [{"question": "Which?", "answer": 1}] * 3)
    refused(go(watch=shape), "shape.jsonl:1: task: fields of a task were expected: query choices")
    chats = write(tmp_path / "chats.jsonl", [{"prompt": "a", "reference": "b"}] * 3)
    refused(go(watch=chats), "chats.jsonl: references: choices or text was expected")
    refused(go(watch=tmp_path / "choice.jsonl"), "choice.jsonl: no such file")
    one = write(tmp_path / "one.jsonl", [{"text": "a"}])
    refused(go(watch=one), "one.jsonl: two or more items were expected (got 1)")
    wrong = [json.loads(x) for x in open(watched["choices"])]
    long = write(tmp_path / "long.jsonl", [x | {"query": "so " * 999} for x in wrong])
    refused(go(watch=long), "long.jsonl: fewer than two items fit into the model's context")
    refused(go(watch=watched["text"], watch_every=0), "--watch-every is 0, it must be at least 1")
    refused(go(watch_every=2.5), "--watch-every: invalid int value")
    refused(go(schedule="step"), "--schedule: invalid choice: 'step'")
    assert not list(tmp_path.glob("out/*.json*"))


def test_stopping_without_watching_is_said(small, tmp_path, monkeypatch, capsys):
    argv = [f"--{k}={v}" for k, v in small["sft"].items()]
    argv += [f"--out={tmp_path}/out", "--watch-stop", "--show-batch"]
    monkeypatch.setattr(sys, "argv", ["sft.py", *argv])
    main(sft.sft, sft.Options, sft.__doc__)
    assert "--watch-stop has no effect without --watch" in capsys.readouterr().err


# ---------------------------------------------------------------- learning rates
@pytest.mark.parametrize("stage", STAGES)
def test_the_schedule_is_the_stage_s(stage, go):
    found = {s: go(stage, s, schedule=s) for s in ("linear", "cosine", "constant")}
    if stage != "ppo":
        rates = {s: [x["lr"] for x in metrics(out)] for s, out in found.items()}
        assert rates["constant"] == [0.02] * 5
        assert rates["linear"] == pytest.approx([0.02, 0.02, 0.015, 0.01, 0.005])
        assert rates["cosine"] == pytest.approx([0.02, 0.02, 0.01707107, 0.01, 0.002928932])
    made = [weights(out) for out in found.values()]
    assert made[0] != made[1] != made[2] != made[0]


# ---------------------------------------------------------------- the world's own
def test_the_world_s_benchmark_asks_what_no_other_record_asks():
    """For any seed no training item has one of its keys; nor has a held-out item of this one."""
    held = [world.asked(x) for x in world.items(1100, 3, "heldout")]
    records = world_watch.records(held)
    assert records == world_watch.records(held) and 150 < len(records) < 300
    keys = [r["key"] for r in records]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & {k for r in held for k in r["item"]["keys"]}
    rest = [k for k in keys if not world.held_out(k)]
    asked = {k for x in world.items(6000, 3) for k in x["keys"]}
    assert rest and not asked & set(rest)
    assert {k.split()[0] for k in rest} == {"next:", "before:", "-:"}
    assert all(x - y in (0, y) for x, y in (map(int, k.split()[1:]) for k in rest if k[0] == "-"))
    assert {r["gold"] for r in records} == {0, 1, 2, 3}
    assert all(len(set(r["choices"])) == len(r["choices"]) for r in records)


def test_the_base_knows_the_world_s_benchmark(tmp_path):
    held = [world.asked(x) for x in world.items(1100, 0, "heldout")]
    file = write(tmp_path / "watch.jsonl", world_watch.records(held))
    model, tok = hub.load("data/base")
    _, items = benchmarks.items(file)
    lines = watch.choices(model.eval(), tok, items)
    assert len(items) == 200 and measured.mean([x["acc"] for x in lines]) > 0.7
    assert measured.mean([1 / len(x["choices"]) for x in items]) < 0.35
