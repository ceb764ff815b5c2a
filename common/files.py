"""JSON files in a model's folder: written, and read with a clear error where they are damaged."""

import importlib
import json
from pathlib import Path


def parse(text: str, where, again="get the file again"):
    """JSON → its value, of any kind. ValueError where it is not JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON ({e}); {again}") from None


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{path} is not JSON, nor text in UTF-8 ({e}); get the file again"
        ) from None


def read_json(path: Path) -> dict:
    content = parse(read_text(path), path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, an object was expected; get the file again"
        )
    return content


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")


def write_jsonl(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8")


def optional(package: str, why: str):
    """A package that most runs do without. ValueError that asks for it by name where it is not
    installed; why: what it is needed for."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{why}; install the package {package} (pip install {package})") from None


def hub_name(name: str) -> str:
    """Our parameter's or module's name in transformers' spelling: the backbone is "model."."""
    return name if name.partition(".")[0] in ("lm_head", "score") else "model." + name
