"""Claims about views.py and its objective: layouts, views, what the JEPA term is taken on."""

import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, error_line, sums

import data
import eval_relations
import sample
import train
from config import Config, load_config
from data import as_pair, load_data, read_jsonl
from model import GPT, block_causal_mask, read_hidden, visible_blocks
from relations import Facts, relation_facts
from run import encode_pairs, load_run, read_checkpoint
from views import (
    AGAIN,
    CODE,
    PRED,
    TARGET,
    TEXT,
    Pairs,
    layout_of,
    longest_path,
    pred_tokens,
    split_steps,
    tokenize,
)

CPU, NO_AUTOCAST = torch.device("cpu"), contextlib.nullcontext
LAYOUTS = {
    "tree": {}, "isolated": {"layout": "isolated"}, "plan": {"layout": "plan"},
    "reverse": {"direction": "reverse"}, "front": {"pred_place": "front"},
}  # fmt: skip
WITH_K = [(name, k) for name in LAYOUTS for k in (0, 1, 3) if k or name not in ("plan", "front")]
LETTERS = {"q": TEXT, "a": CODE, "t": TARGET, "P": PRED, "g": AGAIN}
V = 16  # 14 is the separator, 15 end of text; [PRED] are 16, 17, 18


def hand_made(examples, **options):
    """Pairs of (text, code) token lists whose target is the code, as tokenize lays them out."""
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=len(examples))
    tokens = [token for text, code in examples for token in text + code]
    is_label = [part for text, code in examples for part in [0] * len(text) + [1] * len(code)]
    lengths = np.array([[len(text), len(code), len(code)] for text, code in examples])
    begin = np.cumsum([0] + [len(text) + len(code) for text, code in examples])[:-1]
    starts = np.stack([begin, begin + lengths[:, 0], begin + lengths[:, 0]], 1)
    config = Config(**{**sizes, **options})
    return Pairs(np.array(tokens, np.int32), np.array(is_label, bool), starts, lengths,
                 lengths[:, 0], config, V)  # fmt: skip


def gpt_for(pairs, seed=0):
    """A tiny float64 model with strong opinions."""
    torch.manual_seed(seed)
    gpt = GPT(pairs.config, V, pairs.layout.parents).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    return gpt


def gradients(gpt):
    found = {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}
    gpt.zero_grad()
    return found


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
    idx, block, _ = pairs.pack(np.array([0, 1]), pairs.layout.row)
    gpt = gpt_for(pairs)
    before = gpt.hidden(idx, block)
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
            changes = (gpt.hidden(changed, block) != before).any(-1)
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
    return gpt.hidden(idx, torch.ones_like(idx))[0]


def separate_passes(gpt, name, k, keep=None, detach=False, mean=False):
    """Cross-entropy and cosine loss, one view of one example at a time."""
    ce, n_labels, jepa = 0.0, 0, []
    for i, (q, a) in enumerate(EXAMPLES):
        lm, text, enc = PASSES[name](q, [V + j for j in range(k)], a)
        n = len(a) - (name == "isolated")  # its first token has nothing to be predicted from
        logits = causal(gpt, lm)[-n - 1 : -1] @ gpt.wte.weight.T
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
    hidden = gpt.hidden(rows.idx, rows.block)
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
    terms, *_ = train.forward_backward(gpt, pairs, 0, CPU, NO_AUTOCAST)
    got = gradients(gpt)
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
    ce, pred, target = encode_pairs(gpt, pairs, 9, CPU, NO_AUTOCAST)
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
    terms, *_ = train.forward_backward(gpt, pairs, 0, CPU, NO_AUTOCAST)
    got = gradients(gpt)

    nll, jepa = [], []
    for q, a in EXAMPLES:
        n, text = len(q) + len(a), len(q) + k
        mask = torch.ones(1, n, n, dtype=torch.bool).tril()
        hidden = gpt.encode(torch.tensor([q + a]), torch.arange(n)[None], mask)[0]
        log_p = (hidden @ gpt.wte.weight.T).log_softmax(-1)
        nll += [-log_p[len(q) + i - 1, token] for i, token in enumerate(a)]

        idx = torch.tensor([q + [V + i for i in range(k)] + a])
        halves = torch.block_diag(torch.ones(text, text).tril(), torch.ones(len(a), len(a)).tril())
        positions = torch.tensor([[*range(text), *range(len(a))]])
        hidden = gpt.encode(idx, positions, halves.bool()[None])[0]
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
    return data.train_tokenizer(texts, 320)


