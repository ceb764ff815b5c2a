"""What stages share: options and what is said of wrong ones, the learning rate, AdamW's groups, and
the life of a run.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.run import (
    Run,
    adamw,
    autocast,
    code,
    difference,
    fingerprint,
    load_function,
    lr_at,
    main,
    opt,
    parse,
    pick_device,
    set_lr,
)

STAGES = ["pretrain", "sft", "compare", "reward", "ppo", "dpo", "tools.evals"]


@dataclass
class Options:
    out: str = opt("out/toy", "where to")
    data: str = opt("", "a file")
    steps: int = opt(6, "how many", at_least=1)
    lr: float = opt(0.1, "how fast", above=0)
    share: float = opt(0.5, "how much", at_least=0, below=0.5 + 1e-9)
    kind: str = opt("a", "which", choices=("a", "b"))
    seed: int = opt(0, "seed", at_least=0, at_most=9)
    save_every: int = opt(2, "steps between saved states")
    overwrite: bool = opt(False, "start anew")


# ---------------------------------------------------------------- options
def test_options_are_read_with_their_types_and_defaults():
    assert parse(Options, "Doc.", []) == Options()
    given = [
        "--steps",
        "7",
        "--lr=3e-4",
        "--kind",
        "b",
        "--save-every",
        "5",
        "--overwrite",
        "--share",
        "0",
    ]
    assert parse(Options, "Doc.", given) == Options(
        steps=7, lr=3e-4, kind="b", save_every=5, overwrite=True, share=0.0
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--steps", "0"], "--steps is 0, it must be at least 1"),
        (["--lr", "0"], "--lr is 0.0, it must be above 0"),
        (["--lr", "nan"], "--lr is nan, it must be a finite number"),
        (["--lr", "inf"], "--lr is inf, it must be a finite number"),
        (["--share=-inf"], "--share is -inf, it must be a finite number"),
        (["--share", "-0.1"], "--share is -0.1, it must be at least 0"),
        (["--share", "0.6"], "it must be below 0.5"),
        (["--seed", "10"], "--seed is 10, it must be at most 9"),
        (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
        (["--kind", "c"], "argument --kind: invalid choice: 'c' (choose from 'a', 'b')"),
        (["--step", "3"], "unknown option --step (did you mean --steps?)"),
        (["--save_every=3"], "unknown option --save_every=3 (did you mean --save-every?)"),
        (["--wxyz"], "unknown option --wxyz\n"),
        (["stray"], "unknown option stray"),
        (["--lr"], "argument --lr: expected one argument"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as left:
        parse(Options, "Doc.", argv)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == "" and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("name", STAGES)
def test_help_shows_every_option_of_a_stage_with_its_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # argparse would break a line inside --keep-base
    stage = importlib.import_module(name)
    with pytest.raises(SystemExit) as left:
        parse(stage.Options, stage.__doc__, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and stage.__doc__.split("\n")[0].split()[0] in text
    for f in dataclasses.fields(stage.Options):
        assert f.metadata["help"]
        said = " ".join(f"{f.metadata['help']} (default: {f.default})".split())
        assert f"--{f.name.replace('_', '-')} " in text and said in text
    assert parse(stage.Options, "", []) == stage.Options(), (
        "the defaults lie within their own bounds"
    )


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ValueError("file:3: two\n lines"), 2, "toy.py: file:3: two lines\n"),
        (FileNotFoundError("x: no such file"), 2, "toy.py: x: no such file\n"),
        (
            KeyboardInterrupt(),
            130,
            "toy.py: interrupted; the same command goes on from the last saved step\n",
        ),
    ],
)
def test_main_turns_an_error_into_one_line_below_the_bar(
    error, status, line, capsys, monkeypatch, tmp_path
):
    def stage(o):
        for step in Run(o, __file__, []).steps(o.steps):
            if step == 1:
                raise error

    monkeypatch.setattr(sys, "argv", ["some/where/toy.py", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit) as left:
        main(stage, Options, "Doc.")
    assert left.value.code == status
    assert capsys.readouterr().err.endswith("\n" + line)


def test_main_leaves_a_mistake_in_the_code_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py"])
    with pytest.raises(KeyError):
        main(lambda o: {}["x"], Options, "Doc.")


@pytest.mark.parametrize(
    "stage, argv, said",
    [
        ("sft", "--alpha 8", ["--alpha has no effect without --lora"]),
        (
            "sft",
            "--alpha 8 --targets mlp --keep-base",
            ["--alpha has no effect without --lora", "--targets has no effect without --lora"],
        ),
        ("sft", "--alpha 8 --targets mlp --lora 2", []),
        (
            "sft",
            "--virtual-tokens 4 --adapter ia3",
            ["--virtual-tokens has no effect without --adapter prompt or prefix"],
        ),
        ("sft", "--virtual-tokens 4 --adapter prefix --virtual-tokens 20", []),
        (
            "sft",
            "--weight-decay 0.1 --adapter ia3",
            ["--weight-decay has no effect without --adapter none or prompt or prefix"],
        ),
        (
            "sft",
            "--warmup 9 --steps 9",
            ["--warmup is 9, below --steps 9 was expected: it has no effect beyond"],
        ),
        ("sft", "--warmup 8 --steps 9 --accumulate 32", []),
        (
            "sft",
            "--accumulate 9 --batch 8",
            ["--accumulate is 9, at most --batch 8 was expected: it has no effect beyond"],
        ),
        (
            "reward",
            "--steps 5",
            ["--warmup is 10, below --steps 5 was expected: it has no effect beyond"],
        ),
        (
            "ppo",
            "--horizon 5 --iterations 2",
            [
                "--warmup is 2, below --iterations 2 was expected: it has no effect beyond",
                "--horizon has no effect without --target-kl",
            ],
        ),
        ("ppo", "--horizon 5 --target-kl 6", []),
        (
            "dpo",
            "--loss ipo --label-smoothing 0.1",
            ["--label-smoothing has no effect without --loss dpo"],
        ),
        (
            "dpo",
            "--loss simpo --label-smoothing 0.1 --gamma 2",
            ["--label-smoothing has no effect without --loss dpo"],
        ),
        ("dpo", "--gamma 2 --label-smoothing 0.1", ["--gamma has no effect without --loss simpo"]),
        ("dpo", "--gamma 1 --loss ipo", []),
        ("tools.evals", "--prefs x.jsonl", ["--prefs has no effect without --data"]),
    ],
)
def test_options_without_effect_are_said(stage, argv, said, capsys):
    """Those that were given and change nothing beside the others; a default is never one."""
    parse(importlib.import_module(stage).Options, "Doc.", argv.split())
    out, err = capsys.readouterr()
    assert [line.partition(": ")[2] for line in err.splitlines()] == said and out == ""


# ---------------------------------------------------------------- device, optimizer, learning rate
def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("nonsense", "meta", "cuda:99"):
        with pytest.raises(
            ValueError, match=f"--device {name}: not available here .*; try cpu or auto"
        ):
            pick_device(name)


def test_a_gpu_s_attention_goes_without_cudnn(monkeypatch):
    said, gpu = [], torch.device("cuda", 0)
    probe = SimpleNamespace(item=lambda: 0.0, is_cuda=True, device=gpu)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: probe)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", said.append)
    assert pick_device("cuda") == gpu and said == [False]


@pytest.mark.filterwarnings("ignore:(CUDA is not|User provided)")  # there need be no GPU
def test_autocast_is_bf16_where_a_gpu_has_it_and_nothing_elsewhere(monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, has=has, **options: has)
        found = autocast(torch.device("cuda"))
        assert (getattr(found, "device", None), getattr(found, "fast_dtype", None)) == (
            ("cuda", torch.bfloat16) if has else (None, None)
        )
        with autocast(torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")


def test_learning_rate_in_closed_form():
    for total, warmup in ((10, 0), (10, 4), (1, 0), (5, 5), (5, 9)):
        for step in range(total):
            up = (step + 1) / warmup if step < warmup else None
            down = (total - step) / (total - warmup) if step >= warmup else None
            assert lr_at(step, total, 2.0, warmup) == pytest.approx(2 * (up or down))
            wave = (
                up
                or (1 + torch.cos(torch.tensor(torch.pi * (1 - down), dtype=torch.float64)).item())
                / 2
            )
            assert lr_at(step, total, 2.0, warmup, "cosine") == pytest.approx(2 * wave, abs=1e-9)
    assert [lr_at(s, 8, 1.0, 4) for s in range(9)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        0.75,
        0.5,
        0.25,
        0.0,
    ]
    assert lr_at(4, 8, 1.0, 4, "cosine") == 1.0 and lr_at(6, 8, 1.0, 4, "cosine") == pytest.approx(
        0.5
    )


def test_adamw_decays_matrices_only_and_leaves_the_frozen_alone():
    model = torch.nn.Sequential(
        torch.nn.Embedding(4, 3),
        torch.nn.Linear(3, 3),
        torch.nn.LayerNorm(3),
        torch.nn.Linear(3, 2),
    )
    model[3].requires_grad_(False)
    before = {k: p.clone() for k, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.5, weight_decay=0.1)
    set_lr(optimizer, 0.25)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        decayed = name in ("0.weight", "1.weight")
        assert torch.allclose(p, before[name] * (1 - 0.25 * 0.1 if decayed else 1)), name
    assert (
        sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == 4 * 3 + 9 + 3 + 3 + 3
    )
    assert adamw(model, lr=0.5, eps=1e-5).param_groups[0]["eps"] == 1e-5


# ---------------------------------------------------------------- a reader's own function
READERS = """
import math
WORDS = {"good": 1.0}
def helper(answer): return sum(WORDS.get(w, 0.0) for w in answer.split())
def score(prompts, answers): return [helper(a) - math.tau * 0 for a in answers]
def one_too_few(prompts, answers): return [0.0] * (len(answers) - 1)
def not_a_number(prompts, answers): return [math.nan for _ in answers]
def nothing(prompts, answers): pass
def words(prompts, answers): return ["good"] * len(answers)
def broken(prompts, answers):
    return [answers[0]["key"]]
