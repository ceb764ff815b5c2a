"""Against live transformers, both ways: its tiny Llamas read by us, ours opened by its Auto
classes, and SmolLM2 over a page of text.

Run in the peers' environment; the SmolLM2 tests are skipped where the folder is absent (`make
smollm2`). Each test prints the largest difference that it measured (pytest -s).
"""

from pathlib import Path

import pytest
import torch
from tiny import score_rows

from common import hub
from data.tokenizer import Tokenizer
from model import Config, Transformer, logprobs, scalar_model
from packing import pad
from sampling import generate

pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

ROOT = Path(__file__).parent.parent.parent
SHAPES = {
    "tied": dict(tie_word_embeddings=True),
    "untied": dict(num_key_value_heads=4),
    "one key/value head": dict(num_key_value_heads=1),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "wide heads": dict(head_dim=24, tie_word_embeddings=True),
    "another rope and eps": dict(rope_theta=300.0, rms_norm_eps=0.01),
}
# English prose with figures, a list, a dialogue, code and some other languages: a page
PAGE = """The lighthouse at the end of the bay was built in 1847, when the harbour was still busy
and forty ships a week came in from the north. Its lamp burned oil at first, then gas, and since
1931 it has been electric. The keeper, Mr. Thomas Hale, lived there with his wife and three
children until the service was automated; his diary, which fills eleven volumes, is now kept in the
town's museum. On clear nights the light could be seen from more than twenty miles away, and
fishermen used to say that it was the only honest thing on the coast.

Water boils at 100 °C at sea level, but at about 93 °C in a town at 2,000 metres; 7 * 8 = 56, and
12 + 30 = 42. To make a simple bread:

1. Mix 500 g of flour with 10 g of salt, 7 g of yeast and 320 ml of warm water.
2. Knead the dough for ten minutes, cover it, and let it rise for an hour.
3. Bake it at 220 °C for about 35 minutes, until the crust sounds hollow.

def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

"What shall we do now?" asked the small bear. "We shall wait," said her mother, "until the river is
calm again." And so they sat down beneath an old oak, counted the leaves that fell, and told each
other stories of the summer. ¿Y tú? Je ne sais pas.
"""


def measured(what, difference, limit):
    print(f"\n{what}: {difference:.2g}", end=" ")
    assert difference < limit


