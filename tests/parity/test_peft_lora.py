"""Against live PEFT: adapters written there read here, ours opened there, and what merging writes
opened by transformers.

Logits (scores: pooled) of ragged rows, and the gradients of all that is trained. Each test prints
the largest difference that it measured (pytest -s); a gradient's is relative where the gradient is
above 1.
"""

import sys
from pathlib import Path

import pytest
import torch
from tiny import lm, score_rows

from common import hub
from common.peft import load_adapter, save_adapter
from lora import add_lora, merge
from model import scalar_model
from packing import pad

peft = pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent.parent / "golden"))
from make import random_adapter  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

GENERATOR = torch.Generator().manual_seed(1)
TOKENS, MASK = pad(
    [torch.randint(3, 280, (n,), generator=GENERATOR).tolist() for n in (40, 13, 1, 27)]
)
# fmt: off
CASES = {  # base, PEFT's settings, ours
    "attention": ({}, dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], r=4,
                           lora_alpha=8), "attention"),
    "rslora": ({}, dict(target_modules="all-linear", r=3, lora_alpha=5, use_rslora=True), "all"),
    "pattern": (dict(attention_bias=True), dict(target_modules=r".*\.1\.mlp\.(up|down)_proj", r=2),
                ["1.mlp.up_proj", "1.mlp.down_proj"]),
    "excluded": ({}, dict(target_modules=["mlp.up_proj", "q_proj"], exclude_modules=r".*\.0\..*"),
                 ["1.mlp.up_proj", "1.self_attn.q_proj"]),
    "head": ({}, dict(target_modules=["up_proj", "lm_head"], r=4), "up_proj,lm_head"),
    "tied head": (dict(tie_word_embeddings=True), dict(target_modules=["o_proj", "lm_head"], r=4),
                  "o_proj,lm_head"),
    "scores": (dict(num_labels=1), dict(target_modules=["q_proj", "up_proj"], r=4),
               "q_proj,up_proj"),
    "scores, rslora": (dict(num_labels=1), dict(target_modules="all-linear", r=4, use_rslora=True),
                       "all"),
}
# fmt: on


def measured(what, difference, limit=1e-4):
    print(f"\n{what}: {difference:.2g}", end=" ")
    assert difference < limit


def bases(folder, scalar=False, **changes):
    """The same base here and there."""
    model = lm(**changes, pad_token_id=0, eos_token_id=2)
    if scalar:
        model = scalar_model(model, torch.Generator().manual_seed(0))
    hub.save(folder, model)
    return model, (
        AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    ).from_pretrained(folder, dtype=torch.float32)


def outputs(ours, theirs):
    scalar = ours.config.num_labels
    theirs = theirs(input_ids=TOKENS, attention_mask=MASK.long()).logits
    return (
        (score_rows(ours, TOKENS, MASK), theirs[:, 0])
        if scalar
        else (ours(TOKENS, MASK)[MASK], theirs[MASK])
    )


def compare(ours, theirs, plain):
    """Outputs, which differ from the base's, and the gradients of everything that trains there,
    which is what trains here.
    """
    a, b = outputs(ours, theirs)
    assert (b - plain).abs().max() > 0.1
    measured("outputs", (a - b).abs().max().item())
    for out in (a, b):
        out.square().mean().backward()
    mine = {
        hub.hub_name(n).replace(".A.", ".lora_A.").replace(".B.", ".lora_B."): p
        for n, p in ours.named_parameters()
        if p.requires_grad
    }
    found = {
        n.removeprefix("base_model.model."): p
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = {
        n.removesuffix(".weight").replace(".modules_to_save.default", ".weight"): p
        for n, p in found.items()
    }
    assert mine.keys() == found.keys() and len(mine) > 3
    gaps = [
        ((p.grad - found[n].grad).abs() / found[n].grad.abs().clamp(min=1)).max().item()
        for n, p in mine.items()
    ]
    assert all(p.grad.abs().max() > 1e-4 for p in mine.values())
    measured("gradients", max(gaps))


def case(name, folder):
    changes, said, targets = CASES[name]
    scalar = bool((changes := dict(changes)).pop("num_labels", 0))
    return (
        *bases(folder, scalar, **changes),
        dict(task_type="SEQ_CLS" if scalar else "CAUSAL_LM") | said,
        targets,
    )


@pytest.mark.parametrize("name", CASES)
def test_theirs_read_by_us(name, tmp_path):
    ours, theirs, said, _ = case(name, tmp_path / "base")
    with torch.no_grad():
        plain = outputs(ours, theirs)[1]
    theirs = random_adapter(peft.get_peft_model(theirs, peft.LoraConfig(**said)), 3)
    theirs.save_pretrained(tmp_path / "adapter")
    compare(load_adapter(ours, tmp_path / "adapter"), theirs, plain)


@pytest.mark.parametrize("name", CASES)
def test_ours_opened_by_them(name, tmp_path, recwarn):
    ours, theirs, said, targets = case(name, tmp_path / "base")
    with torch.no_grad():
        plain = outputs(ours, theirs)[1]
    add_lora(
        ours,
        said.get("r", 8),
        said.get("lora_alpha", 8),
        targets,
        rslora=said.get("use_rslora", False),
    )
    random_adapter(ours, 4)
    save_adapter(ours, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).eval()
    compare(ours, theirs, plain)
    assert not [
        w.message
        for w in recwarn
        if "missing" in str(w.message) or "unexpected" in str(w.message).lower()
    ]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_merged_by_us_opened_by_them(name, tmp_path):
    """A tied head that had an adapter is read by transformers as it was trained; PEFT over the base
    says the same.
    """
    ours, theirs, said, targets = case(name, tmp_path / "base")
    random_adapter(
        add_lora(
            ours,
            said.get("r", 8),
            said.get("lora_alpha", 8),
            targets,
            rslora=said.get("use_rslora", False),
        ),
        5,
    )
    save_adapter(ours, tmp_path / "adapter")
    before = outputs(ours, theirs)[0]
    hub.save(tmp_path / "merged", merge(ours))
    kind = AutoModelForSequenceClassification if ours.config.num_labels else AutoModelForCausalLM
    peer, info = kind.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    measured("merged", (outputs(ours, peer)[1] - before).abs().max().item())
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    measured("not merged there", (outputs(ours, theirs)[1] - before).abs().max().item())


@torch.no_grad()
def test_smollm2(tmp_path):
    """A tied model of the hub: an adapter on all layers and the head, ours there, and merged."""
    folder = Path(__file__).parent.parent.parent / "smollm2"
    if not (folder / "config.json").exists():
        pytest.skip("needs the folder smollm2: make smollm2")
    model, tokenizer = hub.load(folder)
    add_lora(model, 8, 16, "all,lm_head")
    for n, p in model.named_parameters():  # about the size of the weights
        if p.requires_grad:
            p.copy_(torch.randn(p.shape, generator=GENERATOR) * (0.02 if ".B." in n else 0.1))
    tokens = torch.tensor(
        [
            tokenizer.encode(
                "The lighthouse at the end of the bay was built in 1847, when the harbour was still"
                " busy."
            )
        ]
    )
    save_adapter(model, tmp_path / "adapter", str(folder))
    before = model(tokens)
    peer = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "adapter"
    ).eval()
    measured("SmolLM2: logits", (peer(tokens).logits - before).abs().max().item(), 1e-3)
    del peer
    hub.save(tmp_path / "merged", merge(model), tokenizer)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    measured("SmolLM2: merged", (peer(tokens).logits - before).abs().max().item(), 1e-3)
