"""Checkpoints of the Hugging Face hub: owner/name or owner/name@revision → a folder in the hub's
own cache, through the optional package huggingface_hub. Only the files that we read are fetched; a
later run finds them there without a network.
"""

import functools
import re
from pathlib import Path

from common.files import optional

NAME = re.compile(r"([a-z0-9][\w.-]*)/([a-z0-9][\w.-]*)(?:@(.+))?", re.ASCII | re.IGNORECASE)
CACHED = re.compile(r"models--([^/]+)/snapshots/([0-9a-f]{40})/?$")  # the end of a cached folder
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
SMALL += ["chat_template.jinja", "model.safetensors.index.json", "adapter/adapter_config.json"]
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "adapter/adapter_model.safetensors"]
REASONS = {  # huggingface_hub's errors by name
    "GatedRepoError": "is gated: accept its terms on its page, then log in (hf auth login)",
    "RepositoryNotFoundError": "is no folder here, nor a model on the hub that you may read; log in"
    " (hf auth login) if it is private",
    "RevisionNotFoundError": "has no such revision on the hub",
    "LocalEntryNotFoundError": "is no folder here, its files are not all in the hub's cache, and"
    " the hub cannot be reached",
}


def folder(spec: str, part="all") -> str:
    """A checkpoint as it is named on a command line → its folder. A folder stays what it is, and so
    does what cannot be a name on the hub; `out/sft` is a path wherever there is a folder `out`.

    part: "all", or "tokenizer": without the weights. ValueError, in one line, where the hub does
    not give what we read.
    """
    found = NAME.fullmatch(spec)
    if not found or Path(spec).exists() or (Path(found[1]).is_dir() and not found[3]):
        return spec
    return fetch(spec, f"{found[1]}/{found[2]}", found[3], part)


@functools.cache  # one revision in all of a run, also where a branch moves meanwhile
def fetch(spec, name, revision, part) -> str:
    hub = optional("huggingface_hub", f"{spec} is no folder here, but a name on the hub")
    try:
        path = hub.snapshot_download(name, revision=revision, allow_patterns=SMALL)
        commit = Path(path).name
        others = []
        if part == "all":  # weights last: where they are, all the rest is
            hub.snapshot_download(name, revision=commit, allow_patterns=SMALL + WEIGHTS)
            if not any(Path(path).glob("*.safetensors")):
                others = hub.HfApi().list_repo_files(name, revision=commit)
    except Exception as e:
        kinds = [c.__name__ for c in type(e).__mro__]
        said = f"cannot be fetched from the hub ({type(e).__name__}: {e})"
        raise ValueError(f"{spec} {next((REASONS[k] for k in kinds if k in REASONS), said)}") from e
    if others:
        pickled = [f for f in others if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        has = f"pickled weights only ({pickled[0]})" if pickled else "no weights"
        if "adapter_config.json" in others:
            has = "an adapter without its model"
        raise ValueError(f"{spec} has {has} on the hub: model.safetensors was expected")
    return path


def origin(path) -> tuple[str, str] | None:
    """A folder of the hub's cache → (owner/name, commit); None for any other path."""
    found = CACHED.search(str(path))
    return (found[1].replace("--", "/"), found[2]) if found else None


def name(path) -> str:
    """A folder of the hub's cache → owner/name@commit, the same on every machine; any other path as
    it is.
    """
    return "@".join(origin(path) or [str(path)])
