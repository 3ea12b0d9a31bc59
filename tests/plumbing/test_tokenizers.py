"""Claims about plumbing/tokenizers.py: three vocabularies, one protocol."""

import hashlib
import re
import socket
from typing import get_type_hints

import pytest

from generators.word_problems import word_problems
from plumbing.tokenizers import (
    LONG_RUN,
    Tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    train_tokenizer,
    word_tokenizer,
)

LINES = [row["answer"] for row in word_problems("train", 200)]
WORDS = [" a0 b0 r0", " b0 a0 R0", " a0", ""]  # of the four that `words` has


@pytest.fixture
def connections(monkeypatch):
    """Every host that a test tries to reach; none can be reached."""
    tried = []

    def refuse(host, *args, **kwargs):
        tried.append(host)
        raise OSError(f"a test must not reach {host}")

    monkeypatch.setattr(socket.socket, "connect", lambda s, to: refuse(to))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(LINES, 512)


@pytest.fixture(scope="module")
def words():
    return word_tokenizer([" r0", " R0", " a0", " b0"])


# --- all of them ------------------------------------------------------------------------------

UNICODE = "Grüße, 世界! \u2028 e\u0301 👩‍👩‍👧 \x00\t\n  don't  1,234.50\r\n#### 7 "


def test_gpt2_ids_are_the_published_ones(gpt2, connections):
    assert gpt2.encode(["hello world", " Hello, World! 12345", "", "\n\n"]) == [
        [31373, 995], [18435, 11, 2159, 0, 17031, 2231], [], [628],
    ]  # fmt: skip
    assert (gpt2.eot, gpt2.sep, gpt2.vocab_size) == (50256, 50257, 50304)
    assert connections == []


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_any_text_comes_back(name, request):
    tokenizer = request.getfixturevalue(name)
    rows = [UNICODE, "", "a", *(row["answer"] for row in word_problems("val", 50))]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(rows)] == rows


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_no_text_yields_a_special_token(name, request):
    tokenizer = request.getfixturevalue(name)
    typed = "<|endoftext|> and <|sep|>"
    [ids] = tokenizer.encode([typed])
    assert max(ids) < tokenizer.eot < tokenizer.sep < tokenizer.vocab_size
    assert tokenizer.decode([*ids, tokenizer.sep, tokenizer.eot]) == typed  # specials are silent


@pytest.mark.parametrize("name", ["gpt2", "bpe", "words"])
def test_dump_and_load_are_inverse(name, request):
    tokenizer = request.getfixturevalue(name)
    texts = WORDS if name == "words" else [UNICODE, *LINES]
    again = load_tokenizer(tokenizer.name, tokenizer.dump())
    assert again.sha256 == tokenizer.sha256
    assert again.encode(texts) == tokenizer.encode(texts)
    for attribute in ("name", "eot", "sep", "vocab_size", "ranks"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute)
    assert (tokenizer.dump() == "") == (name == "gpt2")  # whose vocabulary is at hand anyway


def test_the_checksum_is_of_the_vocabulary_alone(gpt2, bpe, words):
    """GPT-2's is that of its published file of ranks, as tiktoken's cache has it."""
    for tokenizer in (gpt2, bpe, words):
        assert hashlib.sha256(tokenizer.rank_lines().encode()).hexdigest() == tokenizer.sha256
    assert word_tokenizer([" r0", " R0", " a0", " b1"]).sha256 != words.sha256
    assert gpt2.rank_lines().splitlines()[0] == "IQ== 0"  # "!"


