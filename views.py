"""Views, and how a row of blocks is built from them.

    layout_of(config)  which blocks a row holds, what each continues, where Pred and Enc are read
    Pairs              one split as tokens: the views of every example
    pairs.batch(step)  which examples a step trains on, a pure function of (seed, step)
    pairs.pack(...)    those examples as rows of blocks, ready for the model

Every published variant is a tree of blocks, masked by one rule (model.block_causal_mask). This
file is where they differ; the model knows blocks by number only.
"""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from config import Config
from model import PAD, Batch
from plumbing.tokenizers import Tokenizer

# Blocks by number. TEXT, CODE and TARGET are views of an example; AGAIN is the text once more.
TEXT, CODE, TARGET, PRED, AGAIN = 1, 2, 3, 4, 5
DRAWS = 1337  # seed of what is drawn when views are made: the same pairs for every seed of a run


class Layout(NamedTuple):
    """The tree of a training row."""

    parents: tuple[int | None, ...]  # for each block number, the block it continues
    row: tuple[int, ...]  # the blocks in order, each after the one it continues
    plain: tuple[int, ...]  # those of a row without the JEPA term
    pred: int  # Pred is read at the end of this block
    enc: int  # Enc is read at the end of this block (or is the mean over it)


def layout_of(config: Config) -> Layout:
    """The tree that the config asks for (config.check has refused what makes no sense).

    tree      text; code <- text; [PRED] <- text; target             the paper's
    isolated  text; [PRED] <- text; code                             nanoJEPA's row
    plan      text; [PRED] <- text; code <- [PRED]; target           code may use the prediction
    reverse   text; code <- text; target; [PRED] <- target           predicts the text
    front     text; code <- text; [PRED]; text again <- [PRED]; target
    """
    parents = {CODE: TEXT, PRED: TEXT}
    row, plain, pred, enc = (TEXT, CODE, PRED, TARGET), (TEXT, CODE), PRED, TARGET
    if config.layout == "isolated":
        parents = {PRED: TEXT}
        row, enc = (TEXT, PRED, CODE), CODE
    elif config.layout == "plan":
        parents = {PRED: TEXT, CODE: PRED}
        row, plain = (TEXT, PRED, CODE, TARGET), (TEXT, PRED, CODE)
    elif config.layout == "reverse":
        parents[PRED] = TARGET
        row, enc = (TEXT, CODE, TARGET, PRED), TEXT
    elif config.layout == "front":
        parents = {CODE: TEXT, AGAIN: PRED}
        row, pred = (TEXT, CODE, PRED, AGAIN, TARGET), AGAIN
    elif config.views == "facts":
        parents[PRED] = CODE  # Pred(e1 r e2) sees the whole fact
    if pred == PRED and config.n_pred == 0:
        pred = parents[PRED]
    return Layout(tuple(parents.get(b) for b in range(6)), row, plain, pred, enc)