def spread(model, seed=0):
    """Weights large enough that attention is far from uniform, norms and biases among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * 0.15 + (1.0 if p.dim() == 1 else 0.0)
            )
    return model.eval()


def shape(**changes):
    small = dict(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return small | dict(max_position_embeddings=128, pad_token_id=0, eos_token_id=2) | changes


def batch(vocab_size=500):
    generator = torch.Generator().manual_seed(1)
    return pad(
        [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in (90, 37, 1, 12)]
    )


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_theirs_read_by_us(name, tmp_path):
    changes = dict(SHAPES[name])
    theta = changes.pop("rope_theta", 10000.0)
    peer = spread(
        LlamaForCausalLM(
            LlamaConfig(
                **shape(**changes), rope_parameters={"rope_type": "default", "rope_theta": theta}
            )
        )
    )
    peer.save_pretrained(tmp_path, max_shard_size="100KB")
    model, _ = hub.load(tmp_path)
    tokens, mask = batch()
    difference = (
        (model(tokens, mask) - peer(tokens, attention_mask=mask.long()).logits)[mask]
        .abs()
        .max()
        .item()
    )
    measured(f"{name}: logits", difference, 1e-4)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_ours_opened_by_them(name, tmp_path):
    model = spread(Transformer(Config(**dict(head_dim=16) | shape(**SHAPES[name]))))
    hub.save(tmp_path, model, Tokenizer.load(ROOT / "tests" / "golden" / "gpt2_kind"))
    peer, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert (
        peer.dtype == torch.float32
        and peer.config.tie_word_embeddings == model.config.tie_word_embeddings
    )
    tokens, mask = batch()
    logits = peer(tokens, attention_mask=mask.long()).logits
    measured(f"{name}: logits", (model(tokens, mask) - logits)[mask].abs().max().item(), 1e-4)
    prompts = [tokens[i][mask[i]].tolist()[:20] for i in range(4)]
    for prompt, answer in zip(prompts, generate(model, prompts, 30, temperature=0), strict=True):
        theirs = peer.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert theirs[0, len(prompt) :].tolist() == answer


@torch.no_grad()
def test_their_classifier_read_by_us(tmp_path):
    peer = spread(LlamaForSequenceClassification(LlamaConfig(**shape(num_labels=1))))
    peer.save_pretrained(tmp_path)
    model, _ = hub.load(tmp_path)
    tokens, mask = batch()
    theirs = peer(tokens, attention_mask=mask.long()).logits[:, 0]
    measured("scores", (score_rows(model, tokens, mask) - theirs).abs().max().item(), 1e-4)


@torch.no_grad()
def test_our_reward_model_opened_by_them(tmp_path):
    """Padded by their tokenizer; the end token is also the language model's padding."""
    tokenizer = Tokenizer.load(ROOT / "tests" / "golden" / "gpt2_kind")
    end = tokenizer.special["<|im_end|>"]
    model = scalar_model(
        spread(
            Transformer(
                Config(
                    head_dim=16,
                    **shape(tie_word_embeddings=True, pad_token_id=end, eos_token_id=end),
                )
            )
        )
    )
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    hub.save(tmp_path, model, tokenizer)
    peer, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    texts = [
        f"<|im_start|>assistant\n{answer}<|im_end|>"
        for answer in ("Lima.", "I do not know, and nobody else does either.", "")
    ]
    inputs = AutoTokenizer.from_pretrained(tmp_path)(texts, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].bool()
    assert not mask.all() and (inputs["input_ids"][torch.arange(3), mask.sum(1) - 1] == end).all()
    ours = score_rows(model, inputs["input_ids"], mask)
    assert ours.std() > 0.05
    theirs = peer(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
    measured("scores", (ours - theirs).abs().max().item(), 1e-4)
    peer.save_pretrained(tmp_path / "theirs")  # and back: what is ours alone survives transformers
    config = hub.load(tmp_path / "theirs")[0].config
    assert (config.reward_mean, config.reward_std, config.pad_token_id) == (
        0.5,
        2.0,
        tokenizer.special["<|endoftext|>"],
    )


# -- SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    folder = ROOT / "smollm2"
    if not (folder / "config.json").exists():
        pytest.skip("needs the folder smollm2: make smollm2")
    return folder


@pytest.fixture(scope="module")
def page(smollm2):
    return torch.tensor([Tokenizer.load(smollm2).encode(PAGE)])


def our_logprobs(model, tokens):
    """Of all but the first, which are an answer to it."""
    row = tokens[0].tolist()
    return logprobs(model, [row[:1]], [row[1:]])[0]


def their_logprobs(peer, tokens):
    return peer(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


@torch.no_grad()
def test_smollm2_over_a_page(smollm2, page):
    """Log-probabilities of every token, which are a language model's; and the greedy continuation,
    ours from a ragged batch.
    """
    tokens, (model, _) = page, hub.load(smollm2)
    peer = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ours, theirs = our_logprobs(model, tokens), their_logprobs(peer, tokens)
    assert tokens.shape[1] > 350 and theirs.mean() > -3.5
    measured(
        f"SmolLM2: log-probabilities of {tokens.shape[1]} tokens",
        (ours - theirs).abs().max().item(),
        1e-3,
    )
    start = tokens[0, :40].tolist()
    theirs = peer.generate(
        tokens[:, :40], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 40:]
    assert generate(model, [start, start[:9]], 24, temperature=0)[0] == theirs.tolist()


@torch.no_grad()
def test_smollm2_saved_by_us(smollm2, page, tmp_path):
    tokens, (model, tokenizer) = page, hub.load(smollm2)
    hub.save(tmp_path, model, tokenizer, torch.bfloat16)
    peer, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    measured(
        "SmolLM2 saved",
        (our_logprobs(model, tokens) - their_logprobs(peer, tokens)).abs().max().item(),
        1e-3,
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.eos_token_id, generation.top_k, generation.temperature) == (
        tokenizer.special["<|im_end|>"],
        0,
        1.0,
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == "<|im_end|>" and theirs.chat_template == tokenizer.chat_template
    assert (
        theirs(PAGE, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        == tokens[0].tolist()
    )


@torch.no_grad()
def test_smollm2_as_a_reward_model(smollm2, page, tmp_path):
    """SmolLM2 pads with its end token; the reward model made from it must not."""
    tokens = page[0].tolist()
    model, tokenizer = hub.load(smollm2)
    model, end = (
        scalar_model(model, torch.Generator().manual_seed(0)),
        tokenizer.special["<|im_end|>"],
    )
    hub.save(tmp_path, model, tokenizer)
    peer = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (
        peer.config.pad_token_id != end
        and AutoTokenizer.from_pretrained(tmp_path).pad_token_id == peer.config.pad_token_id
    )
    rows, mask = pad([tokens[:30] + [end], tokens[30:90] + [end]], fill=peer.config.pad_token_id)
    theirs = peer(rows, attention_mask=mask.long()).logits[:, 0]
    measured("SmolLM2: scores", (score_rows(model, rows, mask) - theirs).abs().max().item(), 1e-3)
