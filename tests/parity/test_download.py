"""Checkpoints named as on the hub, fetched by huggingface_hub from a small server here."""

import hashlib
import json
import re
import signal
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import stages
import tiny
from safetensors.torch import load_file
from stages import refused, run

from common import files
from common.run import fingerprint

pytest.importorskip("huggingface_hub")
PAIR = [*tiny.user("what is one and two?"), {"role": "assistant", "content": "three."}]
SFT = dict(steps=4, batch=2, warmup=0, length=64, save_every=2)


class Hub(ThreadingHTTPServer):
    """The hub's side of snapshot_download: {repository: {commit: folder}}, `main` is the last."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.gated, self.asked = {}, set(), []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, name, folder) -> str:
        """A commit of the folder's files as they are → its hash."""
        commits = self.repositories.setdefault(name, {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = {
            str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(Path(folder).rglob("*"))
            if p.is_file()
        }
        return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        found = re.fullmatch(r"/api/models/(\w+/\w+)(?:/(revision|tree)/(\w+))?", path)
        name, kind, revision = found.groups() if found else (None, "", "")
        if not found:
            found = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", path)
            name, revision, kind = found.groups() if found else (None, "", "")
        commits = hub.repositories.get(name)
        if commits is None:
            return self.answer(401, error="RepoNotFound")
        commit = [*commits][-1] if revision in (None, "main") else revision
        if commit not in commits:
            return self.answer(404, error="RevisionNotFound")
        content = commits[commit]
        if not path.startswith("/api"):
            if name in hub.gated:
                return self.answer(403, error="GatedRepo")
            if kind not in content:
                return self.answer(404, error="EntryNotFound")
            hub.asked.append(kind)
            return self.answer(200, content[kind], commit)
        if kind == "tree":
            rows = [dict(path=k, size=len(v), oid=oid(v), type="file") for k, v in content.items()]
            return self.answer(200, json.dumps(rows).encode())
        said = dict(id=name, sha=commit, siblings=[{"rfilename": k} for k in content])
        return self.answer(200, json.dumps(said).encode())

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status, body=b"", commit="", error=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if commit:
            self.send_header("ETag", f'"{oid(body)}"')
            self.send_header("X-Repo-Commit", commit)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.shutdown()


@pytest.fixture
def at(hub, tmp_path):
    """Runs a stage with the hub's address and a cache of its own. offline: with no hub there; then:
    what else the process does first.
    """
    data = tiny.write(tmp_path / "chats.jsonl", [{"messages": PAIR}] * 4)

    def go(stage, offline=False, then="", **options):
        where = "http://127.0.0.1:9" if offline else f"http://127.0.0.1:{hub.server_port}"
        given = dict(HF_ENDPOINT=where, HF_HOME=str(tmp_path / "cache"), no_proxy="127.0.0.1")
        before = partial(exec, f"import os; os.environ.update({given}); {then}")
        hub.asked.clear()
        return run(stage, before, **dict(data=data) | options)

    go.model = tiny.folder(tmp_path / "tiny")
    return go


def fine(result):
    assert result.status == 0, result.err
    return result


def tensors(out):
    return {k: v.tolist() for k, v in load_file(out / "model.safetensors").items()}


def test_a_checkpoint_is_fetched_once_and_read_as_its_folder(hub, at, tmp_path):
    """Only what we read comes; the record says which revision; without the hub it goes on, bit for
    bit, and where the hub has another revision it does not."""
    folder, a, b, c = Path(at.model), *(tmp_path / x for x in "abc")
    fine(at("sft.py", model=folder, out=a, **SFT))
    digest = fingerprint(folder)
    for extra in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "onnx/config.json"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"x")
    first = hub.add("owner/tiny", folder)
    fine(at("sft.py", model="owner/tiny", out=b, **SFT))
    assert {*hub.asked} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert tensors(a) == tensors(b)
    record = json.loads((b / "run.json").read_text())
    assert record["options"]["model"] == f"owner/tiny@{first}"
    assert record["inputs"][f"owner/tiny@{first}"] == digest
    assert record["inputs"]["owner/tiny"] == first

    dies = "import stages; stages.dies_at_the_end()"
    killed = at("sft.py", True, dies, model="owner/tiny", out=c, **SFT)
    assert killed.status == -signal.SIGKILL and stages.saved_step(c / "state") == 4
    second = hub.add("owner/tiny", folder)
    said = f"was 'owner/tiny@{first}', is 'owner/tiny@{second}'"
    refused(at("sft.py", model="owner/tiny", out=c, **SFT), said, "owner/tiny has changed")
    fine(at("sft.py", True, model=f"owner/tiny@{first}", out=c, **SFT))
    assert tensors(a) == tensors(c)
    result = fine(at("sft.py", model=f"owner/tiny@{first}", out=c, **SFT))
    assert "finished already" in result.out and not hub.asked


def test_adapters_over_a_base_on_the_hub(hub, at, tmp_path):
    commit, out, more = hub.add("owner/base", at.model), tmp_path / "lora", tmp_path / "more"
    fine(at("tools/cost.py", model="owner/base", out=tmp_path / "cost.json"))
    assert "tokenizer.json" in hub.asked and "model.safetensors" not in hub.asked
    fine(at("sft.py", model="owner/base", out=out, lora=2, **SFT))
    hub.add("owner/base", at.model)
    fine(at("sft.py", model=out, keep_base=True, out=more, **SFT))
    for folder in (out, more):
        config = files.read_json(folder / "adapter" / "adapter_config.json")
        assert config["base_model_name_or_path"] == "owner/base"
        assert config["revision"] == files.read_json(more / "run.json")["inputs"]["owner/base"]
        assert config["revision"] == commit
    row = {"query": "one and two is", "choices": [" three", " four"], "gold": 0}
    task = tiny.write(tmp_path / "task.jsonl", [row] * 3)
    fine(at("tools/evals.py", True, model=more, keep_base=True, task=task, out=tmp_path / "out"))


def test_what_the_hub_does_not_give(hub, at, tmp_path):
    """One line each, and nothing is written."""

    def no(name, *words, offline=False):
        return refused(at("sft.py", offline, model=name, out=tmp_path / "out", **SFT), name, *words)

    folder = Path(at.model)
    hub.add("owner/gated", folder)
    hub.gated.add("owner/gated")
    no("owner/gated", "is gated: accept its terms", "log in")
    no("owner/absent", "is no folder here, nor a model on the hub that you may read")
    no("owner/gated@v9", "has no such revision")
    no("owner/absent", "the hub cannot be reached", offline=True)
    no("owner--x/y--z", "cannot be fetched from the hub (HFValidationError")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.add("owner/pickled", folder)
    no("owner/pickled", "has pickled weights only (pytorch_model.bin) on the hub")
    assert "pytorch_model.bin" not in hub.asked
    (folder / "pytorch_model.bin").unlink()
    hub.add("owner/none", folder)
    no("owner/none", "has no weights on the hub: model.safetensors was expected")
    (folder / "adapter_config.json").touch()
    hub.add("owner/adapter", folder)
    no("owner/adapter", "has an adapter without its model on the hub")
    assert not (tmp_path / "out").exists()
