"""Each stage killed at a random step and started again gives what it gives uninterrupted, bit for
bit; nothing else is ever read.
"""

import json
import signal
import time
from pathlib import Path

import pytest
import stages
from stages import (
    SMALL,
    Stage,
    dies_at_the_end,
    done,
    interrupt,
    kill_after,
    refused,
    run,
    saved_step,
    script,
    slowly,
)

CLOCK = ("tokens_per_second",)  # figures of the wall clock


@pytest.fixture(scope="module")
def small(small):
    """On the CPU, where a run resumes bit for bit."""
    return {stage: options | dict(device="cpu") for stage, options in small.items()}


def contents(out) -> dict:
    """All that a finished run left: bytes by name, metrics without the clock's figures."""
    home, files = Path(out), {}
    if home.suffix == ".jsonl":
        files, home = {"result": home.read_bytes()}, home.with_name(home.name + ".run")
    # a folder in it, such as its state, is an error
    files |= {f.name: f.read_bytes() for f in home.iterdir()}
    lines = [json.loads(line) for line in files.pop("metrics.jsonl").splitlines()]
    return files | {
        "metrics": [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    }


@pytest.mark.parametrize("stage", SMALL)
def test_killed_and_started_again_equals_uninterrupted(stage, small, tmp_path):
    options, name = (
        dict(small[stage], save_every=2),
        stage + (".jsonl" if stage == "compare" else ""),
    )
    whole, broken = tmp_path / "whole" / name, tmp_path / "broken" / name
    done(script(stage), out=whole, **options)
    step = interrupt(1 if stage == "pretrain" else 2, broken, script(stage), **options)
    assert step > 0 and not (broken / "config.json").exists() and not broken.is_file()

    state = (broken.with_name(broken.name + ".run") if stage == "compare" else broken) / "state"
    before = (state / "state.safetensors").read_bytes()
    refused(
        run(script(stage), out=broken, **options | {"seed": 1}),
        str(broken),
        "unfinished",
        "seed was 0, is 1",
        "--overwrite",
    )
    assert (state / "state.safetensors").read_bytes() == before

    # how often it is saved changes nothing
    resumed = done(script(stage), out=broken, **options | {"save_every": 3})
    assert f"| {step}/" in resumed.err, "it went on from the saved step"
    assert contents(broken) == contents(whole)

    again = done(script(stage), out=broken, **options)
    assert again.err == "" and again.out == f"{broken}: finished already with these settings\n"
    assert contents(broken) == contents(whole)
    refused(
        run(script(stage), out=broken, **options | {"seed": 1}),
        str(broken),
        "finished with",
        "seed was 0, is 1",
        "--overwrite",
    )
    assert contents(broken) == contents(whole)


def test_a_changed_input_is_refused_and_overwrite_starts_anew(small, tmp_path):
    options, out = dict(small["sft"], save_every=2), tmp_path / "sft"
    data = Path(stages.copy(options["data"], tmp_path / "data.jsonl"))
    options |= dict(data=data, out=out)
    done("sft.py", **options)
    first = contents(out)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:100]))
    refused(
        run("sft.py", **options), str(out), "finished with", f"{data} has changed", "--overwrite"
    )

    kill_after(3, out / "state", "sft.py", overwrite=True, **options)
    assert contents_without_state(out) == first, (
        "the old checkpoint stays until the new one is finished"
    )
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:90]))
    refused(run("sft.py", **options), "unfinished", f"{data} has changed")
    anew = done("sft.py", overwrite=True, **options)
    assert "| 0/24 [" in anew.err and contents(out) != first
    done("sft.py", **options | dict(out=tmp_path / "other"))
    assert contents(out) == contents(tmp_path / "other")


def contents_without_state(out):
    aside = out.with_name("aside")
    (out / "state").rename(aside)
    try:
        return contents(out)
    finally:
        aside.rename(out / "state")


def test_overwrite_that_was_killed_goes_on(small, tmp_path):
    """The same command, --overwrite among it, does not start anew each time it is called."""
    options, out = dict(small["dpo"], save_every=2), tmp_path / "dpo"
    done("dpo.py", out=out, **options)
    options |= dict(seed=1, overwrite=True)
    kill_after(4, out / "state", "dpo.py", out=out, **options)
    step = saved_step(out / "state")
    assert step > 0 and f"| {step}/24 [" in done("dpo.py", out=out, **options).err


def test_ctrl_c(small, tmp_path):
    """One line, exit status 130, and the same command goes on."""
    options, out = dict(small["sft"], save_every=2), tmp_path / "sft"
    stopped = kill_after(2, out / "state", "sft.py", signal.SIGINT, out=out, **options)
    refused(stopped, "sft.py: interrupted", "the same command goes on", status=130)
    step = saved_step(out / "state")
    assert step > 0 and f"| {step}/24 [" in done("sft.py", out=out, **options).err
    done("sft.py", out=tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_batch_is_shown_beside_a_finished_run(small, tmp_path):
    """--show-batch is no run: it neither needs OUT nor touches it."""
    done("sft.py", out=tmp_path / "sft", **small["sft"])
    before = contents(tmp_path / "sft")
    for out in ("sft", "new"):
        assert "\033[32m" in done("sft.py", out=tmp_path / out, show_batch=True, **small["sft"]).out
    assert contents(tmp_path / "sft") == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("stage", ["sft", "compare"])
def test_a_second_run_is_told_so_and_touches_nothing(stage, small, tmp_path):
    """Whatever it asks for: both would write one log and one state."""
    options, name = (
        dict(small[stage], save_every=2),
        stage + (".jsonl" if stage == "compare" else ""),
    )
    out = tmp_path / "one" / name
    home = out.with_name(name + ".run") if stage == "compare" else out
    first = Stage(script(stage), slowly, out=out, **options)
    while first.process.is_alive() and not saved_step(home / "state"):
        time.sleep(0.002)
    first.kill(signal.SIGSTOP)  # it stands still, and is there, as long as the others ask
    before = {p: p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()}
    try:
        for changes in ({}, {"overwrite": True, "seed": 1}):
            refused(
                run(script(stage), out=out, **options | changes),
                f"{out}: another run is at work in it",
                "choose another --out",
            )
        assert before == {p: p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()}
    finally:
        first.kill(signal.SIGCONT)  # or pytest would wait for it for ever
    assert first.end().status == 0
    done(script(stage), out=tmp_path / "alone" / name, **options)
    assert contents(out) == contents(tmp_path / "alone" / name)


def test_adapters_that_moved_before_a_resume_at_the_end_have_moved(small, tmp_path):
    """Killed behind its last step, a run has no step to go; what it trained is compared with its
    start.
    """
    for name, options in (
        ("sft", dict(lora=2, steps=4)),
        ("dpo", dict(lora=2, steps=4)),
        ("reward", dict(lora=2, steps=4)),
        ("ppo", dict(lora=2, iterations=2)),
    ):
        options = small[name] | options | dict(out=tmp_path / name)
        assert run(script(name), dies_at_the_end, **options).status == -signal.SIGKILL
        assert saved_step(tmp_path / name / "state") == options.get("steps", 2)
        assert "have not moved" not in done(script(name), **options).out
