"""What the stages share that is no algorithm: options, seed, device, optimizer, learning rate at a
step, log, save, resume.

A run's life. Until it has finished, everything is in OUT/state: one safetensors file (parameters,
optimizers, and a JSON note), saved every so many steps and put in place by a rename, and
metrics.jsonl. Then the checkpoint is written aside and moved into OUT file by file, config.json
last, and the state is removed. OUT/run.json keeps the options, and the hashes of the inputs, of the
code and of the files that were written: called again with the same options and inputs, the stage
returns at once; with others it refuses and shows the difference. Only one run at a time may use an
OUT (OUT/state/run.lock, a lock that ends with its process), and a file that no run wrote is never
touched.
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

from common import download
from paged import PagedAdamW

# ---------------------------------------------------------------- options
BOUNDS = dict(at_least=operator.ge, above=operator.gt, at_most=operator.le, below=operator.lt)


def opt(default, help: str, choices=None, needs="", hub="", **bounds):
    """A field of an options dataclass: its default, its help, its bounds (names as in BOUNDS).

    A value beyond a bound that is a number is an error, and so is a float that is not finite. A
    bound may also name another option (below="steps"): a value beyond that one has no effect.
    needs: the option without which this one has no effect ("lora"), perhaps with that option's
    values ("loss simpo"). An option without effect is reported, but is no error.
    hub: what is fetched where a checkpoint's name on the hub is given, download.folder's `part`.
    """
    help += ", or owner/name[@revision] on the Hugging Face hub" if hub else ""
    known = dict(help=help, choices=choices, needs=needs, hub=hub, bounds=bounds)
    return dataclasses.field(default=default, metadata=known)


def spell(name: str) -> str:
    return "--" + name.replace("_", "-")


def did_you_mean(word: str, known) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f" (did you mean {near[0]}?)" if near else ""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, without argparse's usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse(options, doc: str, argv=None):
    """Command line → an options dataclass, with a folder for each checkpoint that was named as on
    the hub (ValueError where it cannot be had). One line and exit status 2 on an unknown option or
    an impossible value.
    """
    parser = Parser(
        description=" ".join(doc.split("\n\n")[0].split()),
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    fields = dataclasses.fields(options)
    for f in fields:
        kind = dict(type=f.type, default=f.default, choices=f.metadata["choices"])
        if f.type is bool:
            kind = dict(action="store_true")
        text = f.metadata["help"].replace("%", "%%")  # argparse fills in %(default)s
        parser.add_argument(spell(f.name), help=text, **kind)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [spell(f.name) for f in fields]
        parser.error(f"unknown option {unknown[0]}{did_you_mean(unknown[0], flags)}")
    for f in fields:
        value = getattr(values, f.name)
        if expected := violated(f, value):
            parser.error(f"{spell(f.name)} is {value}, it must be {expected}")
    for remark in without_effect(options, values):
        print(f"{parser.prog}: {remark}", file=sys.stderr)
    for f in fields:
        value, part = getattr(values, f.name), f.metadata["hub"]
        if part and value != f.default:
            setattr(values, f.name, download.folder(value, part))
    return options(**vars(values))


def violated(field, value) -> str:
    """What a value had to be and is not, in words; empty where it is within its bounds."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    for bound, limit in field.metadata["bounds"].items():
        if not isinstance(limit, str) and not BOUNDS[bound](value, limit):
            return f"{bound.replace('_', ' ')} {limit}"
    return ""


def without_effect(options, values):
    """Yields a line for each option that was given and changes nothing beside the others."""
    for f in dataclasses.fields(options):
        flag, value = spell(f.name), getattr(values, f.name)
        if f.metadata["needs"] and value != f.default:
            other, *allowed = f.metadata["needs"].split()
            there = getattr(values, other)
            effective = there in allowed if allowed else there
            if not effective:
                words = f"{flag} has no effect without {spell(other)}"
                yield f"{words} {' or '.join(allowed)}".rstrip()
        for bound, other in f.metadata["bounds"].items():
            if not isinstance(other, str):
                continue
            limit = getattr(values, other)
            if not BOUNDS[bound](value, limit):
                expected = f"{bound.replace('_', ' ')} {spell(other)} {limit}"
                yield f"{flag} is {value}, {expected} was expected: it has no effect beyond"


