"""Claims about alignment.py: what is measured of held-out pairs, and what the numbers mean."""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alignment import (
    alignment,
    effective_rank,
    embed_pairs,
    panel_line,
    target_groups,
    verdict,
)
from config import Config
from generators.word_problems import word_problems
from plumbing.jsonl import as_pair
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
    return tokenize([as_pair(row) for row in word_problems("val", n)], tokenizer, config)[0]


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
        "matched": 1, "mismatched": 0, "retrieval_at_1": 1, "mean_rank": 1, "chance": 1 / 6,
        "shared": 0,
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
        "matched": 1, "mismatched": 1, "retrieval_at_1": 0, "mean_rank": N, "chance": 1 / N,
        "shared": 0,
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


# --- shared answers ---------------------------------------------------------------------------


def test_a_perfect_encoder_of_two_answers_finds_them_all_and_is_aligned():
    """It scored 0.000, and was told COLLAPSE."""
    groups = np.arange(40) % 2
    x = torch.eye(2)[groups]
    measures = alignment(x, x, groups)
    assert measures["retrieval_at_1"] == measures["mean_rank"] == measures["matched"] == 1
    assert measures["mismatched"] == 0 and verdict(measures) == "aligned"
    assert (measures["chance"], measures["shared"]) == (1 / 2, 40)
    line = panel_line(measures, 40)
    assert "retrieval@1 1.000 of 40 (chance 0.500, 40 share their answer)" in line
    ungrouped = alignment(x, x)  # as it was
    assert ungrouped["retrieval_at_1"] == 0 and ungrouped["mismatched"] > 0.4


def test_shared_answers_are_left_out_of_every_comparison():
    """Against a plain loop."""
    groups = [0, 1, 0, 2, 1, 0, 3]
    pred, target = torch.randn(2, 7, 4)
    measures = alignment(pred, target, np.array(groups))
    cosine = F.cosine_similarity(pred[:, None], target[None], dim=-1).tolist()
    wrong, ranks = [], []
    for i in range(7):
        others = [cosine[i][j] for j in range(7) if groups[j] != groups[i]]
        wrong += others
        ranks.append(1 + sum(other >= cosine[i][i] for other in others))
    assert measures["mismatched"] == pytest.approx(sum(wrong) / len(wrong), abs=1e-5)
    assert measures["mean_rank"] == pytest.approx(sum(ranks) / 7)
    assert measures["retrieval_at_1"] == pytest.approx(ranks.count(1) / 7)
    assert (measures["chance"], measures["shared"]) == (1 / 4, 5)


def test_chance_is_what_embeddings_without_meaning_find():
    """Drawn anew many times. Equal answers have one embedding, so that a wrong answer that occurs
    often is no more in the way than one that occurs once; to guess one answer always is no less."""
    groups, found, guessed = np.array([0] * 6 + [1] * 3 + [2]), [], []
    for _ in range(400):
        target = torch.randn(3, 6)[groups]
        measures = alignment(torch.randn(10, 6), target, groups)
        found.append(measures["retrieval_at_1"])
        guessed.append(alignment(torch.randn(1, 6).expand(10, 6), target, groups)["retrieval_at_1"])
    assert measures["chance"] == 1 / 3
    assert sum(found) / 400 == pytest.approx(1 / 3, abs=0.03)
    assert sum(guessed) / 400 == pytest.approx(1 / 3, abs=0.06)


def test_groups_of_different_answers_change_no_number():
    pred, target = torch.randn(2, 9, 4)
    assert alignment(pred, target, np.arange(9)[::-1].copy()) == alignment(pred, target)


def test_one_answer_alone_is_told_in_words_and_is_no_collapse():
    x = torch.randn(1, 8).expand(5, 8)
    measures = alignment(x, x, np.zeros(5, int))
    assert math.isnan(measures["mismatched"]) and measures["matched"] == pytest.approx(1)
    assert measures["retrieval_at_1"] == measures["chance"] == 1
    assert verdict(measures) == "of one answer only"
    assert "mismatched nan" in panel_line(measures, 5)


def test_target_groups_are_those_of_the_embedded_pairs(bpe):
    pairs = held_out(8, bpe, SMALL)
    pairs.starts[3], pairs.lengths[3] = pairs.starts[6], pairs.lengths[6]
    pairs.lengths[[1, 4], TARGET - 1] = 0  # as long as each other, and not embedded
    model = make_model(SMALL, bpe.vocab_size)
    for n in (7, 256):
        _, _, target = embed_pairs(model, pairs, n, contextlib.nullcontext)
        groups = target_groups(pairs, n)
        assert groups.shape == (len(target),)
        same = [(i, j) for i in range(len(groups)) for j in range(i) if groups[i] == groups[j]]
        assert same == [(4, 2)]  # numbers 6 and 3, without 1 and 4
        torch.testing.assert_close(target[4], target[2])


# --- divergence -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_of_a_diverged_model_are_measured_without_an_error(value):
    """LAPACK refuses what is not finite."""
    x = torch.randn(5, 4)
    x[2, 1] = value
    assert math.isnan(effective_rank(x))
    measures = alignment(x, torch.randn(5, 4))
    assert math.isnan(measures["effective_rank_pred"]) and math.isnan(measures["matched"])
    assert math.isfinite(measures["effective_rank_target"])
    assert measures["retrieval_at_1"] < 1 and verdict(measures) == "not finite"
    nowhere = torch.full((5, 4), value)
    assert alignment(nowhere, nowhere)["retrieval_at_1"] == 0


# --- ranks and words --------------------------------------------------------------------------


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
