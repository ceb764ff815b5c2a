"""Makes the golden files in this folder from the peers' own code: python tests/golden/make.py [NAME
...] --smollm2 FOLDER

One function a file: it returns what is written to NAME.json. Needs the peers (transformers,
tokenizers, ...), which `make test` does not; FOLDER is SmolLM2-135M-Instruct as `make smollm2`
writes it.
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

POOLS = (
    "abc XYZ",
    "'s 't're'll  \n\t ",
    "0123456789²½Ⅷ٣",
    "éüßñ漢字かな한국عربي",
    "🙂👩‍👩‍👧🇵🇪",
    "!?.,;:#$%&()[]{}<>|_-",
    "\x00\x04\x06\x1c\x7f\x85\xa0\u2003\u200b\u3000\ufeff",
    "<|im_end|> <|endoftext|> <|im_start|>user\n",
    "def f(x):\n    return x+1\n\n\n",
    "The capital of Peru is Lima.",
    "I'd say: it's 1,234.50 euros, isn't it? ",
)


def varied(n, seed):
    """n strings of words, code, digits, signs, spaces, scripts, emoji, control characters, special
    tokens and rare code points.
    """
    rng, out = random.Random(seed), []
    for _ in range(n):
        text = ""
        for _ in range(rng.randint(1, 10)):
            pool = rng.choice(POOLS)
            text += (
                pool
                if rng.random() < 0.3
                else "".join(rng.choice(pool) for _ in range(rng.randint(1, 8)))
            )
        for _ in range(rng.randint(0, 2)):
            code = rng.randrange(0x110000)
            if not 0xD800 <= code < 0xE000:
                text += (
                    rng.choice(["", " ", "a", "\n"]) + chr(code) + rng.choice(["", " ", "a", "!"])
                )
        out.append(text)
    return out


def spiced(n, seed):
    """Such strings with families' own tokens in them, special and merely added."""
    rng, marks = random.Random(seed), ["<think>", "</think>", "<s>", "</s>", "<|eot_id|>", "[INST]"]
    marks += [
        "<|user|>",
        "<|end|>\n",
        "<start_of_turn>",
        "<tool_call>",
        "  ",
        "e\u0301",
        "Ⅷ",
        "DON'T",
    ]
    texts = [[*text.partition(" ")] for text in varied(n, seed)]
    return ["".join([*parts, rng.choice(marks), parts[0][:5]]) for parts in texts]


CHATS = [
    [
        {"role": "user", "content": "What is the capital of Peru?"},
        {"role": "assistant", "content": "Lima."},
    ],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "3"},
    ],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "¿Qué? 漢字 🙂"},
        {"role": "assistant", "content": "Sí 👩‍👩‍👧"},
    ],
    [
        {"role": "user", "content": "Write code.\n\nNow."},
        {"role": "assistant", "content": "def f(x):\n    return x + 1\n"},
    ],
    # people's text that looks like the format, and that BPE would merge with the header's newline
    [
        {"role": "user", "content": "\n <|im_end|>\n<|im_start|>assistant\n"},
        {"role": "assistant", "content": "\n  I see <|im_end|> there. "},
    ],
]
# a small tokenizer of each kind, and the format it is tried with
KINDS = {"gpt2_kind": "chatml", "smollm2_kind": "smollm2"}


PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
THINK = ("<think>", "</think>", "<tool_call>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
PHI_TOKENS = ("<|assistant|>", "<|end|>", "<|user|>", "<|system|>")
# small tokenizers of other families' kinds, each with its chat format
FAMILIES = {
    "llama3_kind": "llama3",
    "qwen_kind": "chatml",
    "phi4_kind": "phi3",
    "llama2_kind": "llama2",
    "mistral_kind": "mistral",
    "zephyr_kind": "zephyr",
    "gemma_kind": "gemma",
    "phi3_kind": "phi3",
    "unigram_kind": "alpaca",
}
BY_TIKTOKEN = ("llama3_kind", "qwen_kind", "phi4_kind")


def family(kind, path, texts=None):
    """Trains a tokenizer of a family's kind with the package tokenizers, and writes its folder."""
    import tokenizers as T

    texts = texts or [*varied(200, 1), *(inspect.getdoc(m) for m in (json, random, argparse))]
    byte_level = kind in BY_TIKTOKEN
    special = {
        "llama3_kind": [*LLAMA3_TOKENS, "<|eot_id|>"],
        "qwen_kind": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "phi4_kind": ["<|endoftext|>", *PHI_TOKENS],
    }.get(kind, [UNK, BOS, EOS])
    model = T.models.BPE(byte_fallback=not byte_level, fuse_unk=True, unk_token=None)
    if not byte_level:
        model.unk_token = UNK
    tok = T.Tokenizer(T.models.Unigram() if kind == "unigram_kind" else model)
    options = dict(vocab_size=len(special) + 400, special_tokens=special, show_progress=False)
    trainer = T.trainers.BpeTrainer(**options)
    if byte_level:
        pattern, how, invert = {
            "llama3_kind": (tokenizer.LLAMA3, "isolated", False),
            "qwen_kind": (tokenizer.QWEN, "isolated", False),
            "phi4_kind": (tokenizer.GPT4O, "removed", True),
        }[kind]
        bytes_only = T.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = T.pre_tokenizers.Split(T.Regex(pattern), how, invert)
        tok.pre_tokenizer = T.pre_tokenizers.Sequence([split, bytes_only])
        tok.decoder = T.decoders.ByteLevel()
        alphabet = T.pre_tokenizers.ByteLevel.alphabet()
        trainer = T.trainers.BpeTrainer(**options, initial_alphabet=alphabet)
        if kind == "qwen_kind":
            tok.normalizer = T.normalizers.NFC()
    elif kind == "unigram_kind":
        tok.pre_tokenizer = T.pre_tokenizers.Metaspace()
        tok.decoder = T.decoders.Metaspace()
        trainer = T.trainers.UnigramTrainer(**options, unk_token=UNK)
    else:  # SentencePiece's BPE: bytes in front, no split but by spaces
        options["special_tokens"] += [f"<0x{b:02X}>" for b in range(256)]
        options["vocab_size"] += 256
        trainer = T.trainers.BpeTrainer(**options)
        tok.pre_tokenizer = T.pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.train_from_iterator(texts, trainer)
    spec = as_in_the_family(kind, json.loads(tok.to_str()))
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": None}
    if byte_level:
        begin = special[0] if kind != "qwen_kind" else None
        end = special[0] if kind == "phi4_kind" else special[-1]
        named = {"bos_token": begin, "eos_token": end, "pad_token": None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["chat_template"] = templates.TEMPLATES[FAMILIES[kind]].jinja
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config | named), "utf-8")


def as_in_the_family(kind, spec):
    """The trained tokenizer.json with the family's other settings."""
    added = spec["added_tokens"] = [t for t in spec["added_tokens"] if "<0x" not in t["content"]]
    vocab = spec["model"]["vocab"]
    begin = {
        "qwen_kind": None,
        "phi4_kind": None,
        "phi3_kind": None,
        "llama3_kind": LLAMA3_TOKENS[0],
    }
    begin = begin.get(kind, BOS)

    def add(texts, **flags):
        for text in texts:
            at = max(*(t["id"] for t in added), len(vocab) - 1) + 1
            added.append(dict(id=at, content=text) | tokenizer.ADDED | flags)

    if kind == "llama3_kind":  # as converted from tiktoken's ranks: every merge that makes a token
        spec["model"] |= {"ignore_merges": True, "merges": every_merge(vocab)}
    if kind == "qwen_kind":
        add(THINK, special=False)
    if kind == "phi4_kind":
        added[:] = [t | {"rstrip": t["content"] in PHI_TOKENS} for t in added]
    if kind == "phi3_kind":
        add(["<|endoftext|>"])
        add(PHI_TOKENS, rstrip=True)
    if kind == "gemma_kind":
        add(["<start_of_turn>", "<end_of_turn>"])
    old = kind in ("llama2_kind", "phi3_kind", "gemma_kind")
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    back += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if old:
        prepend = [{"type": "Prepend", "prepend": "▁"}] * (kind != "gemma_kind")
        spec["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, space]}
        spec["pre_tokenizer"] = None
    if kind in ("mistral_kind", "zephyr_kind"):
        spec["pre_tokenizer"]["split"] = False
    if old or kind in ("mistral_kind", "zephyr_kind"):
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        back += [strip] * (kind != "gemma_kind")
        spec["decoder"] = {"type": "Sequence", "decoders": back}
    if begin:
        at = next(t["id"] for t in added if t["content"] == begin)
        before, text = (
            {"SpecialToken": {"id": begin, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        )
        pair = [before, text, {"SpecialToken": {"id": begin, "type_id": 1}}]
        pair.append({"Sequence": {"id": "B", "type_id": 1}})
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [before, text],
            "pair": pair,
            "special_tokens": {begin: {"id": begin, "ids": [at], "tokens": [begin]}},
        }
    return spec


def every_merge(vocab):
    """All pairs of tokens that make a third, in the order of its id."""
    merges = []
    for token in sorted(vocab, key=vocab.get):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(vocab[a], vocab[b], a, b) for a, b in cuts if a in vocab and b in vocab]
        merges += [f"{a} {b}" for _, _, a, b in sorted(pairs)]
    return merges


def hf(kind):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(HERE / kind)


def hf_ids(peer, text):
    return peer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]


