r"""Claims about generators/regex_equivalence.py, held against Python's re and a matcher of trees
written here, which knows nothing of derivatives or of the parser: random trees are printed as
regexes."""

import re
from itertools import pairwise, product

import pytest
from test_regexes import is_python

from generators.regex_equivalence import BUDGET, difference, equivalent
from generators.regexes import regex_pairs
from generators.word_problems import Draw

EQUIVALENT = (
    ("dog", "dog"), ("(dog)", "dog"), ("((d)(og))", "d(og)"), (".*(dog).*", ".*dog.*"),
    ("A{1,}", "A+"), ("(A)*", "A*"), ("A{0,}", "A*"), ("A?", "A{0,1}"), ("A{3}", "AAA"),
    ("A{2,4}", "AAA?A?"), ("(A{2}){3}", "A{6}"), ("(A*){3,}", "A*"), ("A*A", "A+"), ("A**", "A*"),
    ("(a|b)*", "(a*b*)*"), ("(ab)*a", "a(ba)*"), ("a(b|c)", "ab|ac"), ("aA{0}", "a"),
    ("[A-Za-z]", "[a-z]|[A-Z]"), ("[AEIOUaeiou]", "[uoieaUOIEA]"), ("[A-Za-z]&[a-z]", "[a-z]"),
    ("[0-9]&[A-Z]", "~(.*)"), ("([A-Z])&(dog)", "(dog)&([0-9])"), (".|dog|ring", "dog|.|ring"),
    (".*[A-Z].*|.*", ".*"), ("(.*)(.*)", ".*"), ("(.+)?", ".*"), ("(.*)*", ".*"),
    # order, absorption, distribution, De Morgan
    ("(dog)|(ring)|(lake)", "(lake)|((ring)|(dog))"), ("(.*a)&(b.*)&(.*c.*)", "(b.*)&(.*c.*a)"),
    ("a|(a&b)", "a"), ("(.*a)&((b.*)|(c.*))", "(.*a&b.*)|(.*a&c.*)"), ("~(~(dog))", "dog"),
    ("~((dog)|(ring))", "(~(dog))&(~(ring))"), ("~((.*a)&(b.*))", "(~(.*a))|(~(b.*))"),
    ("(dog.*)|(~(dog.*))", ".*"), ("~(.*[0-9].*)&.+", "(.&~([0-9]))+"), ("~(.{0,4})", ".{5,}"),
    ("(.*dog.*)&(.*ring.*)", ".*(dog.*ring|ring.*dog).*|.*(dog&ring).*"),
    # precedence: ~, then repetition, then concatenation, then &, then |
    ("~ab", "(~(a))b"), ("~a*", "(~(a))*"), ("~a*", "~(a)"), ("ab*", "a(b*)"), ("a.&.b|c", "ab|c"),
    ("c|a.&.b", "ab|c"), (".*(A)|(B).*", "(.*A)|(B.*)"), ("~~a", "a"), ("~a&b", "b"),
    # boundaries: of the line, between a word character and another, and nowhere else
    (r"\b(dog)\b", "dog"), (r"\bdog", r"dog\b"), (r"\b\bdog", r"\bdog"), (r"(\b)*dog", "dog"),
    (r"\b", "~(.*)"), (r"a\bb", r"[0-9]&[A-Z]"), (r" \b ", r"\b "), (r"a\b ", "a "),
    (r"_\b-", "_-"),
    (r".*\b(dog)\b.*", r"(.*\b)?dog(\b.*)?"), (r"\ba&b\b", r"(\ba)&(b\b)"), (r"\b*a", "a"),
    (r"(\b(dog)\b){2,}", r"[0-9]&[A-Z]"), (r"(\bdog\b ?)+", r"dog( dog)* ?"),
    (r"a~(\b)b", "ab|a.+b"), (r"a~(\b) ", "a.+ "), (r"(\b|a){3}", "a{1,3}"),
)  # fmt: skip

