"""Tokens of files of pairs, on disk: a later run maps them into memory and starts at once.

    folder_of(files, config, tokenizer)  where they lie, named by all that they depend on
    write(folder, provenance, ...)       whole or not at all
    read(folder, tokenizer)              the same, the columns mapped

Everything is under out/tokens/, which can be deleted whenever no run uses it.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from config import Config
from plumbing.files import sha256_of, write_folder
from plumbing.processes import ROOT
from plumbing.tokenizers import Tokenizer, load_tokenizer
from views import Columns

FORMATS = {"tokens": (np.int32, (-1,)), "is_label": (bool, (-1,)), "starts": (np.int64, (-1, 3)),
           "lengths": (np.int32, (-1, 3)), "question_length": (np.int32, (-1,))}  # fmt: skip
SOURCES = ("data.py", "views.py", "plumbing/tokenizers.py", "plumbing/jsonl.py")  # of tokens
# What tokens depend on beside files and code; block_size is applied when they are read.
FIELDS = ("dataset", "tokenizer", "bpe_vocab_size", "answer_view", "labels", "views",
          "system_prompt", "layout", "train_rows", "bad_lines")  # fmt: skip


def fields_of(config: Config) -> SimpleNamespace:
    """The part of a config that kept tokens are made from: who reads another field of it gets an
    AttributeError, and not tokens of another setting."""
    values = {name: getattr(config, name) for name in FIELDS}
    if config.views == "steps_random":  # its choices are the seed's
        values["seed"] = config.seed
    return SimpleNamespace(**values)


def folder_of(files: dict[str, Path], config: Config, tokenizer: Tokenizer | None) -> Path:
    """`tokenizer` None stands for the one that the files themselves give."""
    parts = [
        {split: str(path) for split, path in files.items()},
        vars(fields_of(config)),
        tokenizer.sha256 if tokenizer else None,
        [sha256_of(path) for path in files.values()],
        [sha256_of(ROOT / name) for name in SOURCES],
    ]
    return Path("out/tokens") / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def write(
    folder: Path, provenance: dict, tokenizer: Tokenizer, splits: dict[str, Iterator[Columns]]
) -> None:
    """Each split comes in chunks, so that memory need not hold it."""
    with write_folder(folder) as append:
        for split, chunks in splits.items():
            n_tokens = 0
            for chunk in chunks:
                chunk = chunk._replace(starts=chunk.starts + n_tokens)
                n_tokens += len(chunk.tokens)
                for name, column in zip(Columns._fields, chunk):
                    append(f"{split}.{name}", column.tobytes())
        append("tokenizer", tokenizer.dump().encode())
        append("about.json", json.dumps([provenance, list(splits)]).encode())


def read(
    folder: Path, tokenizer: Tokenizer | None
) -> tuple[dict, Tokenizer, dict[str, Columns]]:
    """What `write` was given. `tokenizer` as in folder_of: None reads it too."""
    provenance, splits = json.loads((folder / "about.json").read_text())
    if tokenizer is None:
        tokenizer = load_tokenizer(provenance["tokenizer"], (folder / "tokenizer").read_text())
    columns = {split: Columns(*(mapped(folder / f"{split}.{name}", dtype, shape)
                                for name, (dtype, shape) in FORMATS.items()))
               for split in splits}  # fmt: skip
    return provenance, tokenizer, columns


def mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    if not path.exists() or not path.stat().st_size:  # an empty split
        return np.empty(0, dtype).reshape(shape)
    return np.asarray(np.memmap(path, dtype, "r")).reshape(shape)
