r"""
A generator of paired views: descriptions of lines and the regexes that match them.

    lines starting with three or more of a vowel       (([AEIOUaeiou]){3,})(.*)
    lines that contain 'dog' but do not end in a digit (.*(dog).*)&(~((.*)([0-9])))

The language is that of NL-RX-Synth (Locascio et al., arXiv 1608.03000): &, | and ~ are and, or
and not, a regex has to match the whole line, "N or more times" means in a row. Two things are
stricter than there. No text has two regexes: parts of parts are so worded that they stay in one
piece, since exact match would punish a right answer to a text that can be read two ways. And a
regex means what its text says: & and ~ join and negate whole lines only, because in the midst of
a line ([A-Z])&(dog) matches nothing, and .*(~(dog)).* everything.
"""

import functools
import zlib

from generators.word_problems import Draw

# ---- the grammar -----------------------------------------------------------------------------
# A regex with slots A, B, C and the number N, then its phrasings. Slots of the code stand in
# parentheses: how deeply these are nested is how many rules are stacked, see depth().

ATOMS = (
    ("[AEIOUaeiou]", ("a vowel", "any vowel")),
    ("[A-Z]", ("a capital letter", "an upper-case letter")),
    ("[a-z]", ("a lower-case letter", "a small letter")),
    ("[A-Za-z]", ("a letter", "any letter")),
    ("[0-9]", ("a number", "a digit")),
    (".", ("a character", "any character")),
    *((s, (f"the string '{s}'", f"the text '{s}'", f"'{s}'"))
      for s in ("dog", "truck", "ring", "lake", "stone", "river", "apple", "moon")),
)  # fmt: skip

# Noun phrases: family, regex, phrasings on their own, phrasings as a part of something else.
# The latter cannot be torn apart: in "either a vowel or 'dog' before a digit" only the vowel or
# 'dog' can be meant, because 'dog' and the digit would be "'dog' that comes before a digit".
THINGS = (
    ("or", "(A)|(B)",
     ("A or B", "either A or B", "A or else B"),
     ("either A or B", "one of A or B", "any of A or B")),
    ("or", "(A)|(B)|(C)",
     ("A, B, or C", "either A, B, or C", "any of A, B, or C"),
     ("either A, B, or C", "one of A, B, or C", "any of A, B, or C")),
    ("before", "(A).*(B)",
     ("A before B", "A followed by B", "B after A", "A and later B"),
     ("A that comes before B", "A that is followed by B", "B that comes after A")),
    ("repeat", "(A)*",
     ("A, zero or more times", "A zero or more times", "A any number of times"),
     ("zero or more of A", "none or more of A", "any number of A")),
    ("repeat", "(A)+",
     ("A at least once", "A, one or more times", "A once or more"),
     ("one or more of A", "at least one of A", "a run of A")),
    ("repeat", "(A){N,}",
     ("A, N or more times", "A at least N times", "A repeated N or more times"),
     ("N or more of A", "at least N of A", "a run of N or more of A")),
)  # fmt: skip

# Verb phrases; the verb in both forms, "that start" and "starting".
PREDICATES = (
    ("A", ("consist/consisting of A", "contain/containing only A", "have/having nothing but A")),
    ("(A)(.*)", ("start/starting with A", "begin/beginning with A", "open/opening with A")),
    ("(.*)(A)", ("end/ending in A", "finish/finishing with A", "close/closing with A")),
    (".*(A).*", ("contain/containing A", "have/having A in them", "include/including A")),
    (r".*\b(A)\b.*", ("contain/containing A as a separate word",
                      "have/having A between word boundaries",
                      "include/including A with a word boundary on either side")),
    ("(.*(A).*)&(.*(B).*)", ("contain/containing both A and B", "have/having A and B in them",
                             "include/including A as well as B")),
)  # fmt: skip

# Whole sentences; the slots are verb phrases.
LINES = (
    ("A", ("lines that A",)),
    ("~(A)", ("lines that not A", "lines that never A", "lines except those that A")),
    ("(A)&(B)", ("lines that A and B", "lines that both A and B", "lines that A and also B")),
    ("(A)|(B)", ("lines that A or B", "lines that either A or B", "lines that A or else B")),
    ("(A)&(~(B))", ("lines that A but not B", "lines that A and not B",
                    "lines that A yet never B")),
    ("(A)&(B)&(C)", ("lines that A, B, and C", "lines that A, B, and also C",
                     "lines that at the same time A, B, and C")),
    ("(A)|(B)|(C)", ("lines that A, B, or C", "lines that either A, B, or C",
                     "lines that A, B, or else C")),
    ("~((A)&(B))", ("lines except those that A and B", "lines other than those that both A and B",
                    "lines but for those that A and B")),
    ("~((A)|(B))", ("lines except those that A or B", "lines other than those that either A or B",
                    "lines that neither A nor B")),
)  # fmt: skip

SPLITS = ("train", "val", "test")
PATIENCE = 20_000  # draws in a row without a new row, about a second; val is hit 1 time in 10
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")


