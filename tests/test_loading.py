"""Folders as the hub has them, and whoever opens one: odd JSON files, padded vocabularies, several
end tokens, damaged weights, and the programs that only read, with the base in 4 bits and the
adapter beside it."""

import copy
import gc
import json
import math
import random
import shutil
import weakref
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import stages
import tiny
import torch
from safetensors.torch import load_file, save_file
from stages import done, refused, run

from common import hub, peft, tuning
from common.run import pick_device
from data import templates, tokenizer
from model import scalar_model
from sampling import decode, generate
from tools import chat, controls, evals

GOLDEN, CPU = Path(__file__).parent / "golden", pick_device("cpu")


# ---------------------------------------------------------------- JSON files
WRONG = [
    None,
    True,
    -1,
    0,
    10**30,
    math.nan,
    math.inf,
    0.5,
    "x",
    "",
    [],
    {},
    [[]],
    [None],
    {"a": None},
    ["x"],
    "\ud800",
]
DEEP = [400, 2000, 100_000]


def places(said, at=()):
    """The place of every value in a JSON file; of long lists and tables the first ones and the last
    ones.
    """
    yield at
    items = list(
        said.items()
        if isinstance(said, dict)
        else enumerate(said)
        if isinstance(said, list)
        else ()
    )
    for key, value in items if len(items) < 40 else items[:2] + items[-2:]:
        yield from places(value, (*at, key))


def spoilt(said, at):
    """The file with wrong values at one place (a few, others at each), without the value, and with
    one nested deeply.
    """
    for value in [*random.Random(str(at)).sample(WRONG, 3), "@"]:
        new = [copy.deepcopy(said)]
        inside = new
        for key in (0, *at)[:-1]:
            inside = inside[key]
        last = (0, *at)[-1]
        inside[last] = value
        if value == "@":
            yield from (
                json.dumps(new[0]).replace('"@"', "[" * n + "]" * n)
                for n in (DEEP if len(at) < 2 else [])
            )
        else:
            yield json.dumps(new[0])
    if at:
        del inside[last]
        yield json.dumps(new[0])


def test_whatever_a_json_file_says_is_read_or_refused_in_one_line(tmp_path):
    def whole(folder):
        model, tok = hub.load(folder)
        if tok is not None:
            (
                templates.of(tok),
                templates.end_ids(tok, model.config),
                tok.bos_id,
                tok.eos_id,
                tok.pad_id,
            )
        hub.token_ids(model.config, tok)

    tiny.folder(tmp_path / "model")
    hub.save(tmp_path / "reward", scalar_model(tiny.lm()), tiny.chat_tokenizer())
    stages.copy(GOLDEN / "llama_biases", tmp_path / "shards")
    base = hub.load(GOLDEN / "llama_tied")[0]
    stages.copy(GOLDEN / "peft_prompt", tmp_path / "prompt")
    stages.copy(GOLDEN / "lora_list", tmp_path / "lora")
    for file, read in (
        ("model/config.json", whole),
        ("model/tokenizer.json", whole),
        ("model/tokenizer_config.json", whole),
        ("model/generation_config.json", whole),
        ("reward/config.json", whole),
        ("shards/model.safetensors.index.json", whole),
        ("prompt/adapter_config.json", lambda at: peft.load_adapter(copy.deepcopy(base), at)),
        ("lora/adapter_config.json", lambda at: peft.load_adapter(copy.deepcopy(base), at)),
    ):
        file = tmp_path / file
        text = file.read_text()
        for at in places(json.loads(text)):
            for wrong in spoilt(json.loads(text), at):
                file.write_text(wrong)
                try:
                    read(file.parent)
                except (ValueError, FileNotFoundError) as e:
                    assert (
                        "\n" not in str(e)
                        and str(file.parent) in str(e)
                        or "chat template is none of" in str(e)
                        or "needs the special token <|im_start|>" in str(e)
                    ), (at, e)
                except BaseException as e:
                    raise AssertionError(
                        f"{file.name}: {at}: {type(e).__name__} of {wrong[:300]}"
                    ) from e
        file.write_text(text)


