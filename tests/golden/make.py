"""Makes the golden files in this folder from the peers' own code: python tests/golden/make.py [NAME ...] --smollm2 FOLDER

One function a file: it returns what is written to NAME.json. Needs the peers (transformers, tokenizers, ...), which `make test` does
not; FOLDER is SmolLM2-135M-Instruct as `make smollm2` writes it.
"""
import argparse
import heapq
import inspect
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from data import templates, tokenizer  # noqa: E402

POOLS = ("abc XYZ", "'s 't're'll  \n\t ", "0123456789²½Ⅷ٣", "éüßñ漢字かな한국عربي", "🙂👩‍👩‍👧🇵🇪", "!?.,;:#$%&()[]{}<>|_-",
         "\x00\x04\x06\x1c\x7f\x85\xa0\u2003\u200b\u3000\ufeff",
         "<|im_end|> <|endoftext|> <|im_start|>user\n", "def f(x):\n    return x+1\n\n\n",
         "The capital of Peru is Lima.", "I'd say: it's 1,234.50 euros, isn't it? ")


def varied(n, seed):
    """n strings of words, code, digits, signs, spaces, scripts, emoji, control characters, special tokens and rare code points."""
    rng, out = random.Random(seed), []
    for _ in range(n):
        text = ""
        for _ in range(rng.randint(1, 10)):
            pool = rng.choice(POOLS)
            text += pool if rng.random() < 0.3 else "".join(rng.choice(pool) for _ in range(rng.randint(1, 8)))
        for _ in range(rng.randint(0, 2)):
            code = rng.randrange(0x110000)
            if not 0xD800 <= code < 0xE000:
                text += rng.choice(["", " ", "a", "\n"]) + chr(code) + rng.choice(["", " ", "a", "!"])
        out.append(text)
    return out


CHATS = [
    [{"role": "user", "content": "What is the capital of Peru?"}, {"role": "assistant", "content": "Lima."}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! How can I help?"},
     {"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "¿Qué? 漢字 🙂"},
     {"role": "assistant", "content": "Sí 👩‍👩‍👧"}],
    [{"role": "user", "content": "Write code.\n\nNow."}, {"role": "assistant", "content": "def f(x):\n    return x + 1\n"}],
    # people's text that looks like the format, and that BPE would merge with the header's newline
    [{"role": "user", "content": "\n <|im_end|>\n<|im_start|>assistant\n"},
     {"role": "assistant", "content": "\n  I see <|im_end|> there. "}],
]
KINDS = {"gpt2_kind": "chatml", "smollm2_kind": "smollm2"}          # a small tokenizer of each kind, and the format it is tried with


def hf(kind):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(HERE / kind)


def hf_ids(peer, text):
    return peer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]


def tokenizers(smollm2):
    """gpt2_kind/: 500 tokens trained here. smollm2_kind/: the first 1,000 tokens of SmolLM2 (Apache-2.0), 21 bytes missing as there."""
    texts = [inspect.getdoc(m) for m in (json, random, heapq, argparse, inspect)] + varied(300, 1)
    small = tokenizer.train(texts, 500)
    small.chat_template = templates.TEMPLATES["chatml"].jinja
    small.save(HERE / "gpt2_kind")
    spec = json.loads((smollm2 / "tokenizer.json").read_text("utf-8"))
    vocab = {t: i for t, i in spec["model"]["vocab"].items() if i < 1000}
    spec["model"] |= {"vocab": vocab, "merges": [m for m in spec["model"]["merges"] if "".join(m) in vocab]}
    config = json.loads((smollm2 / "tokenizer_config.json").read_text("utf-8"))
    config.pop("vocab_size")
    tokenizer.Tokenizer(json.dumps(spec, ensure_ascii=False), config).save(HERE / "smollm2_kind")


def tokens(smollm2):
    """{kind: [[text, ids], ...]} of Hugging Face's tokenizers, special tokens split; "smollm2": the whole vocabulary's."""
    from transformers import AutoTokenizer
    peers = {kind: hf(kind) for kind in KINDS} | {"smollm2": AutoTokenizer.from_pretrained(smollm2)}
    return {kind: [[text, hf_ids(peer, text)] for text in varied(200, 2)] for kind, peer in peers.items()}


