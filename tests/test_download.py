"""Checkpoints named as on the hub, with a stand-in for huggingface_hub (tests/parity has it)."""

import dataclasses
import json
import re
import shutil
import sys
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

import sft
from common import download, files, peft, tuning
from common.run import Run, difference, fingerprint, parse

A, B = "a" * 40, "b" * 40
CHATS = [{"messages": [*tiny.user("hello"), {"role": "assistant", "content": "hi"}]}] * 4


class Stub:
    """snapshot_download of one repository: its commits in order; a branch's name is the last."""

    def __init__(self, source, cache):
        self.source, self.commits, self.asked = Path(source), [A], []
        self.folder = cache / "models--owner--tiny" / "snapshots"
        self.HfApi = lambda: SimpleNamespace(list_repo_files=lambda *_, **__: self.names())

    def names(self):
        return [str(p.relative_to(self.source)) for p in self.source.rglob("*") if p.is_file()]

    def snapshot_download(self, name, revision, allow_patterns):
        assert name == "owner/tiny"
        commit = revision if revision in self.commits else self.commits[-1]
        wanted = [n for n in self.names() if any(fnmatch(n, p) for p in allow_patterns)]
        for file in sorted(wanted):
            (self.folder / commit / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.source / file, self.folder / commit / file)
        self.asked.append((revision, wanted))
        return str(self.folder / commit)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stub = Stub(tiny.folder(tmp_path / "tiny"), tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    monkeypatch.chdir(tmp_path)
    download.fetch.cache_clear()
    return stub


def options(tmp_path, **given):
    data = tiny.write(tmp_path / "chats.jsonl", CHATS)
    given = dict(model="owner/tiny", data=data, out=tmp_path / "out", steps=1, batch=2) | given
    argv = [a for k, v in given.items() for a in (f"--{k.replace('_', '-')}", str(v))]
    return parse(sft.Options, "", [*argv, "--warmup=0", "--length=64", "--device=cpu"])


def test_only_what_is_read_is_fetched_and_the_weights_last(hub):
    others = ["pytorch_model.bin", "consolidated.safetensors", "onnx/config.json", "model.fp16.bin"]
    read = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    read += ["chat_template.jinja", "model-00001-of-00002.safetensors"]
    for name in others + read:
        (hub.source / name).parent.mkdir(exist_ok=True)
        (hub.source / name).touch()
    path = Path(download.folder("owner/tiny"))
    assert {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} == {
        *(n for n in hub.names() if n not in others)
    }
    (branch, first), (commit, _) = hub.asked
    assert (branch, commit) == (None, A) and not any("tensors" in n[-7:] for n in first)
    hub.commits.append(B)  # a branch that moves while a run starts
    assert download.folder("owner/tiny") == str(path) and len(hub.asked) == 2
    assert download.folder("owner/tiny@main").endswith(B)
    path = Path(download.folder("owner/tiny@v1", "tokenizer"))
    assert (path / "tokenizer.json").exists() and len(hub.asked) == 5


def test_what_is_no_name_on_the_hub_stays_as_it_is(hub, tmp_path):
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    (tmp_path / "owner" / "tiny@v1").mkdir()
    paths = ["owner/tiny", "owner/tiny@v1", "owner/tinny", "tiny", "./x/y", "../x", "/x/y", "x/y/z"]
    for path in [*paths, "x", ""]:
        assert download.folder(path) == path
    assert options(tmp_path, model=sft.Options.model).model == sft.Options.model
    assert not hub.asked
    # beside it, the hub is asked only where that is what can be meant
    assert download.folder("owner/tiny@main").endswith(A)
    shutil.rmtree(tmp_path / "owner")
    ppo = import_module("ppo").Options
    assert parse(ppo, "", ["--reward", "owner/mine.py:score"]).reward == "owner/mine.py:score"


def test_without_the_package_it_is_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = "owner/tiny is no folder here, but a name on the hub; install the package"
    with pytest.raises(ValueError, match=re.escape(f"{line} huggingface_hub (pip install hug")):
        options(tmp_path)


@pytest.mark.parametrize(
    "there, words",
    [
        ("pytorch_model.bin", "pickled weights only (pytorch_model.bin)"),
        ("README.md", "no weights"),
        ("adapter_config.json", "an adapter without its model"),
    ],
)
def test_a_repository_without_weights_that_are_read(there, words, hub):
    (hub.source / "model.safetensors").rename(hub.source / there)
    with pytest.raises(ValueError, match=re.escape(f"owner/tiny has {words} on the hub: model.s")):
        download.folder("owner/tiny")


@pytest.mark.parametrize(
    "kinds, words",
    [
        (["RepositoryNotFoundError"], "that you may read"),
        (["RepositoryNotFoundError", "GatedRepoError"], "accept its terms"),
        (["LocalEntryNotFoundError", "IncompleteSnapshotError"], "cannot be reached"),
        (["HfHubHTTPError"], "HfHubHTTPError: why"),
    ],
)
def test_what_the_hub_says_is_one_line(kinds, words, hub):
    kind = OSError
    for name in kinds:
        kind = type(name, (kind,), {})
    hub.snapshot_download = lambda *_, **__: (_ for _ in ()).throw(kind("why"))
    with pytest.raises(ValueError, match=f"^owner/tiny .*{words}"):
        download.folder("owner/tiny")


def test_a_run_is_known_by_the_revision_that_it_read(hub, tmp_path):
    """Record and adapter name it, the same on every machine; another one is another input."""

    def known(o):
        download.fetch.cache_clear()
        return Run(o, sft.__file__, tuning.inputs(o)).identity

    o = options(tmp_path, lora=2)
    before = known(o)
    assert before["options"]["model"] == f"owner/tiny@{A}"
    assert before["inputs"][f"owner/tiny@{A}"] == fingerprint(o.model) == fingerprint(hub.source)
    assert before["inputs"]["owner/tiny"] == A
    hub.commits.append(B)
    download.fetch.cache_clear()
    said = f"model was 'owner/tiny@{A}', is 'owner/tiny@{B}'; owner/tiny has changed"
    assert difference(before, known(options(tmp_path, lora=2))) == said
    assert not difference(before, known(options(tmp_path, lora=2, model=f"owner/tiny@{A}")))

    path = tmp_path / "sft"
    shutil.copytree(hub.source, path)
    peft.save_adapter(tuning.tune(o, tiny.lm()), path / "adapter", o.model)
    file = path / "adapter" / "adapter_config.json"
    config = files.read_json(file)
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/tiny", A)
    assert tuning.base_of(path) == str(hub.folder / A)
    file.write_text(json.dumps(config | {"base_model_name_or_path": str(hub.source)}))
    assert tuning.base_of(path) == str(hub.source)
    # others' adapters name their base alone: the run tells when another revision is read
    file.write_text(json.dumps(config | {"revision": None}))
    o = dataclasses.replace(o, lora=0, keep_base=True, model=str(path))
    before = known(o)
    hub.commits.append("c" * 40)
    assert difference(before, known(o)) == "owner/tiny has changed"


CHECKPOINTS = {"model", "reward", "base", "judge", "large", "quality"}
PROGRAMS = ["sft", "compare", "reward", "ppo", "dpo", "forget"]
PROGRAMS += [f"tools.{t}" for t in "bench chat controls cost curate evals judge lighter".split()]
PROGRAMS += [f"experiments.{e}" for e in ("judge", "sizes", "tuning")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_option_that_names_a_checkpoint_may_name_the_hubs(name):
    fields = {f.name: f.metadata["hub"] for f in dataclasses.fields(import_module(name).Options)}
    named = CHECKPOINTS | ({"against"} if name == "tools.evals" else set())
    assert fields.keys() & named
    for field in fields.keys() & named:
        assert fields[field] == ("tokenizer" if name == "tools.cost" else "all")
