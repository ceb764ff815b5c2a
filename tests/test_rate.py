"""tools/rate.py without a browser: the log, whose turn it is, the figures, and the server's doors.
tests/browser has the page.
"""

import http.client
import json
import random
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import stages
import tiny
from tiny import user

from data import records
from tools import rate, ratings
from tools.ratings import Ratings, read_pairs, wilson

HOSTILE = "<script>document.title = 1</script></script> \u2028 \u2029 <img src=x onerror=alert(1)>"


def pairs(n=6):
    prompts = [user(f"{i}?") for i in range(n)]
    return {f"p{i}": {"prompt": prompts[i], "responses": [f"a{i}", f"b{i}"]} for i in range(n)}


def lines(out):
    return [json.loads(line) for line in (out / "ratings.jsonl").read_bytes().split(b"\n")[:-1]]


def choose(r, rater, winner, **more):
    """The rater chooses on the pair that is on their page → the next state."""
    pair = r.reply(rater=rater)["pair"]
    choice = winner if winner in ("tie", "skip") else str(r.sides(rater, pair).index(winner) + 1)
    return r.reply(do="rate", rater=rater, pair=pair, choice=choice, **more)


def figures(r):
    r.write()
    return json.loads((r.out / "ratings.json").read_text())


# ---------------------------------------------------------------- what is compared
def answers(path, texts, finished=True):
    rows = [{"prompt": user(p), "answer": a, "finished": finished, "gold": 1} for p, a in texts]
    return tiny.write(path, rows)


def test_answers_are_matched_by_prompt_also_where_one_comes_twice(tmp_path, capsys):
    a = answers(tmp_path / "a", [("x", "a1"), ("y", "same"), ("x", "a2"), ("z", "")])
    b = answers(tmp_path / "b", [("w", "b0"), ("z", "b3"), ("x", "b1"), ("x", "b2"), ("y", "same")])
    found = read_pairs(a, b)
    assert [(p["prompt"][0]["content"], *p["responses"]) for p in found.values()] == [
        ("x", "a1", "b1"),
        ("x", "a2", "b2"),
        ("z", "", "b3"),
    ]
    assert all(p["finished"] == [True, True] for p in found.values())
    assert (
        "3 pairs used, dropped 1 in one file only, 1 equal or repeated" in capsys.readouterr().err
    )


def test_null_answers_are_left_out_and_counted(tmp_path, capsys):
    a = tiny.write(tmp_path / "a", [None, {"prompt": user("x"), "answer": "a1"}, None])
    found = read_pairs(a, answers(tmp_path / "b", [("x", "b1"), ("y", "b2")]))
    assert [p["responses"] for p in found.values()] == [["a1", "b1"]]
    said = capsys.readouterr().err
    assert f"{a}: 1 answers used, dropped 2 null (beyond the model's context)\n" in said
    assert "1 pairs used, dropped 1 in one file only" in said


def test_pairs_and_rankings_are_read_too(tmp_path):
    row = {"prompt": user("x"), "responses": ["good", "bad", "mid"], "ranks": [0, 2, 1]}
    found = read_pairs(pairs=tiny.write(tmp_path / "r", [row]))
    both = [["good", "mid"], ["good", "bad"], ["mid", "bad"]]
    assert [p["responses"] for p in found.values()] == both


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"prompt": "x", "answer": 3}', ":1: answer: a string was expected (got 3)"),
        ('{"answer": "x"}', ":1: prompt: a string or a list of messages was expected"),
        ("[1]", ":1: a JSON object was expected (got 1)"),
        ("", "no usable answers in it"),
        ("null", "no usable answers in it (dropped: 1 null (beyond the model's context))"),
    ],
)
def test_a_file_without_answers_is_named(tmp_path, text, said):
    path = tmp_path / "a"
    path.write_text(text)
    with pytest.raises(ValueError) as e:
        read_pairs(str(path), answers(tmp_path / "b", [("x", "b")]))
    assert said in str(e.value) and str(path) in str(e.value)


def test_one_kind_of_input_is_expected():
    for given in ({}, {"a": "x"}, {"b": "x"}, {"a": "x", "b": "y", "pairs": "z"}):
        with pytest.raises(ValueError, match="--a FILE and --b FILE, or --pairs FILE alone"):
            read_pairs(**given)


