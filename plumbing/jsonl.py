"""Pairs in JSON Lines files: read once to check and count them, then by their place in the file.

    as_pair(row, form)               a row, in any form that is known, as text, code and system
    read_jsonl(path, bad_lines, form)  the pairs of a file
    listed(rows, place, ...)         the same of rows that are in memory already
"""

import gzip
import hashlib
import io
import json
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from json.encoder import c_make_encoder, encode_basestring_ascii
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import Config, fail
from views import code_view

KNOWN = (("question", "answer"), ("text", "code"), ("prompt", "completion"))
BEFORE = ("context", "input")  # fields that stand before a question or a prompt
MESSAGES = ("messages",)
NOTHING = (None, "", [], {})
CALLS = ("tool_calls", "function_call")  # of a message, in today's form and the one before
# json.dumps makes this one anew for every row, which takes as long as what it is made for.
ENCODE = c_make_encoder(None, json.JSONEncoder().default, encode_basestring_ascii, None, ": ",
                        ", ", False, False, True)  # fmt: skip
SYSTEMS = 1000  # different system prompts that are counted, no more


class Form(NamedTuple):
    """How the rows of a data set become pairs, beside the forms that are known anyway."""

    fields: str = ""  # names the text's and the code's, as config.fields
    group: str = ""  # the field that groups rows, as config.group
    answer_view: str = "full"


PLAIN = Form()


def form_of(config: Config) -> Form:
    return Form(config.fields, config.group, config.answer_view)


# --- a row as a pair --------------------------------------------------------------------------


class NoPair(ValueError):
    """Says why a row is none."""


def as_pair(row: dict, form: Form = PLAIN) -> dict[str, str]:
    """{"text", "code", "system"} of a row, and {"group"} where the form has one. NoPair says why
    a row is none; a row that is no sensible JSON at all may raise one of ERRORS.

    Known are {"question", "answer"} and {"prompt", "completion"}, perhaps with a "context" or an
    "input", which stands before the question; {"text", "code"}; {"messages": [...]}; and whatever
    form.fields names. Each may have a "system" prompt beside it."""
    if not isinstance(row, dict):
        raise NoPair("no JSON object with named fields")
    texts, codes = places(tuple(row), form.fields)
    alone = "system" in row and "system" not in (*texts, *codes)
    system = text_of(row["system"], "system") if alone else ""
    if texts is MESSAGES:
        systems, text, code = of_messages(row["messages"])
        system = "\n".join(filter(None, (system, *systems)))
    else:
        text, code = joined(row, texts), joined(row, codes)
    if not text.strip() or not code.strip():
        raise NoPair(f"the {'answer' if text.strip() else 'question'} is empty")
    for value in (text, code, system):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise NoPair("a text holds half a character, a lone surrogate") from None
    if form.answer_view == "final" and not code_view(code, "final"):
        raise NoPair("answer_view=final, and nothing follows the answer's last ####")
    pair = {"text": text, "code": code, "system": system}
    if form.group:
        if form.group not in row:
            raise NoPair(f"no field {form.group}, which group names; it has {', '.join(row)}")
        # Rows without a value, which is an empty text in a CSV, are no group.
        pair["group"] = "" if row[form.group] in NOTHING else repr(row[form.group])
    return pair


def row_of(pair: dict[str, str], fields: str) -> dict[str, str]:
    """A row that as_pair, with these fields, makes the pair of again."""
    texts, codes = names_of(fields or "text:code")
    row = dict.fromkeys((*texts, *codes), "")
    row |= {texts[0]: pair["text"], codes[0]: pair["code"]}
    return row | ({"system": pair["system"]} if pair["system"] else {})


def names_of(fields: str) -> list[tuple[str, ...]]:
    """The names in QUESTION+QUESTION:ANSWER+ANSWER, of the text and of the code."""
    return [tuple(names.split("+")) for names in fields.split(":")]


ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