DIFFERENT = (  # and a line that only one of them matches, as short as there is
    ("dog", "ring", 3), (".*dog.*", "dog.*", 4), ("A*", "A+", 0), ("A{2,}", "A+", 1),
    ("A{2,7}", "A{2,8}", 8), ("A{1,1}", "A{1,2}", 2), ("[A-Z]", "[A-Za-z]", 1), ("A", "a", 1),
    (".", "[A-Za-z0-9]", 1), ("~(dog)", ".*dog.*", 0), ("~(a)b", "~(ab)", 0), ("~a*", "~(a*)", 0),
    ("(.*dog.*)&(.*ring.*)", "(.*dog.*)|(.*ring.*)", 3), ("a|bc", "(a|b)c", 1), ("ab*", "(ab)*", 0),
    ("a&b|c", "a&(b|c)", 1), ("(.*dog.*){6,}", "(.*dog.*){7,}", 18), (".*a.{5}", ".*a.{4}", 5),
    (r".*\b(dog)\b.*", ".*(dog).*", 4), (r"\b.*\b", ".*", 0), (r"a.*\bb", "a.*b", 2),
    (r".*\b.*", ".*([A-Za-z0-9]|_).*", 1), (r".*\b.*", ".+", 1),  # é is of a word, a space not
    (r"\b(.*)\b", "([A-Za-z0-9].*[A-Za-z0-9])|[A-Za-z0-9]", 1), (r"a\b.*", "a.*", 2),
    (r"(~(\b))a", "(~(.*))a", 2), (r"\b", "b", 1), (r"~(\bdog\b)", r"\b~(dog)\b", 0),
)  # fmt: skip

UNPARSED = ("", "(", ")", "()", "(dog", "dog)", ")dog(", "*", "+a", "a|", "|a", "a||b", "a&", "&a",
            "~", "a~", "(a|)b", "{2}", "a{}", "a{,2}", "a{2", "a{3,2}", "a{-1}", "a{1,2,3}", "a}",
            "[A-Z", "A-Z]", "[]", "[Z-A]", "[^a]", "[[a]]", "\\", r"\d", r"\B", r"\w+", r"\\b",
            "^dog$", "#", "@", '"dog"', "<1-9>", "dög", "a\n", "a\tb", "\0",
            "a{" + "9" * 5000 + "}", "(" * 5000 + "a" + ")" * 5000)  # fmt: skip


@pytest.mark.parametrize("a, b", EQUIVALENT)
def test_other_spellings_are_equivalent(a, b):
    assert equivalent(a, b) is True
    assert equivalent(b, a) is True


@pytest.mark.parametrize("a, b, length", DIFFERENT)
def test_other_meanings_differ_by_a_shortest_line(a, b, length):
    assert equivalent(a, b) is False
    assert equivalent(b, a) is False
    assert len(difference(a, b)) == length
    if is_python(a) and is_python(b):
        line = difference(a, b)
        assert bool(re.fullmatch(a, line)) != bool(re.fullmatch(b, line))


@pytest.mark.parametrize("text", UNPARSED)
def test_what_is_no_regex_is_equivalent_to_nothing(text):
    assert equivalent(text, "dog") is None
    assert equivalent("dog", text) is None
    assert equivalent(text, text) is None


# ---- random regexes --------------------------------------------------------------------------
# Trees: ("|", a, b), ("&", a, b), (",", a, b) one after the other, ("~", a), ("{", a, least, most),
# ("b",) a boundary and (".", atom).

LINES = ["".join(chars) for n in range(5) for chars in product("aB0-", repeat=n)]


def tree(r, kinds, atoms, d):
    """A random tree of some kinds, at most d deep."""
    kind = r.pick(kinds) if d else "."
    if kind in "b.":
        return ("b",) if kind == "b" else (".", r.pick(atoms))
    parts = [tree(r, kinds, atoms, d - 1) for _ in range(2 if kind in "|&," else 1)]
    if kind == "{":
        least = r.int(0, 3)
        parts += least, r.pick((None, max(1, least + r.int(0, 2))))
    return (kind, *parts)


