r"""
Do two regexes match the same lines? For scoring a model's regex, which can be right in another
spelling than the reference.

    equivalent(".*(dog).*", ".*dog.*")                      True
    equivalent("~((dog)|(ring))", "(~(dog))&(~(ring))")     True, De Morgan
    equivalent(r".*\b(dog)\b.*", ".*dog.*")                 False: "hotdog"
    equivalent("(dog", "dog")                               None: the first is no regex

The language is that of NL-RX (Locascio et al., arXiv 1608.03000) and binds as that of
dk.brics.automaton, from which it has & and ~. From the loosest: | or, & and, concatenation, the
repetitions * + ? {n} {n,} {n,m}, ~ not. So ~a*b is ((~a)*)b, and \ba&b\b is (\ba)&(b\b), as many
rows of NL-RX have it. No operand is empty. What means something to Python or dk.brics but does
not occur in NL-RX (^ $ # @ " < > [^a] and any escape but \b) does not parse, nor does what is not
printable ASCII.

Equivalent means: the same lines match as a whole, as in re.fullmatch, a line being any Unicode
string without a newline. \b is the boundary of Python's re, a place in the line with a word
character (letter, digit or _) on exactly one side. It stays that inside & and ~, which speak of a
part of the line: a&b are the parts that match both, ~a those that do not match a. A boundary at
the end of such a part depends on what comes after it in the line.

This is not quite the "DFA-equal" of the paper. Its code hands both regexes unchanged to a Java
program whose source is not published, and to dk.brics \b is not a boundary but the letter b,
quoted.

Method: the derivative of a regex by a character c matches what may follow c. Two regexes differ
if some line leads to derivatives of which only one matches the empty rest (Brzozowski, J. ACM
1964; Owens, Reppy and Turon, JFP 2009). Complement and intersection cost nothing there. For \b
the derivative is taken at a place in the line: whether that is a boundary is known from the
characters before and after it (as in Moseley et al., PLDI 2023).

Why not a library: greenery, interegular, pyformlang and automata-lib read neither & with ~ nor
\b, and greenery takes 0.4 s for a pair without them; regexbench reads all of it, agrees on 600
pairs of NL-RX, and takes 0.4 s where this takes 1.4 ms.
"""

import re
from functools import reduce
from operator import and_, or_

BUDGET = 300_000  # steps for one pair of regexes, about a microsecond each
TOKEN = re.compile(r'\[[ -Z_-~]+\]|\{\d+(?:,\d*)?\}|\\b|(?![][{}\\^$#@"<>])[ -~]')
BINDING = {"|": 1, "&": 2, "row": 3, "repeat": 4, "~": 5}
# No regex can name a character beyond ASCII: é stands for those of words, ^ for the others.
CHARACTERS = [*map(chr, range(32, 127)), "é"]
WORD = {c for c in CHARACTERS if c.isalnum() or c == "_"}


def tokenize(text: str) -> list[str]:
    tokens = TOKEN.findall(text)
    if "".join(tokens) != text:
        raise ValueError(f"{text!r} has characters that are not in the language")
    return tokens


def characters(token: str) -> set[str]:
    """Those that . [A-Za-z] or a plain character matches; none for an operator."""
    if token[0] == "[":
        runs = re.findall("(.)-(.)|(.)", token[1:-1])
        if any(a > z for a, z, _ in runs):
            raise ValueError(f"{token} has a range that runs backwards")
        return {c for a, z, one in runs for c in CHARACTERS if c == one or a <= c <= z}
    return set(CHARACTERS) if token == "." else {token} & set(CHARACTERS) - set("()|&~*+?")