SAID = {
    ("tokenizer.json", "[]"): r"tokenizer.json: the file is \[\], an object was expected",
    (
        "tokenizer.json",
        '{"model": {"merges": []}, "decoder": {"type": "ByteLevel"}, "added_tokens": [{"id": 3}]}',
    ): "added token 1 is",
    (
        "tokenizer_config.json",
        '{"chat_template": {"a": "b"}}',
    ): 'chat_template is {"a": "b"}, a text or a list of named ones',
    (
        "tokenizer_config.json",
        '["a"]',
    ): "tokenizer_config.json holds a list, an object was expected",
    ("config.json", "[" * 100_000): "config.json is not JSON",
}


@pytest.mark.parametrize("file, text", SAID)
def test_an_odd_file_is_named_with_what_was_expected(file, text, tmp_path):
    tiny.folder(tmp_path / "m")
    (tmp_path / "m" / file).write_text(text)
    with pytest.raises(ValueError, match=SAID[file, text]):
        hub.load(tmp_path / "m")


# ----------------------------------------------- ids without a token, several ends, damaged weights
def padded(folder, rows=300):
    """A folder whose embedding has more rows than its tokenizer tokens (280), the spare ones
    likely.
    """
    model = tiny.lm(1, vocab_size=rows)
    with torch.no_grad():
        model.lm_head.weight[280:] = 10 * model.norm.weight
    hub.save(folder, model, tiny.chat_tokenizer())
    return str(folder)


@pytest.mark.parametrize("temperature, top_p", ((0, 1), (1, 1), (1, 0.9)))
def test_a_spare_id_is_never_sampled(temperature, top_p, tmp_path):
    model, tok = hub.load(padded(tmp_path / "m"))
    assert model.spare.tolist() == list(range(280, 300))
    prompts = [tok.encode(f"{i} and two?") for i in range(32)]
    told = generate(model, prompts, 8, temperature, top_p)
    assert all(i < 280 for a in told for i in a) and all(map(tok.decode, told))
    model.spare = None
    # what the mask is there for
    assert any(i >= 280 for a in generate(model, prompts, 8, temperature, top_p) for i in a)
    assert hub.load(tiny.folder(tmp_path / "full"))[0].spare is None


def test_a_gap_among_the_ids(tmp_path):
    spec = json.loads(tiny.chat_tokenizer().json)
    for token in spec["added_tokens"]:
        spec["model"]["vocab"].pop(token["content"], None)
        token["id"] += 5
    gappy = tokenizer.Tokenizer(json.dumps(spec), tiny.chat_tokenizer().config)
    assert gappy.vocab_size == 285 and len(gappy.ids) == 280
    with pytest.raises(
        ValueError, match="cannot decode token 278: the tokenizer has the ids 0 to 284, with gaps"
    ):
        gappy.decode([65, 278])
    hub.save(tmp_path, tiny.lm(vocab_size=285), gappy)
    model, tok = hub.load(tmp_path)
    assert (
        model.spare.tolist() == list(range(277, 282))
        and tok.decode([*tok.encode("a"), 284]) == "a<|im_end|>"
    )
    assert tok.hash == gappy.hash != tiny.chat_tokenizer().hash
    spec["added_tokens"][0]["id"] = spec["added_tokens"][1]["id"]
    with pytest.raises(ValueError, match="two tokens have the id 283"):
        tokenizer.Tokenizer(json.dumps(spec))


