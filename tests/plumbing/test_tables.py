"""Claims about plumbing/tables.py: CSV and Parquet files, row by row, as they were written."""

import datetime

import pytest
from conftest import error_line

from config import Config
from data import load_rows, read_file
from plumbing.tables import read_table


def test_all_of_a_csv_is_text(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('question,answer,id\n"a, ""b""\nc",007,1\nNA,1.50,2\n', "utf-8-sig")
    assert read_table(path) == [{"question": 'a, "b"\nc', "answer": "007", "id": "1"},
                                {"question": "NA", "answer": "1.50", "id": "2"}]  # fmt: skip


def test_a_cell_may_be_long(tmp_path):
    (tmp_path / "long.csv").write_text(f"question,answer\nq,{'long ' * 50_000}\n")
    assert len(read_table(tmp_path / "long.csv")[0]["answer"]) == 250_000


def test_a_parquet_file_has_its_types(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"t{i}", "code": "c", "n": i, "day": datetime.date(2020, 1, 1 + i)}
            for i in range(3)]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mine.parquet")
    expected = [{**row, "day": f"{row['day']}"} for row in rows]
    assert read_table(tmp_path / "mine.parquet") == expected
    config = Config(dataset=str(tmp_path / "mine.parquet"), group="n")
    assert [pair["group"] for pair in read_file(tmp_path / "mine.parquet", config)] == [*"012"]


@pytest.mark.parametrize("name, content, said", [
    ("a.csv", b"question,answer\nq,a\nq,\n", ", row 2: the answer is empty"),
    ("a.csv", b"question,answer\nq,a\nq\n", ", row 2: the answer is empty"),
    ("a.csv", b"q,a\n1,2\n", ", row 1: the fields q, a are no known pair"),
    ("a.csv", "question,answer\né,a\n".encode("latin-1"), "not UTF-8"),
    ("a.csv", b"question,answer\nq,a,b,c\nq,a,b,c,d\n", "cannot read"),
    ("a.csv", b"question,answer\nq,a,b\n", "question, answer, and the row below has 3 cells"),
    ("a.csv", b"question,answer\n\nq,a,\n", "the row below has 3 cells"),
    ("a.csv", b"question,answer,answer\nq,a,b\n", "name each column once"),
    ("a.csv", b"", "cannot read"), ("a.parquet", b"nonsense", "cannot read"),
    ("none.csv", None, "cannot read"), ("none.parquet", None, "cannot read"),
])  # fmt: skip
def test_a_bad_table_is_one_line(name, content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = error_line(capsys, load_rows, Config(dataset=str(tmp_path / name)))
    assert f"{tmp_path / name}" in line and said in line
