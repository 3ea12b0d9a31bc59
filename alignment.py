"""Have the two views of held-out pairs met, or has everything collapsed into one point?

    embed_pairs    cross-entropy and both views' embeddings of held-out pairs
    target_groups  which of those pairs have the same answer, and so are no wrong pairs
    alignment      what training logs of them; verdict says it in a word

Cosine alone proves nothing: point every embedding the same way and it is 1. So right pairs are set
beside wrong ones. `pred` and `target` are (N, C) each, rows i belong together.
"""

import math

import numpy as np
import torch

from jepa import OBJECTIVES, cosines, wrong_pairs
from model import Trunk
from plumbing.output import Bar
from views import Pairs


@torch.no_grad()
def embed_pairs(trunk: Trunk, pairs: Pairs, n: int, autocast):
    """Cross-entropy and both views' embeddings of the first n pairs of a split: the mean per label
    in nats; pred and target, float32 on the CPU, (m, C) for the m of them that have both views, in
    the order of the pairs."""
    n = min(n, len(pairs))
    objective, has_target = OBJECTIVES[pairs.config.objective], pairs.has_target(np.arange(n))
    pred, target = torch.empty(2, n, trunk.width).unbind()
    ce, n_labels = 0.0, 0
    was_training = trunk.training
    trunk.eval()
    for at, batch in held_out_batches(pairs, n):
        batch = batch.to(trunk.device)
        with autocast():
            hidden, ce_sum = trunk(batch, objective.reads(batch, pairs.config))
        ce, n_labels = ce + ce_sum.item(), n_labels + (batch.targets != -1).sum().item()
        views = objective.views(hidden, batch, pairs.config)
        pred[at], target[at] = (view.float().cpu() for view in views)
    trunk.train(was_training)
    return ce / n_labels, pred[has_target], target[has_target]


def target_groups(pairs: Pairs, n: int) -> np.ndarray:
    """(m,) a number for the target of each of the m pairs that `embed_pairs` embeds, equal where
    two have the same."""
    examples = np.arange(min(n, len(pairs)))
    return pairs.groups(examples[pairs.has_target(examples)])


def held_out_batches(pairs: Pairs, n: int, size: int = 16):
    """The first n pairs with all their blocks, as numbers and Batch; of like length together, so
    that there is little padding. What an objective draws is the same in every evaluation."""
    order = np.argsort(pairs.lengths[:n].sum(1), kind="stable")
    objective, rng = OBJECTIVES[pairs.config.objective], np.random.default_rng(0)
    row = objective.row(pairs.layout)
    bar = Bar("held-out pairs", "pair", n)
    for at in np.split(order, range(size, n, size)):
        given = objective.given(pairs, at, rng)
        yield at, pairs.pack(at, row, pairs.has_target(at))._replace(given=given)
        bar.move(len(at))


def alignment(pred: torch.Tensor, target: torch.Tensor, groups=None) -> dict[str, float]:
    """The collapse panel's numbers that an evaluation in training logs, on N pairs; N >= 2.

    matched: mean cosine of a pair. mismatched: mean cosine over all wrong pairs, nan if there are
    none. If the two are close, the model tells no pair from another, however high they are.
    retrieval_at_1: share of preds to which their own target is nearer than any wrong one (a tie
    counts as a miss). chance: what it is by chance, 1 / the number of different answers, since
    equal ones have one embedding; 1 / N where no two are the same. shared: pairs whose answer
    another one has too (see `groups` in jepa.py). mean_rank: of the own target, 1 at best.
    effective_rank_pred, effective_rank_target: see `effective_rank`.
    """
    pred, target = pred.float(), target.float()
    similarity, wrong = cosines(pred, target), wrong_pairs(pred, groups)  # (N, N)
    own, N = similarity.diagonal(), len(pred)
    # The slack makes equal targets tie, whatever their last bits; what is nan is not found.
    rank = 1 + (wrong & ~(similarity < own[:, None] - 1e-6)).sum(1)
    return {
        "matched": own.mean().item(),
        "mismatched": similarity[wrong].mean().item(),
        "retrieval_at_1": (rank == 1).float().mean().item(),
        "chance": 1 / (N if groups is None else len(torch.as_tensor(groups).unique())),
        "shared": (wrong.sum(1) < N - 1).sum().item(),
        "mean_rank": rank.float().mean().item(),
        "effective_rank_pred": effective_rank(pred),
        "effective_rank_target": effective_rank(target),
    }


def effective_rank(x: torch.Tensor) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values of x (N, C), each over
    their sum. 1 when all rows point one way, at most min(N, C); nan where training diverged."""
    if not x.isfinite().all():
        return math.nan
    s = torch.linalg.svdvals(x.float())
    p = s / s.sum()
    return math.exp(torch.special.entr(p).sum().item())


def verdict(measures: dict[str, float]) -> str:
    """`alignment` in words: "not aligned" where right pairs have a cosine of at most 0.5, as in an
    untrained model; else "collapsed" where wrong pairs score more than 0.9 of that (all embeddings
    point one way), "aligned" where they score at most half of it, "partly aligned" between. None of
    these where there is nothing to compare."""
    matched, mismatched = measures["matched"], measures["mismatched"]
    if math.isnan(matched):
        return "not finite"
    if math.isnan(mismatched):
        return "of one answer only"
    if matched <= 0.5:
        return "not aligned"
    if mismatched > 0.9 * matched:
        return "collapsed"
    return "aligned" if mismatched <= 0.5 * matched else "partly aligned"


def panel_line(measures: dict[str, float], n: int) -> str:
    """The numbers of `alignment` in a line, with what chance gives."""
    shared = f", {measures['shared']} share their answer" if measures["shared"] else ""
    return (
        f"cosine matched {measures['matched']:.3f} mismatched {measures['mismatched']:.3f} | "
        f"retrieval@1 {measures['retrieval_at_1']:.3f} of {n} (chance {measures['chance']:.3f}"
        f"{shared}) | effective rank {measures['effective_rank_pred']:.1f} / "
        f"{measures['effective_rank_target']:.1f}"
    )
