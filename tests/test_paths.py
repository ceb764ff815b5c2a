"""Every path that a stage offers, walked to its saved end: stage × adapter × bits × keep-base. And
what could not be saved in the end is refused before the first step."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import adapters
import dpo
import ppo
import reward
import sft
from common import hub, peft, tuning
from data import templates, tokenizer
from model import Transformer, scalar_model
from paged import PagedAdamW

STAGES = {"sft": sft.sft, "reward": reward.reward, "ppo": ppo.ppo, "dpo": dpo.dpo}
FEW = {
    "sft": dict(steps=2, batch=4, warmup=0, length=160),
    "reward": dict(steps=2, batch=4, warmup=0, length=160),
    "ppo": dict(iterations=1, batch=8, minibatch=4, epochs=1, max_new_tokens=6, warmup=0),
    "dpo": dict(steps=2, batch=4, warmup=0, length=160),
}
LORA = dict(lora=4, targets="all,lm_head")
WAYS = {
    "weights": {},
    "lora": LORA,
    "keep": dict(keep_base=True),
    "ia3": dict(adapter="ia3"),
    "prompt": dict(adapter="prompt", virtual_tokens=3),
    "prefix": dict(adapter="prefix", virtual_tokens=3),
}
BITS = ("32", "nf4", "folder")  # folder: it is in 4 bits itself, as bitsandbytes writes it
PATHS = [
    (stage, way, bits)
    for stage in STAGES
    for way in WAYS
    for bits in BITS
    if (stage == "sft" or "adapter" not in WAYS[way]) and (way != "weights" or bits == "32")
]


@pytest.fixture(scope="module")
def world(small, tmp_path_factory):
    return World(small, tmp_path_factory.mktemp("paths"))


class World:
    """The folders that the paths start from, each made when it is first asked for."""

    def __init__(self, small, at):
        self.small, self.at, self.kept = small, at, {}

    def options(self, stage, out, **changes):
        known = {f.name for f in dataclasses.fields(vars(globals()[stage])["Options"])}
        some = {
            k: v
            for k, v in self.small[stage].items()
            if k in known and k not in ("lr", "accumulate", "target_kl", "horizon")
        }
        some |= FEW[stage] | dict(out=str(out), device="cpu") | changes
        return vars(globals()[stage])["Options"](**some)

    def go(self, stage, out, **changes):
        STAGES[stage](self.options(stage, out, **changes))
        return str(out)

    def get(self, name, make):
        if name not in self.kept:
            self.kept[name] = make(self.at / name)
        return self.kept[name]

    def base(self, bits):
        plain = self.small["sft"]["model"]
        return self.get("packed", lambda out: packed(plain, out)) if bits == "folder" else plain

    def start(self, stage, way, bits) -> dict:
        """The options that say what a path starts from."""
        o = dict(quant="nf4") if bits == "nf4" else {}
        if way != "keep":
            return o | dict(
                model=(
                    self.base(bits)
                    if stage == "sft" or bits == "folder"
                    else self.small[stage]["model"]
                )
            )
        o["model"] = self.get(
            f"sft-{bits}", lambda out: self.go("sft", out, **LORA, **o, model=self.base(bits))
        )
        if stage == "ppo":
            o["reward"] = self.get(
                f"reward-{bits}", lambda out: self.go("reward", out, **o, keep_base=True)
            )
        return o


def packed(plain, out):
    """A folder as transformers and bitsandbytes write it: the blocks' layers in 4 bits."""
    model, _ = hub.load(plain, quant="nf4")
    shutil.copytree(plain, out)
    said = json.loads((out / "config.json").read_text())
    how = dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    (out / "config.json").write_text(json.dumps(said | {"quantization_config": how}))
    save_file(
        {hub.hub_name(k): v.contiguous() for k, v in model.state_dict().items()},
        out / "model.safetensors",
    )
    return str(out)


@torch.no_grad()
def answers(model):
    page = torch.randint(
        model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(5)
    )
    return copy.deepcopy(model).eval()(page)


def with_adapter(folder, quant, scalar):
    """What PEFT would make of OUT/adapter: the base that it names, and the adapter on it."""
    said = json.loads(Path(folder, "adapter", "adapter_config.json").read_text())
    model, _ = hub.load(said["base_model_name_or_path"], quant=quant)
    model = scalar_model(model) if scalar else model
    return peft.load_adapter(model, Path(folder, "adapter"))