def main(stage, options, doc: str):
    """Runs a stage as a script: its error about bad input becomes one line and exit status 2."""
    try:
        return stage(parse(options, doc))
    except (ValueError, OSError, SafetensorError) as e:
        status, message = 2, " ".join(str(e).split())
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command goes on from the last saved step"
    # out of `except`: the stage's frame is gone, and with it the bar
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------- device and optimizer
def pick_device(name: str) -> torch.device:
    """auto: the GPU where there is one. Raises ValueError for a device that is not there.

    Attention goes without cuDNN there: it plans anew for each shape, for up to a second, and the
    shapes of our batches change.
    """
    device = name
    if name == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=device)
        probe.item()
        if probe.is_cuda:
            torch.backends.cuda.enable_cudnn_sdp(False)
        return probe.device
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(
            f"--device {name}: not available here ({reason}); try cpu or auto"
        ) from None


def has_bf16(device: torch.device) -> bool:
    """Whether this is a GPU with bf16 units: decides for autocast and for frozen weights alike."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device):
    """bf16 on a GPU that has it, float32 everywhere else."""
    return torch.autocast("cuda", torch.bfloat16) if has_bf16(device) else contextlib.nullcontext()


def adamw(model, lr: float, weight_decay=0.0, eps=1e-8, paged=False):
    """AdamW on the trainable parameters, with weight decay on matrices only (never on norms and
    biases). paged: its state leaves the GPU where memory is short (paged optimizers, QLoRA).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    others = [p for p in trained if p.dim() < 2]
    groups = [
        dict(params=matrices, weight_decay=weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    options = dict(lr=lr, betas=(0.9, 0.95), eps=eps)
    if paged:
        return PagedAdamW(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)


def make_room(optimizer, **sizes: int):
    """Called before a pass with the sizes that decide its memory (tokens, targets): moves a paged
    optimizer's pages off the GPU if no pass before was as large. (To wait until memory runs out and
    repeat the pass would be wrong: some of its gradients may have been added up already.)
    """
    if isinstance(optimizer, PagedAdamW):
        optimizer.make_room(**sizes)


SCHEDULES = ("linear", "cosine", "constant")


def lr_at(step: int, total: int, peak: float, warmup: int = 0, schedule: str = "linear") -> float:
    """Learning rate at a step (0-based): linear warmup to `peak`, then down to 0 at `total` along a
    line ("linear") or half a cosine ("cosine"), or `peak` to the end ("constant").
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    wave = 0.5 - 0.5 * math.cos(math.pi * left)
    return peak * {"linear": left, "cosine": wave, "constant": 1.0}[schedule]


def set_lr(optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---------------------------------------------------------------- a reader's own reward or labeller
def is_function(spec: str) -> bool:
    """Whether a spec means FILE.py:function, and not a folder."""
    return spec.endswith(".py") or ".py:" in spec


def file_of(spec: str) -> str:
    """The file or folder that a spec names."""
    return (spec.rpartition(":")[0] or spec) if is_function(spec) else spec


def load_function(spec: str):
    """FILE.py:function → judge(prompts: message lists, answers: strings, records) → a list of
    floats, one per answer.

    The function is called with prompts and answers, and where it takes three arguments with each
    answer's record too, with all its fields. It gets copies, so that it cannot change ours. Raises
    FileNotFoundError or ValueError if there is no such function; judge raises ValueError if it
    fails or returns anything but finite scores.
    """
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        missing = f", there is no file {file}" if file else ""
        raise FileNotFoundError(f"{spec}: FILE.py:function was expected{missing}")
    names = _call(file, runpy.run_path, file)
    function = names.get(name)
    if not callable(function):
        near = did_you_mean(name, [k for k, v in names.items() if callable(v)])
        raise ValueError(f"{file}: has no function {name}{near}")
    three = _takes_three(function)

    def judge(prompts, answers, records=()):
        given = [[copy.deepcopy(p) for p in prompts], list(answers)]
        if three:
            given.append([copy.deepcopy(r) for r in records])
        scores = _call(file, lambda: [float(s) for s in function(*given)])
        if len(scores) != len(answers) or not all(map(math.isfinite, scores)):
            raise ValueError(
                f"{spec}: {len(answers)} finite scores, one per answer, were expected (got"
                f" {len(scores)}: {str(scores)[:60]})"
            )
        return scores

    return judge


def _takes_three(function) -> bool:
    """Whether it has a third argument without a default, or one named `records`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in functions have none
        return False
    third = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][2:3]
    return any(p.default is p.empty or p.name == "records" for p in third)


def _call(file: str, function, *args):
    """Calls a function of a reader's file; what it raises becomes a ValueError with its line."""
    try:
        return function(*args)
    except (Exception, SystemExit) as e:  # its sys.exit(0) would pass for the stage's own success
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f":{frame.lineno}" for frame in frames if frame.filename == file]
        raise ValueError(f"{file}{''.join(lines[-1:])}: {type(e).__name__}: {e}") from e