def tokenizers(smollm2):
    """gpt2_kind/: 500 tokens trained here. smollm2_kind/: the first 1,000 tokens of SmolLM2
    (Apache-2.0), 21 bytes missing as there.
    """
    texts = [inspect.getdoc(m) for m in (json, random, heapq, argparse, inspect)] + varied(300, 1)
    small = tokenizer.train(texts, 500)
    small.chat_template = templates.TEMPLATES["chatml"].jinja
    small.save(HERE / "gpt2_kind")
    for kind in BY_TIKTOKEN:
        family(kind, HERE / kind)
    spec = json.loads((smollm2 / "tokenizer.json").read_text("utf-8"))
    vocab = {t: i for t, i in spec["model"]["vocab"].items() if i < 1000}
    spec["model"] |= {
        "vocab": vocab,
        "merges": [m for m in spec["model"]["merges"] if "".join(m) in vocab],
    }
    config = json.loads((smollm2 / "tokenizer_config.json").read_text("utf-8"))
    config.pop("vocab_size")
    tokenizer.Tokenizer(json.dumps(spec, ensure_ascii=False), config).save(HERE / "smollm2_kind")


def tokens(smollm2):
    """{kind: [[text, ids], ...]} of Hugging Face's tokenizers, special tokens split; "smollm2": the
    whole vocabulary's.
    """
    from transformers import AutoTokenizer

    peers = {kind: hf(kind) for kind in KINDS} | {"smollm2": AutoTokenizer.from_pretrained(smollm2)}
    found = {
        kind: [[text, hf_ids(peer, text)] for text in varied(200, 2)]
        for kind, peer in peers.items()
    }
    for kind in BY_TIKTOKEN:
        found[kind] = [[text, hf_ids(hf(kind), text)] for text in spiced(60, 2)]
    return found


# white space around what was said, which some formats drop, and a question with its input
EDGES = [
    [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "\n  Sum these.\n"},
        {"role": "assistant", "content": " 3\n\n"},
        {"role": "user", "content": " And these? "},
        {"role": "assistant", "content": "\t4 "},
    ],
    [
        {"role": "user", "content": "Sum these.\n\n1, 2", "input": "1, 2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Welcome."},
    ],
]