@pytest.mark.parametrize("stage, way, bits", PATHS)
def test_a_path_s_end_answers_as_what_was_trained(stage, way, bits, world, tmp_path, monkeypatch):
    seen, save = {}, tuning.save

    def watched(o, path, model, tok):
        seen["trained"] = answers(model)
        save(o, path, model, tok)

    start, out = world.start(stage, way, bits), tmp_path / "out"
    monkeypatch.setattr(tuning, "save", watched)
    world.go(stage, out, **start | WAYS[way])
    opened = hub.load(out)[0] if stage == "reward" else tuning.load(out)[0]
    assert (answers(opened) - seen["trained"]).abs().max() < 1e-4
    if stage != "reward":
        before = tuning.load(start["model"])[0]
        assert (answers(before) - seen["trained"]).abs().max() > 1e-4, "nothing was trained"
    assert not [k for k in load_file(out / "model.safetensors") if "absmax" in k]
    if way == "weights":
        return
    alone = with_adapter(out, start.get("quant"), stage == "reward")
    assert (answers(alone) - seen["trained"]).abs().max() < 1e-4


@pytest.mark.parametrize("stage", ("sft", "ppo", "dpo"))
@pytest.mark.parametrize("kind", ("prompt", "prefix"))
def test_every_weight_goes_on_from_a_model_with_virtual_tokens(
    kind, stage, world, tmp_path, monkeypatch
):
    start = world.get(f"sft-{kind}", lambda out: world.go("sft", out, **WAYS[kind], quant="nf4"))
    seen, save = {}, tuning.save

    def watched(o, path, model, tok):
        seen["trained"] = answers(model)
        save(o, path, model, tok)

    monkeypatch.setattr(tuning, "save", watched)
    opened = tuning.load(world.go(stage, tmp_path / "out", model=start))[0]
    assert type(opened.virtual).__name__.lower() == kind
    assert (answers(opened) - seen["trained"]).abs().max() < 1e-4


# ---------------------------------------------------------------- refused before the first step
@pytest.fixture
def refused(world, tmp_path):
    def at(stage, *words, **changes):
        out = tmp_path / "out"
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            world.go(stage, out, **changes)
        for word in words:
            assert word in str(e.value)
        assert "\n" not in str(e.value)
        log = out / "state" / "metrics.jsonl"
        assert not log.exists() or not log.read_text(), "steps were made"

    return at


@pytest.mark.parametrize("stage", STAGES)
def test_weights_in_4_bits_are_not_trained(stage, world, refused):
    refused(stage, "packed is in 4 bits", "--lora", model=world.base("folder"))
    if stage == "sft":
        assert not adapters.parts(tuning.load(world.base("folder"))[0])


def test_a_critic_does_not_train_a_4_bit_reward_model(world, refused):
    plain = world.small["ppo"]["reward"]
    four = world.get("packed-reward", lambda out: packed(plain, out))
    refused("ppo", "reward model is in 4 bits", "--lora", reward=four)


def head_alone(world, bits):
    """A language model that was trained with LoRA on its head and nowhere else."""
    quant = dict(quant="nf4") if bits == "nf4" else {}
    make = lambda out: world.go("sft", out, lora=2, targets="lm_head", **quant)  # noqa: E731
    return world.get(f"head-{bits}", make), quant


@pytest.mark.parametrize("bits", ("32", "nf4"))
def test_an_adapter_on_a_head_that_a_scalar_model_lacks(bits, world, refused, tmp_path):
    model, quant = head_alone(world, bits)
    for stage in ("reward", "ppo"):
        refused(stage, "lm_head", "all,lm_head", lora=2, targets="lm_head", **quant)
    judge = tmp_path / "mine.py"
    judge.write_text("def score(prompts, answers):\n    return [0.0] * len(answers)\n")
    for way in (dict(lora=2, targets="lm_head"), dict(model=model, keep_base=True)):
        refused("ppo", "lm_head", reward=f"{judge}:score", **way, **quant)
    refused("reward", "lm_head", model=model, keep_base=True, **quant)


@pytest.mark.parametrize("rank", (10**4, 2**31, 2**63, 10**30))
def test_an_impossible_rank(rank, refused):
    refused("sft", f"r is {rank}", "up to 32", lora=rank)


@pytest.mark.parametrize("base", ("absent", None, "", 7, ["x"]))
def test_an_adapter_that_names_no_base(base, world, refused, tmp_path):
    folder = Path(shutil.copytree(world.start("sft", "keep", "32")["model"], tmp_path / "sft"))
    file = folder / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    if base == "absent":
        said.pop("base_model_name_or_path")
    file.write_text(json.dumps(said))
    refused(
        "dpo",
        "adapter_config.json",
        "base_model_name_or_path is",
        model=str(folder),
        keep_base=True,
    )
    file.unlink()
    refused("dpo", "has no adapter", model=str(folder), keep_base=True)