# ---------------------------------------------------------------- what a run is known by
ROOT = Path(__file__).parent.parent
DECIDE = {  # the files of a checkpoint folder, beside its weights, that decide what it means
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


def sha256(path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(path) -> str:
    """sha256 of a file, or of those files in a checkpoint folder and its adapter's that decide what
    it means. Raises FileNotFoundError.
    """
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
    """The script and the project's modules that it imports, directly or not → {file: hash of what
    it does}.

    An edited comment or docstring changes no hash. A JSON file that a module names and that lies
    beside it counts too.
    """

    def name(path):
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    found, todo = {}, [Path(script).resolve()]
    while todo:
        path = todo.pop()
        if name(path) in found:
            continue
        found[name(path)], modules, named = read_module(path.read_bytes())
        beside = [path.parent / n for n in named]
        found |= {name(data): sha256(data) for data in beside if data.is_file()}
        files = [ROOT / f"{m.replace('.', '/')}.py" for m in modules]
        todo += [f for f in files if f.is_file()]
    return found


@functools.lru_cache(None)
def read_module(text: bytes):
    """A module's text → (the hash of what it does, the modules that it imports at its top level,
    the JSON files that it names).
    """
    tree = ast.parse(text)
    modules, files = [], []
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules += [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}", *(f"{node.module}.{a.name}" for a in node.names)]
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str) and re.fullmatch(r"\w+\.json", value):
            files.append(value)
    return hashlib.sha256(repr(syntax(tree)).encode()).hexdigest(), modules, files


def syntax(tree) -> list:
    """A syntax tree as a flat list, without docstrings, places in the text, and the empty fields in
    which Python's versions differ. (ast.dump would take three times as long, at every start.)
    """
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
    changed = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    words = [f"{k} was {a.get(k)!r}, is {b.get(k)!r}" for k in changed]
    for path, digest in new["inputs"].items():
        if old["inputs"].get(path, digest) != digest:
            words.append(f"{path} has changed")
    return "; ".join(words)


def read_record(home) -> dict | None:
    """run.json, the record of a finished run: its options, its inputs' hashes, and (in later ones)
    those of its files. None where there is none; ValueError where it is damaged.
    """
    path = Path(home) / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        parts = record["options"], record["inputs"], record.get("files", {})
        if all(isinstance(part, dict) for part in parts):
            return record
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"{path}: damaged, or no run's record (options and inputs were expected); choose another"
        f" --out, or remove {home}"
    )


def lineage(path) -> list[str]:
    """The fingerprints of a checkpoint and of those that it was trained from, as run.json tells."""
    found = [fingerprint(path)]
    while record := read_record(path):
        path = record["options"].get("model")
        if path not in record["inputs"]:
            break
        found.append(record["inputs"][path])
        if not Path(path).is_dir() or fingerprint(path) != found[-1]:
            break
    return found


