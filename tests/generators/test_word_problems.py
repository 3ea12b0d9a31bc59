"""Claims about generators/word_problems.py. Every answer is worked out again here, in exact
fractions."""

import ast
import functools
import operator
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from generators import word_problems as module
from generators.word_problems import TEMPLATES, Draw, fill, word_problems

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "val", "test")
NAMED_TEMPLATES = [pytest.param(t, id=t.__name__) for s in SPLITS for t in TEMPLATES[s]]
NUMBER = re.compile(r"\d+(?:\.\d+)?")
STEP = re.compile(r"([\d.+\-*/()]+) = \$?<<([^<>=]+)=([\d.]+)>>([\d.]*\d)")
# what may be used without being said: half and twice, days in a week, a dozen, minutes in an
# hour, centimeters in a meter and percent
CONSTANTS = {Fraction(n) for n in (2, 7, 12, 60, 100)}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub,
             ast.Mult: operator.mul, ast.Div: operator.truediv}


@functools.cache
def many(split):
    """As many rows as of GSM8K's training data, fewer held out; more begin with the same ones."""
    return word_problems(split, {"train": 7500, "val": 2000, "test": 2000}[split])


def exact(expr):
    """The value of an expression of numbers, + - * / and parentheses, as a Fraction."""
    def walk(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant), f"{expr}: not arithmetic"
        return Fraction(str(node.value))

    return walk(ast.parse(expr, mode="eval").body)


def numbers(text):
    return {Fraction(n) for n in NUMBER.findall(text)}


def rows_of(template, n=60):
    r = Draw(f"test {template.__name__}")
    return [fill(template, r) for _ in range(n)]


def steps_and_final(row):
    *steps, last = row["answer"].split("\n")
    assert last.startswith("#### "), row
    return steps, last.removeprefix("#### ")


@pytest.mark.parametrize("template", NAMED_TEMPLATES)
def test_every_step_is_arithmetically_right(template):
    """In 48/2 = <<48/2=24>>24 the two expressions agree, the two results agree, and 48/2 is 24."""
    for row in rows_of(template):
        steps, final = steps_and_final(row)
        for step in steps:
            [(shown, expr, value, glued)] = STEP.findall(step)
            assert step.count("<<") == 1 and step.endswith(".")
            assert shown == expr
            assert glued == value
            assert exact(expr) == Fraction(value), step
        assert final == value


@pytest.mark.parametrize("template", NAMED_TEMPLATES)
def test_numbers_used_in_steps_come_from_question_or_earlier_steps(template):
    for row in rows_of(template):
        known = numbers(row["question"]) | CONSTANTS
        for step in steps_and_final(row)[0]:
            [(_, expr, value, _)] = STEP.findall(step)
            assert numbers(expr) <= known, row
            assert numbers(STEP.sub("", step)) <= known, row  # the words around it, too
            known.add(Fraction(value))


@pytest.mark.parametrize("template", NAMED_TEMPLATES)
def test_every_result_is_a_natural_quantity(template):
    """Above zero, and whole unless it is money or hours."""
    for row in rows_of(template):
        for step in steps_and_final(row)[0]:
            [(_, _, value, _)] = STEP.findall(step)
            assert Fraction(value) > 0
            assert Fraction(value).denominator == 1 or "$<<" in step or "hours" in step, row


@pytest.mark.parametrize("template", NAMED_TEMPLATES)
def test_rows_are_clean_text(template):
    """One question, one line each step, no leftover markup, no doubled spaces, no a/an slip."""
    for row in rows_of(template):
        assert re.fullmatch(r"[^?\n]+\?", row["question"])
        assert not re.search(r"[\[\]{}]|  | $|\ba [aeio]", row["question"] + "\n" + row["answer"])
        for line in [row["question"], *steps_and_final(row)[0]]:
            assert line[0].isupper() or line[0].isdigit()


@pytest.mark.parametrize("template", NAMED_TEMPLATES)
def test_one_to_five_steps(template):
    for row in rows_of(template):
        assert 1 <= len(steps_and_final(row)[0]) <= 5


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_mixes_easy_and_hard(split):
    lengths = {len(steps_and_final(row)[0]) for row in word_problems(split, 300)}
    assert min(lengths) == 1 and max(lengths) >= 4


def test_splits_share_no_template():
    assert tuple(TEMPLATES) == SPLITS
    everything = [t for split in SPLITS for t in TEMPLATES[split]]
    assert len(everything) == len(set(everything)) >= 30


def test_splits_share_no_question():
    train, val, test = ({row["question"] for row in many(s)[:2000]} for s in SPLITS)
    assert not train & val and not train & test and not val & test


@pytest.mark.parametrize("split", SPLITS)
def test_rows_come_from_every_template_of_their_split_and_no_other(split, monkeypatch):
    monkeypatch.setattr(module, "fill", lambda template, r: template)
    assert set(word_problems(split, 500)) == set(TEMPLATES[split])


@pytest.mark.parametrize("split", SPLITS)
def test_another_seed_gives_other_rows(split):
    rows = {row["question"] for row in word_problems(split, 200, seed=3)}
    others = {row["question"] for row in word_problems(split, 200, seed=4)}
    assert len(rows & others) < 20


@pytest.mark.parametrize("split", SPLITS)
def test_more_rows_begin_with_the_same_rows_as_fewer(split):
    rows = word_problems(split, 300)
    for m in (0, 1, 57, 300):
        assert word_problems(split, m) == rows[:m]


def test_rows_do_not_depend_on_the_hash_seed():
    """Nothing rests on hash() or on the order of a set: a fresh Python gives the same rows."""
    code = "from generators.word_problems import word_problems as w; print(w('val', 50, seed=1))"
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                           capture_output=True, env={**os.environ, "PYTHONHASHSEED": h}).stdout
            for h in ("1", "2")]
    assert runs[0] == runs[1] == f"{word_problems('val', 50, seed=1)}\n"


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_mostly_unique(split):
    n = {"train": 7500, "val": 1000, "test": 1300}[split]
    assert len({row["question"] for row in many(split)[:n]}) > 0.98 * n


def test_a_question_has_one_answer():
    rows = many("train")
    assert len({r["question"] for r in rows}) == len({(r["question"], r["answer"]) for r in rows})


def test_an_unnatural_result_is_refused():
    def thirds(r):
        return "How many are 10 apples shared by 3? Each gets [10/3] apples."

    def debt(r):
        return "How many apples are left? There are [2-5] left."

    for template, expr in ((thirds, "10/3"), (debt, "2-5")):
        with pytest.raises(ValueError, match=f"{template.__name__}: {expr}"):
            fill(template, Draw(0))


def test_unknown_split_and_negative_n_rows_are_named():
    with pytest.raises(ValueError, match=r"'valid'.*train, val, test"):
        word_problems("valid", 3)
    with pytest.raises(ValueError, match="-1"):
        word_problems("train", -1)
