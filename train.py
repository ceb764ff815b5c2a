"""What every stage shares and no algorithm: options, seed, device, learning rate at a step, log, save, resume.

A run's life. Until it has finished, all it has is in OUT/state: one safetensors file (parameters, optimizer, and a JSON note in its
header), saved every so many steps and put in place by a rename, and metrics.jsonl. Then the checkpoint is written aside and moved
into OUT file by file, config.json last, and the state is removed. OUT/run.json keeps the options and the hashes of the inputs: the
same command again finds it and has nothing to do; another one is refused with the difference.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import runpy
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm


# ---------------------------------------------------------------- options
def opt(default, help: str, at_least=None, above=None, choices=None):
    """A field of an options dataclass: its default, its help, its bounds."""
    return dataclasses.field(default=default, metadata=dict(help=help, at_least=at_least, above=above, choices=choices))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if message.startswith("unrecognized") else None
        near = difflib.get_close_matches(unknown or "", self._option_string_actions, 1, 0.4)
        super().exit(2, f"{self.prog}: {message}{f' (did you mean {near[0]}?)' if near else ''}\n")


def parse(options, doc: str, argv=None):
    """Command line → an options dataclass. One line and exit status 2 on an unknown option or an impossible value."""
    parser = Parser(description=doc.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(options):
        flag = "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=f.metadata["help"])
        else:
            parser.add_argument(flag, type=f.type, default=f.default, help=f.metadata["help"], choices=f.metadata["choices"])
    values = parser.parse_args(argv)
    for f in dataclasses.fields(options):
        value, low, above = getattr(values, f.name), f.metadata["at_least"], f.metadata["above"]
        if low is not None and not value >= low or above is not None and not value > above:
            limit = f"at least {low}" if low is not None else f"above {above}"
            parser.error(f"--{f.name.replace('_', '-')} is {value}, it must be {limit}")
    return options(**vars(values))


def main(stage, options, doc: str):
    """Runs a stage as a script: what it says of bad input becomes one line and exit status 2."""
    try:
        stage(parse(options, doc))
    except (ValueError, OSError, SafetensorError) as e:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; the same command goes on from the last saved step", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------- device and optimizer
def pick_device(name: str) -> torch.device:
    """auto: the GPU where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name}: not available here ({str(e).splitlines()[0]}); try cpu or auto") from None


def autocast(device: torch.device):
    """bf16 on a GPU that has it, float32 everywhere else."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext()


def load_function(spec: str):
    """FILE.py:function → the function. Raises ValueError or FileNotFoundError where there is none."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{spec}: no file {file or spec}; FILE.py:function was expected")
    module = runpy.run_path(file)
    if not callable(module.get(name)):
        near = difflib.get_close_matches(name, [k for k, v in module.items() if callable(v)], 1, 0.4)
        raise ValueError(f"{file}: has no function {name}{f' (did you mean {near[0]}?)' if near else ''}")
    return module[name]