@dataclass
class Pairs:
    """Tokenized examples of one split: a flat token stream and where each view lies in it.

    tokens (N,) int32 and is_label (N,) bool: is it to be predicted? starts (n, 3) int64 and lengths
    (n, 3) int32, a column for TEXT, CODE and TARGET each. A TARGET of length 0: no JEPA term.
    question_length (n,): how many of the text's tokens are the question, from which generation
    starts. framing (n, 2): how many of the text's first and last tokens only frame the question.
    source_row (n,): the row of its split that each was made of (see fitting). idf: see objectives/.
    """

    tokens: np.ndarray
    is_label: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    question_length: np.ndarray
    framing: np.ndarray
    config: Config
    vocab_size: int
    source_row: np.ndarray | None = None
    idf: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def layout(self) -> Layout:
        return layout_of(self.config)

    def take(self, at: np.ndarray) -> "Pairs":
        """The examples at these numbers."""
        names = "starts", "lengths", "question_length", "framing", "source_row"
        columns = {name: getattr(self, name) for name in names}
        return replace(self, **{k: None if c is None else c[at] for k, c in columns.items()})

    def view(self, example: int, block: int) -> list[int]:
        """Tokens of one view of one example: block is TEXT, CODE or TARGET."""
        start = self.starts[example, block - 1]
        return self.tokens[start : start + self.lengths[example, block - 1]].tolist()

    def prompt(self, example: int) -> list[int]:
        """What generation starts from: the question and, in the plan layout, [PRED]."""
        return self.question(example) + pred_tokens(self.config, self.vocab_size)

    def question(self, example: int) -> list[int]:
        return self.view(example, TEXT)[: self.question_length[example]]

    def answer(self, example: int) -> list[int]:
        """What is right after the question: the rest of the text (steps), then the code."""
        rest = self.view(example, TEXT)[self.question_length[example] :]
        return rest + self.view(example, CODE)

    def batch(self, step: int) -> np.ndarray:
        """(B,) the examples of micro-batch `step`, a pure function of (seed, step).

        Every epoch is a new order without repeats; what does not fill a batch is left out. To need
        little padding, a batch holds examples of like length: of the whole row first, then, among
        eight batches of those, of the code, which JEPA adds once more (GSM8K: 2 % of positions with
        and without JEPA). A random 3 % of the lengths keeps batches from recurring every epoch.
        """
        B = self.config.batch_size
        epoch, step = divmod(step, len(self) // B)
        if getattr(self, "_epoch", None) != epoch:  # planning an epoch costs milliseconds
            rng = np.random.default_rng((self.config.seed, epoch))
            order = rng.permutation(len(self))[: len(self) // B * B]
            pools = np.arange(len(order)) // B
            for columns, n_batches in (([0, 1], 512), ([1], 8)):
                length = self.lengths[order][:, columns].sum(1)
                length = length * rng.uniform(1, 1.03, len(order))
                order = order[np.lexsort((length, pools // n_batches))]
            order = order.reshape(-1, B)
            self._epoch, self._order = epoch, order[rng.permutation(len(order))]
        return self._order[step]

    def has_target(self, examples: np.ndarray) -> np.ndarray:
        """(B,) bool: which examples have two views, and so can carry the JEPA term."""
        return self.lengths[examples, TARGET - 1] > 0

    def groups(self, examples: np.ndarray) -> np.ndarray:
        """(B,) numbers for what Enc reads, equal where its tokens are (of a bag: in any order)."""
        seen, enc, kept = {}, self.layout.enc, sorted if self.config.objective == "bag" else list
        return np.array([seen.setdefault(tuple(kept(self.view(example, enc))), len(seen))
                         for example in examples], int)  # fmt: skip

    def with_jepa(self, examples: np.ndarray, step: int, micro: int) -> np.ndarray:
        """(B,) bool: which examples of micro-batch `micro` of `step` carry the JEPA term. Those
        that can, less the share `jepa_dropout`: whole steps, or example by example."""
        config = self.config
        per_batch = config.jepa_dropout_per == "batch"
        seed = (config.seed, step) if per_batch else (config.seed, step, micro)
        draws = np.random.default_rng(seed).random(1 if per_batch else len(examples))
        return self.has_target(examples) & (draws >= config.jepa_dropout) & (config.jepa_weight > 0)

    def pack(self, examples: np.ndarray, blocks: tuple[int, ...], has_jepa=True) -> Batch:
        """Examples (B,) as rows that hold `blocks`, in that order, padded on the right.

        has_jepa (B,) bool, or one for all: an example without it holds the layout's plain blocks
        only. Labels: a token of the text or code that is to be predicted is the target of the token
        before it, if its block continues that one's. Copies, [PRED] and padding carry none.
        """
        layout, k, B = self.layout, self.config.n_pred, len(examples)
        has_jepa = np.broadcast_to(has_jepa, B)
        column_of = {AGAIN: TEXT - 1, TEXT: TEXT - 1, CODE: CODE - 1, TARGET: TARGET - 1}
        sizes = {b: self.lengths[examples, column] for b, column in column_of.items()}
        sizes[PRED] = np.full(B, k)
        sizes = {b: n if b in layout.plain else n * has_jepa for b, n in sizes.items()}
        width = int(sum(sizes[b] for b in blocks).max())
        idx = np.zeros((B, width), np.int64)
        block = np.full((B, width), PAD)
        is_label = np.zeros((B, width), bool)
        columns = np.arange(width)
        start = np.zeros((B, 1), np.int64)  # column at which the block begins, in each row
        for b in blocks:
            within = columns - start  # (B, width) index inside the block
            inside = (within >= 0) & (within < sizes[b][:, None])
            block[inside] = b
            if b == PRED:
                idx[inside] = self.vocab_size + within[inside]
            else:
                begin = self.starts[examples, column_of[b]][:, None]
                at = (begin + within)[inside]
                idx[inside] = self.tokens[at]
                is_label[inside] = self.is_label[at] & (b in (TEXT, CODE))
            start = start + sizes[b][:, None]
        # Numbers of the parents, -1 for none: may the label be predicted from its left?
        parent = np.array([-1 if p is None else p for p in layout.parents])[block]
        left, right = block[:, :-1], block[:, 1:]
        labelled = is_label[:, 1:] & ((right == left) | (parent[:, 1:] == left))
        targets = np.full((B, width), -1)
        targets[:, :-1][labelled] = idx[:, 1:][labelled]
        return Batch(*map(torch.from_numpy, (idx, block, targets)))


def pred_tokens(config: Config, vocab_size: int) -> list[int]:
    """What follows a prompt before the code: [PRED] in the plan layout, else nothing."""
    return [vocab_size + i for i in range(config.n_pred)] if config.layout == "plan" else []


# --- examples as views ------------------------------------------------------------------------


class Example(NamedTuple):
    """One example in tokens. Labels: the text after its first `question_length` tokens, and the
    code. target: None is the code again, [] means no JEPA term. framing: see Pairs."""

    text: list[int]
    question_length: int
    code: list[int]
    target: list[int] | None = None
    framing: tuple[int, int] = (0, 0)


class Frame(NamedTuple):
    """The tokens that stand around the views of a pair."""

    before: list[int]  # before the text
    after: list[int]  # after the text: its end mark, or what a template begins an answer with
    alone: list[int]  # before a code that stands alone


class Columns(NamedTuple):
    """The arrays of Pairs, with every example in them, however long."""

    tokens: np.ndarray
    is_label: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    question_length: np.ndarray
    framing: np.ndarray


def tokenize(rows, tokenizer: Tokenizer, config: Config) -> tuple[Pairs, int]:
    """Pairs of the rows, and how many were left out (see fitting)."""
    return fitting(columns_of(rows, tokenizer, config), tokenizer, config)


def columns_of(
    rows: list[dict[str, str]], tokenizer: Tokenizer, config: Config, first: int = 0
) -> Columns:
    """Rows as tokens; the first of them has number `first` in its split."""
    families = {"pairs": pair_views, "steps": step_views, "steps_random": step_views,
                "split": split_views, "facts": fact_views}  # fmt: skip
    return stacked(families[config.views](rows, tokenizer, config, first), config)


def stacked(examples: list[Example], config: Config) -> Columns:
    """Examples one after another."""
    tokens, is_label, starts, lengths = [], [], [], []
    for text, question, code, target, _ in examples:
        begin = len(tokens)
        tokens += text + code
        unlabelled = 0 if config.labels == "all" else question
        is_label += [False] * unlabelled + [True] * (len(text) + len(code) - unlabelled)
        is_label[-1] = config.label_end
        if target is None:
            target, target_begin = code, begin + len(text)
        else:
            target_begin = len(tokens)
            tokens += target
            is_label += [False] * len(target)
        starts.append((begin, begin + len(text), target_begin))
        lengths.append((len(text), len(code), len(target)))
    starts = np.array(starts, np.int64).reshape(-1, 3)
    lengths = np.array(lengths, np.int32).reshape(-1, 3)
    question_length = np.array([example.question_length for example in examples], np.int32)
    framing = np.array([example.framing for example in examples], np.int32).reshape(-1, 2)
    return Columns(np.array(tokens, np.int32), np.array(is_label, bool), starts, lengths,
                   question_length, framing)  # fmt: skip


def fitting(columns: Columns, tokenizer: Tokenizer, config: Config) -> tuple[Pairs, int]:
    """Pairs of the columns, and how many were left out because a path is longer than block_size.
    They are left out whole: a view that lost its end would lose where its embedding is read."""
    fits = longest_path(columns.lengths, config) <= config.block_size
    by_example = columns[2:] if fits.all() else [column[fits] for column in columns[2:]]
    pairs = Pairs(*columns[:2], *by_example, config, tokenizer.vocab_size, np.flatnonzero(fits))
    return pairs, int((~fits).sum())


def longest_path(lengths: np.ndarray, config: Config) -> np.ndarray:
    """(n,) the largest number of tokens that a token of the example sees, itself included."""
    layout = layout_of(config)
    (text, code, target), k = lengths.T, np.full(len(lengths), config.n_pred)
    sizes = {TEXT: text, CODE: code, TARGET: target, PRED: k, AGAIN: text}

    def path(b):
        return 0 if b is None else sizes[b] + path(layout.parents[b])

    return np.max([path(b) for b in layout.row], axis=0)


def pair_views(rows, tokenizer: Tokenizer, config: Config, first: int) -> list[Example]:
    """Text and code of each row, each with its end mark. A system prompt that is kept stands
    before both views, but the language model reads it once."""
    texts = tokenizer.encode([row["text"] for row in rows])
    codes = tokenizer.encode([code_view(row["code"], config.answer_view) for row in rows])
    examples = []
    for (before, after, alone), t, c in zip(frames(rows, tokenizer, config), texts, codes):
        text, code = [*before, *t, *after], [*c, tokenizer.eot]
        target = [*alone, *code] if alone else None
        steps = len(t) - (not before), len(c)  # from state to state, of which the tube needs two
        few = min(steps) < 1 if config.objective == "tube_two_views" else sum(steps) < 2
        target = [] if few and config.objective.startswith("tube") else target
        examples.append(Example(text, len(text), code, target, (len(before), len(after))))
    return examples


def frames(rows, tokenizer: Tokenizer, config: Config) -> list[Frame]:
    """What stands around the views of each row, its system prompt among it if that is kept. The
    isolated layout reads Enc at the code itself, before which there is no place for one."""
    keep = config.system_prompt == "keep" and config.layout != "isolated"
    systems = [row.get("system", "") if keep else "" for row in rows]
    known = {system: Frame(*tokenizer.frame(system)) for system in set(systems)}
    return [known[system] for system in systems]


def code_view(code: str, answer_view: str) -> str:
    """The worked answer as it is, or only the number after its last ####."""
    return code if answer_view == "full" else code.rpartition("####")[2].strip()


def step_views(rows, tokenizer: Tokenizer, config: Config, first: int) -> list[Example]:
    """Step-JEPA: text = question and the steps up to the first one (steps_random: up to a random
    one), target = the next step alone, code = the rest of the answer. Labels are the whole answer:
    an ordinary causal language model."""
    pieces, has_pair = [], []
    for number, row in enumerate(rows, first):
        steps = split_steps(row["code"])
        n_pairs = len(steps) - 1  # of neighbours
        has_pair.append(n_pairs > 0)
        chosen = 0
        if config.views == "steps_random" and n_pairs > 0:
            chosen = int(np.random.default_rng((DRAWS, number)).integers(n_pairs))
        known, following = steps[: chosen + 1], steps[chosen + 1 : chosen + 2]
        rest = row["code"][len("".join(known)) :]
        pieces += [row["text"], "".join(known), rest, "".join(following).rstrip("\n")]
    ids = tokenizer.encode(pieces)
    examples = []
    for (before, after, alone), question, known, rest, following, pair in zip(
        frames(rows, tokenizer, config), *(ids[i::4] for i in range(4)), has_pair
    ):
        question = [*before, *question, *after]
        target = [*alone, *following, tokenizer.eot] if pair else []
        examples.append(Example([*question, *known], len(question), [*rest, tokenizer.eot], target))
    return examples


def split_steps(code: str) -> list[str]:
    """The steps of a worked answer, each with its line ends: `Step 1:` or `1.` at the start of at
    least two lines, else paragraphs, else lines. GSM8K's last line, ####, is no step."""
    code = code.rpartition("\n####")[0] + "\n" if "\n####" in code else code
    numbered = re.compile(r"^(?=[ \t]*(?:[Ss]tep[ \t]+\d+\b|\d+[.)][ \t]))", re.MULTILINE)
    if len(numbered.findall(code)) < 2:
        blank_line, line_end = r"(?<=\n\n)(?!\n)", r"(?<=\n)"
        numbered = re.compile(blank_line if "\n\n" in code.strip() else line_end)
    steps = [""]  # blank pieces go to a neighbour, so that the steps joined are the answer
    for piece in numbered.split(code):
        if piece.strip() and steps[-1].strip():
            steps.append(piece)
        else:
            steps[-1] += piece
    return steps if steps[-1].strip() else []


def split_views(rows, tokenizer: Tokenizer, config: Config, first: int) -> list[Example]:
    """Running text in blocks of block_size tokens, cut in two: the second half continues the first
    for the language model and is the target on its own. No end marks; labels="all" is usual.
    Pairs are run together, with a blank line after each."""
    texts = [f"{row['text']}\n{row['code']}\n\n" if row["code"] else row["text"] for row in rows]
    ids = [token for part in tokenizer.encode(texts) for token in part]
    examples = []
    for begin in range(0, len(ids) - 1, config.block_size):
        block = ids[begin : begin + config.block_size]
        rng = np.random.default_rng((DRAWS, begin))
        share = config.jepa_split or rng.random()
        cut = min(max(1, round(share * len(block))), len(block) - 1)
        examples.append(Example(block[:cut], cut, block[cut:]))
    return [e for e in examples if e.code]


def fact_views(rows, tokenizer: Tokenizer, config: Config, first: int) -> list[Example]:
    """Facts e1 r e2: labels on e2 alone, and the inverse fact is the target where there is one."""
    texts, codes, targets = (
        tokenizer.encode([row[key] for row in rows]) for key in ("text", "code", "target")
    )
    return [Example(t, len(t), c, target) for t, c, target in zip(texts, codes, targets)]
