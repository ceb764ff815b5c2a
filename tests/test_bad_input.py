"""Bad input, stage by stage: one clear line, exit status 2, no traceback, and nothing that was
there is lost.

The kinds of malformed lines are in test_records.py, of folders in test_hub.py; here a stage turns
each into its one line.
"""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from stages import copy, done, refused, run, saved_step, script
from test_resume import contents

from common import hub
from data import records, templates, tokenizer

CHAT = {"messages": [*tiny.user("Hot or cold?"), {"role": "assistant", "content": "Hot."}]}
PAIR = {"prompt": "Hot or cold?", "chosen": "Hot.", "rejected": "No."}
RANKING = {
    "prompt": tiny.user("Hot or cold?"),
    "responses": ["Hot.", "Cold.", ""],
    "ranks": [0, 0, 1],
}
READERS = """
def brief(prompts, answers): return [-len(a) for a in answers]
def one_too_few(prompts, answers): return [0.0] * (len(answers) - 1)
def not_a_number(prompts, answers): return [float("nan") for a in answers]
def broken(prompts, answers): return [a["score"] for a in answers]
"""


def everything(folder) -> dict:
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module", autouse=True)
def nothing_is_lost(small):
    """No test here may change a file of the world."""
    world = Path(small["sft"]["data"]).parent
    before = everything(world)
    yield
    assert everything(world) == before


@pytest.fixture(scope="module")
def world(small):
    return Path(small["sft"]["data"]).parent


@pytest.fixture
def refuses(small, tmp_path):
    """refuses(stage, *words, **changed options): one line with the words, and OUT holds no
    checkpoint, no state and no result.
    """

    def refuses(stage, *words, **changes):
        out = tmp_path / "never" / (f"{stage}.jsonl" if stage == "compare" else stage)
        line = refused(
            run(script(stage), out=out, **small[stage] | changes), f"{script(stage)}: ", *words
        )
        left = [p.name for p in (tmp_path / "never").rglob("*") if p.is_file()]
        assert set(left) <= {"metrics.jsonl", "run.lock"} and line.startswith(script(stage))
        shutil.rmtree(tmp_path / "never", ignore_errors=True)
        return line

    return refuses


@pytest.fixture
def folder(world, tmp_path):
    """A copy of the SFT checkpoint, to be spoilt."""
    return Path(copy(world / "sft", tmp_path / "model"))


@pytest.fixture
def lines(tmp_path):
    """lines(*objects or strings) → a JSONL file's path."""

    def lines(*rows, name="x.jsonl"):
        (tmp_path / name).write_text(
            "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
        )
        return str(tmp_path / name)

    return lines


# ---------------------------------------------------------------- checkpoints
def test_a_missing_checkpoint(refuses, world, tmp_path):
    for stage in ("sft", "compare", "reward", "ppo", "dpo", "simpo"):
        refuses(
            stage, f"{world}/sff: no such file or folder (did you mean sft?)", model=f"{world}/sff"
        )
    refuses(
        "ppo",
        f"{world}/rewards: no such file or folder (did you mean reward?)",
        reward=f"{world}/rewards",
    )
    (tmp_path / "empty" / "state").mkdir(parents=True)
    refuses(
        "sft",
        f"{tmp_path}/empty has no config.json yet: its run has not finished; run the stage again",
        model=tmp_path / "empty",
    )
    (tmp_path / "empty" / "state").rmdir()
    refuses(
        "sft",
        f"{tmp_path}/empty has no config.json: a checkpoint (config.json, model.safetensors",
        model=tmp_path / "empty",
    )
    refuses("dpo", "sft.jsonl is no folder: a checkpoint", model=world / "sft.jsonl")


def test_a_foreign_checkpoint(refuses, folder):
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    refuses(
        "sft",
        f"{folder} has pickled weights only (pytorch_model.bin): model.safetensors was expected",
        model=folder,
    )
    (folder / "pytorch_model.bin").rename(weights)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"model_type": "gpt2"}))
    refuses(
        "dpo", f'{folder}/config.json: model_type = "gpt2"', 'only "llama", "mistral"', model=folder
    )
    (folder / "config.json").write_text(json.dumps(said)[:-9])
    refuses("ppo", f"{folder}/config.json is not JSON", model=folder)


