"""Claims about views.py: layouts, rows, batches, views, and what a training step makes of them."""

import contextlib
import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, error_line, sums

import sample
import train
from alignment import embed_pairs
from config import Config, load_config
from data import load_data
from generators import relations
from generators.relations import Sizes
from generators.word_problems import word_problems
from lab import reversal
from model import block_causal_mask, read_hidden, visible_blocks
from plumbing.files import read_checkpoint
from plumbing.jsonl import as_pair
from plumbing.processes import Processes
from plumbing.tokenizers import gpt2_tokenizer, train_tokenizer
from run import FORMAT, load_run, make_model
from views import (
    AGAIN,
    CODE,
    PRED,
    TARGET,
    TEXT,
    Pairs,
    code_view,
    columns_of,
    longest_path,
    pred_tokens,
    split_steps,
    tokenize,
)

CPU, NO_AUTOCAST = torch.device("cpu"), contextlib.nullcontext
TERMS = ("ce", "jepa", "spread", "loss")
LAYOUTS = {
    "tree": {}, "isolated": {"layout": "isolated"}, "plan": {"layout": "plan"},
    "reverse": {"layout": "reverse"}, "front": {"layout": "front"},
}  # fmt: skip
WITH_K = [(name, k) for name in LAYOUTS for k in (0, 1, 3) if k or name not in ("plan", "front")]
LETTERS = {"q": TEXT, "a": CODE, "t": TARGET, "P": PRED, "g": AGAIN}
PLAIN = dict(jepa_weight=1, spread="none", spread_weight=0)  # the published loss alone
UNCLIPPED = dict(**PLAIN, grad_clip=0)
V = 16  # 14 is the separator, 15 end of text; [PRED] are 16, 17, 18
BATCHES = Config(batch_size=8, block_size=256)
LANGUAGE_MODEL = (TEXT, CODE)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Tokens of files are kept under out/."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def problem_bpe():
    return train_tokenizer([r["answer"] for r in word_problems("train", 200)], 512)


@pytest.fixture(scope="module")
def problems(problem_bpe):
    """1,001 word problems as Pairs: 125 batches an epoch, and one example left over."""
    pairs, left_out = fitted(word_problems("train", 1001), problem_bpe, BATCHES)
    assert left_out == 0
    return pairs


@pytest.fixture(scope="module")
def many(gpt2):
    """2,048 word problems in GPT-2's tokens: 128 batches."""
    return fitted(word_problems("train", 2048), gpt2, Config(batch_size=16))[0]


@pytest.fixture(scope="module")
def few(problem_bpe):
    """100 rows, their tokenizer and the baseline's Pairs."""
    rows = word_problems("train", 100)
    return rows, problem_bpe, fitted(rows, problem_bpe, Config(batch_size=4))[0]


def as_pairs(rows):
    return [as_pair(row) for row in rows]


def fitted(rows, tokenizer, config):
    return tokenize(as_pairs(rows), tokenizer, config)


def hand_made(examples, **options):
    """Pairs of (text, code) token lists whose target is the code, as tokenize lays them out."""
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=len(examples))
    tokens = [token for text, code in examples for token in text + code]
    is_label = [part for text, code in examples for part in [0] * len(text) + [1] * len(code)]
    lengths = np.array([[len(text), len(code), len(code)] for text, code in examples])
    begin = np.cumsum([0] + [len(text) + len(code) for text, code in examples])[:-1]
    starts = np.stack([begin, begin + lengths[:, 0], begin + lengths[:, 0]], 1)
    config = Config(**{**sizes, **UNCLIPPED, **options})
    framing = np.tile([0, 1], (len(examples), 1))  # the separator
    return Pairs(np.array(tokens, np.int32), np.array(is_label, bool), starts, lengths,
                 lengths[:, 0], framing, config, V)  # fmt: skip


def gpt_for(pairs, seed=0):
    """A tiny float64 model with strong opinions."""
    torch.manual_seed(seed)
    gpt = make_model(pairs.config, V).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    return gpt


def gradients(gpt):
    found = {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}
    gpt.zero_grad()
    return found


class Noting:
    """In an optimizer's place: notes the gradients that it would have used."""

    def __init__(self, gpt):
        self.gpt = gpt

    def step(self):
        self.gradients = gradients(self.gpt)

    def zero_grad(self, set_to_none):
        pass


def step_of(gpt, pairs, ema=None):
    """Terms of the loss and gradients of a training step that leaves the weights as they are."""
    notes = Noting(gpt)
    terms = train.train_step(
        train.Training(pairs, gpt, gpt, ema, notes, NO_AUTOCAST, Processes()), 0)  # fmt: skip
    return {k: terms[k] for k in terms if k in TERMS}, notes.gradients