class Regexes:
    r"""The regexes of one comparison, each a number; the same regex always has the same.

    nodes[number] is ("set", bits of the groups of characters), ("edge",) for \b, ("row", *regexes)
    one after the other, ("or", *regexes), ("not", regex) or ("repeat", regex, least, most or
    None); a&b is ~(~a|~b). They are simplified enough for a regex to have finitely many
    derivatives. empties[number] has two bits: does the regex match the empty part at a place in
    a line that is no boundary, and at one that is?"""

    def __init__(self, n_groups: int):
        self.nodes, self.numbers, self.empties, self.derivatives = [], {}, [], {}
        self.left = BUDGET
        self.nothing, self.empty = self.node("or"), self.node("row")  # no line; the empty line
        self.dot, self.all = self.node("set", (1 << n_groups) - 1), self.negate(self.nothing)

    def spend(self, steps: int):
        self.left -= steps
        if self.left < 0:
            raise ValueError(f"undecided after {BUDGET} steps")

    def node(self, *node) -> int:
        self.spend(len(node))
        if node not in self.numbers:
            kind, *parts = node
            if kind in ("set", "edge"):
                empty = 0b10 if kind == "edge" else 0
            elif kind == "repeat":
                empty = self.empties[parts[0]] if parts[1] else 0b11
            elif kind == "not":
                empty = 0b11 ^ self.empties[parts[0]]
            else:
                both, none = (and_, 0b11) if kind == "row" else (or_, 0)
                empty = reduce(both, (self.empties[part] for part in parts), none)
            self.numbers[node] = len(self.nodes)
            self.nodes.append(node)
            self.empties.append(empty)
        return self.numbers[node]

    def parts(self, kind: str, a: int) -> tuple:
        return self.nodes[a][1:] if self.nodes[a][0] == kind else (a,)

    def negate(self, a: int) -> int:
        return self.nodes[a][1] if self.nodes[a][0] == "not" else self.node("not", a)

    def either(self, *regexes: int) -> int:
        parts = sorted({part for a in regexes for part in self.parts("or", a)})
        self.spend(len(regexes))
        if self.all in parts:
            return self.all
        return parts[0] if len(parts) == 1 else self.node("or", *parts)

    def both(self, a: int, b: int) -> int:
        return self.negate(self.either(self.negate(a), self.negate(b)))

    def row(self, first: int, *rest: int) -> int:
        """One after the other; (a|b)c becomes (ac)|(bc), so that ways which meet are one again."""
        ways = self.parts("or", first)
        if len(ways) != 1:
            return self.either(*(self.row(way, *rest) for way in ways))
        row = [part for a in (first, *rest) for part in self.parts("row", a)]
        return row[0] if len(row) == 1 else self.node("row", *row)

    def repeat(self, a: int, least: int, most: int | None) -> int:
        if most is not None and most < least:
            raise ValueError(f"{{{least},{most}}} runs backwards")
        if most == 0:
            return self.empty
        if a == self.all or (a, least, most) == (self.dot, 0, None):
            return self.all
        return a if least == most == 1 else self.node("repeat", a, least, most)

    def parse(self, tokens: list[str], bits: dict[str, int], binding: int = 0) -> int:
        """The regex at the end of tokens, which stand in reverse, as far as its operators bind
        at least so tightly. Takes its tokens away. bits[token] are the groups that match it."""
        token = tokens.pop()
        if token == "(":
            a = self.parse(tokens, bits)
            if (token := tokens.pop()) != ")":
                raise ValueError(f"{token} where a ) should be")
        elif token == "~":
            a = self.negate(self.parse(tokens, bits, BINDING["~"]))
        elif token == r"\b":
            a = self.node("edge")
        elif token in bits:
            a = self.node("set", bits[token])
        else:
            raise ValueError(f"{token} where an operand should be")
        while (token := tokens[-1]) not in (")", "end"):
            repeats = token in "*+?" or token[0] == "{"
            kind = token if token in "|&" else "repeat" if repeats else "row"
            if BINDING[kind] < binding:
                break
            if kind == "row":
                a = self.row(a, self.parse(tokens, bits, BINDING["row"] + 1))
                continue
            tokens.pop()
            if kind == "repeat":
                token = {"*": "{0,}", "+": "{1,}", "?": "{0,1}"}.get(token, token)
                least, comma, most = token[1:-1].partition(",")
                a = self.repeat(a, int(least), None if comma and not most else int(most or least))
            else:
                b = self.parse(tokens, bits, BINDING[kind] + 1)
                a = self.either(a, b) if kind == "|" else self.both(a, b)
        return a

    def derive(self, a: int, group: int, edge: bool) -> int:
        """What may follow a character of a group in the parts of a line that a regex matches;
        edge: that character stands right after a boundary."""
        if (a, group, edge) in self.derivatives:
            return self.derivatives[a, group, edge]
        kind, *parts = self.nodes[a]
        self.spend(1 + len(parts))
        if kind == "not":
            result = self.negate(self.derive(parts[0], group, edge))
        elif kind == "or":
            result = self.either(*[self.derive(part, group, edge) for part in parts])
        elif kind == "repeat":
            body, least, most = parts
            if self.empties[body] >> edge & 1:  # any rounds that are owed match nothing, here
                least = 0
            rest = self.repeat(body, max(least - 1, 0), most and most - 1)
            result = self.row(self.derive(body, group, edge), rest)
        elif kind == "row":
            ways = []
            for i, part in enumerate(parts):
                if (first := self.derive(part, group, edge)) != self.nothing:
                    ways.append(self.row(first, *parts[i + 1 :]))
                if not self.empties[part] >> edge & 1:
                    break
            result = self.either(*ways)
        else:
            result = self.empty if kind == "set" and parts[0] >> group & 1 else self.nothing
        self.derivatives[a, group, edge] = result
        return result


def difference(a: str, b: str) -> str | None:
    """A shortest line that only one of two regexes matches, None if they match the same lines.

    Raises ValueError if one does not parse, or if BUDGET is too small to decide it."""
    codes = [tokenize(text) for text in sorted((a, b))]  # so b, a spends the budget as a, b does
    tokens = [token for code in codes for token in code]
    sets = {token: chars for token in tokens if (chars := characters(token))}
    word = WORD if r"\b" in tokens else set()
    # Characters that no set tells apart form a group, and its first speaks for all.
    groups = {}
    for c in CHARACTERS:
        groups.setdefault((c in word, *(c in chars for chars in sets.values())), c)
    bits = {token: sum((c in chars) << i for i, c in enumerate(groups.values()))
            for token, chars in sets.items()}  # fmt: skip

    r = Regexes(len(groups))
    regexes = []
    for code in codes:
        stack = ["end", *reversed(code)]
        regexes.append(r.parse(stack, bits))
        if stack != ["end"]:
            raise ValueError(f"{''.join(code)!r} has a ) too many")
    todo, seen = [(*regexes, False, None, "")], {(*regexes, False)}
    for place in todo:  # grows while we walk it: breadth first
        x, y, in_word, *_ = place
        if (r.empties[x] ^ r.empties[y]) >> in_word & 1:  # a line that ends here
            line = ""
            while place:
                *_, place, c = place
                line = c + line
            return line
        r.spend(len(groups))
        for group, c in enumerate(groups.values()):
            edge = in_word != (c in word)
            reached = r.derive(x, group, edge), r.derive(y, group, edge), c in word
            if reached[0] != reached[1] and reached not in seen:
                seen.add(reached)
                todo.append((*reached, place, c))
    return None


def equivalent(a: str, b: str) -> bool | None:
    """Whether two regexes match the same lines. None if one does not parse or BUDGET is too small
    to tell. Never raises; the same for b, a."""
    try:
        return difference(a, b) is None
    except (ValueError, RecursionError):  # the latter only beyond 250 characters
        return None