def test_damaged_weights(refuses, folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        whole[:4],
        b"",
        b"\xff" * len(whole),
        whole[:8] + b"}" + whole[9:],
    ):
        weights.write_bytes(damaged)
        refuses(
            "compare", f"{weights} is damaged or no safetensors file", "get it again", model=folder
        )
    weights.write_bytes(whole)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"intermediate_size": 64}))
    refuses(
        "sft",
        f"{weights}: model.layers.0.mlp",
        "has the shape",
        "config.json asks for",
        model=folder,
    )


def test_a_wrong_vocabulary(refuses, folder, world, tmp_path, lines):
    larger = tokenizer.train(["abc abd abe " * 9, *map(str, range(9999))], 420)
    (folder / "tokenizer.json").write_text(larger.json)
    refuses(
        "sft",
        f"{folder}: the tokenizer has 420 tokens, the embedding 400: they are not a pair",
        model=folder,
    )
    other = tokenizer.train(["abc abd abe " * 9, *map(str, range(9999))], 400)
    templates.adopt(other, "chatml")
    reward = tiny.folder(tmp_path / "other", tok=other, vocab_size=400, num_labels=1)
    refuses(
        "ppo",
        f"--reward {reward}: its vocabulary is not the policy's",
        "reward.py --model",
        reward=reward,
    )
    (tmp_path / "other" / "tokenizer.json").unlink()
    refuses("ppo", f"--reward {reward}: its vocabulary is not the policy's", reward=reward)
    (folder / "tokenizer.json").write_text(larger.json[:-30])
    refuses("dpo", f"{folder}/tokenizer.json is not JSON", model=folder)
    (folder / "tokenizer.json").unlink()
    for stage in ("sft", "compare", "reward", "ppo", "dpo"):
        refuses(stage, f"{folder} has no tokenizer.json: get the checkpoint's own", model=folder)
    plain = tokenizer.train(["abc abd abe " * 9, *map(str, range(9999))], 380, ["<|endoftext|>"])
    hub.save(tmp_path / "plain", tiny.lm(vocab_size=400), plain)
    refuses(
        "sft",
        "chatml needs the special token <|im_start|>; the tokenizer has <|endoftext|>",
        model=tmp_path / "plain",
    )


def test_a_reward_model_where_a_language_model_is_wanted_and_the_reverse(refuses, world):
    for stage in ("sft", "compare", "reward", "ppo", "dpo", "simpo"):
        refuses(
            stage,
            f"{world}/reward is a reward model: a language model was expected",
            model=world / "reward",
        )
    refuses(
        "ppo",
        f"--reward {world}/sft: a language model; a reward model (reward.py) or FILE.py:function",
        reward=world / "sft",
    )


def test_a_chat_format(refuses, folder):
    refuses("sft", "no chat format 'vicuna': there are chatml, smollm2, zephyr", format="vicuna")
    config = folder / "tokenizer_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ messages }}"})
    )
    for stage in ("sft", "ppo", "dpo"):
        refuses(
            stage,
            "chat template is none of chatml, smollm2, zephyr, llama2",
            "it begins '{{ messages }}'. It writes no special token behind an answer",
            "sft.py --format",
            model=folder,
        )


# ---------------------------------------------------------------- records
BROKEN = '{"messages": [{"role": "user"'


