"""Evaluation: answers in their order, KL and held-out loss against loops,
and a whole run on tiny checkpoints.
"""

import gc
import json
import random
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from tiny import chat_tokenizer, folder, lm, user, write

from common import hub
from data import records, templates, tokenizer
from data.world import world
from metrics import kl, mean, ratio
from model import scalar_model
from sampling import generate
from tools import evals, report
from tools import results as tables
from tools.answers import order_counts

CPU = torch.device("cpu")


# ---------------------------------------------------------------- a stage's figures
def test_stage_figures():
    def line(gold, right, text="a b c", finished=True):
        measures = {"rougeL": gold / 2, "exact_match": 0.0, "token_f1": 1.0}
        return {"gold": gold, "right": right, "answer": text, "finished": finished} | measures

    ours, theirs = (
        [line(1.5, True), line(0.5, False, "a", False)],
        [line(0.5, False), line(0.5, True)],
    )
    f = evals.stage_figures(ours, theirs, theirs, [2.0, 4.0])
    assert (f["n"], f["gold_sampled"], f["gold_greedy"], f["right_sampled"], f["right_greedy"]) == (
        2,
        1.0,
        0.5,
        0.5,
        0.5,
    )
    assert (f["finished"], f["mean_length"], f["kl_vs_sft"], f["gain_vs_sft"]) == (0.5, 2, 3.0, 0.5)
    assert (f["win_vs_sft"], f["win_vs_sft_decided"]) == (0.75, 1.0)
    assert (f["rougeL"], f["exact_match"], f["token_f1"]) == (0.5, 0, 1)
    assert all(
        k + "_ci" in f
        for k in (
            "gold_sampled",
            "gold_greedy",
            "right_greedy",
            "win_vs_sft",
            "gain_vs_sft",
            "kl_vs_sft",
        )
    )
    alone = evals.stage_figures(ours, theirs)
    assert not any("vs_sft" in k for k in alone)


def test_pairs_of_answers_in_two_orders():
    # the first beats the others by both; xs ties the middle two, ys the 2nd and 4th
    assert order_counts([3, 1, 1, 2], [5, 1, 2, 1]) == (3, 1, 1, 1)
    assert order_counts([0, 0, 0], [1, 1, 2]) == (0, 0, 2, 0)
    assert order_counts([1, 1, 2], [0, 0, 0]) == (0, 0, 0, 2)


def test_measures_beside_gold_leave_out_the_base_and_what_gold_ties():
    def lines(golds, f1s):
        return [
            dict(gold=g, rougeL=-g, exact_match=0, token_f1=f)
            for g, f in zip(golds, f1s, strict=True)
        ]

    every = dict(base=lines([9, 9], [0, 9]), sft=lines([0.3, 1], [1, 1]))
    assert evals.measures(every) == {}
    found = evals.measures(
        every | dict(dpo=lines([0.1 + 0.2, 2], [0, 0]), own=lines([1, 3], [1, 1]))
    )
    assert {name: (f["differently"], f["untold"]) for name, f in found.items()} == {
        "rougeL": (1, 0),
        "exact_match": (0, 1),
        # dpo-own holds, sft-own ties; dpo-own holds, sft-own ties, sft-dpo is turned round
        "token_f1": (1 / 3, 2 / 5),
    }
    assert all((f["n"], f["pairs"]) == (2, 5) and "untold_ci" in f for f in found.values())


def test_answers_are_measured_beside_the_perfect_one():
    held = world.records(0, {"sft": 1, "prompts": 1, "heldout": 5})["heldout"]
    lines = evals.rate(held, [(r["reference"], [], True) for r in held])
    assert all(x["rougeL"] == x["exact_match"] == x["token_f1"] == 1 for x in lines)
    (line,) = evals.rate(held[:1], [("x " + held[0]["reference"], [], True)])
    assert 0 < line["rougeL"] < 1 and line["exact_match"] == 0


# ---------------------------------------------------------------- models
CHATS = [
    user(text) for text in ("hi", "what is the capital of Peru?", "ab", "one and two", "thank you")
]


