"""QLoRA, LoRA and full fine-tuning on benchmarks' questions, with tiny models and no training."""

import json

import pytest
import tiny
import torch

import sft
from common import run, tuning
from data import records, templates
from experiments import tuning as experiment


def items(name, n=100, k=3):
    """n questions, one of two in the words of the one before; the last two are too long."""
    found = [{"query": f"what is {name} and {i}?\n", "choices": [f"{i} {c}" for c in range(k)],
              "gold": i % k} for i in range(n)]  # fmt: skip
    for before, x in zip(found[::2], found[1::2], strict=True):
        x["query"] = before["query"].replace(" ", "  ").strip()
    found[-1]["choices"][1] = found[-2]["choices"][1] = "x" * 130
    return found


def test_no_question_is_trained_on_and_measured():
    o = experiment.Options(n=5, choosing=3)
    cut = experiment.parts(items("a"), o)
    assert [len(cut[part]) for part in ("choose", "measure")] == [3, 5]
    words = [" ".join(x["query"].split()) for some in cut.values() for x in some]
    assert len(set(words)) == len(words) and "what is a and 98?" not in words
    assert all(records.held_out(experiment.asked(x["query"])) for x in cut["choose"])
    rest = cut["train"] + cut["measure"]
    assert not any(records.held_out(experiment.asked(x["query"])) for x in rest)
    more = experiment.parts(items("a"), experiment.Options(n=9, choosing=3))
    assert more["train"] == cut["train"] and more["measure"][:5] == cut["measure"]
    with pytest.raises(ValueError, match="none to choose"):
        experiment.parts(items("a", 4), o)


def test_what_is_scored_is_what_is_trained():
    """The right choice's nats are the loss of its conversation, in the very same tokens."""
    model, tok, item = tiny.lm(), tiny.chat_tokenizer(), items("a")[4]
    answer = {"role": "assistant", "content": item["choices"][item["gold"]]}
    ids, labels = templates.render(tok, [*experiment.asked(item["query"]), answer])
    tokens, targets, segments = sft.pack([(ids, labels)], len(ids))
    loss = sft.sft_loss(model, tokens, targets, segments).item()
    (line,) = experiment.lines(model, tok, [item])
    assert abs(line["nats"] - loss) < 1e-3
    each = [
        experiment.lines(model, tok, [item | {"gold": k}])[0] for k in range(len(item["choices"]))
    ]
    assert abs(sum(x["right"] for x in each) - 1) < 1e-9
    assert [x["acc"] for x in each].count(1.0) == 1
    likeliest = min(each, key=lambda x: x["nats"])
    assert likeliest["acc"] == 1.0 and likeliest is max(each, key=lambda x: x["right"])


def test_differences_are_taken_question_by_question():
    def seed(accs):
        return [{"acc": a, "acc_norm": a, "right": a / 2, "nats": 1 - a} for a in accs]

    full, ours = [seed([1, 1, 0, 0])] * 2, [seed([1, 0, 0, 0]), seed([1, 0, 1, 0])]
    f = experiment.compared(ours, [seed([0, 0, 0, 0])] * 2, full)
    assert f["acc"]["mean"] == 0.375 and f["acc"]["seeds"] == [0.25, 0.5]
    assert f["acc gained"]["mean"] == 0.375
    assert f["acc to full"]["mean"] == -0.125 and f["nats to full"]["mean"] == 0.125
    same = experiment.compared(full, full, full)["acc to full"]
    assert same["mean"] == same["ci"] == 0


@pytest.mark.parametrize(
    "mean, ci, said", [(0.0, 0.01, "yes"), (-0.01, 0.02, "open"), (-0.05, 0.02, "no")]
)
def test_the_verdict_is_the_whole_intervals(mean, ci, said):
    assert experiment.verdict({"mean": mean, "ci": ci}) == said


def instead_of_training(script, out, lora=0, quant="none", model="", lr=0.0, **_):
    """A checkpoint as sft.py leaves it, its trained weights moved at random."""
    o = sft.Options(model=model, lora=lora, quant=quant)
    net, tok = tuning.start(o, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.requires_grad:
            p.data += 100 * lr * torch.randn(p.shape, generator=generator)
    tuning.save(o, out, net, tok)
    return {"share": 1.0, "core_minutes": None, "gb": 1.0}


def test_from_files_to_the_table(tmp_path, monkeypatch, capsys):
    page, data = tmp_path / "R.md", [tiny.write(tmp_path / f"{n}.jsonl", items(n)) for n in "ab"]
    page.write_text("<!-- tuning -->\n<!-- /tuning -->\n")
    monkeypatch.setattr(experiment, "run", instead_of_training)
    monkeypatch.setattr(experiment, "draw", lambda figures: None)
    o = experiment.Options(
        data=",".join(data), model=tiny.folder(tmp_path / "model"), out=str(tmp_path / "out"),
        results=str(page), pictures=str(tmp_path), seeds=1, n=6, choosing=4,
    )  # fmt: skip
    experiment.tune_and_compare(o)
    found = json.loads((tmp_path / "out" / "experiments" / "tuning.json").read_text())
    assert set(found["figures"]) == {"a", "b", "both"}
    assert found["figures"]["both"]["qlora"]["acc"]["items"] == 12
    assert page.read_text().count("\n| both |") == 5
    mine = tmp_path / "out" / "experiments" / "tuning" / "seed0"
    best = {way: min(by, key=by.get) for way, by in found["tried"].items()}
    best["qlora"] = best["lora"]
    assert {f"{way}-{round(float(lr) * 1e6)}e-6" for way, lr in best.items()} == {
        path.parent.name for path in mine.glob("*/*-130-0-6.json")
    }
    # QLoRA is its adapter on the base in 4 bits
    (folder,) = mine.glob("qlora-*")
    how = experiment.tuning.Reading(quant="nf4", keep_base=True)
    model, tok = tuning.read(how, folder, torch.device("cpu"))
    part = experiment.parts(items("a"), o)["measure"]
    kept = json.loads((folder / "qlora-130-0-6.json").read_text())
    assert kept["found"]["a"] == experiment.lines(model, tok, part)


def test_without_files_it_is_left_out(capsys):
    experiment.tune_and_compare(run.parse(experiment.Options, "", []))
    assert "left out" in capsys.readouterr().err
