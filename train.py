"""What every stage shares and no algorithm: options, seed, device, learning rate at a step, log, save, resume.

A run's life. Until it has finished, all it has is in OUT/state: one safetensors file (parameters, optimizers, and a JSON note), saved
every so many steps and put in place by a rename, and metrics.jsonl. Then the checkpoint is written aside and moved into OUT file by
file, config.json last, and the state is removed. OUT/run.json keeps the options, the hashes of the inputs and of the code, and those of
what was written: the same command again finds it and has nothing to do; another one is refused with the difference. One run at a
time has an OUT (OUT/state/run.lock, a lock that ends with its process), and what no run wrote is never touched.
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import inspect
import json
import math
import operator
import os
import re
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


def opt(default, help: str, choices=None, needs="", **bounds):
    """A field of an options dataclass: its default, its help, its bounds (names as in BOUNDS).

    needs: the option without which it has no effect ("lora"), or also that one's values ("loss simpo"); a bound that names another
    option (below="steps") says beyond what it has none. That is said, and no error.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, needs=needs, bounds=bounds))


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
            if isinstance(limit, str):
                continue
            if not BOUNDS[bound](value := getattr(values, f.name), limit):
                parser.error(f"{flag} is {value}, it must be {bound.replace('_', ' ')} {limit}")
    for remark in without_effect(options, values):
        print(f"{parser.prog}: {remark}", file=sys.stderr)
    return options(**vars(values))


def without_effect(options, values):
    """A line for each option that was given and changes nothing beside the others."""
    spell = lambda name: "--" + name.replace("_", "-")  # noqa: E731
    for f in dataclasses.fields(options):
        value = getattr(values, f.name)
        other, *allowed = f.metadata["needs"].split() or [None]
        there = other is None or getattr(values, other)
        if value != f.default and not (there in allowed if allowed else there):
            yield f"{spell(f.name)} has no effect without {spell(other)} {' or '.join(allowed)}".rstrip()
        for bound, other in f.metadata["bounds"].items():
            if isinstance(other, str) and not BOUNDS[bound](value, limit := getattr(values, other)):
                yield f"{spell(f.name)} is {value}, {bound.replace('_', ' ')} {spell(other)} {limit} was expected: it has no effect beyond"


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
    """Does this GPU compute in bf16? One place decides it for autocast and for frozen weights."""
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


def make_room(optimizers, **sizes: int):
    """Before a forward pass, with its sizes in what decides its memory (tokens, targets): paged
    optimizers' pages leave the GPU where no pass before was as large. To wait until memory runs out
    and repeat the pass would be wrong: a part of its gradients may have been added up already."""
    for optimizer in optimizers:
        if isinstance(optimizer, PagedAdamW):
            optimizer.make_room(**sizes)


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
    """FILE.py:function → the function: (prompts: message lists, answers: strings, records) → a list
    of floats, one an answer. Where it takes three arguments it is given each answer's record too,
    with all its fields. It is given copies: what it changes stays with it.

    Raises FileNotFoundError or ValueError where there is none, and where it returns something else or does not run.
    """
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{spec}: FILE.py:function was expected{f', there is no file {file}' if file else ''}")
    found = _call(file, runpy.run_path, file)
    if not callable(found.get(name)):
        raise ValueError(f"{file}: has no function {name}{did_you_mean(name, [k for k, v in found.items() if callable(v)])}")

    three = _takes_three(found[name])

    def judge(prompts, answers, records=()):
        given = [[copy.deepcopy(p) for p in prompts], list(answers)]
        if three:
            given.append([copy.deepcopy(r) for r in records])
        scores = _call(file, lambda: [float(s) for s in found[name](*given)])
        if len(scores) != len(answers) or not all(map(math.isfinite, scores)):
            raise ValueError(f"{spec}: {len(answers)} finite scores, one an answer, were expected (got {len(scores)}: {str(scores)[:60]})")
        return scores

    return judge