STEPS = dict(views="steps", n_layer=2, n_head=2, n_embd=32, block_size=300)


def tokenized(rows, bpe, **options):
    pairs, left_out = tokenize([as_pair(row) for row in rows], bpe, Config(**options))
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


def test_a_random_pair_of_steps_is_any_neighbouring_one_and_stays_the_same(bpe):
    options = dict(**STEPS, step_pair="random")
    pairs = tokenized(step_rows(40), bpe, **options)
    again = tokenized(step_rows(40), bpe, **options)
    steps, found = ANSWERS["lines"][1], []
    for i in range(40):
        text, rest, target = shown(pairs, i, bpe)
        assert [text, rest, target] == shown(again, i, bpe)
        assert text.removeprefix("How many?") + rest == GSM8K
        at = [step.rstrip("\n") for step in steps].index(target)
        assert text == "How many?" + "".join(steps[:at])
        found.append(at)
    assert set(found) == {1, 2} and 8 < found.count(1) < 32
    other = tokenized(step_rows(40), bpe, **options, seed=1)
    assert any(shown(other, i, bpe) != shown(pairs, i, bpe) for i in range(40))


@pytest.mark.parametrize("kind", [*ANSWERS, *BLANKS])
@pytest.mark.parametrize("step_pair", ["first", "random"])
def test_labels_of_steps_are_the_whole_answer_and_end_of_text(kind, step_pair, bpe):

    code = ANSWERS[kind][0] if kind in ANSWERS else BLANKS[kind]
    at = np.arange(8 if step_pair == "random" else 1)
    pairs = tokenized([{"text": "How?", "code": code}] * len(at), bpe, **STEPS, step_pair=step_pair)
    packed = pairs.pack(at, pairs.layout.row, pairs.has_target(at))
    for i in at:
        labels = packed.targets[i][packed.targets[i] != -1].tolist()
        assert bpe.decode(labels) == code and labels[-1] == bpe.eot
        question = [*bpe.encode(["How?"])[0], bpe.sep]
        assert [*pairs.view(i, TEXT), *pairs.view(i, CODE)] == question + labels


def test_examples_with_two_steps_are_counted(tmp_path, bpe, capsys):
    rows = [*step_rows(30), *({"question": f"Why {i}?", "answer": "so\n#### 5"} for i in range(10))]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_data(Config(dataset=str(path), **STEPS), bpe).pairs
    n = {s: len([i for i in range(len(p)) if p.view(i, TARGET)]) for s, p in pairs.items()}
    assert sum(n.values()) == 30 and len(pairs["train"]) == 36
    line = f"with a JEPA term: train {n['train']} of 36, val {n['val']} of 4"
    assert line in capsys.readouterr().out


def test_examples_without_two_steps_train_cross_entropy_only(bpe):
    rows = [*step_rows(2), {"question": "Why?", "answer": "so\n#### 5"}]
    pairs = tokenized(rows, bpe, **STEPS, batch_size=3)
    assert pairs.lengths[:, TARGET - 1].tolist() == [*pairs.lengths[:2, TARGET - 1], 0]
    assert pairs.has_target(np.arange(3)).tolist() == [True, True, False]
    assert pairs.with_jepa(np.arange(3), 0, 0).tolist() == [True, True, False]
    gpt = GPT(pairs.config, bpe.vocab_size, pairs.layout.parents).double()
    terms, *_ = train.forward_backward(gpt, pairs, 0, CPU, NO_AUTOCAST)
    got = gradients(gpt)
    ce, n_labels, jepa = 0.0, 0, []
    for i, row in enumerate(rows):
        text, code, target = (pairs.view(i, b) for b in (TEXT, CODE, TARGET))
        start = len(bpe.encode([row["question"]])[0]) + 1
        logits = causal(gpt, text + code)[start - 1 : -1] @ gpt.wte.weight.T
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

    _, pred, target = encode_pairs(gpt, pairs, 3, CPU, NO_AUTOCAST)
    assert pred.shape == target.shape == (2, 32)
    alone = tokenized(rows[2:], bpe, **STEPS, batch_size=1)
    terms, *_ = train.forward_backward(gpt, alone, 0, CPU, NO_AUTOCAST)
    assert set(terms) == {"ce", "loss"} and terms["loss"] == terms["ce"] > 0
    assert set(alone.pack(np.array([0]), alone.layout.row, False).block.unique().tolist()) == {1, 2}