def rendered(smollm2):
    """{format: [[jinja, chat, text, prompt text], ...]} of apply_chat_template, for each jinja text
    in the table, and SmolLM2's own. Both texts are null where the template refuses the chat.
    """
    peer, out = hf("gpt2_kind"), {}
    own = json.loads((smollm2 / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    for name, f in templates.TEMPLATES.items():
        out[name] = []
        for jinja in (f.jinja, *f.known, *([own] if name == "smollm2" else [])):
            for chat in CHATS if name in KINDS.values() else [*CHATS[1:3], *EDGES]:
                out[name].append([jinja, chat, *applied(peer, chat, jinja)])
    return out


def applied(peer, chat, jinja=None):
    """apply_chat_template's text of a chat, and of its prompt; null, null where it refuses."""
    from jinja2 import TemplateError

    both = []
    for messages, prompt in ((chat, False), (chat[:-1], True)):
        try:
            both.append(
                peer.apply_chat_template(
                    messages, chat_template=jinja, tokenize=False, add_generation_prompt=prompt
                )
            )
        except TemplateError:
            both.append(None)
    return both


def chats(smollm2):
    """{kind: [[chat, ids, mask], ...]}: ids of the pieces by Hugging Face's tokenizer, mask 1 on
    what is trained.

    Where a chat holds nothing that reads like the format, both equal what apply_chat_template gives
    for the whole chat, its mask taken from {% generation %} around an answer and its end token.
    """
    out = {}
    for kind, name in KINDS.items():
        peer, f, out[kind] = hf(kind), templates.TEMPLATES[name], []
        turn = (
            "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        )
        said = "{{message['content'] + '<|im_end|>'}}"
        marked = f.jinja.replace(
            turn,
            "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{%"
            " generation %}"
            + said
            + "{% endgeneration %}{% else %}"
            + said
            + "{% endif %}{{'\n'}}",
        )
        assert marked != f.jinja
        start, end = peer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        for i, chat in enumerate(CHATS):
            system = (
                []
                if f.default is None or chat[0]["role"] == "system"
                else [{"role": "system", "content": f.default}]
            )
            ids, mask = [], []
            for m in system + chat:
                header, content = hf_ids(peer, m["role"] + "\n"), hf_ids(peer, m["content"])
                new = [start, *header, *content, end, *hf_ids(peer, "\n")]
                ids += new
                first, last = 1 + len(header), 1 + len(header) + len(content)
                mask += [
                    int(m["role"] == "assistant" and first <= k <= last) for k in range(len(new))
                ]
            if i < 4:
                whole = peer.apply_chat_template(
                    chat,
                    chat_template=marked,
                    tokenize=True,
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                )
                assert (whole["input_ids"], whole["assistant_masks"]) == (ids, mask), (
                    kind,
                    i,
                    whole,
                    ids,
                    mask,
                )
            out[kind].append([chat, ids, mask])
    return out


# fmt: off
LLAMAS = {  # the shapes that a reader of Llama folders can get wrong
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True, rms_norm_eps=0.1),  # in shards
    "wide": dict(head_dim=12, num_key_value_heads=1,
                 rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "scores": dict(num_labels=1, pad_token_id=0, eos_token_id=2),  # a sequence classifier
}
# fmt: on


def llamas(smollm2):
    """llama_NAME/: tiny Llamas as transformers saves them, in bf16, with its float32 logits
    (scores: pooled) in expected.safetensors.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    for name, changes in LLAMAS.items():
        shape = dict(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        config = LlamaConfig(**shape | changes)
        kind = LlamaForSequenceClassification if name == "scores" else LlamaForCausalLM
        torch.manual_seed(0)
        model = kind(config)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for p in model.parameters():  # large enough that attention is far from uniform
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        model.bfloat16().save_pretrained(
            HERE / f"llama_{name}", max_shard_size="20KB" if name == "biases" else "5GB"
        )
        # not .float(): RoPE would stay rounded
        model = kind.from_pretrained(HERE / f"llama_{name}", dtype=torch.float32).eval()
        tokens = torch.randint(3, 60, (2, 12), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, 7:] = tokens[1, 7:] = 0
        tokens[0, 11] = tokens[1, 6] = 2
        with torch.no_grad():
            out = model(tokens, attention_mask=mask).logits
        save_file(
            {"tokens": tokens, "mask": mask, "out": out.contiguous()},
            HERE / f"llama_{name}" / "expected.safetensors",
        )


# each with the Llama that it is for
ADAPTERS = {"ia3": "biases", "prompt": "tied", "prefix": "biases"}


def peft_adapters(smollm2):
    """peft_NAME/: IA3, a prompt, a prefix far from their start, as PEFT saves them.
    expected.safetensors: its float32 logits of padded rows, and under the stored names the
    gradients of the mean negative log-likelihood of their tokens."""
    import torch
    from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    configs = {
        "ia3": IA3Config(),
        "prompt": PromptTuningConfig(num_virtual_tokens=5),
        "prefix": PrefixTuningConfig(num_virtual_tokens=5),
    }
    for name, llama in ADAPTERS.items():
        configs[name].task_type, folder, generator = (
            "CAUSAL_LM",
            HERE / f"peft_{name}",
            torch.Generator().manual_seed(1),
        )
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(HERE / f"llama_{llama}", dtype=torch.float32),
            configs[name],
        )
        for p in model.parameters():
            if p.requires_grad:
                p.data = torch.randn(p.shape, generator=generator) * 0.5 + (name == "ia3")
        model.peft_config["default"].base_model_name_or_path = f"llama_{llama}"
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        model.eval()
        tokens = torch.randint(3, 60, (2, 12), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, 7:] = tokens[1, 7:] = 0
        logits, seen = (
            model(input_ids=tokens, attention_mask=mask).logits[:, -12:],
            mask[:, 1:].bool(),
        )
        torch.nn.functional.cross_entropy(logits[:, :-1][seen], tokens[:, 1:][seen]).backward()
        grads = {
            n.replace(".default", ""): p.grad
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        if name != "ia3":  # stored under a name that is not the parameter's
            grads = dict(zip(["prompt_embeddings"], grads.values(), strict=True))
        assert grads.keys() == load_file(folder / "adapter_model.safetensors").keys()
        save_file(
            {"tokens": tokens, "mask": mask, "out": logits.detach().contiguous()} | grads,
            folder / "expected.safetensors",
        )


def families(smollm2):
    """{family: its config.json as transformers writes it, and its greedy answer} of tests/tiny.py's
    models. families.safetensors: the tokens, and {family: its logits at a few of them}.
    """
    import tempfile

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(HERE.parent))
    import tiny

    out, tensors = (
        {},
        {"tokens": torch.randint(3, 64, (30,), generator=torch.Generator().manual_seed(1))},
    )
    for name in tiny.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            tiny.hub.save(folder, tiny.family(name))
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            peer.save_pretrained(folder)
            config = json.loads(Path(folder, "config.json").read_text())
        with torch.no_grad():
            logits = [peer(tensors["tokens"][None, :n]).logits[0] for n in (30, 12)]
        tensors[name] = torch.cat((logits[0][[0, 5, 6, 15, 16, 29]], logits[1][[7, 11]]))
        answer = peer.generate(
            tensors["tokens"][None, :12], max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        out[name] = {"config": config, "answer": answer[0, 12:].tolist()}
    save_file(tensors, HERE / "families.safetensors")
    return out


def nf4_weights():
    """{name: weight} in which a quantiser can go wrong: odd sizes, blocks of zeros, exact ties,
    outliers, blocks across rows.
    """
    import torch
    from bitsandbytes.functional import get_4bit_type

    generator = torch.Generator().manual_seed(0)
    values = get_4bit_type("nf4", "cpu")
    ties = torch.cat((torch.ones(1), (values[1:] + values[:-1]) / 2, torch.zeros(48)))
    weights = {
        "plain": torch.randn(12, 64, generator=generator) * 0.02,
        "nested": (
            torch.randn(260, 64, generator=generator) * torch.linspace(0.01, 0.1, 260)[:, None]
        ),
        "odd": torch.randn(7, 11, generator=generator),
        "one": torch.tensor([-0.3]),
        "across": torch.randn(10, 50, generator=generator) * 0.1,
        "ties": torch.stack((ties, -ties * 0.125)),
        "zeros": torch.randn(6, 64, generator=generator) * (torch.arange(6) % 3 > 0)[:, None],
        "zero_end": torch.cat((torch.randn(64, generator=generator), torch.zeros(5))),
        "outliers": torch.randn(20, 64, generator=generator) * 0.01,
        # the last block is not a whole one; the products are no exact ties
        "short": torch.cat((ties, ties[:20])) * 0.013,
        "tiny": torch.randn(2, 64, generator=generator) * 1e-38,
    }
    weights["outliers"][[3, 17], [5, 60]] = torch.tensor([40.0, -9.0])
    return weights


def nf4(smollm2):
    """nf4.safetensors: weights, and what bitsandbytes makes of them on a CPU, in three types, the
    scales quantised (2) or not (1).
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import save_file

    out = {}
    for name, weight in nf4_weights().items():
        # two blocks of scales, large
        only = {"tiny": (torch.float32,), "nested": (torch.bfloat16,)}
        for dtype in only.get(name, (torch.float32, torch.bfloat16, torch.float16)):
            at, w = f"{name}.{str(dtype)[6:]}", weight.to(dtype)
            for double in (False, True)[name == "nested" :]:
                codes, state = quantize_4bit(
                    w, blocksize=64, compress_statistics=double, quant_type="nf4"
                )
                whole = dequantize_4bit(codes, state).view(w.shape)
                out |= {
                    at: w,
                    f"{at}.codes": codes,
                    f"{at}.absmax{1 + double}": state.absmax,
                    f"{at}.whole{1 + double}": whole,
                }
                if double:
                    out |= {
                        f"{at}.nested": state.state2.absmax,
                        f"{at}.offset": state.offset.clone(),
                    }
    save_file(out, HERE / "nf4.safetensors")
    (HERE / "nf4.safetensors").chmod(0o644)


def llama_nf4(smollm2):
    """llama_nf4/: a tiny Llama in NF4 as transformers saves it with bitsandbytes, its float32
    logits in expected.safetensors.

    Rows are whole blocks: where a block spans rows of a multiple of 16, bitsandbytes 0.50.2 takes
    wrong scales on CPUs with AVX-512. In eval() it may compute in bf16; there is no dropout.
    """
    import tempfile

    import torch
    from safetensors.torch import save_file
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    shape = dict(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model, generator = (
        LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True)),
        torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with tempfile.TemporaryDirectory() as whole:
        model.save_pretrained(whole)
        model = LlamaForCausalLM.from_pretrained(
            whole, quantization_config=config, dtype=torch.float32
        )
    model.save_pretrained(HERE / "llama_nf4")
    model = LlamaForCausalLM.from_pretrained(HERE / "llama_nf4", dtype=torch.float32).train()
    tokens = torch.randint(3, 60, (2, 12), generator=generator)
    with torch.no_grad():
        out = model(tokens).logits
    save_file(
        {"tokens": tokens, "out": out.contiguous()}, HERE / "llama_nf4" / "expected.safetensors"
    )
    (HERE / "llama_nf4" / "model.safetensors").chmod(0o644)


class TRL:
    """TRL's own losses of pairs of answers, [(prompt ids, chosen ids, rejected ids)], by its
    trainers' methods on two HF models.
    """

    def __init__(self, policy, reference):
        from trl import DPOConfig, DPOTrainer

        self.trainer = DPOTrainer(
            policy,
            reference,
            self.config(DPOConfig),
            train_dataset=self.some(),
            processing_class=hf("gpt2_kind"),
        )

    @staticmethod
    def config(kind):
        import tempfile

        return kind(output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False)

    @staticmethod
    def some():
        """A trainer wants records; nothing is trained on them."""
        from datasets import Dataset

        return Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})

    @staticmethod
    def inputs(pairs):
        """Pairs padded on the right, the chosen ones above the rejected ones."""
        import torch

        rows = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
        width = max(len(p) + len(a) for p, a in rows)
        ids = [[*p, *a, *[0] * (width - len(p) - len(a))] for p, a in rows]
        real = [[int(t < len(p) + len(a)) for t in range(width)] for p, a in rows]
        said = [[int(len(p) <= t < len(p) + len(a)) for t in range(width)] for p, a in rows]
        return dict(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(real),
            completion_mask=torch.tensor(said),
        )

    def dpo(self, pairs, beta, loss_type="sigmoid"):
        """Each pair's loss by DPOTrainer. Its "ipo" is on means over an answer's tokens, the
        paper's on sums.
        """
        self.trainer.beta, self.trainer.loss_types = beta, [loss_type]
        return [
            self.trainer._compute_loss(self.trainer.model, self.inputs([p]), False).item()
            for p in pairs
        ]

    def logps(self, pairs, average=False, reference=False):
        """Sums or means of log-probabilities, chosen and rejected (2,N), by
        CPOTrainer.get_batch_logps.
        """
        import torch
        from trl.experimental.cpo import CPOTrainer

        model, x = self.trainer.ref_model if reference else self.trainer.model, self.inputs(pairs)
        with torch.no_grad():
            logits = model(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).logits
        labels = x["input_ids"].masked_fill(x["completion_mask"] == 0, -100)
        return CPOTrainer.get_batch_logps(logits, labels, average).view(2, -1)

    def cpo(self, chosen, rejected, beta, loss_type="simpo", gamma=0.0, label_smoothing=0.0):
        """Losses by CPOTrainer.cpo_loss: "simpo" of means; "sigmoid" and "ipo" of what they are
        given, here the log-ratios' sums.
        """
        from trl.experimental.cpo import CPOTrainer

        trainer = object.__new__(CPOTrainer)  # the method reads these alone
        trainer.__dict__.update(
            alpha=0.0,
            beta=beta,
            loss_type=loss_type,
            simpo_gamma=gamma,
            label_smoothing=label_smoothing,
            accelerator=self.trainer.accelerator,
        )
        return trainer.cpo_loss(chosen, rejected)[0].tolist()

    @classmethod
    def reward(cls, model, pairs):
        """RewardTrainer's loss, a mean over the pairs."""
        from trl import RewardConfig, RewardTrainer

        trainer = RewardTrainer(
            model,
            cls.config(RewardConfig),
            train_dataset=cls.some(),
            processing_class=hf("gpt2_kind"),
        )
        # the trainer put its tokenizer's: the score would be read on padding
        model.config.pad_token_id = 0
        inputs = cls.inputs(pairs)
        inputs.pop("completion_mask")
        return trainer.compute_loss(trainer.model, inputs).item()


def some_pairs(seed, n=4, vocabulary=60):
    """Ragged pairs of ids; one answer of one token, one pair of equal lengths."""
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(3, vocabulary) for _ in range(n)]  # noqa: E731
    return [
        (ids(rng.randint(1, 6)), ids(a), ids(b))
        for a, b in (
            (1, 4),
            (5, 2),
            (3, 3),
            *((rng.randint(1, 9), rng.randint(1, 9)) for _ in range(n - 3)),
        )
    ]


