"""What every stage shares and no algorithm: options, seed, device, learning rate at a step, log, save, resume.

A run's life. Until it has finished, all it has is in OUT/state: one safetensors file (parameters, optimizers, and a JSON note), saved
every so many steps and put in place by a rename, and metrics.jsonl. Then the checkpoint is written aside and moved into OUT file by
file, config.json last, and the state is removed. OUT/run.json keeps the options and the hashes of the inputs: the same command again
finds it and has nothing to do; another one is refused with the difference.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import operator
import os
import runpy
import shutil
import sys
import traceback
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from quant import PagedAdamW

# ---------------------------------------------------------------- options
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def opt(default, help: str, choices=None, **bounds):
    """A field of an options dataclass: its default, its help, its bounds (names as in BOUNDS)."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, bounds=bounds))


def did_you_mean(word: str, known) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def parse(options, doc: str, argv=None):
    """Command line → an options dataclass. One line and exit status 2 on an unknown option or an impossible value."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without argparse's usage
    flags = {"--" + f.name.replace("_", "-"): f for f in dataclasses.fields(options)}
    for flag, f in flags.items():
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, default=f.default, choices=f.metadata["choices"])
        parser.add_argument(flag, help=f.metadata["help"], **kind)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown option {unknown[0]}{did_you_mean(unknown[0], flags)}")
    for flag, f in flags.items():
        for bound, limit in f.metadata["bounds"].items():
            if not BOUNDS[bound](value := getattr(values, f.name), limit):
                parser.error(f"{flag} is {value}, it must be {bound.replace('_', ' ')} {limit}")
    return options(**vars(values))


def main(stage, options, doc: str):
    """Runs a stage as a script: what it says of bad input becomes one line and exit status 2."""
    try:
        return stage(parse(options, doc))
    except (ValueError, OSError, SafetensorError) as e:
        status, said = 2, " ".join(str(e).split())
    except KeyboardInterrupt:
        status, said = 130, "interrupted; the same command goes on from the last saved step"
    print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)  # out of `except`: the stage's frame is gone, and with it the bar
    sys.exit(status)


# ---------------------------------------------------------------- device and optimizer
def pick_device(name: str) -> torch.device:
    """auto: the GPU where there is one. Raises ValueError for a device that is not there."""
    try:
        probe = torch.zeros(1, device=name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: not available here ({str(e).splitlines()[0]}); try cpu or auto") from None


def has_bf16(device: torch.device) -> bool:
    """Is this a GPU that computes in bf16? One place decides it for autocast and for frozen weights."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device):
    """bf16 on a GPU that has it, float32 everywhere else."""
    return torch.autocast("cuda", torch.bfloat16) if has_bf16(device) else contextlib.nullcontext()


def adamw(model, lr: float, weight_decay=0.0, eps=1e-8, paged=False):
    """AdamW on the parameters that want a gradient, decay on matrices only (never on norms and biases).
    paged: its state leaves the GPU where room is short."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in wanted if p.dim() >= 2], [p for p in wanted if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    options = dict(lr=lr, betas=(0.9, 0.95), eps=eps)
    return PagedAdamW(groups, **options) if paged else torch.optim.AdamW(groups, **options, fused=True)


def lr_at(step: int, total: int, peak: float, warmup: int = 0, schedule: str = "linear") -> float:
    """Learning rate at a step (0-based): linear warmup to `peak`, then down to 0 at `total` along a line or a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    return peak * {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[schedule]


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---------------------------------------------------------------- a reader's own reward or labeller
def load_function(spec: str):
    """FILE.py:function → the function: (prompts: message lists, answers: strings) → a list of floats, one an answer.

    Raises FileNotFoundError or ValueError where there is none, and where it returns something else or does not run.
    """
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{spec}: FILE.py:function was expected{f', there is no file {file}' if file else ''}")
    found = _call(file, runpy.run_path, file)
    if not callable(found.get(name)):
        raise ValueError(f"{file}: has no function {name}{did_you_mean(name, [k for k, v in found.items() if callable(v)])}")

    def judge(prompts, answers):
        scores = _call(file, lambda: [float(s) for s in found[name](prompts, answers)])
        if len(scores) != len(answers) or not all(map(math.isfinite, scores)):
            raise ValueError(f"{spec}: {len(answers)} finite scores, one an answer, were expected (got {len(scores)}: {str(scores)[:60]})")
        return scores

    return judge


def _call(file: str, function, *args):
    """Calls what stands in a reader's file; what goes wrong there becomes a ValueError with the line."""
    try:
        return function(*args)
    except Exception as e:
        lines = [f":{f.lineno}" for f in traceback.extract_tb(e.__traceback__) if f.filename == file]
        raise ValueError(f"{file}{''.join(lines[-1:])}: {type(e).__name__}: {e}") from e


# ---------------------------------------------------------------- a run
def fingerprint(path) -> str:
    """sha256 of a file, or of the files in a checkpoint folder, and its adapter's, that decide what it says."""
    path, h = Path(path), hashlib.sha256()
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path}: no such file or folder{did_you_mean(path.name, beside)}")
    names = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
    files = [p for p in sorted([*path.glob("*"), *path.glob("adapter/*")]) if p.name in names or p.suffix == ".safetensors"]
    for p in files if path.is_dir() else [path]:
        with open(p, "rb") as f:
            h.update(hashlib.file_digest(f, "sha256").digest())
    return h.hexdigest()