@functools.lru_cache(1000)
def depth(code: str) -> int:
    """How many rules of the grammar are stacked in a regex: its deepest level of parentheses.
    0 for [0-9], 1 for ([0-9])(.*), 2 for (([0-9])+)(.*)."""
    level = deepest = 0
    for char in code:
        level += (char == "(") - (char == ")")
        deepest = max(deepest, level)
    return deepest


# ---- growing a row ---------------------------------------------------------------------------
# thing, predicate and line return (regex, text), exactly d rules deep.


def fill(r, rule, phrase, grow, least, most):
    """A rule and its phrasing, with grow(r, depth) in the slots: parts all different, none less
    than `least` rules deep and at least one of them `most`."""
    slots = [slot for slot in "ABC" if slot in rule]
    while True:
        depths = [r.int(least, most) for _ in slots]
        depths[r.int(0, len(slots) - 1)] = most
        codes, texts = zip(*(grow(r, d) for d in depths))
        if len(set(codes)) == len(slots):
            break
    n = r.int(2, 9)
    codes = {"N": str(n), **dict(zip(slots, codes))}
    texts = {"N": r.pick((str(n), NUMBERS[n - 2])), **dict(zip(slots, texts))}
    return rule.translate(str.maketrans(codes)), phrase.translate(str.maketrans(texts))


def thing(r, d, parent=None):
    """A noun phrase; parent is the family of the rule it is a part of, None right after a verb.
    No rule is a direct part of its own family: ((a)|(b))|(c) is (a)|(b)|(c)."""
    if d == 0:
        rule, phrases = r.pick(ATOMS)
        return rule, r.pick(phrases)
    family, rule, alone, inside = r.pick([t for t in THINGS if t[0] != parent])
    phrase = r.pick(inside if parent else alone)
    return fill(r, rule, phrase, lambda r, d: thing(r, d, family), 0, d - 1)


def predicate(r, d, form):
    """A verb phrase; form 0 says "start with", form 1 "starting with". Its things are at most two
    rules deep, because the phrasings inside other things stay in one piece around atoms only."""
    rule, phrases = r.pick([p for p in PREDICATES if 0 <= d - depth(p[0]) <= 2])
    verb, rest = r.pick(phrases).split(" ", 1)
    phrase = verb.split("/")[form] + " " + rest
    parent = "both" if "B" in rule else None
    return fill(r, rule, phrase, lambda r, d: thing(r, d, parent), 0, d - depth(rule))


def line(r, d):
    """A sentence, more than half of them with a single verb."""
    rule, phrases = LINES[0] if r.random() < 0.5 else r.pick([s for s in LINES if depth(s[0]) < d])
    pronoun, phrase = r.pick(("that ", "which ", "")), r.pick(phrases)
    if pronoun:  # "that do not start", else "not starting"
        phrase = phrase.replace("not ", "do not ")
    phrase, form = phrase.replace("that ", pronoun), int(not pronoun)
    return fill(r, rule, phrase, lambda r, d: predicate(r, d, form), 1, d - depth(rule))


def split_of(code: str, by_depth: bool = False) -> str:
    """The split that a regex belongs to, from its text alone: see regex_pairs."""
    bucket = zlib.crc32(code.encode()) % 10
    if by_depth:
        return "test" if depth(code) == 3 else "val" if bucket == 0 else "train"
    return {0: "val", 1: "test"}.get(bucket, "train")


def regex_pairs(
    split: str, n_rows: int, seed: int = 0, by_depth: bool = False
) -> list[dict[str, str]]:
    """n_rows rows {"text", "code"} of a split: "train", "val" or "test".

    "lines that ..." and the regex for such lines; no text occurs twice. Codes without & and ~,
    which Python's re takes for plain characters, are regexes of Python too. Splits share no regex:
    of all regexes 8 in 10 are train's, 1 in 10 is val's and 1 in 10 test's. With by_depth, test has
    all those that stack three rules, and train (9 in 10) and val those that stack one or two: the
    parts are known, the whole is deeper.

    The same arguments give the same rows on every machine, and more rows begin with the same
    rows as fewer. Raises ValueError for an unknown split, a negative n_rows, or more rows than
    the grammar yields (there are millions)."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: must be one of {', '.join(SPLITS)}")
    if n_rows < 0:
        raise ValueError(f"n_rows is {n_rows}: must be 0 or more")
    r = Draw(f"regexes, {split}, {seed}, {by_depth}")
    depths = (1, 2, 2, 3, 3) if not by_depth else (3,) if split == "test" else (1, 2, 2)
    rows, seen, misses = [], set(), 0
    while len(rows) < n_rows:
        code, text = line(r, r.pick(depths))
        if split_of(code, by_depth) == split and text not in seen:
            seen.add(text)
            rows.append({"text": text, "code": code})
            misses = 0
        elif (misses := misses + 1) == PATIENCE:
            raise ValueError(f"n_rows is {n_rows}: no more than {len(rows)} different rows found")
    return rows


def regex_rows(name: str) -> dict[str, list[dict[str, str]]]:
    """The data set "regex", or "regex_depth", whose test stacks more rules than train."""
    sizes = {"train": 8000, "val": 512, "test": 1000}
    return {split: regex_pairs(split, n, by_depth=name == "regex_depth")
            for split, n in sizes.items()}  # fmt: skip
