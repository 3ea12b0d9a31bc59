"""The JEPA side of training: objectives, the distance of two views, and terms against collapse.

    OBJECTIVES[config.objective]  which hidden states of a row belong together (pred and target)
    distance, spread              what the loss makes of them

An objective turns hidden states into `pred` and `target`, (B, C) each, where row i of one belongs
to row i of the other. The losses here and the measures of alignment.py take any such two, and
`groups` (B,), equal where two rows have the same answer: these are no wrong pair of each other.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from config import Config
from model import Batch, block_ends, read_hidden
from objectives import bag, tube
from plumbing.spreads import sigreg, variance_covariance
from views import Layout, layout_of

TEMPERATURE = 0.07  # of InfoNCE


# --- objectives: what belongs together --------------------------------------------------------


class Objective(NamedTuple):
    """A row of OBJECTIVES; docs/new-objective.md adds one in a page.

    row: layout -> the blocks that a row with the JEPA term holds, in order.
    reads: (batch, config) -> (B, T) bool, the positions whose hidden states `views` needs. The
        trunk need not compute the others, and says nan there.
    views: (hidden (B, T, C), batch, config) -> pred and target, (B, C) each.
    target: layout -> the block that target alone is read from, which stop_grad and ema encode in a
        pass of its own; None where there is no such block.
    given: (pairs, examples (B,), rng) -> batch.given (B, ...), what the two need beside the rows:
        random positions, or a target that is no hidden state.
    """

    row: Callable[[Layout], tuple[int, ...]]
    reads: Callable[[Batch, Config], torch.Tensor]
    views: Callable[[torch.Tensor, Batch, Config], tuple[torch.Tensor, torch.Tensor]]
    target: Callable[[Layout], int | None]
    given: Callable = lambda pairs, examples, rng: torch.empty(len(examples), 0)


def pair_reads(batch: Batch, config: Config) -> torch.Tensor:
    """The ends of all blocks, [PRED] and target among them; everywhere for a mean."""
    return block_ends(batch.block) | (config.pooling == "mean")


def pair(hidden: torch.Tensor, batch: Batch, config: Config):
    """LLM-JEPA (arXiv 2509.14252): Pred(text), read after the last [PRED], and Enc(code), read at
    the end of the code that stands alone."""
    layout = layout_of(config)
    pred = read_hidden(hidden, batch.block, layout.pred)
    return pred, read_hidden(hidden, batch.block, layout.enc, config.pooling)


OBJECTIVES = {
    "pair": Objective(lambda layout: layout.row, pair_reads, pair, lambda layout: layout.enc),
    **dict.fromkeys(tube.SIGNS, Objective(
        lambda layout: layout.plain, tube.reads, tube.views, lambda layout: None, tube.drawn)),
    "bag": Objective(bag.row, pair_reads, bag.views, lambda layout: None, bag.bags),
}  # fmt: skip


# --- losses -----------------------------------------------------------------------------------


def distance(pred: torch.Tensor, target: torch.Tensor, kind: str, groups=None) -> torch.Tensor:
    """d(Pred(text), Enc(code)), a scalar, 0 at best (InfoNCE: towards 0).

    cosine: 1 - cos, in [0, 2]. l2: Euclidean norm of the difference. mse: mean square of it.
    infonce: cross-entropy, in nats, of finding the right target among the batch's (2018,
    arXiv 1807.03748), copies of it left out; B different answers by pure chance give ln B.
    """
    pred, target = pred.float(), target.float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(pred, target, dim=-1)).mean()
    if kind == "l2":
        return (pred - target).norm(dim=-1).mean()
    if kind == "mse":
        return F.mse_loss(pred, target)
    if kind == "infonce":
        labels = torch.arange(len(pred), device=pred.device)
        wrong, own = wrong_pairs(pred, groups), labels[:, None] == labels
        logits = (cosines(pred, target) / TEMPERATURE).where(wrong | own, -math.inf)
        return F.cross_entropy(logits, labels)
    raise ValueError(f"no distance {kind}")


def spread(pred: torch.Tensor, target: torch.Tensor, kind: str, groups=None) -> torch.Tensor:
    """R, a scalar that grows when the embeddings of a batch crowd together; needs B >= 2.

    vicreg: for each view, variance and covariance (arXiv 2105.04906): hinge of each channel's
        standard deviation at 1, plus the squared off-diagonal covariances over C.
    sigreg: for each view, distance from an isotropic Gaussian (LeJEPA, arXiv 2511.08544).
    cross: mean squared cosine of all wrong pairs, of each pred and the targets of *other* rows.
        With the cosine distance it makes the spectral contrastive loss (arXiv 2106.04156).
    """
    pred, target = pred.float(), target.float()
    if kind == "vicreg":
        return (variance_covariance(pred) + variance_covariance(target)) / 2
    if kind == "sigreg":
        return (sigreg(pred) + sigreg(target)) / 2
    if kind == "cross":
        wrong = cosines(pred, target)[wrong_pairs(pred, groups)]
        return wrong.square().mean() if len(wrong) else wrong.sum()  # 0, and still a graph
    raise ValueError(f"no spread term {kind}")


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of every row of a (N, C) with every row of b (M, C): (N, M)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def wrong_pairs(x: torch.Tensor, groups=None) -> torch.Tensor:
    """(N, N) bool for N = len(x): which rows have different answers by `groups` (N,), an array or a
    tensor; without it each row has an answer of its own."""
    groups = torch.arange(len(x)) if groups is None else torch.as_tensor(groups)
    groups = groups.to(x.device)
    return groups[:, None] != groups
