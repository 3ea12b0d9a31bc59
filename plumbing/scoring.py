"""What counts as a right answer, and the number that an answer ends in.

    final_number(text)         the number after the last ####, exactly, or None
    holds_number(text, of)     does the number that `of` ends in stand somewhere in a text?
    scoring_of(config, texts)  number | final | string | regex, decided on answers of train

A number: 5, +5, -5, − 5, 1,234.50, .5, 3/4, 1e3, $5, 5 €, -$7, \\boxed{5}, $5$; after it, on its
line, only a unit (apples, %, °C, km/h) or a closing period. 5 * 3, 10:45 and 7,2 are none, nor are
5 million and 5 pm, which are other numbers than 5.
"""

import re
from decimal import Decimal
from fractions import Fraction

from config import Config, fail

CURRENCY = "[$£¥¢\u20a0-\u20cf]"
DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"  # commas stand between thousands only
NO_UNIT = r"(?:(?:dozen|hundred|thousand|(?:m|b|tr)illion)s?|k|mio|bn|[ap]\.?m)\b"
WORD = r"[^\W\d_¹²³¼½¾][^\W\d_]*"  # ² goes on with a unit, and begins none
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*{CURRENCY}?\s*(?P<late_sign>[+-]?)\s*"
    rf"(?P<digits>{DIGITS}/{DIGITS}|(?:{DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][+\-]?\d{{1,3}})?)"
    rf"(?!\s*(?i:{NO_UNIT}))"
    rf"\s*(?:(?:[%‰°]|{CURRENCY})/?)?\s*(?:{WORD}(?:(?:\.? |['’/·-]){WORD})*)?\s*\.?\s*"
)


def number_after_mark(text: str) -> re.Match | None:
    """The parts of the number after the last ####, out of what LaTeX wraps it in."""
    _, mark, after = text.rpartition("####")
    [line] = after.strip().splitlines()[:1] or [""]
    line = " ".join(line.split()).replace("\\$", "$").replace("\\%", "%").replace("−", "-")
    for wrapped in (r"^\$([^$]+)\$", r"^\\boxed\{([^{}]+)\}", r"^\$([^$]+)\$"):
        line = re.sub(wrapped, r"\1", line)
    found = NUMBER.fullmatch(line) if mark else None
    return found if found and not (found["sign"] and found["late_sign"]) else None


def final_number(text: str) -> Fraction | None:
    """The number after the last ####; None if there is none."""
    found = number_after_mark(text)
    if not found:
        return None
    above, _, below = found["digits"].replace(",", "").partition("/")
    above, below = Fraction(Decimal(above)), Fraction(Decimal(below or 1))
    sign = -1 if "-" in (found["sign"], found["late_sign"]) else 1
    return sign * above / below if below else None


def holds_number(text: str, of: str) -> bool:
    """Does the number that `of` ends in stand somewhere in `text`, commas aside? Not as a part of
    another one: 72 is not in 172, nor 5 in -5, 1/5, 7,5, 5:30 or 5e3."""
    found = number_after_mark(of)
    if not found:
        return False
    minus = "-" if "-" in (found["sign"], found["late_sign"]) else ""
    number = re.escape(minus + found["digits"].replace(",", ""))
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.replace("−", "-"))
    before = r"(?<![\d.])(?<!\d[,:/])(?<!(?<![\w)])-)"
    return bool(re.search(rf"{before}{number}(?![\d/]|[.,:]\d|[eE][+-]?\d)", text))


def with_mark(text: str, scoring: str) -> str:
    """A text as `final_number` reads it: for scoring "final" all of it is the number."""
    return f"####{text}" if scoring == "final" else text


def scoring_of(config: Config, answers: list[str]) -> dict[str, str]:
    """How answers are scored and what decided it, as provenance; `answers` are some of train's, as
    they are trained on. No file's name decides."""
    numeric = "final" if config.answer_view == "final" else "number"
    if config.score != "auto":
        scoring, by = config.score, f"score={config.score}"
    elif config.views in ("facts", "split"):
        scoring, by = "string", f"views={config.views}"
    elif config.dataset in ("regex", "regex_depth"):
        scoring, by = "regex", f"dataset={config.dataset}"
    else:
        n = sum(final_number(with_mark(text, numeric)) is not None for text in answers)
        scoring = numeric if n == len(answers) else "string"
        holds = "a number follows the #### of" if numeric == "number" else "a number is all of"
        by = f"{holds} {n} of {len(answers)} answers of train"
    if scoring in ("number", "final") and (n := refuse_no_number(scoring, answers, "train")):
        by += f"; {n} of {len(answers)} answers of train hold none, and are never right"
    return {"scoring": scoring, "scoring_by": by}


def refuse_no_number(scoring: str, references: list[str], where: str) -> int:
    """How many references hold no number; exits if none does."""
    n = sum(final_number(with_mark(text, scoring)) is None for text in references)
    if n == len(references):
        after = " after ####" if scoring == "number" else " and nothing else"
        fail(f"score={scoring}: none of {n} answers of {where} holds a number{after}, so no answer "
             "could be right; --score=string compares the very text")
    return n