# ---------------------------------------------------------------- a run
CHECKPOINT = (
    "adapter",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
)
LOCK, SAVED, WATCHED = "run.lock", "state.safetensors", "watch.safetensors"
TEMPORARY = ".tmp"  # safetensors writes into a file of such a name first, a killed run leaves it
# all names that a run uses in OUT/state, beside temporary ones
STATE = {LOCK, SAVED, WATCHED, "aside.safetensors", "metrics.jsonl", "result"}


@contextlib.contextmanager
def writing(path):
    """Turns an error of the disk (no space, no permission) into one that names the path and the way
    out.
    """
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise OSError(
            f"{path}: cannot be written ({e}); nothing saved is lost, the same command goes on from"
            " the last save"
        ) from None


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Run:
    """One stage's run: its step, its bar, its log, its state.

    options: the dataclass, with `out`, `seed`, `overwrite` and `save_every`; script: the stage's
    __file__; inputs: the files and folders it reads; made: {name: hash} of inputs that no file
    holds; file: OUT is a file, and the run's folder lies beside it (OUT.run); writes: the names it
    writes into OUT, the one that is moved last at the end. Exits with status 0 if the run has
    finished already. Raises ValueError if `out` holds something else: another run, one at work, or
    files that no run wrote.
    """

    def __init__(
        self, options, script: str, inputs: list[str], made=None, file=False, writes=CHECKPOINT
    ):
        self.out = Path(options.out)
        self.every = getattr(options, "save_every", 1)
        self.home = self.out.with_name(self.out.name + ".run") if file else self.out
        self.result = self.out if file else self.home / writes[-1]
        self.writes = {"result"} if file else set(writes)
        self.state = self.home / "state"
        self.saved = self.state / SAVED
        known = dataclasses.asdict(options)
        known = {k: download.name(v) if isinstance(v, str) else v for k, v in known.items()}
        for name in ("out", "overwrite", "save_every"):  # they change no result
            known.pop(name, None)
        if "device" in known:
            device = pick_device(options.device)
            known["device"] = device.type
        hashes = code(script) | {download.name(p): fingerprint(p) for p in inputs} | (made or {})
        hashes |= dict(filter(None, map(download.origin, inputs)))  # {owner/name: commit}
        if hasattr(options, "settled"):
            known |= options.settled(device)
        self.identity = {"options": known, "inputs": hashes}
        self.tracked, self.extra = {}, {}
        self.beside = {}  # figures for the next line of the log
        self.remarks = {}  # what run.json says beside options, inputs and files
        self.start, self.begun = 0, False
        self.lock = None
        self._claim(options.overwrite)
        torch.manual_seed(options.seed)

    def _claim(self, overwrite: bool):
        """Takes OUT if it is empty or holds our own unfinished state; a refusal touches nothing."""
        # where there is a lock, look only once it is ours: a run at work moves its files
        if not (self.state / LOCK).exists():
            self._look(overwrite)
        self._lock()
        if note := self._look(overwrite):
            self.start, self.extra = note["step"], note["extra"]

    def _lock(self):
        """Holds OUT until this process ends, however it ends. ValueError if another run has it."""
        with writing(self.state):
            # no links left: the other run has just ended, and removed its state with the lock
            while self.lock is None or not os.fstat(self.lock.fileno()).st_nlink:
                self.state.mkdir(parents=True, exist_ok=True)
                self.lock = open(self.state / LOCK, "a")
                try:
                    fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    raise ValueError(
                        f"{self.out}: another run is at work in it; wait for its end, or choose"
                        " another --out"
                    ) from None
                except OSError:
                    pass  # a file system without locks

    def _look(self, overwrite: bool) -> dict | None:
        """→ the note of our own unfinished state in OUT, or None. Exits if the run has finished."""
        record = read_record(self.home)
        for name in sorted(self.writes | {"run.json", "metrics.jsonl", "state"}):
            if os.path.lexists(self._place(name)) and not self._is_ours(name, record):
                raise ValueError(
                    f"{self.out}: holds what no run of this stage wrote, {name}; choose another"
                    " --out"
                )
        if self.saved.exists():
            note = self._note()
            changed = difference(note["identity"], self.identity)
            if not changed:
                return note
            if not overwrite:
                raise ValueError(
                    f"{self.out}: an unfinished run has other settings: {changed} (--overwrite"
                    " starts anew)"
                )
        elif self.result.exists() and not overwrite:
            self._check_finished(record)
            if self.lock:
                self._clear()
            print(f"{self.out}: finished already with these settings")
            sys.exit(0)
        return None

    def _check_finished(self, record: dict):
        """ValueError unless the finished run in OUT is this one, and its files are as it left
        them.
        """
        if changed := difference(record, self.identity):
            raise ValueError(
                f"{self.out}: finished with other settings: {changed} (--overwrite starts anew)"
            )
        for name, known in record.get("files", {}).items():
            place = self._place(name)
            if not place.is_file() or sha256(place) != known:
                raise ValueError(
                    f"{place}: damaged or changed since its run finished; get it back, or"
                    " --overwrite starts anew"
                )

    def _place(self, name: str) -> Path:
        # "result": OUT, where that is a file
        return self.result if name in ("result", self.result.name) else self.home / name

    def _is_ours(self, name: str, record: dict | None) -> bool:
        """Whether the entry of this name in OUT was written by a run."""
        if name == "state":
            there = {p.name for p in self.state.iterdir()} if self.state.is_dir() else {name}
            there = {n for n in there if not n.startswith(TEMPORARY)}
            return not there or there <= STATE and bool(there & {LOCK, SAVED})
        if record is None:
            return False
        return name in ("run.json", "metrics.jsonl") or name in _written(record, self.writes)

    def _clear(self):
        """Removes the state: the saved file first, since without it nothing is taken for a run, and
        the lock last.
        """
        for path in sorted(self.state.iterdir(), key=lambda p: (p.name == LOCK, p.name != SAVED)):
            remove(path)
        self.state.rmdir()

    def _begin(self):
        """Clears away what an earlier run left, now that all inputs have been read and are good."""
        if self.begun:
            return
        self.begun = True
        log = self.state / "metrics.jsonl"
        with writing(self.state):
            if not self.start:
                for path in sorted(self.state.iterdir(), key=lambda p: p.name != SAVED):
                    if path.name != LOCK:
                        remove(path)
            for path in self.state.glob(TEMPORARY + "*"):
                remove(path)
            log.touch()  # one line per step; steps after the last save are done and logged again
            lines = log.read_bytes().splitlines(keepends=True)
            if len(lines) < self.start:
                raise ValueError(
                    f"{log}: has {len(lines)} of {self.start} lines; remove {self.state} to start"
                    " anew"
                )
            os.truncate(log, sum(map(len, lines[: self.start])))

    def _note(self) -> dict:
        try:
            with safe_open(self.saved, "pt") as f:
                note = json.loads(bytes(f.get_tensor("note").tolist()))
            return {k: note[k] for k in ("identity", "step", "extra")}
        except (SafetensorError, ValueError, LookupError, TypeError) as e:
            raise ValueError(
                f"{self.saved}: damaged ({e}); remove {self.state} to start anew"
            ) from None

    def resume(self, **tracked) -> dict:
        """Names the modules and optimizers that make up the state, and restores them in a run that
        was interrupted. Returns the extras of the last save(), {} at the start.
        """
        self.tracked = tracked
        if not self.start:
            return self.extra
        with safe_open(self.saved, "pt") as f:
            for name, thing in tracked.items():
                names = [k for k in f.keys() if k.startswith(name + "/")]
                saved = {k.removeprefix(name + "/"): f.get_tensor(k) for k in names}
                module = isinstance(thing, torch.nn.Module)
                if module and saved.keys() != _tensors(thing).keys():
                    raise ValueError(
                        f"{self.saved}: damaged ({name} is incomplete); remove {self.state} to"
                        " start anew"
                    )
                _restore(thing, saved)
        return self.extra

    def steps(self, total: int, unit: str = "step"):
        """The steps that are left, from 0-based self.start to total - 1, with a bar."""
        self._begin()
        self.total = total
        left = range(self.start, total)
        bar = dict(initial=self.start, total=total, unit=unit, desc=str(self.out))
        self.bar = tqdm(left, **bar, dynamic_ncols=True)
        return self.bar

    def log(self, step: int, show: tuple = ("loss",), **figures):
        """Writes one object per step into metrics.jsonl; the figures named in `show` also stand
        beside the bar. Raises ValueError for a figure that is not finite.
        """
        figures = {k: v.item() if torch.is_tensor(v) else v for k, v in figures.items()}
        figures, self.beside = figures | self.beside, {}
        if bad := [k for k, v in figures.items() if not math.isfinite(v)]:
            raise ValueError(
                f"step {step}: {bad[0]} is {figures[bad[0]]}; nothing saved is lost, a lower --lr"
                " may help"
            )
        figures = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in figures.items()}
        with writing(self.state), open(self.state / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": step, **figures}) + "\n")
        self.bar.set_postfix({k: f"{figures[k]:.3g}" for k in show if k in figures}, refresh=False)

    def save(self, step: int, **extra):
        """Saves the state if it is due: after every `save_every` steps and after the last. extra:
        what resume() returns later; JSON must be able to hold it.
        """
        if (step + 1) % self.every and step + 1 < self.total:
            return
        note = json.dumps({"identity": self.identity, "step": step + 1, "extra": extra})
        tensors = {}
        for name, thing in self.tracked.items():
            tensors |= {f"{name}/{k}": v.contiguous() for k, v in _tensors(thing).items()}
        tensors["note"] = torch.frombuffer(bytearray(note.encode()), dtype=torch.uint8)
        self.put(SAVED, tensors)

    def put(self, name: str, tensors: dict):
        """Writes tensors into OUT/state/name, whole or not at all."""
        aside = self.state / "aside.safetensors"
        with writing(self.state):
            save_file(tensors, aside)
            os.replace(aside, self.state / name)

    def finish(self, write):
        """write(path) writes the result (a folder, or a file where OUT is one) aside; then it is
        moved into OUT, and the state is removed.
        """
        self._begin()
        aside = self.state / "result"
        shutil.rmtree(aside, ignore_errors=True)
        with writing(self.state):
            aside.mkdir()
            write(aside if self.home == self.out else aside / self.out.name)
            written = [p for p in sorted(aside.rglob("*")) if p.is_file()]
            files = {str(p.relative_to(aside)): sha256(p) for p in written}
            if self.home != self.out:
                files = {"result": files[self.out.name]}  # OUT may be renamed one day
            record = self.identity | {"files": files} | self.remarks
            record = json.dumps(record, indent=1) + "\n"
            (aside / "run.json").write_text(record)
            log = self.state / "metrics.jsonl"
            if log.stat().st_size:
                shutil.copy(log, aside)
        # from here until the last rename there is no checkpoint to read
        self.result.unlink(missing_ok=True)
        before = read_record(self.home)
        for name in sorted(_written(before, self.writes)) if before else []:
            remove(self._place(name))

        def turn(file):  # run.json first: it says that the others are ours; config.json last
            return file.name == self.result.name, file.name != "run.json"

        for file in sorted(aside.iterdir(), key=turn):
            os.replace(file, self._place(file.name))
        self._clear()


def _written(record: dict, names: set) -> set:
    """The names in OUT that a finished run wrote: all of `names` if its record is an old one, which
    does not list them.
    """
    if "files" not in record:
        return set(names)
    return {name.partition("/")[0] for name in record["files"]}


def _tensors(thing) -> dict:
    """A module's trained parameters, or an optimizer's state as {"parameter.key": tensor}."""
    if isinstance(thing, torch.nn.Module):
        return {k: p.data for k, p in thing.named_parameters() if p.requires_grad}
    states = thing.state_dict()["state"]
    return {f"{i}.{k}": v for i, state in states.items() for k, v in state.items()}


def _restore(thing, saved: dict):
    if isinstance(thing, torch.nn.Module):
        thing.load_state_dict(saved, strict=False)  # what is not trained was never saved
        return
    state = {}
    for name, v in saved.items():
        i, k = name.split(".")
        state.setdefault(int(i), {})[k] = v
    thing.load_state_dict({"state": state, "param_groups": thing.state_dict()["param_groups"]})