@pytest.fixture(scope="module")
def model():
    return lm(2)


@pytest.fixture(scope="module")
def tok():
    return chat_tokenizer()


def options(**changes):
    return evals.Options(max_new_tokens=6, device="cpu", **changes)


def test_answers_come_back_in_the_order_of_their_prompts(model, tok):
    found = evals.answer(model, tok, CHATS, options(batch=2), 0.0, 0)
    for chat, (text, ids, finished) in zip(CHATS, found, strict=True):
        prompt = templates.render(tok, chat, add_generation_prompt=True)[0]
        (alone,) = generate(model, [prompt], 6, 0.0, eos_id=279)
        assert (
            ids == alone
            and finished == (alone[-1] == 279)
            and text == tok.decode(alone, skip_special=True)
        )
    assert len({tuple(ids) for _, ids, _ in found}) > 1


def test_answers_end_at_the_end_token_and_say_so(model, tok):
    ends = lm(2)
    with torch.no_grad():
        ends.lm_head.weight.zero_()
        # likelier than others for about half of the states
        ends.lm_head.weight[279] = 0.3 * ends.norm.weight
    found = evals.answer(ends, tok, CHATS * 8, options(), 1.0, 0)
    for text, ids, finished in found:
        assert finished == (279 in ids) and 279 not in ids[:-1] and "<|im_end|>" not in text
    assert {f for *_, f in found} == {True, False}
    assert evals.answer(ends, tok, CHATS, options(), 1.0, 0) == evals.answer(
        ends, tok, CHATS, options(), 1.0, 0
    )
    assert evals.answer(ends, tok, CHATS, options(), 1.0, 0) != evals.answer(
        ends, tok, CHATS, options(), 1.0, 1
    )


def test_kl_of_a_model_with_itself_is_0_and_of_another_the_log_ratio_of_its_answers(model, tok):
    other, held = lm(3), [{"messages": c} for c in CHATS]
    answers = evals.answer(model, tok, CHATS, options(), 1.0, 0)
    own = evals.token_logps(model, tok, held, answers, size=2)
    assert kl(own, own) == [0.0] * 5
    expected = []
    for chat, (_, ids, _) in zip(CHATS, answers, strict=True):
        prompt = templates.render(tok, chat, add_generation_prompt=True)[0]
        with torch.no_grad():
            p, q = (
                torch.log_softmax(m(torch.tensor([prompt + ids]))[0], -1) for m in (model, other)
            )
        expected.append(sum((p - q)[len(prompt) + t - 1, i].item() for t, i in enumerate(ids)))
    assert kl(own, evals.token_logps(other, tok, held, answers, size=2)) == pytest.approx(
        expected, abs=1e-3
    )
    assert mean(expected) > 1


@torch.no_grad()
def test_held_out_losses_are_a_loop_over_the_trained_tokens(model, tok):
    chats = [
        {"messages": c + [{"role": "assistant", "content": text}]}
        for c, text in zip(CHATS, ("a", "Lima.", "", "three", "no"), strict=True)
    ]
    chats.append(
        {
            "messages": (
                chats[0]["messages"] + user("and?") + [{"role": "assistant", "content": "sure"}]
            )
        }
    )
    expected = []
    for c in chats:
        ids, labels = templates.render(tok, c["messages"])
        logp = torch.log_softmax(model(torch.tensor([ids]))[0], -1)
        trained = [t for t, label in enumerate(labels) if label != -100]
        expected.append((-sum(logp[t - 1, ids[t]].item() for t in trained), len(trained)))
    got = evals.held_out_losses(model, tok, chats, size=4)
    assert sorted(n for _, n in got) == sorted(n for _, n in expected)
    assert sorted(x for x, _ in got) == pytest.approx(sorted(x for x, _ in expected), abs=1e-3)
    assert ratio(got) == pytest.approx(
        sum(x for x, _ in expected) / sum(n for _, n in expected), abs=1e-5
    )
    long = {"messages": user("x" * 200) + [{"role": "assistant", "content": "a"}]}
    assert evals.held_out_losses(model, tok, [long, chats[0]]) == [
        pytest.approx(expected[0], abs=1e-3)
    ]


