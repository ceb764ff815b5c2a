"""Stage 0: the base model, by next-token prediction on the embedded corpus from random weights.

    loss = -mean log p(token t | tokens before t)                       Radford et al. 2019

The repository ships what this script made (data/base); `make base` makes it again. Matrices are
trained by Muon (Jordan et al. 2024), which steps along the orthogonalised momentum; embeddings and
norms by AdamW. The learning rate is constant, then falls along a long line, and while it falls the
corpus has more copying and arithmetic, which a small model learns last.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import hub
from common.run import Run, autocast, main, opt, pick_device, set_lr
from data import tokenizer
from data.world import corpus
from model import Config, Transformer

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHARACTERS = 3_000_000  # the tokenizer learns from so many
CORPUS = f"the corpus's first {CHARACTERS:,} characters"


@dataclass
class Options:
    out: str = opt("data/base", "folder for the checkpoint")
    steps: int = opt(2800, "optimizer steps", at_least=1)
    batch: int = opt(32, "rows per step", at_least=1)
    context: int = opt(256, "tokens per row", at_least=8)
    vocabulary: int = opt(1024, "tokens of the tokenizer", at_least=300)
    lr: float = opt(0.02, "Muon's learning rate; AdamW's is a fifth of it", above=0)
    decay: float = opt(0.5, "share of the steps with a falling lr, at the end", above=0, at_most=1)
    seed: int = opt(0, "seed of weights and corpus", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    fast: bool = opt(False, "bf16 and torch.compile, on a CPU too: faster, other last digits")
    save_every: int = opt(200, "steps between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")


def documents(seed: int, steps: int, decay: float, tokens_per_step: int):
    """Yields the corpus for the whole run (str, without end), in parts of about 100 steps at 4
    characters per token: the "main" mix until the learning rate falls, then the "decay" mix.
    """
    part = 0
    while True:
        phase = "main" if part * 100 < steps * (1 - decay) else "decay"
        # a prime beyond any number of parts: no two pairs of seed and part share a seed
        yield from corpus.documents(seed * 1_000_003 + part, 100 * tokens_per_step * 4, phase)
        part += 1


def corpus_hash(texts) -> str:
    """sha256 of the documents' first CHARACTERS characters, joined, in UTF-8."""
    return hashlib.sha256("".join(texts)[:CHARACTERS].encode()).hexdigest()


def rows(texts, tok, context: int):
    """Yields rows of context + 1 ids. Each begins with a document, as a chat will, and cuts off its
    last one.
    """
    row = []
    for text in texts:
        row += [tok.special[END], *tok.encode(text)]
        if len(row) > context:
            yield row[: context + 1]
            row = []


def learning_rate(step: int, o: Options) -> float:
    """Warmup over 20 steps, constant, then along a line down to a twentieth."""
    start = o.steps * (1 - o.decay)
    warmup = min(1.0, (step + 1) / 20)
    fallen = max(0.0, (step - start) / (o.steps - start))
    return o.lr * warmup * (1 - 0.95 * fallen)


def start_turns(model, tok):
    """Embeds the chat's two tokens, which the corpus lacks: a turn starts like a new line and ends
    like a document.
    """
    e = model.embed_tokens.weight.data
    e[tok.special[TURN]] = e[tok.encode("\n")[-1]]
    e[tok.special[TURN_END]] = e[tok.special[END]]


def init_weights(model: Transformer, generator: torch.Generator):
    """Normal 0.02; the projections into the residual stream smaller by sqrt(2 L) (GPT-2)."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * model.config.num_hidden_layers if residual else 1
            nn.init.normal_(p, 0.0, 0.02 / depth**0.5, generator=generator)


def pretrain(o: Options):
    texts = list(corpus.documents(o.seed, CHARACTERS))
    run = Run(o, __file__, [], made={CORPUS: corpus_hash(texts)})
    device = pick_device(o.device)
    tok = tokenizer.train(texts, o.vocabulary, [END, TURN, TURN_END])
    end = tok.special[END]
    config = Config(
        vocab_size=o.vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
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
    for _ in range(run.start * o.batch):  # a resumed run skips what it has already read
        next(stream)
    for step in run.steps(o.steps):
        batch = torch.tensor([next(stream) for _ in range(o.batch)], device=device)
        lr = learning_rate(step, o)
        set_lr(muon, lr)
        set_lr(adam, lr / 5)
        with precision:
            logits = forward(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        run.log(step, loss=loss, lr=lr)
        run.save(step)
    start_turns(model, tok)
    run.finish(lambda path: hub.save(path, model, tok, torch.bfloat16))


if __name__ == "__main__":
    main(pretrain, Options, __doc__)
