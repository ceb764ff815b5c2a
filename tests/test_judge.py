"""tools/judge.py, tools/verdicts.py and tools/endpoint.py: what a judge says, what it is worth, and
what happens when it does not answer. No test leaves this machine: the endpoint is a thread."""

import gzip
import json
import random
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from tiny import folder, user, write

from common import hub, run
from data import records, templates
from model import logprobs
from tools import endpoint, judge, verdicts

GOLDEN = Path(__file__).parent / "golden"
REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "alpaca_eval_2.jsonl.gz"
TABLE = {"alpaca-7b": (2.591450540223603, 5.88), "vicuna-7b": (4.16261116226087, 6.28)}
# of the same table: the baseline's own answers, made longer and shorter on purpose
GAMED = {"verbose": (2402, 64.30360147101865), "concise": (1136, 22.92019444047205)}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(verdicts, "ROUNDS", 10)


# ---------------------------------------------------------------- a fake endpoint
class Fake:
    """An HTTP server on the loopback address; reply(question) is a text, or (status, headers,
    body). It keeps the requests."""

    def __init__(self, reply):
        self.reply, self.requests = reply, []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append((self.path, self.headers, body))
                said = fake.reply(body["messages"][0]["content"])
                status, headers, text = said if isinstance(said, tuple) else (200, {}, said)
                if status == 200 and not headers:
                    text = fake.form(text)
                self.send_response(status)
                headers = {"Content-Length": len(text.encode())} | headers
                for name, value in headers.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *args):  # a client that has given up
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def form(self, text):
        if self.requests[-1][0] == "/v1/messages":
            return json.dumps({"content": [{"type": "text", "text": text}]})
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def fake(monkeypatch):
    """fake(reply) → a running Fake, which the environment names; waits are kept, not waited."""
    started, waits = [], []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def start(reply):
        server = Fake(reply)
        started.append(server)
        server.waits = waits
        at = f"http://127.0.0.1:{server.server.server_port}"
        for api, base in (("OPENAI", at + "/v1"), ("ANTHROPIC", at)):
            monkeypatch.setenv(f"{api}_BASE_URL", base)
            monkeypatch.setenv(f"{api}_MODEL", "some-model")
            monkeypatch.setenv(f"{api}_API_KEY", "sk-secret")
        return server

    yield start
    for server in started:
        server.server.shutdown()
        server.server.server_close()


def answers(tmp_path, name, texts, **more):
    rows = [
        dict(
            prompt=user(f"question {i}"),
            answer=t,
            finished=True,
            **{k: v[i] for k, v in more.items()},
        )
        for i, t in enumerate(texts)
    ]
    return write(tmp_path / f"{name}.jsonl", rows)


def two_files(tmp_path, n=12):
    """a's answers are all good, b's all bad."""
    a = answers(tmp_path, "a", [f"good {i}" for i in range(n)])
    return dict(a=a, b=answers(tmp_path, "b", [f"bad {i}" for i in range(n)]))


def judged(tmp_path, **options):
    """→ (the figures, the preferences' records)."""
    out = tmp_path / "out"
    judge.judge(judge.Options(**dict(out=str(out), device="cpu") | options))
    result = json.loads((out / "judge.json").read_text("utf-8"))
    lines = (out / "preferences.jsonl").read_text("utf-8").splitlines()
    (found,) = result["comparisons"].values()
    return found, [json.loads(line) for line in lines]


def sees(question):
    """What a question shows as answer A and as answer B."""
    return question.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")[0], (
        question.split("[Answer B]\n")[1].split("\n\nWhich")[0]
    )


def likes(good):
    """A judge that names the answer for which good() is higher, the first where none is."""

    def reply(question):
        first, second = sees(question)
        return "A" if good(first) >= good(second) else "B"

    return reply


def kept(tmp_path):
    return (tmp_path / "out" / "asked.jsonl").read_text("utf-8").splitlines()


