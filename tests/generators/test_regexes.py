"""Claims about generators/regexes.py. What a regex with & and ~ matches is worked out here, by
Python's re."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from itertools import chain
from pathlib import Path

import pytest

from generators import regexes
from generators.regexes import (
    ATOMS,
    LINES,
    PREDICATES,
    THINGS,
    depth,
    line,
    regex_pairs,
    split_of,
    thing,
)
from generators.word_problems import Draw

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def rows():
    """Rows of each split, without and with by_depth: {(split, by_depth): rows}."""
    n = {"train": 3000, "val": 300, "test": 300}
    return {(s, b): regex_pairs(s, n[s], seed=b, by_depth=b) for s in SPLITS for b in (False, True)}


@pytest.fixture(scope="module")
def tiny_language():
    """{text: its regexes} with three atoms of one name each, so that texts come up many times."""
    texts = defaultdict(set)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regexes, "ATOMS", (("[0-9]", ("a digit",)), ("[A-Z]", ("a capital letter",)),
                                         ("dog", ("'dog'",))))  # fmt: skip
        r = Draw("tiny language")
        for i in range(15_000):
            code, text = line(r, 1 + i % 3)
            texts[text].add(code)
    return dict(texts)


def is_python(code):
    """Whether a regex does without & and ~, which Python's re takes for plain characters. Such a
    code compiles, and re.fullmatch finds the lines that its text describes."""
    return "&" not in code and "~" not in code


def operands(code, operator):
    """What an operator joins outside of all parentheses: (a)&(b) -> ["(a)", "(b)"]."""
    parts, level = [""], 0
    for char in code:
        level += (char == "(") - (char == ")")
        if char == operator and level == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def matches(code, text):
    """Whether a regex of NL-RX's language matches the whole text, & and ~ being and and not."""
    for operator, combine in (("|", any), ("&", all)):
        parts = operands(code, operator)
        if len(parts) > 1:
            return combine(matches(part, text) for part in parts)
    if code.startswith("~"):
        return not matches(code[1:], text)
    if code.startswith("(") and not is_python(code):
        return matches(code[1:-1], text)
    return re.fullmatch(code, text) is not None


# What each rule matches and what not, with dog, ring, lake and 2 in the slots A, B, C and N; in
# sentences the slots are "start with 'dog'", "end in 'ring'" and "contain 'lake'".
EXAMPLES = {
    "A": (["dog"], ["", "dogs", "a dog"]),
    "(A)(.*)": (["dog", "dog and ring"], ["a dog", ""]),
    "(.*)(A)": (["dog", "a dog"], ["dogs", ""]),
    ".*(A).*": (["dog", "hotdogs"], ["do g", ""]),
    r".*\b(A)\b.*": (["dog", "a dog.", "my dog eats"], ["hotdog", "dogs", ""]),
    "(.*(A).*)&(.*(B).*)": (["dog ring", "a ring, a dog"], ["dog", "ring", "lake"]),
    "(A)|(B)": (["dog", "ring"], ["lake", "dogring", ""]),
    "(A)|(B)|(C)": (["dog", "ring", "lake"], ["dogring", ""]),
    "(A).*(B)": (["dogring", "dog eats ring"], ["ring dog", "dog", "a dog ring", "dog ring s"]),
    "(A)*": (["", "dog", "dogdogdog"], ["do", "dogs", "dog dog"]),
    "(A)+": (["dog", "dogdog"], ["", "dogs"]),
    "(A){N,}": (["dogdog", "dogdogdog"], ["", "dog", "dog dog"]),
    "~(A)": (["ring", "a dog", ""], ["dog", "dog ring"]),
    "(A)&(B)": (["dogring", "dog or ring"], ["dog", "ring", "a dog ring"]),
    "sentence (A)|(B)": (["dog", "ring", "dog to ring", "a ring"], ["lake", "a dog", ""]),
    "(A)&(~(B))": (["dog", "dog ring s"], ["dog ring", "ring", "lake"]),
    "(A)&(B)&(C)": (["dog lake ring"], ["dog ring", "dog lake", "lake ring"]),
    "sentence (A)|(B)|(C)": (["dog s", "a ring", "lakes"], ["a dog", "rings", ""]),
    "~((A)&(B))": (["dog", "ring", "lake", ""], ["dog ring"]),
    "~((A)|(B))": (["lake", "a dog", "rings", ""], ["dog", "ring", "dogs", "dog ring"]),
}
WORDS = {"A": "dog", "B": "ring", "C": "lake", "N": "2"}
SENTENCES = {"A": "(dog)(.*)", "B": "(.*)(ring)", "C": ".*(lake).*"}