def test_an_answer_ends_at_any_of_the_config_s_end_ids(tmp_path):
    """And its text is what stands before; the format's own end is one of them always."""
    full_stop = tiny.chat_tokenizer().encode(".")[0]
    model, tok = hub.load(tiny.folder(tmp_path / "m", 2, eos_token_id=[277, full_stop]))
    ends = templates.end_ids(tok, model.config)
    assert ends == [279, 277, full_stop]
    for named, all_of_them in ((None, [279]), (277, [279, 277]), ([279], [279])):
        model.config.eos_token_id = named
        assert templates.end_ids(tok, model.config) == all_of_them
    generation = tmp_path / "m" / "generation_config.json"  # where a chat model's ends may stand
    for own, theirs, both in (
        (277, [279, 277], [277, 279]),
        (None, 279, 279),
        ([277], None, [277]),
    ):
        for file, given in ((generation, theirs), (tmp_path / "m" / "config.json", own)):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": given}))
        assert hub.read_config(tmp_path / "m").eos_token_id == both
    model.config.eos_token_id = [277, full_stop]
    with torch.no_grad():
        model.lm_head.weight[[full_stop, 279]] = 0.3 * model.norm.weight
    prompts = [
        templates.render(tok, tiny.user(f"{i}?"), add_generation_prompt=True)[0] for i in range(40)
    ]
    free, told = (generate(model, prompts, 12, seed=3, eos_id=e) for e in (None, ends))
    for whole, part in zip(free, told, strict=True):
        first = next((n for n, i in enumerate(whole) if i in ends), 99)
        assert part == whole[: first + 1]
    texts, finished = templates.read_answers(tok, told, ends)
    assert {a[-1] for a, f in zip(told, finished, strict=True) if f} >= {
        279,
        full_stop,
    } and not all(finished)
    assert all(
        t == tok.decode(a[: len(a) - f], skip_special=True)
        for t, a, f in zip(texts, told, finished, strict=True)
    )
    assert generate(model, prompts[:4], 12, seed=3, eos_id=279) == generate(
        model, prompts[:4], 12, seed=3, eos_id=[279]
    )
    o = evals.Options(max_new_tokens=12, device="cpu")
    for text, ids, ended in evals.answer(
        model, tok, [tiny.user(f"{i}?") for i in range(40)], o, 1.0, 0
    ):
        assert (
            ended == (ids[-1] in ends)
            and not set(ids[:-1]) & set(ends)
            and not (ended and text.endswith("."))
        )


def damage(folder, value=math.nan):
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = value
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_logits_that_are_not_finite_are_an_error(value, small, tmp_path):
    folder = stages.copy(Path(small["dpo"]["model"]), tmp_path / "m")
    damage(folder, value)
    model, tok = hub.load(folder)
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="logits of an answer's token 1 are NaN or infinite"):
            next(decode(model, [[1, 2]], 4, temperature))
    if math.isinf(value):
        return
    refused(
        run("compare.py", out=tmp_path / "c.jsonl", **small["compare"] | dict(model=folder)),
        "NaN or infinite",
    )
    for call in (
        lambda: evals.score_texts(scalar_model(model), tok, [tiny.user("a")], ["b"]),
        lambda: evals.answer_logps(model, tok, [tiny.user("a")], ["b"]),
        lambda: evals.held_out_losses(
            model,
            tok,
            [{"messages": tiny.user("a") + [{"role": "assistant", "content": "b"}]}],
        ),
    ):
        with pytest.raises(ValueError, match="are NaN or infinite: the weights are damaged"):
            call()


def test_results_hold_no_figure_that_is_none(tmp_path):
    old = tmp_path / "results.json"
    old.write_text("old")
    with pytest.raises(ValueError, match="sft's gold_sampled would be nan: not written"):
        evals.write_results(old, {"perfect": 1.8, "sft": {"n": 3, "gold_sampled": math.nan}})
    assert old.read_text() == "old"
    evals.write_results(old, {"perfect": 1.8, "sft": {"decided": None}})
    assert json.loads(old.read_text()) == {"perfect": 1.8, "sft": {"decided": None}}


# ------------------------------------------------ what compare.py writes, and the evaluation scores
def test_a_record_s_own_fields_never_replace_what_is_written(small, tmp_path):
    """A chat of UltraChat's has a `prompt` beside its messages; any other field that a ranking has
    is left out as well.
    """
    (tmp_path / "mine.py").write_text(
        "def brief(prompts, answers): return [-len(a) for a in answers]"
    )
    own, out = (
        {"prompt": "another", "finished": True, "ids": [[1]], "tokenizer": "mine"},
        tmp_path / "c.jsonl",
    )
    prompts = [{"messages": tiny.user(f"Say {i}"), "prompt_id": i, **own} for i in range(4)]
    data = tiny.write(tmp_path / "x.jsonl", prompts)
    result = done(
        "compare.py",
        out=out,
        **small["compare"] | dict(data=data, labeller=f"{tmp_path}/mine.py:brief"),
    )
    assert "x.jsonl: its fields finished, ids, prompt, tokenizer are left out" in result.err
    tok = tokenizer.Tokenizer.load(small["compare"]["model"])
    end = templates.end_id(tok)
    for r in map(json.loads, out.read_text().splitlines()):
        assert r["prompt"] == tiny.user(f"Say {r['prompt_id']}") and r["tokenizer"] == tok.hash
        assert (
            r["finished"] == [a[-1] == end for a in r["ids"]]
            and len(r["responses"]) == len(r["ranks"]) == 4
        )
        assert r["responses"] == [tok.decode(a, skip_special=True) for a in r["ids"]]