def tensor(prompts, answers):
    import torch
    return torch.arange(len(answers))
"""


def test_a_reader_s_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(READERS)
    asked = [[{"role": "user", "content": "?"}]] * 2
    assert load_function(f"{file}:score")(asked, ["good good", "bad"]) == [2.0, 0.0]
    assert load_function(f"{file}:tensor")(asked, ["good good", "bad"]) == [0.0, 1.0]
    for name, said in [
        (
            "one_too_few",
            r"one_too_few: 2 finite scores, one per answer, were expected \(got 1: \[0.0\]\)",
        ),
        ("not_a_number", r"finite scores, one per answer, were expected \(got 2: \[nan, nan\]\)"),
        ("nothing", "mine.py: TypeError: 'NoneType' object is not iterable"),
        ("words", "mine.py: ValueError: could not convert string to float: 'good'"),
        ("broken", r"mine.py:11: TypeError: string indices must be integers"),
    ]:
        with pytest.raises(ValueError, match=said):
            load_function(f"{file}:{name}")(asked, ["a", "b"])
    for name, near in (
        ("scores", r" \(did you mean score\?\)"),
        ("math", ""),
        ("WORDS", ""),
        ("zzz", ""),
    ):
        with pytest.raises(ValueError, match=f"mine.py: has no function {name}{near}"):
            load_function(f"{file}:{name}")
    for spec in ("nowhere.py:score", "nowhere.py", str(file), "", ":score"):
        with pytest.raises(FileNotFoundError, match="FILE.py:function was expected"):
            load_function(spec)
    for text, said in (
        ("import nowhere_to_be_found", "mine.py:1: ModuleNotFoundError"),
        ("x = (", "SyntaxError.*line 1"),
        ("\n\n1 / 0", "mine.py:3: ZeroDivisionError"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            load_function(f"{file}:score")


# ---------------------------------------------------------------- what a run is known by
def test_fingerprint_sees_what_a_checkpoint_says_and_nothing_else(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "adapter").mkdir()
    decide = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ]
    for name in (*decide, "metrics.jsonl", "run.json"):
        (folder / name).write_text("x")
    whole = fingerprint(folder)
    for name in decide:
        (folder / name).write_text("y")
        assert fingerprint(folder) != whole
        (folder / name).write_text("x")
    (folder / "metrics.jsonl").write_text("y")
    assert fingerprint(folder) == whole == fingerprint(str(folder))
    assert fingerprint(folder / "run.json") != fingerprint(folder / "metrics.jsonl")
    # of equal content under another name
    (folder / "tokenizer_config.json").rename(folder / "tokenizer.json")
    assert fingerprint(folder) != whole
    with pytest.raises(
        FileNotFoundError, match=r"sfl: no such file or folder \(did you mean sft\?\)"
    ):
        fingerprint(tmp_path / "sfl")
    with pytest.raises(FileNotFoundError, match="c: no such file or folder$"):
        fingerprint(tmp_path / "a" / "b" / "c")


SCRIPT = '''"""What it does."""
import json
import tokens.splitter
from helper import add

def stage():
    """How."""
    # why
    return add(1, json.loads("2"))  # a sum
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project: stage.py, which imports helper.py and tokens/splitter.py; that imports other.py
    and names tokens/words.json.
    """
    monkeypatch.setattr("common.run.ROOT", tmp_path)
    (tmp_path / "tokens").mkdir()
    splitter = "import other\nWORDS = open('words.json')\nMORE = 'more.json ' * 99\n"
    texts = {
        "stage.py": SCRIPT,
        "helper.py": "def add(a, b): return a + b\n",
        "other.py": "X = 1\n",
        "alone.py": "import stage\n",
        "tokens/splitter.py": splitter,
        "tokens/words.json": "[]",
        "tokens/more.json": "[]",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_code_of_a_stage_is_its_modules_and_what_they_import(project):
    assert code(project / "stage.py").keys() == {
        "stage.py",
        "helper.py",
        "other.py",
        "tokens/splitter.py",
        "tokens/words.json",
    }
    before = code(project / "stage.py")
    for name in ("helper.py", "other.py", "tokens/splitter.py"):
        (project / name).write_text((project / name).read_text() + "Y = 2\n")
        assert [k for k, h in code(project / "stage.py").items() if before[k] != h] == [name]
        before = code(project / "stage.py")
    (project / "tokens/words.json").write_text("[1]")
    assert code(project / "stage.py")["tokens/words.json"] != before["tokens/words.json"]


@pytest.mark.parametrize(
    "old, new, changed",
    [
        ("# why", "# because", False),
        ('"""How."""', '"""In another way."""', False),
        ('    """How."""\n', "", False),
        ('"""What it does."""\n', "\n\n", False),
        ("add(1, json", "add(1,\n        json", False),
        ("  # a sum", "", False),
        ("add(1,", "add(2,", True),
        ("return add", "add", True),
        ('"2"', '"3"', True),
        ("def stage", "def stages", True),
        ('(1, json.loads("2"))', '(json.loads("2"), 1)', True),
    ],
)
def test_an_edited_comment_is_no_other_code(project, old, new, changed):
    before = code(project / "stage.py")["stage.py"]
    assert SCRIPT.count(old) == 1
    (project / "stage.py").write_text(SCRIPT.replace(old, new))
    assert (code(project / "stage.py")["stage.py"] != before) == changed


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "tools.evals"])
def test_the_code_of_each_stage_has_what_it_reads(stage):
    importlib.import_module(stage)
    known = code(f"{stage}.py")
    assert {
        f"{stage}.py",
        "common/run.py",
        "model.py",
        "common/hub.py",
        "quant.py",
        "data/tokenizer.py",
    } <= known.keys()
    imported = {m.replace(".", "/") + ".py" for m in sys.modules}
    assert {k for k in known if k.endswith(".py")} <= imported | {f"{stage}.py"}, (
        "only what is imported"
    )
    assert ("data/world/facts.json" in known) == ("data/world/kinds.py" in known) and known.get(
        "data/world/kinds.py", stage
    ) != "compare"


