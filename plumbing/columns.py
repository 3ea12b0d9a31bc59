"""Tokens of files of pairs, on disk: a later run maps them into memory and starts at once.

    folder_of(files, config, tokenizer)  where they lie, named by all that they depend on
    write(folder, provenance, ...)       whole or not at all
    is_sound(folder)                     are they as they were written? Else they are removed
    read(folder, tokenizer)              the same, the columns mapped

Everything is under out/tokens/, which can be deleted whenever no run uses it.
"""

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from config import Config
from plumbing.files import remove_folder, sha256_of, write_folder, write_json
from plumbing.processes import ROOT
from plumbing.tokenizers import Tokenizer, load_tokenizer
from views import Columns

FORMATS = {"tokens": (np.int32, (-1,)), "is_label": (bool, (-1,)), "starts": (np.int64, (-1, 3)),
           "lengths": (np.int32, (-1, 3)), "question_length": (np.int32, (-1,)),
           "framing": (np.int32, (-1, 2))}  # fmt: skip
SOURCES = ("data.py", "views.py", "plumbing/tokenizers.py", "plumbing/hf_tokenizer.py",
           "plumbing/jsonl.py")  # of tokens
# What tokens depend on beside files and code; block_size is applied when they are read.
FIELDS = ("dataset", "tokenizer", "bpe_vocab_size", "answer_view", "labels", "views",
          "system_prompt", "layout", "train_rows", "bad_lines", "fields", "group", "label_end",
          "template", "objective")  # fmt: skip


def fields_of(config: Config) -> SimpleNamespace:
    """The part of a config that kept tokens are made from: who reads another field of it gets an
    AttributeError, and not tokens of another setting."""
    return SimpleNamespace(**{name: getattr(config, name) for name in FIELDS})


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
    sizes, digests = defaultdict(int), defaultdict(hashlib.sha256)
    with write_folder(folder) as append_to:

        def append(name: str, content: bytes) -> None:
            append_to(name, content)
            sizes[name] += len(content)
            digests[name].update(content)

        for split, chunks in splits.items():
            n_tokens = 0
            for chunk in chunks:
                chunk = chunk._replace(starts=chunk.starts + n_tokens)
                n_tokens += len(chunk.tokens)
                for name, column in zip(Columns._fields, chunk):
                    append(f"{split}.{name}", column.tobytes())
        append("tokenizer", tokenizer.dump().encode())
        kept = {name: [size, digests[name].hexdigest()] for name, size in sizes.items()}
        about = json.dumps([provenance, list(splits), kept])
        append_to("about.json", json.dumps([about, digest_of(about)]).encode())
    with contextlib.suppress(OSError):  # another process removed it just now
        remember(folder, stamps_of(folder, kept))


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def about_of(folder: Path) -> tuple[dict, list[str], dict[str, tuple[int, str]]]:
    """Provenance, splits, and the length and sha256 of each file; ValueError if it is damaged."""
    about, digest = json.loads((folder / "about.json").read_text())
    if digest_of(about) != digest:
        raise ValueError("about.json")
    return json.loads(about)


def is_sound(folder: Path) -> bool:
    """Is there a folder, and in it what was written? A file is hashed once and then, as long as its
    size and time stay, believed. Another folder than that is removed, with a line."""
    if not folder.exists():
        return False
    try:
        kept = about_of(folder)[2]
        stamps, known = stamps_of(folder, kept), {}
        with contextlib.suppress(ValueError, OSError):
            known = json.loads((folder / "checked.json").read_text())
        for name, (size, sha256) in kept.items():
            if stamps[name][0] != size or not (
                known.get(name) == stamps[name] or sha256_of(folder / name) == sha256
            ):
                raise ValueError(name)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        print(f"{folder} is damaged ({error}): its tokens are made anew")
        remove_folder(folder)
        return False
    if known != stamps:
        remember(folder, stamps)
    return True


def stamps_of(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of each file."""
    stats = {name: (folder / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def remember(folder: Path, stamps: dict[str, list[int]]) -> None:
    with contextlib.suppress(OSError):  # a folder that may not be written is hashed again
        write_json(folder / "checked.json", stamps)


def read(folder: Path, tokenizer: Tokenizer | None) -> tuple[dict, Tokenizer, dict[str, Columns]]:
    """What `write` was given. `tokenizer` as in folder_of: None reads it too."""
    provenance, splits, _ = about_of(folder)
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