def test_sampled_answers_are_scored_by_their_very_ids():
    """A cut one has no end, and is no other answer for being decoded and encoded."""
    tok, model = tiny.chat_tokenizer(), scalar_model(tiny.lm(), torch.Generator().manual_seed(0))
    half = tok.encode("\u20ac")[:-1]
    prompt = templates.render(tok, tiny.user("a"), add_generation_prompt=True)[0]
    (score,) = evals.score_texts(model, tok, [tiny.user("a")], [tok.decode(half)], [half])
    assert score == pytest.approx(model(torch.tensor([prompt + half]))[0, -1].item(), abs=1e-5)
    assert score != pytest.approx(
        evals.score_texts(model, tok, [tiny.user("a")], [tok.decode(half)])[0], abs=1e-3
    )


# ---------------------------------------------------------------- programs that only read
LORA = dict(lora=4, targets="all,lm_head", quant="nf4")
KEEP = dict(quant="nf4", keep_base=True)


@pytest.fixture(scope="module")
def chain(small, tmp_path_factory):
    """An OUT folder of QLoRA: every stage's adapter on one 4-bit base. On the CPU, for what is
    compared with it: a GPU's is merged in bf16."""
    out, on_cpu = tmp_path_factory.mktemp("chain"), dict(device="cpu")
    done("sft.py", out=out / "sft", **small["sft"] | LORA | dict(steps=30, lr=0.02) | on_cpu)
    mine = dict(model=out / "sft") | KEEP | on_cpu
    done("compare.py", out=out / "comparisons.jsonl", **small["compare"] | mine)
    done(
        "reward.py",
        out=out / "reward",
        **small["reward"] | mine | dict(data=out / "comparisons.jsonl", steps=4),
    )
    done(
        "dpo.py",
        out=out / "dpo",
        **small["dpo"] | mine | dict(data=out / "comparisons.jsonl", steps=4),
    )
    (out / "world").mkdir()
    for name in ("heldout.jsonl", "sft.jsonl"):
        stages.copy(Path(small["sft"]["data"]).parent / name, out / "world" / name)
    return out


@torch.no_grad()
def test_what_reads_holds_what_was_trained(chain, small):
    """With --keep-base --quant nf4 the 4-bit base and the adapter as they were trained; merged
    weights quantised again are others.
    """
    tokens = torch.randint(400, (2, 20), generator=torch.Generator().manual_seed(0))
    o = chat.Options(**KEEP)
    trained, _ = tuning.start(argument(model=chain / "sft", **KEEP), CPU)
    model, tok = tuning.read(o, chain / "sft", CPU)
    assert torch.equal(model(tokens), trained(tokens)) and not any(
        p.requires_grad for p in model.parameters()
    )
    again, _ = tuning.read(replace(o, keep_base=False), chain / "sft", CPU)
    assert not torch.allclose(again(tokens), trained(tokens), atol=1e-3)
    merged = hub.load(chain / "sft")[0]
    assert (
        merged(tokens) - model(tokens)
    ).abs().max() < 1e-4 and model.config.eos_token_id == merged.config.eos_token_id
    scorer, _ = tuning.read(o, chain / "reward", CPU, reward=True)
    assert (hub.load(chain / "reward")[0](tokens) - scorer(tokens)).abs().max() < 1e-4
    assert scorer.config.reward_std == hub.read_config(chain / "reward").reward_std
    wrong = (
        ("reward", False, "a language model was expected"),
        ("sft", True, "a reward model was expected"),
    )
    for path, reward, words in wrong:
        with pytest.raises(ValueError, match=words):
            tuning.read(o, chain / path, CPU, reward)
    with pytest.raises(FileNotFoundError, match="has no adapter: --keep-base"):
        tuning.read(o, small["sft"]["model"], CPU)


