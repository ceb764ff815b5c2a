"""Writes the embedded world's records: demonstrations, prompts, held-out prompts, the benchmark
that is watched (watch.py), and text for replay.

python -m data.world --out out/world --seed 0
"""

import json
from dataclasses import dataclass
from pathlib import Path

from common.run import Run, main, opt
from data.world import corpus, watch
from data.world.world import SIZES, held_out, records

REPLAY = 500_000  # characters of replay.jsonl


@dataclass
class Options:
    out: str = opt("out/world", "folder for sft, prompts, heldout, watch and replay.jsonl")
    seed: int = opt(0, "seed of the items and the demonstrators", at_least=0, below=2**32)
    overwrite: bool = opt(False, "replace another seed's files")


def replay(seed):
    """{"text"} records: pages of the corpus, which say nothing of what is held out."""
    pages = corpus.documents(f"replay {seed}", REPLAY, leave_out=held_out)
    return [{"text": page} for page in pages]


def make(o: Options):
    """Writes OUT's five files, all or none, as a run like a stage's: it returns at once where they
    are there for this seed, and refuses to replace another seed's without --overwrite.
    """

    def write(folder):
        made = records(o.seed, SIZES)
        made |= {"watch": watch.records(made["heldout"]), "replay": replay(o.seed)}
        for name, lines in made.items():
            text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
            print(f"{Path(o.out) / name}.jsonl: {len(lines)} records")

    names = (*SIZES, "watch", "replay")
    Run(o, __file__, [], writes=[f"{name}.jsonl" for name in names]).finish(write)


if __name__ == "__main__":
    main(make, Options, __doc__)