# ---------------------------------------------------------------- figures
def test_wilson_against_its_equation():
    """Its ends solve |p - share| = z √(p(1-p)/n)."""
    for share, n in ((0.0, 1), (1.0, 3), (0.5, 10), (0.61, 500)):
        for end in wilson(share, n):
            assert (end - share) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / n, abs=1e-12)
    assert wilson(0.5, 500) == pytest.approx((0.4563, 0.5437), abs=1e-4)


def test_figures_and_rankings_of_two_raters(tmp_path):
    r = Ratings(pairs(4), tmp_path)
    verdicts = {  # p0 agreed, p1 split, p2 tied with a's win, p3 skipped
        "ann": {"p0": "a", "p1": "a", "p2": "tie", "p3": "skip"},
        "ben": {"p0": "a", "p1": "b", "p2": "a", "p3": "skip"},
    }
    for rater, said in verdicts.items():
        while pair := r.reply(rater=rater)["pair"]:
            choose(r, rater, said[pair])
    f = figures(r)
    assert (f["n"], f["win_rate"], f["interval"]) == (3, 0.75, list(wilson(0.75, 3)))
    assert f["ratings"] == {"a": 4, "b": 1, "tie": 1, "skip": 2} and f["seed"] == 0
    assert f["raters"] == {"ann": 4, "ben": 4} and "tools.rate" in f["command"]
    assert f["agreement"] == [
        {"raters": ["ann", "ben"], "n": 3, "equal": 1 / 3, "kappa": pytest.approx(-0.2)}
    ]
    first = [s["winner"] == s["first"] for s in lines(tmp_path) if s["winner"] in "ab"]
    assert f["first"] == sum(first) / 5
    rows = [json.loads(line) for line in (tmp_path / "rankings.jsonl").read_text().splitlines()]
    assert {row["id"]: row["ranks"] for row in rows} == {"p0": [0, 1], "p1": [0, 0], "p2": [0, 1]}
    chosen = [pair["chosen"] for pair in records.pairs(tmp_path / "rankings.jsonl")]
    assert sorted(chosen) == ["a0", "a2"]  # a tie is no pair


def test_before_the_first_rating_there_is_no_rate(tmp_path, capsys):
    r = Ratings(pairs(), tmp_path)
    assert (figures(r)["n"], figures(r)["win_rate"], figures(r)["interval"]) == (0, None, None)
    assert "no pair is rated yet" in rate.summary(r)
    choose(r, "ann", "b")
    assert "a won 0.0% of 1 pairs (95 %: 0.0% to 79.3%); 500 ratings" in rate.summary(r)


def test_what_reward_and_dpo_read(tmp_path, capsys):
    a, b = [("x", "good"), ("y", "no")], [("x", "bad"), ("y", HOSTILE)]
    found = read_pairs(answers(tmp_path / "a", a), answers(tmp_path / "b", b, finished=False))
    r = Ratings(found, tmp_path / "out")
    for key in found:
        r.keep("ann", key, "a" if found[key]["responses"][0] == "good" else "b")
    r.write()
    capsys.readouterr()
    read = records.rankings(tmp_path / "out" / "rankings.jsonl")
    assert capsys.readouterr().err == ""  # no field that is not used
    assert [(row["responses"], row["ranks"], row["finished"]) for row in read] == [
        (["good", "bad"], [0, 1], [True, False]),
        (["no", HOSTILE], [1, 0], [True, False]),
    ]


# ---------------------------------------------------------------- order and sides
def seen(r, rater):
    """The pairs and first answers that a rater gets, skipping all."""
    found = []
    while (state := r.reply(rater=rater))["pair"]:
        found.append((state["pair"], state["answers"][0]))
        choose(r, rater, "skip")
    return found


def test_order_and_sides_are_shuffled_by_seed_and_rater(tmp_path):
    ways = {}
    for seed, rater in ((0, "ann"), (0, "ben"), (1, "ann")):
        ways[seed, rater] = seen(Ratings(pairs(40), tmp_path / f"{seed}{rater}", seed), rater)
        again = seen(Ratings(pairs(40), tmp_path / f"{seed}{rater}2", seed), rater)
        assert ways[seed, rater] == again
        assert len(dict(again)) == 40  # each once
        assert 8 < sum(first[0] == "a" for _, first in again) < 32
    orders = [[p for p, _ in way] for way in ways.values()]
    assert orders[0] != orders[1] != orders[2] != orders[0] != sorted(orders[0])
    assert dict(ways[0, "ann"]) != dict(ways[0, "ben"])


