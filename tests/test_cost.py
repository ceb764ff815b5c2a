"""Costs against a spreadsheet's arithmetic, done by hand; break-even points against a search; the
reader's own tokens; what does not fit; prices that are none.
"""

import json
import random
import sys
from dataclasses import asdict, fields
from math import ceil, isclose

import pytest
import tiny

from common import memory
from common.run import main, parse, spell
from data.templates import render
from model import Transformer
from tools import cost
from tools.cost import Options, break_even, cards_needed, costs, count_tokens, hardware

GB = 2**30

# Round figures: 1,000 prompt tokens at 1,000 a second are 1 second per call, so a replica answers
# 3,600 s x 500 h x 0.5 = 900,000 calls a month and costs $3.60 x 500 h = $1,800. A million training
# tokens take 1,000 s, $1, as much as they cost managed; a managed call costs 1,000 x $4 / 1M.
ROUND = dict(
    epochs=1.0,
    train_price=1.0,
    input_price=4.0,
    card_price=3.6,
    train_speed=1000.0,
    read_speed=1000.0,
    hours=500.0,
    spare=0,
)


def case(cards=1, tokens=1e6, asked=1000, answered=0, **options):
    return costs(
        Options(**ROUND | options), dict(tokens=tokens, input=asked, output=answered), cards
    )


def by_default(**options):
    return costs(Options(**options), dict(tokens=1e6, input=500, output=100), 1)