# ---------------------------------------------------------------- pairs, orders, agreement
@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_a_right_judge_over_http(tmp_path, fake, api):
    server = fake(likes(lambda text: "good" in text))
    found, preferences = judged(tmp_path, judge=api, **two_files(tmp_path))
    assert (found["n"], found["win_rate"], found["position_bias"]) == (12, 1, 0)
    assert (found["self_agreement"], found["unreadable"]) == (1, 0)
    assert len(server.requests) == 24
    path, headers, body = server.requests[0]
    if api == "openai":
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
    else:
        assert path == "/v1/messages" and headers["x-api-key"] == "sk-secret"
        assert headers["anthropic-version"] == "2023-06-01"
    assert body["model"] == "some-model" and body["max_tokens"] == 16 and body["temperature"] == 0
    assert body["messages"][0]["role"] == "user" and judge.RUBRIC in body["messages"][0]["content"]
    assert all(p["ranks"] == [0, 1] and p["responses"][0].startswith("good") for p in preferences)
    for path in (tmp_path / "out").iterdir():  # the key is written nowhere
        assert "secret" not in path.read_text("utf-8")


def test_always_the_first_is_all_bias(tmp_path, fake):
    fake(lambda question: "A")
    found, preferences = judged(tmp_path, judge="openai", **two_files(tmp_path))
    assert (found["position_bias"], found["win_rate"], found["self_agreement"]) == (1, 0.5, 0)
    assert found["ties"] == 1 and all(p["ranks"] == [0, 0] for p in preferences)


def test_always_the_second_is_the_opposite_bias(tmp_path, fake):
    fake(lambda question: "B")
    found, _ = judged(tmp_path, judge="openai", **two_files(tmp_path))
    assert (found["position_bias"], found["win_rate"]) == (-1, 0.5)


def test_love_of_length_is_corrected(tmp_path, fake):
    """All answers are equally good; a's are longer more often than not; the judge's liking grows
    with the length, with some noise of its own for each text."""
    draw = np.random.default_rng(0)
    files = {}
    for name, typical in (("a", 300), ("b", 200)):
        sizes = draw.normal(typical, 100, 300).clip(20, 600).astype(int)
        files[name] = answers(tmp_path, name, [f"{name}{i} {'x' * n}" for i, n in enumerate(sizes)])

    def liking(text):
        return len(text) / 50 + random.Random(text).gauss(0, 1.5)

    fake(likes(liking))
    found, _ = judged(tmp_path, judge="openai", batch=16, **files)
    assert found["win_rate"] > 0.65 and found["position_bias"] == 0
    assert found["lc_win_rate"] == pytest.approx(0.5, abs=0.06) and found["lc_phi"] > 1


def test_people_s_pairs(tmp_path, fake):
    """Sides are drawn, so that a judge that always agrees has κ = 1, and the contrary one -1."""
    rows = [dict(prompt=f"q {i}", chosen=f"good {i}", rejected=f"bad {i}") for i in range(40)]
    data = write(tmp_path / "pairs.jsonl", rows)
    fake(likes(lambda text: "good" in text))
    found, preferences = judged(tmp_path, judge="openai", data=data)
    assert (found["accuracy"], found["kappa"], found["decided"]) == (1, 1, 40)
    assert 0.25 < found["win_rate"] < 0.75
    assert all(p["responses"][p["ranks"].index(0)].startswith("good") for p in preferences)
    fake(likes(lambda text: "bad" in text))
    found, _ = judged(tmp_path, judge="openai", data=data)
    assert found["accuracy"] == 0 and found["kappa"] == pytest.approx(-1, abs=0.2)


def test_gold_and_ties(tmp_path, fake):
    a = answers(tmp_path, "a", ["good", "good", "same", "bad"], gold=[1, 1, 1, 1])
    b = answers(tmp_path, "b", ["bad", "bad", "same", "good"], gold=[0, 1, 1, 0])
    fake(likes(lambda text: "good" in text))
    found, preferences = judged(tmp_path, judge="openai", a=a, b=b)
    assert found["win_rate"] == (1 + 1 + 0.5 + 0) / 4 and found["ties"] == 0.25
    assert found["rated_by_people"] == 4 and found["accuracy"] == 0.5  # right on the 1st and 3rd
    assert found["decided"] == 2 and found["accuracy_decided"] == 0.5
    # p_o = 1/2; judge 2a 1t 1b, gold 2a 2t: p_e = (2·2 + 1·2) / 16
    assert found["kappa"] == pytest.approx((1 / 2 - 6 / 16) / (1 - 6 / 16))
    path = str(tmp_path / "out" / "preferences.jsonl")
    read = records.pairs(path)
    assert [(p["chosen"], p["rejected"]) for p in read] == [("good", "bad")] * 3
    assert read[0]["finished"] == [True, True]


