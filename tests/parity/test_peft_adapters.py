"""Against live PEFT, both ways: IA3, prompts and prefixes; logits, gradients of the adapter's
parameters, greedy answers.

Run in the peers' environment. Each test prints the largest difference that it measured (pytest -s).
"""

import pytest
import torch
import torch.nn.functional as F

import adapters
import lora
from common import hub, peft
from model import Config, Transformer
from parity.test_hub import batch, measured, shape, spread
from sampling import generate

pytest.importorskip("peft")
from peft import (
    IA3Config,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

P = 7
CONFIGS = {
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prompt_tuning_init="SAMPLE_VOCAB"
    ),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
    "projected prefix": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True
    ),
}
SHAPES = {
    "biases": dict(attention_bias=True, mlp_bias=True),
    "tied, wide heads": dict(tie_word_embeddings=True, head_dim=24),
}


def far(model):
    """Trained numbers away from their start."""
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator) * 0.3
    return model


def theirs(peer, tokens, mask):
    """Their logits of the real tokens' columns."""
    return peer(input_ids=tokens, attention_mask=mask.long()).logits[:, -tokens.shape[1] :]


def loss_of(logits, tokens, mask):
    return F.cross_entropy(logits[:, :-1][mask[:, 1:]], tokens[:, 1:][mask[:, 1:]])


def peer_of(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def gradients(peer):
    """By the names under which PEFT stores them; a prompt's or prefix's single one as it is."""
    found = {
        n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if p.grad is not None
    }
    if len(found) > 1:
        return found
    return {"prompt_embeddings": next(iter(found.values()))}


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_theirs_loaded_by_us(name, changes, tmp_path):
    spread(LlamaForCausalLM(LlamaConfig(**shape(**SHAPES[changes])))).save_pretrained(
        tmp_path / "base"
    )
    peer = far(get_peft_model(peer_of(tmp_path / "base"), CONFIGS[name]())).eval()
    peer.save_pretrained(tmp_path / "adapter")
    model = peft.load_adapter(hub.load(tmp_path / "base")[0], tmp_path / "adapter")
    tokens, mask = batch()
    ours, out = model(tokens, mask), theirs(peer, tokens, mask)
    measured(
        f"{name}, {changes}: logits of std {out.std():.2g}",
        (ours - out)[mask].abs().max().item(),
        1e-4,
    )
    loss_of(ours, tokens, mask).backward()
    loss_of(out, tokens, mask).backward()
    if name != "projected prefix":  # which they train by other parameters than the stored ones
        expected, parts = gradients(peer), dict(adapters.parts(model))
        grads = (
            {peft.ia3_key(n): m.scale.grad for n, m in parts.items()}
            if name == "ia3"
            else {"prompt_embeddings": model.virtual.rows.grad}
        )
        assert grads.keys() == expected.keys()
        worst = max(
            (grads[k].flatten() - g.flatten()).abs().max().item() for k, g in expected.items()
        )
        measured(
            f"gradients up to {max(g.abs().max() for g in expected.values()):.2g}", worst, 1e-4
        )


@pytest.mark.parametrize(
    "kind, reparametrise", [("ia3", True), ("prompt", True), ("prefix", True), ("prefix", False)]
)
def test_ours_loaded_by_them(kind, reparametrise, tmp_path):
    for changes in SHAPES.values():
        model = spread(Transformer(Config(**dict(head_dim=16) | shape(**changes))))
        hub.save(tmp_path / "base", model)
        far(
            adapters.add_adapter(
                model,
                kind,
                P,
                reparametrise=reparametrise,
                generator=torch.Generator().manual_seed(0),
            )
        )
        peft.save_adapter(model, tmp_path / "adapter", tmp_path / "base")
        peer = PeftModel.from_pretrained(peer_of(tmp_path / "base"), tmp_path / "adapter").eval()
        tokens, mask = batch()
        with torch.no_grad():
            measured(
                f"{kind}: logits",
                (model(tokens, mask) - theirs(peer, tokens, mask))[mask].abs().max().item(),
                1e-4,
            )
        prompt = tokens[0, :20].tolist()
        answer = generate(model, [prompt, prompt[:3]], 20, temperature=0)[0]
        out = peer.generate(
            input_ids=tokens[:1, :20],
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out[0, -20:].tolist() == answer


def test_their_merged_ia3_is_ours(tmp_path):
    spread(
        LlamaForCausalLM(LlamaConfig(**shape(attention_bias=True, mlp_bias=True)))
    ).save_pretrained(tmp_path / "base")
    peer = far(get_peft_model(peer_of(tmp_path / "base"), CONFIGS["ia3"]()))
    peer.save_pretrained(tmp_path / "adapter")
    model = lora.merge(peft.load_adapter(hub.load(tmp_path / "base")[0], tmp_path / "adapter"))
    expected = peer.merge_and_unload().state_dict()
    worst = max(
        (v - expected[hub.hub_name(k)]).abs().max().item() for k, v in model.state_dict().items()
    )
    measured("merged weights", worst, 1e-6)