def _takes_three(function) -> bool:
    """Whether its third argument is one that it needs, or is named `records`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in functions have none
        return False
    third = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][2:3]
    return any(p.default is p.empty or p.name == "records" for p in third)


def _call(file: str, function, *args):
    """Calls what stands in a reader's file; what goes wrong there becomes a ValueError with the line."""
    try:
        return function(*args)
    except (Exception, SystemExit) as e:  # its sys.exit(0) would pass for the stage's own success
        lines = [f":{f.lineno}" for f in traceback.extract_tb(e.__traceback__) if f.filename == file]
        raise ValueError(f"{file}{''.join(lines[-1:])}: {type(e).__name__}: {e}") from e


# ---------------------------------------------------------------- what a run is known by
ROOT = Path(__file__).parent
DECIDE = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DECIDE += ("model.safetensors.index.json",)  # which shards are read


def sha256(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(path) -> str:
    """sha256 of a file, or of the files in a checkpoint folder, and its adapter's, that decide what it says."""
    path = Path(path)
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path}: no such file or folder{did_you_mean(path.name, beside)}")
    if path.is_file():
        return sha256(path)
    files = sorted([*path.glob("*"), *path.glob("adapter/*")])
    files = [p for p in files if p.name in DECIDE or p.suffix == ".safetensors"]
    known = [(str(p.relative_to(path)), sha256(p)) for p in files]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def code(script) -> dict[str, str]:
    """The script and the project's modules that it imports, directly or not → {file: hash of what it does}.

    An edited comment or docstring changes no hash. A data file that a module names and that lies beside it counts with it.
    """
    found, todo = {}, [Path(script).resolve()]
    name = lambda path: str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name  # noqa: E731
    while todo:
        path = todo.pop()
        if name(path) in found:
            continue
        found[name(path)], modules, named = read_module(path.read_bytes())
        found |= {name(data): sha256(data) for n in named if (data := path.parent / n).is_file()}
        todo += [f for m in modules if (f := ROOT / f"{m.replace('.', '/')}.py").is_file()]
    return found


@functools.lru_cache(None)
def read_module(text: bytes):
    """A module's text → the hash of what it does, the modules that it imports when it is imported, and the JSON files it names."""
    tree, modules = ast.parse(text), []
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules += [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}", *(f"{node.module}.{a.name}" for a in node.names)]
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return hashlib.sha256(repr(syntax(tree)).encode()).hexdigest(), modules, [t for t in texts if re.fullmatch(r"\w+\.json", t)]


def syntax(tree) -> list:
    """A syntax tree, flat, without docstrings, places in the text, and the empty fields that
    Python's versions differ in. (Not ast.dump, which takes three times as long at every start.)"""
    flat, left = [], [tree]
    while left:
        node = left.pop()
        if not isinstance(node, ast.AST):
            flat.append(repr(node))
            continue
        flat.append(type(node).__name__)
        for name in node._fields:
            value = getattr(node, name, None)
            if name == "body" and isinstance(node, DOCUMENTED) and documented(node):
                value = value[1:]
            if value is not None and value != []:
                several = isinstance(value, list)
                flat.append(f"{name} {len(value) if several else ''}")
                left += value if several else [value]
    return flat


def documented(node) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def difference(old: dict, new: dict) -> str:
    """What differs between two runs' identities, in words; empty where nothing does."""
    a, b = old["options"], new["options"]
    words = [f"{k} was {a.get(k)!r}, is {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    return "; ".join(words + [f"{p} has changed" for p, h in new["inputs"].items() if old["inputs"].get(p, h) != h])


def read_record(home) -> dict | None:
    """run.json, the record of a finished run: its options, its inputs' hashes, and (in later ones) those of its files."""
    path = Path(home) / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        if all(isinstance(x, dict) for x in (record["options"], record["inputs"], record.get("files", {}))):
            return record
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path}: damaged, or no run's record (options and inputs were expected); choose another --out, or remove {home}")