def test_null_answers_are_left_out_and_counted(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [dict(prompt=user("p"), answer="a1"), None])
    b = write(tmp_path / "b.jsonl", [None, dict(prompt=user("p"), answer="b1")])
    (pair,) = judge.read_pairs(judge.Options(a=a, b=b))
    assert (pair["a"], pair["b"]) == ("a1", "b1")
    said = capsys.readouterr().err.splitlines()
    null = "1 answers used, dropped 1 null (beyond the model's context)"
    assert said == [f"{a}: {null}", f"{b}: {null}"]


def test_answers_are_matched_by_prompt_and_turn(tmp_path):
    rows = [dict(prompt=user(q), answer=f"{q} {i}") for i, q in enumerate(["p", "q", "p", "r"])]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[2::-1])
    pairs = judge.read_pairs(judge.Options(a=a, b=b))
    assert [(p["a"], p["b"]) for p in pairs] == [("p 0", "p 2"), ("q 1", "q 1"), ("p 2", "p 0")]


def test_kappa_by_hand():
    assert verdicts.kappa([1, 1, 0, 0], [1, 1, 0, 0]) == 1
    assert verdicts.kappa([1, 1, 0, 0], [1, 0, 1, 0]) == 0
    assert verdicts.kappa([1, 1], [1, 1]) is None
    # Cohen's own form: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no
    ours = [1] * 25 + [0] * 25
    theirs = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert verdicts.kappa(ours, theirs) == pytest.approx(0.4)


@pytest.mark.parametrize(
    "reply, value",
    [("A", 1), (" b.\n", 0), ("**B**", 0), ("Answer: A", 1), ("[[A]]", 1), ("", None)]
    + [("A good reply is B", None), ("A or B", None), ("I say [[A]], no, [[B]]", 0), ("C", None)],
)
def test_a_verdict_is_read_or_it_is_none(reply, value):
    assert judge.verdict(reply, False) == value


def test_single_scores(tmp_path, fake):
    fake(lambda question: "5" if "good" in question.split("[Answer]")[1] else "Score: 2")
    found, _ = judged(tmp_path, judge="openai", single=True, **two_files(tmp_path))
    assert (found["score"], found["win_rate"]) == (5, 1) and "position_bias" not in found
    alone = dict(a=two_files(tmp_path)["a"])
    found, preferences = judged(tmp_path, judge="openai", single=True, **alone)
    assert (found["score"], found["n"], preferences) == (5, 12, [])


def test_a_reader_s_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def longest(prompts, answers):\n    return [len(a) for a in answers]\n")
    found, _ = judged(tmp_path, judge=f"{file}:longest", **two_files(tmp_path))
    assert found["win_rate"] == 1 and "position_bias" not in found


# ---------------------------------------------------------------- a checkpoint as a judge
def test_a_checkpoint_judges_by_its_log_probabilities(tmp_path):
    path = folder(tmp_path / "model", seed=3, max_position_embeddings=1024)
    o = judge.Options(judge=path, device="cpu")
    pair = dict(prompt=user("which?"), a="this one", b="that one")
    asked = [judge.question(pair, o, *names) for names in (("a", "b"), ("b", "a"))]
    said = list(judge.checkpoint(o)(asked))
    model, tok = hub.load(path, "cpu")
    for q, (same, p, _) in zip(asked, said, strict=True):
        prompt = templates.render(tok, user(q), add_generation_prompt=True)[0]
        a, b = (logprobs(model, [prompt], [tok.encode(v)]).sum().item() for v in "AB")
        assert same == q and p == pytest.approx(1 / (1 + np.exp(b - a)), abs=1e-5)
        assert abs(p - 0.5) > 1e-3
    o.single = True
    (_, score, _), *_ = judge.checkpoint(o)([judge.question(pair, o, "a")])
    assert 1 < score < 5