@torch.no_grad()
def test_log_probabilities_of_answers_are_sums_with_their_end(model, tok):
    texts = ["a", "Lima.", "b", "three", "no"]
    got = evals.answer_logps(model, tok, CHATS, texts, size=2)
    for chat, text, value in zip(CHATS, texts, got, strict=True):
        prompt, ids = templates.answer_ids(tok, chat, text)
        logp = torch.log_softmax(model(torch.tensor([prompt + ids]))[0], -1)
        assert ids[-1] == 279 and value == pytest.approx(
            sum(logp[len(prompt) + t - 1, i].item() for t, i in enumerate(ids)), abs=1e-3
        )


# ---------------------------------------------------------------- the reward model's figures
def test_a_reward_model_that_is_gold_itself_and_its_opposite(monkeypatch, tok):
    held = [{"messages": user(i["prompt"]), "item": i} for i in world.items(66, 0, "heldout")]
    by_prompt = {r["item"]["prompt"]: r["item"] for r in held}
    rng, said = random.Random(0), []

    def answer(m, t, prompts, *_):
        said[:] = [world.demonstrate(by_prompt[p[-1]["content"]], rng)[0] for p in prompts]
        return [(text, [279], True) for text in said]

    monkeypatch.setattr(evals, "answer", answer)

    def figures(score):
        monkeypatch.setattr(
            evals,
            "score_texts",
            lambda m, t, prompts, answers, *_: [
                score(by_prompt[p[-1]["content"]], a) for p, a in zip(prompts, answers, strict=True)
            ],
        )
        return evals.reward_figures(
            None, tok, held, evals.fresh_answers(None, tok, held, options()), options()
        )

    gold = figures(lambda item, a: world.gold(item, a)[0])
    assert (
        gold["pair_accuracy"]
        == gold["truth_accuracy"]
        == gold["minimal_pairs_accuracy"]
        == gold["length_matched_accuracy"]
        == 1
    )
    # manners are left when prompts are swapped
    assert 0.3 < gold["swapped_prompts_accuracy"] < 0.9 and gold["pairs"] > 100
    assert 0.75 < gold["labeller_gold_accuracy"] < 0.97 and 0.65 < gold["labeller_agreement"] < 0.95
    assert -1 <= gold["score_length_correlation"] < 0.9
    bad = figures(lambda item, a: -world.gold(item, a)[0])
    assert (
        bad["pair_accuracy"]
        == bad["truth_accuracy"]
        == bad["minimal_pairs_accuracy"]
        == bad["length_matched_accuracy"]
        == 0
    )
    blind = figures(lambda item, a: 0.0)
    assert (
        blind["pair_accuracy"] == blind["truth_accuracy"] == blind["minimal_pairs_accuracy"] == 0.5
    )
    # manner alone says nothing of truth
    polite = figures(lambda item, a: float(world.gold(item, a)[1]["courteous"]))
    assert (
        polite["truth_accuracy"]
        == polite["minimal_pairs_accuracy"]
        == 0.5
        < polite["pair_accuracy"]
    )
    long = figures(lambda item, a: float(len(a.split())))
    assert long["score_length_correlation"] == pytest.approx(1)
    rows = [
        [(world.gold(r["item"], a)[0], len(a.split())) for a in said[4 * i : 4 * i + 4]]
        for i, r in enumerate(held)
    ]
    near = [
        x[1] > y[1]
        for row in rows
        for x in row
        for y in row
        if x[0] > y[0] and abs(x[1] - y[1]) <= 1
    ]
    assert (
        long["length_matched_accuracy"]
        == pytest.approx(mean(near))
        != pytest.approx(long["pair_accuracy"], abs=0.02)
    )