@pytest.mark.parametrize(
    "stage, option, good, other",
    [
        (
            "sft",
            "data",
            CHAT,
            [
                (
                    PAIR,
                    "this is a preference pair: reward.py and dpo.py read those",
                ),
                (
                    RANKING,
                    "this is a ranking: reward.py and dpo.py read those",
                ),
                (
                    {"messages": [{"role": "bot", "content": "Hi"}]},
                    "message 1: role: one of system, user, assistant, tool was expected",
                ),
            ],
        ),
        (
            "compare",
            "data",
            {"messages": tiny.user("Hi"), "item": {"kind": "chat"}},
            [
                (CHAT, "messages: user was expected as the last turn (got assistant)"),
                (
                    RANKING,
                    "this is a ranking: reward.py and dpo.py read those",
                ),
            ],
        ),
        (
            "reward",
            "data",
            RANKING,
            [
                (CHAT, "a ranking or preference pair was expected, this is a conversation: sft.py"),
                (
                    RANKING | {"ranks": [0, 1]},
                    "ranks: 3 integers, as many as responses, were expected (got [0, 1])",
                ),
            ],
        ),
        (
            "reward",
            "reference",
            CHAT,
            [(PAIR, "a conversation was expected, this is a preference pair")],
        ),
        (
            "ppo",
            "data",
            {"messages": tiny.user("Hi")},
            [
                (CHAT, "messages: user was expected as the last turn (got assistant)"),
                (
                    PAIR,
                    "this is a preference pair: reward.py and dpo.py read those",
                ),
            ],
        ),
        (
            "dpo",
            "data",
            PAIR,
            [
                (CHAT, "a ranking or preference pair was expected, this is a conversation: sft.py"),
                (
                    {"prompt": "Hi", "chosen": "Hi."},
                    "rejected: a string or a list of messages was expected (got nothing)",
                ),
            ],
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_malformed_records(stage, option, good, other, refuses, lines):
    file = lines(good, BROKEN, good)
    refuses(stage, f"{file}:2: one JSON object per line was expected", **{option: file})
    for record, said in other:
        file = lines(good, "", record, good)
        refuses(stage, f"{file}:3: ", said, **{option: file})
    refuses(stage, "no usable records in it", **{option: lines(name="empty.jsonl")})
    refuses(
        stage, f"{file}l: no such file or folder (did you mean x.jsonl?)", **{option: file + "l"}
    )


def test_another_chat_formats_markers(refuses, lines, small, tmp_path):
    """In every stage's records; --allow-markers is what lets them pass."""
    marked = [*tiny.user("[INST] Hot or cold? [/INST]")]
    chat = {"messages": [*marked, CHAT["messages"][1]]}
    said = "x.jsonl:1: '[INST]' is a chat format's marker; of 1 records used, 1 have one in"
    for stage, option, record in (
        ("sft", "data", chat),
        ("compare", "data", {"messages": marked, "item": {"kind": "chat"}}),
        ("reward", "data", RANKING | {"prompt": marked}),
        ("reward", "reference", chat),
        ("ppo", "data", {"messages": marked}),
        ("ppo", "ptx", chat),
        ("dpo", "data", PAIR | {"prompt": marked}),
    ):
        refuses(stage, said, "give --allow-markers", **{option: lines(record)})
    let = small["sft"] | dict(data=lines(chat), allow_markers=True, length=5, out=tmp_path / "x")
    assert "no usable conversations in it (dropped: 1 longer" in run("sft.py", **let).err


def test_a_file_in_which_nothing_usable_is_left(refuses, lines, small):
    refuses(
        "sft",
        "no usable conversations in it (dropped: 3 longer than 5 tokens)",
        data=lines(CHAT, CHAT, CHAT),
        length=5,
    )
    long = "word " * 200
    with pytest.raises(ValueError, match="no usable records in it"):
        records.kind(lines(name="empty.jsonl"))
    asked = lines({"messages": tiny.user(long), "item": {"kind": "chat"}})
    for stage in ("ppo", "compare"):
        refuses(
            stage,
            "no usable prompts in it (dropped: 1 longer than 136 tokens (the context less"
            " --max-new-tokens))",
            data=asked,
        )
    refuses(
        "dpo",
        "no usable pairs in it (dropped: 1 longer than 160 tokens)",
        data=lines(PAIR | {"prompt": long}),
    )
    refuses(
        "dpo",
        "no usable records in it (dropped: 1 with chosen = rejected (first: line 1))",
        data=lines(PAIR | {"rejected": "Hot."}),
    )
    refuses(
        "reward",
        "no usable rankings in it (dropped: 1 with answers longer than 160 tokens",
        data=lines(PAIR | {"prompt": long}),
    )
    tied = lines(RANKING | {"ranks": [0, 0, 0]})
    refuses(
        "reward",
        "no usable records in it (dropped: 1 without two answers of different rank (first",
        data=tied,
    )
    refuses(
        "reward",
        "no usable reference answers in it (dropped: 1 longer than 160",
        reference=lines({"prompt": long, "completion": "a"}),
    )
    refuses("reward", "two or more reference answers were expected", reference=lines(CHAT))


def test_records_that_are_all_held_out_are_said_to_be(refuses, lines):
    """Not "no usable records" without a reason: here all share one opening, so one side."""
    asked = "question 16"
    all_held = "(held out: 3, all that share a first question lie on one side)"
    chat = {"messages": [*tiny.user(asked), {"role": "assistant", "content": "Hot."}]}
    refuses("sft", f"no usable conversations in it {all_held}", data=lines(*[chat] * 3))
    refuses(
        "ppo",
        f"no usable prompts in it {all_held}",
        data=lines(*[{"messages": tiny.user(asked)}] * 3),
    )
    for stage, what in (("dpo", "pairs"), ("reward", "rankings")):
        refuses(
            stage, f"no usable {what} in it {all_held}", data=lines(*[PAIR | {"prompt": asked}] * 3)
        )


@pytest.mark.parametrize(
    "stage, size, what",
    [
        ("sft", 6, "conversations"),
        ("reward", 6, "rankings"),
        ("ppo", 6, "prompts"),
        ("dpo", 6, "pairs"),
        ("compare", 10, "prompts"),
    ],
)
def test_used_dropped_and_held_out_are_always_said(stage, size, what, small, tmp_path, lines):
    """And a --length beyond the context, which counts in its place."""
    asked = [tiny.user(text) for text in ("question 16", "question 25", *"abcdefgh")]
    rows = {
        "sft": [{"messages": [*m, {"role": "assistant", "content": "Hot."}]} for m in asked],
        "ppo": [{"messages": m} for m in asked],
        "compare": [{"messages": m, "item": {"kind": "capital"}} for m in asked],
    }
    rows = rows.get(stage, [PAIR | {"prompt": m} for m in asked])
    options = small[stage] | {"data": lines(*rows), "iterations" if stage == "ppo" else "steps": 1}
    if stage == "compare":
        (tmp_path / "mine.py").write_text(READERS)
        options = small[stage] | {"data": lines(*rows), "labeller": f"{tmp_path}/mine.py:brief"}
    elif stage != "ppo":
        options["length"] = 999
    err = done(
        script(stage), out=tmp_path / ("out.jsonl" if stage == "compare" else "out"), **options
    ).err
    assert (
        f"x.jsonl: {size} {what} used, none dropped, {'none' if size == 10 else 4} held out\n"
        in err
    )
    said = "--length 999: the model's context is 160 tokens, what is longer is dropped\n"
    assert (said in err) == ("length" in options and stage != "ppo")


def test_a_reference_answer_of_weight_0_is_none(refuses, lines):
    chat = {"messages": [*tiny.user("Hi"), {"role": "assistant", "content": "No.", "weight": 0}]}
    refuses(
        "reward",
        "no usable reference answers in it (dropped: 2 of weight 0 or with tool calls)",
        reference=lines(chat, chat),
    )
    refuses(
        "sft", "no usable conversations in it (dropped: 2 without a target)", data=lines(chat, chat)
    )


def test_prompts_of_another_world(refuses, lines):
    for item in ({}, {"item": 7}, {"item": {"kind": "mine"}}):
        refuses(
            "compare",
            "--labeller world knows the embedded world's prompts only",
            "give FILE.py:function",
            data=lines({"messages": tiny.user("Hi")} | item),
        )


# ---------------------------------------------------------------- options
@pytest.mark.parametrize(
    "stage, said, options",
    [
        ("compare", "--k is 1, it must be at least 2", dict(k=1)),
        ("compare", "--temperature is 0.0, it must be above 0", dict(temperature=0)),
        (
            "compare",
            "--max-new-tokens 160: the model's context is 160 tokens, prompt included; give fewer",
            dict(max_new_tokens=160),
        ),
        (
            "compare",
            "--labeller wrld: world or FILE.py:function was expected",
            dict(labeller="wrld"),
        ),
        ("dpo", "--beta is -0.1, it must be above 0", dict(beta=-0.1)),
        ("dpo", "--beta is 0.0, it must be above 0", dict(beta=0)),
        ("dpo", "--label-smoothing is 0.5, it must be below 0.5", dict(label_smoothing=0.5)),
        (
            "dpo",
            "argument --loss: invalid choice: 'orpo' (choose from 'dpo', 'ipo', 'simpo', 'kto')",
            dict(loss="orpo"),
        ),
        ("simpo", "--gamma is -1.0, it must be at least 0", dict(gamma=-1)),
        ("sft", "--batch is 0, it must be at least 1", dict(batch=0)),
        ("sft", "--steps is 0, it must be at least 1", dict(steps=0)),
        ("sft", "--lr is nan, it must be a finite number", dict(lr="nan")),
        ("sft", "argument --steps: invalid int value: 'many'", dict(steps="many")),
        ("sft", "unknown option --learning-rate", dict(learning_rate=1)),
        ("sft", "unknown option --step (did you mean --steps?)", dict(step=1)),
        ("sft", "--device nonsense: not available here", dict(device="nonsense")),
        (
            "sft",
            "--seed is 99999999999999999999, it must be below 4294967296",
            dict(seed=99999999999999999999),
        ),
        ("reward", "--save-every is 0, it must be at least 1", dict(save_every=0)),
        ("ppo", "--temperature is 0.0, it must be above 0", dict(temperature=0)),
        ("ppo", "--kl-coef is -1.0, it must be at least 0", dict(kl_coef=-1)),
        ("ppo", "--lam is 1.5, it must be at most 1", dict(lam=1.5)),
        (
            "ppo",
            "--max-new-tokens 200: the model's context is 160 tokens",
            dict(max_new_tokens=200),
        ),
        ("ppo", "--minibatch is 0, it must be at least 1", dict(minibatch=0)),
        ("ppo", "--no-end-score is nan, it must be a finite number", dict(no_end_score="nan")),
        ("dpo", "--beta is inf, it must be a finite number", dict(beta="inf")),
        ("ppo", "--raw-reward is for FILE.py:function", dict(raw_reward=True)),
        ("pretrain", "--decay is 2.0, it must be at most 1", dict(decay=2)),
    ],
)
def test_impossible_options(stage, said, options, refuses):
    refuses(stage, said, **options)


def test_a_learning_rate_that_is_too_high(small, tmp_path):
    """The step that gives NaN is not saved; what was saved before it stands."""
    out = tmp_path / "sft"
    result = run("sft.py", out=out, **small["sft"] | dict(lr=1e30, warmup=0, save_every=1))
    refused(result, "sft.py: step ", " is ", "nothing saved is lost, a lower --lr may help")
    assert (
        saved_step(out / "state")
        == len((out / "state" / "metrics.jsonl").read_text().splitlines())
        < 24
    )


# --------------------------------------------------------------- a reader's own reward and labeller
@pytest.mark.parametrize("stage, option", [("compare", "labeller"), ("ppo", "reward")])
def test_a_reader_s_function_that_is_none(stage, option, refuses, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(READERS)
    refuses(
        stage, f"{file}: has no function brie (did you mean brief?)", **{option: f"{file}:brie"}
    )
    refuses(
        stage,
        f"{tmp_path}/min.py: no such file or folder (did you mean mine.py?)",
        **{option: f"{tmp_path}/min.py:brief"},
    )
    refuses(stage, "FILE.py:function was expected", **{option: file})
    refuses(
        stage,
        f"{file}:one_too_few: ",
        "finite scores, one per answer, were expected (got ",
        **{option: f"{file}:one_too_few"},
    )
    refuses(
        stage,
        f"{file}:not_a_number: ",
        "finite scores",
        "[nan, ",
        **{option: f"{file}:not_a_number"},
    )
    refuses(stage, f"{file}:5: TypeError: ", **{option: f"{file}:broken"})
    file.write_text("def brief(:")
    refuses(stage, f"{file}: SyntaxError: ", "line 1", **{option: f"{file}:brief"})


def test_a_reader_s_labeller(small, tmp_path, lines):
    """On a reader's own prompts, whatever fields they have; those that leave no room for an answer
    are dropped and counted.
    """
    (tmp_path / "mine.py").write_text(READERS)
    prompts = [{"messages": tiny.user(f"Say {i}"), "item": i} for i in range(9)] + [
        {"messages": tiny.user("word " * 200)}
    ]
    out = tmp_path / "comparisons.jsonl"
    options = small["compare"] | dict(data=lines(*prompts), labeller=f"{tmp_path}/mine.py:brief")
    result = done("compare.py", out=out, **options)
    assert "x.jsonl: 9 prompts used, dropped 1 longer than 136 tokens (the context" in result.err
    few = done("compare.py", out=tmp_path / "few.jsonl", **options | dict(prompts=4)).err
    assert "6 beyond --prompts, none held out" in few
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(r["item"] for r in made) == list(range(9)) and all(
        len(r["responses"]) == 4 for r in made
    )
    for r in made:
        lengths = [len(a) for a in r["responses"]]
        assert r["ranks"] == [sum(other < mine for other in lengths) for mine in lengths], (
            "the shortest is the best"
        )
    assert len({rank for r in made for rank in r["ranks"]}) > 2
    done("dpo.py", out=tmp_path / "dpo", **small["dpo"] | dict(data=out, steps=2))


def test_a_reader_s_reward(small, tmp_path, lines):
    (tmp_path / "mine.py").write_text(READERS)
    prompts = [
        {"messages": tiny.user(f"Say {i}"), "item": "a reader's own field"} for i in range(9)
    ]
    options = small["ppo"] | dict(
        data=lines(*prompts), reward=f"{tmp_path}/mine.py:brief", no_end_score=-7.5, iterations=2
    )
    done("ppo.py", out=tmp_path / "ppo", **options)
    for line in tiny.metrics(tmp_path / "ppo"):
        assert "gold" not in line and line["reward"] < -1
        assert line["reward"] <= (1 - line["finished"]) * -7.5 + 1e-6, (
            "finished answers have minus their length, the others no_end_score"
        )
    hub.language_model(tmp_path / "ppo")


def test_a_reader_s_labeller_that_reads_the_records(small, tmp_path, lines):
    """Each answer comes with its own record, and what the labeller changes stays with it."""
    (tmp_path / "mine.py").write_text("""def label(prompts, answers, records):
    for p, r in zip(prompts, records, strict=True):
        assert p == r["messages"] and len(p) == 1 and p[0]["content"] == f"Say {r['reference']}", p
        p.append({"role": "assistant", "content": "mine"})
        r.clear()
    return [len(a) for a in answers]
""")
    prompts = [{"messages": tiny.user(f"Say {i}"), "reference": i} for i in range(9)]
    out = tmp_path / "comparisons.jsonl"
    done(
        "compare.py",
        out=out,
        **small["compare"] | dict(data=lines(*prompts), labeller=f"{tmp_path}/mine.py:label"),
    )
    for r in map(json.loads, out.read_text().splitlines()):
        assert len(r["prompt"]) == 1 and r["prompt"][0]["content"].startswith("Say ")


def test_reference_answers_that_score_alike(small, tmp_path, refuses, lines):
    refuses("reward", "two or more reference answers were expected", reference=lines(*[CHAT] * 3))
    result = run("reward.py", zero_spread, out=tmp_path / "rm", **small["reward"] | dict(steps=1))
    refused(
        result,
        "reward.py: ",
        "the scores of the reference answers do not differ (deviation 0",
        "PPO divides by their deviation",
    )
    assert not (tmp_path / "rm" / "config.json").exists()


def zero_spread():
    """A head that has collapsed: all scores are one."""
    torch.Tensor.std = lambda x: x.new_zeros(())


def test_preference_pairs_are_ranked_already(small, tmp_path, lines):
    out = tmp_path / "comparisons.jsonl"
    done("compare.py", out=out, **small["compare"] | dict(data=lines(PAIR | {"source": "s"}, PAIR)))
    first = json.loads(out.read_text().splitlines()[0])
    assert first == {
        "prompt": tiny.user("Hot or cold?"),
        "responses": ["Hot.", "No."],
        "ranks": [0, 1],
        "source": "s",
    }


# ----------------------------------------------------------- what is there already, and a full disk
def test_what_is_there_is_not_overwritten(small, world, tmp_path):
    out = Path(copy(world / "base", tmp_path / "base"))
    before = everything(tmp_path)
    said = f"{out}: holds what no run of this stage wrote, config.json; choose another --out"
    refused(run("sft.py", out=out, overwrite=True, **small["sft"]), said)
    mine = tmp_path / "base" / "prompts.jsonl"
    shutil.copy(small["compare"]["data"], mine)
    refused(
        run("compare.py", out=mine, **small["compare"] | dict(data=mine)),
        f"{mine}: holds what no run of this stage wrote",
    )
    mine.unlink()
    refused(
        run("sft.py", out=out / "config.json", **small["sft"]),
        "state: cannot be written (",
        "Not a directory",
    )
    assert everything(tmp_path) == before


def small_disk():
    """No file may grow over 60 kB: less than a state, and than a model."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def full_at_the_end():
    """The last state fits, the checkpoint does not."""
    real = hub.save

    def save(path, *rest):
        real(path, *rest)
        os.truncate(path / "model.safetensors", 1000)
        raise OSError(28, "No space left on device", str(path))

    hub.save = save


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_a_full_disk(stage, small, tmp_path):
    """What was there stays readable, and with room again the same command goes on and gives what it
    gives with room all along.
    """
    out, options = tmp_path / "out", dict(small[stage], save_every=2)
    done(script(stage), out=out, **options)
    old = everything(out)
    options |= dict(seed=1, overwrite=True)
    full = f"{out}/state: cannot be written ("
    refused(
        run(script(stage), small_disk, out=out, **options),
        full,
        "nothing saved is lost, the same command",
    )
    assert {k: v for k, v in everything(out).items() if out / "state" not in k.parents} == old
    refused(
        run(script(stage), full_at_the_end, out=out, **options), full, "No space left on device"
    )
    assert {k: v for k, v in everything(out).items() if out / "state" not in k.parents} == old
    last = done(script(stage), out=out, **options)
    done(script(stage), out=tmp_path / "other", **options)
    assert "100%" in last.err and contents(out) == contents(tmp_path / "other")


def test_a_full_disk_for_comparisons(small, tmp_path):
    out, options = tmp_path / "comparisons.jsonl", dict(small["compare"], save_every=2)
    refused(
        run("compare.py", small_disk, out=out, **options),
        f"{tmp_path}/comparisons.jsonl.run/state: cannot be written (",
    )
    assert not out.exists()
    done("compare.py", out=out, **options)
    done("compare.py", out=tmp_path / "other.jsonl", **options)
    assert contents(out) == contents(tmp_path / "other.jsonl")


# ---------------------------------------------------------------- evaluation
def test_evaluation(world, tmp_path, lines):
    base = dict(base=world / "base")
    refused(
        run("tools/evals.py", out=tmp_path, base=tmp_path),
        "evals.py: ",
        "no stage's checkpoint in it (sft, ppo, dpo, simpo or your own)",
    )
    refused(
        run("tools/evals.py", out=tmp_path, **base), f"{tmp_path}/world/heldout.jsonl: no such file"
    )
    refused(
        run("tools/evals.py", out=tmp_path, data=lines(CHAT, BROKEN), **base),
        "x.jsonl:2: one JSON object per line was expected",
    )
    refused(
        run("tools/evals.py", out=tmp_path, data=lines(CHAT), **base),
        "x.jsonl: no usable held-out conversations in it",
    )
    refused(
        run("tools/evals.py", out=tmp_path, data=world / "sft.jsonl", base=world / "reward"),
        "reward is a reward model: a language model",
    )
    assert not (tmp_path / "results.json").exists()