def test_overlap_is_shared_and_the_rest_is_dealt(tmp_path):
    r = Ratings(pairs(20), tmp_path, overlap=4)
    got = {"ann": [], "ben": [], "cat": []}
    draw = random.Random(0)
    while True:
        states = {who: r.reply(rater=who) for who in got}
        at_work = [who for who in got if states[who]["pair"]]
        if not at_work:
            break
        who = draw.choice(at_work)
        got[who].append(states[who]["pair"])
        choose(r, who, "a")
    shared = set(got["ann"][:4])
    assert all(set(mine[:4]) == shared for mine in got.values()) and len(shared) == 4
    own = [p for mine in got.values() for p in mine[4:]]
    assert set(own) | shared == set(pairs(20))
    assert len(own) - len(set(own)) <= 2  # the last ones lie on several pages
    assert {r.reply(rater=who)["total"] - len(got[who]) for who in got} == {0}


def test_a_skipped_pair_goes_to_another_rater_and_a_closed_page_keeps_none(tmp_path):
    r = Ratings(pairs(3), tmp_path, overlap=0)
    held = r.reply(rater="gone")["pair"]  # opens the page, never chooses
    skipped = r.reply(rater="ann")["pair"]
    assert skipped != held
    choose(r, "ann", "skip")
    got = set()
    while pair := r.reply(rater="ben")["pair"]:
        got.add(pair)
        choose(r, "ben", "tie")
    assert got == set(pairs(3))


# ---------------------------------------------------------------- the log
def test_undo_goes_back_step_by_step_and_gives_the_comment_back(tmp_path):
    r = Ratings(pairs(), tmp_path)
    first, second = r.reply(rater="ann")["pair"], choose(r, "ann", "a", comment="hm")["pair"]
    third = choose(r, "ann", "b")["pair"]
    choose(r, "ben", "a")  # ann's undo leaves ben's alone
    back = r.reply(do="undo", rater="ann")
    assert (back["pair"], back["done"], back["comment"]) == (second, 1, "")
    back = r.reply(do="undo", rater="ann")
    assert (back["pair"], back["done"], back["comment"]) == (first, 0, "hm")
    assert r.reply(do="undo", rater="ann")["said"] == ""  # nothing left
    assert choose(r, "ann", "tie")["pair"] == second
    assert choose(r, "ann", "tie")["pair"] == third
    assert figures(r)["ratings"] == {"a": 1, "tie": 2}
    assert [s["winner"] for s in lines(tmp_path)] == ["a", "b", "a", "undo", "undo", "tie", "tie"]


def test_a_second_tab_counts_nothing_twice(tmp_path):
    r = Ratings(pairs(), tmp_path)
    one = r.reply(rater="ann")["pair"]
    say = partial(r.reply, do="rate", rater="ann", pair=one)
    after = say(choice="1")
    assert say(choice="2")["said"] == ratings.TWICE
    assert say(choice="1") == after  # the same once more is no other opinion
    assert r.reply(rater=" ANN ")["pair"] == after["pair"]  # nor another rater
    assert len(lines(tmp_path)) == 1 and after["done"] == 1


def test_a_new_start_goes_on_where_it_stopped(tmp_path, capsys):
    r = Ratings(pairs(), tmp_path)
    choose(r, "ann", "a", comment=HOSTILE, seconds=7.25)
    before = choose(r, "ann", "b", seconds=5)
    r.reply(do="undo", rater="ann")
    before = r.reply(rater="ann") | {"comment": ""}
    r.log.close()
    with open(tmp_path / "ratings.jsonl", "a") as f:
        f.write('{"time": "2026')  # a crash in the middle of a line
    r = Ratings(pairs(), tmp_path)
    assert "half a line at its end is removed" in capsys.readouterr().err
    assert r.reply(rater="ann") == before
    assert lines(tmp_path)[0]["comment"] == HOSTILE and lines(tmp_path)[0]["seconds"] == 7.2
    choose(r, "ann", "tie")
    assert [s["winner"] for s in lines(tmp_path)] == ["a", "b", "undo", "tie"]


def test_a_rating_is_on_the_disk_before_it_is_confirmed(tmp_path, monkeypatch):
    r, order = Ratings(pairs(), tmp_path), []
    monkeypatch.setattr(ratings.os, "fsync", lambda fd: order.append(len(lines(tmp_path))))
    choose(r, "ann", "a")
    choose(r, "ann", "b")
    assert order == [1, 2]


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    r = Ratings(pairs(), tmp_path)
    before = choose(r, "ann", "a")
    with monkeypatch.context() as m:
        m.setattr(ratings.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError):
            choose(r, "ann", "a")
    assert r.reply(rater="ann") == before and len(lines(tmp_path)) == 1
    assert choose(r, "ann", "a")["done"] == 2


