"""What a stage trains: every adapter in every stage, killed and resumed, merged and kept, and PPO's
four networks over one base.
"""

import json
import math
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stages import done, interrupt, refused, run, script
from test_resume import contents
from tiny import folder, metrics

import lora
import reward
import sft
from common import hub, memory, tuning
from common.run import autocast, pick_device
from model import scalar_model, share

CPU = pick_device("cpu")
# the head: all but scalar models have one
LORA = dict(lora=4, alpha=8, targets="attention,down_proj,lm_head")
WAYS = {
    "lora": LORA,
    "qlora": LORA | dict(quant="nf4", paged=True),
    "checkpointing": LORA | dict(checkpointing=True),
    "paged": dict(paged=True),
    "ia3": dict(adapter="ia3"),
    "prompt": dict(adapter="prompt", virtual_tokens=3, lr=0.05),
    "prefix": dict(adapter="prefix", virtual_tokens=3),
}
KEEP = dict(quant="nf4", keep_base=True)


def files(out):
    """A run's bytes, its adapter's among them."""
    adapter = {f"adapter/{f.name}": f.read_bytes() for f in Path(out, "adapter").glob("*")}
    aside = Path(out).with_name("aside")
    if adapter:
        Path(out, "adapter").rename(aside)
    try:
        return contents(out) | adapter
    finally:
        if adapter:
            aside.rename(Path(out, "adapter"))


@pytest.fixture(scope="module")
def small(small):
    """On the CPU, where a run resumes bit for bit, and where nothing is merged in bf16."""
    return {stage: options | dict(device="cpu") for stage, options in small.items()}


@pytest.fixture(scope="module")
def qlora(small, tmp_path_factory):
    """SFT and reward model as adapters over one 4-bit base → their folders."""
    at = tmp_path_factory.mktemp("qlora")
    done("sft.py", out=at / "sft", **small["sft"] | WAYS["qlora"] | dict(steps=30, lr=0.02))
    done("reward.py", out=at / "reward", **small["reward"] | KEEP | dict(model=at / "sft", lr=0.01))
    return at


@pytest.mark.parametrize("way", WAYS)
def test_sft_killed_and_resumed_with_each_adapter(way, small, tmp_path):
    options = {k: v for k, v in small["sft"].items() if k != "lr"} | WAYS[way] | dict(save_every=2)
    whole = done("sft.py", out=tmp_path / "whole", **options)
    interrupt(2, tmp_path / "broken", "sft.py", **options)
    done("sft.py", out=tmp_path / "broken", **options)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert (
        "warning" not in whole.out
        and "sum" in whole.out
        and "trained" in whole.out
        and "GB at most" in whole.out
    )
    losses = [line["loss"] for line in metrics(tmp_path / "whole")]
    assert sum(losses[-6:]) < sum(losses[:6])
    assert (tmp_path / "whole" / "adapter" / "adapter_config.json").exists() == (way != "paged")


