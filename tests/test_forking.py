"""docs/forking.md: its diff makes GRPO of ppo.py as it is now, and the fork is a stage as any."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from stages import ROOT, done, kill_after, saved_step
from test_resume import contents

from tools import evals, report

PAGE = ROOT / "docs" / "forking.md"
GROUP = 4
SETTINGS = dict(iterations=2, batch=2, group=GROUP, minibatch=4, max_new_tokens=24, warmup=1)
RENEW = "patch a copy of ppo.py, mend it, and put `diff -U1 ppo.py grpo.py` into docs/forking.md"


def the_diff() -> list[str]:
    (block,) = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    return block.splitlines(keepends=True)


def patched(old: list[str], diff: list[str]) -> list[str]:
    """The lines of a file with a unified diff put on it. A line that the diff removes or keeps must
    stand in the old file, at the very place that the diff says."""
    assert diff[:2] == ["--- ppo.py\n", "+++ grpo.py\n"]
    new, at = [], 0  # at: how many lines of the old file are done
    for line in diff[2:]:
        if line.startswith("@@"):
            start, now = map(int, re.match(r"@@ -(\d+)(?:,\d+)? \+(\d+)", line).groups())
            new += old[at : start - 1]
            at = start - 1
            assert len(new) == now - 1, f"{line!r}: the hunk lies elsewhere: {RENEW}"
        elif line[0] == "+":
            new.append(line[1:])
        else:
            assert old[at] == line[1:], f"ppo.py:{at + 1} is {old[at]!r}, not {line!r}: {RENEW}"
            new += [line[1:]] * (line[0] == " ")
            at += 1
    return new + old[at:]


def ppo_lines() -> list[str]:
    return (ROOT / "ppo.py").read_text(encoding="utf-8").splitlines(keepends=True)


@pytest.fixture(scope="module")
def grpo_py(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fork") / "grpo.py"
    path.write_text("".join(patched(ppo_lines(), the_diff())), encoding="utf-8")
    return path


@pytest.fixture
def options(small):
    keep = {k: small["ppo"][k] for k in ("model", "reward", "data")}
    return keep | SETTINGS


@pytest.fixture(scope="module")
def grpo(grpo_py):
    spec = importlib.util.spec_from_file_location("grpo", grpo_py)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rollouts(grpo, monkeypatch, **options):
    """Runs the stage in this process → its Rollouts."""
    seen, real = [], grpo.rollout
    monkeypatch.setattr(grpo, "rollout", lambda *args: seen.append(real(*args)) or seen[-1])
    grpo.ppo(grpo.Options(**options | dict(out=str(options["out"]), device="cpu")))
    monkeypatch.undo()
    return seen


def figures(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the diff
@pytest.mark.parametrize(
    "change",
    [
        lambda lines: ["\n", *lines],
        lambda lines: [line.replace("o.vf_coef * vf", "vf * o.vf_coef") for line in lines],
        lambda lines: [line for line in lines if "critic.parameters(), 1.0" not in line],
    ],
)
def test_the_diff_is_refused_where_ppo_py_has_moved(change):
    old = ppo_lines()
    assert change(old) != old
    with pytest.raises(AssertionError, match="put `diff -U1"):
        patched(change(old), the_diff())


@pytest.mark.skipif(not shutil.which("patch"), reason="needs patch")
def test_patch_takes_the_page_as_it_is(grpo_py, tmp_path):
    """The command that the page gives."""
    assert "    patch grpo.py docs/forking.md\n" in PAGE.read_text(encoding="utf-8")
    shutil.copy(ROOT / "ppo.py", tmp_path / "grpo.py")
    subprocess.run(["patch", "grpo.py", PAGE], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "grpo.py").read_bytes() == grpo_py.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["grpo.py"]


# ---------------------------------------------------------------- the fork runs
def test_the_fork_resumes_and_is_evaluated_and_shown(grpo_py, options, small, tmp_path):
    out = tmp_path / "out"
    options |= dict(iterations=5, save_every=1)
    done(str(grpo_py), out=out / "grpo", **options)
    broken = tmp_path / "broken"
    killed = kill_after(1, broken / "state", str(grpo_py), out=broken, **options)
    assert killed.status == -signal.SIGKILL and 1 <= saved_step(broken / "state") < 5
    done(str(grpo_py), out=broken, **options)
    assert contents(broken) == contents(out / "grpo")

    logged = figures(broken)
    assert len(logged) == 5
    assert {"kl_loss", "reward", "kl", "beta"} <= set(logged[0])
    assert not {"value_loss", "explained_variance"} & set(logged[0])
    assert logged[0]["ratio_error"] < 1e-3 and abs(logged[0]["kl"]) < 1e-3

    shutil.copytree(options["model"], out / "sft")
    (out / "world").mkdir()
    shutil.copy(Path(small["sft"]["data"]).with_name("heldout.jsonl"), out / "world")
    base = str(out / "none")
    evals.evaluate(evals.Options(out=str(out), base=base, n=6, max_new_tokens=8, device="cpu"))
    results = json.loads((out / "results.json").read_text())
    assert evals.evaluated(results) == ["sft", "grpo"] and results["grpo"]["kl_vs_sft"] != 0

    pytest.importorskip("matplotlib")
    report.report(report.Options(str(out)))
    page = (out / "report.html").read_text(encoding="utf-8")
    section = page[page.index("<h2>grpo</h2>") :]
    assert f"group {GROUP}" in section and "<b>Kl loss" in section and "<b>Reward<" in section


def test_advantages_are_relative_to_the_prompt_s_other_answers(
    grpo, options, monkeypatch, tmp_path
):
    seen = rollouts(grpo, monkeypatch, out=tmp_path / "grpo", **options)
    assert len(seen) == 2
    assert seen[0].prompts[0] != seen[0].prompts[GROUP]
    for r in seen:
        a = torch.where(r.mask, r.advantages, 0.0).sum(1) / r.mask.sum(1)  # (N,)
        torch.testing.assert_close(r.advantages, torch.where(r.mask, a[:, None], 0.0))
        for i in range(0, len(a), GROUP):
            assert all(prompt == r.prompts[i] for prompt in r.prompts[i : i + GROUP])
            assert abs(a[i : i + GROUP].sum()) < 1e-4
            s = r.score[i : i + GROUP].double()
            expected = (s - s.mean()) / (s.var(correction=0).sqrt() + 1e-4)
            torch.testing.assert_close(a[i : i + GROUP].double(), expected, atol=1e-3, rtol=1e-3)
    assert any(len(set(map(tuple, seen[0].answers[i : i + GROUP]))) > 1 for i in (0, GROUP))


def test_a_group_of_equal_scores_teaches_nothing(grpo, options, monkeypatch, tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("def third(prompts, answers):\n    return [1 / 3] * len(answers)\n")
    options |= dict(reward=f"{judge}:third", raw_reward=True, no_end_score=1 / 3, group=3)
    for r in rollouts(grpo, monkeypatch, out=tmp_path / "grpo", **options):
        assert r.advantages.abs().max() < 1e-2
    assert abs(figures(tmp_path / "grpo")[1]["kl"]) < 1e-3, "the policy stays where it was"


def test_the_kl_in_the_loss_pulls_the_policy_back(grpo, options, monkeypatch, tmp_path):
    """Through its gradient: as a figure that is only added, it would change nothing."""
    kl = []
    for beta in (0.0, 20.0):
        out = tmp_path / f"{beta}"
        rollouts(grpo, monkeypatch, out=out, **options | dict(kl_coef=beta, epochs=6, lr=2e-3))
        kl.append(figures(out)[1]["kl_k3"])
    assert kl[1] < 0.7 * kl[0]
