"""Tokens of files of pairs, on disk: a later run maps them into memory and starts at once.

    folder_of(files, config, tokenizer)  where they lie, named by all that they depend on
    write(folder, provenance, ...)       whole or not at all
    read(folder, tokenizer)              the same, the columns mapped

Everything is under out/tokens/, which can be deleted whenever no run uses it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from config import Config, fail
from tokenizer import Tokenizer
from views import Columns

FORMATS = {"tokens": (np.int32, (-1,)), "is_label": (bool, (-1,)), "starts": (np.int64, (-1, 3)),
           "lengths": (np.int32, (-1, 3)), "asked": (np.int32, (-1,))}  # fmt: skip

# What tokens depend on beside files and code; block_size is applied when they are read.
FIELDS = ("tokenizer", "bpe_vocab_size", "answer_view", "labels", "views", "step_pair",
          "system_prompt", "layout", "train_rows", "bad_lines")  # fmt: skip


def folder_of(files: dict[str, Path], config: Config, tokenizer: Tokenizer | None) -> Path:
    """`tokenizer` None stands for the one that the files themselves give."""
    here = Path(__file__).parent
    parts = [
        {split: str(path) for split, path in files.items()},
        {name: getattr(config, name) for name in FIELDS},
        config.seed if config.step_pair == "random" else None,
        tokenizer.sha256 if tokenizer else None,
        [sha256(path) for path in files.values()],
        [sha256(here / name) for name in ("data.py", "views.py", "tokenizer.py")],
    ]
    return Path("out/tokens") / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    return digest.hexdigest()


def write(
    folder: Path, provenance: dict, tokenizer: Tokenizer, splits: dict[str, Iterator[Columns]]
) -> None:
    """Each split comes in chunks, so that memory need not hold it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for split, chunks in splits.items():
            n_tokens = 0
            for chunk in chunks:
                chunk = chunk._replace(starts=chunk.starts + n_tokens)
                n_tokens += len(chunk.tokens)
                for name, column in zip(Columns._fields, chunk):
                    with open(unfinished / f"{split}.{name}", "ab") as file:
                        column.tofile(file)
        if tokenizer.name != "gpt2":
            (unfinished / "tokenizer").write_text(tokenizer.dump())
        (unfinished / "about.json").write_text(json.dumps([provenance, list(splits)]))
    except OSError as error:
        shutil.rmtree(unfinished)
        raise OSError(f"the tokens could not be written to {folder.parent}: {error}") from None
    try:
        os.rename(unfinished, folder)
    except OSError:  # another process wrote the same meanwhile
        shutil.rmtree(unfinished)


def read(
    folder: Path, tokenizer: Tokenizer | None
) -> tuple[dict, Tokenizer, dict[str, Columns]]:
    """What `write` was given. `tokenizer` as in folder_of: None reads it too."""
    provenance, splits = json.loads((folder / "about.json").read_text())
    if tokenizer is None:
        ranks = (folder / "tokenizer").read_text()
        tokenizer = Tokenizer.parse(provenance["tokenizer"], ranks)
    columns = {split: Columns(*(mapped(folder / f"{split}.{name}", dtype, shape)
                                for name, (dtype, shape) in FORMATS.items()))
               for split in splits}  # fmt: skip
    return provenance, tokenizer, columns


def mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    if not path.exists():  # an empty split
        return np.empty(0, dtype).reshape(shape)
    return np.asarray(np.memmap(path, dtype, "r")).reshape(shape)
