"""tools/gguf.py's files in llama.cpp (the wheel xllamacpp): ids, chats, log-probabilities, greedy
answers, on one thread, with keys and values in float32.

Run in the peers' environment. Each test prints the largest difference that it measured (pytest -s).
"""

import json
import sys
import unicodedata
import urllib.request
from pathlib import Path

import pytest
import torch
from stages import done
from tiny import FAMILIES, bandit, chat_tokenizer, family, user, write

from common import hub
from common.peft import save_adapter
from data import templates
from data.tokenizer import Pieces, Tokenizer
from lora import add_lora, merge
from quant import quantize_model
from sampling import generate
from tools import gguf

pytest.importorskip("gguf")
llama = pytest.importorskip("xllamacpp")
TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS / "golden"))
from make import CHATS, EDGES, KINDS, every_merge, spiced, varied  # noqa: E402
from make import FAMILIES as OTHERS  # noqa: E402
from make import family as kind_of  # noqa: E402

QUESTIONS = ["What is the capital of Peru?", "What is 7 + 5?", "Name the opposite of hot.", "Hi"]


class Server:
    """llama.cpp with one file, asked over HTTP: Server(path)("/completion", prompt=…)."""

    def __init__(self, path, context=512):
        p = llama.CommonParams()
        p.model.path, p.n_ctx, p.warmup, p.fit_params, p.verbosity = str(path), context, 0, 0, 1
        p.cache_type_k = p.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = p.n_threads_http = 1
        self.server = llama.Server(p)

    def __call__(self, path, **body):
        header = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.server.listening_address + path, data, header)
        return json.load(urllib.request.urlopen(request, timeout=120))

    def ids(self, text, **how):
        return self("/tokenize", content=text, **how)["tokens"]

    def complete(self, prompt, tokens, **how):
        how |= dict(temperature=0, return_tokens=True, cache_prompt=False)
        return self("/completion", prompt=prompt, n_predict=tokens, **how)

    def logprobs(self, ids, vocabulary):
        """log p of every token as the next one; None where that token ends no character."""
        said = self.complete(ids, 1, n_probs=vocabulary)
        if "completion_probabilities" not in said:
            return None
        first = said["completion_probabilities"][0]["top_logprobs"]
        found = torch.full((vocabulary,), torch.nan)
        for t in first:
            found[t["id"]] = t["logprob"]
        return found


def opened(folder, context=512, file=None, **how):
    file = file or folder.with_name(f"{folder.name}-f32.gguf")
    gguf.export(gguf.Options(model=str(folder), out=str(file), **how))
    return Server(file, context)


def measured(what, difference, limit):
    print(f"\n{what}: {difference:.2g}", end=" ")
    assert difference < limit


def answers(model, tok, prompts, tokens=24):
    prompts = [templates.render(tok, chat, True)[0] for chat in prompts]
    ends = templates.end_ids(tok, model.config)
    return prompts, generate(model, prompts, tokens, temperature=0, eos_id=ends)


def same_answers(server, model, tok, chats):
    """Text, ids and greedy answers of chats that end in a question."""
    for chat, prompt, answer in zip(chats, *answers(model, tok, chats), strict=True):
        text = server("/apply-template", messages=chat)["prompt"]
        assert text == templates.text(chat, True, templates.of(tok), tok.bos, tok.eos)
        assert server.ids(text, add_special=True, parse_special=True) == prompt
        said = server.complete(text, 24)
        assert said["tokens"] == answer
        assert (said["stop_type"] == "eos") == (len(answer) < 24 or answer[-1] in (1023, 2))


# ---------------------------------------------------------------- the embedded model, SmolLM2
@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """The embedded base after a few steps; llama.cpp does not open every file of this name."""
    path = tmp_path_factory.mktemp("sft")
    chats = [(f"What is {i} + {j}?", f"It is {i + j}.") for i in range(8) for j in range(8)]
    rows = [{"messages": [*user(q), {"role": "assistant", "content": a}]} for q, a in chats]
    data, out = write(path / "sft.jsonl", rows), str(path / "phi3-sft")
    done("sft.py", model="data/base", data=data, out=out, steps=8, batch=4)
    return path / "phi3-sft"


def test_the_embedded_model_answers_the_same(sft):
    model, tok = hub.load(sft)
    server = opened(sft)
    system = {"role": "system", "content": "Be brief."}
    chats = [*map(user, QUESTIONS), [system, *CHATS[1][:3]]]
    same_answers(server, model, tok, chats)
    for text in [*varied(300, 3), *spiced(100, 4)]:
        text = text.replace("\0", "")
        assert server.ids(text, add_special=False, parse_special=False) == tok.encode(text)