def losses(smollm2):
    """Preference losses by TRL's code: policy llama_tied, reference llama_wide, reward model
    llama_scores.

    dpo, ipo (on means) by DPOTrainer; cdpo, ipo_on_sums by CPOTrainer's formulas of the log-ratios
    (DPOTrainer has neither); simpo by CPOTrainer, whose simpo_gamma is the margin γ; reward by
    RewardTrainer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(HERE / f"llama_{n}", dtype=torch.float32)
        for n in ("tied", "wide")
    )
    peer, pairs = TRL(policy, reference), some_pairs(0)
    mine, theirs = peer.logps(pairs), peer.logps(pairs, reference=True)
    scores = AutoModelForSequenceClassification.from_pretrained(
        HERE / "llama_scores", dtype=torch.float32
    )
    return {
        "pairs": pairs,
        "policy": mine.tolist(),
        "reference": theirs.tolist(),
        "dpo": [dict(beta=b, losses=peer.dpo(pairs, b)) for b in (0.1, 0.5)],
        "ipo_on_means": [dict(beta=b, losses=peer.dpo(pairs, b, "ipo")) for b in (0.1, 0.5)],
        "ipo_on_sums": [
            dict(beta=b, losses=peer.cpo(*(mine - theirs), b, "ipo")) for b in (0.1, 0.5)
        ],
        "cdpo": [
            dict(
                beta=0.3,
                label_smoothing=e,
                losses=peer.cpo(*(mine - theirs), 0.3, "sigmoid", label_smoothing=e),
            )
            for e in (0.1, 0.4)
        ],
        "simpo": [
            dict(beta=b, gamma=g, losses=peer.cpo(*peer.logps(pairs, True), b, gamma=g))
            for b, g in ((2.5, 1.0), (2.0, 0.0), (0.5, 1.5))
        ],
        "reward": (
            [dict(pairs=[p], loss=peer.reward(scores, [p])) for p in pairs]
            + [dict(pairs=pairs, loss=peer.reward(scores, pairs))]
        ),
    }


# fmt: off
LORAS = {  # base, PEFT's settings
    "list": ("tied", dict(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=6)),
    "pattern": ("biases", dict(target_modules=r".*\.1\.(self_attn|mlp)\.(k|o|up|down)_proj", r=3,
                               lora_alpha=5, use_rslora=True)),
    "head": ("tied", dict(target_modules=["gate_proj", "lm_head"], r=2, lora_alpha=2)),
    "scores": ("scores", dict(target_modules="all-linear", r=2, lora_alpha=4, use_rslora=True,
                              task_type="SEQ_CLS")),
}
# fmt: on


def random_adapter(model, seed: int):
    """What PEFT trains, set to numbers that matter."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