def argument(**changes):
    o = dict(
        lora=0,
        alpha=0.0,
        targets="all",
        quant="none",
        paged=False,
        checkpointing=False,
        compile="auto",
        keep_base=False,
        seed=0,
    )
    return Namespace(**o | changes)


@pytest.mark.parametrize("way", ({}, dict(quant="nf4"), KEEP))
def test_evaluation_and_controls_hold_one_model_at_a_time(way, chain, small, monkeypatch):
    """Whatever the way in which it is read; the base has no adapter, with --keep-base either."""
    real, alive, most = tuning.read, [], []

    def read(o, path, *rest, **more):
        gc.collect()
        most.append(sum(m() is not None for m in alive))
        model, tok = real(o, path, *rest, **more)
        alive.append(weakref.ref(model))
        return model, tok

    monkeypatch.setattr(tuning, "read", read)
    base = small["sft"]["model"]
    evals.evaluate(
        evals.Options(out=str(chain), base=base, n=4, max_new_tokens=6, device="cpu", **way)
    )
    results = json.loads((chain / "results.json").read_text())
    assert list(results) == ["perfect", "base", "sft", "dpo", "reward", "measures"]
    assert results["sft"]["kl_vs_sft"] == 0 != results["dpo"]["kl_vs_sft"]
    assert most == [0] * 5
    most.clear()

    def again(script, out, of, **_):
        shutil.copytree(chain / "dpo" if "ppo" in script else of, out, dirs_exist_ok=True)

    monkeypatch.setattr(controls, "run", again)
    controls.controls(controls.Options(out=str(chain), n=4, max_new_tokens=6, device="cpu", **way))
    said = json.loads((chain / "controls.json").read_text())
    assert (
        said["good_answers"]["kl_vs_sft"] == 0
        and said["shuffled"]["kl_vs_sft"] == said["dpo_nll"]["kl_vs_sft"] != 0
    )
    assert most == [0] * 6


@pytest.mark.parametrize("way", ({}, KEEP))
def test_where_there_is_bf16_the_weights_are_read_in_it(way, chain, monkeypatch):
    """As on a GPU: half the memory, and about the same figures."""
    o = chat.Options(device="cpu", **way)
    wide = [tuning.read(o, chain / "dpo", CPU), tuning.read(o, chain / "reward", CPU, reward=True)]
    monkeypatch.setattr(tuning, "has_bf16", lambda device: True)
    half = [tuning.read(o, chain / "dpo", CPU), tuning.read(o, chain / "reward", CPU, reward=True)]
    assert all(
        m.embed_tokens.weight.dtype == m.norm.weight.dtype == torch.bfloat16 for m, _ in half
    )
    held = [{"messages": tiny.user("hello")}]
    answers = evals.answer(*half[0], [held[0]["messages"]], evals.Options(max_new_tokens=6), 1.0, 0)
    one, two = (
        sum(evals.token_logps(m, tok, held, answers)[0][0].tolist())
        for m, tok in (wide[0], half[0])
    )
    assert one == pytest.approx(two, abs=0.3) and one != two
    one, two = (
        evals.score_texts(m, tok, [tiny.user("a")], ["b"])[0] for m, tok in (wide[1], half[1])
    )
    assert one == pytest.approx(two, abs=0.1)


def test_a_talk_with_the_four_bit_base_and_its_adapter(chain, capsys):
    o = chat.Options(model=str(chain / "dpo"), max_new_tokens=6, device="cpu", **KEEP)
    model, tok = chat.load(o)
    talk = tiny.user("hello")
    chat.answer(model, tok, o, talk, {279}, 0)
    assert any(
        isinstance(m, hub.Linear4bit) for m in model.modules()
    ) and capsys.readouterr().out.endswith("\n")
