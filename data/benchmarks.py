"""Benchmarks' records, as the hub's data sets have them → what is asked, and what is right.

    choices      {query, choices, gold: place of the right one}, or the fields of HellaSwag, MMLU,
                 ARC, PIQA, COPA or WinoGrande, asked in lm-eval's words
    labels       {text or input, label}: the file's labels are the choices
    references   {prompt, reference or references}, SQuAD's fields, or conversations, whose last
                 answer is the reference
    code         HumanEval's fields, or MBPP's
    text         {text}

What cannot be read raises a ValueError "file:line: kind: what was expected (got ...)".
"""

import re

from data import records, shapes, turns


# ---------------------------------------------------------------- records of choices
def hellaswag(r):
    """Without the brackets that WikiHow's texts have."""

    def clean(text):
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    ctx = f"{r['ctx_a']} {r['ctx_b'].capitalize()}" if "ctx_b" in r else r["ctx"]
    about = f"{r['activity_label']}: " if "activity_label" in r else ""
    return clean(about + ctx), [clean(e) for e in r["endings"]], r["label"]


def mmlu(r):
    letters = "ABCDEFGHIJ"[: len(r["choices"])]
    lines = [f"{letter}. {c}\n" for letter, c in zip(letters, r["choices"], strict=True)]
    return f"{r['question'].strip()}\n{''.join(lines)}Answer:", list(letters), r["answer"]


def arc(r):
    gold = r["choices"]["label"].index(r["answerKey"])
    return f"Question: {r['question']}\nAnswer:", r["choices"]["text"], gold


def piqa(r):
    return f"Question: {r['goal']}\nAnswer:", [r["sol1"], r["sol2"]], r["label"]


def copa(r):
    word = {"cause": "because", "effect": "therefore"}[r["question"]]
    choices = [c[0].lower() + c[1:] for c in (r["choice1"], r["choice2"])]
    return f"{r['premise'].strip()[:-1]} {word}", choices, r["label"]


def winogrande(r):
    """What follows the blank is scored, after each of the two that may fill it."""
    before, _, after = r["sentence"].partition("_")
    queries = [before + r["option1"], before + r["option2"]]
    return queries, [after.strip()] * 2, int(r["answer"]) - 1


SHAPES = {  # a record's fields → (query, choices, place of the right one)
    "query choices gold": lambda r: (r["query"], r["choices"], r["gold"]),
    "endings label": hellaswag,
    "question choices answerKey": arc,
    "question choices answer": mmlu,
    "goal sol1 sol2 label": piqa,
    "premise choice1 choice2 question label": copa,
    "sentence option1 option2 answer": winogrande,
}


def shape_of(record):
    """The first of SHAPES whose fields the record has, or None."""
    return next((s for s in SHAPES if set(s.split()) <= record.keys()), None)


def choices_item(record):
    """→ {"query", "choices", "gold"}; ValueError where a field is not what its shape says."""
    shape = shape_of(record)
    try:
        query, choices, gold = SHAPES[shape](record)
        ok = len(choices) > 1 and all(isinstance(c, str) and c.strip() for c in choices)
        ok = ok and isinstance(query, str | list) and int(gold) in range(len(choices))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        ok = False
    if not ok:
        got = {k: record.get(k) for k in (shape or "query choices gold").split()}
        wanted = f"{' '.join(got)}: two or more choices and the right one's place were expected"
        raise ValueError(f"{wanted} (got {str(got)[:200]})")
    return {"query": query, "choices": list(choices), "gold": int(gold)}


# ---------------------------------------------------------------- records of the other kinds
def kind_of(record) -> str:
    """ValueError for fields of no kind."""
    fields = record.keys() if isinstance(record, dict) else set()
    if shape_of(dict.fromkeys(fields)):
        return "choices"
    if "test_list" in fields or {"entry_point", "test"} <= fields:
        return "code"
    if "label" in fields and fields & {"text", "input"}:
        return "labels"
    if fields & {"reference", "references", "answers", "messages", "instruction", "prompt"}:
        return "references"
    if "text" in fields:
        return "text"
    shapes = "; ".join((*SHAPES, "text label", "prompt reference", "prompt entry_point test"))
    raise ValueError(
        f"fields of a task were expected: {shapes} (got {', '.join(fields) or 'none'})"
    )