def loras(smollm2):
    """lora_NAME/: adapters as PEFT saves them, over llama_NAME in float32; in expected.safetensors
    its logits (scores: pooled) of the base's tokens, and for the sum of their squares over real
    tokens the gradients of all that is trained, by the adapter file's names."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for name, (base, said) in LORAS.items():
        kind = AutoModelForSequenceClassification if base == "scores" else AutoModelForCausalLM
        peer, folder = (
            kind.from_pretrained(HERE / f"llama_{base}", dtype=torch.float32),
            HERE / f"lora_{name}",
        )
        peer = random_adapter(
            get_peft_model(peer, LoraConfig(**dict(task_type="CAUSAL_LM") | said)), len(name)
        )
        peer.save_pretrained(folder)
        (folder / "README.md").unlink()
        config = json.loads((folder / "adapter_config.json").read_text()) | {
            "base_model_name_or_path": f"llama_{base}"
        }
        config["target_modules"] = (
            sorted(t) if isinstance(t := config["target_modules"], list) else t
        )
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        rows = load_file(HERE / f"llama_{base}" / "expected.safetensors")
        out = peer(input_ids=rows["tokens"], attention_mask=rows["mask"]).logits
        (out if base == "scores" else out[rows["mask"].bool()]).square().sum().backward()
        found = {
            n.replace(".default", "").replace(".modules_to_save", ""): p.grad
            for n, p in peer.named_parameters()
            if p.requires_grad
        }
        save_file({"out": out.detach().contiguous()} | found, folder / "expected.safetensors")


# ---------------------------------------------------------------- metrics
SENTENCES = """The cat sat on the mat, and then it ran. Nationally, runners' running shoes sold
42 %. Élan über naïve Straße İstanbul is NOT nowhere. 漢字 and かな,
عربي! It's 3.14; isn't it? A A a the."""


def rouge_pairs() -> list:
    """300 pairs of texts: unicode, empty ones, lines, repeated words, long ones."""
    rng, words = random.Random(11), SENTENCES.split()
    texts = varied(200, 12) + ["", " ", "\n\n", "a"]
    while len(texts) < 600:
        n = rng.choice([1, 2, 3, 5, 8, 13, 30, 90 if len(texts) % 20 else 300])
        ends = rng.choices([" ", "\n", "\n\n"], [8, 2, 1], k=n)
        texts.append("".join(rng.choice(words) + end for end in ends))
    rng.shuffle(texts)
    return list(zip(texts[::2], texts[1::2], strict=True))


def rouge_numbers(stem: bool) -> list:
    """rouge_score's precision, recall and F of each pair, in the order of rouge's four."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=stem)
    rows = (scorer.score(reference, text).values() for text, reference in rouge_pairs())
    return [[round(x, 12) for score in row for x in score] for row in rows]