@lru_cache(maxsize=1000)
def places(keys: tuple[str, ...], fields: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which of a row's fields are its text and which its code; MESSAGES are both."""
    if fields:
        texts, codes = names_of(fields)
        missing = [name for name in (*texts, *codes) if name not in keys]
        if missing:
            raise NoPair(f"no field {missing[0]}, which fields={fields} names; it has "
                         f"{', '.join(keys) or 'none'}")  # fmt: skip
        return texts, codes
    if "messages" in keys:
        return MESSAGES, MESSAGES
    for text, code in KNOWN:
        if text in keys and code in keys:
            before = () if text == "text" else tuple(name for name in BEFORE if name in keys)
            return (*before, text), (code,)
    if "conversations" in keys:
        raise NoPair("conversations is ShareGPT's form, which is not read; docs/your-own-pairs.md "
                     "has the jq line that makes messages with role and content of it")
    raise NoPair(f"the fields {', '.join(keys) or '(none)'} are no known pair (question and answer,"
                 " text and code, prompt and completion, or messages); name yours as "
                 "--fields=QUESTION:ANSWER")


def joined(row: dict, names: tuple[str, ...]) -> str:
    """The texts of these fields, one after another; empty ones are left out."""
    if len(names) == 1:
        value = row[names[0]]
        return value if type(value) is str else text_of(value, names[0])
    return "\n".join(text for name in names if (text := text_of(row[name], name)).strip())


def text_of(value: str | list | None, name: str) -> str:
    """A field's text: of a list of text parts, all of them."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if not isinstance(value, list):
        raise NoPair(f"{name} is {value!r:.40}, which is no text")
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            has = f"the fields {', '.join(part)}" if isinstance(part, dict) else repr(part)
            raise NoPair(f"{name} has a part with {has:.60}, which is no text part")
    return "\n".join(part["text"] for part in value)


def of_messages(messages: list[dict]) -> tuple[list[str], str, str]:
    """System prompts, text and code: the last message, the assistant's, is the code; those of the
    system or the developer are kept apart; all others (several turns, perhaps) are the text, where
    who is neither user nor assistant is named before what they say."""
    systems, turns = [], []
    if not isinstance(messages, list):
        raise NoPair(f"messages is {messages!r:.40} and no list of role and content")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
            has = f"the fields {', '.join(message)}" if isinstance(message, dict) else "none"
            raise NoPair(f"a message must have a role and a content; it has {has}")
        content = message.get("content")
        if content is None or any(message.get(call) for call in CALLS):
            raise NoPair(f"a message of the {role} calls a tool or has no content; write the call "
                         "into its content, or leave the message out")
        content = text_of(content, f"{role}'s content")
        if role in ("system", "developer"):
            systems.append(content)
        else:
            turns.append((role, content))
    if not turns or turns[-1][0] != "assistant":
        raise NoPair("the last message is not the assistant's")
    *turns, (_, code) = turns
    plain = ("user", "assistant")
    return systems, "\n".join(c if r in plain else f"{r}: {c}" for r, c in turns), code


# --- what a pass over rows finds --------------------------------------------------------------


class Found:
    """What is found out about rows, one at a time, in a single pass over them."""

    def __init__(self, place: str, bad_lines: str, form: Form):
        self.place, self.bad_lines, self.form = place, bad_lines, form
        self.questions, self.groups = array("q"), array("q")
        self.systems: set[str] = set()
        self.n_bad, self.first_bad = 0, ""
        self.shapes: Counter[tuple[str, ...]] = Counter()
        self.aside: Counter[str] = Counter()  # fields of messages that nobody reads

    def add(self, row: dict) -> dict[str, str]:
        """The row as a pair, now counted. Raises what as_pair does."""
        pair = as_pair(row, self.form)
        self.shapes[tuple(row)] += 1
        if places(tuple(row), self.form.fields)[0] is MESSAGES:
            self.aside.update(key for message in row["messages"] for key in message
                              if key not in ("role", "content") and message[key] not in NOTHING)
        question = question_key(pair["text"])
        self.questions.append(question)
        if self.form.group:
            self.groups.append(hash((pair["group"], None if pair["group"] else question)))
        if len(self.systems) < SYSTEMS:
            self.systems.add(pair["system"])
        return pair

    def bad(self, where: str, why: str) -> None:
        """A line or row that is no pair: the end, or one more that is left out."""
        if self.bad_lines == "error":
            fail(f"{where}: {why}; mend it, or --bad_lines=skip leaves such lines out")
        self.n_bad += 1
        self.first_bad = self.first_bad or f" ({where}: {why})"

    def close(self) -> None:
        """Say what was left out, or exit where nothing is left."""
        if not self.questions:
            fail(f"{self.place} holds no pair{self.first_bad}")
        for note in self.notes():
            print(f"{self.place}: {note}")

    def notes(self) -> list[str]:
        n, unused = len(self.questions), Counter()
        for keys, count in self.shapes.items():
            used = {*sum(places(keys, self.form.fields), ()), "system", self.form.group}
            unused.update({key: count for key in keys if key not in used})
        told = [*(f"{key} ({count} rows)" for key, count in unused.most_common()),
                *(f"{key} ({count} messages)" for key, count in self.aside.most_common())]
        more = f" and {len(told) - 10} more" if len(told) > 10 else ""
        return [*[f"left out {self.n_bad} bad lines, kept {n}"] * bool(self.n_bad),
                *[f"unused fields: {', '.join(told[:10])}{more}"] * bool(told)]  # fmt: skip


def question_key(text: str) -> int:
    """The same for the same question, whatever its case and blanks; in this process alone."""
    folded = text.casefold()
    if "  " in folded or not folded.isprintable():  # the only printable blank is " "
        folded = " ".join(folded.split())
    return hash(folded.strip())


# --- files of rows, and lists of them ---------------------------------------------------------


class JsonLines(Sequence):
    """Pairs in a file (see read_jsonl), parsed anew whenever asked for: memory holds no more than
    where each line begins and a key of its question. sha256 and found are of all rows; `at` says
    which of those these are, and None is all."""

    def __init__(self, opened, offsets: np.ndarray, sha256: str, found: Found, at=None):
        self.opened, self.offsets, self.at = opened, offsets, at
        self.sha256, self.found = sha256, found

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, at):
        pairs = []
        with self.opened() as file:
            for offset in np.atleast_1d(self.offsets[at]).tolist():
                file.seek(offset)
                pairs.append(as_pair(json.loads(file.readline()), self.found.form))
        return pairs if isinstance(at, slice) else pairs[0]

    def take(self, at: np.ndarray) -> "JsonLines":
        """The lines at these numbers."""
        of_all = at if self.at is None else self.at[at]
        return JsonLines(self.opened, self.offsets[at], self.sha256, self.found, of_all)


class Listed(list):
    """Pairs in memory, with what JsonLines knows of its own."""

    def __init__(self, pairs: list[dict[str, str]], sha256: str, found: Found, at=None):
        super().__init__(pairs)
        self.sha256, self.found, self.at = sha256, found, at

    def take(self, at: np.ndarray) -> "Listed":
        of_all = at if self.at is None else self.at[at]
        return Listed([self[i] for i in at], self.sha256, self.found, of_all)


def questions_of(rows: JsonLines | Listed) -> np.ndarray:
    """(n,) a key for the question of each row (see question_key)."""
    questions = np.frombuffer(rows.found.questions, np.int64)
    return questions if rows.at is None else questions[rows.at]


def groups_of(rows: JsonLines | Listed) -> np.ndarray:
    """(n,) a key for the group of each row; empty without groups."""
    groups = np.frombuffer(rows.found.groups, np.int64)
    return groups if rows.at is None or not len(groups) else groups[rows.at]


def read_jsonl(path: Path, bad_lines: str, form: Form = PLAIN) -> JsonLines:
    """The pairs of a JSONL file, or of one in gzip, which is unpacked in memory. A line that is no
    pair (see as_pair) is named as file:line, or counted and left out with bad_lines="skip"."""
    offsets, end, digest = array("q"), 0, hashlib.sha256()
    opened, found = opener(path), Found(str(path), bad_lines, form)
    try:
        with opened() as file:
            for number, line in enumerate(file, 1):  # only "\n" ends one: text may hold U+2028
                begin, end = end, end + len(line)
                if not line.strip():
                    continue
                try:
                    if b"\0" in line:  # json would take some lines of UTF-16 for another text
                        raise ValueError("no text")
                    row = json.loads(line)
                    found.add(row)
                except ERRORS as error:
                    found.bad(f"{path}:{number}", why_no_pair(line, number, error))
                    continue
                offsets.append(begin)
                digest.update(as_dumped(row))
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    found.close()
    return JsonLines(opened, np.array(offsets), digest.hexdigest(), found)


def opener(path: Path):
    """A function that opens the file, unpacked, for reading bytes."""
    if path.suffix == ".zst":
        fail(f"{path} is packed with zstd, which is not read; unpack it with: zstd -d {path}")
    if path.suffix != ".gz":
        return lambda: open(path, "rb")

    @cache
    def unpacked() -> bytes:
        try:
            return gzip.decompress(path.read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            fail(f"{path} is no sound gzip file: {error}")

    return lambda: io.BytesIO(unpacked())


def why_no_pair(line: bytes, number: int, error: Exception) -> str:
    """A line that gave this error: what is wrong with it."""
    if isinstance(error, NoPair) and not line.lstrip().startswith(b"["):
        return str(error)
    if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "not UTF-8 but UTF-16 or damaged; iconv -f UTF-16 -t UTF-8 makes it UTF-8"
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return (f"not UTF-8 (byte 0x{line[wrong.start]:02x}), perhaps Latin-1; iconv -f LATIN1 "
                "-t UTF-8 makes it UTF-8")
    if number == 1 and line.lstrip().startswith(b"["):
        return ("a JSON array and not JSON Lines, a row a line; jq -c '.[]' FILE > FILE.jsonl "
                "makes one of the other")
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON object in a line of its own ({error.msg})"
    return str(error) if isinstance(error, NoPair) else "no pair of texts"


def listed(rows: Iterable[dict], place: str, bad_lines: str, form: Form) -> Listed:
    """As read_jsonl, of rows in memory: a bad one is named by its number, from 1."""
    pairs, found, digest = [], Found(place, bad_lines, form), hashlib.sha256()
    for number, row in enumerate(rows, 1):
        try:
            pairs.append(found.add(row))
        except ERRORS as error:
            why = str(error) if isinstance(error, NoPair) else "no pair of texts"
            found.bad(f"{place}, row {number}", why)
            continue
        digest.update(as_dumped(row))
    found.close()
    return Listed(pairs, digest.hexdigest(), found)


def sha256_of_rows(rows: Sequence[dict]) -> str:
    """Of the rows as JSON Lines: for GSM8K, from wherever, the sha256 of its published file."""
    if isinstance(rows, JsonLines | Listed):
        return rows.sha256
    digest = hashlib.sha256()
    for row in rows:
        digest.update(as_dumped(row))
    return digest.hexdigest()


def as_dumped(row: dict) -> bytes:
    """A row as json.dumps writes it, and a line end."""
    return ("".join(ENCODE(row, 0)) + "\n").encode()
