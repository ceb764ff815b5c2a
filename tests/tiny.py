"""Tiny models, tokenizers and folders for the tests of the stages."""

import json

import torch

from common import families, hub
from data import templates, tokenizer
from model import Config, Transformer, score

TEXTS = [
    "the capital of Peru is Lima. ",
    "what is one and two? three. ",
    "sure, of course. thank you! ",
]


def chat_tokenizer(pad="<|endoftext|>"):
    """Bytes, a few merges and ChatML's tokens; pad="<|im_end|>" is SmolLM2's setting, where padding
    and end are one token.
    """
    tok = tokenizer.train(TEXTS, 280)
    templates.adopt(tok, "chatml")
    tok.config["pad_token"] = pad
    return tok


def lm(seed=0, std=0.3, **changes):
    """A Transformer with weights large enough that attention is far from uniform."""
    shape = dict(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    shape |= dict(head_dim=8, max_position_embeddings=128)
    model, generator = Transformer(Config(**shape | changes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * std + (1.0 if p.dim() == 1 else 0.0)
            )
    return model


def folder(path, seed=0, tok=None, **changes):
    """A checkpoint folder with such a model in it → its path as a str."""
    hub.save(path, lm(seed, **changes), tok or chat_tokenizer())
    return str(path)


def user(text):
    return [{"role": "user", "content": text}]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def metrics(out):
    """A finished run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Over(torch.nn.Module):
    """function(model, ...) as a module, so that torch.func.functional_call can put other parameters
    under it.
    """

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args):
        return self.function(self.model, *args)


def score_rows(model, tokens, mask):
    """A scalar model's score of each padded row, a text without an answer."""
    rows = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
    return score(model, rows, [[]] * len(rows))


def gradcheck(model, function):
    """Finite differences in float64 of function(model) by every parameter of the model."""
    over = Over(model.double(), function)
    names, values = zip(*over.named_parameters(), strict=True)

    def at(*values):
        return torch.func.functional_call(over, dict(zip(names, values, strict=True)), ())

    return torch.autograd.gradcheck(at, [v.detach().requires_grad_() for v in values])


def bandit(path, first, after, letters="abcd"):
    """A folder whose model answers by a table, so that every answer of two tokens can be
    enumerated: `first` are the logits of an answer's first token (the letters', then the end's),
    `after` those of the token that follows a letter. What the model computes is lm_head ·
    norm(embedding of the last token): attention and MLP add nothing until they are trained."""
    tok = chat_tokenizer()
    model = lm(7, std=0.05, num_hidden_layers=1)
    ids = [tok.encode(c)[0] for c in letters] + [templates.end_id(tok)]
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight.zero_()
        model.layers[0].mlp.down_proj.weight.zero_()
        for norm in (
            model.norm,
            model.layers[0].input_layernorm,
            model.layers[0].post_attention_layernorm,
        ):
            norm.weight.fill_(1.0)
        model.embed_tokens.weight.zero_()
        # dimension 0: the prompt's last token, 1: a letter, 2: all others
        model.embed_tokens.weight[:, 2] = 1.0
        for i, dimension in [(tok.encode("\n")[0], 0), *((i, 1) for i in ids[:-1])]:
            model.embed_tokens.weight[i] = torch.eye(16)[dimension]
        # letters differ too, and what follows them need not be the same
        for n, i in enumerate(ids[:-1]):
            model.embed_tokens.weight[i, 3 + n] = 1.0
        model.lm_head.weight.fill_(0.0)
        # times norm's 4 or 2.8: a probability of nothing for all other tokens
        model.lm_head.weight[:, :3] = -8.0
        for i, one, two in zip(ids, first, after, strict=True):
            model.lm_head.weight[i, :3] = torch.tensor([one / 4, two / 8**0.5, 0.0])
    hub.save(path, model, tok)
    return str(path)


def answers_of(letters="abcd"):
    """Every answer of at most two tokens: the texts, their ids, and whether they end."""
    tok = chat_tokenizer()
    end, ids = templates.end_id(tok), {c: tok.encode(c) for c in letters}
    out = [("", [end], True)] + [(a, [*ids[a], end], True) for a in letters]
    return out + [(a + b, ids[a] + ids[b], False) for a in letters for b in letters]


# ---------------------------------------------------------------- the transformer's own tests
V = 37


def decoder(seed=0, std=0.35, **changes):
    """Three layers, two key/value heads, V tokens; norms around 1, the rest around 0."""
    shape = dict(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    shape |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    model, generator = Transformer(Config(**shape | changes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * std
                + (p.dim() == 1 and 1.0) * (p.mean() == 1)
            )
    return model


def ragged(lengths=(5, 1, 9, 3), seed=0):
    """Lists of ids of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=generator).tolist() for n in lengths]


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance, (a - b).abs().max()


# ---------------------------------------------------------------- one tiny model of each family
SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
SHORT, LONG = [1.0, 1.1, 1.5, 2.0], [1.0, 2.0, 4.0, 9.0]
FAMILIES = {  # as the hub's config.json have them; windows and first contexts that a row exceeds
    "llama": dict(model_type="llama"),
    "llama, linear": dict(model_type="llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama3": dict(
        model_type="llama",
        rope_theta=500.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        tie_word_embeddings=True,
    ),
    "mistral": dict(model_type="mistral", sliding_window=6, head_dim=12),
    "qwen2": dict(
        model_type="qwen2", use_sliding_window=False, sliding_window=6, max_window_layers=2
    ),
    "qwen2, windows": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2
    ),
    "qwen3": dict(model_type="qwen3", head_dim=12, tie_word_embeddings=True),
    "gemma": dict(model_type="gemma", head_dim=12, hidden_act="gelu"),
    "gemma2": dict(
        model_type="gemma2",
        head_dim=12,
        query_pre_attn_scalar=24,
        sliding_window=6,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=4.0,
        hidden_activation="gelu_pytorch_tanh",
    ),
    "gemma3": dict(
        model_type="gemma3_text",
        head_dim=12,
        query_pre_attn_scalar=24,
        sliding_window=6,
        sliding_window_pattern=3,
        rope_theta=1000.0,
        rope_local_base_freq=10.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        hidden_activation="gelu_pytorch_tanh",
    ),
    "phi3": dict(model_type="phi3", sliding_window=6),
    "phi3.5": dict(
        model_type="phi3",
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    ),
    "phi4": dict(
        model_type="phi3",
        partial_rotary_factor=0.75,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", "short_factor": SHORT[:3], "long_factor": LONG[:3]},
        tie_word_embeddings=True,
        full_attn_mod=1,
    ),
}


def family(name, seed=0, **changes):
    """A model of FAMILIES[name]: weights large enough that attention is far from uniform."""
    values = families.read("config.json", SMALL | FAMILIES[name] | changes)
    model, generator = Transformer(Config(**values)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            start = p * ("norm" in n)  # 1, or 0 where norms multiply by 1 + weight
            p.copy_(start + torch.randn(p.shape, generator=generator) * 0.25)
    return model.eval()