def example_of(rule, of_lines):
    name = f"sentence {rule}"
    return EXAMPLES[name if of_lines and name in EXAMPLES else rule]


@pytest.mark.parametrize("rule", [t[1] for t in THINGS] + [p[0] for p in PREDICATES])
def test_a_rule_matches_what_its_phrasings_say(rule):
    yes, no = example_of(rule, of_lines=False)
    code = rule.translate(str.maketrans(WORDS))
    assert [text for text in yes if not matches(code, text)] == []
    assert [text for text in no if matches(code, text)] == []


@pytest.mark.parametrize("rule", [rule for rule, _ in LINES[1:]])
def test_a_sentence_matches_what_its_phrasings_say(rule):
    yes, no = example_of(rule, of_lines=True)
    code = rule.translate(str.maketrans(SENTENCES))
    assert [text for text in yes if not matches(code, text)] == []
    assert [text for text in no if matches(code, text)] == []


def test_every_rule_has_at_least_three_phrasings_that_use_every_slot_once():
    everything = [(t[1], group) for t in THINGS for group in t[2:]] + [*PREDICATES, *LINES[1:]]
    for rule, phrases in everything:
        assert len(set(phrases)) == len(phrases) >= 3, rule
        for phrase in phrases:
            assert sorted(re.findall("[A-Z]", phrase)) == sorted(re.findall("[A-Z]", rule)), phrase


# A reader of simple English, written from the sentences and not from the grammar: for each kind
# of phrase what it may look like and what it means; the groups are phrases of the next kind.
READER = (
    ((r"lines (?:that |which )?(?:do not|not|never) (.*)", "~({})"),
     (r"lines (?:except|other than|but for) those (?:that |which )?(.*)", "~({})"),
     (r"lines (?:that |which )?neither (.*) nor (.*)", "~(({})|({}))"),
     (r"lines (?:that |which )?(.*) (?:but|and|yet) (?:do not|not|never) (.*)", "({})&(~({}))"),
     (r"lines (?:that |which )?(?:both )?(.*) and (?:also )?(.*)", "({})&({})"),
     (r"lines (?:that |which )?(?:either )?(.*) or (?:else )?(.*)", "({})|({})"),
     (r"lines (?:that |which )?(.*)", "{}")),
    ((r"(?:start|begin|open)(?:n?ing)? with (.*)", "({})(.*)"),
     (r"(?:end|finish|clos)(?:e|ing)? (?:in|with) (.*)", "(.*)({})"),
     (r"(?:contain|includ)(?:e|ing)? (.*)", ".*({}).*"),
     (r"(?:have|having) (.*) in them", ".*({}).*")),
    ((r"(?:either )?(.*) or (?:else )?(.*)", "({})|({})"),
     (r"(.*) that (?:is followed by|comes before) (.*)", "({}).*({})"),
     (r"(.*) (?:followed by|before|and later) (.*)", "({}).*({})"),
     (r"(?P<b>.*) (?:that comes )?after (?P<a>.*)", "({}).*({})"),
     (r"(?:at least one|one or more|a run) of (.*)", "({})+"),
     (r"(.*) at least once", "({})+"),
     (r"(.*)", "{}")),
    (("a digit", "[0-9]"), ("a capital letter", "[A-Z]"), ("'dog'", "dog")),
)  # fmt: skip


def read(text, kind=0):
    """The regex of a simple sentence, None for one that is not."""
    for pattern, code in READER[kind]:
        if match := re.fullmatch(pattern, text):
            groups = [match["a"], match["b"]] if "<a>" in pattern else match.groups()
            parts = [read(group, kind + 1) for group in groups]
            if None not in parts:
                return code.format(*parts)
    return None


def test_simple_sentences_read_as_their_regex(tiny_language):
    assert read("lines that contain a digit") == ".*([0-9]).*"
    assert read("lines not ending in 'dog' after a digit") == "~((.*)(([0-9]).*(dog)))"
    simple = [text for text in tiny_language if read(text)]
    assert len(simple) > 1000
    assert [t for t in simple if tiny_language[t] != {read(t)}] == []