def test_a_judge_that_leans_to_one_letter_is_calibrated(tmp_path, monkeypatch):
    """It says A to everything, but more surely where the better answer is A."""

    def leaning(o):
        def ask(questions):
            for q in questions:
                yield q, 0.9 if "good" in sees(q)[0] else 0.8, ""

        return ask

    monkeypatch.setattr(judge, "checkpoint", leaning)
    (tmp_path / "model").mkdir()
    gold = dict(gold=[1.0] * 12), dict(gold=[0.0] * 12)
    a = answers(tmp_path, "a", [f"good {i}" for i in range(12)], **gold[0])
    b = answers(tmp_path, "b", [f"bad {i}" for i in range(12)], **gold[1])
    found, _ = judged(tmp_path, judge=str(tmp_path / "model"), a=a, b=b)
    assert (found["position_bias"], found["win_rate"], found["accuracy"]) == (1, 0.5, 0)
    assert (found["calibrated_win_rate"], found["calibrated_accuracy"]) == (1, 1)


def test_a_checkpoint_s_verdicts_and_what_is_too_long(tmp_path, capsys):
    path = folder(tmp_path / "model", seed=3, max_position_embeddings=512)
    files = two_files(tmp_path, 4)
    rows = [json.loads(line) for line in Path(files["a"]).read_text().splitlines()]
    rows[0]["answer"] = "long " * 200
    files["a"] = write(tmp_path / "a.jsonl", rows)
    found, _ = judged(tmp_path, judge=path, **files)
    assert found["n"] == 4 and found["unreadable"] == 2
    assert len(kept(tmp_path)) == 6
    again, _ = judged(tmp_path, judge=path, **files)
    assert again == found and len(kept(tmp_path)) == 6


# ---------------------------------------------------------------- nothing lost, nothing asked twice
def test_nothing_is_asked_twice(tmp_path, fake, monkeypatch):
    server = fake(likes(lambda text: "good" in text))
    first, _ = judged(tmp_path, judge="openai", **two_files(tmp_path))
    again, _ = judged(tmp_path, judge="openai", **two_files(tmp_path))
    assert again == first and len(server.requests) == 24
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("The longer one {is} better.")
    judged(tmp_path, judge="openai", rubric=str(rubric), **two_files(tmp_path))
    assert len(server.requests) == 48 and "The longer one {is} better." in str(server.requests[-1])
    monkeypatch.setenv("OPENAI_MODEL", "another")
    judged(tmp_path, judge="openai", **two_files(tmp_path))
    assert len(server.requests) == 72


def test_half_a_line_is_asked_again(tmp_path, fake):
    server = fake(likes(lambda text: "good" in text))
    first, _ = judged(tmp_path, judge="openai", **two_files(tmp_path))
    path = tmp_path / "out" / "asked.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    again, _ = judged(tmp_path, judge="openai", **two_files(tmp_path))
    assert again == first and len(server.requests) == 25
    assert all(json.loads(line) for line in kept(tmp_path)) and len(kept(tmp_path)) == 24


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_stumbles_is_asked_again(tmp_path, fake, status):
    down = iter([True, True, False] * 100)
    right = likes(lambda text: "good" in text)
    server = fake(lambda q: (status, {}, "busy") if next(down) else right(q))
    found, _ = judged(tmp_path, judge="openai", batch=1, **two_files(tmp_path, 3))
    assert found["win_rate"] == 1 and len(server.requests) == 3 * 6
    # 1 and 2 seconds, each times 0.5 to 1.5, and not the same for everyone
    assert all(0.5 <= w <= 1.5 for w in server.waits[::2])
    assert all(1 <= w <= 3 for w in server.waits[1::2])
    assert len(set(server.waits)) == len(server.waits) == 12


@pytest.mark.parametrize("batch", [1, 4])
def test_a_server_that_fails_for_good_loses_nothing(tmp_path, fake, batch):
    right = likes(lambda text: "good" in text)
    bad = "question 7"
    server = fake(lambda q: (500, {}, "out of order") if bad in q else right(q))
    with pytest.raises(ConnectionError, match=r"HTTP 500 .*out of order; asked 6 times; 1\d of 24"):
        judged(tmp_path, judge="openai", batch=batch, **two_files(tmp_path))
    before = len(kept(tmp_path))
    assert 14 <= before < 24 and not (tmp_path / "out" / "judge.json").exists()
    server.requests.clear()
    server.reply = right
    found, _ = judged(tmp_path, judge="openai", batch=batch, **two_files(tmp_path))
    assert found["win_rate"] == 1 and len(server.requests) == 24 - before