# ---------------------------------------------------------------- the script
def test_the_world_s_results(tmp_path, capsys):
    out = tmp_path / "out"
    shape = dict(max_position_embeddings=256)
    folder(out / "sft", 1, **shape)
    folder(out / "dpo", 2, **shape)
    shutil.copytree(out / "sft", out / "ppo")  # a policy that has not moved
    base = folder(tmp_path / "base", 3, **shape)
    rows = [
        {"messages": user(i["prompt"]), "reference": world.perfect(i), "item": i}
        for i in world.items(22, 0, "heldout")
    ]
    (out / "world").mkdir()
    write(out / "world" / "heldout.jsonl", rows)
    evals.evaluate(options(out=str(out), base=base, n=11))
    results = json.loads((out / "results.json").read_text())
    assert (
        list(results) == ["perfect", "base", "sft", "ppo", "dpo", "measures"]
        and results["perfect"] == world.PERFECT
    )
    asked = {
        "n",
        "gold_sampled",
        "gold_greedy",
        "right_sampled",
        "right_greedy",
        "finished",
        "mean_length",
    }
    assert all(
        asked <= set(results[s]) and results[s]["n"] == 11 for s in ("base", "sft", "ppo", "dpo")
    )
    assert "kl_vs_sft" not in results["base"]
    for stage in ("sft", "ppo"):  # the same model gives the same answers
        f = results[stage]
        assert (
            f["win_vs_sft"],
            f["win_vs_sft_decided"],
            f["kl_vs_sft"],
            f["gain_vs_sft"],
            f["gain_vs_sft_ci"],
        ) == (0.5, None, 0, 0, 0)
        assert f["gold_sampled"] == results["sft"]["gold_sampled"]
    assert results["dpo"]["kl_vs_sft"] > 1
    for stage in ("base", "sft", "ppo", "dpo"):
        for kind in ("", ".greedy"):
            lines = [
                json.loads(line)
                for line in Path(out, "answers", f"{stage}{kind}.jsonl").read_text().splitlines()
            ]
            assert [line["prompt"] for line in lines] == [r["messages"] for r in rows[:11]]
            for line, r in zip(lines, rows, strict=False):
                own = {"prompt", "answer", "finished", "gold", "right", "reasons"}
                assert set(line) == own | set(evals.MEASURES)
                assert line["gold"] == world.gold(r["item"], line["answer"], line["finished"])[0]
            figure = results[stage]["gold_greedy" if kind else "gold_sampled"]
            assert figure == pytest.approx(mean([line["gold"] for line in lines]))
    assert "dpo " in capsys.readouterr().out