@contextlib.contextmanager
def writing(path):
    """A full disk and the like, said with the place and the way out."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise OSError(f"{path}: cannot be written ({e}); nothing saved is lost, the same command goes on from the last save") from None


class Run:
    """One stage's run: where it stands, its bar, its log, its state.

    options: the dataclass, with `out`, `seed`, `overwrite` and `save_every`; script: the stage's __file__; inputs: the files and
    folders it reads; file: OUT is a file, and its run lies beside it. Leaves with exit status 0 where the run has been finished already.
    Raises ValueError where `out` holds something else: another run, or what no run wrote.
    """

    def __init__(self, options, script: str, inputs: list[str], file=False):
        self.out, self.every = Path(options.out), options.save_every
        self.home, self.result = (self.out.with_suffix(".run"), self.out) if file else (self.out, self.out / "config.json")
        self.state, self.saved = self.home / "state", self.home / "state" / "state.safetensors"
        known = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "overwrite", "save_every")}
        self.identity = {"options": known, "inputs": {Path(script).name: fingerprint(script)} | {str(p): fingerprint(p) for p in inputs}}
        self.tracked, self.extra, self.start = {}, {}, 0
        self._claim(options.overwrite)
        torch.manual_seed(options.seed)

    def _claim(self, overwrite: bool):
        """Takes OUT: nothing there, our own unfinished state, or a refusal."""
        record = self.home / "run.json"
        if self.saved.exists():
            note = self._note()
            if not (changed := difference(note["identity"], self.identity)):
                self.start, self.extra = note["step"], note["extra"]
            elif not overwrite:
                raise ValueError(f"{self.out}: an unfinished run has other settings: {changed} (--overwrite starts anew)")
        elif self.result.exists() and not record.exists():
            raise ValueError(f"{self.out}: holds what no run of this stage wrote; choose another --out")
        elif self.result.exists() and not overwrite:
            if changed := difference(json.loads(record.read_text()), self.identity):
                raise ValueError(f"{self.out}: finished with other settings: {changed} (--overwrite starts anew)")
            print(f"{self.out}: finished already with these settings")
            sys.exit(0)
        if not self.start:
            shutil.rmtree(self.state, ignore_errors=True)
        log = self.state / "metrics.jsonl"
        with writing(self.state):
            self.state.mkdir(parents=True, exist_ok=True)
            log.touch()  # one line a step; what was logged after the last save is done again
            os.truncate(log, sum(map(len, log.read_bytes().splitlines(keepends=True)[: self.start])))

    def _note(self) -> dict:
        try:
            with safe_open(self.saved, "pt") as f:
                return json.loads(bytes(f.get_tensor("note").tolist()))
        except SafetensorError as e:
            raise ValueError(f"{self.saved}: damaged ({e}); remove {self.state} to start anew") from None

    def resume(self, **tracked) -> dict:
        """Names what makes up the state (modules, optimizers), restores it where there is one, and returns save()'s extras."""
        self.tracked = tracked
        if self.start:
            with safe_open(self.saved, "pt") as f:
                for name, thing in tracked.items():
                    _restore(thing, {k.removeprefix(name + "/"): f.get_tensor(k) for k in f.keys() if k.startswith(name + "/")})
        return self.extra

    def steps(self, total: int, unit: str = "step"):
        """The steps that are left, with a bar."""
        self.total = total
        self.bar = tqdm(range(self.start, total), initial=self.start, total=total, unit=unit, desc=str(self.out), dynamic_ncols=True)
        return self.bar

    def log(self, step: int, show: tuple = ("loss",), **figures):
        """One object a step into metrics.jsonl; the figures named in `show` also beside the bar. ValueError for one that is not finite."""
        figures = {k: v.item() if torch.is_tensor(v) else v for k, v in figures.items()}
        if bad := [k for k, v in figures.items() if not math.isfinite(v)]:
            raise ValueError(f"step {step}: {bad[0]} is {figures[bad[0]]}; nothing saved is lost, a lower --lr may help")
        figures = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in figures.items()}
        with writing(self.state), open(self.state / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": step, **figures}) + "\n")
        self.bar.set_postfix({k: f"{figures[k]:.3g}" for k in show if k in figures}, refresh=False)

    def save(self, step: int, **extra):
        """Saves the state where it is due: after every `save_every` steps and after the last. extra: what JSON can hold."""
        if (step + 1) % self.every and step + 1 < self.total:
            return
        note = json.dumps({"identity": self.identity, "step": step + 1, "extra": extra})
        tensors = {f"{n}/{k}": v.contiguous() for n, thing in self.tracked.items() for k, v in _tensors(thing).items()}
        tensors["note"] = torch.frombuffer(bytearray(note.encode()), dtype=torch.uint8)
        aside = self.state / "aside.safetensors"
        with writing(self.state):
            save_file(tensors, aside)
            os.replace(aside, self.saved)

    def finish(self, write):
        """write(path) puts the result aside (a folder, or a file where OUT is one); then it takes its place and the state goes."""
        aside = self.state / "result"
        shutil.rmtree(aside, ignore_errors=True)
        with writing(self.state):
            aside.mkdir()
            (aside / "run.json").write_text(json.dumps(self.identity, indent=1) + "\n")
            shutil.copy(self.state / "metrics.jsonl", aside)
            write(aside if self.home == self.out else aside / self.out.name)
        (self.home / "config.json").unlink(missing_ok=True)  # from here until the last rename there is no checkpoint to read
        shutil.rmtree(self.home / "adapter", ignore_errors=True)  # of the run before, with --overwrite
        for file in sorted(aside.iterdir(), key=lambda f: f.name == self.result.name):
            os.replace(file, self.result if file.name == self.result.name else self.home / file.name)
        self.saved.unlink(missing_ok=True)  # first: what is left without it is never taken for a run
        shutil.rmtree(self.state)


def difference(old: dict, new: dict) -> str:
    """What differs between two runs' identities, in words; empty where nothing does."""
    a, b = old["options"], new["options"]
    words = [f"{k} was {a.get(k)!r}, is {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    return "; ".join(words + [f"{p} has changed" for p, h in new["inputs"].items() if old["inputs"].get(p, h) != h])


def _tensors(thing) -> dict:
    """A module's trained parameters, or an optimizer's state as {"parameter.key": tensor}."""
    if isinstance(thing, torch.nn.Module):
        return {k: p.data for k, p in thing.named_parameters() if p.requires_grad}
    return {f"{i}.{k}": v for i, state in thing.state_dict()["state"].items() for k, v in state.items()}


def _restore(thing, saved: dict):
    if isinstance(thing, torch.nn.Module):
        thing.load_state_dict(saved, strict=False)  # what is not trained was never saved
        return
    state = {}
    for name, v in saved.items():
        i, k = name.split(".")
        state.setdefault(int(i), {})[k] = v
    thing.load_state_dict({"state": state, "param_groups": thing.state_dict()["param_groups"]})