def adamw(model, lr: float, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW on the parameters that want a gradient, decay on matrices only (never on norms and biases)."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in wanted if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for p in wanted if p.dim() < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def lr_at(step: int, total: int, peak: float, warmup: int = 0, schedule: str = "linear") -> float:
    """Learning rate at a step (0-based): linear warmup to `peak`, then down to 0 at `total` along a line or a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    return peak * {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[schedule]


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---------------------------------------------------------------- a run
def fingerprint(path: str) -> str:
    """sha256 of a file, or of the files in a checkpoint folder that decide what it says."""
    path, h = Path(path), hashlib.sha256()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    files = [f for f in sorted(path.iterdir()) if f.name in names or f.suffix == ".safetensors"] if path.is_dir() else [path]
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                h.update(block)
    return h.hexdigest()


class Run:
    """One stage's run: where it stands, its bar, its log, its state.

    options: the dataclass, with `out`, `seed`, `overwrite` and `save_every`; script: the stage's __file__; inputs: the files and
    folders it reads. Leaves with exit status 0 where the run has been finished already.
    Raises ValueError where `out` holds something else: another run, or files that no run wrote.
    """

    def __init__(self, options, script: str, inputs: list[str]):
        self.out, self.every = Path(options.out), options.save_every
        self.home = self.out.with_suffix(".run") if self.out.suffix else self.out  # a single file keeps its run beside it
        self.state = self.home / "state"
        torch.manual_seed(options.seed)
        known = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "overwrite", "save_every")}
        self.identity = {"options": known, "inputs": {str(p): fingerprint(p) for p in (script, *inputs) if p}}
        self.identity["inputs"] = {Path(p).name if p == script else p: h for p, h in self.identity["inputs"].items()}
        self.tracked, self.extra, self.start, self.lines = {}, {}, 0, []
        self._claim(options.overwrite)

    def _claim(self, overwrite: bool):
        """Takes OUT: nothing there, our own unfinished state, or a refusal."""
        saved = self.state / "state.safetensors"
        if saved.exists():
            with safe_open(saved, "pt") as f:
                note = json.loads(f.metadata()["note"])
            if changed := difference(note["identity"], self.identity):
                if not overwrite:
                    raise ValueError(f"{self.out}: an unfinished run has other settings: {changed} (--overwrite starts anew)")
                shutil.rmtree(self.state)
            else:
                self.start, self.extra = note["step"], note["extra"]
        elif (self.home / "run.json").exists() and not overwrite:
            if changed := difference(json.loads((self.home / "run.json").read_text()), self.identity):
                raise ValueError(f"{self.out}: finished with other settings: {changed} (--overwrite starts anew)")
            print(f"{self.out}: finished already with these settings")
            sys.exit(0)
        elif not (self.home / "run.json").exists() and (self.out / "config.json").exists():
            raise ValueError(f"{self.out}: holds a checkpoint that no run of this stage wrote; choose another --out")
        self.state.mkdir(parents=True, exist_ok=True)
        log = self.state / "metrics.jsonl"
        if self.start and log.exists():  # what was logged after the last save is done again
            self.lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] < self.start]
        log.write_text("".join(line + "\n" for line in self.lines))

    def resume(self, **tracked) -> dict:
        """Names what makes up the state (modules, optimizers), restores it where there is one, and returns save()'s extras."""
        self.tracked = tracked
        if self.start:
            with safe_open(self.state / "state.safetensors", "pt") as f:
                for name, thing in tracked.items():
                    _restore(thing, {k.removeprefix(name + "/"): f.get_tensor(k) for k in f.keys() if k.startswith(name + "/")})
        return self.extra

    def steps(self, total: int, unit: str = "step"):
        """The steps that are left, with a bar."""
        self.total = total
        self.bar = tqdm(range(self.start, total), initial=self.start, total=total, unit=unit, desc=str(self.out), dynamic_ncols=True)
        return self.bar

    def log(self, step: int, show: tuple = ("loss",), **figures):
        """One object a step into metrics.jsonl; the figures named in `show` also beside the bar."""
        figures = {k: round(float(v), 6) if not isinstance(v, (int, str)) else v for k, v in figures.items()}
        with open(self.state / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": step, **figures}) + "\n")
        self.bar.set_postfix({k: f"{figures[k]:.3g}" for k in show if k in figures}, refresh=False)

    def save(self, step: int, **extra):
        """Saves the state where it is due: after every `save_every` steps and after the last. extra: what JSON can hold."""
        if (step + 1) % self.every and step + 1 < self.total:
            return
        tensors = {f"{n}/{k}": v.contiguous() for n, thing in self.tracked.items() for k, v in _tensors(thing)}
        note = json.dumps({"identity": self.identity, "step": step + 1, "extra": extra})
        aside = self.state / "aside.safetensors"
        save_file(tensors or {"empty": torch.zeros(1)}, aside, {"note": note})
        os.replace(aside, self.state / "state.safetensors")

    def finish(self, write):
        """write(path) puts the result aside (a folder, or a file where OUT is one); then it takes its place and the state goes."""
        aside = self.state / "result"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        (aside / "run.json").write_text(json.dumps(self.identity, indent=1) + "\n")
        shutil.copy(self.state / "metrics.jsonl", aside)
        write(aside / self.out.name if self.out.suffix else aside)
        (self.home / "config.json").unlink(missing_ok=True)  # from here until the last rename there is no checkpoint to read
        for file in sorted(aside.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, self.out if file.name == self.out.name else self.home / file.name)
        shutil.rmtree(self.state)


def difference(old: dict, new: dict) -> str:
    """What differs between two runs' identities, in words; empty where nothing does."""
    words = []
    for part in ("options", "inputs"):
        a, b = old.get(part, {}), new[part]
        for k in sorted(a.keys() | b.keys()):
            if a.get(k) != b.get(k):
                words.append(
                    f"{k} was {a.get(k)}, is {b.get(k)}"
                    if part == "options"
                    else f"{k} {'has changed' if k in a and k in b else 'is another input'}"
                )
    return "; ".join(words)


def _tensors(thing):
    if isinstance(thing, torch.nn.Module):
        return [(k, p.data) for k, p in thing.named_parameters() if p.requires_grad]
    params = [p for g in thing.param_groups for p in g["params"]]
    return [(f"{i}.{k}", v) for i, p in enumerate(params) for k, v in thing.state[p].items() if torch.is_tensor(v)]


def _restore(thing, saved: dict):
    if isinstance(thing, torch.nn.Module):
        for k, p in thing.named_parameters():
            if p.requires_grad:
                p.data.copy_(saved[k])
        return
    params = [p for g in thing.param_groups for p in g["params"]]
    for name, v in saved.items():
        i, k = name.split(".")
        thing.state[params[int(i)]][k] = v if k == "step" else v.to(params[int(i)].device)
