"""SFT: the same gradient whatever the accumulation, packed equals separate, masked content never
matters, and the model learns to end.
"""

import copy
import random
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from tiny import chat_tokenizer, folder, gradcheck, lm, metrics, user, write

import sft
from common import hub
from common.run import lr_at
from data import records, templates
from model import losses, nll
from packing import by_segments
from sampling import generate

V = 280
END = 279


def examples(lengths, seed=0, end=END):
    """[(prompt length, answer length)] → [(ids, labels)]: the answer is trained, its last token is
    `end`.
    """
    rng, out = random.Random(seed), []
    for prompt, answer in lengths:
        ids = [rng.randrange(1, V - 3) for _ in range(prompt + answer - 1)] + [end]
        out.append((ids, [sft.IGNORE] * prompt + ids[prompt:]))
    return out


# nobody's share of the tokens is an eighth
RAGGED = [(3, 1), (4, 9), (2, 2), (7, 17), (3, 1), (5, 4), (1, 3), (2, 11)]


def hand(model, ids, labels):
    """Sum of the negative log-likelihoods of one example, alone and unpadded."""
    logp = torch.log_softmax(model(torch.tensor([ids]))[0], -1)
    return -sum(logp[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != sft.IGNORE)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters()}


def differ(a, b):
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def model():
    return lm()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(data, **options) → sft.sft() over these examples, in this order: the gradients and
    learning rates of its steps, its log.
    """
    start = folder(tmp_path / "start")

    def run(data, name="out", **options):
        seen = []

        def clip(parameters, _):
            parameters = list(parameters)
            seen.append([p.grad.clone() for p in parameters])
            return torch.zeros(())

        def adamw(model, *args, **options):
            optimizer = real(model, *args)
            optimizer.register_step_pre_hook(
                lambda o, *_: rates.extend({g["lr"] for g in o.param_groups})
            )
            return optimizer

        real, rates = sft.adamw, []
        with monkeypatch.context() as m:
            m.setattr(sft, "prepare", lambda *_, **allowed: data)
            m.setattr(sft, "clip_grad_norm_", clip)
            m.setattr(sft, "adamw", adamw)
            m.setattr(
                sft.records,
                "batch",
                lambda rows, step, size, seed: [
                    rows[(step * size + i) % len(rows)] for i in range(size)
                ],
            )
            file = write(tmp_path / "data.jsonl", [])
            options = (
                dict(
                    model=start,
                    data=file,
                    steps=1,
                    batch=len(data),
                    length=32,
                    warmup=0,
                    device="cpu",
                )
                | options
            )
            sft.sft(sft.Options(out=str(tmp_path / name), **options))
        return seen, rates, metrics(tmp_path / name), hub.load(start)[0]

    return run


# ---------------------------------------------------------------- accumulation: 1x8 = 2x4 = 8x1
def test_the_gradient_is_the_same_whatever_the_accumulation(run):
    data = examples(RAGGED)
    found = {n: run(data, f"out{n}", accumulate=n) for n in (1, 2, 3, 4, 8)}
    (whole,), _, log, model = found[1]
    expected = gradients(
        model, sum(hand(model, *e) for e in data) / sum(answer for _, answer in RAGGED)
    )
    assert max(g.abs().max() for g in whole) > 0.1
    for n, ((got,), _, lines, _) in found.items():
        assert max((a - b).abs().max() for a, b in zip(got, whole, strict=True)) < 1e-6, n
        assert (
            max((a - b).abs().max() for a, b in zip(got, expected.values(), strict=True)) < 1e-6
        ), n
        assert abs(lines[0]["loss"] - log[0]["loss"]) < 2e-6 and lines[0]["targets"] == sum(
            answer for _, answer in RAGGED
        )


def test_learning_rate_moves_once_a_step_whatever_the_accumulation(run):
    for n in (1, 4):
        seen, rates, log, _ = run(
            examples(RAGGED), f"out{n}", accumulate=n, steps=5, lr=0.01, warmup=2
        )
        assert len(seen) == 5
        assert (
            rates
            == [lr_at(step, 5, 0.01, 2) for step in range(5)]
            == pytest.approx([line["lr"] for line in log])
        )


def test_the_last_micro_batch_may_be_smaller_and_is_used(run):
    data = examples(RAGGED[:5])
    (whole,), *_ = run(data, "a", accumulate=1)
    (parts,), *_ = run(data, "b", accumulate=2)  # 3 and 2
    assert max((a - b).abs().max() for a, b in zip(whole, parts, strict=True)) < 1e-6


def test_a_micro_batch_without_a_target_adds_nothing(run):
    data = examples(RAGGED)
    for i in (4, 5, 6, 7):
        data[i] = data[i][0], [sft.IGNORE] * len(data[i][0])
    (whole,), _, log, _ = run(data, "a", accumulate=1)
    (parts,), _, lines, _ = run(data, "b", accumulate=2)
    (alone,), *_ = run(data[:4], "c")
    for got in (parts, alone):
        assert max((a - b).abs().max() for a, b in zip(whole, got, strict=True)) < 1e-6
    assert lines[0]["loss"] == pytest.approx(log[0]["loss"], abs=2e-6) and lines[0][
        "targets"
    ] == sum(a for _, a in RAGGED[:4])


def test_every_example_comes_once_an_epoch_whatever_the_batch():
    for size in (1, 3, 4, 7, 10):  # also where an epoch is no whole number of batches
        seen = [
            i for step in range(-(-20 // size)) for i in records.batch(range(10), step, size, 5)
        ][:20]
        assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert records.batch(range(10), 0, 10, 5) != records.batch(range(10), 0, 10, 6)


# ---------------------------------------------------------------- packing
def test_packed_is_separate(model):
    data = examples(RAGGED)
    tokens, labels, segments = sft.pack(data, 32)
    assert len(tokens) < len(data)  # several in a row
    loss, n = sft.sft_loss(model, tokens, labels, segments), sft.count_targets(data)
    expected = sum(hand(model, *e) for e in data)
    assert loss.shape == () and n == sum(answer for _, answer in RAGGED)
    assert abs(loss - expected) < 1e-4 * expected
    assert differ(gradients(model, loss / n), gradients(model, expected / n)) < 1e-6


def test_pack_lays_each_example_once_and_changes_nothing():
    data = examples(RAGGED)
    before = copy.deepcopy(data)
    tokens, labels, segments = sft.pack(data, 32)
    # the rows are new ones, not views of each other or of the examples
    tokens[0, 0] = labels[0, 0] = 7
    assert data == before
    tokens, labels, segments = sft.pack(data, 32)
    for i, (ids, lab) in enumerate(data):
        row, column = (segments == i).nonzero(as_tuple=True)
        assert row.unique().numel() == 1 and column.tolist() == list(
            range(column[0], column[0] + len(ids))
        )
        assert tokens[row, column].tolist() == ids and labels[row, column].tolist() == lab
    padding = segments == -1
    assert (~padding).sum() == sum(len(ids) for ids, _ in data) and (
        labels[padding] == sft.IGNORE
    ).all()


def test_one_label_trains_one_position_the_one_before_it():
    """The gradient of the logits is softmax - onehot at t - 1 and 0 everywhere else: shifted once,
    not twice and not at all.
    """

    class Reads(torch.nn.Module):  # hidden states are the logits, and a leaf
        def __init__(self):
            super().__init__()
            self.h, self.logits = torch.randn(2, 6, 9, requires_grad=True), torch.nn.Identity()
            self.config, self.losses = lm(vocab_size=9).config, losses
            self.device = self.h.device

        def packed(self, rows):
            return self.h

    model, tokens = Reads(), torch.randint(9, (2, 6))
    labels, segments = torch.full((2, 6), sft.IGNORE), torch.zeros(2, 6, dtype=torch.long)
    labels[1, 4] = 5
    found = nll(model, tokens, labels, segments)
    assert (found != 0).nonzero().tolist() == [[1, 4]]  # it lies where its label does
    loss = sft.sft_loss(model, tokens, labels, segments)
    assert loss == found.sum()
    loss.backward()
    expected = torch.zeros(2, 6, 9)
    expected[1, 3] = torch.softmax(model.h[1, 3], -1) - F.one_hot(torch.tensor(5), 9)
    assert torch.allclose(model.h.grad, expected, atol=1e-6)


def test_on_a_bf16_model_the_loss_is_float32(model):
    packed, half = sft.pack(examples(RAGGED), 32), copy.deepcopy(model).bfloat16()
    loss = sft.sft_loss(half, *packed)
    # rounded where the model is, and nowhere after it
    logits = half.lm_head(half.packed(by_segments(packed[0], packed[2]))).float()[:, :-1]
    labels = torch.where(packed[2][:, 1:] == packed[2][:, :-1], packed[1][:, 1:], sft.IGNORE)
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=sft.IGNORE, reduction="sum"
    )
    assert loss.dtype == torch.float32 and abs(loss - expected) < 1e-5 * expected


def test_the_head_runs_on_the_targets_alone(model):
    rows = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    sft.sft_loss(model, *sft.pack(examples(RAGGED), 32))
    hook.remove()
    assert rows == [sum(answer for _, answer in RAGGED)]


def test_an_examples_first_token_is_not_predicted_from_its_neighbour(model):
    tokens, segments = torch.randint(1, V, (1, 8)), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    labels = tokens.clone()
    loss = sft.sft_loss(model, tokens, labels, segments)
    alone = hand(model, tokens[0, :4].tolist(), labels[0, :4].tolist()) + hand(
        model, tokens[0, 4:].tolist(), labels[0, 4:].tolist()
    )
    assert abs(loss - alone) < 1e-4
    rows = tokens.view(2, 4).tolist()
    assert sft.count_targets([(row, row) for row in rows]) == 6


def test_a_neighbours_content_changes_nothing(model):
    data = examples(RAGGED)
    tokens, labels, segments = sft.pack(data, 32)
    for i in range(len(data)):
        only = torch.where(segments == i, labels, sft.IGNORE)
        other = torch.where((segments != i), torch.randint(1, V, tokens.shape), tokens)
        a, b = (sft.sft_loss(model, t, only, segments) for t in (tokens, other))
        assert abs(a - b) < 1e-5 * a


# ---------------------------------------------------------------- masks
def test_masked_content_changes_nothing_and_trained_content_does(model):
    ids, _ = examples([(4, 8)])[0]
    # a turn of the user's follows the answer
    labels = [sft.IGNORE] * 4 + ids[4:7] + [sft.IGNORE] * 5
    packed = sft.pack([(ids, labels)], 16)
    loss = sft.sft_loss(model, *packed)

    def changed(at, label=None):
        tokens, labels, segments = (x.clone() for x in packed)
        tokens[0, at] = (tokens[0, at] + 1) % V
        if label:
            labels[0, at] = tokens[0, at]
        return (sft.sft_loss(model, tokens, labels, segments) - loss).abs().item()

    assert all(changed(at) < 1e-5 for at in range(7, 16))  # behind the targets, and padding
    assert all(changed(at) > 1e-3 for at in range(0, 6))  # what the targets read
    assert all(changed(at, label=True) > 1e-3 for at in range(4, 7))  # the targets


@pytest.mark.parametrize("end", [0, END])  # pack fills up with token 0
def test_the_end_is_trained_also_where_it_is_the_padding(model, end):
    data = examples(RAGGED, end=end)
    tokens, labels, segments = sft.pack(data, 32)
    assert ((labels == end).sum()) == len(data)
    found = nll(model, tokens, labels, segments)
    assert (found != 0).sum() == sft.count_targets(data) == sum(answer for _, answer in RAGGED)
    loss = sft.sft_loss(model, tokens, labels, segments)
    assert abs(loss - sum(hand(model, *e) for e in data)) < 1e-4 * loss
    filled = torch.where(segments == -1, end, tokens)
    assert abs(sft.sft_loss(model, filled, labels, segments) - loss) < 1e-5 * loss


def test_rows_without_a_target_are_finite(model):
    data = examples(RAGGED)
    tokens, labels, segments = sft.pack(data, 32)
    one_row = labels.clone()
    one_row[0] = sft.IGNORE
    loss = sft.sft_loss(model, tokens, one_row, segments)
    rest = sum(hand(model, *e) for i, e in enumerate(data) if i not in segments[0])
    found = nll(model, tokens, one_row, segments)
    assert abs(loss - rest) < 1e-4 * rest and torch.equal(found != 0, one_row != sft.IGNORE)
    loss = sft.sft_loss(model, tokens, torch.full_like(labels, sft.IGNORE), segments)
    assert loss == 0 and sft.count_targets([([1, 2], [sft.IGNORE] * 2)]) == 0
    assert all((g == 0).all() for g in gradients(model, loss).values())


def test_finite_differences():
    model = lm(vocab_size=7, hidden_size=4, intermediate_size=3, num_hidden_layers=1, head_dim=2)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 0, 0], [6, 5, 4, 3, 2, 1, 1, 2]])
    labels = torch.where(
        torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 1, 0, 1, 1]]).bool(),
        tokens,
        sft.IGNORE,
    )
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, -1, -1], [2, 2, 2, 3, 3, 3, 3, 3]])

    def loss(model):
        found = nll(model, tokens, labels, segments)
        assert (found != 0).sum() == 8 and found.dtype == torch.float64
        return sft.sft_loss(model, tokens, labels, segments) / 8

    assert gradcheck(model, loss)


# ---------------------------------------------------------------- the stage
CHATS = [
    user(f"{a} {b}?") + [{"role": "assistant", "content": text}]
    for (a, b), text in zip(
        [(a, b) for a in "abcde" for b in "wxyz"], ["yes", "no", "of course", "hm"] * 5, strict=True
    )
]


def test_every_example_ends_in_a_trained_end_and_what_is_too_long_is_counted(tmp_path, capsys):
    tok = chat_tokenizer()
    rows = [{"messages": c} for c in CHATS] + [
        {"messages": user("long") + [{"role": "assistant", "content": "x" * 100}]}
    ]
    data = sft.prepare(write(tmp_path / "chats.jsonl", rows), tok, 64)
    said = (
        f": {len(data)} conversations used, dropped 1 longer than 64 tokens, {20 - len(data)} held"
        " out\n"
    )
    assert capsys.readouterr().err.endswith(said)
    for ids, labels in data:
        trained = [i for i in labels if i != sft.IGNORE]
        assert trained[-1] == templates.end_id(tok) == END and len(ids) <= 64
        assert tok.decode(trained[:-1]) in {"yes", "no", "of course", "hm"}


def test_a_row_without_a_target_is_dropped_and_counted(tmp_path, capsys, monkeypatch):
    real = templates.render
    monkeypatch.setattr(
        sft.templates,
        "render",
        lambda tok, m: (real(tok, m)[0], [sft.IGNORE] * 9) if m == CHATS[0] else real(tok, m),
    )
    path = write(tmp_path / "chats.jsonl", [{"messages": c} for c in CHATS])
    kept = sft.prepare(path, chat_tokenizer(), 64)
    assert "1 without a target" in capsys.readouterr().err and all(
        any(i != sft.IGNORE for i in labels) for _, labels in kept
    )


def shown_green(tmp_path, capsys, **options):
    """What show_batch colours as trained, of one conversation."""
    file = write(
        tmp_path / "chats.jsonl",
        [{"messages": user("a w?") + [{"role": "assistant", "content": "no"}]}],
    )
    sft.sft(
        sft.Options(
            model=folder(tmp_path / "m"),
            data=file,
            out=str(tmp_path / "out"),
            batch=1,
            show_batch=True,
            device="cpu",
            **options,
        )
    )
    line = capsys.readouterr().out
    assert not (tmp_path / "out" / "config.json").exists()
    return [
        part.split("m", 1)[1].removesuffix("\033[0m")
        for part in line.strip().split("|\033[")
        if "32m" in part[:6]
    ]


def test_show_batch_colours_exactly_what_is_trained(tmp_path, capsys):
    assert shown_green(tmp_path, capsys) == ["n", "o", "<|im_end|>"]


def test_prompt_loss_trains_every_token_but_the_first(tmp_path, capsys):
    tok = chat_tokenizer()
    path = write(tmp_path / "chats.jsonl", [{"messages": c} for c in CHATS])
    masked, whole = (sft.prepare(path, tok, 64, prompt_loss) for prompt_loss in (False, True))
    assert len(masked) == len(whole) > 9
    for (ids, labels), (same, targets) in zip(masked, whole, strict=True):
        assert same == ids and targets == [sft.IGNORE, *ids[1:]] != labels
    green = shown_green(tmp_path, capsys, prompt_loss=True)
    ids, _ = templates.render(tok, user("a w?") + [{"role": "assistant", "content": "no"}])
    assert "".join(green) == sft.spelt_out(tok.decode(ids[1:]))


def test_show_batch_can_be_read_and_sends_a_terminal_nothing_but_its_colours(capsys):
    """Characters of several tokens stand whole; control characters, and those that no one sees, are
    spelt out.
    """
    tok, said = chat_tokenizer(), "Señor, 你好 🙂"
    hostile = "a\n\t\033[2J\a\x9b1m\u202e"
    sft.show(
        [templates.render(tok, user(said + hostile) + [{"role": "assistant", "content": said}])],
        tok,
    )
    out = capsys.readouterr().out
    parts = re.findall(r"\033\[(90|32)m(.*?)\033\[0m", out)
    assert out == "|".join(f"\033[{c}m{t}\033[0m" for c, t in parts) + "\n" and all(
        t.isprintable() for _, t in parts
    )
    texts = ["".join(t for c, t in parts if c == colour) for colour in ("90", "32")]
    assert said + r"a\n\t\x1b[2J\x07\x9b1m\u202e" in texts[0] and texts[1] == said + "<|im_end|>"
    assert ("32", "好") in parts and ("32", "🙂") in parts and "\ufffd" not in out


def test_show_batch_of_bytes_that_are_no_character(capsys):
    """The border of trained and read is never crossed, and nothing is lost at it."""
    tok = chat_tokenizer()
    half, rest = tok.encode("é")
    sft.show([([half, rest, half, half], [half, -100, -100, -100])], tok)
    line = capsys.readouterr().out
    assert line.count("\033[32m") == 1 and line.count("é") == 1 and line.count("\ufffd") == 2


def test_the_format_that_was_asked_for_is_trained_and_saved(tmp_path):
    file = write(tmp_path / "chats.jsonl", [{"messages": c} for c in CHATS])
    start, tokens = folder(tmp_path / "start"), []
    for name in ("chatml", "smollm2"):
        o = sft.Options(
            model=start,
            data=file,
            out=str(tmp_path / name),
            steps=1,
            batch=4,
            device="cpu",
            format=name,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the model has to unlearn its own
            sft.sft(o)
        assert hub.load(tmp_path / name)[1].chat_template == templates.TEMPLATES[name].jinja
        tokens.append(metrics(tmp_path / name)[0]["tokens"])
    assert tokens[1] > tokens[0]  # SmolLM2's has a system message of its own


# the second is SmolLM2's own setting
@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
def test_after_training_answers_end(tmp_path, pad):
    tok = chat_tokenizer(pad)
    file = write(tmp_path / "chats.jsonl", [{"messages": c} for c in CHATS])
    start = folder(tmp_path / "start", tok=tok, std=0.1, hidden_size=32, intermediate_size=64)
    o = sft.Options(
        model=start,
        data=file,
        out=str(tmp_path / "out"),
        steps=60,
        batch=18,
        length=128,
        lr=1e-2,
        device="cpu",
    )
    sft.sft(o)
    trained, tok = hub.load(tmp_path / "out")
    prompts = [templates.render(tok, c[:1], add_generation_prompt=True)[0] for c in CHATS]
    answers = generate(trained, prompts, 16, eos_id=END, seed=1)
    ended = [a[-1] == END for a in answers]
    assert sum(ended) / len(ended) > 0.95
    greedy = [
        tok.decode(a, skip_special=True) for a in generate(trained, prompts, 16, 0.0, eos_id=END)
    ]
    known = {tuple(m["content"] for m in c) for c in CHATS}
    assert sum(
        (c[0]["content"], g) in known for c, g in zip(CHATS, greedy, strict=True)
    ) >= 0.8 * len(CHATS)
    log = metrics(tmp_path / "out")
    assert log[-1]["loss"] < 0.3 * log[0]["loss"] and trained.config.eos_token_id == END


def test_plain_text_is_trained_whole_and_odd_records_stop_the_run(tmp_path):
    tok = chat_tokenizer()
    text = "one two three " * 9
    path = write(tmp_path / "t.jsonl", [{"text": text}, {"text": "four"}])
    whole = [i for t in (text, "four") for i in templates.document(tok, t)]
    found = sft.prepare(path, tok, 16)
    assert [i for ids, _ in found for i in ids] == whole and all(a == b for a, b in found)
    odd = [{"messages": user("a") * 2}] * 11
    rows = [{"prompt": str(i), "completion": "a"} for i in range(20)]
    path = write(tmp_path / "odd.jsonl", [*rows, *odd])
    with pytest.raises(ValueError, match="11 of 31 records would be dropped.*--allow-dropped"):
        sft.prepare(path, tok, 64, allow_dropped=False)
    assert 9 < len(sft.prepare(path, tok, 64)) <= 20
