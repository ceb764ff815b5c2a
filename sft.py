"""Stage 1: supervised fine-tuning, learning to answer as the demonstrations do.

Ouyang et al. 2022 (InstructGPT), section 3.5:

    loss = - Σ_t log p(y_t | x, y_<t) / number of targets          y: an answer, end token included

The prompt x is read but not trained on: its labels are -100, unless --prompt-loss asks for them.
Two things are easy to get wrong, and tests assert them:
- The denominator is the number of targets in the whole optimizer step. A mean of the micro-batches'
  means would weigh a token more the fewer targets its micro-batch has.
- Conversations are packed end to end into rows, so that nothing is computed on padding. Each one
  attends only to itself and counts positions from 0, so packed and separate losses are equal.
"""

import codecs
from dataclasses import dataclass

from torch.nn.utils import clip_grad_norm_

import forget
from common import tuning
from common.run import Run, adamw, autocast, lr_at, main, make_room, opt, pick_device, set_lr
from common.watch import Watch, Watching
from data import records, templates
from model import nll
from packing import IGNORE, SHORTEST, count_targets, pack, usable


@dataclass
class Options(Watching, tuning.Tuning):
    adapter: str = opt("none", "a lighter adapter than LoRA", choices=("none", *tuning.KINDS))
    virtual_tokens: int = opt(20, "in prompt or prefix", needs="adapter prompt prefix", at_least=1)
    model: str = opt("data/base", "checkpoint folder to start from", hub="all")
    data: str = opt(
        "out/world/sft.jsonl", "conversations, or text for continued pre-training (data/shapes.py)"
    )
    out: str = opt("out/sft", "folder for the checkpoint")
    steps: int = opt(440, "optimizer steps", at_least=1)
    batch: int = opt(32, "conversations per step", at_least=1)
    accumulate: int = opt(1, "micro-batches per step, for memory", at_least=1, at_most="batch")
    length: int = opt(256, "tokens of a conversation; longer ones are dropped", at_least=2)
    lr: float = opt(
        0.0,
        "peak learning rate; 0: 5e-4 for every weight, five times that for LoRA,"
        " adapters.LEARNING_RATE for the others",
        at_least=0,
    )
    warmup: int = opt(20, "steps of warmup, then --schedule", at_least=0, below="steps")
    weight_decay: float = opt(
        0.0, "AdamW's decay of matrices", needs="adapter none prompt prefix", at_least=0
    )
    replay: str = opt("", "chats or plain text of an old task, mixed in (forget.py)")
    replay_ratio: float = opt(
        0.05, "its share of all target tokens", needs="replay", above=0, below=1
    )
    prompt_loss: bool = opt(False, "train on the prompts too, as other trainers' train_on_inputs")
    ewc: str = opt("", "Fishers of old tasks, folders of forget.py separated by commas")
    ewc_lambda: float = opt(10.0, "λ: strength of EWC's penalty", needs="ewc", at_least=0)
    format: str = opt("", "chat format; default: the checkpoint's own, or chatml")
    seed: int = opt(0, "seed of the data's order", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    save_every: int = opt(50, "steps between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")
    show_batch: bool = opt(False, "print the first batch, the trained tokens in colour, and stop")


def sft_loss(model, tokens, labels, segments):
    """Σ -log p over the targets, a scalar; arguments as in model.nll."""
    return nll(model, tokens, labels, segments).sum()


def prepare(path, tok, length: int, prompt_loss=False, **allowed):
    """The training split of a file → [(ids, labels)]; conversations longer than a row, or without a
    target, are dropped and counted. prompt_loss: every token but the first is a target. Plain text
    is trained whole, in pieces of a row.
    """
    if records.is_text(path):
        return forget.examples(path, tok, length, **allowed)
    train, held = records.split(records.conversations(path, **allowed))
    found = [templates.render(tok, c["messages"]) for c in train]
    if prompt_loss:
        found = [(ids, [IGNORE, *ids[1:]]) for ids, _ in found]
    kept, dropped = usable(found, length)
    records.report(path, len(kept), dropped, "conversations", len(held))
    return kept


def show(examples, tok):
    """Prints a batch token by token: what is trained in green, what is only read in grey.

    Tokens that share a character are shown together; unprintable characters as Python escapes them.
    """
    for ids, labels in examples:
        parts, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")
        for i, lab in zip(ids, labels, strict=True):
            colour = 90 if lab == IGNORE else 32
            # the bytes so far of a character that goes on in this token
            begun = decoder.getstate()[0]
            if not (begun and parts[-1][0] == colour):
                parts.append([colour, ""])
            parts[-1][1] += decoder.decode(tok.token_bytes(i))
        parts[-1][1] += decoder.decode(b"", final=True)
        print("|".join(f"\033[{colour}m{spelt_out(text)}\033[0m" for colour, text in parts))


def spelt_out(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sft(o: Options):
    device = pick_device(o.device)
    inputs = [*tuning.inputs(o), o.data, *filter(None, [o.replay, *o.ewc.split(",")])]
    run = None if o.show_batch else Run(o, __file__, inputs)
    model, tok = tuning.start(o, device)
    model.train()  # turns on the dropout of an adapter that is trained further
    form = templates.adopt(tok, o.format or None)
    records.say_cut(o.length, model.context)
    length = min(o.length, model.context)
    data = prepare(o.data, tok, length, o.prompt_loss, **tuning.allowed(o, tok))
    old = forget.examples(o.replay, tok, length, **tuning.allowed(o, tok)) if o.replay else []
    replay = forget.replay(data, old, o.replay_ratio, o.batch, o.seed)
    if o.show_batch:
        return show(records.batch(data, 0, o.batch, o.seed) + replay(0), tok)
    held = forget.old_tasks(o, model)
    peak = tuning.learning_rate(o, 5e-4)
    optimizer = adamw(model, peak, o.weight_decay, paged=o.paged)
    report = tuning.Report(o, device, [model])
    run.resume(model=model, optimizer=optimizer)

    for step in Watch(o, run, model, tok).steps(o.steps):
        lr = lr_at(step, o.steps, peak, o.warmup, o.schedule)
        set_lr(optimizer, lr)
        batch = records.batch(data, step, o.batch, o.seed) + replay(step)
        targets = count_targets(batch)  # of the whole step: the loss's denominator
        size, loss = -(-len(batch) // o.accumulate), 0.0
        for i in range(0, len(batch), size):
            part = batch[i : i + size]
            width = max(SHORTEST, *(len(ids) for ids, _ in part))  # short rows: little attention
            tokens, labels, segments = pack(part, width)
            sizes = dict(tokens=tokens.numel(), length=width, targets=count_targets(part))
            make_room(optimizer, **sizes)
            report.batch(**sizes)
            with autocast(device):
                part_loss = sft_loss(model, tokens, labels, segments) / targets
            part_loss.backward()
            loss += part_loss.detach()
        penalty = forget.ewc(held, o.ewc_lambda)
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        read = sum(len(ids) for ids, _ in batch)
        run.log(step, loss=loss, lr=lr, grad_norm=norm, targets=targets, tokens=read, **penalty)
        run.save(step)

    model.config.eos_token_id = templates.end_id(tok, form)
    report.finish()
    run.finish(lambda path: tuning.save(o, path, model, tok))


if __name__ == "__main__":
    main(sft, Options, __doc__)
