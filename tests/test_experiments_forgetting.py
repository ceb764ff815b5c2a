"""The experiments on forgetting: the new task, the best of each kind, what predicts a loss."""

import json
from pathlib import Path

import pytest

from experiments import commands, forgetting, lab, layers, order


def measures(old, new, watched=0.5, nats=1.0, n=10):
    """What commands.measure finds, with these shares right."""
    share = {"old": old, "new": new, "watched": watched}
    found = {key: [float(i < x * n) for i in range(n)] for key, x in share.items()}
    return found | {"text": [(nats * 5, 5)] * n}


def test_no_command_is_asked_that_was_learnt(tmp_path, monkeypatch):
    said = {}
    monkeypatch.setattr(commands, "run", lambda script, out, **options: said.update(options))
    o = forgetting.Options(device="cpu")
    commands.learn(o, tmp_path / "sft", tmp_path / "new", 3, lr=0.1, steps=7)
    learnt = [json.loads(line) for line in said["data"].read_text().splitlines()]
    asked = commands.commands(3, commands.LEARNT + commands.ASKED)[commands.LEARNT :]
    told = {r["messages"][0]["content"] for r in learnt}
    assert len(told) == commands.LEARNT and len(asked) == commands.ASKED
    assert not told & {r["messages"][0]["content"] for r in asked}
    assert said["steps"] == 7 and said["lr"] == 0.1 and said["batch"] == commands.BATCH
    word, place, count = asked[0]["messages"][0]["content"].split()
    assert json.loads(asked[0]["messages"][1]["content"]) == {word: [place, int(count)]}


@pytest.fixture
def found():
    """Each way keeps and learns nothing, but for a few."""
    ways = {way: (measures(0.1, 0.2), {}) for way in forgetting.WAYS}
    ways |= {
        "before": (measures(0.9, 0.0), {}),
        "plain": (measures(0.3, 1.0), {}),
        "replay 5 %": (measures(0.6, 1.0), {}),
        "replay 10 %": (measures(0.7, 1.0), {}),
        "replay 25 %": (measures(0.8, 0.9), {}),  # learns too little
        "LoRA 16": (measures(0.2, 0.5), {}),
    }
    return ways


def test_the_best_keeps_most_among_those_that_learn_enough(found):
    best = forgetting.best_of_each(found)
    assert best["replay"] == "replay 10 %" and best["nothing else"] == "plain"
    assert best["LoRA"] == "LoRA 16"  # none learns enough: the one that learns most
    lost = forgetting.figures([found, found], "replay 10 %")["old_lost"]
    assert lost["mean"] == pytest.approx(0.2) and lost["ci"] > 0 and len(lost["seeds"]) == 2
    ewc = forgetting.beside([found], best)["replay"]
    assert ewc["mean"] == pytest.approx(0.1 - 0.7)


def test_a_fall_that_follows_the_old_task_s_predicts_it(found):
    for i, way in enumerate(forgetting.WAYS):
        found[way] = measures(0.9 - i / 50, i / 50, 0.1 + i / 50, 1 + i / 50, 100), {}
    shown = forgetting.predictions(found)
    assert shown["text"]["mean"] == pytest.approx(1) and shown["new"]["mean"] == pytest.approx(1)
    assert shown["watched"]["mean"] == pytest.approx(-1)


@pytest.mark.parametrize("module", [forgetting, order, layers])
def test_from_measures_to_the_table(module, found, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    name = module.__name__.rpartition(".")[2]
    names = ("forgetting", "rates", "predicts") if module is forgetting else (name,)
    page = tmp_path / "RESULTS.md"
    page.write_text("".join(f"<!-- {n} -->\n<!-- /{n} -->\n" for n in names))
    trained = []

    def instead(script, out, of=None, **options):
        trained.append((script, Path(out).name, options))
        return {"core_minutes": 1.5, "minutes": 2.0, "gb": 0.4, "trained": 7, "share": 1.0}

    for at in (commands, module):
        monkeypatch.setattr(at, "run", instead, raising=False)
    monkeypatch.setattr(forgetting, "call", lambda script, **options: "")
    monkeypatch.setattr(lab, "chain", lambda o, seed: tmp_path / f"seed{seed}")
    options = {"model": "base", "data": tmp_path / "general.jsonl", "steps": 440, "batch": 32}
    monkeypatch.setattr(order, "options_of", lambda folder: options)
    options["data"].write_text(
        json.dumps({"messages": commands.commands(0, 1)[0]["messages"]}) + "\n"
    )
    monkeypatch.setattr(commands, "measure", lambda o, folder, seed, keep: measures(0.7, 0.8))
    o = module.Options if module is forgetting else lab.Options
    paths = {"out": tmp_path / "out", "results": page, "pictures": tmp_path / "pictures"}
    o = o(seeds=2, n=10, **{name: str(path) for name, path in paths.items()})
    getattr(module, name)(o)
    text = page.read_text()
    assert all(f"<!-- /{n} -->" in text for n in names) and "80.0" in text
    assert (tmp_path / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    if module is order:
        mixed = next(options for _, out, options in trained if out == "mixed")
        assert mixed["steps"] == 440 + commands.STEPS * commands.BATCH // 32
