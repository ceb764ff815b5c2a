"""Stage 0: the base model. Next-token prediction on the embedded corpus, from nothing (Radford et
al. 2019).

    loss = -mean log p(token t | tokens before t)

The repository ships what this script made (data/base); `make base` makes it again. Matrices are
trained by Muon (Jordan et al. 2024), which steps along the orthogonalised momentum; embeddings and
norms by AdamW. The learning rate stands still, then falls on a long line, and in that fall the
corpus leans to copying and arithmetic, which a small model learns last.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import hub
from common.run import Run, autocast, main, opt, pick_device, set_lr
from data import tokenizer
from data.world import corpus
from model import Config, Transformer, init_weights

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# the tokenizer learns from them
CORPUS, CHARACTERS = "the corpus's first 3,000,000 characters", 3_000_000


@dataclass
class Options:
    out: str = opt("data/base", "folder for the checkpoint")
    steps: int = opt(2800, "optimizer steps", at_least=1)
    batch: int = opt(32, "rows a step", at_least=1)
    context: int = opt(256, "tokens a row", at_least=8)
    vocabulary: int = opt(1024, "tokens of the tokenizer", at_least=300)
    lr: float = opt(0.02, "Muon's learning rate; AdamW's is a fifth of it", above=0)
    decay: float = opt(
        0.5,
        "share of the steps, the last ones, over which the learning rate falls",
        above=0,
        at_most=1,
    )
    seed: int = opt(0, "seed of weights and corpus", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    fast: bool = opt(
        False,
        "bf16 and torch.compile on a CPU as well: quicker where it has bf16 units, other last"
        " digits",
    )
    save_every: int = opt(200, "steps between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")


def documents(seed: int, steps: int, decay: float, tokens_a_step: int):
    """The corpus for the whole run: (text) without end, its mix leaning to the decay's after the
    first steps.
    """
    part = 0
    while True:
        phase = "main" if part * 100 < steps * (1 - decay) else "decay"
        yield from corpus.documents(seed * 1_000_003 + part, 100 * tokens_a_step * 4, phase)
        part += 1


def corpus_hash(texts) -> str:
    """sha256 of the first three million characters of documents, one behind the other, in UTF-8."""
    return hashlib.sha256("".join(texts)[:CHARACTERS].encode()).hexdigest()


def rows(texts, tok, context: int):
    """Rows of context + 1 ids, each starting at a document, as a chat will: documents until it is
    full, the last one cut.
    """
    row = []
    for text in texts:
        row += [tok.special[END], *tok.encode(text)]
        if len(row) > context:
            yield row[: context + 1]
            row = []


def learning_rate(step: int, o: Options) -> float:
    """Constant, then a line down to a twentieth."""
    start = o.steps * (1 - o.decay)
    return (
        o.lr * min(1.0, (step + 1) / 20) * (1 - 0.95 * max(0.0, (step - start) / (o.steps - start)))
    )


def start_turns(model, tok):
    """The chat's two tokens were never seen: a turn starts like a new line, and ends like a
    document.
    """
    e = model.embed_tokens.weight.data
    e[tok.special[TURN]] = e[tok.encode("\n")[-1]]
    e[tok.special[TURN_END]] = e[tok.special[END]]


def pretrain(o: Options):
    texts = list(corpus.documents(o.seed, CHARACTERS))
    run = Run(o, __file__, [], made={CORPUS: corpus_hash(texts)})
    device = pick_device(o.device)
    tok = tokenizer.train(texts, o.vocabulary, [END, TURN, TURN_END])
    config = Config(o.vocabulary, 192, 512, 5, 6, 2, 32, max_position_embeddings=512, tie_word_embeddings=True,
                    bos_token_id=tok.special[END], eos_token_id=tok.special[END], pad_token_id=tok.special[END])  # fmt: skip
    model = Transformer(config)
    init_weights(model, torch.Generator().manual_seed(o.seed))
    model.to(device)
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(matrices, lr=o.lr, weight_decay=0.0, momentum=0.95)
    others = [model.embed_tokens.weight, *(p for p in model.parameters() if p.dim() < 2)]
    adam = torch.optim.AdamW(others, lr=o.lr / 5, betas=(0.9, 0.95), weight_decay=0.0)
    run.resume(model=model, muon=muon, adam=adam)
    forward = torch.compile(model) if o.fast else model
    precision = torch.autocast(device.type, torch.bfloat16) if o.fast else autocast(device)

    stream = rows(documents(o.seed, o.steps, o.decay, o.batch * o.context), tok, o.context)
    # the corpus is made on the way: what has been read is passed over
    for _ in range(run.start * o.batch):
        next(stream)
    for step in run.steps(o.steps):
        batch = torch.tensor([next(stream) for _ in range(o.batch)], device=device)
        lr = learning_rate(step, o)
        set_lr(muon, lr), set_lr(adam, lr / 5)
        with precision:
            logits = forward(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        muon.step(), adam.step()
        muon.zero_grad(), adam.zero_grad()
        run.log(step, loss=loss, lr=lr)
        run.save(step)
    start_turns(model, tok)
    run.finish(lambda path: hub.save(path, model, tok, torch.bfloat16))


if __name__ == "__main__":
    main(pretrain, Options, __doc__)