def test_a_limit_is_waited_for(tmp_path, fake):
    answers_to = iter([(429, {"Retry-After": "37"}, "slow down"), "A", "B"])
    server = fake(lambda q: next(answers_to))
    judged(tmp_path, judge="openai", batch=1, **two_files(tmp_path, 1))
    assert server.waits == [37]
    assert 50 < endpoint.retry_after(formatdate(endpoint.time.time() + 60)) <= 60
    assert endpoint.retry_after("soon") == endpoint.retry_after(None) == 0
    server.reply = lambda q: (429, {"Retry-After": "86400"}, "tomorrow")
    with pytest.raises(ConnectionError, match="86,400 s"):
        judged(tmp_path, judge="anthropic", batch=1, **two_files(tmp_path, 1))
    assert server.waits == [37]


def test_a_wrong_key_ends_at_once_and_is_not_shown(tmp_path, fake):
    server = fake(lambda q: (401, {}, "no such key"))
    with pytest.raises(ConnectionError, match="HTTP 401") as e:
        judged(tmp_path, judge="openai", batch=1, **two_files(tmp_path))
    assert len(server.requests) == 1 and "secret" not in str(e.value)


def test_nonsense_ends_early(tmp_path, fake):
    server = fake(lambda q: "As a language model I like both.")
    with pytest.raises(ValueError, match="no reply names a verdict.*like both.*0 of 24"):
        judged(tmp_path, judge="openai", batch=1, **two_files(tmp_path))
    assert len(server.requests) == 10 and kept(tmp_path) == []
    server.reply = likes(lambda text: "good" in text)
    assert judged(tmp_path, judge="openai", **two_files(tmp_path))[0]["win_rate"] == 1


def test_some_nonsense_is_counted_and_a_tie(tmp_path, fake):
    right = likes(lambda text: "good" in text)
    fake(lambda q: "Hm." if "question 7" in q else right(q))
    found, _ = judged(tmp_path, judge="openai", **two_files(tmp_path))
    assert found["unreadable"] == 2 and found["win_rate"] == pytest.approx(11.5 / 12)


@pytest.mark.parametrize(
    "reply, why",
    [
        ((200, {"Content-Length": 500}, '{"choices": ['), "IncompleteRead"),
        ((200, {"X": 1}, "<html>"), "not a reply"),
        ((200, {"X": 1}, '{"choices": []}'), "not a reply"),
        ((200, {"X": 1}, "[1]"), "not a reply"),
    ],
)
def test_a_reply_cut_off_or_of_another_form(tmp_path, fake, reply, why):
    server = fake(lambda q: reply)
    with pytest.raises(ConnectionError, match=why):
        judged(tmp_path, judge="openai", batch=1, **two_files(tmp_path, 1))
    assert len(server.requests) == endpoint.TRIES


