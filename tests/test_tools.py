"""Chat as a person uses it, in a process of its own; the report on results of each kind: whole,
partial, without gold, hostile text.
"""

import json
import re
import signal
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from subprocess import PIPE

import pytest
import stages
import torch

from common import hub
from data.templates import TEMPLATES
from data.tokenizer import Tokenizer
from model import Config, Transformer, scalar_model
from pretrain import init_weights
from tools import chat, report, results

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


def tokenizer(template="chatml"):
    tok = Tokenizer.load(GOLDEN / "gpt2_kind")
    tok.chat_template = TEMPLATES[template].jinja if template else None
    return tok


def tiny(**changes):
    shape = dict(
        vocab_size=500,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = Transformer(Config(**shape | dict(head_dim=8) | changes))
    init_weights(model, torch.Generator().manual_seed(0))
    return model


def parrot(folder, **changes):
    """A checkpoint whose likeliest token is always the first, "!": with a norm of 0 all logits are
    equal.
    """
    model = tiny(**changes)
    model.norm.weight.data.zero_()
    return save(folder, model, tokenizer())


def save(folder, model, tok):
    hub.save(folder, model, tok)
    return str(folder)


def run(folder, *lines, options=None):
    """chat with these lines typed → (exit status, stdout, stderr)."""
    typed = "".join(line + "\n" for line in lines)
    given = dict(model=folder, device="cpu", max_new_tokens=8) | (options or {})
    return stages.run("tools/chat.py", partial(stages.types, typed), **given)


# ---------------------------------------------------------------- chat
def test_a_talk_with_every_command(tmp_path):
    folder = parrot(tmp_path / "m")
    lines = [
        "/temperature 0",
        "hello",
        "",
        "/help",
        "/system be kind",
        "again",
        "/reset",
        " /exit",
        "/exit",
        "never read",
    ]
    status, out, err = run(folder, *lines)
    assert status == 0
    # " /exit" is a message, an empty line is nothing, what follows /exit is not read
    assert out == "!!!!!!!!\n" * 3
    assert (
        "(temperature 0)" in err
        and "(system message: be kind)" in err
        and "(forgotten)" in err
        and "/system TEXT" in err
    )
    assert err.count("--max-new-tokens") == 3 and err.endswith("bye\n")


def test_a_wrong_command_is_answered_and_the_talk_goes_on(tmp_path):
    lines = [
        "/temprature 1",
        "/temperature -1",
        "/temperature hot",
        "/system",
        "/temperature 0",
        "hello",
    ]
    status, out, err = run(parrot(tmp_path / "m"), *lines)  # the end of the input is an exit too
    assert (status, out) == (0, "!!!!!!!!\n")
    assert (
        "no command /temprature (did you mean /temperature?); /help lists them" in err
        and "(no system message)" in err
    )
    assert err.count("a number from 0 up was expected; it is 0.7") == 2 and err.endswith("bye\n")


def test_same_seed_same_answer_and_another_seed_another(capsys):
    model, tok, told = tiny(), tokenizer(), []
    for seed in (1, 1, 2):
        talk = [{"role": "user", "content": "hello"}]
        chat.answer(model, tok, chat.Options(temperature=1.0, max_new_tokens=8), talk, {499}, seed)
        told.append(talk[1]["content"])
        assert capsys.readouterr().out == chat.printable(told[-1]) + "\n"
    assert told[0] == told[1] != told[2]


def test_a_talk_that_outgrows_the_context_loses_its_oldest_turns(tmp_path):
    folder = parrot(tmp_path / "m", max_position_embeddings=64)
    status, out, err = run(
        folder, "one", "two", "three", "x" * 200, "four", options=dict(temperature=0)
    )
    assert status == 0 and out == "!!!!!!!!\n" * 4
    assert "the oldest 2 messages are forgotten" in err
    assert "the context has room for 56 before the answer: not sent" in err


def test_fit_keeps_the_system_message_and_the_last_turns():
    tok = tokenizer()
    talk = [
        {"role": role, "content": f"{i} words"} for i in range(4) for role in ("user", "assistant")
    ][:-1]
    whole = len(chat.fit(tok, "be kind", list(talk), 10_000))
    ids = chat.fit(tok, "be kind", talk, whole - 1)
    assert [m["content"] for m in talk] == ["1 words", "1 words", "2 words", "2 words", "3 words"]
    assert (
        tok.decode(ids).startswith(
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n1 words"
        )
        and len(ids) < whole
    )


def tokens(ids, then=None):
    for i in ids:
        yield torch.tensor([i])
    if then:
        raise then


def test_streaming_holds_back_unfinished_characters_and_shows_no_control_character(
    capsys, monkeypatch
):
    tok, written = tokenizer(), []
    text = "caf\u00e9 \u20ac \U0001f600\x1b[2J."
    monkeypatch.setattr(chat, "print", lambda text, **_: written.append(text), raising=False)
    ids = tok.encode(text)
    assert chat.stream(tok, tokens([*ids, 499, *ids]), {499}) == (text, "")
    assert "".join(written) == text.replace("\x1b", "\ufffd")
    assert len([w for w in written if w]) > 5 and "".join(written).count("\ufffd") == 1


def test_bytes_that_never_become_a_character_are_shown_at_the_end(capsys):
    ids = tokenizer().encode("\u20ac")[:-1]
    assert chat.stream(tokenizer(), tokens(ids, KeyboardInterrupt()), {499}) == (
        "\ufffd",
        "stopped",
    )
    assert capsys.readouterr().out == "\ufffd\n"


def test_ctrl_c_stops_the_answer_only(tmp_path):
    folder = parrot(tmp_path / "m", max_position_embeddings=200_000)
    command = [
        sys.executable,
        "-m",
        "tools.chat",
        "--model",
        folder,
        "--device",
        "cpu",
        "--temperature",
        "0",
        "--max-new-tokens",
        "100000",
    ]
    # a job in the background ignores it
    as_in_a_terminal = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    p = subprocess.Popen(
        command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=PIPE, bufsize=0, **as_in_a_terminal
    )
    p.stdin.write(b"hello\n")
    assert p.stdout.read(1) == b"!"
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(b"/help\n/exit\n", timeout=120)
    assert p.returncode == 0
    assert (
        set(out.decode()) <= {"!", "\n"}
        and b"(stopped)" in err
        and b"/reset" in err
        and err.endswith(b"bye\n")
    )


def test_a_base_model_talks_in_chatml_and_says_so(tmp_path):
    status, out, err = run(save(tmp_path / "m", tiny(), tokenizer(None)), "hello")
    assert status == 0 and out and "no chat template" in err and "chatml" in err


def test_what_cannot_talk_is_refused(tmp_path):
    folder, tok = parrot(tmp_path / "m"), tokenizer()
    reward = save(tmp_path / "reward", scalar_model(tiny(pad_token_id=497, eos_token_id=499)), tok)
    hub.save(tmp_path / "mute", tiny())
    tok.chat_template = "{{ messages }}"
    foreign = save(tmp_path / "foreign", tiny(), tok)
    for model, options, words in [
        (tmp_path / "none", {}, "none"),
        (reward, {}, "a reward model"),
        (tmp_path / "mute", {}, "no tokenizer.json"),
        (foreign, {}, "none of chatml"),
        (folder, dict(top_p=1.5), "at most 1"),
        (folder, dict(max_new_tokens=2048), "no room for a prompt"),
        (folder, dict(device="tpu"), "not available"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            chat.converse(chat.Options(str(model), **dict(device="cpu") | options))


def test_a_refusal_is_one_line_and_exit_status_2(tmp_path):
    for options, words in [
        (dict(top_p=1.5), "at most 1"),
        (dict(sytem="x"), "did you mean --system?"),
    ]:
        status, out, err = run(parrot(tmp_path / "m"), "hello", options=options)
        assert status == 2 and not out and words in err and err.count("\n") == 1


# ---------------------------------------------------------------- report
class Page(HTMLParser):
    """The page's text, and what tags were opened; every tag must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text += data * (self.open[-1:] != ["style"])


HOSTILE = "<script>alert('&amp;')</script> $x_1$ \x1b"
KINDS = ("open", "sums", "chat")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def a_run(out, stages=("base", "sft", "ppo", "dpo", "simpo")):
    """What a finished run of the embedded world leaves, without the weights."""
    prompts = [[{"role": "user", "content": f"Prompt {i} {HOSTILE}"}] for i in range(30)]
    write(
        out / "world" / "heldout.jsonl",
        [{"messages": p, "item": {"kind": KINDS[i % 3]}} for i, p in enumerate(prompts)],
    )
    results = {"perfect": 1.8}
    for i, stage in enumerate(stages):
        figures = dict(
            gold_sampled=0.3 * i,
            gold_greedy=0.3 * i,
            right_sampled=0.2 * i,
            right_greedy=0.2 * i,
            finished=1.0,
        )
        results[stage] = figures | dict(
            n=30, mean_length=7.5, gold_sampled_ci=0.05, gold_greedy_ci=0.05, right_greedy_ci=0.02
        )
        if i:
            wins = dict(win_vs_sft=0.5, win_vs_sft_decided=None, win_vs_sft_ci=0.0)
            results[stage] |= wins | dict(
                gain_vs_sft=0.3 * (i - 1), gain_vs_sft_ci=0.05, kl_vs_sft=1.0, kl_vs_sft_ci=0.1
            )
        reasons = {
            "right": True,
            "complete": 0.5,
            "courteous": False,
            "rude": True,
            "concise": False,
            "finished": True,
        }
        lines = [
            dict(
                prompt=p,
                answer=f"{stage} {HOSTILE}",
                finished=True,
                gold=1.25,
                right=True,
                reasons=reasons,
                rougeL=0.5,
                exact_match=0.0,
                token_f1=0.25,
            )
            for p in prompts
        ]
        # what DPO says of prompt 7 is better by gold, worse by ROUGE-L
        if stage == "dpo":
            lines[7] |= dict(gold=1.75, rougeL=0.125, answer="another truth")
        for greedy in ("", ".greedy"):
            write(out / "answers" / f"{stage}{greedy}.jsonl", lines)
        if stage != "base":
            keys = {k for _, of, _ in report.CURVES[stage] for k in of}
            write(
                out / stage / "metrics.jsonl",
                [{"step": t} | dict.fromkeys(keys, 0.5 + t / 100) for t in range(60)],
            )
            (out / stage / "run.json").write_text(
                json.dumps({"options": {"lr": 0.0003, "model": "/somewhere", "overwrite": False}})
            )
    order = dict(n=30, pairs=1002, differently=0.31, differently_ci=0.02, untold=0.06)
    results["measures"] = {"rougeL": order, "token_f1": order | dict(differently=0.27)}
    results["reward"] = dict(
        pair_accuracy=0.7, labeller_gold_accuracy=0.75, labeller_agreement=float("nan"), pairs=1234
    )
    write(
        out / "reward" / "metrics.jsonl",
        [{"step": 0, "loss": 0.7, "accuracy": 0.5}, {"step": 1, "held_out_accuracy": 0.6}],
    )
    (out / "results.json").write_text(json.dumps(results))
    return out


def made(out):
    pytest.importorskip("matplotlib")
    report.report(report.Options(str(out)))
    return (out / "report.html").read_text(encoding="utf-8")


def test_report_of_a_whole_run_stands_alone_and_escapes_what_it_quotes(tmp_path):
    text = made(a_run(tmp_path))
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert (
        all(link.startswith("#") for link in page.links)
        and "@import" not in text
        and "url(http" not in text
    )
    assert HOSTILE.strip() in page.text and "<script>alert" not in text
    for words in (
        "Way to perfect",
        "20 %",
        "80 %",
        "1,234",
        "–",
        "lr 0.0003",
        "✓ 1.25",
        "50%",
        "rude",
        "ROUGE-L",
        "31 %±2 %",
        "27 %",
        "1,002",
        *report.TITLE.values(),
        *KINDS,
    ):
        assert words in page.text, words
    assert "/somewhere" not in text
    assert page.tags.count("svg") == 3 + 1 + 2 + 9 + 5 + 5
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert text == made(tmp_path)  # the same results, the same bytes


def test_report_shows_where_a_measure_and_gold_part(tmp_path):
    text = made(a_run(tmp_path))
    shown = text[text.index("Where ROUGE-L errs most") : text.index("The same prompts, answered")]
    page = Page(
        "<details>" + shown[shown.index("<div") : shown.rindex("</details>")] + "</details>"
    )
    assert page.text.count("Prompt") == 1 and "Prompt 7 " in page.text
    assert "✓ 1.75DPO" in page.text and "another truth" in page.text
    assert "ROUGE-L 0.12" in page.text and "ROUGE-L 0.50" in page.text
    assert "Where Token F1 errs most" not in text and "base" not in page.text.lower()


def test_report_shows_what_was_watched(tmp_path):
    out = a_run(tmp_path)
    before = Page(made(out)).tags.count("svg")
    lines = [{"step": t, "loss": 0.5, "watch_acc": 0.8 - t / 100} for t in range(3)]
    write(out / "sft" / "metrics.jsonl", lines)
    page = Page(made(out))
    assert page.tags.count("svg") == before + 1 and "A fall is what training costs" in page.text


def test_pictures_follow_the_page_from_light_to_dark(tmp_path):
    text = made(a_run(tmp_path))
    pictures = text[text.index("<svg") :]
    assert "var(--ppo)" in pictures and not any(
        light in pictures for light, _ in report.COLOURS.values()
    )
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("gone", [("ppo", "simpo"), ("base", "ppo", "dpo", "simpo")])
def test_report_of_whatever_stages_are_there(tmp_path, gone):
    page = Page(
        made(a_run(tmp_path, [s for s in ("base", "sft", "ppo", "dpo", "simpo") if s not in gone]))
    )
    assert "SFT" in page.text and not any(f"✓ 1.25{report.TITLE[s]}" in page.text for s in gone)


def test_report_before_the_evaluation_and_of_a_stage_that_still_runs(tmp_path):
    write(tmp_path / "sft" / "state" / "metrics.jsonl", [{"step": 0, "loss": 2.0}])
    page = Page(made(tmp_path))
    assert (
        "SFT (not finished)" in page.text
        and "make eval" in page.text
        and page.tags.count("svg") == 1
    )
    assert not (tmp_path / "report.png").exists()


def test_report_without_a_gold_rater(tmp_path):
    results = {
        s: dict(n=9, loss_per_token=1.5, loss_per_token_ci=0.1) for s in ("base", "sft", "dpo")
    }
    for s in ("sft", "dpo"):
        results[s] |= dict(implicit_accuracy=0.62, implicit_accuracy_ci=0.03, pairs=80)
    results["reward"] = dict(pair_accuracy=0.66, pair_accuracy_ci=0.02, pairs=80)
    (tmp_path / "results.json").write_text(json.dumps(results))
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for s in ("base", "sft", "dpo"):
        write(
            tmp_path / "answers" / f"{s}.greedy.jsonl",
            [{"prompt": prompt, "answer": "" if s == "base" else s, "finished": s != "base"}],
        )
    page = Page(made(tmp_path))
    for words in (
        "Held-out loss",
        "Preference accuracy",
        "62 %",
        "66 %",
        "system: Be brief.",
        "(nothing)",
        "not finished",
        "greedy",
    ):
        assert words in page.text, words
    assert "Gold" not in page.text and page.tags.count("svg") == 2


def test_report_shows_the_first_prompt_of_every_kind_first():
    prompts, kinds = ["a", "b", "c", "d"], {"a": "sum", "b": "sum", "c": "list", "d": "chat"}
    assert report.pick(prompts, kinds) == ["a", "c", "d", "b"]
    assert len(report.pick([str(i) for i in range(50)], {})) == 12


def test_report_says_what_is_missing(tmp_path):
    out = a_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nothing to report on"):
        made(tmp_path)
    (out / "answers" / "sft.jsonl").write_text("{}\n{")
    with pytest.raises(ValueError, match="sft.jsonl, line 2: not JSON"):
        made(out)
    (out / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json: not JSON"):
        made(out)


def test_report_without_matplotlib_is_one_line_and_exit_status_2(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from common.run import main\n"
        "from tools import report\n"
        "sys.argv = ['report.py', '--out', sys.argv[1]]\n"
        "main(report.report, report.Options, report.__doc__)"
    )
    p = subprocess.run(
        [sys.executable, "-c", code, str(a_run(tmp_path))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert (
        p.returncode == 2
        and p.stderr
        == "report.py: the report's pictures are drawn by matplotlib: pip install matplotlib\n"
    )


def test_runs_with_adapters_are_set_beside_full_ones_prompt_by_prompt(tmp_path):
    def write(folder, gold, right):
        (folder / "answers").mkdir(parents=True)
        lines = [
            json.dumps({"prompt": str(i), "gold": g, "right": r})
            for i, (g, r) in enumerate(zip(gold, right, strict=True))
        ]
        for stage in ("sft", "ppo", "dpo", "simpo"):
            for file in (f"{stage}.jsonl", f"{stage}.greedy.jsonl"):
                (folder / "answers" / file).write_text("\n".join(lines) + "\n")

    for seed in ("seed0", "seed1"):
        write(tmp_path / seed, [2.0, 1.0, 0.0, 1.0], [True, True, False, False])
    # 0.1 less each: 5 % of a perfect 2
    write(tmp_path / "lora" / "seed0", [1.9, 0.9, -0.1, 0.9], [True, True, False, False])
    write(tmp_path / "lora" / "seed1", [1.8, 0.8, -0.2, 0.8], [True, False, False, False])
    for seed in ("seed0", "seed1"):
        write(tmp_path / "qlora" / seed, [2.0, 1.0, 0.0, 1.0], [True, True, True, False])
    sft = results.beside(tmp_path, 2, perfect=2.0).splitlines()[2]
    gold, right = (
        r"50.0 \| -7.5 ± 0.0 \(-10.0 to -5.0\) \| 0.0 ± 0.0 \(0.0 to 0.0\)",
        r"50.0 \| -12.5 ± \S+ \(-25.0 to 0.0\) \| 25.0 ± ",
    )
    assert re.match(rf"\| SFT \| {gold} \| {right}", sft)
    (file := tmp_path / "qlora" / "seed1" / "answers" / "sft.jsonl").write_text(
        file.read_text().replace('"0"', '"7"')
    )
    with pytest.raises(ValueError, match="qlora.seed1: sft.jsonl answers other prompts"):
        results.beside(tmp_path, 2, perfect=2.0)
