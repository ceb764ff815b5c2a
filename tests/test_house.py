"""The house: lessons at the root, plumbing in common/, no circle, no function too long."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ["sft", "compare", "reward", "ppo", "dpo", "pretrain"]
LESSONS = [*STAGES, "model", "packing", "sampling", "lora", "quant", "paged", "adapters", "metrics"]
LESSONS += ["forget"]
FOLDERS = ("common", "data", "data/world", "tools", "experiments")


def modules() -> dict:
    """{dotted name: syntax tree} of the project's own code, without the tests."""
    files = [*ROOT.glob("*.py"), *(f for folder in FOLDERS for f in (ROOT / folder).glob("*.py"))]
    names = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files}
    return {names[f].removesuffix(".__init__"): ast.parse(f.read_text("utf-8")) for f in files}


def imports(tree) -> set:
    """What it imports, within its functions too, as dotted names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return found


ABOVE = ("tools", "experiments")  # they may import stages, and more than the five packages
TREES = modules()
OURS = {name: imports(tree) & TREES.keys() - {name} for name, tree in TREES.items()}


def test_the_root_holds_the_lessons_and_nothing_else():
    assert {f.stem for f in ROOT.glob("*.py")} == set(LESSONS)


def test_no_stage_imports_a_stage_and_nothing_below_imports_tools():
    for name, needs in OURS.items():
        if not name.startswith(ABOVE):
            assert not needs & set(STAGES), f"{name} imports a stage"
            assert not any(n.startswith("tools") for n in needs), f"{name} imports a tool"
        assert name.startswith("experiments") or not any(n.startswith("exper") for n in needs), name


def test_imports_form_no_circle():
    left = {name: set(needs) for name, needs in OURS.items()}
    while free := [name for name, needs in left.items() if not needs]:
        for name in free:
            del left[name]
        for needs in left.values():
            needs -= set(free)
    assert not left


def test_only_the_five_packages_are_imported_at_run_time():
    allowed = {"torch", "numpy", "tiktoken", "tqdm", "safetensors"} | {"common", "data", *LESSONS}
    for name, tree in TREES.items():
        if not name.startswith(ABOVE):
            foreign = {n.split(".")[0] for n in imports(tree)} - allowed - sys.stdlib_module_names
            assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize("name", TREES)
def test_a_function_fits_on_a_screen(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def test_make_test_runs_every_file():
    """Its two halves, together, name each file once."""
    rules = (ROOT / "Makefile").read_text("utf-8")
    patterns = re.findall(r"tests/test_\S+\*\.py", rules)
    named = [f for pattern in patterns for f in ROOT.glob(pattern)]
    assert sorted(named) == sorted((ROOT / "tests").glob("test_*.py"))