def rendered(smollm2):
    """{format: [[jinja, chat, text, prompt text], ...]} of apply_chat_template, for each jinja text in the table, and SmolLM2's own."""
    peer, out = hf("gpt2_kind"), {}
    own = json.loads((smollm2 / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    for name, f in templates.TEMPLATES.items():
        out[name] = []
        for jinja in (f.jinja, *f.known, *([own] if name == "smollm2" else [])):
            def apply(chat, prompt, jinja=jinja):
                return peer.apply_chat_template(chat, chat_template=jinja, tokenize=False, add_generation_prompt=prompt)
            out[name] += [[jinja, chat, apply(chat, False), apply(chat[:-1], True)] for chat in CHATS]
    return out


def chats(smollm2):
    """{kind: [[chat, ids, mask], ...]}: ids of the pieces by Hugging Face's tokenizer, mask 1 on what is trained.

    Where a chat holds nothing that reads like the format, both equal what apply_chat_template gives for the whole chat, its mask
    taken from {% generation %} around an answer and its end token.
    """
    out = {}
    for kind, name in KINDS.items():
        peer, f, out[kind] = hf(kind), templates.TEMPLATES[name], []
        turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        said = "{{message['content'] + '<|im_end|>'}}"
        marked = f.jinja.replace(turn, "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
                                 + said + "{% endgeneration %}{% else %}" + said + "{% endif %}{{'\n'}}")
        assert marked != f.jinja
        start, end = peer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        for i, chat in enumerate(CHATS):
            system = [] if f.system is None or chat[0]["role"] == "system" else [{"role": "system", "content": f.system}]
            ids, mask = [], []
            for m in system + chat:
                header, content = hf_ids(peer, m["role"] + "\n"), hf_ids(peer, m["content"])
                new = [start, *header, *content, end, *hf_ids(peer, "\n")]
                ids += new
                first, last = 1 + len(header), 1 + len(header) + len(content)
                mask += [int(m["role"] == "assistant" and first <= k <= last) for k in range(len(new))]
            if i < 4:
                whole = peer.apply_chat_template(chat, chat_template=marked, tokenize=True, return_dict=True,
                                                 return_assistant_tokens_mask=True)
                assert (whole["input_ids"], whole["assistant_masks"]) == (ids, mask), (kind, i, whole, ids, mask)
            out[kind].append([chat, ids, mask])
    return out


LLAMAS = {  # the shapes that a reader of Llama folders can get wrong
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True, rms_norm_eps=0.1),                      # in shards
    "wide": dict(head_dim=12, num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "scores": dict(num_labels=1, pad_token_id=0, eos_token_id=2),                              # a sequence classifier
}


def llamas(smollm2):
    """llama_NAME/: tiny Llamas as transformers saves them, in bf16, with its float32 logits (scores: pooled) in expected.safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    for name, changes in LLAMAS.items():
        shape = dict(vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        config = LlamaConfig(**shape | changes)
        kind = LlamaForSequenceClassification if name == "scores" else LlamaForCausalLM
        torch.manual_seed(0)
        model = kind(config)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for p in model.parameters():                       # large enough that attention is far from uniform
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        model.bfloat16().save_pretrained(HERE / f"llama_{name}", max_shard_size="20KB" if name == "biases" else "5GB")
        model = kind.from_pretrained(HERE / f"llama_{name}", dtype=torch.float32).eval()     # not .float(): RoPE would stay rounded
        tokens = torch.randint(3, 60, (2, 12), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, 7:] = tokens[1, 7:] = 0
        tokens[0, 11] = tokens[1, 6] = 2
        with torch.no_grad():
            out = model(tokens, attention_mask=mask).logits
        save_file({"tokens": tokens, "mask": mask, "out": out.contiguous()}, HERE / f"llama_{name}" / "expected.safetensors")


FILES = (tokenizers, tokens, rendered, chats, llamas)                      # in the order in which they need each other


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"all where none is given: {', '.join(f.__name__ for f in FILES)}")
    parser.add_argument("--smollm2", type=Path, default=Path("out/smollm2"))
    args = parser.parse_args()
    for make in FILES:
        if not args.names or make.__name__ in args.names:
            made = make(args.smollm2)
            if made is not None:
                (HERE / f"{make.__name__}.json").write_text(json.dumps(made, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