def test_one_model_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """None is left, in no frame and in no circle of references, when the next one is read."""
    out, alive, loaded, load = tmp_path / "out", [], [], hub.load

    def one(path, *rest):
        assert not any(ref() for ref in alive), f"{loaded[-1]} is in memory when {path} is read"
        model, tok = load(path, *rest)
        loaded.append(Path(path).name)
        alive.extend(map(weakref.ref, (model, model.embed_tokens.weight)))
        return model, tok

    monkeypatch.setattr(hub, "load", one)
    shape = dict(max_position_embeddings=256)
    for seed, stage in enumerate(("base", "sft", "dpo")):
        folder(out / stage, seed, **shape)
    hub.save(out / "reward", scalar_model(lm(4, **shape)), chat_tokenizer())
    (out / "world").mkdir()
    items = world.items(4, 0, "heldout")
    rows = [{"messages": user(i["prompt"]), "item": i} for i in items]
    write(out / "world" / "heldout.jsonl", rows)
    texts = [f"question {i}" for i in range(40)]
    chats = [{"messages": user(t) + [{"role": "assistant", "content": "ok"}]} for t in texts]
    prefs = [{"prompt": t, "chosen": "sure", "rejected": "no no"} for t in texts]
    choices = [{"query": t, "choices": ["a", "b"], "gold": 0} for t in texts[:4]]
    given = dict(out=str(out), base=str(out / "base"), n=3)
    own = dict(data=write(tmp_path / "d.jsonl", chats), prefs=write(tmp_path / "p.jsonl", prefs))
    task = dict(task=write(tmp_path / "c.jsonl", choices), model=given["base"])
    gc.collect()
    gc.disable()
    try:
        evals.evaluate(options(**given))
        evals.evaluate(options(**given | own))
        evals.evaluate(options(**given | task, against=str(out / "dpo")))
    finally:
        gc.enable()
    assert loaded == [*("base", "sft", "dpo", "sft", "reward"), *("base", "sft", "dpo", "reward"),
                      *("base", "dpo")]  # fmt: skip


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """OUT of a fork: beside sft, dpo and the reward model a stage `grpo` of its own, with a log of
    its own, and folders that are no stages; evaluated."""
    out = tmp_path_factory.mktemp("fork") / "seed0"
    shape = dict(max_position_embeddings=256)
    folder(out / "sft", 1, **shape)
    folder(out / "dpo", 2, **shape)
    shutil.copytree(out / "dpo", out / "grpo")
    shutil.copytree(out / "sft", out / "a_first_try")
    hub.save(out / "reward", scalar_model(lm(4, **shape)), chat_tokenizer())
    shutil.copytree(out / "reward", out / "reward_2")
    folder(out / "quick" / "sft", 1)
    folder(out / "seed0" / "sft", 1)
    (out / "kto" / "state").mkdir(parents=True)  # has not finished
    log = [
        dict(step=t, reward=t / 9, kl=0.1, kl_k3=0.2, group_spread=0.5, loss=1.0, lr=1e-4, note="x")
        for t in range(9)
    ]
    write(out / "grpo" / "metrics.jsonl", log)
    write(out / "kto" / "state" / "metrics.jsonl", log)
    (out / "grpo" / "run.json").write_text(json.dumps({"options": {"group": 8}, "inputs": {}}))
    (out / "world").mkdir()
    items = world.items(22, 0, "heldout")
    rows = [{"messages": user(i["prompt"]), "item": i} for i in items]
    write(out / "world" / "heldout.jsonl", rows)
    evals.evaluate(options(out=str(out), base=str(out / "none"), n=11))
    return out


def test_a_fork_s_stage_is_evaluated_after_the_known_ones(forked):
    results = json.loads((forked / "results.json").read_text())
    assert list(results) == ["perfect", "sft", "dpo", "a_first_try", "grpo", "reward", "measures"]
    assert evals.evaluated(results) == ["sft", "dpo", "a_first_try", "grpo"]
    assert results["grpo"] == results["dpo"]
    assert results["a_first_try"]["kl_vs_sft"] == 0 != results["grpo"]["kl_vs_sft"]
    for name in ("grpo.jsonl", "grpo.greedy.jsonl"):
        theirs = (forked / "answers" / name.replace("grpo", "dpo")).read_text()
        assert (forked / "answers" / name).read_text() == theirs


def test_the_report_shows_a_fork_s_stage(forked):
    pytest.importorskip("matplotlib")
    report.report(report.Options(str(forked)))
    page = (forked / "report.html").read_text(encoding="utf-8")
    head = page[page.index("<thead>") : page.index("</thead>")]
    assert re.findall(r"--(\w+)\)\">(\w+)", head) == [
        ("sft", "SFT"),
        ("dpo", "DPO"),
        ("own0", "a_first_try"),
        ("own1", "grpo"),
    ]
    answers = page[page.index("The same prompts, answered by each") :]
    assert answers.count('var(--own1)"><span') == 2 * 11  # sampled and greedy
    section = page[page.index("<h2>grpo</h2>") :]
    # known figures with the known words, then its own; `loss` means several things
    titles = ["Reward", "KL to the SFT model", "Group spread", "Loss", "Lr"]
    assert re.findall(r"<figure><b>([^<]*)", section) == titles
    assert "standard deviations of the demonstrations" in section and "ln 2" not in section
    assert "var(--own1)" in section and "group 8" in section
    for name in ("kto", "quick", "reward_2", "seed0</"):
        assert f"<h2>{name}" not in page and f'">{name}' not in page


