"""Benchmarks' records, and evals.py --task on tiny checkpoints: each kind, one model or two."""

import json
import math
import random
import sys
import types

import pytest
import torch
from stages import refused, run
from tiny import chat_tokenizer, folder, lm, user, write

import metrics
import sft
from common import hub, tuning
from data import benchmarks
from metrics import mean
from model import nll
from tools import evals, tasks

# ---------------------------------------------------------------- records
SWAG = {
    "ctx_a": "A man sits [note] down.",
    "ctx_b": "he",
    "ctx": "A man sits [note] down. he",
    "activity_label": "Cooking",
    "endings": ["eats [title] now.", "flies."],
    "label": "1",
}
SHAPES = {
    "ours": (
        {"query": "One plus one is", "choices": ["two", "three"], "gold": 0},
        ("One plus one is", ["two", "three"], 0),
    ),
    "hellaswag": (SWAG, ("Cooking: A man sits down. He", ["eats. now.", "flies."], 1)),
    "hellaswag, short": (
        {"ctx": "A man", "endings": ["eats.", "flies."], "label": 0},
        ("A man", ["eats.", "flies."], 0),
    ),
    "mmlu": (
        {"question": " Which? ", "choices": ["x", "y", "z", "w"], "answer": 2, "subject": "s"},
        ("Which?\nA. x\nB. y\nC. z\nD. w\nAnswer:", ["A", "B", "C", "D"], 2),
    ),
    "arc": (
        {
            "question": "Which?",
            "choices": {"text": ["x", "y"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        ("Question: Which?\nAnswer:", ["x", "y"], 1),
    ),
    "piqa": (
        {"goal": "Open it", "sol1": "Pull.", "sol2": "Push.", "label": 1},
        ("Question: Open it\nAnswer:", ["Pull.", "Push."], 1),
    ),
    "copa": (
        {
            "premise": "It rained.",
            "choice1": "The road dried.",
            "choice2": "I got wet.",
            "question": "effect",
            "label": 1,
        },
        ("It rained therefore", ["the road dried.", "i got wet."], 1),
    ),
    "winogrande": (
        {
            "sentence": "Ann thanked Bo because _ had helped.",
            "option1": "Ann",
            "option2": "Bo",
            "answer": "2",
        },
        (["Ann thanked Bo because Ann", "Ann thanked Bo because Bo"], ["had helped."] * 2, 1),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_of_choices(name, tmp_path):
    record, (query, choices, gold) = SHAPES[name]
    kind, (item,) = benchmarks.items(write(tmp_path / "t.jsonl", [record]))
    assert kind == "choices" and item == {"query": query, "choices": choices, "gold": gold}


def test_other_kinds_are_known_by_their_fields(tmp_path):
    def read(*rows):
        return benchmarks.items(write(tmp_path / "t.jsonl", rows))

    kind, found = read({"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"})
    assert kind == "labels" and [x["gold"] for x in found] == [1, 0]
    assert found[0]["choices"] == ["neg", "pos"] and found[0]["query"] == "good\nLabel:"
    kind, (found, _) = read(
        {"instruction": "Say.", "input": "x", "label": 1}, {"input": "", "label": 0}
    )
    assert kind == "labels" and found["query"] == "Say.\n\nx\nLabel:"
    kind, found = read(
        {"prompt": "hi", "reference": "you"}, {"prompt": "a", "references": ["b", "c"]}
    )
    assert kind == "references" and [x["references"] for x in found] == [["you"], ["b", "c"]]
    squad = {
        "context": "C.",
        "question": "Q?",
        "answers": {"text": ["a", "b"], "answer_start": [1]},
    }
    kind, (found,) = read(squad)
    assert kind == "references" and found["messages"] == user("C.\n\nQ?")
    kind, (found,) = read({"instruction": "hi", "input": "", "output": "you"})
    assert (kind, found["references"], found["messages"]) == ("references", ["you"], user("hi"))
    assert read({"text": "all of it"}) == ("text", [{"text": "all of it"}])


HUMAN_EVAL = {
    "task_id": "x/0",
    "prompt": "import math\n\n\ndef f(x):\n    '''Root.'''\n",
    "entry_point": "f",
    "canonical_solution": "    return math.sqrt(x)\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}
MBPP = {
    "text": "Add one.",
    "code": "def g(x):\n    return x + 1",
    "test_list": ["assert g(1) == 2", "assert g(2) == 3"],
    "test_setup_code": "z = 0",
}


def passes(record, said, chat=False) -> bool:
    (item,) = [benchmarks.code_item(record)]
    program, test = benchmarks.program(item, said, chat)
    try:
        exec(program + "\n" + test, {})  # the test's own words
    except Exception:
        return False
    return True


def test_programs_of_human_eval_and_mbpp():
    body = "\n" + HUMAN_EVAL["canonical_solution"]
    assert passes(HUMAN_EVAL, body) and passes(HUMAN_EVAL, body + "\n\nprint(1 / 0)\n")
    assert not passes(HUMAN_EVAL, "\n    return None\n")
    whole = "Sure!\n```python\ndef f(x):\n    return math.sqrt(x)\n```\nIt is done: 1 / 0"
    assert passes(HUMAN_EVAL, whole, chat=True)
    assert passes(HUMAN_EVAL, "    return math.sqrt(x)", chat=True)
    assert passes(MBPP, MBPP["code"] + "\nassert g(1) == 0\n")
    assert not passes(MBPP, "def g(x):\n    return x")
    assert passes(MBPP, f"```\n{MBPP['code']}\n```", chat=True)
    assert not passes(MBPP, "")
    item = benchmarks.code_item(MBPP)
    assert item["prompt"] == '"""\nAdd one.\nassert g(1) == 2\n"""\n' and "g(2)" in item["asked"]


@pytest.mark.parametrize(
    "record, words",
    [
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "right one's place"),
        ({"query": "q", "choices": ["a", ""], "gold": 0}, "two or more choices"),
        (SWAG | {"label": ""}, "right one's place"),
        ({"prompt": "x", "reference": 3}, "reference: a string or several"),
        ({"foo": 1}, "fields of a task were expected: query choices gold;"),
        ({"text": "x", "label": None}, "label: a word or a number"),
        (HUMAN_EVAL | {"test": None}, "test: a string was expected"),
        (["x"], "fields of a task were expected"),
        ({"answers": {"text": ["a"]}, "question": "q"}, "the field 'context' was expected"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(record, words, tmp_path):
    file = write(tmp_path / "t.jsonl", [record])
    with pytest.raises(ValueError, match=f"t.jsonl:1: .*{words}"):
        benchmarks.items(file)


def test_examples_stand_before_the_question():
    item = {"query": "1+1=", "choices": ["2", "3"], "gold": 0}
    blank = {"query": ["a x", "a y"], "choices": ["b", "b"], "gold": 1}
    assert benchmarks.with_examples(item, ["Q 4"])["query"] == "Q 4\n\n1+1="
    assert benchmarks.with_examples(blank, ["Q"])["query"] == ["Q\n\na x", "Q\n\na y"]
    assert (benchmarks.solved(item), benchmarks.solved(blank)) == ("1+1= 2", "a y b")


# ---------------------------------------------------------------- models
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    at = tmp_path_factory.mktemp("models")
    return [folder(at / name, seed) for name, seed in (("one", 1), ("two", 2))]


def options(tmp_path, models, task, **changes):
    given = dict(out=str(tmp_path / "out"), model=models[0], task=task, device="cpu", batch=4)
    return evals.Options(**given | dict(max_new_tokens=5, n=100) | changes)


def answers(tmp_path, model="one"):
    (file,) = (tmp_path / "out" / "tasks" / "t").glob(f"*-{model}.????????.jsonl")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def arithmetic(n):
    rng, words = random.Random(3), "one two three a b and the cat hi you no yes".split()
    rows = [{"query": f"{i} and {i % 7} is", "choices": rng.sample(words, 3)} for i in range(n)]
    return [row | {"gold": rng.randrange(3)} for row in rows]


def test_choices_of_two_models_item_by_item(models, tmp_path):
    rows = arithmetic(21)
    o = options(tmp_path, models, write(tmp_path / "t.jsonl", rows), against=models[1])
    result = evals.evaluate(o)
    every = {}
    for side, path in zip(("model", "against"), models, strict=True):
        found = metrics.multiple_choice(*hub.load(path), rows)
        accs = [float(x["choice"] == r["gold"]) for x, r in zip(found, rows, strict=True)]
        norm = [float(x["choice_norm"] == r["gold"]) for x, r in zip(found, rows, strict=True)]
        assert (result[side]["acc"], result[side]["acc_norm"]) == (mean(accs), mean(norm))
        assert result[side]["n"] == 21 and result[side]["acc_ci"] == metrics.bootstrap(accs)
        every[side] = accs
    d = result["difference"]
    assert (d["acc"], d["acc_ci"]) == metrics.paired_bootstrap(*every.values())
    assert d["acc_p"] == metrics.sign_test(*every.values())
    assert d["acc_better"] - d["acc_worse"] == sum(every["model"]) - sum(every["against"])
    assert d["acc_better"] and d["acc_worse"]
    (file,) = (tmp_path / "out" / "tasks" / "t").glob("*.json")
    assert json.loads(file.read_text()) == result
    assert result["seed"] == 0 and result["command"].startswith("python -m tools.evals")
    assert [x["query"] for x in answers(tmp_path)] == [r["query"] for r in rows]


def test_fewer_records_are_drawn_and_the_examples_are_others(models, tmp_path):
    task = write(tmp_path / "t.jsonl", arithmetic(30))
    _, items = tasks.read(options(tmp_path, models, task, n=8, shots=2))
    heads = {x["query"].rpartition("\n\n")[0] for x in items}
    (head,) = heads
    assert len(items) == 8 and head.count("\n\n") == 1
    asked = [x["query"].rpartition("\n\n")[2] for x in items]
    assert not any(q in head for q in asked) and asked == sorted(
        asked, key=lambda q: int(q.split()[0])
    )
    _, others = tasks.read(options(tmp_path, models, task, n=8, shots=2, seed=1))
    assert {x["query"] for x in others} != {x["query"] for x in items}


def test_labels(models, tmp_path):
    rows = [{"text": f"text {i}", "label": "ab c"[i % 3 : i % 3 + 1] * 2} for i in range(12)]
    rows = [r | {"label": r["label"].strip() or "none"} for r in rows]
    result = evals.evaluate(options(tmp_path, models, write(tmp_path / "t.jsonl", rows), chat=True))
    lines = answers(tmp_path)
    labels, said = [r["label"] for r in rows], [x["predicted"] for x in lines]
    assert result["model"]["accuracy"] == metrics.accuracy(labels, said)
    assert result["model"]["macro_f1"] == metrics.macro_f1(labels, said)
    assert {*said} <= {*labels} and "acc_norm" not in result["model"]


def test_references_keep_the_answers(models, tmp_path):
    rows = [{"prompt": f"say {i}", "references": ["one", "two three"]} for i in range(6)]
    rows.append({"prompt": "long " * 60, "reference": "x"})  # beyond the context
    result = evals.evaluate(options(tmp_path, models, write(tmp_path / "t.jsonl", rows)))["model"]
    *lines, last = answers(tmp_path)
    assert last is None and (result["n"], result["too_long"]) == (6, 1)
    model, tok = hub.load(models[0])
    expected = evals.answer(
        model, tok, [user(f"say {i}") for i in range(6)], evals.Options(max_new_tokens=5), 0.0, 0
    )
    assert [x["answer"] for x in lines] == [text for text, *_ in expected]
    line = dict(lines[0], answer="two")
    again = tasks.references.__globals__["metrics"].rouge("two", "two three")["rouge1"]["fmeasure"]
    assert again == 2 / 3 and line["references"] == ["one", "two three"]
    assert result["rougeL"] == mean([x["rougeL"] for x in lines])
    assert set(tasks.FIGURES["references"]) <= set(lines[0])


def test_the_best_of_several_references_counts(monkeypatch):
    said = [{"prompt": [], "answer": "two", "finished": True}]
    monkeypatch.setattr(tasks, "answers", lambda *_: [dict(x) for x in said])
    (line,) = tasks.references(
        None, None, [{"references": ["two three", "The two!", "one"]}], None, 0
    )
    assert line["exact_match"] == line["token_f1"] == 1.0 and line["rouge1"] == 2 / 3


def test_perplexity_of_texts_in_windows(models, tmp_path):
    rows = [{"text": "what is one and two"}, {"text": "é " * 150}, {"text": "a"}]
    result = evals.evaluate(options(tmp_path, models, write(tmp_path / "t.jsonl", rows)))["model"]
    model, tok = hub.load(models[0])
    begin = tok.eos_id if tok.bos_id is None else tok.bos_id
    total, tokens = 0.0, 0
    for row in rows:
        ids = tok.encode(row["text"])
        tokens += len(ids)
        for at in range(0, len(ids), model.context - 1):
            part = torch.tensor([[begin, *ids[at : at + model.context - 1]]])
            total += nll(model, part, part, torch.zeros_like(part)).sum().item()
    size = sum(len(r["text"].encode()) for r in rows)
    assert tokens > 150 and result["perplexity_per_token"] == pytest.approx(
        math.exp(total / tokens)
    )
    assert result["perplexity_per_byte"] == pytest.approx(math.exp(total / size))


def test_a_reader_s_function_scores_answers(models, tmp_path):
    data = write(tmp_path / "d.jsonl", [{"prompt": f"say {i}", "reference": i} for i in range(5)])
    own = tmp_path / "t.py"
    own.write_text(
        "def f(prompts, answers, records):\n    return [r['reference'] for r in records]\n"
    )
    o = options(tmp_path, models, f"{own}:f", data=data)
    assert evals.evaluate(o)["model"]["score"] == 2 and answers(tmp_path)[3]["score"] == 3


def sandbox(monkeypatch, passes):
    """A sandbox that runs nothing: program i passes where passes(i) → the list that gets (program,
    tests) of each."""
    seen = []

    def check(pairs, confined):
        for i, pair in enumerate(pairs):
            seen.append(pair)
            status = "passed" if passes(i) else "failed"
            yield types.SimpleNamespace(passed=passes(i), status=status, output="")

    fake = types.SimpleNamespace(check=check)
    monkeypatch.setitem(sys.modules, "tools.sandbox", fake)
    monkeypatch.setattr(sys.modules["tools"], "sandbox", fake, raising=False)
    return seen


def test_any_special_token_ends_a_program(monkeypatch):
    """A base model need not end its text as a chat's answer ends."""
    tok, model = chat_tokenizer(), lm()

    def generate(model, prompts, *_, eos_id, **__):
        said = tok.encode("    return x") + [tok.special["<|im_start|>"]] + tok.encode("user")
        end = next((i + 1 for i, token in enumerate(said) if token in eos_id), len(said))
        return [said[:end] for _ in prompts]

    monkeypatch.setattr("tools.answers.generate", generate)
    seen, o = sandbox(monkeypatch, bool), evals.Options(samples=1, max_new_tokens=20)
    (line,) = tasks.programs(model, tok, [benchmarks.code_item(HUMAN_EVAL)], o, 0)
    assert line["answers"] == ["    return x"] and "user" not in seen[0][0]
    (line,) = tasks.answers(model, tok, [{"messages": user("hi")}], o, 0)
    assert line["answer"] == "    return xuser"  # a chat's answer ends at its own token


def test_code_runs_after_it_is_allowed_and_apart(models, tmp_path, monkeypatch):
    task = write(tmp_path / "t.jsonl", [HUMAN_EVAL | {"task_id": f"x/{i}"} for i in range(3)])
    with pytest.raises(ValueError, match="--allow-code-execution lets it"):
        evals.evaluate(options(tmp_path, models, task))
    seen = sandbox(monkeypatch, lambda i: i % 12 < 3)
    o = options(tmp_path, models, task, allow_code_execution=True, samples=12)
    result = evals.evaluate(o)["model"]
    assert result["pass@1"] == pytest.approx(3 / 12)
    assert result["pass@10"] == metrics.pass_at_k(12, 3, 10) and "pass@100" not in result
    lines = answers(tmp_path)
    assert len(seen) == 36 and all(test.endswith("check(f)\n") for _, test in seen)
    assert [len(x["answers"]) for x in lines] == [12] * 3 and len({*lines[0]["answers"]}) > 1


def test_what_is_there_is_read_and_what_is_missing_made(models, tmp_path, capsys):
    task = write(tmp_path / "t.jsonl", arithmetic(11))
    whole = evals.evaluate(options(tmp_path, models, task))
    (file,) = (tmp_path / "out" / "tasks" / "t").glob("*.jsonl")
    text = file.read_text("utf-8")
    capsys.readouterr()
    assert evals.evaluate(options(tmp_path, models, task)) == whole
    assert "finished already" in capsys.readouterr().err
    lines = text.splitlines(keepends=True)
    lines[0] = lines[0].replace('"gold"', '"kept": 1, "gold"')
    file.write_text("".join(lines[:6]) + lines[6][:20], "utf-8")  # cut off within a batch of 4
    assert evals.evaluate(options(tmp_path, models, task)) == whole
    again = file.read_text("utf-8").splitlines(keepends=True)
    assert '"kept"' in again[0] and again[1:] == text.splitlines(keepends=True)[1:]
    evals.evaluate(options(tmp_path, models, task, n=5))  # another question, another file
    assert len(list(file.parent.glob("*.jsonl"))) == 2 and file.read_text("utf-8") == "".join(again)


def test_a_4_bit_model_is_another(models, tmp_path):
    wide = folder(tmp_path / "wide", 1, hidden_size=64, intermediate_size=64)
    task = write(tmp_path / "t.jsonl", arithmetic(8))
    evals.evaluate(options(tmp_path, [wide], task))
    evals.evaluate(options(tmp_path, [wide], task, quant="nf4"))
    one, two = sorted((tmp_path / "out" / "tasks" / "t").glob("*.jsonl"))
    a, b = (json.loads(f.read_text().split("\n")[0])["logprobs"] for f in (one, two))
    assert a != b and a == pytest.approx(b, rel=0.3)


def test_an_adapter_is_read_on_its_base(tmp_path):
    """--keep-base: the choices of the merged model, which 4 bits would round again; --against the
    base, which has no adapter: read plainly."""
    base, own = folder(tmp_path / "base", 1, hidden_size=64, intermediate_size=64), tmp_path / "own"
    o, cpu = sft.Options(model=base, lora=4, quant="nf4"), torch.device("cpu")
    model, tok = tuning.start(o, cpu)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1) if p.requires_grad else p
    tuning.save(o, own, model, tok)
    task = write(tmp_path / "t.jsonl", arithmetic(8))

    def logprobs(**way):
        o = options(tmp_path, [str(own)], task, against=base, **way)
        evals.evaluate(o)
        names = ("own", tasks.key(o, str(own))), ("base", tasks.key(o, base))
        files = [*(tmp_path / "out" / "tasks" / "t").glob("*.jsonl")]
        (a,), (b,) = ([f for f in files if f.name.endswith(f"{n}.{k}.jsonl")] for n, k in names)
        return [torch.tensor([json.loads(x)["logprobs"] for x in f.open()]) for f in (a, b)]

    merged, _ = logprobs()
    kept, plain = logprobs(quant="nf4", keep_base=True)
    again, same = logprobs(quant="nf4")
    assert (kept - merged).abs().max() < 1e-3 < 1e-2 < (again - merged).abs().max()
    assert torch.equal(plain, same) and (kept - plain).abs().max() > 0.1


def test_bad_input_is_one_line(models, tmp_path):
    task = write(tmp_path / "t.jsonl", arithmetic(8))
    given = dict(task=task, out=tmp_path / "out", device="cpu")
    refused(run("tools/evals.py", **given), "--task needs --model DIR")
    refused(run("tools/evals.py", model=tmp_path / "none", **given), "none: no such file or folder")
    bad = write(
        tmp_path / "bad.jsonl", [*arithmetic(2), {"query": "q", "choices": ["a"], "gold": 0}]
    )
    refused(
        run("tools/evals.py", **given | dict(task=bad, model=models[0])), "bad.jsonl:3: choices:"
    )
    refused(run("tools/evals.py", **given | dict(model=models[0], shots=7)), "9 or more records")
