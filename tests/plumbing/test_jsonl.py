"""Claims about plumbing/jsonl.py: forms of a pair, and what becomes of a bad line."""

import hashlib
import json

import numpy as np
import pytest
from conftest import error_line

from plumbing.jsonl import as_pair, read_jsonl, sha256_of_rows

# --- rows in three forms ----------------------------------------------------------------------


def chat(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row, text, code, system", [
    ({"question": "q", "answer": "a", "id": 7}, "q", "a", ""),
    ({"text": "t", "code": "c"}, "t", "c", ""),
    (chat(("system", "s"), ("user", "u"), ("assistant", "a")), "u", "a", "s"),
    (chat(("user", "u"), ("assistant", "a")), "u", "a", ""),
    (chat(("system", ""), ("user", "u"), ("assistant", "a")), "u", "a", ""),
    (chat(("system", "s"), ("user", "u"), ("assistant", "b"), ("user", "v"), ("assistant", "a")),
     "u\nb\nv", "a", "s"),
])  # fmt: skip
def test_every_form_of_a_row_becomes_a_pair(row, text, code, system):
    assert as_pair(row) == {"text": text, "code": code, "system": system}


@pytest.mark.parametrize("row", [
    chat(("user", "u")), chat(("assistant", "a"), ("user", "u")), chat(("system", "s")), chat(),
    chat(("assistant", "a")), chat(("system", "s"), ("assistant", "a")),
    chat(("user", " "), ("assistant", "a")), chat(("user", "u"), ("assistant", "")),
    {"messages": None}, {"messages": "user"}, {"messages": [{"role": "user"}]},
    {"messages": [{"content": "u"}, {"content": "a"}]}, {"messages": {"role": "user"}},
    chat(("user", ["u"]), ("assistant", "a")),
    chat(("system", 5), ("user", "u"), ("assistant", "a")),
    chat(("user", "u"), ("assistant", ["a"])),
    chat(("user", "u"), ("assistant", None)),
    {"text": 5, "code": "c"},
    {"question": "q", "code": "c"}, {"prompt": "q", "completion": "a"}, {},
    {"text": "", "code": "c"}, {"text": "t", "code": "\n"}, {"text": "t", "code": "\ud83d"},
    ["text", "code"], "text", 5,
])  # fmt: skip
def test_a_row_that_is_no_pair_is_left_out(row, tmp_path):
    good = {"text": "t", "code": "c"}
    path = tmp_path / "mine.jsonl"
    write(path, [good, row, good])
    assert list(read_jsonl(path, "skip")) == [as_pair(good)] * 2
    with pytest.raises(SystemExit):
        read_jsonl(path, "error")


# --- files ------------------------------------------------------------------------------------

GOOD = '{"question": "q", "answer": "a"}'
ROW = {"question": "q", "answer": "a"}
BAD_LINES = {
    "not JSON": "question: q", "cut short": GOOD[:-3], "no object": '["q", "a"]', "null": "null",
    "a number": "3", "missing key": '{"question": "q"}', "other keys": '{"in": "q", "out": "a"}',
    "not text": '{"question": "q", "answer": 5}', "null text": '{"question": null, "answer": "a"}',
    "empty text": '{"question": "", "answer": "a"}', "blank": '{"question": "q", "answer": " "}',
    "two rows": GOOD + GOOD,
    "deeply nested": "[" * 100_000,
    "half a character": '{"question": "\\ud83d", "answer": "a"}',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_or_counted(kind, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n\n{BAD_LINES[kind]}\n{GOOD}\n")  # a blank line counts as a line
    line = error_line(capsys, read_jsonl, path, "error")
    assert f"{path}:3: " in line and "--bad_lines=skip" in line
    assert read_jsonl(path, "skip")[:] == [as_pair(ROW)] * 2
    assert f"{path}: left out 1 bad lines, kept 2" in capsys.readouterr().out


def test_a_file_in_another_encoding_is_named(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + GOOD.replace("q", "é").encode("latin-1"))
    assert f"{path}:2: " in error_line(capsys, read_jsonl, path, "error")


@pytest.mark.parametrize("text", ["", "\n \n", "nonsense\n"])
def test_a_file_without_rows_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    assert "holds no pair" in error_line(capsys, read_jsonl, path, "skip")


def test_a_missing_file_or_a_folder_is_one_line(tmp_path, capsys):
    for path in (tmp_path / "none.jsonl", tmp_path):
        assert f"cannot read {path}" in error_line(capsys, read_jsonl, path, "error")


@pytest.mark.parametrize("text", [
    GOOD, f"{GOOD}\n", f"{GOOD}\r\n", f"\ufeff{GOOD}\n", f"\n{GOOD}\n\n",
    '{"id": 7, "answer": "a", "question": "q", "more": [1]}\n',
])  # fmt: skip
def test_ways_to_write_a_good_file(text, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(text.encode())
    assert list(read_jsonl(path, "error")) == [as_pair(ROW)]


def test_only_a_newline_ends_a_line(tmp_path):
    """U+2028, U+0085 and form feed end a line for str.splitlines, not in JSONL."""
    rows = [{"question": "a\u2028b\x85c", "answer": "d\u2029e\x0cf"}, ROW]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    assert list(read_jsonl(path, "error")) == [as_pair(row) for row in rows]


# --- by their place in the file ---------------------------------------------------------------


@pytest.fixture
def lines(tmp_path):
    """Six pairs of unequal length in a file with a blank and a bad line, and the pairs."""
    rows = [{"text": f"t{i} " + "é\u2028" * i, "code": f"c{i}", "id": i} for i in range(6)]
    texts = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    path = tmp_path / "mine.jsonl"
    path.write_bytes("\n".join([*texts[:2], "", "bad", *texts[2:]]).encode())
    return read_jsonl(path, "skip"), [as_pair(row) for row in rows], rows


def test_a_file_is_a_sequence_of_its_pairs(lines):
    read, pairs, _ = lines
    assert len(read) == 6 and list(read) == read[:] == pairs
    assert (read[3], read[-1], read[1:5:2]) == (pairs[3], pairs[5], pairs[1:5:2])


def test_lines_are_taken_by_their_numbers_in_that_order(lines):
    read, pairs, _ = lines
    taken = read.take(np.array([4, 0, 2]))
    assert taken[:] == [pairs[i] for i in (4, 0, 2)]
    assert taken.take(np.array([2]))[0] == pairs[2]
    assert taken.sha256 == read.sha256  # of the file, of which these are a part


def test_the_checksum_is_of_all_rows_whether_in_a_file_or_not(lines):
    read, _, rows = lines
    written = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert sha256_of_rows(read) == sha256_of_rows(rows) == hashlib.sha256(written).hexdigest()
    assert sha256_of_rows(rows[1:]) != sha256_of_rows(rows)