def rouge(smollm2):
    """[precision, recall, F] of ROUGE-1, -2, -L, -Lsum for each of rouge_pairs()."""
    return rouge_numbers(False)


CHOICES = [  # made up; white space at a question's end, other scripts, ties of length
    ("Question: Which animal barks?\nAnswer:", ["the dog", "the stone", "a river"]),
    ("Question: How do I dry a wet shirt?\n", ["Hang it in the sun.", "Put it into the river."]),
    ("The man dropped the glass, therefore", ["it broke.", "it sang a song."]),
    ("What is the opposite of hot? ", ["cold", "warm and dry", "seven"]),
    ("Two plus two is", ["four", "five", "22", "twenty-two"]),
    ("¿Qué es esto? 漢字", ["sí", "no, 漢字", "🙂"]),
    ("A B C D", ["E", "a"]),
    ("The sun is a\n\n", ["star", "star that we see by day, and by its light all the rest"]),
    ("def f(x):\n    return", ["x", "x + 1", "None"]),
    ("", ["The cat", "Cat the"]),
]


def choices(smollm2):
    """lm-eval's log-likelihoods of CHOICES under data/base, in float32."""
    import tempfile

    from tools.peers import lm_eval

    rows = [{"query": q, "choices": c, "gold": 0} for q, c in CHOICES]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows))
        f.flush()
        found = lm_eval(HERE.parent.parent / "data" / "base", f.name, len(rows), 4)()
    return [dict(row, logprobs=lls) for row, (lls, *_) in zip(rows, found, strict=True)]