def written(t, around=0):
    """A tree as a regex, with no parentheses but those that precedence asks for: | 1, & 2, one
    after the other 3, repetition 4, ~ 5; around is the precedence of what it is a part of."""
    kind, *parts = t
    level = 5 if kind in "b." else "|&,{~".index(kind) + 1
    if kind == "{":
        part, least, most = parts
        short = {(0, None): "*", (1, None): "+", (0, 1): "?", (least, least): f"{{{least}}}"}
        bounds = f"{{{least},{'' if most is None else most}}}"
        text = written(part, 4) + short.get((least, most), bounds)
    elif kind == "~":
        text = "~" + written(parts[0], 5)
    elif kind in "|&,":
        text = kind.replace(",", "").join(written(part, level) for part in parts)
    else:
        text = r"\b" if kind == "b" else parts[0]
    odd_in_python = around == 4 and kind in "{b"  # a*+ and \b* are something else there
    return f"({text})" if level < around or odd_in_python else text


def ends(t, line, start):
    """The places where a part of the line that starts at `start` and matches the tree can end."""
    kind, *parts = t
    if kind == ".":
        return {start + 1} if re.match(parts[0], line[start:]) else set()
    if kind == "b":
        before, after = (re.match(r"\w", c) for c in (line[:start][-1:], line[start:]))
        return {start} if bool(before) != bool(after) else set()
    if kind == "~":
        return set(range(start, len(line) + 1)) - ends(parts[0], line, start)
    if kind == "{":
        part, least, most = parts
        rounds, here, found = 0, {start}, set()
        while (most is None or rounds <= most) and not (rounds >= least and here <= found):
            found |= here if rounds >= least else set()
            here = {end for place in here for end in ends(part, line, place)}
            rounds += 1
        return found
    left = ends(parts[0], line, start)
    if kind == ",":
        return {end for place in left for end in ends(parts[1], line, place)}
    right = ends(parts[1], line, start)
    return left | right if kind == "|" else left & right


def check(s, t, matches):
    """True means that no short line tells two trees apart, False that the given line does."""
    a, b = written(s), written(t)
    assert equivalent(a, b) is equivalent(b, a) is not None, (a, b)
    line = difference(a, b)
    if line is None:
        assert [w for w in LINES if matches(s, w) != matches(t, w)] == [], (a, b)
    else:
        assert matches(s, line) != matches(t, line), (a, b, line)
    return line is None


@pytest.mark.parametrize("kinds", ["|,{.", "|,{b."])
@pytest.mark.parametrize("atoms, d", [(("a", ".", "[a-z]"), 2), (("a", "B", "0", "-"), 3),
                                      (("[a-z]", "[A-Z]", "[A-Za-z]", "."), 4)])  # fmt: skip
def test_without_and_and_not_python_agrees(kinds, atoms, d):
    r = Draw(f"python {kinds} {d}")
    pairs = [[tree(r, kinds, atoms, d) for _ in range(2)] for _ in range(200)]
    same = [check(s, t, lambda t, line: bool(re.fullmatch(written(t), line))) for s, t in pairs]
    assert True in same and False in same


@pytest.mark.parametrize("kinds", ["|&,~{.", "|&,~{b."])
@pytest.mark.parametrize("atoms, d", [(("a", "."), 2), (("a", "B", "-", "[A-Za-z]"), 3)])
def test_with_and_and_not_a_plain_matcher_agrees(kinds, atoms, d):
    r = Draw(f"{kinds} {d}")
    pairs = [[tree(r, kinds, atoms, d) for _ in range(2)] for _ in range(300)]
    same = [check(s, t, lambda t, line: len(line) in ends(t, line, 0)) for s, t in pairs]
    assert True in same and False in same


