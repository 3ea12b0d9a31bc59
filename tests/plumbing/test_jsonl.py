"""Claims about plumbing/jsonl.py: forms of a pair, and what becomes of a bad line."""

import gzip
import hashlib
import json

import numpy as np
import pytest
from conftest import error_line

from plumbing.files import as_line
from plumbing.jsonl import (
    Form,
    as_dumped,
    as_pair,
    groups_of,
    listed,
    question_key,
    questions_of,
    read_jsonl,
    sha256_of_rows,
)

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
    ({"prompt": "q", "completion": "a"}, "q", "a", ""),
    ({"context": "c", "question": "q", "answer": "a"}, "c\nq", "a", ""),
    ({"prompt": "q", "completion": "a", "input": "i", "system": "s"}, "i\nq", "a", "s"),
    ({"question": "q", "answer": "a", "context": "", "input": None, "system": None}, "q", "a", ""),
    ({"text": "t", "code": "c", "input": "i"}, "t", "c", ""),
    ({"question": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}], "answer": "a"},
     "q\nr", "a", ""),
    (chat(("user", [{"type": "text", "text": "u"}]), ("assistant", "a")), "u", "a", ""),
    (chat(("user", "u"), ("assistant", "b"), ("tool", "42"), ("assistant", "a")),
     "u\nb\ntool: 42", "a", ""),
    (chat(("developer", "d"), ("user", "u"), ("assistant", "a")), "u", "a", "d"),
    (chat(("system", "s"), ("system", "t"), ("user", "u"), ("assistant", "a")), "u", "a", "s\nt"),
    ({**chat(("system", "t"), ("user", "u"), ("assistant", "a")), "system": "s"},
     "u", "a", "s\nt"),
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
    {"question": "q", "code": "c"}, {"instruction": "q", "output": "a"}, {},
    {"question": [{"type": "image_url", "image_url": "x"}], "answer": "a"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
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
    assert f"{path}:2: not UTF-8 (byte 0xe9" in error_line(capsys, read_jsonl, path, "error")
    path.write_text(f"{GOOD}\n{GOOD}\n", "utf-16")
    for bad_lines in ("error", "skip"):
        line = error_line(capsys, read_jsonl, path, bad_lines)
        assert f"{path}:1: not UTF-8 but UTF-16" in line and "iconv" in line


@pytest.mark.parametrize("text, said", [
    (f"[{GOOD}, {GOOD}]", "a JSON array and not JSON Lines"), ("[\n", "a JSON array"),
    (json.dumps({"conversations": [{"from": "human", "value": "q"}]}), "ShareGPT"),
    ('{"instruction": "q", "output": "a"}', "instruction, output"),
    ('{"instruction": "q", "output": "a"}', "--fields=QUESTION:ANSWER"),
    ('{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": null, '
     '"tool_calls": []}, {"role": "assistant", "content": "a"}]}', "calls a tool"),
    ('{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", '
     '"tool_calls": [{"id": 1}]}, {"role": "assistant", "content": "a"}]}', "calls a tool"),
    ('{"question": "q", "answer": 5}', "answer is 5, which is no text"),
    ('{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "function_call": {}}]}',
     "calls a tool"),
    ('{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", '
     '"function_call": {"name": "f"}}, {"role": "assistant", "content": "a"}]}', "calls a tool"),
    ('{"messages": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}',
     "must have a role and a content; it has the fields from, value"),
    ('{"messages": "[{}]"}', "messages is '[{}]' and no list"), ('{"messages": null}', "no list"),
    ('{"prompt": [{"role": "user", "content": "q"}], "completion": "a"}',
     "prompt has a part with the fields role, content"),
    ('{"question": "q", "answer": "\\ud83d"}', "half a character"),
])  # fmt: skip
def test_what_is_refused_is_named_with_the_reason(text, said, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    for bad_lines in ("error", "skip"):  # nothing else is in the file
        line = error_line(capsys, read_jsonl, path, bad_lines)
        assert f"{path}:1: " in line and said in line


def test_fields_name_any_others(tmp_path, capsys):
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"},
            {"instruction": "Wait.", "input": "", "output": "-"}]  # fmt: skip
    write(tmp_path / "train.jsonl", rows)
    read = read_jsonl(tmp_path / "train.jsonl", "error", Form("instruction+input:output"))
    assert [(p["text"], p["code"]) for p in read] == [("Add.\n1 and 2", "3"), ("Wait.", "-")]
    wrong = Form("instruction+inpt:output")
    line = error_line(capsys, read_jsonl, tmp_path / "train.jsonl", "error", wrong)
    assert "no field inpt" in line and "it has instruction, input, output" in line


def test_fields_that_nobody_reads_are_named(tmp_path, capsys):
    rows = [{**ROW, "id": i, "context": "c", "system": "s", "user": 1} for i in range(3)]
    form = Form(group="user")
    path = write(tmp_path / "train.jsonl", [*rows, {**ROW, "url": "u", "user": 2}])
    read_jsonl(tmp_path / "train.jsonl", "error", form)
    assert capsys.readouterr().out == f"{path}: unused fields: id (3 rows), url (1 rows)\n"


def test_so_are_those_of_messages(tmp_path, capsys):
    row = chat(("user", "u"), ("assistant", "a"))
    row["messages"][0] |= {"name": "Eve", "tool_calls": [], "refusal": None}
    row["messages"][1] |= {"reasoning_content": "Why?", "weight": 0}
    path = write(tmp_path / "train.jsonl", [row, {**row, "id": 1}, ROW])
    read_jsonl(tmp_path / "train.jsonl", "error")
    assert capsys.readouterr().out == (
        f"{path}: unused fields: id (1 rows), name (2 messages), reasoning_content (2 messages), "
        "weight (2 messages)\n")  # fmt: skip


def test_rows_without_a_value_are_no_group(tmp_path):
    rows = [{**ROW, "question": f"q{i}", "of": of} for i, of in enumerate(("", None, "", "a", "a"))]
    write(tmp_path / "train.jsonl", rows)
    read = read_jsonl(tmp_path / "train.jsonl", "error", Form(group="of"))
    assert [pair["group"] for pair in read] == ["", "", "", "'a'", "'a'"]
    assert len(set(groups_of(read).tolist())) == 4


def test_a_final_answer_that_is_empty_is_a_bad_line(tmp_path, capsys):
    path, final = tmp_path / "train.jsonl", Form(answer_view="final")
    write(path, [{"question": "q", "answer": "1\n#### 1"}, {"question": "r", "answer": "?\n####"}])
    assert len(read_jsonl(path, "error")) == 2
    assert f"{path}:2: answer_view=final" in error_line(capsys, read_jsonl, path, "error", final)
    assert len(read_jsonl(path, "skip", final)) == 1
    assert "left out 1 bad lines" in capsys.readouterr().out


def test_of_a_key_twice_in_a_row_the_last_one_counts(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q", "answer": "old", "answer": "new"}\n')
    read = read_jsonl(path, "error")
    assert read[0]["code"] == "new"
    assert read.sha256 == sha256_of_rows([{"question": "q", "answer": "new"}])


def test_a_file_in_gzip_reads_as_the_file(lines, tmp_path, capsys):
    read, pairs, _ = lines
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(gzip.compress((tmp_path / "mine.jsonl").read_bytes()))
    packed = read_jsonl(path, "skip")
    assert list(packed) == pairs and packed.sha256 == read.sha256
    assert packed.take(np.array([4, 0]))[:] == [pairs[4], pairs[0]]
    assert f"{path}:4: " in error_line(capsys, read_jsonl, path, "error")
    path.write_bytes(path.read_bytes()[:-9])
    assert "no sound gzip file" in error_line(capsys, read_jsonl, path, "skip")
    zst = tmp_path / "mine.jsonl.zst"
    assert "zstd -d" in error_line(capsys, read_jsonl, zst, "skip")


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


@pytest.mark.parametrize("row", [
    {}, {"a": [1, 2.5, 1e300, None, True, {"b": []}], "é\u2028\n\"": "\ud83d\U0001f600/\\"},
    {"a": float("nan"), "b": -float("inf"), "c": -0.0, "d": 10**30},
])  # fmt: skip
def test_rows_are_digested_as_json_writes_them(row):
    assert as_dumped(row) == as_line(row)


def test_a_question_has_one_key_whatever_its_case_and_blanks():
    same = ["Straße 5?", " STRASSE  5?\n", "strasse\u00a05?", "straße\t5?"]
    assert len({question_key(text) for text in same}) == 1
    assert len({question_key(text) for text in ("a b", "ab", "a b.", "b a")}) == 4


def test_keys_go_with_the_rows(tmp_path):
    rows = [{"text": text, "code": "c", "user": user}
            for text, user in (("a", 1), ("B", None), ("b", None), ("c", 1), ("d", "1"))]
    write(tmp_path / "mine.jsonl", rows)
    form = Form(group="user")
    for read in (read_jsonl(tmp_path / "mine.jsonl", "error", form),
                 listed(rows, "here", "error", form)):  # fmt: skip
        asked, groups = questions_of(read), groups_of(read)
        assert asked[1] == asked[2] and len(set(asked)) == 4
        assert groups[0] == groups[3] and len(set(groups)) == 3  # no value is no group
        at = np.array([3, 1])
        assert (questions_of(read.take(at)) == asked[at]).all()
        assert (groups_of(read.take(at).take(np.array([0]))) == groups[3]).all()
    assert not len(groups_of(listed(rows, "here", "error", Form())))


def test_a_bad_row_in_memory_is_named_by_its_number(capsys):
    rows = [ROW, {"question": "q", "answer": ""}, ROW]
    line = error_line(capsys, listed, rows, "table.csv", "error", Form())
    assert "table.csv, row 2: the answer is empty" in line
    assert listed(rows, "table.csv", "skip", Form()) == [as_pair(ROW)] * 2
    assert "table.csv: left out 1 bad lines, kept 2" in capsys.readouterr().out