def labels_item(record):
    text = records._string(record, "text" if "text" in record else "input")
    before = f"{record['instruction']}\n\n" if record.get("instruction") else ""
    if not isinstance(record["label"], str | int) or not str(record["label"]).strip():
        raise ValueError(f"label: a word or a number was expected (got {record['label']!r:.60})")
    return {"query": f"{before}{text}\nLabel:", "label": str(record["label"])}


def references_item(record):
    if isinstance(record.get("answers"), dict):  # SQuAD's
        asked, found = f"{record['context']}\n\n{record['question']}", record["answers"]["text"]
        messages = [{"role": "user", "content": asked}]
    else:
        found = record.get("references", record.get("reference"))
        needs = "answer" if found is None else "prompt"
        ours = shapes.ours(record)[1] if found is None else record
        messages, _ = turns.conversation(ours, needs)
        if found is None:
            *messages, answer = messages
            found = answer["content"]
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
        raise ValueError(f"reference: a string or several were expected (got {found!r:.60})")
    return {"messages": messages, "references": found}


def code_item(record):
    """→ prompt: what a base model goes on from; asked: what a chat model is asked; record"""
    if "test_list" not in record:
        prompt = records._string(record, "prompt")
        for field in ("entry_point", "test"):
            records._string(record, field)
        return {"prompt": prompt, "asked": f"Complete this function:\n\n{prompt}", "record": record}
    asked = records._string(record, "text" if "text" in record else "prompt")
    tests = record["test_list"]
    if not tests or not all(isinstance(t, str) for t in tests):
        raise ValueError(f"test_list: a list of strings was expected (got {tests!r:.60})")
    prompt = f'"""\n{asked}\n{tests[0]}\n"""\n'
    asked = f"{asked}\nYour code should pass these tests:\n\n" + "\n".join(tests)
    return {"prompt": prompt, "asked": asked, "record": record}


READ = {
    "choices": choices_item,
    "labels": labels_item,
    "references": references_item,
    "code": code_item,
    "text": lambda r: {"text": records._string(r, "text")},
}


def items(path) -> tuple[str, list]:
    """A file → its kind, by the first record's fields, and an item for each record."""
    kind, found = "", []
    for line, record in records._read(path):
        try:
            kind = kind or kind_of(record)
            found.append(READ[kind](record))
        except (ValueError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}:{line}: {kind or 'task'}: {e}") from None
        except KeyError as e:
            raise ValueError(f"{path}:{line}: {kind}: the field {e} was expected") from None
    if kind == "labels":
        choices = sorted({item["label"] for item in found})
        for item in found:
            item |= {"choices": choices, "gold": choices.index(item["label"])}
    return kind, found


def solved(item) -> str:
    """A question of choices with its right answer: an example for a few-shot prompt."""
    query, gold = item["query"], item["gold"]
    return f"{query if isinstance(query, str) else query[gold]} {item['choices'][gold]}"


def with_examples(item, examples):
    """The item with solved questions before its own."""
    head, query = "\n\n".join([*examples, ""]), item["query"]
    return item | {"query": head + query if isinstance(query, str) else [head + q for q in query]}


def program(item, said: str, chat: bool) -> tuple[str, str]:
    """A model's answer to an item of code → (program, tests): a chat's first block of code, or what
    a base model goes on with until the function is over.
    """
    record, prompt = item["record"], item["prompt"].rstrip("\n")
    human_eval = "test_list" not in record
    if chat:
        block = re.search(r"```(?:python)?\n(.*?)(?:```|$)", said, re.S)
        said = "\n" + (block[1] if block else said)
    else:  # a body ends at the margin, a whole function where something else begins
        said = re.split(r"\n(?=\S)" if human_eval else r'\n(?=assert|print|"""|```)', said)[0]
    if human_eval:
        return prompt + said + "\n", f"{record['test']}\ncheck({record['entry_point']})\n"
    setup = [record.get("test_setup_code") or "", *(record.get("test_imports") or [])]
    return said + "\n", "\n".join([*setup, *record["test_list"]])