def test_laws_hold_for_random_regexes():
    """De Morgan, distribution, absorption and unrolling, by which no two are simplified alike."""
    r = Draw("laws")
    for _ in range(100):
        a, b, c = (f"({written(tree(r, '|&,~{b.', ('a', 'B', '.', '[A-Z]'), 2))})" for _ in "abc")
        laws = ((f"~({a}|{b})", f"~{a}&~{b}"), (f"~({a}&{b})", f"~{a}|~{b}"),
                (f"{a}&({b}|{c})", f"{b}&{a}|{a}&{c}"), (f"{a}|{a}&{b}", a),
                (f"({a}|{b}){c}", f"{b}{c}|{a}{c}"), (f"{c}({a}|{b})", f"{c}{a}|{c}{b}"),
                (f"{a}*", f"({a}{a})*{a}?"), (f"({a}|{b})*", f"({a}*{b}*)*"),
                (f"{a}{{2,}}", f"{a}{a}+"), (f"({a}{b})*{a}", f"{a}({b}{a})*"))  # fmt: skip
        for left, right in laws:
            assert equivalent(left, right) is True, (left, right)


# ---- what a model may write ------------------------------------------------------------------


@pytest.fixture(scope="module")
def codes():
    return sorted({row["code"] for row in regex_pairs("train", 250)})


def test_generated_regexes_are_equivalent_to_themselves(codes):
    """Also where the search has to show it: a|(a&b) is a."""
    for code in codes:
        assert equivalent(code, code) is True
        assert equivalent(f"({code})|(({code})&(.*ring.*))", code) is True, code


def test_generated_regexes_differ_where_python_says_so(codes):
    codes = [code for code in codes if is_python(code)]
    for a, b in pairwise(codes):
        line = difference(a, b)
        assert line is None or bool(re.fullmatch(a, line)) != bool(re.fullmatch(b, line)), (a, b)
        assert (line is None) is equivalent(b, a)


def test_nothing_hangs_or_raises():
    """Any 250 characters get an answer, within BUDGET; parentheses nest as deep as they like."""
    r = Draw("noise")
    pieces = (*"(((()))))||&&~*+?..azAZ09 '^", "[a-z]", "[A-Z]", r"\b", ".*", "{2}", "{7,}", "dog")
    noise = ["".join(r.pick(pieces) for _ in range(r.int(1, 250)))[:250] for _ in range(300)]
    nested = [unit * 80 for unit in ("(", ")", "~", "~(", "a?", "(a", "(~", "a{9}", "a*b|", r"\b")]
    nested += ["(" * 120 + "a" + ")" * 120, "~(" * 80 + "a" + ")" * 80, "a" + "?+{2}" * 40,
               "(" * 60 + "a" + "&.*){7,}" * 25, "(" * 60 + "a" + ")*b|c" * 40]  # fmt: skip
    heavy = ["(.*a.{9}){9}", "a{99999}", "(.{9}){9}{9}{9}{9}{9}", "(.|..|...){99}&(.*a.{5}.*){99}",
             "~(.*a~(.*b~(.*c~(.*d~(.*e.*).*).*).*).*)", "abcdefghijklmnopqrst" * 12]  # fmt: skip
    answers = [equivalent(a, b) for texts in (noise, nested, heavy) for a in texts
               for b in ("dog", f"({a})(.*a.*)?")]  # fmt: skip
    assert set(answers) == {True, False, None}
    assert equivalent("(" * 120 + "a" + ")" * 120, "a") is equivalent("~" * 240 + "a", "a") is True


def test_what_takes_too_long_is_undecided():
    """Which of the last 30 characters are capital letters: 2 ** 30 states."""
    a, b = ".*[A-Z].{29}", "(.*[A-Z].{14}.{15})"
    assert equivalent(a, b) is equivalent(b, a) is None
    with pytest.raises(ValueError, match=f"undecided after {BUDGET} steps"):
        difference(a, b)
    assert equivalent(a, a) is equivalent(a, f"({a})") is True