def test_a_slow_server_is_given_up(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(endpoint, "TRIES", 2)
    done = threading.Event()
    fake(lambda q: done.wait(20) or "A")
    with pytest.raises(ConnectionError, match="(?i)timed out.*asked 2 times; 0 of 2"):
        judged(tmp_path, judge="openai", batch=1, timeout=0.1, **two_files(tmp_path, 1))
    done.set()


def test_no_server_at_all(tmp_path, fake, monkeypatch):
    fake(None)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(ConnectionError, match="refused"):
        judged(tmp_path, judge="openai", batch=1, **two_files(tmp_path, 1))


def test_the_price_is_said_before(tmp_path, fake, capsys):
    server = fake(lambda q: "A")
    options = dict(judge="openai", price_in=2.0, price_out=10.0, **two_files(tmp_path))
    with pytest.raises(SystemExit) as e:
        judged(tmp_path, estimate=True, **options)
    said = capsys.readouterr().err
    tokens = 24 * (len(judge.PAIR) + len(judge.RUBRIC)) // 4  # and a few for the answers
    read = int(said.split("about ")[1].split(" tokens")[0].replace(",", ""))
    assert tokens * 0.9 < read < tokens * 1.2
    assert "24 questions" in said and "at most 384 out" in said
    assert f"${(read * 2 + 384 * 10) / 1e6:.2f}" in said
    assert e.value.code == 0 and server.requests == []
    judged(tmp_path, **options)
    judged(tmp_path, **options)
    assert "0 questions, about 0 tokens in" in capsys.readouterr().err


# ---------------------------------------------------------------- equal length
def made(n, theta, phi, psi, seed, sampled):
    """Pairs whose preferences follow the model, exactly or drawn from it."""
    draw = np.random.default_rng(seed)
    length, difficulty = draw.normal(200, 600, n).round(), draw.normal(0, 1, n)
    z = theta + phi * np.tanh(length / length.std(ddof=1)) + psi * difficulty
    won = verdicts.sigmoid(z)
    won = (draw.random(n) < won).astype(float) if sampled else won
    names = ("points", "length", "difficulty")
    return [dict(zip(names, row, strict=True)) for row in zip(won, length, difficulty, strict=True)]


@pytest.mark.parametrize("case", json.loads((GOLDEN / "alpaca_eval.json").read_text()))
def test_the_fit_is_alpaca_eval_s(case):
    found = verdicts.length_controlled(case["pairs"], case["equal"])
    assert found["win_rate"] == pytest.approx(case["win_rate"], abs=1e-3)
    assert found["C"] == pytest.approx(case["C"])
    assert [found[k] for k in ("phi", "psi", "theta")] == pytest.approx(case["weights"], abs=1e-3)


def test_a_planted_effect_of_length_is_found():
    for theta, phi, psi in ((-1.0, 1.5, 0.8), (0.3, -0.7, 0.0)):
        exact = verdicts.length_controlled(made(300, theta, phi, psi, 1, False))
        assert exact["theta"] == pytest.approx(theta, abs=0.05)
        assert exact["phi"] == pytest.approx(phi, abs=0.05)
        drawn = made(2000, theta, phi, psi, 2, True)
        found = verdicts.length_controlled(drawn, strength=10.0)
        truth = np.mean([verdicts.sigmoid(theta + psi * p["difficulty"]) for p in drawn])
        raw = np.mean([p["points"] for p in drawn])
        assert abs(found["win_rate"] - truth) < 0.05 < abs(raw - truth) + 0.03


def test_the_fit_is_at_its_minimum():
    """By the subgradient of |w|₁ + C Σ weight · log-loss, a weight of 0 among the others."""
    pairs = made(150, -0.5, 1.0, 0.0, 3, True)
    x = np.stack([[np.tanh(p["length"] / 600), p["difficulty"] / 9, 1] for p in pairs])
    y, weight = np.array([p["points"] for p in pairs]), np.linspace(0.1, 2, 150)
    w = verdicts.fit(x, y, weight, 0.5)
    slope = 0.5 * x.T @ (weight * (verdicts.sigmoid(x @ w) - y))
    assert w[1] == 0 and abs(slope[1]) < 1
    assert slope[[0, 2]] == pytest.approx(-np.sign(w[[0, 2]]), abs=1e-6)


def test_without_a_difference_of_length_there_is_nothing_to_control():
    pairs = [dict(points=1.0, length=3), dict(points=0.0, length=3)] * 5
    assert verdicts.length_controlled(pairs) is None
    found = verdicts.figures(pairs)
    assert found["win_rate"] == 0.5 and "lc_win_rate" not in found


# ---------------------------------------------------------------- AlpacaEval's annotations
def test_annotations_in_full(tmp_path):
    rows = [
        dict(instruction="i", output_1="long" * 9, output_2="short", generator_2="m", preference=p)
        for p in (1.25, 2, 0, 1.5, None, 1, 1)
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    found, preferences = judged(tmp_path, judge=str(path))
    assert found["n"] == 6 and found["win_rate"] == (0.25 + 1 + 0.5 + 0.5) / 6
    assert found["length_difference"] == -31
    assert [p["ranks"] for p in preferences][:3] == [[1, 0], [0, 1], [0, 0]]
    assert preferences[0]["responses"] == ["short", "long" * 9]


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    if not REAL.is_file():
        pytest.skip("needs ../shared/data")
    path = tmp_path_factory.mktemp("alpaca") / "annotations.jsonl"
    path.write_bytes(gzip.decompress(REAL.read_bytes()))
    return verdicts.annotations(path)


def test_alpaca_eval_s_raw_win_rates(alpaca):
    for model, (raw, _) in TABLE.items():
        won = [p["points"] for p in alpaca[model]]
        assert len(won) == 805 and 100 * sum(won) / len(won) == pytest.approx(raw, abs=1e-9)


def test_alpaca_eval_s_length_controlled_win_rates(alpaca):
    """Higher than raw, in the table's order and within a point of it, though γ is estimated from
    three models instead of all, and of the gamed baselines only their averages are known."""
    equal = [
        dict(instruction="", points=rate / 100, length=size - 2049)
        for size, rate in GAMED.values()
        for _ in range(805)
    ]
    plain = {m: verdicts.length_controlled(pairs, strength=1.0) for m, pairs in alpaca.items()}
    verdicts.add_difficulty(alpaca, equal)
    found = {m: verdicts.length_controlled(pairs, equal, 2.78) for m, pairs in alpaca.items()}
    for m, pairs in alpaca.items():
        raw = np.mean([p["points"] for p in pairs])
        assert found[m]["win_rate"] > raw and plain[m]["win_rate"] > raw
    rates = {m: 100 * found[m]["win_rate"] for m in TABLE}
    assert rates["alpaca-7b"] < rates["vicuna-7b"]
    for m, (_, controlled) in TABLE.items():
        assert rates[m] == pytest.approx(controlled, abs=1)


# ---------------------------------------------------------------- bad input
def test_bad_options(tmp_path, fake, monkeypatch):
    fake(lambda q: "A")
    files = two_files(tmp_path)
    bad = write(tmp_path / "bad.jsonl", [dict(prompt="p", answer="x"), dict(prompt="p", answer=3)])
    notes = write(tmp_path / "notes.jsonl", [dict(instruction="i", preference=3, length_model=1)])
    cases = [
        (dict(judge="opnai", **files), "did you mean openai"),
        (dict(**files), "--judge is missing"),
        (dict(judge="openai"), "--a or --data"),
        (dict(judge="openai", a=files["a"]), "--b was expected"),
        (dict(judge="openai", data="x", **files), "one of them"),
        (dict(judge="openai", a=bad, b=bad), "bad.jsonl:2: answer: a string"),
        (dict(judge=notes), "notes.jsonl:1: an annotation"),
        (dict(judge="openai", body="[1]", **files), "--body"),
        (dict(judge="openai", body="{", **files), "--body"),
        (dict(judge="openai", rubric="none.txt", **files), "none.txt"),
    ]
    for options, words in cases:
        with pytest.raises((ValueError, OSError), match=words):
            judged(tmp_path, **options)
    other = answers(tmp_path, "other", ["x"])
    Path(other).write_text(Path(other).read_text().replace("question 0", "unheard of"))
    with pytest.raises(ValueError, match="12 without their prompt"):
        judged(tmp_path, judge="openai", a=files["a"], b=other)
    monkeypatch.delenv("OPENAI_MODEL")
    with pytest.raises(ValueError, match="OPENAI_MODEL is not set"):
        judged(tmp_path, judge="openai", **files)
    monkeypatch.setenv("OPENAI_MODEL", "m")
    monkeypatch.setenv("OPENAI_BASE_URL", "file:///etc/passwd")
    with pytest.raises(ValueError, match="OPENAI_BASE_URL"):
        judged(tmp_path, judge="openai", **files)


def test_a_folder_of_one_s_own_is_left_alone(tmp_path, fake):
    fake(lambda q: "A")
    mine = tmp_path / "out" / "preferences.jsonl"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match="no judge wrote"):
        judged(tmp_path, judge="openai", **two_files(tmp_path))
    assert mine.read_text() == "mine"


def test_one_line_and_status_2(tmp_path, fake, monkeypatch, capsys):
    fake(lambda q: (404, {}, "no such model"))
    files = two_files(tmp_path, 2)
    argv = ["judge.py", "--judge", "openai", "--out", str(tmp_path / "out"), "--batch", "1"]
    monkeypatch.setattr("sys.argv", [*argv, "--a", files["a"], "--b", files["b"]])
    with pytest.raises(SystemExit) as e:
        run.main(judge.judge, judge.Options, judge.__doc__)
    last = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and "HTTP 404" in last and "same command" in last


def test_the_bootstrap_has_the_seed():
    pairs = [dict(points=float(i % 3 == 0), length=i % 7) for i in range(60)]
    one, same, other = (verdicts.win_rates(pairs, seed) for seed in (1, 1, 2))
    assert one == same and one["win_rate"] == other["win_rate"]
    assert one["win_rate_ci"] != other["win_rate_ci"]
    assert one["lc_win_rate_ci"] != other["lc_win_rate_ci"]
