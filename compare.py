"""Stage 2a: comparisons. The SFT model answers each prompt K times; a labeller ranks the answers.

Ouyang et al. 2022 (InstructGPT), section 3.2. The labeller is the embedded world's (noisy people,
see data/world/world.py), or your own: --labeller FILE.py:function is called with (prompts: message
lists, answers: strings) and returns scores, the higher the better. A file of preference pairs is
already ranked and is only rewritten.

reward.py reads the output as rankings, dpo.py as pairs. Beside its text, each answer's ids are kept
as they were sampled (`ids`, with the hash of their `tokenizer`), and whether it ended (`finished`):
an answer that was cut inside a character would come out different if it were encoded again.
"""

import sys
from dataclasses import dataclass

from common import tuning
from common.files import write_jsonl
from common.run import Run, load_function, main, opt, pick_device
from data import records, templates
from data.world import world
from sampling import generate, prompt_room

# the fields that are written for each prompt
OWN = ("prompt", "responses", "ranks", "finished", "ids", "tokenizer")
LABELLERS = 10  # people who share the work: each prompt goes to one of them


@dataclass
class Options(tuning.Reading):
    model: str = opt("out/sft", "checkpoint folder that answers", hub="all")
    data: str = opt("out/world/prompts.jsonl", "chats that end in a user's turn, or pairs")
    out: str = opt("out/comparisons.jsonl", "file for the rankings")
    labeller: str = opt("world", "world, or FILE.py:function")
    prompts: int = opt(2000, "how many prompts", at_least=1)
    k: int = opt(5, "answers to each prompt (InstructGPT: 4 to 9)", at_least=2)
    batch: int = opt(64, "prompts answered together", at_least=1)
    temperature: float = opt(1.0, "temperature of the answers", above=0)
    max_new_tokens: int = opt(64, "longest answer in tokens", at_least=1)
    allow_dropped: bool = opt(False, "go on where more than 5 % of the records are odd")
    allow_markers: bool = opt(
        False, "read prompts with chat formats' markers in their text, such as [INST]"
    )
    seed: int = opt(0, "seed of prompts, answers and labellers", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    save_every: int = opt(4, "batches between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")


def rank(scores) -> list[int]:
    """Scores, the higher the better → ranks: 0 the best, equal scores share one."""
    return [sum(other > mine for other in scores) for mine in scores]


def world_ranks(record, index, answers, finished, seed):
    return world.Labeller(f"{seed} {index % LABELLERS}").rank(record["item"], answers, finished)


def prepare(o: Options, tok, room: int):
    """→ [(record, ids)], the prompts of this run. Prompts of more than `room` tokens leave no room
    for an answer: they are dropped and counted.
    """
    found = records.conversations(o.data, "prompt", **tuning.allowed(o, tok))
    if o.labeller == "world" and not all(map(world.knows, found)):
        knows = "--labeller world knows the embedded world's prompts only (with their `item`)"
        raise ValueError(f"{o.data}: {knows}; give FILE.py:function")
    chosen = records.batch(found, 0, min(o.prompts, len(found)), o.seed)
    kept = []
    for record in chosen:
        ids, _ = templates.render(tok, record["messages"], add_generation_prompt=True)
        if len(ids) <= room:
            kept.append((record, ids))
    too_long = f"longer than {room} tokens (the context less --max-new-tokens)"
    dropped = {too_long: len(chosen) - len(kept), "beyond --prompts": len(found) - len(chosen)}
    records.report(o.data, len(kept), dropped, "prompts", 0)
    taken = {k for record in chosen for k in record if k in OWN}
    if taken:
        names = ", ".join(sorted(taken))
        remark = f"its fields {names} are left out: a ranking's own have these names"
        print(f"{o.data}: {remark}", file=sys.stderr)
    return kept


def compare(o: Options):
    file = o.labeller.rpartition(":")[0]
    if not file and o.labeller != "world":
        raise ValueError(f"--labeller {o.labeller}: world or FILE.py:function was expected")
    inputs = [o.model, o.data]
    if o.keep_base:
        inputs.append(tuning.base_of(o.model))
    if file:
        inputs.append(file)
    run = Run(o, __file__, inputs, file=True)
    if records.kind(o.data) == "preference pair":
        found = records.rankings(o.data, **tuning.allowed(o))
        return run.finish(lambda path: write_jsonl(path, found))
    judge = load_function(o.labeller) if file else None
    model, tok = tuning.read(o, o.model, pick_device(o.device))
    ends = templates.end_ids(tok, model.config)
    prompts = prepare(o, tok, prompt_room(model, o.max_new_tokens))
    done = run.resume().get("records", [])

    for step in run.steps(-(-len(prompts) // o.batch), "batch"):
        batch = prompts[step * o.batch : (step + 1) * o.batch]
        asked = [ids for _, ids in batch for _ in range(o.k)]
        # a prime beyond any number of steps: no two pairs of seed and step share a seed
        seed = o.seed * 100_003 + step
        answers = generate(model, asked, o.max_new_tokens, o.temperature, eos_id=ends, seed=seed)
        for i, (record, _) in enumerate(batch):
            mine = answers[i * o.k : (i + 1) * o.k]
            texts, finished = templates.read_answers(tok, mine, ends)
            if judge:
                ranks = rank(judge([record["messages"]] * o.k, texts, [record] * o.k))
            else:
                ranks = world_ranks(record, step * o.batch + i, texts, finished, o.seed)
            written = record["messages"], texts, ranks, finished, mine, tok.hash
            extra = {k: v for k, v in record.items() if k not in ("messages", "reference", *OWN)}
            done.append(dict(zip(OWN, written, strict=True)) | extra)
        tied = sum(len(set(d["ranks"])) < len(d["ranks"]) for d in done)
        run.log(step, ("ties",), prompts=len(done), ties=tied / len(done))
        run.save(step, records=done)
    run.finish(lambda path: write_jsonl(path, done))


if __name__ == "__main__":
    main(compare, Options, __doc__)