def test_the_device_is_the_one_that_auto_means(tmp_path):
    @dataclass
    class OnADevice(Options):
        device: str = opt("auto", "which")

    said = Run(OnADevice(out=str(tmp_path / "x")), __file__, []).identity["options"]["device"]
    assert said == ("cuda" if torch.cuda.is_available() else "cpu")


def test_difference_in_words():
    old = {"options": {"lr": 0.1, "data": "a", "gone": 1}, "inputs": {"sft.py": "1", "a": "2"}}
    assert difference(old, old) == ""
    new = {"options": {"lr": 0.2, "data": "b"}, "inputs": {"sft.py": "3", "b": "2"}}
    assert (
        difference(old, new)
        == "data was 'a', is 'b'; gone was 1, is None; lr was 0.1, is 0.2; sft.py has changed"
    )
    assert difference(old, old | {"inputs": {"sft.py": "1", "a": "4"}}) == "a has changed"


# ---------------------------------------------------------------- a run's life
class Killed(BaseException):
    """What no code of ours catches, as nothing catches SIGKILL."""


def toy(o, die_at=None, seen=None):
    """A stage in small: two optimizers, a figure of its own to carry on."""
    run = Run(o, __file__, [o.data] if o.data else [])
    model = torch.nn.Linear(3, 3)
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.1)
    adam = torch.optim.AdamW([model.bias], lr=o.lr, fused=True)
    muon = torch.optim.Muon([model.weight], lr=o.lr)
    total = run.resume(model=model, adam=adam, muon=muon).get("total", 0)
    for step in run.steps(o.steps):
        if seen is not None:
            seen.append(step)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(o.seed + step))
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        adam.step(), muon.step()
        adam.zero_grad(), muon.zero_grad()
        total += step
        run.log(step, loss=loss, total=total)
        if step == die_at:
            raise Killed
        run.save(step, total=total)
    run.finish(lambda path: write(path, model))