def test_damage_other_pairs_and_other_files_are_refused_and_kept(tmp_path):
    r = Ratings(pairs(), tmp_path)
    choose(r, "ann", "a")
    with pytest.raises(ValueError, match="another rate.py is at work"):
        Ratings(pairs(), tmp_path)
    r.log.close()
    log = tmp_path / "ratings.jsonl"
    whole = log.read_bytes()
    with pytest.raises(ValueError, match="1 pairs rated in it are not in the input"):
        Ratings({"other": pairs()["p0"]}, tmp_path)
    for damage in (b"{}\n", b"[]\n", b"x\n", whole.replace(b'"a"', b'"z"', 1)):
        log.write_bytes(whole + damage)
        with pytest.raises(ValueError, match="ratings.jsonl:2: a rating was expected"):
            Ratings(pairs(), tmp_path)
        assert log.read_bytes() == whole + damage
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "rankings.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="was not written here"):
        Ratings(pairs(), tmp_path / "new")


def test_time_left_follows_the_pace(tmp_path):
    r = Ratings(pairs(), tmp_path)
    assert r.reply(rater="ann")["minutes"] is None
    for seconds in (30, 30, 3000):  # a break does not count
        state = choose(r, "ann", "a", seconds=seconds)
    assert (state["done"], state["total"], state["minutes"]) == (3, 6, 1.5)


def test_strange_requests_are_refused(tmp_path):
    r = Ratings(pairs(), tmp_path)
    for name in ("", "  ", "x" * 61, "\ud800", "a\x1b[2J", "a\u202eb", 3, None):
        with pytest.raises(ValueError):
            r.reply(rater=name)
    good = {"do": "rate", "rater": "ann", "pair": "p0", "choice": "1"}
    for wrong in ({"pair": "p99"}, {"choice": "3"}, {"choice": "12"}, {"comment": 1}, {"pair": []}):
        with pytest.raises(ValueError):
            r.reply(**good | wrong)
    assert lines(tmp_path) == []
    for seconds in ("x", -1, float("nan"), float("inf"), None):
        r.reply(**good | {"seconds": seconds})
        assert lines(tmp_path)[-1]["seconds"] == 0
        r.reply(do="undo", rater="ann")


def test_what_the_page_gets_does_not_say_who_wrote_what(tmp_path):
    r = Ratings(pairs(), tmp_path)
    state = choose(r, "ann", "a")
    known = "rater pair done total minutes together margin answers prompt said comment"
    assert set(state) == set(known.split())
    assert state["margin"] == pytest.approx((1 - wilson(1, 1)[0]) / 2)


# ---------------------------------------------------------------- the server
@pytest.fixture
def server(tmp_path):
    with rate.Server(0) as s:
        s.ratings, s.bar = Ratings(pairs(), tmp_path), rate.tqdm(disable=True)
        thread = threading.Thread(target=partial(s.serve_forever, 0.01))
        thread.start()
        yield s
        s.shutdown()
        thread.join()