# ---------------------------------------------------------------- a run
CHECKPOINT = ("adapter", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json")
LOCK, SAVED = "run.lock", "state.safetensors"
STATE = {LOCK, SAVED, "aside.safetensors", "metrics.jsonl", "result"}  # all that a run keeps in OUT/state


@contextlib.contextmanager
def writing(path):
    """A full disk and the like, said with the place and the way out."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise OSError(f"{path}: cannot be written ({e}); nothing saved is lost, the same command goes on from the last save") from None


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Run:
    """One stage's run: where it stands, its bar, its log, its state.

    options: the dataclass, with `out`, `seed`, `overwrite` and `save_every`; script: the stage's __file__; inputs: the files and
    folders it reads; made: {name: hash} of what it reads and no file holds; file: OUT is a file, and its run lies beside it;
    writes: what it writes into OUT, that which is moved last at the end. Leaves with exit status 0 where the run has been finished
    already. Raises ValueError where `out` holds something else: another run, one that is at work, or what no run wrote.
    """

    def __init__(self, options, script: str, inputs: list[str], made=None, file=False, writes=CHECKPOINT):
        self.out, self.every = Path(options.out), getattr(options, "save_every", 1)
        self.home = self.out.with_name(self.out.name + ".run") if file else self.out
        self.result = self.out if file else self.home / writes[-1]
        self.writes = {"result"} if file else set(writes)
        self.state, self.saved, self.lock = self.home / "state", self.home / "state" / SAVED, None
        known = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "overwrite", "save_every")}
        if "device" in known:
            known["device"] = pick_device(known["device"]).type
        hashes = code(script) | {str(p): fingerprint(p) for p in inputs} | (made or {})
        self.identity = {"options": known, "inputs": hashes}
        self.tracked, self.extra, self.start, self.begun = {}, {}, 0, False
        self._claim(options.overwrite)
        torch.manual_seed(options.seed)

    def _claim(self, overwrite: bool):
        """Takes OUT: nothing there, our own unfinished state, or a refusal, which touches nothing."""
        if not (self.state / LOCK).exists():  # else look only once it is sure that nobody is at work
            self._look(overwrite)
        self._lock()
        if note := self._look(overwrite):
            self.start, self.extra = note["step"], note["extra"]

    def _lock(self):
        """Holds OUT until this process ends, however it ends. ValueError where another one holds it."""
        with writing(self.state):
            while self.lock is None or not os.fstat(self.lock.fileno()).st_nlink:  # 0: the other run ended, and its state went, just now
                self.state.mkdir(parents=True, exist_ok=True)
                self.lock = open(self.state / LOCK, "a")
                try:
                    fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    raise ValueError(f"{self.out}: another run is at work in it; wait for its end, or choose another --out") from None
                except OSError:
                    pass  # a disk that has no locks

    def _look(self, overwrite: bool) -> dict | None:
        """What lies in OUT → the note of an unfinished state that goes on. Ends the process where the run has been finished."""
        record = read_record(self.home)
        for name in sorted(self.writes | {"run.json", "metrics.jsonl", "state"}):
            if os.path.lexists(self._place(name)) and not self._is_ours(name, record):
                raise ValueError(f"{self.out}: holds what no run of this stage wrote, {name}; choose another --out")
        note = self._note() if self.saved.exists() else None
        if note:
            if not (changed := difference(note["identity"], self.identity)):
                return note
            if not overwrite:
                raise ValueError(f"{self.out}: an unfinished run has other settings: {changed} (--overwrite starts anew)")
        elif self.result.exists() and not overwrite:
            if changed := difference(record, self.identity):
                raise ValueError(f"{self.out}: finished with other settings: {changed} (--overwrite starts anew)")
            for name, known in record.get("files", {}).items():
                if not (place := self._place(name)).is_file() or sha256(place) != known:
                    raise ValueError(f"{place}: damaged or changed since its run finished; get it back, or --overwrite starts anew")
            if self.lock:
                self._clear()
            print(f"{self.out}: finished already with these settings")
            sys.exit(0)
        return None

    def _place(self, name: str) -> Path:
        return self.result if name in ("result", self.result.name) else self.home / name  # "result": OUT, where that is a file

    def _is_ours(self, name: str, record: dict | None) -> bool:
        """Whether a run wrote what OUT has under a name."""
        if name == "state":
            there = {p.name for p in self.state.iterdir()} if self.state.is_dir() else {name}
            return not there or there <= STATE and bool(there & {LOCK, SAVED})
        return record is not None and (name in ("run.json", "metrics.jsonl") or name in _written(record, self.writes))

    def _clear(self):
        """Removes the state, the lock last: what is left without the saved file is never taken for a run."""
        for path in sorted(self.state.iterdir(), key=lambda p: (p.name == LOCK, p.name != SAVED)):
            remove(path)
        self.state.rmdir()

    def _begin(self):
        """Now all inputs have been read and found good: what an earlier run left is cleared away."""
        if self.begun:
            return
        self.begun, log = True, self.state / "metrics.jsonl"
        with writing(self.state):
            if not self.start:
                for path in sorted(self.state.iterdir(), key=lambda p: p.name != SAVED):
                    if path.name != LOCK:
                        remove(path)
            log.touch()  # one line a step; what was logged after the last save is done again
            lines = log.read_bytes().splitlines(keepends=True)
            if len(lines) < self.start:
                raise ValueError(f"{log}: has {len(lines)} of {self.start} lines; remove {self.state} to start anew")
            os.truncate(log, sum(map(len, lines[: self.start])))

    def _note(self) -> dict:
        try:
            with safe_open(self.saved, "pt") as f:
                note = json.loads(bytes(f.get_tensor("note").tolist()))
            return {k: note[k] for k in ("identity", "step", "extra")}
        except (SafetensorError, ValueError, LookupError, TypeError) as e:
            raise ValueError(f"{self.saved}: damaged ({e}); remove {self.state} to start anew") from None

    def resume(self, **tracked) -> dict:
        """Names what makes up the state (modules, optimizers), restores it where there is one, and returns save()'s extras."""
        self.tracked = tracked
        if self.start:
            with safe_open(self.saved, "pt") as f:
                for name, thing in tracked.items():
                    saved = {k.removeprefix(name + "/"): f.get_tensor(k) for k in f.keys() if k.startswith(name + "/")}
                    if isinstance(thing, torch.nn.Module) and saved.keys() != _tensors(thing).keys():
                        raise ValueError(f"{self.saved}: damaged ({name} is incomplete); remove {self.state} to start anew")
                    _restore(thing, saved)
        return self.extra

    def steps(self, total: int, unit: str = "step"):
        """The steps that are left, with a bar."""
        self._begin()
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
        self._begin()
        aside, log = self.state / "result", self.state / "metrics.jsonl"
        shutil.rmtree(aside, ignore_errors=True)
        with writing(self.state):
            aside.mkdir()
            write(aside if self.home == self.out else aside / self.out.name)
            files = {str(p.relative_to(aside)): sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()}
            if self.home != self.out:
                files = {"result": files[self.out.name]}  # it may be called something else one day
            (aside / "run.json").write_text(json.dumps(self.identity | {"files": files}, indent=1) + "\n")
            if log.stat().st_size:
                shutil.copy(log, aside)
        self.result.unlink(missing_ok=True)  # from here until the last rename there is no checkpoint to read
        before = read_record(self.home)
        for name in sorted(_written(before, self.writes)) if before else []:
            remove(self._place(name))
        for file in sorted(aside.iterdir(), key=lambda f: (f.name == self.result.name, f.name != "run.json")):
            os.replace(file, self._place(file.name))  # run.json first: it says whose the others are
        self._clear()


def _written(record: dict, names: set) -> set:
    """The names in OUT that a finished run wrote; a record of before they were kept stands for all."""
    return {name.partition("/")[0] for name in record["files"]} if "files" in record else set(names)


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