def test_a_fork_s_stage_has_a_row_in_the_tables_of_results(forked, tmp_path):
    page, front = tmp_path / "RESULTS.md", tmp_path / "README.md"
    front.write_text("<!-- stages -->\n<!-- /stages -->\n")
    page.write_text(front.read_text() + "<!-- kinds -->\n<!-- /kinds -->\n")
    tables.write(forked.parent, 1, page, front)
    rows = [line.split(" | ") for line in front.read_text().splitlines() if line.startswith("| ")]
    assert [r[0] for r in rows[2:]] == ["| SFT", "| DPO", "| a_first_try", "| grpo"]
    assert rows[-1][1:] == rows[3][1:]
    assert "| grpo | " in page.read_text()
    assert "| right, greedy % | SFT | DPO | a_first_try | grpo |" in page.read_text()


def test_a_checkpoint_of_another_vocabulary_has_no_kl(tmp_path, capsys):
    folder(tmp_path / "sft", 1, max_position_embeddings=256)
    tok = tokenizer.train(["other words, other pieces, other numbers. "], 280)
    templates.adopt(tok, "chatml")
    folder(tmp_path / "other", 2, tok, max_position_embeddings=256)
    (tmp_path / "world").mkdir()
    items = world.items(11, 0, "heldout")
    rows = [{"messages": user(i["prompt"]), "item": i} for i in items]
    write(tmp_path / "world" / "heldout.jsonl", rows)
    evals.evaluate(options(out=str(tmp_path), base=str(tmp_path / "none"), n=4))
    results = json.loads((tmp_path / "results.json").read_text())
    assert "gold_sampled" in results["other"] and "kl_vs_sft" not in results["other"]
    assert "other: no KL, its vocabulary is not that of" in capsys.readouterr().out


def test_a_stage_s_name_that_results_need_is_refused(tmp_path):
    folder(tmp_path / "perfect", 1)
    with pytest.raises(ValueError, match="perfect: results.json needs the name perfect"):
        evals.evaluate(options(out=str(tmp_path), base=str(tmp_path / "none")))


def test_results_of_anyones_records(tmp_path):
    out = tmp_path / "out"
    folder(out / "sft", 1)
    shutil.copytree(out / "sft", out / "dpo")
    folder(out / "simpo", 2)
    texts = [f"question {i}" for i in range(120)]
    data = write(
        tmp_path / "d.jsonl",
        [{"messages": user(t) + [{"role": "assistant", "content": "ok"}]} for t in texts],
    )
    prefs = write(
        tmp_path / "p.jsonl", [{"prompt": t, "chosen": "sure", "rejected": "no no"} for t in texts]
    )
    evals.evaluate(options(out=str(out), base=str(tmp_path / "none"), data=data, prefs=prefs))
    results = json.loads((out / "results.json").read_text())
    held = sum(records.held_out(user(t)) for t in texts)
    assert 3 < held < 30 and list(results) == ["sft", "dpo", "simpo"]
    assert all(r["n"] == r["pairs"] == held for r in results.values())
    change = results["simpo"]["loss_per_token"] - results["sft"]["loss_per_token"]
    assert results["simpo"]["loss_change"] == pytest.approx(change)
    assert results["dpo"]["loss_change"] == results["dpo"]["loss_change_ci"] == 0
    # by definition before it moves
    assert results["sft"]["implicit_accuracy"] == results["dpo"]["implicit_accuracy"] == 0.5
    assert (
        results["sft"]["loss_per_token"]
        == results["dpo"]["loss_per_token"]
        != results["simpo"]["loss_per_token"]
    )
    tok, (one, two) = chat_tokenizer(), (hub.load(out / s)[0] for s in ("sft", "simpo"))
    pairs = [user(t) for t in texts if records.held_out(user(t))]
    implicit = [
        [
            a - b
            for a, b in zip(
                *(evals.answer_logps(m, tok, pairs, [text] * held) for m in (two, one)),
                strict=True,
            )
        ]
        for text in ("sure", "no no")
    ]
    won = mean([float(c > r) for c, r in zip(*implicit, strict=True)])
    assert results["simpo"]["implicit_accuracy"] == pytest.approx(won)


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(FileNotFoundError, match="no stage's checkpoint in it"):
        evals.evaluate(options(out=str(tmp_path), base=str(tmp_path / "none")))