@pytest.mark.parametrize("name", ["gpt2", "bpe", "words"])
def test_a_tokenizer_has_what_the_protocol_asks_for(name, request):
    tokenizer = request.getfixturevalue(name)
    for attribute, kind in get_type_hints(Tokenizer).items():
        assert type(getattr(tokenizer, attribute)) is kind, attribute
    assert tokenizer.name == name and tokenizer.vocab_size % 64 == 0
    assert tokenizer.encode([]) == [] and tokenizer.encode([""]) == [[]]
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("name", ["gpt2", "bpe", "words"])
def test_special_tokens_and_pred_are_silent(name, request):
    """[PRED] number i is vocab_size + i; between the specials and it there is the table's padding.
    """
    tokenizer = request.getfixturevalue(name)
    text = WORDS[0] if name == "words" else UNICODE
    ids, silent = tokenizer.encode([text])[0], range(tokenizer.eot, tokenizer.vocab_size + 3)
    assert tokenizer.sep in silent
    assert tokenizer.decode([*silent, *ids[:2], *silent, *ids[2:], *silent]) == text


# --- words ------------------------------------------------------------------------------------


def test_words_are_tokens_and_come_back(words, connections):
    assert words.encode(WORDS) == [[2, 3, 0], [3, 2, 1], [2], []]
    assert [words.decode(ids) for ids in words.encode(WORDS)] == WORDS
    assert (words.eot, words.sep, words.vocab_size) == (4, 5, 64)
    assert connections == []


@pytest.mark.parametrize("text, unknown", [
    ("hello", "hello"), (" a0 b1 r0", "b1"), (" a", "a"), (" a00", "a00"), (" a0b0", "a0b0"),
    (" a0 <|sep|>", "<|sep|>"), (" a0 é", "é"), (" A0", "A0"), ("!", "!"),
])  # fmt: skip
def test_an_unknown_word_is_refused(text, unknown, words):
    with pytest.raises(ValueError, match=f"no word {re.escape(unknown)} in the vocabulary"):
        words.encode([" a0", text])


@pytest.mark.parametrize("text", ["a0 b0 r0", " a0  b0 r0 ", " a0\nb0 r0", "a0\tb0 r0"])
def test_no_word_is_lost_however_words_are_spaced(text, words):
    """They are the words of " a0 b0 r0", or are refused as what cannot be written."""
    try:
        [ids] = words.encode([text])
    except ValueError:
        return
    assert ids == [2, 3, 0]


# --- bpe --------------------------------------------------------------------------------------


def test_bpe_has_the_size_asked_for_and_is_deterministic(connections):
    lines = [row["question"] for row in word_problems("train", 200)]
    first, second = (train_tokenizer(lines, 512) for _ in "12")
    assert first.sha256 == second.sha256
    assert (len(first.ranks), first.eot, first.sep, first.vocab_size) == (510, 510, 511, 512)
    assert first.sha256 != train_tokenizer(lines[:100], 512).sha256
    assert connections == []


def test_a_tiny_corpus_yields_fewer_tokens_and_still_works():
    tokenizer = train_tokenizer(["ab ab"], 8192)
    assert 256 < len(tokenizer.ranks) < 300
    assert tokenizer.vocab_size == 320  # rounded up to a multiple of 64
    assert tokenizer.decode(tokenizer.encode([UNICODE])[0]) == UNICODE


# --- blanks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("blanks", [" ", "\n", "\t \n", "\u3000"])
@pytest.mark.parametrize("after", ["x", "7", "?", "é x", "\x1c", "\x1cx", " \x1d", ""])
def test_long_runs_of_blanks_have_the_tokens_that_tiktoken_gives(blanks, after):
    """Where it still gives some: with a million blanks before a word it panics."""
    bpe = gpt2_tokenizer()
    for more in ("", " ", "\x1c", "\n"):
        run = blanks * (LONG_RUN // len(blanks) + 1) + more
        text = f"a{run}{after}b{run}{after}"
        assert bpe.encode([text])[0] == bpe.bpe.encode_ordinary(text)


def test_a_million_blanks_are_tokens_too():
    text = "a" + " " * 1_000_000 + "x"
    for tokenizer in (gpt2_tokenizer(), train_tokenizer([text, "some text"], 300)):
        assert tokenizer.decode(tokenizer.encode([text])[0]) == text