def test_only_after_turns_the_order_round():
    [groups] = [t[2:] for t in THINGS if t[1] == "(A).*(B)"]
    for phrase in chain(*groups):
        assert (phrase.index("B") < phrase.index("A")) == ("after" in phrase)


def test_alternatives_differ_and_are_not_themselves_alternatives():
    """Neither (a)|(a) nor ((a)|(b))|(c); nor is a repetition repeated, ((a)+){3,}."""
    r = Draw("things")
    for code in {thing(r, 2)[0] for _ in range(1500)}:
        parts = operands(code, "|")
        assert len(set(parts)) == len(parts)
        if len(parts) > 1:
            assert all(len(operands(part[1:-1], "|")) == 1 for part in parts)
        assert not re.search(r"[*+}]\)[*+{]", code)


def test_a_text_has_one_regex(tiny_language):
    assert [text for text, codes in tiny_language.items() if len(codes) != 1] == []


def test_a_text_has_one_regex_across_splits(rows):
    codes = defaultdict(set)
    for row in chain(*rows.values()):
        codes[row["text"]].add(row["code"])
    assert {len(c) for c in codes.values()} == {1}


def test_no_text_and_so_no_pair_occurs_twice(rows):
    for part in rows.values():
        assert len({row["text"] for row in part}) == len(part)


def test_every_python_regex_compiles(rows):
    plain = [row["code"] for part in rows.values() for row in part if is_python(row["code"])]
    assert len(plain) > 3000
    for code in plain:
        re.compile(code)


def test_is_python_means_neither_and_nor_not():
    assert is_python(r".*\b(([0-9])|(dog)){3,}\b.*")
    assert not is_python("((dog)(.*))&((.*)(ring))") and not is_python("~(dog)")


def test_and_and_not_join_whole_lines_only(rows):
    """Inside of a Python rule there is neither & nor ~: (([A-Z])&(dog)).* would match nothing."""
    def check(code):
        for operator in "|&":
            if len(parts := operands(code, operator)) > 1:
                return all(check(part) for part in parts)
        if code.startswith("~") or (code.startswith("(") and not is_python(code)):
            return check(code[code.index("(") + 1 : -1])
        return is_python(code)

    assert all(check(row["code"]) for part in rows.values() for row in part)


def test_text_and_code_name_the_same_atoms(rows):
    """A string, a class or a number stands in the text as often as in the code."""
    numbers = dict(zip(regexes.NUMBERS, "23456789"))
    number = r"\b(?:\d|" + "|".join(numbers) + r")\b"
    for row in rows["train", False][:2000]:
        code, text = row["code"].replace("(.*)", "").replace(".*", ""), row["text"]
        for atom, names in ATOMS:
            said = len(re.findall("|".join(rf"(?<!\w){name}(?!\w)" for name in names), text))
            written = code.count(f"({atom})")
            assert said == written, (atom, row)
        said = [numbers.get(word, word) for word in re.findall(number, text)]
        assert sorted(said) == sorted(re.findall(r"\{(\d),\}", code)), row


def test_rows_are_clean_text(rows):
    """"lines ...", no leftover slot or markup, no doubled spaces, no a/an slip, no glued verb."""
    for row in chain(*rows.values()):
        assert re.fullmatch(r"lines [a-z0-9', -]+", row["text"]), row
        assert not re.search(r"  | ,| $|\ba [aeiou]|\ban [^aeiou]", row["text"]), row
        assert set(row) == {"text", "code"}


def test_verbs_agree_with_their_pronoun(rows):
    """that start ... and end, never that starting; starting ... and ending, never do not ending."""
    verbs = "start|begin|open|end|finish|clos|contain|hav|includ|consist"
    for row in chain(*rows.values()):
        finite = re.search(r"\b(that|which)\b(?! (comes|is))", row["text"])
        gerund = re.search(rf"\b({verbs})\w*ing\b", row["text"])
        assert bool(finite) != bool(gerund), row
        assert ("do not" in row["text"]) == bool(finite and re.search(r"\bnot\b", row["text"])), row


def test_depth_counts_stacked_rules():
    """[0-9] stacks none, ([0-9])+ one, (([0-9])+)(.*) two, ~((([0-9])+)(.*)) three."""
    for code, stacked in (("[0-9]", 0), (".", 0), ("([0-9])+", 1), (".*(dog).*", 1),
                          ("(([0-9])+)(.*)", 2), ("((dog)(.*))&((.*)(ring))", 2),
                          ("~((([0-9])+)(.*))", 3)):  # fmt: skip
        assert depth(code) == stacked