def write(path, model):
    path.mkdir(exist_ok=True)
    save_file({k: v.detach() for k, v in model.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")


def files(out):
    return {f.name: f.is_file() and f.read_bytes() for f in out.iterdir()}


@pytest.fixture
def o(tmp_path):
    return Options(out=str(tmp_path / "toy"))


@pytest.fixture
def whole(tmp_path):
    """What the toy leaves when nothing interrupts it."""
    toy(Options(out=str(tmp_path / "whole")))
    return files(tmp_path / "whole")


@pytest.mark.parametrize("die_at", range(6))
def test_a_run_goes_on_from_its_last_saved_step(die_at, o, whole, tmp_path):
    with pytest.raises(Killed):
        toy(o, die_at)
    log = tmp_path / "toy" / "state" / "metrics.jsonl"
    assert log.read_text().count("\n") == die_at + 1
    with open(log, "a") as f:
        f.write('{"step": 99, "lo')  # a line half written, as a full disk leaves it
    seen = []
    toy(o, seen=seen)
    assert seen == list(range(die_at // 2 * 2, 6)), (
        "what was logged after the last save is done again, nothing else"
    )
    assert files(tmp_path / "toy") == whole


def test_finished_says_so_and_does_nothing(o, whole, tmp_path, capsys):
    toy(o)
    for again in (o, dataclasses.replace(o, save_every=1)):
        with pytest.raises(SystemExit) as left:
            toy(again)
        assert (
            left.value.code == 0
            and capsys.readouterr().out == f"{o.out}: finished already with these settings\n"
        )
    with pytest.raises(
        ValueError,
        match=(
            r"toy: finished with other settings: lr was 0.1, is 0.2; seed was 0, is 1 \(--overwrite"
            r" starts"
        ),
    ):
        toy(dataclasses.replace(o, lr=0.2, seed=1))
    assert files(tmp_path / "toy") == whole


def test_overwrite_starts_anew_and_keeps_the_old_one_until_then(o, tmp_path):
    toy(o)
    old, other = files(tmp_path / "toy"), dataclasses.replace(o, lr=0.2, overwrite=True)
    with pytest.raises(Killed):
        toy(other, 3)
    shutil.move(tmp_path / "toy" / "state", tmp_path / "aside")
    assert files(tmp_path / "toy") == old
    shutil.move(tmp_path / "aside", tmp_path / "toy" / "state")
    with pytest.raises(
        ValueError, match="toy: an unfinished run has other settings: lr was 0.2, is 0.1"
    ):
        toy(o)
    seen = []
    toy(other, seen=seen)  # the same command goes on, it does not start anew again
    assert seen == [2, 3, 4, 5] and files(tmp_path / "toy") != old
    with pytest.raises(Killed):
        toy(dataclasses.replace(o, lr=0.3, overwrite=True), 4)
    toy(dataclasses.replace(o, overwrite=True))
    assert files(tmp_path / "toy") == old


def test_a_run_that_was_overwritten_leaves_nothing_behind(o, whole, tmp_path):
    """Not even where the new one was killed before its first save: nobody goes on from a state
    whose log is gone.
    """
    for run, die_at in ((o, 4), (dataclasses.replace(o, lr=0.3, overwrite=True), 0)):
        with pytest.raises(Killed):
            toy(run, die_at)
    toy(o)
    assert files(tmp_path / "toy") == whole


def test_a_changed_input_is_another_run(o, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("1")
    o = dataclasses.replace(o, data=str(data))
    with pytest.raises(Killed):
        toy(o, 3)
    data.write_text("2")
    with pytest.raises(ValueError, match=f"unfinished run has other settings: {data} has changed"):
        toy(o)


def test_what_no_run_wrote_is_never_touched(o, tmp_path):
    write(tmp_path / "toy", torch.nn.Linear(3, 3))
    before = files(tmp_path / "toy")
    for overwrite in (False, True):
        with pytest.raises(
            ValueError,
            match="toy: holds what no run of this stage wrote, config.json; choose another --out",
        ):
            toy(dataclasses.replace(o, overwrite=overwrite))
    assert files(tmp_path / "toy") == before
    records = tmp_path / "comparisons.jsonl"
    records.write_text("a reader's own")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="comparisons.jsonl: holds what no run"):
            Run(
                dataclasses.replace(o, out=str(records), overwrite=overwrite),
                __file__,
                [],
                file=True,
            )
    assert records.read_text() == "a reader's own"


def everything(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "name",
    [
        "state/notes.txt",
        "state/metrics.jsonl",
        "adapter/adapter_config.json",
        "model.safetensors",
        "state",
        "adapter",
        "tokenizer.json",
        "metrics.jsonl",
        "state/result/config.json",
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_reader_s_own_file_is_never_touched(name, finished, o, tmp_path):
    """In a folder of his own, or laid into one of ours; whatever is asked for."""
    out = tmp_path / "toy"
    if finished:
        toy(o)
        if (out / name).exists():
            return  # the run's own
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("{}")
    before = everything(out)
    for overwrite, lr in ((False, 0.1), (False, 0.3), (True, 0.3)):
        what = name.partition("/")[0]
        with pytest.raises(
            ValueError,
            match=f"toy: holds what no run of this stage wrote, {what}; choose another --out",
        ):
            toy(dataclasses.replace(o, overwrite=overwrite, lr=lr))
        assert everything(out) == before


def test_beside_a_reader_s_other_files_there_is_room(o, whole, tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "log.txt").write_text("mine")
    toy(o)
    assert files(tmp_path / "toy") == whole | {"log.txt": b"mine"}


def test_what_is_refused_makes_no_folder(o, tmp_path):
    with pytest.raises(FileNotFoundError):
        toy(dataclasses.replace(o, data=str(tmp_path / "nowhere")))
    assert not (tmp_path / "toy").exists()


def test_an_unfinished_run_stays_until_its_successor_has_read_its_inputs(o, whole, tmp_path):
    """--overwrite with inputs that are refused, or a mistake in them, costs no hours of another
    run.
    """
    with pytest.raises(Killed):
        toy(o, 3)
    before = everything(tmp_path / "toy")
    # and then the stage refuses its data
    Run(dataclasses.replace(o, lr=0.3, overwrite=True), __file__, [])
    assert everything(tmp_path / "toy") == before
    toy(o)
    assert files(tmp_path / "toy") == whole


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"options": 1, "inputs": {}}',
        '{"options": {}}',
        "\0\1",
        "[" * 100_000,
        '{"options": {}, "inputs": {}, "files": []}',
    ],
)
def test_a_damaged_record_is_said(text, o, tmp_path):
    toy(o)
    (tmp_path / "toy" / "run.json").write_text(text)
    before = files(tmp_path / "toy")
    for overwrite in (False, True):
        with pytest.raises(
            ValueError,
            match="toy.run.json: damaged, or no run's record .*; choose another --out, or remove",
        ):
            toy(dataclasses.replace(o, overwrite=overwrite))
    assert files(tmp_path / "toy") == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other bytes"])
def test_a_damaged_checkpoint_is_not_finished(name, damage, o, whole, tmp_path):
    toy(o)
    file = tmp_path / "toy" / name
    if damage == "gone" and name == "config.json":
        return  # then nothing says that it was finished
    text = file.read_bytes()
    file.write_bytes(text[:-1] if damage == "cut" else text[:-1] + b"?")
    if damage == "gone":
        file.unlink()
    with pytest.raises(
        ValueError,
        match=f"{name}: damaged or changed since its run finished; .*--overwrite starts anew",
    ):
        toy(o)
    toy(dataclasses.replace(o, overwrite=True))
    assert files(tmp_path / "toy") == whole


@pytest.mark.parametrize("moment", ["while it writes", "before the rename"])
def test_a_state_half_written_is_never_read(moment, o, whole, tmp_path, monkeypatch):
    """Killed in its second save: the first one stands."""
    saves, real = [], os.replace

    def half(tensors, path, *rest):
        save_file(tensors, path, *rest)
        saves.append(path)
        if len(saves) == 2 and moment == "while it writes":
            os.truncate(path, path.stat().st_size // 2)
            raise Killed

    def replace(a, b):
        if len(saves) == 2:
            raise Killed
        real(a, b)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("common.run.save_file", half)
        patch.setattr("common.run.os.replace", replace)
        toy(o)
    assert saves[0] == saves[1] and saves[1].exists() and saves[1].name != "state.safetensors"
    seen = []
    toy(o, seen=seen)
    assert seen[0] == 2 and files(tmp_path / "toy") == whole


@pytest.mark.parametrize("die_at", [1, 3])
def test_killed_while_safetensors_writes_its_temporary_file(die_at, o, whole, tmp_path):
    """Before the first saved state, and after it."""
    with pytest.raises(Killed):
        toy(o, die_at=die_at)
    left = tmp_path / "toy" / "state" / ".tmpA1b2C3"
    left.write_bytes(b"half")
    seen = []
    toy(o, seen=seen)
    assert seen[0] == die_at // 2 * 2 and not left.exists() and files(tmp_path / "toy") == whole


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moment", range(10))
def test_killed_between_the_last_renames(moment, overwrite, o, whole, tmp_path, monkeypatch):
    """At each moment there is no checkpoint, or a whole one, old or new; and the same command
    completes it.
    """
    out, old, moves = tmp_path / "toy", None, []
    if overwrite:
        toy(dataclasses.replace(o, lr=0.3))
        old, o = files(out), dataclasses.replace(o, overwrite=True)

    def dying(real):
        def move(*args, **more):
            # the result is complete: from here on each move counts
            if moves or (out / "state" / "result" / "config.json").exists():
                moves.append(real)
                if len(moves) > moment:
                    raise Killed
            return real(*args, **more)

        return move

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        with pytest.raises(Killed):
            toy(o)
    left = {f.name: f.read_bytes() for f in out.iterdir() if f.is_file()}
    assert "config.json" not in left or left == old or left == whole
    try:
        toy(dataclasses.replace(o, overwrite=False))
    except SystemExit as finished:  # it was, but for the end of its state
        assert finished.code == 0 and left == whole
    assert {k: v for k, v in files(out).items() if k != "state"} == whole


def test_a_file_as_result(o, tmp_path):
    """comparisons.jsonl: one rename; its run lies beside it."""
    o, out = (
        dataclasses.replace(o, out=str(tmp_path / "made" / "x.jsonl")),
        tmp_path / "made" / "x.jsonl",
    )

    def stage(o, text="whole\n"):
        run = Run(o, __file__, [], file=True)
        for step in run.steps(o.steps):
            run.log(step, total=step)
            run.save(step, done=[step])
        run.finish(lambda path: path.write_text(text))

    stage(o)
    assert out.read_text() == "whole\n" and {
        f.name for f in out.with_name("x.jsonl.run").iterdir()
    } == {"run.json", "metrics.jsonl"}
    with pytest.raises(SystemExit):
        stage(o)
    with pytest.raises(ValueError, match="steps was 6, is 7"):
        stage(dataclasses.replace(o, steps=7))
    out.unlink()  # thrown away: made again, not "finished already"
    stage(o)
    assert out.exists()
    # a run of its own, not this one under another name
    other = dataclasses.replace(o, out=str(out.with_suffix(".json")))
    stage(other, "other\n")
    assert out.with_suffix(".json").read_text() == "other\n" and out.read_text() == "whole\n"


@pytest.mark.parametrize("moment", range(9))
def test_a_file_that_is_only_written_and_killed_is_never_the_old_one(
    moment, o, tmp_path, monkeypatch
):
    """As compare.py with pairs, which saves no state: at each moment before the last rename it is
    written again.
    """
    out, moves = tmp_path / "x.jsonl", []
    o = dataclasses.replace(o, out=str(out))

    def stage(o, text):
        Run(o, __file__, [], file=True).finish(lambda path: path.write_text(text))

    def dying(real):
        def move(*args, **more):
            if moves or (tmp_path / "x.jsonl.run" / "state" / "result" / "run.json").exists():
                moves.append(real)
                if len(moves) > moment:
                    raise Killed
            return real(*args, **more)

        return move

    stage(o, "old\n")
    new = dataclasses.replace(o, lr=0.3, overwrite=True)
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        stage(new, "new\n")
    try:
        # killed at once, it has not begun: the old one is whole
        stage(dataclasses.replace(new, overwrite=moment == 0), "new\n")
    except SystemExit as finished:
        assert finished.code == 0
    assert out.read_text() == "new\n"


def test_a_folder_may_have_a_dot_in_its_name(o, whole, tmp_path):
    for name in ("lr0.1", "lr0.2"):
        toy(dataclasses.replace(o, out=str(tmp_path / name)))
        assert files(tmp_path / name) == whole


def test_a_damaged_state_is_said(o, tmp_path):
    with pytest.raises(Killed):
        toy(o, 3)
    saved = tmp_path / "toy" / "state" / "state.safetensors"
    os.truncate(saved, 100)
    with pytest.raises(
        ValueError, match=r"state.safetensors: damaged \(.*\); remove .*state to start anew"
    ):
        toy(o)


def test_a_state_that_lacks_something_is_said(o, tmp_path):
    """A log that lost lines, a note or a model that lost tensors."""
    with pytest.raises(Killed):
        toy(o, 3)
    state = tmp_path / "toy" / "state"
    log, saved = (state / "metrics.jsonl").read_bytes(), (state / "state.safetensors").read_bytes()
    (state / "metrics.jsonl").write_bytes(log.splitlines(keepends=True)[0])
    with pytest.raises(
        ValueError, match="metrics.jsonl: has 1 of 2 lines; remove .*state to start anew"
    ):
        toy(o)
    (state / "metrics.jsonl").write_bytes(log)
    for name, said in (("model/weight", "model is incomplete"), ("note", "")):
        tensors = load_file(state / "state.safetensors")
        del tensors[name]
        save_file(tensors, state / "state.safetensors")
        with pytest.raises(
            ValueError,
            match=rf"state.safetensors: damaged \(.*{said}.*\); remove .*state to start anew",
        ):
            toy(o)
        (state / "state.safetensors").write_bytes(saved)


def test_what_is_not_finite_stops_a_run_before_it_is_saved(o, tmp_path):
    for bad in (float("nan"), torch.tensor(float("inf"))):
        run = Run(o, __file__, [])
        run.resume()
        for step in run.steps(4):
            if step == 2:
                with pytest.raises(
                    ValueError,
                    match="step 2: loss is (nan|inf); nothing saved is lost, a lower --lr may help",
                ):
                    run.log(step, loss=bad)
                break
            run.log(step, loss=1.0)
            run.save(step)
        assert (tmp_path / "toy" / "state" / "metrics.jsonl").read_text().count("\n") == 2


def test_what_is_logged(o, tmp_path):
    run = Run(o, __file__, [])
    run.steps(1)
    run.log(0, loss=torch.tensor(1 / 3, requires_grad=True), lr=3e-7, n=12345678, share=2 / 3)
    (line,) = (tmp_path / "toy" / "state" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 0,
        "loss": 0.3333333,
        "lr": 3e-7,
        "n": 12345678,
        "share": 0.6666667,
    }


def test_a_full_disk(o, whole, tmp_path, monkeypatch):
    """Whatever is being written: one error that names the place, and all that was saved before
    stands.
    """

    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"toy.state: cannot be written \(.*No space left"),
    ):
        patch.setattr("common.run.save_file", full)
        toy(o)
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"toy.state: cannot be written \(.*No space left"),
    ):
        patch.setattr("test_run.save_file", full)
        toy(o)
    assert not (tmp_path / "toy" / "config.json").exists()
    seen = []
    toy(o, seen=seen)
    assert seen == [] and files(tmp_path / "toy") == whole


def test_a_control_of_a_run_without_a_record_is_refused(tmp_path):
    """A control runs a stage again with the options of its record."""
    from tools import runs

    for text, said in (
        (None, "has no run.json"),
        ("", "damaged, or no run's record"),
        ("{}", "damaged, or no run's record"),
    ):
        if text is not None:
            (tmp_path / "run.json").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            runs.run("sft.py", tmp_path / "out", of=tmp_path)