def test_a_tokenizer_without_a_padding_token(world, refused, tmp_path):
    """Its special tokens begin and end turns. What the refusal advises helps."""
    tok = tokenizer.train(tiny.TEXTS, 280, special=("<|im_start|>", "<|im_end|>"))
    templates.adopt(tok, "chatml")
    folder = Path(tiny.folder(tmp_path / "poor", tok=tok, vocab_size=281))
    refused("reward", "padding token", "added_tokens", "281", model=str(folder))
    said = json.loads((folder / "tokenizer.json").read_text())
    said["added_tokens"].append(dict(said["added_tokens"][0], id=280, content="<|pad|>"))
    (folder / "tokenizer.json").write_text(json.dumps(said))
    out = world.go(
        "reward", tmp_path / "again", model=str(folder), reference=world.small["sft"]["data"]
    )
    assert json.loads(Path(out, "config.json").read_text())["pad_token_id"] == 280


# ---------------------------------------------------------------- dropout, pages
@pytest.mark.parametrize("stage", ("sft", "reward", "ppo", "dpo", "ipo", "simpo"))
def test_an_adapter_s_dropout_is_on_in_sft_alone(stage, world, tmp_path):
    """Of an adapter that goes on and asks for dropout; it is on without changing a number."""
    start, found = world.start(stage if stage in STAGES else "dpo", "keep", "32"), []
    for dropout in (0.0, 0.5):
        changes = dict(start)
        for name in ("model", "reward"):
            if name in start:
                changes[name] = str(tmp_path / f"{name}-{dropout}")
                shutil.copytree(start[name], changes[name])
                file = Path(changes[name], "adapter", "adapter_config.json")
                said = json.loads(file.read_text()) | dict(lora_dropout=dropout)
                file.write_text(json.dumps(said))
        kind = dict(loss=stage) if stage not in STAGES else {}
        changes |= dict(keep_base=True, **kind)
        out = world.go("dpo" if kind else stage, tmp_path / f"out-{dropout}", **changes)
        lines = tiny.metrics(Path(out))
        found.append([{k: v for k, v in x.items() if k != "tokens_per_second"} for x in lines])
    assert (found[0] == found[1]) == (stage != "sft")


@pytest.mark.parametrize("stage", STAGES)
def test_pages_leave_before_a_larger_pass(stage, world, tmp_path, monkeypatch):
    """Every stage says before each pass how large it is, and only a larger one than any before
    costs anything.
    """
    told, left, network, decoded = [], [], [], []
    make_room, offload, generate = PagedAdamW.make_room, PagedAdamW.offload, ppo.generate
    monkeypatch.setattr(
        PagedAdamW, "make_room", lambda s, **n: (told.append(n), make_room(s, **n))[1]
    )
    monkeypatch.setattr(PagedAdamW, "offload", lambda s: (left.append(len(told)), offload(s))[1])
    forward = Transformer.hidden

    def hidden(model, tokens, *rest, **more):
        network.append((len(told), tokens.numel() * torch.is_grad_enabled()))
        return forward(model, tokens, *rest, **more)

    def answers(policy, prompts, new, *rest, **more):
        decoded.append(len(prompts) * (max(map(len, prompts)) + new))
        return generate(policy, prompts, new, *rest, **more)

    monkeypatch.setattr(Transformer, "hidden", hidden)
    monkeypatch.setattr(ppo, "generate", answers)
    world.go(stage, tmp_path / "out", **world.start(stage, "weights", "32"), paged=True)
    assert len(told) == (1 + 2 if stage == "ppo" else 2)  # PPO: the rollout, and two minibatches
    known, expected = [], []
    for i, sizes in enumerate(told):
        behind = [tokens for at, tokens in network if at == i + 1]
        assert behind, "a pass follows each word"
        if "tokens" in sizes:
            assert max(behind) == sizes["tokens"], "as large as was said"
        else:
            assert decoded == [sizes["cached"]], "rows as long as the longest"
        if not any(all(n <= seen.get(k, 0) for k, n in sizes.items()) for seen in known):
            known.append(sizes)
            expected.append(i + 1)
    assert left == expected and left


def test_reference_answers_are_read_no_more_at_once_than_a_step_reads(world, tmp_path, monkeypatch):
    found, real = [], reward.reference_scores
    note = lambda model, ids, size: (found.append(size), real(model, ids, size))[1]  # noqa: E731
    monkeypatch.setattr(reward, "reference_scores", note)
    for batch in (1, 8):
        start = world.start("reward", "weights", "32") | dict(batch=batch, steps=1)
        world.go("reward", tmp_path / str(batch), **start)
    assert found == [4, 32]