@pytest.mark.parametrize("kind, limit", [("bf16", 1e-3), ("q8_0", 1e-2)])
@torch.no_grad()
def test_smaller_types_are_close(kind, limit, tmp_path):
    """The base, which has no template: KL divergence of the next token, and the likeliest one."""
    base = TESTS.parent / "data" / "base"
    model, tok = hub.load(base)
    server, gaps = opened(base, file=tmp_path / "base.gguf", type=kind), []
    for text in ("The capital of Peru is", "The opposite of hot is", "7 + 5 ="):
        ids = templates.document(tok, text)[:-1]
        ours, theirs = model(torch.tensor([ids]))[0, -1], server.logprobs(ids, 1024)
        gaps.append((ours.softmax(-1) * (ours.log_softmax(-1) - theirs)).sum().abs())
        assert ours.argmax() == theirs.argmax()
    measured(kind, max(gaps), limit)
    assert max(gaps) > 1e-7


def test_smollm2_with_a_merged_adapter(tmp_path):
    if not (TESTS.parent / "smollm2" / "config.json").exists():
        pytest.skip("needs the folder smollm2: make smollm2")
    model, tok = hub.load(TESTS.parent / "smollm2")
    add_lora(model, 4, 8, "all", generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if ".B." in name:
            p.data.normal_(0, 0.01, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(model, tmp_path / "out" / "adapter")
    hub.save(tmp_path / "out", merge(model), tok)
    same_answers(opened(tmp_path / "out"), *hub.load(tmp_path / "out"), [*map(user, QUESTIONS[:3])])


# ---------------------------------------------------------------- other families
SMALL = dict(vocab_size=280, bos_token_id=None, eos_token_id=None, pad_token_id=None)
CHANGES = {  # windows that a row does not exceed, where llama.cpp has none; its scale in Gemma
    "mistral": dict(sliding_window=48),
    "qwen2, windows": dict(sliding_window=48),
    "phi3": dict(sliding_window=48),
    "gemma2": dict(query_pre_attn_scalar=12),
    "gemma3": dict(query_pre_attn_scalar=12),
}
ROW = torch.randint(3, 256, (320,), generator=torch.Generator().manual_seed(1)).tolist()


def same_logprobs(server, model, name, lengths=(5, 8, 12, 16, 22, 30)):
    gaps = []
    for n in lengths:
        theirs = server.logprobs(ROW[:n], 280)
        if theirs is not None:
            ours = model(torch.tensor([ROW[:n]]))[0, -1].log_softmax(-1)
            gaps.append((theirs - ours).abs().max())
    assert gaps
    # ggml reads Gemma's GELU from a table of 16 bits
    measured(name, max(gaps), 1e-2 if "gemma" in name else 1e-4)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("phi3.5", "phi4")])
@torch.no_grad()
def test_families(name, tmp_path):
    model, tok = family(name, **SMALL, **CHANGES.get(name, {})), chat_tokenizer()
    hub.save(tmp_path / "model", model, tok)
    server = opened(tmp_path / "model", 256)
    same_logprobs(server, model, name)
    ends = [tok.special["<|im_end|>"], tok.special["<|endoftext|>"]]
    answer = generate(model, [ROW[:9]], 30, temperature=0, eos_id=ends)[0]
    assert server.complete(ROW[:9], 30)["tokens"] == answer


@pytest.mark.parametrize("name", ["phi3.5", "phi4"])
@torch.no_grad()
def test_long_and_short_rope(name, tmp_path, capsys):
    """llama.cpp chooses by the context that there is room for, we by the text's length."""
    first = dict(original_max_position_embeddings=256, max_position_embeddings=1024)
    model = family(name, **SMALL, **first)
    hub.save(tmp_path / "model", model, chat_tokenizer())
    same_logprobs(opened(tmp_path / "model", 512), model, "long", (270, 280, 300, 320))
    assert "more than 256 tokens" in capsys.readouterr().err
    same_logprobs(Server(tmp_path / "model-f32.gguf", 256), model, "short", (8, 50, 100, 200))