# in the order in which they need each other
FILES = (tokenizers, tokens, rendered, chats, llamas, peft_adapters, loras, nf4, llama_nf4, losses)
FILES += (rouge, choices)


def made_up_pairs(n, draw, theta, phi, psi, sampled):
    """n pairs whose preferences follow tools/verdicts.py's model, exactly or drawn from it."""
    import numpy as np

    length, gamma = draw.normal(150, 500, n).round(), draw.normal(0, 1, n).round(2)
    won = 1 / (1 + np.exp(-(theta + phi * np.tanh(length / 500) + psi * gamma)))
    won = (draw.random(n) < won) * 1.0 if sampled else won.round(4)
    names = ("points", "length", "difficulty")
    return [dict(zip(names, row, strict=True)) for row in zip(won, length, gamma, strict=True)]


def alpaca_fit(pairs, equal):
    """alpaca_eval's own length-controlled fit of such pairs, and of others of equal quality (its
    gamed baselines) → the LC win rate, the weights of tanh(Δ/σ), difficulty and model, and C."""
    import numpy as np
    import pandas as pd
    from alpaca_eval.metrics.glm_winrate import fit_LogisticRegressionCV

    table = pd.DataFrame([*pairs, *equal])
    length = table["length"] / pd.DataFrame(pairs)["length"].std()
    model = (table.index < len(pairs)).astype(float)
    x = pd.DataFrame({"length": np.tanh(length), "difficulty": table["difficulty"], "model": model})
    weight = None
    if equal:
        weight = pd.Series(np.where(model == 1, 1, 0.2 * len(pairs) / len(equal)))
    fitted = fit_LogisticRegressionCV(
        x.assign(preference=table["points"]), "preference", sample_weight=weight
    )
    rate = fitted.predict_proba(x[model == 1].assign(length=0.0))[:, 1].mean()
    return dict(win_rate=rate, weights=fitted.coef_[0].tolist(), C=fitted.C_[0])


def alpaca_eval(smollm2):
    """Made-up annotations and difficulties, and alpaca_eval's fit of them."""
    import numpy as np

    out = []
    for seed, (*model, equal) in enumerate(
        [(-0.5, 1, 0.8, True, 0), (-2.5, 2, 1, True, 100), (0.7, -1.5, 0.3, False, 60)]
    ):
        draw = np.random.default_rng(seed)
        pairs = made_up_pairs(150, draw, *model)
        same = made_up_pairs(equal, draw, 0, 1, 0.5, True)
        out.append(dict(pairs=pairs, equal=same) | alpaca_fit(pairs, same))
    return out


# in the order in which they need each other
FILES = (
    *(tokenizers, tokens, rendered, chats, llamas, peft_adapters, loras, nf4, llama_nf4, losses),
    *(families, alpaca_eval),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"all where none is given: {', '.join(f.__name__ for f in FILES)}"
    )
    parser.add_argument("--smollm2", type=Path, default=Path("smollm2"))
    args = parser.parse_args()
    for make in FILES:
        if not args.names or make.__name__ in args.names:
            made = make(args.smollm2)
            if made is not None:
                (HERE / f"{make.__name__}.json").write_text(
                    json.dumps(made, ensure_ascii=True, separators=(",", ":")) + "\n"
                )


if __name__ == "__main__":
    main()
