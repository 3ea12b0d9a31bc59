"""Claims about alignment.py: what is measured of held-out pairs, and what the numbers mean."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

import data
from alignment import alignment, effective_rank, embed_pairs, panel_line, verdict
from config import Config
from generators.word_problems import word_problems
from plumbing.tokenizers import train_tokenizer
from run import make_model
from views import CODE, PRED, TARGET, TEXT, tokenize

# --- held-out pairs ---------------------------------------------------------------------------

# Dropout is on, so that a model left in training mode would show.
SMALL = Config(n_layer=2, n_head=2, n_embd=32, block_size=300, dropout=0.1)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([r["answer"] for r in word_problems("train", 100)], 320)


def held_out(n, tokenizer, config):
    return tokenize([data.as_pair(row) for row in word_problems("val", n)], tokenizer, config)[0]


@pytest.mark.parametrize("n_pred", [0, 1, 3])
def test_embedded_pairs_keep_their_order_and_equal_one_pair_at_a_time(n_pred, bpe):
    """Batches are sorted by length; what comes back is not. 20 pairs make two batches."""
    config = Config(**{**vars(SMALL), "n_pred": n_pred})
    pairs = held_out(25, bpe, config)
    model = make_model(config, bpe.vocab_size).train()
    ce, pred, target = embed_pairs(model, pairs, 20, contextlib.nullcontext)
    assert model.training  # as it was
    assert pred.shape == target.shape == (20, 32) and not pred.requires_grad

    model.eval()
    ce_sum, n_labels = 0.0, 0
    for i in range(20):
        # Every view in a row of its own, so that blocks and padding cannot matter.
        batch = pairs.pack([i], (TEXT, PRED))
        hidden = model.everywhere(batch.idx, batch.block)
        text, code = pairs.view(i, TEXT), pairs.view(i, CODE)
        at_end = hidden[0, len(text) + n_pred - 1]
        torch.testing.assert_close(pred[i], at_end, rtol=1e-4, atol=1e-5)
        batch = pairs.pack([i], (TARGET,))
        hidden = model.everywhere(batch.idx, batch.block)
        torch.testing.assert_close(target[i], hidden[0, len(code) - 1], rtol=1e-4, atol=1e-5)
        idx = torch.tensor([text + code])
        # one block: plain causal attention
        hidden = model.everywhere(idx, torch.full_like(idx, TEXT))
        logits = model.logits(hidden[0, len(text) - 1 : -1])
        ce_sum += F.cross_entropy(logits, torch.tensor(code), reduction="sum").item()
        n_labels += len(code)
    assert ce == pytest.approx(ce_sum / n_labels, rel=1e-5)


def test_asking_for_more_pairs_than_there_are_gives_all(bpe):
    pairs = held_out(5, bpe, SMALL)
    model = make_model(SMALL, bpe.vocab_size)
    _, pred, target = embed_pairs(model, pairs, 256, contextlib.nullcontext)
    assert len(pred) == len(target) == len(pairs)


def test_pairs_without_a_target_count_for_the_cross_entropy_alone(bpe):
    pairs = held_out(8, bpe, SMALL)
    model = make_model(SMALL, bpe.vocab_size)
    ce, pred, target = embed_pairs(model, pairs, 8, contextlib.nullcontext)
    pairs.lengths[[1, 4], TARGET - 1] = 0
    fewer_ce, fewer_pred, fewer_target = embed_pairs(model, pairs, 8, contextlib.nullcontext)
    assert fewer_ce == pytest.approx(ce, rel=1e-5)
    with_target = [i for i in range(len(pairs)) if i not in (1, 4)]
    torch.testing.assert_close(fewer_pred, pred[with_target], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fewer_target, target[with_target], rtol=1e-4, atol=1e-5)


# --- alignment --------------------------------------------------------------------------------


def test_alignment_of_identical_orthogonal_pairs_is_perfect():
    x = 3 * torch.eye(6, 10)
    measures = alignment(x, 2 * x)
    assert measures == pytest.approx({
        "matched": 1, "mismatched": 0, "retrieval_at_1": 1, "mean_rank": 1,
        "effective_rank_pred": 6, "effective_rank_target": 6,
    }, abs=1e-5)  # fmt: skip
    assert verdict(measures) == "aligned"


# N = 5, C = 100: equal rows give cosines that differ in the last bit, depending on where they
# stand in the matrix product; a tie has to be seen as one all the same.
@pytest.mark.parametrize("N, C", [(4, 8), (64, 32), (5, 512), (5, 100)])
def test_alignment_of_embeddings_collapsed_to_a_point_shows_collapse(N, C):
    point = torch.randn(1, C).repeat(N, 1)
    measures = alignment(point, point)
    # every target ties with the own one: a miss, and the worst rank
    assert measures == pytest.approx({
        "matched": 1, "mismatched": 1, "retrieval_at_1": 0, "mean_rank": N,
        "effective_rank_pred": 1, "effective_rank_target": 1,
    }, abs=1e-4)  # fmt: skip
    assert verdict(measures) == "collapsed"


def test_alignment_of_shuffled_pairs_finds_none():
    x = torch.eye(6)
    measures = alignment(x, x.roll(1, 0))
    assert measures["matched"] == pytest.approx(0, abs=1e-6)
    assert measures["mismatched"] == pytest.approx(6 / 30, abs=1e-6)  # one of five wrong ones is x
    assert measures["retrieval_at_1"] == 0
    assert measures["mean_rank"] == 6  # the five others are as near, and a tie counts against it
    assert verdict(measures) == "not aligned"


def test_alignment_ranks_each_pred_among_all_targets():
    target = torch.eye(3)
    pred = torch.tensor([[1.0, 0.2, 0.1], [0.5, 0.2, 0.1], [0.9, 0.1, 0.5]])
    measures = alignment(pred, target)  # ranks of the own target: 1, 2, 2
    assert measures["mean_rank"] == pytest.approx(5 / 3)
    assert measures["retrieval_at_1"] == pytest.approx(1 / 3)


def test_effective_rank_lies_between_one_and_the_dimension():
    assert effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-5)
    assert effective_rank(torch.ones(7, 3)) == pytest.approx(1, rel=1e-4)
    # singular values 3 and 1: exp of the entropy of (3/4, 1/4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("matched, mismatched, expected", [
    (1.0, 0.91, "collapsed"), (1.0, 0.89, "partly aligned"), (0.9, 0.0, "aligned"),
    (0.51, 0.47, "collapsed"), (0.6, 0.31, "partly aligned"), (0.6, 0.29, "aligned"),
    (0.49, 0.47, "not aligned"), (0.1, 0.3, "not aligned"), (0.03, -0.12, "not aligned"),
])  # fmt: skip
def test_verdict_compares_mismatched_with_matched(matched, mismatched, expected):
    assert verdict({"matched": matched, "mismatched": mismatched}) == expected


def test_the_panel_in_a_line_says_what_chance_gives():
    line = panel_line(alignment(torch.eye(8), torch.eye(8)), 8)
    assert line == ("cosine matched 1.000 mismatched 0.000 | retrieval@1 1.000 of 8 (chance 0.125) "
                    "| effective rank 8.0 / 8.0")  # fmt: skip