def assert_close(got, want):
    """Both losses are computed in float32, whatever the model's dtype."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-6, msg=name)


def far_apart(got, want):
    return any((got[n] - want[n]).norm() > 0.1 * want[n].norm() for n in want if n in got)


EXAMPLES = [
    ([5, 9, 2, 14], [11, 3, 8, 15]), ([1, 14], [7, 13, 10, 1, 4, 15]),
    ([8, 3, 12, 4, 2, 14], [6, 15]),
]  # fmt: skip


# --- rows of the plain tree, drawn by hand ----------------------------------------------------
# Two pairs of tokens; 8 is the separator, 9 end of text, V = 10, so [PRED] is 10, 11, 12.
#     1 2 8  |  3 4 9           5 8  |  6 9

Q, A, P, T, _ = TEXT, CODE, PRED, TARGET, 0
NO = -1  # no label


def two_pairs(**settings):
    tokens = np.array([1, 2, 8, 3, 4, 9, 5, 8, 6, 9], np.int32)
    is_label = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1], bool) | (settings.get("labels") == "all")
    return Pairs(tokens, is_label, np.array([[0, 3, 3], [6, 8, 8]]),
                 np.array([[3, 3, 3], [2, 2, 2]]), np.array([3, 2]), np.array([[0, 1], [0, 1]]),
                 Config(**settings), vocab_size=10)  # fmt: skip


def drawn(rows):
    """Rows as lists."""
    return [t.tolist() for t in rows[:3]]


@pytest.mark.parametrize("n_pred, blocks, idx, block, targets", [
    (1, LANGUAGE_MODEL,
     [[1, 2, 8, 3, 4, 9], [5, 8, 6, 9, 0, 0]],
     [[Q, Q, Q, A, A, A], [Q, Q, A, A, _, _]],
     [[NO, NO, 3, 4, 9, NO], [NO, 6, 9, NO, NO, NO]]),
    (1, (TEXT, CODE, PRED),
     [[1, 2, 8, 3, 4, 9, 10], [5, 8, 6, 9, 10, 0, 0]],
     [[Q, Q, Q, A, A, A, P], [Q, Q, A, A, P, _, _]],
     [[NO, NO, 3, 4, 9, NO, NO], [NO, 6, 9, NO, NO, NO, NO]]),
    (3, (TEXT, CODE, PRED),
     [[1, 2, 8, 3, 4, 9, 10, 11, 12], [5, 8, 6, 9, 10, 11, 12, 0, 0]],
     [[Q, Q, Q, A, A, A, P, P, P], [Q, Q, A, A, P, P, P, _, _]],
     [[NO, NO, 3, 4, 9, NO, NO, NO, NO], [NO, 6, 9, NO, NO, NO, NO, NO, NO]]),
    (1, (TEXT, CODE, PRED, TARGET),
     [[1, 2, 8, 3, 4, 9, 10, 3, 4, 9], [5, 8, 6, 9, 10, 6, 9, 0, 0, 0]],
     [[Q, Q, Q, A, A, A, P, T, T, T], [Q, Q, A, A, P, T, T, _, _, _]],
     [[NO, NO, 3, 4, 9, NO, NO, NO, NO, NO], [NO, 6, 9, NO, NO, NO, NO, NO, NO, NO]]),
    (0, (TEXT, CODE, PRED, TARGET),
     [[1, 2, 8, 3, 4, 9, 3, 4, 9], [5, 8, 6, 9, 6, 9, 0, 0, 0]],
     [[Q, Q, Q, A, A, A, T, T, T], [Q, Q, A, A, T, T, _, _, _]],
     [[NO, NO, 3, 4, 9, NO, NO, NO, NO], [NO, 6, 9, NO, NO, NO, NO, NO, NO]]),
    (1, (TARGET,),
     [[3, 4, 9], [6, 9, 0]],
     [[T, T, T], [T, T, _]],
     [[NO, NO, NO], [NO, NO, NO]]),
])  # fmt: skip
def test_rows_are_packed_as_drawn(n_pred, blocks, idx, block, targets):
    """End of text is a label, or the model would never learn to stop; [PRED], padding and the
    target carry none, and neither does the separator."""
    rows = two_pairs(n_pred=n_pred).pack(np.array([0, 1]), blocks)
    assert drawn(rows) == [idx, block, targets]


def test_labels_all_adds_the_question_and_nothing_else():
    rows = two_pairs(labels="all", n_pred=2).pack(np.array([0, 1]), (TEXT, CODE, PRED, TARGET))
    assert drawn(rows)[2] == [[2, 8, 3, 4, 9, NO, NO, NO, NO, NO, NO],
                              [8, 6, 9, NO, NO, NO, NO, NO, NO, NO, NO]]  # fmt: skip


def test_rows_come_in_the_order_asked_for():
    rows = two_pairs().pack(np.array([1, 0, 1]), LANGUAGE_MODEL)
    assert rows.idx[:, 0].tolist() == [5, 1, 5]
    alone = two_pairs().pack(np.array([1]), LANGUAGE_MODEL)
    assert drawn(alone)[0] == [[5, 8, 6, 9]]  # a batch is as wide as its own longest row


def test_real_token_zero_is_not_padding(gpt2):
    """GPT-2's token 0 is "!": padding is known by its block, so "!" keeps its block and label."""
    pairs, _ = fitted([{"question": "!", "answer": "!!"}, {"question": "a", "answer": "!"}],
                             gpt2, Config())  # fmt: skip
    rows = pairs.pack(np.array([1]), LANGUAGE_MODEL)
    assert drawn(rows) == [[[64, gpt2.sep, 0, gpt2.eot]], [[Q, Q, A, A]],
                           [[NO, 0, gpt2.eot, NO]]]  # fmt: skip


@pytest.mark.parametrize("answer_view, code", [
    ("full", "He has 2+3 = <<2+3=5>>5.\n#### 5"), ("final", "5"),
])  # fmt: skip
def test_views_end_in_their_marks(answer_view, code, bpe):
    row = {"question": "How many?", "answer": "He has 2+3 = <<2+3=5>>5.\n#### 5"}
    pairs, left_out = fitted([row], bpe, Config(answer_view=answer_view))
    assert pairs.view(0, TEXT) == [*bpe.encode(["How many?"])[0], bpe.sep]
    assert pairs.view(0, CODE) == [*bpe.encode([code])[0], bpe.eot]
    assert left_out == 0


def test_final_view_is_what_follows_the_last_marks():
    assert code_view("#### 1\n#### 1,234 ", "final") == "1,234"
    assert code_view("no marks", "final") == "no marks"


@pytest.mark.parametrize("n_pred", [0, 1, 40])
def test_too_long_examples_are_left_out_whole_and_counted(n_pred, bpe):
    """A path is question + answer or question + [PRED], whichever is longer: exactly block_size
    fits."""
    rows = word_problems("train", 50)
    full, _ = fitted(rows, bpe, Config(block_size=10_000))
    path = np.maximum(full.lengths[:, :2].sum(1), full.lengths[:, 0] + n_pred)
    limit = sorted(path)[25]
    pairs, left_out = fitted(rows, bpe, Config(block_size=limit, n_pred=n_pred))
    kept = np.flatnonzero(path <= limit)
    assert 0 < left_out == 50 - len(kept)
    assert [pairs.view(i, TEXT) + pairs.view(i, CODE) for i in range(len(pairs))] == [
        full.view(i, TEXT) + full.view(i, CODE) for i in kept
    ]


# --- batches ----------------------------------------------------------------------------------


def test_batches_are_a_pure_function_of_seed_and_step(problems):
    steps = [0, 300, 3, 124, 125, 1, 300, 0]
    jumping = [replace(problems).batch(s).tolist() for s in steps]
    one_object = [problems.batch(s).tolist() for s in steps]
    in_order = {s: problems.batch(s).tolist() for s in range(301)}
    assert jumping == one_object == [in_order[s] for s in steps]