def test_steps_of_data_without_steps_are_one_line(tmp_path, bpe, capsys):
    path = write(tmp_path / "mine.jsonl", [{"text": f"a{i}", "code": f"b{i}"} for i in range(40)])
    with pytest.raises(SystemExit):
        load_data(Config(dataset=path, views="steps"), bpe)
    assert "step" in capsys.readouterr().err


def test_generation_from_steps_starts_at_the_question(bpe):
    pairs = tokenized(step_rows(), bpe, **STEPS)
    assert pairs.prompt(0) == [*bpe.encode(["How many?"])[0], bpe.sep]


# --- rows of data in three forms --------------------------------------------------------------


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
    {"question": "q", "code": "c"}, {"prompt": "q", "completion": "a"}, {},
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


def test_a_jsonl_file_is_a_data_set(tmp_path, capsys):
    forms = [
        lambda i: {"question": f"q{i}?", "answer": f"a{i}", "id": i},
        lambda i: {"text": f"q{i}?", "code": f"a{i}"},
        lambda i: chat(("system", "s"), ("user", f"q{i}?"), ("assistant", f"a{i}")),
    ]
    path = tmp_path / "mine.jsonl"
    write(path, [forms[i % 3](i) for i in range(60)])
    config = load_config([f"--dataset={path}", "--tokenizer=bpe", "--bpe_vocab_size=320",
                          "--system_prompt=drop"])  # fmt: skip
    loaded = load_data(config)
    assert {split: len(pairs) for split, pairs in loaded.pairs.items()} == {"train": 54, "val": 6}
    found = []
    for pairs in loaded.pairs.values():
        for i in range(len(pairs)):
            text, code, target = shown(pairs, i, loaded.tokenizer)
            assert target == code
            found.append((text, code))
    assert sorted(found) == sorted((f"q{i}?", f"a{i}") for i in range(60))  # every row, once
    p = loaded.provenance
    assert (p["dataset"], p["source"], p["train_rows"], p["val_rows"]) == ("mine", str(path), 54, 6)
    assert p["train_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"data mine from {path}: train 54, val 6 pairs" in capsys.readouterr().out
    for bad in (tmp_path / "none.jsonl", "nosuch"):
        with pytest.raises(SystemExit):
            load_data(Config(dataset=str(bad)))


def test_regexes_are_a_data_set_with_three_splits(monkeypatch, bpe):
    real = data.regex_pairs
    monkeypatch.setattr(
        data, "regex_pairs", lambda split, n, **options: real(split, n // 100, **options))
    loaded = load_data(Config(dataset="regex"), bpe)
    assert {s: len(p) for s, p in loaded.pairs.items()} == {"train": 80, "val": 5, "test": 10}
    row = real("train", 1)[0]
    assert shown(loaded.pairs["train"], 0, bpe) == [row["text"], row["code"], row["code"]]


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
    terms, *_ = train.forward_backward(gpt, pairs, 0, CPU, NO_AUTOCAST)
    got = gradients(gpt)
    passes = [separate_passes(gpt, name, 1, keep[m], detach=stop_grad) for m in (0, 1)]
    ce, jepa = passes[0][0], (passes[0][1] + 2 * passes[1][1]) / 3
    (ce + jepa).backward()
    assert (terms["ce"], terms["jepa"]) == pytest.approx((ce.item(), jepa.item()), rel=1e-5)
    assert_close(got, gradients(gpt))


# --- a moving average encodes the targets -----------------------------------------------------


def checkpoint(folder="out/tiny"):
    return read_checkpoint(Path(folder) / "ckpt.pt")


def test_targets_come_from_the_average_of_the_weights(tiny_run):
    """Three steps written out."""
    options = dict(ema=0.7, max_iters=3, jepa_weight=2, learning_rate=0.01)
    tiny_run(**options)
    saved = checkpoint()
    config = load_config(TINY + [f"--{key}={value}" for key, value in options.items()])
    loaded = load_data(config)
    pairs = loaded.pairs["train"]
    torch.manual_seed(config.seed)
    model, average = (GPT(config, loaded.tokenizer.vocab_size, pairs.layout.parents) for _ in "12")
    average.load_state_dict(model.state_dict())
    optimizer = train.make_optimizer(model, config)
    for step in range(3):
        row = pairs.pack(pairs.batch(step), (TEXT, CODE, PRED))
        own = pairs.pack(pairs.batch(step), (TARGET,))
        hidden, ce = model(*row)
        pred = read_hidden(hidden, row.block, PRED)
        target = read_hidden(average(own.idx, own.block)[0], own.block, TARGET).detach()
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
    terms, *_ = train.forward_backward(gpt, pairs, 0, CPU, NO_AUTOCAST, average)
    got = gradients(gpt)
    assert all(p.grad is None for p in average.parameters())
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
    """The prompts that GPT.generate is given, as they come."""
    prompts, real = [], GPT.generate
    monkeypatch.setattr(
        GPT, "generate", lambda self, new, *a, **k: prompts.extend(new) or real(self, new, *a, **k))
    return prompts


SAMPLE = ["out/tiny", "--device=cpu", "--dtype=float32", "--max_new_tokens=2"]


def test_sampling_from_a_plan_gives_the_model_its_pred_tokens(tiny_run, given, capsys):
    tiny_run(layout="plan", n_pred=2, max_iters=1)
    sample.main([*SAMPLE, "--num_samples=2", "--prompt=What is 3 plus 2?"])
    sample.main([*SAMPLE, "--num_samples=2"])
    held_out = load_data(load_config([*TINY, "--layout=plan", "--n_pred=2"]))
    tokenizer, val = held_out.tokenizer, held_out.pairs["val"]
    pred = [tokenizer.vocab_size, tokenizer.vocab_size + 1]
    asked = [*tokenizer.encode(["What is 3 plus 2?"])[0], tokenizer.sep, *pred]
    assert given == [asked, asked, *(val.view(i, TEXT) + pred for i in (0, 1))]
    assert "What is 3 plus 2?" in capsys.readouterr().out


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
    tiny_run(views="steps", max_iters=1)
    sample.main([*SAMPLE, "--num_samples=3"])
    printed = capsys.readouterr().out
    assert all(f"--- right answer\n{row['answer']}" in printed for row in sums(3, 500))
    tiny_run(views="split", labels="all", max_iters=1)
    sample.main([*SAMPLE, "--prompt=What is"])
    assert given[-1] == load_run(Path("out/tiny"), CPU).tokenizer.encode(["What is"])[0]


def test_a_run_on_one_kind_of_facts_is_asked_in_its_own_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *paths: None)
    train.main([*TINY, "--dataset=relations", "--views=facts", "--tokenizer=words", "--max_iters=1",
                "--n_train_facts=0", "--n_atomic_entities=90", "--jepa_weight=0"])  # fmt: skip
    eval_relations.main(["out/tiny", "--device=cpu", "--dtype=float32"])
    facts = json.loads(Path("out/tiny/relations.json").read_text())["facts"]
    assert set(facts) == {"atomic", "held_out"}
    for prompt in (" a3 b4  r2", "a3 b4 r2"):
        sample.main([*SAMPLE, f"--prompt={prompt}"])
        assert "a3 b4" in capsys.readouterr().out
    for prompt in ("hello", "a3 b4 x", " "):
        line = error_line(capsys, sample.main, [*SAMPLE, f"--prompt={prompt}"])
        assert "must be words that" in line
    for wrong in ("--seed=99999999999999999999", "--temperature=nan", "--temperature=inf"):
        assert wrong[2:6] in error_line(capsys, sample.main, [*SAMPLE, wrong])


# --- running text and facts -------------------------------------------------------------------


def test_running_text_is_cut_into_blocks_and_each_block_in_two(bpe, tmp_path):
    path = tmp_path / "text.txt"
    lines = [f"Line {i}: {i} and {i * i}.\n" for i in range(400)]
    path.write_text("".join(lines))
    config = Config(dataset=str(path), views="split", labels="all", jepa_split=0.25, block_size=32,
                    batch_size=4)  # fmt: skip
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
                    n_pred=2, n_layer=2, n_head=2, n_embd=32)  # fmt: skip
    pairs = load_data(config, bpe).pairs["train"]
    torch.manual_seed(0)
    gpt = GPT(config, bpe.vocab_size, pairs.layout.parents).double()
    row = pairs.pack(np.array([5]), pairs.layout.row)
    hidden, ce = gpt(*row)
    first, second = pairs.view(5, TEXT), pairs.view(5, CODE)

    def alone(tokens):
        idx = torch.tensor([tokens])
        return gpt.hidden(idx, torch.ones_like(idx))

    pred, enc = alone([*first, bpe.vocab_size, bpe.vocab_size + 1])[0, -1], alone(second)[0, -1]
    torch.testing.assert_close(read_hidden(hidden, row.block, pairs.layout.pred)[0], pred)
    torch.testing.assert_close(read_hidden(hidden, row.block, pairs.layout.enc)[0], enc)
    logits = gpt.lm_head(alone(first + second)[0, :-1])
    want = F.cross_entropy(logits, torch.tensor((first + second)[1:]), reduction="sum")
    torch.testing.assert_close(ce.double(), want, rtol=1e-5, atol=1e-4)


FACTS = dict(dataset="relations", views="facts", tokenizer="words", n_relations=3,
             n_train_entities=20, n_atomic_entities=16, n_train_facts=40, n_atomic_facts=30,
             block_size=16, batch_size=8, n_layer=2, n_head=2, n_embd=32)  # fmt: skip


def test_facts_are_labelled_on_the_answer_and_predict_their_inverse():
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


def test_held_out_facts_are_the_inverses_of_atomic_ones_and_never_trained_on():
    pairs = load_data(Config(**FACTS)).pairs

    def facts(split, rows):
        return {(*pairs[split].view(i, TEXT), *pairs[split].view(i, CODE)) for i in rows}

    trained = facts("train", range(110))
    held_out = facts("val", range(15)) | facts("test", range(15))
    assert len(held_out) == 30 and not held_out & trained
    atomic = facts("train", range(80, 110))
    assert {(a, b, r - 3, c, d) for c, d, r, a, b in held_out} == atomic


def test_ask_gives_the_models_own_probabilities():
    config = Config(**FACTS)
    torch.manual_seed(0)
    facts = Facts(3, 36)
    vocab_size = load_data(config).tokenizer.vocab_size
    gpt = GPT(config, vocab_size, layout_of(config).parents).eval()
    rows = relation_facts(3, 20, 16, 40, 30, seed=0)["train"]["rows"][:4]
    first, second = eval_relations.ask(gpt, facts, rows, CPU, NO_AUTOCAST)
    for n, row in enumerate(torch.from_numpy(rows)):
        logits = gpt.lm_head(gpt.hidden(row[None], torch.ones(1, 5, dtype=torch.long)))[0]
        want = logits[..., : facts.vocab_size].log_softmax(-1).detach().numpy()
        np.testing.assert_allclose(first[n], want[2], atol=1e-5)
        symbol = row[3].item() - (facts.vocab_size - 2 * facts.side)
        np.testing.assert_allclose(second[n, symbol], want[3], atol=1e-5)