# ---------------------------------------------------------------- a spreadsheet, ten cases
CASES = {
    "1 managed training: 1M tokens x 3 epochs x $3 per 1M": (
        lambda: by_default()["managed"]["training"],
        9.0,
    ),
    "2 own training: 3M tokens / 8,000 a second = 375 s, at $2.50 an hour": (
        lambda: by_default()["own"]["training"],
        375 / 3600 * 2.5,
    ),
    "3 managed month: 10M x (500 x $0.30 + 100 x $1.20) / 1M = $2,700, and $9 / 12": (
        lambda: by_default()["managed"]["month"],
        2700.75,
    ),
    "4 own month: 10M calls x (500 / 20,000 + 100 / 2,500 = 0.065 s) are 650,000 s of the 1,314,000"
    " that one card works: 1 replica, 1 spare, each 730 h x $2.50; training / 12; the engineer": (
        lambda: by_default(engineer=1000.0)["own"]["month"],
        2 * 1825 + 375 / 3600 * 2.5 / 12 + 1000,
    ),
    "5 own month: 50M calls are 3,250,000 s, so 3 replicas, 1 spare; $0.0001 each for traffic": (
        lambda: by_default(calls=5e7, own_call=1e-4)["own"]["serving"],
        4 * 1825 + 5000,
    ),
    "6 two cards to a replica: twice the price, twice the calls, so one replica for 1.8M calls": (
        lambda: [case(2, calls=1.8e6)["own"][k] for k in ("replica", "capacity", "replicas")],
        [3600, 1_800_000, 1],
    ),
    "7 even on the first step: ($900 engineer + $1,800) / $0.004; the second step begins at 900,000"
    " calls and $3,600 managed, $4,500 own: even again at $4,500 / $0.004": (
        lambda: list(case(engineer=900.0)["even"].values()),
        [675_000, 1_125_000],
    ),
    "8 a marginal cost of $0.001: (900 + 1,800) / (0.004 - 0.001) = 900,000, a replica's last call;"
    " a full one gains 2,700 - 1,800 = 900: 3 of them pay for the next step, at 6,300 / 0.003": (
        lambda: list(case(engineer=900.0, own_call=1e-3)["even"].values()),
        [900_000, 2_100_000],
    ),
    "9 none: at $2 per 1M a replica's 900,000 calls cost managed what it costs, $1,800": (
        lambda: list(case(input_price=2.0, engineer=1.0)["even"].values()),
        [None, None],
    ),
    "10 training counts: managed $601 each month, own $1: $1,800 - $600 to be saved at $0.004": (
        lambda: list(case(train_price=601.0, months=1.0)["even"].values()),
        [300_000, 300_000],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_spreadsheet_by_hand(name):
    compute, expected = CASES[name]
    if expected != [None, None]:
        expected = pytest.approx(expected, rel=1e-12)
    assert compute() == expected


def test_the_last_call_of_a_replica_needs_no_second_one():
    assert case(calls=900_000.0)["own"]["replicas"] == 1
    assert case(calls=900_001.0)["own"]["replicas"] == 2
    assert case(calls=900_000.0, spare=2)["own"]["replicas"] == 3


def test_break_even_points_are_where_a_search_finds_them():
    rng, kinds = random.Random(0), set()
    for _ in range(300):
        fixed, replica, capacity = rng.uniform(-3, 6), rng.choice([0.5, 1, 2]), 1.0
        saving = rng.choice([-0.5, 0.3, 1.2, 2.2, 3.0])
        even = break_even(fixed, replica, capacity, saving)
        at = sorted([i / 100 for i in range(1, 6001)] + [n + 1e-9 for n in range(60)])
        pays = [fixed + ceil(c) * replica <= saving * c for c in at]
        first, lasting = even["first"], even["lasting"]
        if first is None:
            assert not any(pays)
        else:
            assert abs(at[pays.index(True)] - first) < 0.011
        if lasting is None:
            assert not pays[-1]
        else:
            lost = [c for c, good in zip(at, pays, strict=True) if not good]
            assert abs(max(lost, default=0.0) - lasting) < 0.011
        kinds.add((first is None, lasting is None, first == lasting))
    assert len(kinds) == 4  # none, not for good, later for good, at once for good


def test_a_gain_of_rounding_alone_is_none():
    assert 3 * 0.1 > 0.3
    assert break_even(1000, 0.3, 3, 0.1) == {"first": None, "lasting": None}


@pytest.mark.parametrize(
    "options", [{}, dict(engineer=5000.0, own_call=1e-5, fee=20.0), dict(spare=0)]
)
def test_at_a_break_even_point_both_months_cost_the_same(options):
    for calls in by_default(**options)["even"].values():
        found = by_default(calls=calls, **options)
        assert isclose(found["managed"]["month"], found["own"]["month"], rel_tol=1e-12)
        more = by_default(calls=calls * 1.001, **options)
        assert more["managed"]["month"] > more["own"]["month"]


# ---------------------------------------------------------------- the reader's own tokens
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("cost") / "model")


def test_tokens_of_conversations_are_all_that_is_read(tmp_path):
    tok = tiny.chat_tokenizer()
    talks = [
        [*tiny.user("hello"), {"role": "assistant", "content": "Lima."}],
        [
            {"role": "system", "content": "be kind"},
            *tiny.user("the capital of Peru"),
            {"role": "assistant", "content": "Lima. thank you!"},
            *tiny.user("sure?"),
            {"role": "assistant", "content": "of course"},
        ],
    ]
    found = count_tokens(tiny.write(tmp_path / "a", [{"messages": m} for m in talks]), tok)
    # the newline after the last end token is no part of an answer
    assert found["tokens"] == sum(len(render(tok, m)[0]) - 1 for m in talks)
    answers = [len(tok.encode(m[-1]["content"])) + 1 for m in talks]
    assert found["output"] == sum(answers) / 2
    assert found["input"] == (found["tokens"] - sum(answers)) / 2


def test_every_answer_of_a_ranking_counts_with_its_prompt_but_not_an_absent_one(tmp_path):
    tok = tiny.chat_tokenizer()
    prompt = len(render(tok, tiny.user("hello"), add_generation_prompt=True)[0])
    answers = [len(tok.encode(a)) + 1 for a in ("sure", "one and two")]
    pair = {"prompt": "hello", "chosen": "sure", "rejected": "one and two"}
    ranking = {"prompt": "hello", "responses": ["sure", "three", "one and two"]}
    for row in (pair, ranking | {"ranks": [0, -1, 1]}):
        found = count_tokens(tiny.write(tmp_path / "a", [row]), tok)
        assert found == {
            "tokens": 2 * prompt + sum(answers),
            "input": prompt,
            "output": sum(answers) / 2,
        }


def test_counted_tokens_are_used_where_no_option_says_otherwise(tmp_path, folder):
    talk = [*tiny.user("hello"), {"role": "assistant", "content": "Lima."}]
    data = tiny.write(tmp_path / "a", [{"messages": talk}])
    counted = count_tokens(data, tiny.chat_tokenizer())
    o = Options(data=data, model=folder)
    assert cost.read_tokens(o) == counted
    assert cost.read_tokens(Options(**asdict(o) | {"output_tokens": 7.0})) == counted | {
        "output": 7.0
    }
    assert cost.read_tokens(Options()) == {"tokens": 1e6, "input": 500, "output": 100}
    with pytest.raises(ValueError, match="--data needs --model"):
        cost.read_tokens(Options(data=data))


# ---------------------------------------------------------------- which card
def test_serving_holds_the_weights_and_every_calls_keys_and_values():
    model = Transformer(tiny.lm().config).bfloat16()
    rows = cost.serving_rows(model.config, 9.5, 3, "bf16")
    assert rows["frozen bfloat16"] == sum(p.nbytes for p in model.parameters())
    c = model.config
    assert rows["KV cache"] == 3 * 10 * c.num_hidden_layers * 2 * c.num_key_value_heads * 8 * 2
    assert rows["logits"] == 3 * c.vocab_size * 4
    packed = cost.serving_rows(cost.SIZES["8B"], 600, 64, "nf4")
    whole = cost.serving_rows(cost.SIZES["8B"], 600, 64, "bf16")
    assert sum(packed.values()) < 0.55 * sum(whole.values())


def test_a_model_is_shared_out_over_cards_and_a_gb_of_each_stays_free():
    rows = {"frozen bfloat16": 150 * GB, "logits": 8 * GB}
    assert [cards_needed(rows, card) for card in (159, 158, 80, 79, 2)] == [1, 2, 2, 3, 158]


@pytest.mark.parametrize("size", ["1.1B", "8B", "70B"])
def test_one_card_is_enough_where_memory_says_that_it_fits(size):
    found = hardware(Options(size=size, length=512), 600)
    for how, options in memory.METHODS.items():
        gb = sum(memory.need(cost.SIZES[size], **options).values()) / GB
        entry = found[f"train, {how}"]
        assert isclose(entry["gb"], gb)
        fitting = [card for card in cost.CARDS if gb <= card - 1]
        assert entry["alone"] == (fitting[0] if fitting else None)
        assert (entry["cards"] == 1) == (gb <= 79)


def test_the_8b_shape_is_llama_3s():
    assert memory.parameters(cost.SIZES["8B"]) == 8_030_261_248


def test_another_models_speeds_are_asked_for(tmp_path, capsys):
    said = "The speeds are an 8B model's"
    for options, there in (
        ({}, False),
        (dict(size="1.1B"), True),
        (dict(size="1.1B", read_speed=90000.0), False),
    ):
        cost.estimate(Options(out=str(tmp_path / "c.json"), **options))
        assert (said in capsys.readouterr().out) == there


# ---------------------------------------------------------------- prices that are none
PRICES = ["train_price", "input_price", "output_price", "card_price"]


@pytest.mark.parametrize("name", PRICES)
@pytest.mark.parametrize("value", ["0", "-0.1", "nan", "inf", "", "cheap", None])
def test_a_price_that_is_none_is_one_clear_line(name, value, capsys):
    argv = [spell(name)] if value is None else [f"{spell(name)}={value}"]
    with pytest.raises(SystemExit) as end:
        parse(Options, "", argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and spell(name) in err


@pytest.mark.parametrize("name", ["fee", "own_call", "engineer"])
def test_a_cost_that_need_not_be_is_0_and_never_negative(name, capsys):
    assert getattr(parse(Options, "", [f"{spell(name)}=0"]), name) == 0
    with pytest.raises(SystemExit):
        parse(Options, "", [f"{spell(name)}=-1"])
    assert spell(name) in capsys.readouterr().err


def test_what_is_out_of_all_proportion_is_said(tmp_path):
    with pytest.raises(ValueError, match="out of all proportion"):
        cost.estimate(Options(calls=1e300, out=str(tmp_path / "c.json")))


# ---------------------------------------------------------------- what is printed and written
def test_every_assumption_is_printed_and_written_beside_the_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "cost.json"
    monkeypatch.setattr(sys, "argv", ["cost.py", "--input-price", "0.15", "--out", str(out)])
    main(cost.estimate, Options, cost.__doc__)
    printed = capsys.readouterr().out
    for f in fields(Options):
        assert f"{spell(f.name)} " in printed
    assert printed.count("given: ") == 2 and "given: managed: $ per 1M prompt tokens" in printed
    record = json.loads(out.read_text())
    assert record["command"].startswith("python -m tools.cost ")
    assert "--input-price 0.15" in record["command"]
    assert record["assumptions"]["input_price"] == 0.15
    assert record["assumptions"].keys() == {f.name for f in fields(Options)}
    managed = record["managed"]
    assert isclose(managed["month"], 10 * (500 * 0.15 + 100 * 1.2) + 0.75)
    assert f"{managed['month']:,.2f}" in printed
    # 3M tokens / 8,000 a second = 375 s = 0.104 hours
    assert "training, LoRA: 0.10 hours on 1 of the cards" in printed
    # it is replaced by the next one
    cost.estimate(Options(out=str(out)))
    assert json.loads(out.read_text())["assumptions"]["input_price"] == 0.3
    assert [p.name for p in out.parent.iterdir()] == ["cost.json"]


def test_the_deep_dives_figures(tmp_path, capsys):
    cost.estimate(Options(example=True, out=str(tmp_path / "c.json")))
    out = capsys.readouterr().out
    # $0.003 x 1,000; 1M tokens / 8,000 a second = 125 s, at $2.50 an hour
    assert "$0.003 per 1,000 training tokens is $3.00 per million; on own cards $0.09" in out
    assert "in 7 of 12 cases" in out
    rows = json.loads((tmp_path / "c.json").read_text())["deep dive"]
    at = {(r["input"], r["instead of"], r["engineer"]): r for r in rows}
    # 2 x $1,825 and the trainings' difference, by $0.00027; with $5,000 more 3 x $1,825 at first
    training = (375 / 3600 * 2.5 - 9) / 12
    assert isclose(at[500, "fine-tuned", 0]["first"], (3650 + training) / 0.00027)
    assert isclose(at[500, "fine-tuned", 5000]["first"], (3 * 1825 + 5000 + training) / 0.00027)
    # GPT-4o: 500 x $2.50 + 100 x $10 per 1M calls: 0.00225
    assert isclose(at[500, "GPT-4o", 0]["first"], (3650 + training) / 0.00225)


def test_no_break_even_is_said_as_such(tmp_path, capsys):
    cost.estimate(Options(input_price=0.01, output_price=0.01, out=str(tmp_path / "c.json")))
    assert "no break-even" in capsys.readouterr().out
    even = json.loads((tmp_path / "c.json").read_text())["even"]
    assert even == {"first": None, "lasting": None}
    assert "not for good" in cost.say(5.0, None)


def test_the_picture_is_asked_for_by_name_only_where_it_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cost.estimate(Options(out=str(tmp_path / "c.json")))
    with pytest.raises(ValueError, match="pip install matplotlib"):
        cost.estimate(Options(out=str(tmp_path / "d.json"), picture=True))
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for prices in ({}, dict(input_price=0.01, output_price=0.01)):
        cost.estimate(Options(out=str(tmp_path / "c.json"), picture=True, **prices))
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("name", ["notes.txt", "mine.json", "c.png"])
def test_what_was_there_before_is_not_lost(tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}')
    out = tmp_path / name.replace("c.png", "c.json")
    with pytest.raises(ValueError, match="was expected"):
        cost.estimate(Options(out=str(out)))
    assert (tmp_path / name).read_text() == '{"mine": 1}' and len(list(tmp_path.iterdir())) == 1