@pytest.mark.parametrize("stage", ("reward", "ppo", "dpo", "simpo"))
@pytest.mark.parametrize("keep", (False, True))
def test_the_other_stages_with_lora(stage, keep, small, qlora, tmp_path):
    """On the merged model a new adapter, or the old one on its 4-bit base; killed and resumed =
    uninterrupted.
    """
    options = {k: v for k, v in small[stage].items() if k != "lr"} | dict(save_every=2)
    options |= KEEP | dict(model=qlora / "sft") if keep else LORA
    if keep and stage == "ppo":
        options["reward"] = qlora / "reward"
    whole = done(script(stage), out=tmp_path / "whole", **options)
    interrupt(1, tmp_path / "broken", script(stage), **options)
    done(script(stage), out=tmp_path / "broken", **options)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert "warning" not in whole.out
    first = metrics(tmp_path / "whole")[0]
    if stage == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    if stage == "ppo":
        assert first["ratio_error"] < 1e-5 and abs(first["kl"]) < 1e-5
    said = json.loads((tmp_path / "whole" / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == (
        small["sft"]["model"] if keep else str(options["model"])
    )


def options(**changes):
    o = dict(
        lora=0,
        alpha=0.0,
        targets="all",
        quant="none",
        paged=False,
        checkpointing=False,
        compile="auto",
        keep_base=False,
        seed=0,
    )
    return Namespace(**o | changes)


@torch.no_grad()
def test_the_merged_folder_is_the_adapter_on_its_base(small, qlora):
    model, tok = tuning.start(options(model=qlora / "sft", **KEEP), CPU)
    merged, same = tuning.load(qlora / "sft")
    tokens = torch.randint(400, (2, 20), generator=torch.Generator().manual_seed(0))
    assert (model(tokens) - merged(tokens)).abs().max() < 1e-4
    assert tok.special == same.special and model.config.eos_token_id == merged.config.eos_token_id
    base = hub.load(small["sft"]["model"], quant="nf4")[0]
    lora.use(model, None)
    assert torch.equal(model(tokens), base(tokens))


def test_ppo_s_four_networks_hold_the_base_once(small, qlora):
    o = options(model=qlora / "sft", **KEEP)
    o.reward = qlora / "reward"
    policy, tok = tuning.start(o, CPU)
    reference = share(policy).requires_grad_(False)
    reward = tuning.reward_model(o, o.reward, reference, tok).requires_grad_(False)
    critic = tuning.critic_of(o, reward, reference, tok)
    frozen = {k: v for k, v in memory.count(policy).items() if k.startswith("frozen")}
    rows = memory.count(policy, critic, reference, reward)
    adapter = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    # a reward model has none
    head = sum(p.nbytes for p in policy.lm_head.parameters() if p.requires_grad)
    score = policy.config.hidden_size * 4
    assert rows["frozen uint8"] == frozen["frozen uint8"]
    # reference's and reward model's adapter
    assert rows["frozen float32"] == frozen["frozen float32"] + 2 * adapter - head + score
    assert rows["trained"] == 2 * adapter - head + score  # policy's, critic's
    assert not any(p.requires_grad for p in (*reference.parameters(), *reward.parameters()))
    tokens = torch.randint(400, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(policy(tokens), reference(tokens)) and torch.equal(
            critic(tokens), reward(tokens)
        )
        folder, _ = hub.load(qlora / "reward")
        assert (folder(tokens) - reward(tokens)).abs().max() < 1e-4
        for p in critic.parameters():
            p.add_(0.1) if p.requires_grad else None
        assert not torch.equal(critic(tokens), reward(tokens)) and torch.equal(
            policy(tokens), reference(tokens)
        )
        assert (folder(tokens) - reward(tokens)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("quant", ("none", "nf4"))
def test_with_lora_ppo_s_reward_model_is_frozen_in_the_base_s_dtype(quant, small):
    """A GPU's base is bf16; what PPO holds four times is trained nowhere but in its adapters and
    heads.
    """
    o, folder = options(lora=4, quant=quant), small["ppo"]["reward"]
    o.reward = folder
    base, tok = hub.load(
        small["ppo"]["model"], CPU, torch.bfloat16, None if quant == "none" else quant
    )
    policy = tuning.tune(o, base)
    reference = share(policy).requires_grad_(False)
    reward = tuning.reward_model(o, folder, reference, tok).requires_grad_(False)
    critic = tuning.critic_of(o, reward, reference, tok)
    exact, _ = hub.load(folder)
    for name, p in reward.named_parameters():
        assert not p.requires_grad and p.dtype == (
            torch.float32 if name == "score.weight" else torch.bfloat16
        ), name
    assert torch.equal(reward.score.weight, exact.score.weight), (
        "one row: bf16 would only blur the scores"
    )
    alone, both = memory.count(reward), memory.count(reward, critic)
    assert both["frozen bfloat16"] == alone["frozen bfloat16"] and ("frozen uint8" in both) == (
        quant == "nf4"
    )
    tokens = torch.randint(400, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(critic(tokens), reward(tokens))
    assert (reward(tokens) - exact(tokens)).abs().max() < (0.1 if quant == "none" else 1.0)
    if quant == "none":  # every weight is trained, the critic's too: float32
        whole = tuning.reward_model(options(), folder, reference, tok)
        assert {p.dtype for p in whole.parameters()} == {torch.float32}


@torch.no_grad()
def test_a_prompt_stays_beside_the_weights(small, tmp_path):
    done("sft.py", out=tmp_path / "sft", **small["sft"] | WAYS["prompt"])
    model, tok = tuning.load(tmp_path / "sft")
    tokens = torch.randint(400, (2, 20), generator=torch.Generator().manual_seed(0))
    base = hub.load(small["sft"]["model"])[0]
    assert not torch.allclose(model(tokens), base(tokens), atol=1e-2)
    model.virtual = None
    assert torch.equal(model(tokens), base(tokens))
    assert "virtual" not in " ".join(load_file(tmp_path / "sft" / "model.safetensors"))
    done("compare.py", out=tmp_path / "c.jsonl", **small["compare"] | dict(model=tmp_path / "sft"))
    refused(
        run("dpo.py", out=tmp_path / "dpo", **small["dpo"] | LORA | dict(model=tmp_path / "sft")),
        "prompt or prefix",
    )


@pytest.mark.parametrize("way", ("prompt", "prefix"))
def test_a_reward_model_is_read_with_the_virtual_tokens_that_it_was_trained_with(
    way, small, tmp_path
):
    """By the one loader of PPO, the evaluation and the controls: its reference answers have mean 0
    and deviation 1 for all of them.
    """
    done("sft.py", out=tmp_path / "sft", **small["sft"] | WAYS[way])
    done("reward.py", out=tmp_path / "reward", **small["reward"] | dict(model=tmp_path / "sft"))
    model, tok = hub.load(tmp_path / "reward")
    c, chats = model.config, reward.prepare_references(small["reward"]["reference"], tok, 160, 0)
    found = reward.reference_scores(model, chats)
    assert found == pytest.approx((c.reward_mean, c.reward_std), abs=1e-5) and c.reward_std > 1e-3
    model.virtual = None
    bare = reward.reference_scores(model, chats)
    assert abs(bare[0] - c.reward_mean) > 0.01 * c.reward_std
    quantised = hub.load(tmp_path / "reward", quant="nf4")[0]
    assert quantised.virtual is not None and all(p.requires_grad for p in quantised.parameters())
    done(
        "ppo.py",
        out=tmp_path / "ppo",
        **small["ppo"] | dict(model=tmp_path / "sft", reward=tmp_path / "reward", iterations=1),
    )


def test_a_head_with_lora_is_written_untied(small, tmp_path):
    done(
        "sft.py",
        out=tmp_path / "sft",
        **small["sft"] | dict(lora=4, targets="all,lm_head", steps=4),
    )
    c = hub.read_config(tmp_path / "sft")
    assert not c.tie_word_embeddings and hub.load(tmp_path / "sft")[0].lm_head.weight.shape == (
        400,
        32,
    )


def test_layers_named_one_by_one(small, tmp_path):
    done(
        "sft.py",
        out=tmp_path / "sft",
        **small["sft"] | dict(lora=4, targets="layers.0.mlp.up_proj,k_proj", steps=2),
    )
    found = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    assert {k.removeprefix("base_model.model.model.").rsplit(".", 2)[0] for k in found} == {
        "layers.0.mlp.up_proj",
        "layers.0.self_attn.k_proj",
        "layers.1.self_attn.k_proj",
    }


@pytest.mark.parametrize("bf16", (False, True))
def test_one_place_decides_bf16(bf16, small, qlora, monkeypatch, capsys):
    """A GPU that has it and one that has not: what is computed in, what frozen weights lie in, what
    is counted.
    """
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: bf16 or including_emulation,
    )
    gpu, dtypes, real = torch.device("cuda"), [], hub.load

    def load(path, device="cpu", dtype=torch.float32, quant=None):
        dtypes.append(dtype)
        return real(path, "cpu", torch.float32, quant)

    monkeypatch.setattr(hub, "load", load)
    with warnings.catch_warnings(action="ignore"):  # there is no GPU
        assert isinstance(autocast(gpu), torch.autocast) == bf16
    model, _ = tuning.start(options(model=small["sft"]["model"], lora=2), gpu)
    tuning.start(options(model=qlora / "sft", **KEEP), gpu)
    tuning.start(options(model=small["sft"]["model"]), gpu)
    assert dtypes == [torch.bfloat16 if bf16 else torch.float32] * 2 + [torch.float32]
    found, count = set(), memory.contents
    monkeypatch.setattr(
        memory, "contents", lambda **how: (found.add(how["autocast"]), count(**how))[1]
    )
    tuning.Report(options(lora=2), gpu, [model]).batch(tokens=10, targets=10)
    assert found == {bf16} and not isinstance(autocast(CPU), torch.autocast)


def test_learning_rates():
    assert tuning.learning_rate(options(lr=0.0), 1e-3) == 1e-3
    assert tuning.learning_rate(options(lr=0.0, lora=4), 1e-3) == tuning.LORA_LR * 1e-3
    assert (
        tuning.learning_rate(options(lr=0.0, adapter="ia3"), 1e-3)
        == tuning.adapters.LEARNING_RATE["ia3"]
    )
    assert tuning.learning_rate(options(lr=0.3, lora=4), 1e-3) == 0.3


@pytest.mark.parametrize(
    ("stage", "wrong", "words"),
    (
        ("sft", dict(quant="nf4"), ("--quant nf4", "--lora")),
        ("sft", dict(lora=-1), ("--lora is -1", "at least 0")),
        ("sft", dict(lora=4, targets="q_prj"), ("targets names 'q_prj'", "did you mean q_proj")),
        (
            "sft",
            dict(lora=4, targets="layers.0.mlp.up_proj", virtual_tokens=0),
            ("--virtual-tokens is 0",),
        ),
        ("sft", dict(lora=4, adapter="ia3"), ("--adapter ia3", "leave --lora")),
        ("sft", dict(adapter="prompt", virtual_tokens=1000), ("1000 virtual tokens", "context")),
        ("dpo", dict(keep_base=True), ("has no adapter", "--keep-base")),
        ("dpo", dict(keep_base=True, lora=4), ("--keep-base", "give one")),
        ("ppo", dict(quant="nf5"), ("--quant", "nf4")),
    ),
)
def test_options_that_do_not_go_together(stage, wrong, words, small, tmp_path):
    refused(run(script(stage), out=tmp_path / "out", **small[stage] | wrong), *words)


def test_an_adapter_that_has_not_moved_is_named(small, capsys):
    model, _ = tuning.start(options(model=small["sft"]["model"], lora=2), CPU)
    report = tuning.Report(options(lora=2), CPU, [model])
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and n != "layers.1.mlp.up_proj.B.default":
                p.add_(1.0)
    report.finish()
    assert (
        "warning: 1 of the adapter's tensors have not moved (layers.1.mlp.up_proj.B.default)"
        in capsys.readouterr().out
    )
    report.o = Namespace(**vars(report.o) | dict(steps=1))
    report.finish()
    assert "warning" not in capsys.readouterr().out  # after one step A cannot have moved


def test_the_table_counts_every_network_that_is_trained(small, capsys):
    """PPO's critic keeps its activations beside the policy's; its sampler's cache may be more than
    an update."""
    policy, _ = tuning.start(options(model=small["sft"]["model"]), CPU)
    critic = scalar_model(policy)
    sums = []
    for models, cached in (([policy], 0), ([policy, critic], 0), ([policy, critic], 10**6)):
        exact = sum(memory.count(*models).values()) - memory.count(*models)["gradients"]
        tuning.Report(options(), CPU, models).batch(tokens=4096, targets=0, cached=cached)
        said = capsys.readouterr().out
        total = next(float(line.split()[1]) for line in said.splitlines() if line[:3] == "sum")
        sums.append(total * (2**30 if "GB" in said else 2**20) - exact)
    assert ("keys and values" in said) and sums[2] > 2 * sums[1]
    assert sums[1] / sums[0] == pytest.approx(2, rel=0.05)


def test_that_pages_are_for_a_gpu_is_said(small, tmp_path):
    said = done("sft.py", out=tmp_path / "out", **small["sft"] | dict(paged=True, steps=2)).err
    assert "--paged has no effect on a CPU" in said


def test_readme_s_table_of_what_fits_is_the_code_s():
    text = Path(__file__).parent.parent.joinpath("README.md").read_text()
    assert (
        memory.fits().split("\n\n")[1]
        == text.split("<!-- fits -->\n")[1].split("\n<!-- /fits -->")[0]
    )


# ---------------------------------------------------------------- a GPU without bf16
@pytest.mark.parametrize("way", [{}, dict(lora=2), dict(lora=2, quant="nf4")])
def test_a_gpu_without_bf16_computes_in_float32(way, monkeypatch, tmp_path, capsys):
    """Frozen weights and logits too: float16, the other choice, would need its gradients scaled."""
    gpu, load = torch.device("cuda"), tuning.load  # it says that it has no bf16; the host computes
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: False)
    monkeypatch.setattr(tuning, "load", lambda path, device, *how: load(path, CPU, *how))
    model, _ = tuning.start(sft.Options(model=folder(tmp_path / "m"), **way), gpu)
    assert "no bf16" in capsys.readouterr().err
    own = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in own} == {torch.float32}
    held, tokens = (
        [m.dtype for m in model.modules() if hasattr(m, "codes")],
        torch.ones(1, 9).long(),
    )
    assert held == [torch.float32] * (14 if "quant" in way else 0)
    with autocast(gpu):
        assert not torch.is_autocast_enabled("cuda")
        loss = sft.sft_loss(model, tokens, tokens, torch.zeros_like(tokens))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