@torch.no_grad()
def test_biases_and_four_bits(tmp_path):
    model = family("llama", **SMALL, hidden_size=64, attention_bias=True, mlp_bias=True)
    hub.save(tmp_path / "model", model, chat_tokenizer())
    same_logprobs(opened(tmp_path / "model", 256), model, "biases")
    packed = quantize_model(hub.load(tmp_path / "model")[0])
    for (name, x), (again, y) in zip(*(gguf.tensors(m, 280) for m in (packed, model)), strict=True):
        changed = (x - y).abs().max() > 0
        assert name == again and changed == ("blk" in name and "norm" not in name and y.dim() == 2)
    assert sum(x.dim() for _, x in gguf.tensors(packed, 280)) > 20


# ---------------------------------------------------------------- tokenizers and templates
@pytest.fixture(scope="module", params=[*KINDS, *OTHERS])
def kind(request, tmp_path_factory):
    """A tokenizer of each kind and llama.cpp with it. SentencePiece's have every merge, as they
    have when they are converted."""
    name, path = request.param, tmp_path_factory.mktemp("kinds") / request.param
    if name in KINDS:
        tok = Tokenizer.load(TESTS / "golden" / name)
    else:
        kind_of(name, path)
        spec, config = (
            json.loads((path / f).read_text()) for f in ("tokenizer.json", "tokenizer_config.json")
        )
        tok = Tokenizer.load(path)
        if isinstance(tok.coder, Pieces) and spec["model"]["type"] == "BPE":
            added = {t["content"] for t in spec["added_tokens"]}
            vocab = {t: i for t, i in spec["model"]["vocab"].items() if t not in added}
            spec["model"]["merges"] = every_merge(
                {t: i for t, i in vocab.items() if len(t) != 6 or "<0x" not in t}
            )
            with pytest.raises(ValueError, match="has no merge of"):
                gguf.vocabulary(tok, family("llama").config)
            tok = Tokenizer(json.dumps(spec), config)
    size = dict(vocab_size=tok.vocab_size + 3, bos_token_id=tok.bos_id, eos_token_id=tok.eos_id)
    hub.save(path, family("llama", **size, pad_token_id=tok.pad_id), tok)
    if name == "unigram_kind":
        with pytest.raises(ValueError, match="no tokenizer of this kind"):
            opened(path)
        pytest.skip("refused")
    return name, tok, opened(path)


def test_ids_of_400_strings(kind):
    name, tok, server = kind
    lost = getattr(tok.coder, "missing", ())
    compared = 0
    for text in [*varied(200, 6), *spiced(200, 7)]:
        text = text.replace("\0", "")  # no token's text there
        if name == "qwen_kind":
            text = unicodedata.normalize("NFC", text)
        if not (name == "phi4_kind" and "\u0301" in text or set(text.encode()) & set(lost)):
            after = "token" if name in ("mistral_kind", "zephyr_kind") else None  # what gguf says
            ids = server.ids(text, add_special=False, parse_special=False)
            assert ids == tok.encode(text, after), ascii(text)
            compared += 1
    assert compared > 150
    first = tok.encode("Hi there", after)
    assert server.ids("Hi there", add_special=True) == [*tok.begin, *first]


def test_chats(kind):
    """The text is ours, less the beginning that it puts there itself; so are the ids."""
    name, tok, server = kind
    format = templates.of(tok)
    for chat in [*CHATS[:4], EDGES[1][:1] + EDGES[1][2:3]]:
        chat = [{k: m[k] for k in ("role", "content")} for m in chat[:-1]]
        if chat[0]["role"] == "system" and format.system is None:
            continue
        text = templates.text(chat, True, format, tok.bos, tok.eos)
        theirs = server("/apply-template", messages=chat)["prompt"]
        assert theirs == (text.removeprefix(tok.bos) if tok.begin else text)
        ids = server.ids(theirs, add_special=True, parse_special=True)
        ours = templates.render(tok, chat, True)[0]
        if name == "zephyr_kind":  # begins with text
            assert ids[2:] == ours[2:]
        elif name != "phi4_kind":  # white space behind special tokens
            assert ids == ours


@pytest.mark.parametrize("letter", "abc")
def test_three_end_tokens(letter, tmp_path):
    first = [5.0 * (letter == x) for x in "abcd"]
    bandit(tmp_path / "model", [*first, 0.0], [0.0] * 5)
    file, ids = tmp_path / "model" / "config.json", [chat_tokenizer().encode(c)[0] for c in "bc"]
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], *ids]}))
    prompt = templates.render(chat_tokenizer(), user("?"), True)[0]
    said = opened(tmp_path / "model").complete(prompt, 4)
    assert (said["stop_type"] == "eos" and len(said["tokens"]) == 1) == (letter != "a")