def test_an_epoch_holds_every_example_at_most_once(problems):
    B = BATCHES.batch_size
    per_epoch = len(problems) // B
    orders = []
    for epoch in range(2):
        order = np.concatenate(
            [problems.batch(s) for s in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        )
        assert len(order) == 1000
        assert len(set(order.tolist())) == len(order)
        assert order.min() >= 0 and order.max() < 1001
        orders.append(order.tolist())
    assert orders[0] != orders[1]
    assert set(orders[0]) != set(orders[1])  # the one left over comes later


def test_another_seed_gives_another_order(problems):
    other = replace(problems, config=replace(BATCHES, seed=1))
    assert problems.batch(0).tolist() != other.batch(0).tolist()


@pytest.mark.parametrize("change", [
    {"jepa_weight": 0.0}, {"jepa_weight": 4.0}, {"stop_grad": True}, {"n_pred": 0}, {"n_pred": 4},
    {"jepa_dropout": 0.5}, {"jepa_loss": "mse"}, {"spread": "vicreg", "spread_weight": 0.1},
    {"n_layer": 2}, {"labels": "all"}, {"max_iters": 9}, {"gradient_accumulation_steps": 4},
])  # fmt: skip
def test_batches_are_those_of_the_baseline(change, few):
    """Two runs that differ in the objective see the same examples at the same step."""
    rows, bpe, baseline = few
    changed, _ = fitted(rows, bpe, replace(baseline.config, **change))
    for step in (0, 40):
        assert changed.batch(step).tolist() == baseline.batch(step).tolist()


@pytest.mark.parametrize("blocks", [LANGUAGE_MODEL, (TEXT, CODE, PRED, TARGET), (TARGET,)])
def test_sorting_by_length_leaves_little_padding(blocks, many):
    """In rows of the language model, in full ones, and in those of a target on its own."""
    used, total = 0, 0
    for step in range(len(many) // 16):
        block = many.pack(many.batch(step), blocks).block
        used += (block != 0).sum().item()
        total += block.numel()
    assert used > 0.95 * total


def test_lengths_are_mixed_over_an_epoch(problems):
    """Batches are sorted by length inside, not one after the other: no curriculum."""
    per_epoch = len(problems) // BATCHES.batch_size
    width = [problems.lengths[problems.batch(s)].sum(1).mean() for s in range(per_epoch)]
    assert abs(np.corrcoef(np.arange(per_epoch), width)[0, 1]) < 0.2


# --- a part of the examples -------------------------------------------------------------------


def test_examples_are_taken_with_all_that_is_known_of_them(bpe):
    """Lengths, question and row of origin, too, of examples some of which were left out before."""
    rows = as_pairs({"question": "How many?" * (1 + i % 4), "answer": GSM8K[: 15 + 25 * i % 61]}
                    for i in range(12))  # fmt: skip
    for views in ("pairs", "steps", "steps_random"):
        config = Config(views=views, block_size=1000)
        path = longest_path(tokenize(rows, bpe, config)[0].lengths, config)
        pairs, left_out = tokenize(rows, bpe, replace(config, block_size=np.sort(path)[8]))
        assert 0 < left_out <= 3 and pairs.source_row.tolist() != list(range(len(pairs)))
        at = np.array([7, 0, 5, 2])
        taken = pairs.take(at)
        assert len(taken) == 4 and taken.config is pairs.config
        for name in ("starts", "lengths", "question_length", "source_row"):
            assert np.array_equal(getattr(taken, name), getattr(pairs, name)[at]), name
        for new, old in enumerate(at):
            assert taken.question(new) == pairs.question(old)
            assert taken.answer(new) == pairs.answer(old)
            assert [taken.view(new, b) for b in (TEXT, CODE, TARGET)] == [
                pairs.view(old, b) for b in (TEXT, CODE, TARGET)]  # fmt: skip
            row = rows[taken.source_row[new]]
            assert bpe.decode(taken.question(new)) == row["text"]
            assert bpe.decode(taken.answer(new)) == row["code"]


def test_a_part_plans_its_own_batches(problems):
    """Not those of the whole, which it was taken from after an epoch was planned."""
    problems.batch(0)
    part = problems.take(np.arange(20))
    assert sorted(part.batch(0).tolist() + part.batch(1).tolist())[-1] < 20
    assert hand_made(EXAMPLES).take(np.array([2, 0])).source_row is None


# --- rows, drawn by hand ----------------------------------------------------------------------
# One pair: text 1 2 14, code 3 15. x, y, z are [PRED] 16, 17, 18.

DRAWN = {
    ("tree", 0): ("1 2 14 3 15 3 15", "qqqaatt", "- - 3 15 - - -", "0 1 2 3 4 0 1"),
    ("tree", 1): ("1 2 14 3 15 x 3 15", "qqqaaPtt", "- - 3 15 - - - -", "0 1 2 3 4 3 0 1"),
    ("tree", 3): ("1 2 14 3 15 x y z 3 15", "qqqaaPPPtt", "- - 3 15 - - - - - -",
                  "0 1 2 3 4 3 4 5 0 1"),
    ("isolated", 0): ("1 2 14 3 15", "qqqaa", "- - - 15 -", "0 1 2 0 1"),
    ("isolated", 1): ("1 2 14 x 3 15", "qqqPaa", "- - - - 15 -", "0 1 2 3 0 1"),
    ("isolated", 3): ("1 2 14 x y z 3 15", "qqqPPPaa", "- - - - - - 15 -", "0 1 2 3 4 5 0 1"),
    ("plan", 1): ("1 2 14 x 3 15 3 15", "qqqPaatt", "- - - 3 15 - - -", "0 1 2 3 4 5 0 1"),
    ("plan", 3): ("1 2 14 x y z 3 15 3 15", "qqqPPPaatt", "- - - - - 3 15 - - -",
                  "0 1 2 3 4 5 6 7 0 1"),
    ("reverse", 0): ("1 2 14 3 15 3 15", "qqqaatt", "- - 3 15 - - -", "0 1 2 3 4 0 1"),
    ("reverse", 1): ("1 2 14 3 15 3 15 x", "qqqaattP", "- - 3 15 - - - -", "0 1 2 3 4 0 1 2"),
    ("reverse", 3): ("1 2 14 3 15 3 15 x y z", "qqqaattPPP", "- - 3 15 - - - - - -",
                     "0 1 2 3 4 0 1 2 3 4"),
    ("front", 1): ("1 2 14 3 15 x 1 2 14 3 15", "qqqaaPgggtt", "- - 3 15 - - - - - - -",
                   "0 1 2 3 4 0 1 2 3 0 1"),
    ("front", 3): ("1 2 14 3 15 x y z 1 2 14 3 15", "qqqaaPPPgggtt", "- - 3 15 - - - - - - - - -",
                   "0 1 2 3 4 0 1 2 3 4 5 0 1"),
}  # fmt: skip
READ_AT = {"tree": "Pt", "isolated": "Pa", "plan": "Pt", "reverse": "Pq", "front": "gt"}
READ_WITHOUT_PRED = {"tree": "qt", "isolated": "qa", "reverse": "tq"}  # Pred, Enc


def numbers(drawn):
    names = {"-": -1, "x": 16, "y": 17, "z": 18}
    return [names[word] if word in names else int(word) for word in drawn.split()]


@pytest.mark.parametrize("name, k", WITH_K)
def test_a_row_equals_the_one_drawn_by_hand(name, k):
    idx, block, targets, positions = DRAWN[name, k]
    pairs = hand_made([([1, 2, 14], [3, 15])], n_pred=k, **LAYOUTS[name])
    layout = pairs.layout
    rows = pairs.pack(np.array([0]), layout.row)
    assert rows.idx[0].tolist() == numbers(idx)
    assert rows.block[0].tolist() == [LETTERS[letter] for letter in block]
    assert rows.targets[0].tolist() == numbers(targets)
    got = block_causal_mask(rows.block, visible_blocks(layout.parents))[1]
    assert got[0].tolist() == numbers(positions)
    read = (READ_AT if k else READ_WITHOUT_PRED)[name]
    assert [layout.pred, layout.enc] == [LETTERS[letter] for letter in read]


def test_labels_all_adds_the_text_and_no_copy_of_it():
    for name, expected in (("front", "2 14 3 15 - - - - - - -"), ("plan", "2 14 - 3 15 - - -"),
                           ("isolated", "2 14 - - 15 -")):  # fmt: skip
        pairs = hand_made([([1, 2, 14], [3, 15])], labels="all", **LAYOUTS[name])
        pairs.is_label[:] = True  # as tokenize does
        rows = pairs.pack(np.array([0]), pairs.layout.row)
        assert rows.targets[0].tolist() == numbers(expected), name


# Which blocks change with a token of a block; written by hand, not taken from the code.
SEEN_BY = {
    "tree": {"q": "qaP", "a": "a", "P": "P", "t": "t"},
    "isolated": {"q": "qP", "P": "P", "a": "a"},
    "plan": {"q": "qPa", "P": "Pa", "a": "a", "t": "t"},
    "reverse": {"q": "qa", "a": "a", "t": "tP", "P": "P"},
    "front": {"q": "qa", "a": "a", "P": "Pg", "g": "g", "t": "t"},
}


@pytest.mark.parametrize("name, k", WITH_K)
def test_a_token_changes_exactly_what_the_table_says(name, k):
    pairs = hand_made(EXAMPLES[:2], n_pred=k, **LAYOUTS[name])
    idx, block = pairs.pack(np.array([0, 1]), pairs.layout.row)[:2]
    gpt = gpt_for(pairs)
    before = gpt.everywhere(idx, block)
    for letter, seen_by in SEEN_BY[name].items():
        columns = (block[0] == LETTERS[letter]).nonzero()[:, 0].tolist()
        assert columns or (letter, k) == ("P", 0)
        for column in columns:
            changed, weights = idx.clone(), gpt.state_dict()
            changed[0, column] = (idx[0, column] + 1) % V
            if letter == "P":  # another embedding in row 0 only
                weights = {n: w.clone() for n, w in weights.items()}
                changed = idx
                with torch.no_grad():
                    gpt.pred.weight[idx[0, column] - V] += 0.1
            changes = (gpt.everywhere(changed, block) != before).any(-1)
            gpt.load_state_dict(weights)
            expected = torch.isin(block[0], torch.tensor([LETTERS[b] for b in seen_by]))
            expected &= (block[0] != LETTERS[letter]) | (torch.arange(idx.size(1)) >= column)
            assert torch.equal(changes[0], expected), (letter, column)
            assert letter == "P" or not changes[1].any()


# --- one row for separate passes --------------------------------------------------------------
# As ordinary causal rows: what the language model reads, the text of Pred, the text of Enc.

PASSES = {
    "tree": lambda q, p, a: (q + a, q + p, a),
    "isolated": lambda q, p, a: (a, q + p, a),
    "plan": lambda q, p, a: (q + p + a, q + p, a),
    "reverse": lambda q, p, a: (q + a, a + p, q),
    "front": lambda q, p, a: (q + a, p + q, a),
}


def causal(gpt, tokens):
    """Hidden states (T, C) of a plain causal row: one block."""
    idx = torch.tensor([tokens])
    return gpt.everywhere(idx, torch.ones_like(idx))[0]


def separate_passes(gpt, name, k, keep=None, detach=False, mean=False):
    """Cross-entropy and cosine loss, one view of one example at a time."""
    ce, n_labels, jepa = 0.0, 0, []
    for i, (q, a) in enumerate(EXAMPLES):
        lm, text, enc = PASSES[name](q, [V + j for j in range(k)], a)
        n = len(a) - (name == "isolated")  # its first token has nothing to be predicted from
        logits = gpt.logits(causal(gpt, lm)[-n - 1 : -1])
        ce = ce + F.cross_entropy(logits, torch.tensor(a[-n:]), reduction="sum")
        n_labels += n
        if keep is None or keep[i]:
            states = causal(gpt, enc)
            target = states.mean(0) if mean else states[-1]
            target = target.detach() if detach else target
            jepa.append(1 - F.cosine_similarity(causal(gpt, text)[-1], target, dim=0))
    return ce / n_labels, torch.stack(jepa).mean()


@pytest.mark.parametrize("name, k", WITH_K)
def test_the_packed_row_equals_separate_passes_in_hidden_states(name, k):
    pairs = hand_made(EXAMPLES, n_pred=k, **LAYOUTS[name])
    gpt, layout = gpt_for(pairs), pairs.layout
    rows = pairs.pack(np.arange(3), layout.row)
    hidden = gpt.everywhere(rows.idx, rows.block)
    for which in (layout.pred, layout.enc):
        read = read_hidden(hidden, rows.block, which)
        for i, (q, a) in enumerate(EXAMPLES):
            _, text, enc = PASSES[name](q, [V + j for j in range(k)], a)
            alone = causal(gpt, text if which == layout.pred else enc)[-1]
            torch.testing.assert_close(read[i], alone, rtol=1e-9, atol=1e-9)
    for i, (q, a) in enumerate(EXAMPLES):
        lm = PASSES[name](q, [V + j for j in range(k)], a)[0]
        n = len(a) - (name == "isolated")
        labelled = rows.targets[i] != -1
        assert rows.targets[i][labelled].tolist() == a[-n:]
        at_labels = causal(gpt, lm)[-n - 1 : -1]
        torch.testing.assert_close(hidden[i][labelled], at_labels, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, k", WITH_K)
@pytest.mark.parametrize("options", [
    {}, {"stop_grad": True}, {"pooling": "mean"},
], ids=["last", "stop_grad", "mean"])  # fmt: skip
def test_a_step_equals_separate_passes_in_losses_and_gradients(name, k, options):
    """stop_grad does exactly what detaching the target does: the language model and Pred keep
    their gradients, in layouts too where the target's block is also trained on."""
    weights = dict(ce_weight=0.5, jepa_weight=2.0)
    pairs = hand_made(EXAMPLES, n_pred=k, **weights, **LAYOUTS[name], **options)
    gpt = gpt_for(pairs)
    terms, got = step_of(gpt, pairs)
    stops, mean = "stop_grad" in options, "pooling" in options
    ce, jepa = separate_passes(gpt, name, k, detach=stops, mean=mean)
    loss = 0.5 * ce + 2 * jepa
    loss.backward()
    want = {"ce": ce.item(), "jepa": jepa.item(), "spread": 0, "loss": loss.item()}
    assert terms == pytest.approx(want, rel=1e-5)
    assert_close(got, gradients(gpt))
    if stops:
        ce, jepa = separate_passes(gpt, name, k, mean=mean)
        (0.5 * ce + 2 * jepa).backward()
        assert far_apart(got, gradients(gpt))


@pytest.mark.parametrize("name, k", WITH_K)
def test_the_longest_path_is_the_last_position(name, k):
    pairs = hand_made(EXAMPLES, n_pred=k, **LAYOUTS[name])
    rows = pairs.pack(np.arange(3), pairs.layout.row)
    positions = block_causal_mask(rows.block, visible_blocks(pairs.layout.parents))[1]
    assert longest_path(pairs.lengths, pairs.config).tolist() == (positions.amax(1) + 1).tolist()


@pytest.mark.parametrize("name, k", [("tree", 1), ("reverse", 3), ("front", 1), ("isolated", 0)])
def test_held_out_pairs_are_read_as_in_training(name, k):
    pairs = hand_made(EXAMPLES, n_pred=k, **LAYOUTS[name])
    gpt = gpt_for(pairs)
    ce, pred, target = embed_pairs(gpt, pairs, 9, NO_AUTOCAST)
    want_ce, want_jepa = separate_passes(gpt, name, k)
    assert ce == pytest.approx(want_ce.item(), rel=1e-5)
    got = (1 - F.cosine_similarity(pred, target)).mean()
    assert got.item() == pytest.approx(want_jepa.item(), rel=1e-4)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_our_one_row_equals_the_official_two(k):
    """The official code runs [q a] for CE, and [q P | a] under a mask that keeps its halves apart,
    here with the positions of the second reset. Same weights: same losses, same gradients."""
    pairs = hand_made(EXAMPLES, n_pred=k)
    gpt = gpt_for(pairs)
    terms, got = step_of(gpt, pairs)

    nll, jepa = [], []
    for q, a in EXAMPLES:
        n, text = len(q) + len(a), len(q) + k
        mask = torch.ones(1, n, n, dtype=torch.bool).tril()
        hidden = gpt.layers(gpt.embed(torch.tensor([q + a])), torch.arange(n)[None], mask)[0]
        log_p = gpt.logits(hidden).log_softmax(-1)
        nll += [-log_p[len(q) + i - 1, token] for i, token in enumerate(a)]

        idx = torch.tensor([q + [V + i for i in range(k)] + a])
        halves = torch.block_diag(torch.ones(text, text).tril(), torch.ones(len(a), len(a)).tril())
        positions = torch.tensor([[*range(text), *range(len(a))]])
        hidden = gpt.layers(gpt.embed(idx), positions, halves.bool()[None])[0]
        pred, enc = hidden[text - 1], hidden[-1]
        jepa.append(1 - pred @ enc / (pred.norm() * enc.norm()))
    ce, jepa = torch.stack(nll).mean(), torch.stack(jepa).mean()
    (ce + jepa).backward()
    assert (terms["ce"], terms["jepa"]) == pytest.approx((ce.item(), jepa.item()), rel=1e-5)
    assert_close(got, gradients(gpt))


# --- steps ------------------------------------------------------------------------------------

GSM8K = "She sold 48/2 = <<48/2=24>>24 in May.\nTogether 48+24 = <<48+24=72>>72.\nSo 72.\n#### 72"
ANSWERS = {
    "lines": (GSM8K, ["She sold 48/2 = <<48/2=24>>24 in May.\n",
                      "Together 48+24 = <<48+24=72>>72.\n", "So 72.\n"]),
    "Step n": ("Step 1: add\nmore of it\nStep 2: 5. \nstep 10 done\n#### 5",
               ["Step 1: add\nmore of it\n", "Step 2: 5. \n", "step 10 done\n"]),
    "1.": ("1. add 2.5\n1.5 stays\n2. five", ["1. add 2.5\n1.5 stays\n", "2. five"]),
    "1)": (" 1) add\n 2) take\n\n 3) five\n", [" 1) add\n", " 2) take\n\n", " 3) five\n"]),
    "paragraphs": ("first\nstill\n\n\nsecond\n\n1. third\n#### 3",
                   ["first\nstill\n\n\n", "second\n\n", "1. third\n"]),
    "one": ("just 5\n#### 5", ["just 5\n"]),
    "one, no marks": ("just 5", ["just 5"]),
    "marks in the middle": ("#### is\nb\n#### c\n#### 5", ["#### is\n", "b\n", "#### c\n"]),
    "none": ("#### 5", ["#### 5"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ANSWERS)
def test_steps_of_an_answer(kind):
    code, steps = ANSWERS[kind]
    assert split_steps(code) == steps
    assert "".join(steps) == (code[: code.rindex("\n####") + 1] if "\n####" in code else code)


BLANKS = {
    "first line empty": "\nStep 1: a\nStep 2: b\n#### 2",
    "paragraphs after an empty one": "\n\nfirst\n\nsecond\n\nthird\n#### 3",
    "a line of spaces": "first\n  \nsecond\nthird\n#### 3",
    "carriage returns": "first\r\n\r\nsecond\r\n\r\nthird\n#### 3",
}


@pytest.mark.parametrize("kind", BLANKS)
def test_blank_lines_are_part_of_a_step_and_none_by_themselves(kind):
    code = BLANKS[kind]
    steps = split_steps(code)
    assert "".join(steps) == code[: code.rindex("\n####") + 1]
    assert all(step.strip() for step in steps) and len(steps) == 2 + (kind != "first line empty")


@pytest.fixture(scope="module")
def bpe():
    texts = [GSM8K, *(row["answer"] for row in sums(30))]
    return train_tokenizer(texts, 320)


STEPS = dict(views="steps", n_layer=2, n_head=2, n_embd=32, block_size=300)
RANDOM = {**STEPS, "views": "steps_random"}


def tokenized(rows, bpe, **options):
    pairs, left_out = tokenize(as_pairs(rows), bpe, Config(**options))
    assert left_out == 0
    return pairs


def step_rows(n=1):
    return [{"question": "How many?", "answer": GSM8K}] * n


def shown(pairs, row, bpe):
    return [bpe.decode(pairs.view(row, block)) for block in (TEXT, CODE, TARGET)]


def test_the_first_step_predicts_the_second(bpe):
    pairs = tokenized(step_rows(), bpe, **STEPS)
    one, two, _ = ANSWERS["lines"][1]
    assert shown(pairs, 0, bpe) == ["How many?" + one, GSM8K[len(one) :], two.rstrip("\n")]
    assert pairs.view(0, TARGET)[-1] == pairs.view(0, CODE)[-1] == bpe.eot
    assert pairs.view(0, TEXT)[len(bpe.encode(["How many?"])[0])] == bpe.sep


def test_a_random_pair_of_two_steps_is_the_first_one(bpe):
    """With two steps there is one pair of neighbours: views=steps and steps_random agree."""
    rows = [{"question": "How many?", "answer": "one\ntwo\n#### 2"}] * 5
    first, random = (tokenized(rows, bpe, **options) for options in (STEPS, RANDOM))
    assert [shown(random, i, bpe) for i in range(5)] == [shown(first, 0, bpe)] * 5


def test_a_random_pair_of_steps_is_drawn_by_the_rows_number(bpe):
    """A row that follows others, in a later chunk of a file, draws as it does among all of them."""
    whole = columns_of(as_pairs(step_rows(40)), bpe, Config(**RANDOM))
    tail = columns_of(as_pairs(step_rows(15)), bpe, Config(**RANDOM), first=25)
    assert np.array_equal(tail.lengths, whole.lengths[25:])
    assert not np.array_equal(tail.lengths, whole.lengths[:15])


def test_a_random_pair_of_steps_is_any_neighbouring_one_and_stays_the_same(bpe):
    pairs = tokenized(step_rows(40), bpe, **RANDOM)
    again = tokenized(step_rows(40), bpe, **RANDOM)
    steps, found = ANSWERS["lines"][1], []
    for i in range(40):
        text, rest, target = shown(pairs, i, bpe)
        assert [text, rest, target] == shown(again, i, bpe)
        assert text.removeprefix("How many?") + rest == GSM8K
        at = [step.rstrip("\n") for step in steps].index(target)
        assert text == "How many?" + "".join(steps[:at])
        found.append(at)
    assert set(found) == {1, 2} and 8 < found.count(1) < 32
    other = tokenized(step_rows(40), bpe, **RANDOM, seed=1)  # data is the same for all seeds
    assert all(shown(other, i, bpe) == shown(pairs, i, bpe) for i in range(40))


@pytest.mark.parametrize("kind", [*ANSWERS, *BLANKS])
@pytest.mark.parametrize("options", [STEPS, RANDOM], ids=["first", "random"])
def test_labels_of_steps_are_the_whole_answer_and_end_of_text(kind, options, bpe):
    code = ANSWERS[kind][0] if kind in ANSWERS else BLANKS[kind]
    at = np.arange(8 if options == RANDOM else 1)
    pairs = tokenized([{"text": "How?", "code": code}] * len(at), bpe, **options)
    packed = pairs.pack(at, pairs.layout.row, pairs.has_target(at))
    for i in at:
        labels = packed.targets[i][packed.targets[i] != -1].tolist()
        assert bpe.decode(labels) == code and labels[-1] == bpe.eot
        question = [*bpe.encode(["How?"])[0], bpe.sep]
        assert [*pairs.view(i, TEXT), *pairs.view(i, CODE)] == question + labels


def test_examples_with_two_steps_are_counted(tmp_path, bpe, capsys):
    rows = [*({**row, "question": f"How many {i}?"} for i, row in enumerate(step_rows(30))),
            *({"question": f"Why {i}?", "answer": "so\n#### 5"} for i in range(10))]  # fmt: skip
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_data(Config(dataset=str(path), tokenizer="bpe", **STEPS), bpe).pairs
    n = {s: len([i for i in range(len(p)) if p.view(i, TARGET)]) for s, p in pairs.items()}
    assert sum(n.values()) == 30 and len(pairs["train"]) == 36
    line = f"with a JEPA term: train {n['train']} of 36, val {n['val']} of 4"
    assert line in capsys.readouterr().out


def test_examples_without_two_steps_train_cross_entropy_only(bpe):
    rows = [*step_rows(2), {"question": "Why?", "answer": "so\n#### 5"}]
    pairs = tokenized(rows, bpe, **STEPS, **UNCLIPPED, batch_size=3)
    assert pairs.lengths[:, TARGET - 1].tolist() == [*pairs.lengths[:2, TARGET - 1], 0]
    assert pairs.has_target(np.arange(3)).tolist() == [True, True, False]
    assert pairs.with_jepa(np.arange(3), 0, 0).tolist() == [True, True, False]
    gpt = make_model(pairs.config, bpe.vocab_size).double()
    terms, got = step_of(gpt, pairs)
    ce, n_labels, jepa = 0.0, 0, []
    for i, row in enumerate(rows):
        text, code, target = (pairs.view(i, b) for b in (TEXT, CODE, TARGET))
        start = len(bpe.encode([row["question"]])[0]) + 1
        logits = gpt.logits(causal(gpt, text + code)[start - 1 : -1])
        labels = torch.tensor([*text, *code][start:])
        ce = ce + F.cross_entropy(logits, labels, reduction="sum")
        n_labels += len(labels)
        if target:
            pred, enc = causal(gpt, [*text, bpe.vocab_size])[-1], causal(gpt, target)[-1]
            jepa.append(1 - F.cosine_similarity(pred, enc, dim=0))
    ce, jepa = ce / n_labels, torch.stack(jepa).mean()
    (ce + jepa).backward()
    assert (terms["ce"], terms["jepa"]) == pytest.approx((ce.item(), jepa.item()), rel=1e-5)
    assert_close(got, gradients(gpt))

    _, pred, target = embed_pairs(gpt, pairs, 3, NO_AUTOCAST)
    assert pred.shape == target.shape == (2, 32)
    alone = tokenized(rows[2:], bpe, **STEPS, **UNCLIPPED, batch_size=1)
    terms, _ = step_of(gpt, alone)
    assert set(terms) == {"ce", "loss"} and terms["loss"] == terms["ce"] > 0
    assert set(alone.pack(np.array([0]), alone.layout.row, False).block.unique().tolist()) == {1, 2}


def test_steps_of_data_without_steps_are_one_line(tmp_path, bpe, capsys):
    path = write(tmp_path / "mine.jsonl", [{"text": f"a{i}", "code": f"b{i}"} for i in range(40)])
    for views in ("steps", "steps_random"):
        config = Config(dataset=path, tokenizer="bpe", views=views)
        assert "0 validation pairs with two steps" in error_line(capsys, load_data, config, bpe)


def test_generation_from_steps_starts_at_the_question(bpe):
    for options in (STEPS, RANDOM):
        pairs = tokenized(step_rows(9), bpe, **options)
        for i in range(9):
            assert pairs.prompt(i) == [*bpe.encode(["How many?"])[0], bpe.sep]
            assert bpe.decode(pairs.answer(i)) == GSM8K


# --- system prompts ---------------------------------------------------------------------------


def chat(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SYSTEM = chat(("system", "Be brief."), ("user", "How many?"), ("assistant", "5"))


def test_a_kept_system_prompt_stands_before_both_views_and_is_read_once(bpe):
    pairs = tokenized([SYSTEM], bpe, block_size=64)
    s, q, a = bpe.encode(["Be brief.\n", "How many?", "5"])
    views = [pairs.view(0, block) for block in (TEXT, CODE, TARGET)]
    assert views == [[*s, *q, bpe.sep], [*a, bpe.eot], [*s, *a, bpe.eot]]
    rows = pairs.pack(np.array([0]), pairs.layout.row)
    labels = rows.targets[0][rows.targets[0] != -1].tolist()
    assert labels == [*a, bpe.eot]
    lm = pairs.pack(np.array([0]), (TEXT, CODE)).idx[0].tolist()
    assert lm == [*s, *q, bpe.sep, *a, bpe.eot]


def test_a_dropped_system_prompt_is_in_no_view(bpe):
    with_and_without = [SYSTEM, chat(("user", "How many?"), ("assistant", "5"))]
    pairs = tokenized(with_and_without, bpe, block_size=64, system_prompt="drop")
    for block in (TEXT, CODE, TARGET):
        assert pairs.view(0, block) == pairs.view(1, block)
    kept = tokenized(with_and_without[1:], bpe, block_size=64)  # none to keep
    assert [kept.view(0, b) for b in (TEXT, CODE, TARGET)] == [
        pairs.view(0, b) for b in (TEXT, CODE, TARGET)
    ]


def test_steps_keep_the_system_prompt_too(bpe):
    row = chat(("system", "Be brief."), ("user", "How many?"), ("assistant", GSM8K))
    text = bpe.decode(tokenized([row], bpe, **STEPS).view(0, TEXT))
    assert text.startswith("Be brief.\nHow many?")


def test_isolated_layout_has_no_place_for_a_system_prompt(bpe):
    """Enc is read at the code, which the language model reads too: neither view has the prompt."""
    pairs = tokenized([SYSTEM], bpe, block_size=64, layout="isolated")
    assert "Be brief" not in "".join(bpe.decode(pairs.view(0, b)) for b in (TEXT, CODE, TARGET))


# --- which examples carry the JEPA term -------------------------------------------------------


def test_dropout_per_example_drops_its_share_in_every_micro_batch():
    pairs = hand_made(EXAMPLES, jepa_dropout=0.3, jepa_dropout_per="example")
    rows = np.zeros(200, int)
    kept = np.array([[pairs.with_jepa(rows, step, m) for m in (0, 1)] for step in range(20)])
    assert abs((~kept).mean() - 0.3) < 0.02  # four standard deviations
    assert (np.abs((~kept).mean(-1) - 0.3) < 0.16).all()  # five, of each batch
    assert len({tuple(draw) for draw in kept.reshape(40, 200)}) == 40
    assert (pairs.with_jepa(rows, 3, 1) == kept[3, 1]).all()
    other = hand_made(EXAMPLES, jepa_dropout=0.3, jepa_dropout_per="example", seed=1)
    assert (other.with_jepa(rows, 3, 1) != kept[3, 1]).any()
    for options in (dict(jepa_weight=0.0), dict(jepa_dropout=0.0)):
        always = hand_made(EXAMPLES, jepa_dropout_per="example", **options)
        assert (always.with_jepa(rows, 3, 1) == ("jepa_dropout" in options)).all()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("stop_grad", [False, True])
def test_dropped_examples_have_plain_rows_and_the_loss_is_the_mean_of_the_others(
    name, stop_grad, monkeypatch
):
    """Two micro-batches, of which one keeps one example, the other two."""
    options = dict(batch_size=3, gradient_accumulation_steps=2, stop_grad=stop_grad)
    pairs = hand_made(EXAMPLES, **options, **LAYOUTS[name])
    keep = np.array([[True, False, False], [False, True, True]])
    monkeypatch.setattr(Pairs, "batch", lambda self, step: np.arange(3))
    monkeypatch.setattr(Pairs, "with_jepa", lambda self, rows, step, micro: keep[micro])
    plain = {"plan": {TEXT, PRED, CODE}}.get(name, {TEXT, CODE})
    packed = pairs.pack(np.arange(3), pairs.layout.row, keep[0])
    kinds = [set(block.unique().tolist()) - {0} for block in packed.block]
    assert kinds == [set(pairs.layout.row), plain, plain]

    gpt = gpt_for(pairs)
    terms, got = step_of(gpt, pairs)
    passes = [separate_passes(gpt, name, 1, keep[m], detach=stop_grad) for m in (0, 1)]
    ce, jepa = passes[0][0], (passes[0][1] + 2 * passes[1][1]) / 3
    (ce + jepa).backward()
    assert (terms["ce"], terms["jepa"]) == pytest.approx((ce.item(), jepa.item()), rel=1e-5)
    assert_close(got, gradients(gpt))


# --- a moving average encodes the targets -----------------------------------------------------


def checkpoint(folder="out/tiny"):
    return read_checkpoint(Path(folder) / "ckpt.pt", FORMAT)


def test_targets_come_from_the_average_of_the_weights(tiny_run):
    """Three steps written out."""
    options = {**PLAIN, **dict(ema=0.7, max_iters=3, jepa_weight=2, learning_rate=0.01)}
    tiny_run(**options)
    saved = checkpoint()
    config = load_config(TINY + [f"--{key}={value}" for key, value in options.items()])
    loaded = load_data(config)
    pairs = loaded.pairs["train"]
    torch.manual_seed(config.seed)
    model, average = (make_model(config, loaded.tokenizer.vocab_size) for _ in "12")
    average.load_state_dict(model.state_dict())
    optimizer = train.make_optimizer(model, config)
    for step in range(3):
        row = pairs.pack(pairs.batch(step), (TEXT, CODE, PRED))
        own = pairs.pack(pairs.batch(step), (TARGET,))
        hidden, ce = model(row, row.block != 0)
        pred = read_hidden(hidden, row.block, PRED)
        target = read_hidden(average.everywhere(own.idx, own.block), own.block, TARGET).detach()
        jepa = (1 - F.cosine_similarity(pred, target)).mean()
        (ce / (row.targets != -1).sum() + 2 * jepa).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters()):
                slow.copy_(0.7 * slow + 0.3 * fast)
    for name, got in (("model", model), ("ema", average)):
        for key, want in got.state_dict().items():
            torch.testing.assert_close(saved[name][key], want, rtol=1e-4, atol=1e-5)
    assert far_apart(saved["model"], saved["ema"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_average_gets_no_gradient_and_replaces_the_target_only(name):
    pairs = hand_made(EXAMPLES, ema=0.9, **LAYOUTS[name])
    gpt, average = gpt_for(pairs), gpt_for(pairs, seed=1).requires_grad_(False)
    moving = copy.deepcopy(average)
    terms, got = step_of(gpt, pairs, moving)
    assert all(p.grad is None for p in moving.parameters())
    ce, _ = separate_passes(gpt, name, 1)
    jepa = []
    for q, a in EXAMPLES:
        _, text, enc = PASSES[name](q, [V], a)
        jepa.append(1 - F.cosine_similarity(causal(gpt, text)[-1], causal(average, enc)[-1], dim=0))
    jepa = torch.stack(jepa).mean()
    (ce + jepa).backward()
    assert (terms["ce"], terms["jepa"]) == pytest.approx((ce.item(), jepa.item()), rel=1e-5)
    assert_close(got, gradients(gpt))


def test_the_average_survives_a_resume_bit_for_bit(tiny_run):
    options = dict(ema=0.9, dropout=0.1, jepa_dropout=0.4, jepa_dropout_per="example",
                   lr_decay_iters=4, eval_interval=2)  # fmt: skip
    tiny_run(**options, max_iters=4, out_dir="out/whole")
    tiny_run(**options, max_iters=2)
    tiny_run(**options, max_iters=4, init_from="resume")
    whole, resumed = checkpoint("out/whole"), checkpoint()
    for part in ("model", "ema"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(w, resumed[part][name]) for name, w in whole[part].items()), part
    assert far_apart(whole["model"], whole["ema"])


def test_mean_pooling_is_a_plain_mean_over_the_block():
    hidden = torch.randn(2, 5, 4)
    block = torch.tensor([[TEXT, TEXT, CODE, PRED, 0], [CODE, TEXT, TEXT, TEXT, 0]])
    got = read_hidden(hidden, block, TEXT, "mean")
    want = torch.stack([hidden[0, :2].mean(0), hidden[1, 1:4].mean(0)])
    torch.testing.assert_close(got, want)
    assert torch.isfinite(read_hidden(hidden, block, TARGET, "mean")).all()  # an absent block


# --- plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, k", WITH_K)
def test_a_prompt_ends_in_pred_tokens_in_the_plan_layout_only(name, k):
    pairs = hand_made(EXAMPLES, n_pred=k, **LAYOUTS[name])
    expected = [V, V + 1, V + 2][:k] if name == "plan" else []
    assert pred_tokens(pairs.config, V) == expected
    assert [pairs.prompt(i) for i in range(3)] == [q + expected for q, _ in EXAMPLES]


@pytest.fixture
def given(monkeypatch):
    """The prompts that sample.py has continued, as they come."""
    prompts, real = [], sample.generate

    def generate(trunk, new, *rest):
        prompts.extend(new)
        return real(trunk, new, *rest)

    monkeypatch.setattr(sample, "generate", generate)
    return prompts


SAMPLE = ["out/tiny", "--device=cpu", "--dtype=float32", "--max_new_tokens=2"]


@pytest.mark.parametrize("system_prompt", ["keep", "drop"])
def test_a_prompt_stands_where_questions_stood_in_training(
    system_prompt, given, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *paths: None)
    write(Path("mine.jsonl"), [
        chat(("system", "Add."), ("user", row["question"]), ("assistant", row["answer"]))
        for row in sums(40)])  # fmt: skip
    train.main([*TINY, "--dataset=mine.jsonl", "--eval_pairs=4", f"--system_prompt={system_prompt}",
                "--max_iters=1"])  # fmt: skip
    sample.main([*SAMPLE, "--num_samples=1", "--prompt=What is 3 plus 2?"])
    tokenizer = load_run(Path("out/tiny"), CPU).tokenizer
    before = tokenizer.encode(["Add.\n"])[0] if system_prompt == "keep" else []
    assert given == [[*before, *tokenizer.encode(["What is 3 plus 2?"])[0], tokenizer.sep]]


def test_samples_of_steps_and_of_running_text(tiny_run, given, capsys):
    """Of steps, the right answer is all that follows the question; running text has no end mark."""
    for views in ("steps", "steps_random"):
        tiny_run(views=views, max_iters=1)
        sample.main([*SAMPLE, "--num_samples=3"])
        printed = capsys.readouterr().out
        assert all(f"--- right answer\n{row['answer']}" in printed for row in sums(3, 500))
        sample.main([*SAMPLE, "--num_samples=1", "--prompt=What is"])
        tokenizer = load_run(Path("out/tiny"), CPU).tokenizer
        assert given[-1] == [*tokenizer.encode(["What is"])[0], tokenizer.sep]
    tiny_run(views="split", labels="all", max_iters=1)
    sample.main([*SAMPLE, "--prompt=What is"])
    assert given[-1] == load_run(Path("out/tiny"), CPU).tokenizer.encode(["What is"])[0]


def test_a_run_on_one_kind_of_facts_is_asked_in_its_own_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *paths: None)
    monkeypatch.setitem(relations.SIZES, "relations", Sizes(10, 500, 90, 0, 900))
    train.main([*TINY, "--dataset=relations", "--views=facts", "--tokenizer=words", "--max_iters=1",
                "--jepa_weight=0"])  # fmt: skip
    reversal.main(["out/tiny", "--device=cpu", "--dtype=float32"])
    facts = json.loads(Path("out/tiny/relations.json").read_text())["facts"]
    assert set(facts) == {"atomic", "held_out"}
    for prompt in (" a3 b4  r2", "a3 b4 r2"):
        sample.main([*SAMPLE, f"--prompt={prompt}"])
        assert "a3 b4" in capsys.readouterr().out
    for prompt, named in (("hello", "no word hello"), ("a3 b4 x", "no word x"), (" ", "0 tokens")):
        line = error_line(capsys, sample.main, [*SAMPLE, f"--prompt={prompt}"])
        assert named in line and "out/tiny" in line
    for wrong in ("--seed=99999999999999999999", "--temperature=nan", "--temperature=inf"):
        assert wrong[2:6] in error_line(capsys, sample.main, [*SAMPLE, wrong])


# --- running text and facts -------------------------------------------------------------------


def test_running_text_is_cut_into_blocks_and_each_block_in_two(bpe, tmp_path):
    path = tmp_path / "text.txt"
    lines = [f"Line {i}: {i} and {i * i}.\n" for i in range(400)]
    path.write_text("".join(lines))
    config = Config(dataset=str(path), views="split", labels="all", jepa_split=0.25, block_size=32,
                    batch_size=4, tokenizer="bpe")  # fmt: skip
    pairs = load_data(config, bpe).pairs
    ids = [t for line in bpe.encode(lines[:360]) for t in line]  # the last tenth is held out
    joined = [t for i in range(len(pairs["train"])) for b in (TEXT, CODE)
              for t in pairs["train"].view(i, b)]  # fmt: skip
    assert joined == ids
    assert (pairs["train"].lengths[:-1] == [8, 24, 24]).all()
    row = pairs["train"].pack(np.array([3]), pairs["train"].layout.row)
    assert (row.targets[0, :31] == row.idx[0, 1:32]).all()  # every token of the block but the first
    assert (row.targets[0, 31:] == -1).all()  # neither [PRED] nor the target
    anywhere = load_data(replace(config, jepa_split=0.0), bpe).pairs["train"].lengths[:-1]
    assert (anywhere.min(1) >= 1).all() and len(set(anywhere[:, 0])) > 15
    assert (anywhere[:, :2].sum(1) == 32).all()


def test_split_row_equals_three_passes_of_the_notebook(bpe, tmp_path):
    """encode(first part + [PRED]), encode(second part), and the language model over both."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i}: {i} and {i * i}.\n" for i in range(400)))
    config = Config(dataset=str(path), views="split", labels="all", block_size=32, batch_size=2,
                    n_pred=2, n_layer=2, n_head=2, n_embd=32, tokenizer="bpe")  # fmt: skip
    pairs = load_data(config, bpe).pairs["train"]
    torch.manual_seed(0)
    gpt = make_model(config, bpe.vocab_size).double()
    row = pairs.pack(np.array([5]), pairs.layout.row)
    hidden, ce = gpt(row, row.block != 0)
    first, second = pairs.view(5, TEXT), pairs.view(5, CODE)

    def alone(tokens):
        idx = torch.tensor([tokens])
        return gpt.everywhere(idx, torch.ones_like(idx))

    pred, enc = alone([*first, bpe.vocab_size, bpe.vocab_size + 1])[0, -1], alone(second)[0, -1]
    torch.testing.assert_close(read_hidden(hidden, row.block, pairs.layout.pred)[0], pred)
    torch.testing.assert_close(read_hidden(hidden, row.block, pairs.layout.enc)[0], enc)
    logits = gpt.logits(alone(first + second)[0, :-1])
    want = F.cross_entropy(logits, torch.tensor((first + second)[1:]), reduction="sum")
    torch.testing.assert_close(ce.double(), want, rtol=1e-5, atol=1e-4)


FACTS = dict(dataset="relations", views="facts", tokenizer="words", block_size=16, batch_size=8,
             n_layer=2, n_head=2, n_embd=32)  # fmt: skip


@pytest.fixture
def few_facts(monkeypatch):
    """3 relations, 20 entities with 40 facts in both directions, 16 with 30 in one."""
    monkeypatch.setitem(relations.SIZES, "relations", Sizes(3, 20, 16, 40, 30))


def test_facts_are_labelled_on_the_answer_and_predict_their_inverse(few_facts):
    loaded = load_data(Config(**FACTS))
    pairs, words = loaded.pairs["train"], loaded.tokenizer.decode
    assert len(pairs) == 2 * 40 + 30
    row = pairs.pack(np.array([0]), pairs.layout.row)
    assert row.block[0].tolist() == [TEXT] * 3 + [CODE] * 2 + [PRED] + [TARGET] * 5
    e1a, e1b, r, e2a, e2b, _, *inverse = row.idx[0].tolist()
    assert row.targets[0].tolist() == [-1, -1, e2a, e2b] + [-1] * 7
    assert inverse == [e2a, e2b, r + 3, e1a, e1b]  # 3 relations, then their inverses
    mask, positions = block_causal_mask(row.block, visible_blocks(pairs.layout.parents))
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert mask[0, 5].tolist() == [True] * 6 + [False] * 5  # [PRED] sees the whole fact
    assert words([e1a, e1b, r]).split()[2] in {"r0", "r1", "r2"}
    atomic = np.arange(80, 110)
    assert not pairs.has_target(atomic).any() and pairs.has_target(np.arange(80)).all()


def test_held_out_facts_are_the_inverses_of_atomic_ones_and_never_trained_on(few_facts):
    pairs = load_data(Config(**FACTS)).pairs

    def facts(split, rows):
        return {(*pairs[split].view(i, TEXT), *pairs[split].view(i, CODE)) for i in rows}

    trained = facts("train", range(110))
    held_out = facts("val", range(15)) | facts("test", range(15))
    assert len(held_out) == 30 and not held_out & trained
    atomic = facts("train", range(80, 110))
    assert {(a, b, r - 3, c, d) for c, d, r, a, b in held_out} == atomic