def fetch(server, method="GET", path="/", body=None, **headers):
    """→ (status, headers, body)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    found = reply.status, dict(reply.getheaders()), reply.read()
    connection.close()
    return found


def test_the_page_is_static_and_its_policy_is_strict(server):
    status, headers, page = fetch(server)
    policy = headers["Content-Security-Policy"]
    assert status == 200 and page == rate.PAGE and server.token.encode() not in page
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert "frame-ancestors 'none'" in policy and "trusted-types 'none'" in policy
    assert b"http" not in page and b"innerHTML" not in page  # nothing from elsewhere
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert fetch(server, path="/../ratings.jsonl")[0] == 404
    assert server.server_address[0] == "127.0.0.1"


def test_other_hosts_and_those_without_the_token_get_nothing(server):
    body = json.dumps({"rater": "ann"})
    post = partial(fetch, server, "POST", "/api", body)
    assert post(X_Token=server.token)[0] == 200
    assert post(X_Token=server.token, Host=f"localhost:{server.server_port}")[0] == 200
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
        assert post(X_Token=server.token, Host=host)[0] == 403
        assert fetch(server, Host=host)[0] == 403
    for wrong in ({}, {"X_Token": ""}, {"X_Token": server.token[:-1]}, {"X_Token": "\xff"}):
        status, _, reply = post(**wrong)
        assert status == 403 and b"pair" not in reply
    assert fetch(server, "OPTIONS", "/api", Origin="http://evil.example")[0] == 501


def test_bad_requests_get_one_line_and_the_server_goes_on(server, monkeypatch):
    post = partial(fetch, server, "POST", "/api", X_Token=server.token)
    for body in ("", "x", "[]", "{", '"x"', '{"rater": 1}', '{"rater": "a", "b": 1}', "[" * 9999):
        status, _, reply = post(body=body)
        assert status == 400 and json.loads(reply)["error"]
    assert post(body="x" * (rate.MOST + 1))[0] == 400
    assert post(body="{}", Content_Length="x")[0] == 400

    def full(fd):
        raise OSError("no space")

    good = json.dumps({"do": "rate", "rater": HOSTILE[:50], "pair": "p0", "choice": "tie"})
    with monkeypatch.context() as m:
        m.setattr(ratings.os, "fsync", full)
        status, _, reply = post(body=good)
        assert status == 500 and "Not saved: no space" in json.loads(reply)["error"]
    status, _, reply = post(body=good)
    assert status == 200 and json.loads(reply)["done"] == 1 and server.bar.n == 1


def test_many_at_once_lose_nothing(server):
    post = partial(fetch, server, "POST", "/api", X_Token=server.token)

    def work(rater):
        for i in range(6):
            asked = {"do": "rate", "rater": rater, "pair": f"p{i}", "choice": "1"}
            assert post(body=json.dumps(asked))[0] == 200

    threads = [threading.Thread(target=work, args=(f"r{n}",)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(lines(server.ratings.out)) == 24
    assert len({(s["rater"], s["pair"]) for s in lines(server.ratings.out)}) == 24


def test_a_port_in_use_is_named(server):
    with pytest.raises(ValueError, match=f"--port {server.server_port}: in use"):
        rate.Server(server.server_port)


# ---------------------------------------------------------------- the command line
def started(**options):
    """A rate.py of its own process → (it, its port, its token)."""
    stage = stages.Stage("tools/rate.py", port=0, **options)
    out, found = Path(stage.streams, "out"), None
    while stage.process.is_alive() and not found:
        time.sleep(0.01)
        found = re.search(r"http://127.0.0.1:(\d+)/#(\S+)\n", out.read_text())
    assert found, Path(stage.streams, "err").read_text()
    return stage, int(found[1]), found[2]


def test_ctrl_c_ends_it_cleanly_and_the_same_command_goes_on(tmp_path):
    a = answers(tmp_path / "a", [("x", "a1"), ("y", "a2")])
    files = {"a": a, "b": answers(tmp_path / "b", [("x", "b1"), ("y", "b2")])}
    for number in (signal.SIGINT, signal.SIGTERM):
        stage, port, token = started(out=tmp_path / "out", **files)
        here = SimpleNamespace(server_port=port)
        post = partial(fetch, here, "POST", "/api", X_Token=token)
        state = json.loads(post(body='{"rater": "ann"}')[2])
        asked = {"do": "rate", "rater": "ann", "pair": state["pair"], "choice": "tie"}
        assert post(body=json.dumps(asked))[0] == 200
        stage.kill(number)
        status, out, err = stage.end()
        n = state["done"] + 1
        assert status == 0 and "Traceback" not in err
        assert f"a won 50.0% of {n} pairs" in out and f"{tmp_path}/out/: ratings.jsonl" in out
        assert len(lines(tmp_path / "out")) == n
        written = json.loads((tmp_path / "out" / "ratings.json").read_text())
        assert written["n"] == n and "--seed" not in written["command"]
    assert n == 2


def test_bad_input_is_one_line_and_makes_nothing(tmp_path):
    a, out = answers(tmp_path / "a", [("x", "a")]), tmp_path / "out"
    run = partial(stages.run, "tools/rate.py", out=out, port=0)
    stages.refused(run(a=a, b=tmp_path / "gone"), "rate.py:", "gone: no such file")
    stages.refused(run(a=a), "--a FILE and --b FILE, or --pairs FILE alone, were expected")
    stages.refused(run(a=a, b=a), "no usable pairs", "1 equal or repeated")
    assert not out.exists()
