"""Stage 1: supervised fine-tuning. The model learns to answer as the demonstrations do (Ouyang et
al. 2022, section 3.5).

    loss = - Σ log p(y_t | x, y_<t) / number of targets         over the tokens of the answers y, end token included

The prompt x is read but not learnt: its labels are -100. Two things are easy to get wrong and are
asserted by tests:
- The denominator is the number of targets of the whole optimizer step. A mean over micro-batches of
  means would weigh an answer's tokens by how short its neighbours are.
- Conversations are packed end to end into rows, so that nothing is computed on padding; each
  attends to itself only and counts its positions from 0, so packed and separate losses are equal.
"""

import codecs
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import tuning
from common.run import Run, adamw, autocast, lr_at, main, make_room, opt, pick_device, set_lr
from data import records, templates
from model import first_fit, wide

IGNORE = -100


@dataclass
class Options(tuning.Tuning):
    adapter: str = opt(
        "none",
        "in place of LoRA: IA3's factors, or virtual tokens",
        choices=("none", *tuning.KINDS),
    )
    virtual_tokens: int = opt(
        20, "how many, of a prompt or prefix", needs="adapter prompt prefix", at_least=1
    )
    model: str = opt("data/base", "checkpoint folder to start from")
    data: str = opt(
        "out/world/sft.jsonl", "conversations: chat JSONL, Alpaca, or prompt/completion"
    )
    out: str = opt("out/sft", "folder for the checkpoint")
    steps: int = opt(440, "optimizer steps", at_least=1)
    batch: int = opt(32, "conversations a step", at_least=1)
    accumulate: int = opt(
        1, "micro-batches a step: less memory, the same gradient", at_least=1, at_most="batch"
    )
    length: int = opt(256, "tokens of a conversation; longer ones are dropped", at_least=2)
    lr: float = opt(
        0.0,
        "peak learning rate; 0: 5e-4, five times that for LoRA, adapters.LEARNING_RATE for the"
        " others",
        at_least=0,
    )
    warmup: int = opt(20, "steps of linear warmup, then a line to 0", at_least=0, below="steps")
    weight_decay: float = opt(
        0.0, "AdamW's decay of matrices", needs="adapter none prompt prefix", at_least=0
    )
    format: str = opt("", "chat format; default: the checkpoint's own, or chatml")
    seed: int = opt(0, "seed of the data's order", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    save_every: int = opt(50, "steps between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")
    show_batch: bool = opt(False, "print the first batch, the trained tokens in colour, and stop")


def sft_loss(model, tokens, labels, segments):
    """Sum of the targets' negative log-likelihoods, and how many they are.

    tokens, labels, segments (B,T): a label lies on its own token and is predicted from the token
    before it, which must belong to the same packed example (segments; -1 is padding). The head runs
    on the targets' rows only.
    """
    wanted = (labels[:, 1:] != IGNORE) & (segments[:, 1:] == segments[:, :-1])
    row, column = wanted.nonzero(as_tuple=True)
    logits = wide(model.lm_head(model.hidden(tokens, segments=segments)[row, column]))
    return F.cross_entropy(logits, labels[row, column + 1], reduction="sum"), len(row)


def pack(examples, length: int, device="cpu"):
    """[(ids, labels), …] laid end to end → tokens, labels, segments (rows, length): padding has
    label -100 and segment -1.
    """
    place = first_fit([len(ids) for ids, _ in examples], length)
    tokens = torch.zeros(1 + max(row for row, _ in place), length, dtype=torch.long)
    labels, segments = torch.full_like(tokens, IGNORE), torch.full_like(tokens, -1)
    for i, ((row, at), (ids, lab)) in enumerate(zip(place, examples, strict=True)):
        span = slice(at, at + len(ids))
        tokens[row, span], labels[row, span], segments[row, span] = (
            torch.tensor(ids),
            torch.tensor(lab),
            i,
        )
    return tokens.to(device), labels.to(device), segments.to(device)


def prepare(path, tok, length: int):
    """The training side of a file → [(ids, labels)]; those longer than a row, or without a target,
    are dropped and counted.
    """
    train, held = records.split(records.conversations(path))
    examples = [templates.render(tok, c["messages"]) for c in train]
    short = [e for e in examples if len(e[0]) <= length]
    kept = [e for e in short if any(label != IGNORE for label in e[1][1:])]
    dropped = {
        f"longer than {length} tokens": len(examples) - len(short),
        "without a target": len(short) - len(kept),
    }
    records.report(path, len(kept), dropped, "conversations", len(held))
    return kept


def show(examples, tok):
    """A batch token by token: what is trained stands in green, what is only read in grey.

    Tokens that share a character stand together; what has no glyph is written as Python writes it.
    """
    for ids, labels in examples:
        parts, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")
        for i, lab in zip(ids, labels, strict=True):
            colour = 90 if lab == IGNORE else 32
            # the bytes so far of a character that goes on in this token
            begun = decoder.getstate()[0]
            if not (begun and parts[-1][0] == colour):
                parts.append([colour, ""])
            parts[-1][1] += decoder.decode(tok.encoding.decode_single_token_bytes(i))
        parts[-1][1] += decoder.decode(b"", final=True)
        print("|".join(f"\033[{colour}m{visible(text)}\033[0m" for colour, text in parts))


def visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sft(o: Options):
    device = pick_device(o.device)
    run = None if o.show_batch else Run(o, __file__, [*tuning.inputs(o), o.data])
    model, tok = tuning.start(o, device)
    model.train()  # dropout, where an adapter that goes on has it
    form = templates.adopt(tok, o.format or None)
    records.say_cut(o.length, model.context)
    data = prepare(o.data, tok, min(o.length, model.context))
    if o.show_batch:
        return show(records.batch(data, 0, o.batch, o.seed), tok)
    peak = tuning.learning_rate(o, 5e-4)
    optimizer = adamw(model, peak, o.weight_decay, paged=o.paged)
    share = o.batch / o.accumulate / len(data)
    watch = tuning.Watch(o, device, [model], share * sum(len(ids) for ids, _ in data),
                         share * sum(label != IGNORE for _, labels in data for label in labels))  # fmt: skip
    run.resume(model=model, optimizer=optimizer)

    for step in run.steps(o.steps):
        examples = records.batch(data, step, o.batch, o.seed)
        # of the whole step: the loss's denominator
        targets = sum(label != IGNORE for _, labels in examples for label in labels[1:])
        lr = lr_at(step, o.steps, peak, o.warmup)
        set_lr(optimizer, lr)
        loss, part = 0.0, -(-len(examples) // o.accumulate)
        for i in range(0, len(examples), part):
            some = examples[i : i + part]
            # short rows: little attention
            tokens, labels, segments = pack(some, max(128, *(len(ids) for ids, _ in some)), device)
            learnt = sum(label != IGNORE for _, lab in some for label in lab)
            make_room([optimizer], tokens=tokens.numel(), targets=learnt)
            with autocast(device):
                nll, _ = sft_loss(model, tokens, labels, segments)
            (nll / targets).backward()
            loss += nll.detach() / targets
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(
            step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            targets=targets,
            tokens=sum(len(ids) for ids, _ in examples),
        )
        run.save(step)

    model.config.eos_token_id = templates.end_id(tok, form)
    watch.finish()
    run.finish(lambda path: tuning.save(o, path, model, tok))


if __name__ == "__main__":
    main(sft, Options, __doc__)
