"""Against the live Hugging Face tokenizers: ids and text of 1,000 varied strings, and what is saved
is opened by transformers.

Run in the peers' environment; SmolLM2 itself too where smollm2 is there.
"""

import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers")
TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS / "golden"))

from make import CHATS, varied  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from data import templates, tokenizer  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402

FOLDERS = {
    "trained": None,
    "gpt2_kind": TESTS / "golden" / "gpt2_kind",
    "smollm2_kind": TESTS / "golden" / "smollm2_kind",
    "smollm2": TESTS.parent / "smollm2",
}


@pytest.fixture(params=FOLDERS)
def both(request, tmp_path):
    """Our tokenizer, and transformers' from the folder that ours was saved to."""
    folder = FOLDERS[request.param]
    if folder and not (folder / "tokenizer.json").is_file():
        pytest.skip("needs smollm2: make smollm2")
    ours = Tokenizer.load(folder) if folder else tokenizer.train(varied(2000, 5), 1024)
    templates.adopt(ours)
    ours.save(tmp_path)
    return ours, AutoTokenizer.from_pretrained(tmp_path)


def test_ids_and_text_of_1000_strings(both):
    ours, peer = both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for text in varied(1000, 6):
            ids = ours.encode(text)
            assert (
                ids == peer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            ), ascii(text)
            assert ours.decode(ids) == peer.decode(ids), ascii(text)


def test_every_token_is_reached_as_hugging_face_reaches_it(both):
    """tiktoken merges any two neighbours that make a token, Hugging Face only the listed pairs: the
    same where BPE was trained.
    """
    ours, peer = both
    for token, i in peer.get_vocab().items():
        text = peer.convert_tokens_to_string([token])
        if token not in ours.special and "�" not in text:
            assert ours.encode(text) == peer(text, add_special_tokens=False)["input_ids"] == [i]


def test_special_ids_and_template_are_read_by_transformers(both):
    ours, peer = both
    assert (peer.eos_token_id, peer.pad_token_id, peer.bos_token_id) == (
        ours.eos_id,
        ours.pad_id,
        ours.bos_id,
    )
    assert peer.eos_token_id == templates.end_id(ours) and len(peer) == ours.vocab_size
    for chat in CHATS:
        assert peer.apply_chat_template(chat, tokenize=False) == templates.text(
            chat, format=templates.of(ours)
        )
        prompt = peer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        assert prompt == templates.text(
            chat[:-1], add_generation_prompt=True, format=templates.of(ours)
        )
    # the fifth holds the format's tokens as text: ours stay text
    for chat in CHATS[:4]:
        assert (
            peer.apply_chat_template(chat, tokenize=True)["input_ids"]
            == templates.render(ours, chat)[0]
        )