@pytest.mark.parametrize("d", [1, 2, 3])
def test_line_is_as_deep_as_asked(d):
    r = Draw(d)
    assert {depth(line(r, d)[0]) for _ in range(500)} == {d}


@pytest.mark.parametrize("by_depth", [False, True])
def test_splits_share_no_regex(rows, by_depth):
    train, val, test = ({row["code"] for row in rows[s, by_depth]} for s in SPLITS)
    assert not train & val and not train & test and not val & test


@pytest.mark.parametrize("by_depth", [False, True])
def test_a_split_holds_the_same_regexes_whatever_the_seed(rows, by_depth):
    for split in SPLITS:
        for row in rows[split, by_depth] + regex_pairs(split, 40, 99, by_depth):
            assert split_of(row["code"], by_depth) == split


def test_of_all_regexes_8_in_10_are_for_training():
    r = Draw("shares")
    codes = list({line(r, 3)[0] for _ in range(4000)})
    share = {s: sum(split_of(code) == s for code in codes) / len(codes) for s in SPLITS}
    assert share == pytest.approx({"train": 0.8, "val": 0.1, "test": 0.1}, abs=0.03)


def test_every_split_mixes_depths_1_to_3(rows):
    for split in SPLITS:
        depths = [depth(row["code"]) for row in rows[split, False]]
        assert all(depths.count(d) > 0.05 * len(depths) for d in (1, 2, 3))


def test_by_depth_only_the_test_split_stacks_three_rules(rows):
    assert {depth(row["code"]) for row in rows["train", True]} == {1, 2}
    assert {depth(row["code"]) for row in rows["val", True]} == {1, 2}
    assert {depth(row["code"]) for row in rows["test", True]} == {3}


def test_by_depth_no_atom_of_the_test_split_is_new(rows):
    """The parts are known, only the depth is not."""
    for atom, _ in ATOMS:
        assert any(f"({atom})" in row["code"] for row in rows["train", True])


def test_tens_of_thousands_of_regexes_are_in_reach(rows):
    """n draws out of N things repeat about n * n / 2N times, so N is about n * n / 2 repeats."""
    codes = [row["code"] for row in rows["train", False] if depth(row["code"]) == 3]
    repeats = len(codes) - len(set(codes))
    assert len(codes) ** 2 / 2 / max(repeats, 1) > 50_000


@pytest.mark.parametrize("by_depth", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_more_rows_begin_with_the_same_rows_as_fewer(rows, split, by_depth):
    for m in (0, 1, 57, 120):
        assert regex_pairs(split, m, by_depth, by_depth) == rows[split, by_depth][:m]


def test_another_seed_gives_other_rows():
    rows, others = ({r["text"] for r in regex_pairs("train", 300, seed=s)} for s in (3, 4))
    assert len(rows & others) < 60


def test_rows_do_not_depend_on_the_hash_seed():
    """Nothing rests on hash() or on the order of a set: a fresh Python gives the same rows."""
    code = "from generators.regexes import regex_pairs as p; print(p('val', 30, seed=1))"
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                           capture_output=True, env={**os.environ, "PYTHONHASHSEED": h}).stdout
            for h in ("1", "2")]  # fmt: skip
    assert runs[0] == runs[1] == f"{regex_pairs('val', 30, seed=1)}\n"


def test_unknown_split_and_negative_n_rows_are_named():
    with pytest.raises(ValueError, match=r"'valid'.*train, val, test"):
        regex_pairs("valid", 3)
    with pytest.raises(ValueError, match="-1"):
        regex_pairs("train", -1)


def test_more_rows_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(regexes, "line", lambda r, d: ("(dog)+", f"lines {r.int(1, 3)}"))
    split = split_of("(dog)+")
    assert len(regex_pairs(split, 3)) == 3
    with pytest.raises(ValueError, match="n_rows is 4: no more than 3"):
        regex_pairs(split, 4)


def test_only_misses_in_a_row_count(monkeypatch):
    """Nine of ten draws are not val's; that is no reason to give up."""
    rows = regex_pairs("val", 150)
    monkeypatch.setattr(regexes, "PATIENCE", 200)
    assert regex_pairs("val", 150) == rows
