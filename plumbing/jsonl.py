"""Pairs in JSON Lines files: read once to check and count them, then by their place in the file."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from config import fail
from plumbing.files import as_line


class JsonLines(Sequence):
    """Pairs in a file (see read_jsonl), parsed anew whenever asked for: memory holds no more than
    where each line begins. sha256 is of all rows."""

    def __init__(self, path: Path, offsets: np.ndarray, sha256: str):
        self.path, self.offsets, self.sha256 = path, offsets, sha256

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, at):
        pairs = []
        with open(self.path, "rb") as file:
            for offset in np.atleast_1d(self.offsets[at]).tolist():
                file.seek(offset)
                pairs.append(as_pair(json.loads(file.readline())))
        return pairs if isinstance(at, slice) else pairs[0]

    def take(self, at: np.ndarray) -> "JsonLines":
        """The lines at these numbers."""
        return JsonLines(self.path, self.offsets[at], self.sha256)


def read_jsonl(path: Path, bad_lines: str) -> JsonLines:
    """The pairs of a JSONL file. A line that is no pair (see as_pair) is named as file:line, or
    counted and left out with bad_lines="skip"."""
    offsets, end, n_bad, digest = array("q"), 0, 0, hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):  # only "\n" ends one: text may hold U+2028
                begin, end = end, end + len(line)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    as_pair(row)
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    if bad_lines == "error":
                        fail(f"{path}:{number}: no pair of texts (question and answer, text and "
                             "code, or messages); mend the line, or --bad_lines=skip leaves such "
                             "lines out")
                    n_bad += 1
                    continue
                offsets.append(begin)
                digest.update(as_line(row))
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    if n_bad:
        print(f"{path}: left out {n_bad} bad lines, kept {len(offsets)}")
    if not offsets:
        fail(f"{path} holds no pair")
    return JsonLines(path, np.array(offsets), digest.hexdigest())


def as_pair(row: dict) -> dict[str, str]:
    """{"text", "code", "system"} of a row in any form; raises one of several errors for others.

    {"question", "answer"}, {"text", "code"}, or {"messages": [...]} with roles: the last message,
    the assistant's, is the code; an optional first one of the system is kept apart; all between
    them (several turns, perhaps) is the text."""
    system = ""
    if "messages" in row:
        messages = row["messages"]
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        *turns, last = messages
        if last["role"] != "assistant":
            raise ValueError("the last message is not the assistant's")
        pair = {"text": "\n".join(m["content"] for m in turns), "code": last["content"]}
    else:
        text, code = ("question", "answer") if "question" in row else ("text", "code")
        pair = {"text": row[text], "code": row[code]}
    for value in (*pair.values(), system + "x"):
        if not value.strip():
            raise ValueError("a view is empty")
        value.encode()  # half a surrogate pair is no text
    return {**pair, "system": system}


def sha256_of_rows(rows: Sequence[dict]) -> str:
    """Of the rows as JSON Lines: for GSM8K, from wherever, the sha256 of its published file."""
    if isinstance(rows, JsonLines):
        return rows.sha256
    digest = hashlib.sha256()
    for row in rows:
        digest.update(as_line(row))
    return digest.hexdigest()
