"""Every family against live transformers, PEFT and bitsandbytes: tiny random models, ours opened
there and theirs read here.

Run in the peers' environment. Each test prints the largest difference that it measured (pytest -s).
"""

import json

import pytest
import torch
from stages import done
from tiny import FAMILIES, LONG, SHORT, SMALL, chat_tokenizer, family, score_rows, user, write

from common import hub
from common.peft import load_adapter, save_adapter
from lora import add_lora, merge
from model import scalar_model
from packing import by_segments, pad
from quant import Linear4bit, block_linears, quantize_model
from sampling import generate

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

GENERATOR = torch.Generator().manual_seed(1)
ROWS = [torch.randint(3, 64, (n,), generator=GENERATOR).tolist() for n in (30, 11, 1, 16)]


# heads of 16 numbers for rows of whole blocks
ROPE = {
    name: {"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}}
    for name, short, long in (
        ("phi3.5", SHORT * 2, LONG * 2),
        ("phi4", SHORT + SHORT[:2], LONG + LONG[:2]),
    )
}


def measured(what, difference, limit=1e-4):
    print(f"\n{what}: {difference:.2g}", end=" ")
    assert difference < limit


def opened(folder, kind=AutoModelForCausalLM):
    peer, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return peer.eval()


def alone(peer, row):
    return peer(torch.tensor([row])).logits[0]


def spelt(folder, model, name):
    """The folder as the hub has it: the older spelling alone."""
    hub.save(folder, model)
    (folder / "config.json").write_text(
        json.dumps(SMALL | FAMILIES[name] | {"torch_dtype": "float32"})
    )


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_of_ours_both_spellings_and_theirs(name, tmp_path):
    """Rows alone, padded on either side, and packed; saved by us, as the hub has it, by them."""
    model = family(name)
    hub.save(tmp_path / "ours", model)
    spelt(tmp_path / "hub", model, name)
    peer = opened(tmp_path / "ours")
    expected = [alone(peer, row) for row in ROWS]
    assert max(e.std() for e in expected) > 0.5
    older = opened(tmp_path / "hub")
    measured(
        name,
        max((alone(older, r) - e).abs().max() for r, e in zip(ROWS, expected, strict=True)),
        1e-5,
    )
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    for folder in ("ours", "hub", "theirs"):
        read, _ = hub.load(tmp_path / folder)
        assert read.config == model.config
        for left in (False, True):
            tokens, mask = pad(ROWS, fill=7, left=left)
            logits = read(tokens, mask)
            gaps = [(logits[i][mask[i]] - e).abs().max() for i, e in enumerate(expected)]
            measured(f"{name}, {folder}, left={left}", max(gaps))
    if name not in ("phi3.5", "phi4"):  # theirs are long or short by the batch, ours by the row
        tokens, mask = pad(ROWS, left=True)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        theirs = peer(tokens, attention_mask=mask.long(), position_ids=positions).logits
        measured(f"{name}, padded there too", (theirs - model(tokens, mask))[mask].abs().max())
    tokens = torch.tensor([sum(ROWS, [])])
    segments = torch.tensor([sum(([i] * len(row) for i, row in enumerate(ROWS)), [])])
    packed = model.logits(model.packed(by_segments(tokens, segments)))[0]
    measured(f"{name}, packed", (packed - torch.cat(expected)).abs().max())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_greedy_token_for_token(name, tmp_path):
    model = family(name)
    hub.save(tmp_path, model)
    peer = opened(tmp_path)
    for row, answer in zip(ROWS, generate(model, ROWS, 30, temperature=0), strict=True):
        theirs = peer.generate(
            torch.tensor([row]),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert theirs[0, len(row) :].tolist() == answer


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_reward_model(name, tmp_path):
    model = scalar_model(family(name), torch.Generator().manual_seed(0))
    hub.save(tmp_path, model)
    peer = opened(tmp_path, AutoModelForSequenceClassification)
    theirs = torch.stack([peer(torch.tensor([row])).logits[0, 0] for row in ROWS])
    measured(f"{name}: scores", (score_rows(model, *pad(ROWS)) - theirs).abs().max())
    assert hub.load(tmp_path)[0].config == model.config


# -- trained, adapted, in 4 bits


@pytest.mark.parametrize("name", FAMILIES)
def test_ten_steps_of_sft_are_opened_there(name, tmp_path):
    """sft.py from a folder of theirs to a folder that they open; the config's own words survive."""
    tok = chat_tokenizer()
    hub.save(tmp_path / "base", family(name, vocab_size=tok.vocab_size), tok)
    opened(tmp_path / "base").save_pretrained(tmp_path / "base")
    chats = [user(f"{i}?") + [{"role": "assistant", "content": f"{i}."}] for i in range(20)]
    data = write(tmp_path / "sft.jsonl", [{"messages": chat} for chat in chats])
    done(
        "sft.py",
        model=str(tmp_path / "base"),
        data=data,
        out=str(tmp_path / "out"),
        steps=10,
        batch=4,
    )
    model, _ = hub.load(tmp_path / "out")
    moved = model.norm.weight - hub.load(tmp_path / "base")[0].norm.weight
    assert moved.abs().min() > 0
    peer = opened(tmp_path / "out")
    with torch.no_grad():
        gaps = [(model(torch.tensor([row]))[0] - alone(peer, row)).abs().max() for row in ROWS]
    measured(f"{name}: after ten steps", max(gaps))
    before, after = (
        json.loads((tmp_path / f / "config.json").read_text()) for f in ("base", "out")
    )
    assert before.keys() - {"transformers_version"} <= after.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_adapter_is_opened_there(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = family(name)
    hub.save(tmp_path / "base", model)
    plain = hub.load(tmp_path / "base")[0]
    add_lora(model, 4, 8, "all", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".B." in n:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(n)))
    save_adapter(model, tmp_path / "adapter")
    peer = peft.PeftModel.from_pretrained(opened(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = alone(peer, ROWS[0])
        ours = model(torch.tensor([ROWS[0]]))[0]
        assert (plain(torch.tensor([ROWS[0]]))[0] - ours).abs().max() > 0.1
        measured(f"{name}: LoRA", (ours - expected).abs().max())
        peer.save_pretrained(tmp_path / "theirs")
        again = load_adapter(plain, tmp_path / "theirs")
        measured(f"{name}: read again", (again(torch.tensor([ROWS[0]]))[0] - expected).abs().max())
        merged = merge(model)
        measured(f"{name}: merged", (merged(torch.tensor([ROWS[0]]))[0] - expected).abs().max())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_nf4_is_bitsandbytes(name, tmp_path):
    """Rows of whole blocks (test_bitsandbytes.py says why): as it reads, and from its folder."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    sizes = dict(hidden_size=64, intermediate_size=128)
    hub.save(tmp_path / "plain", family(name, **sizes, head_dim=16, **ROPE.get(name, {})))
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False
    )
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.float32
    ).train()
    expected = alone(peer, ROWS[0])
    peer.save_pretrained(tmp_path / "nf4")
    read = hub.load(tmp_path / "nf4")[0]
    measured(f"{name}: NF4", (read(torch.tensor([ROWS[0]]))[0] - expected).abs().max())
    made, plain, ours = (hub.load(tmp_path / "plain", quant=q)[0] for q in ("nf4", None, None))
    assert (plain(torch.tensor([ROWS[0]]))[0] - expected).abs().max() > 0.05
    for layer in block_linears(ours):
        ours.set_submodule(layer, Linear4bit(ours.get_submodule(layer), double_quant=False))
    measured(f"{name}: ours", (ours(torch.tensor([ROWS[0]]))[0] - expected).abs().max())
    states = made.state_dict(), quantize_model(plain).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
