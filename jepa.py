"""The JEPA side of training: objectives, the distance of two views, and terms against collapse.

    OBJECTIVES[config.objective]  which hidden states of a row belong together (pred and target)
    distance, spread              what the loss makes of them

An objective turns hidden states into `pred` and `target`, (B, C) each, where row i of one belongs
to row i of the other. The losses here and the measures of alignment.py take any such two.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from config import Config
from model import block_ends, read_hidden
from views import Layout, layout_of

TEMPERATURE = 0.07  # of InfoNCE


# --- objectives: what belongs together --------------------------------------------------------


class Objective(NamedTuple):
    """A row of OBJECTIVES; docs/new-objective.md adds one in a page.

    row: layout -> the blocks that a row with the JEPA term holds, in order.
    reads: (block (B, T), config) -> (B, T) bool, the positions whose hidden states `views` needs.
        The trunk need not compute the others, and says nan there.
    views: (hidden (B, T, C), block (B, T), config) -> pred and target, (B, C) each.
    target: layout -> the block that target alone is read from, which stop_grad and ema encode in a
        pass of its own; None where there is no such block.
    """

    row: Callable[[Layout], tuple[int, ...]]
    reads: Callable[[torch.Tensor, Config], torch.Tensor]
    views: Callable[[torch.Tensor, torch.Tensor, Config], tuple[torch.Tensor, torch.Tensor]]
    target: Callable[[Layout], int | None]


def pair_reads(block: torch.Tensor, config: Config) -> torch.Tensor:
    """The ends of all blocks, [PRED] and target among them; everywhere for a mean."""
    everywhere = torch.ones_like(block, dtype=torch.bool)
    return everywhere if config.pooling == "mean" else block_ends(block)


def pair(hidden: torch.Tensor, block: torch.Tensor, config: Config):
    """LLM-JEPA (arXiv 2509.14252): Pred(text), read after the last [PRED], and Enc(code), read at
    the end of the code that stands alone."""
    layout = layout_of(config)
    pred = read_hidden(hidden, block, layout.pred)
    return pred, read_hidden(hidden, block, layout.enc, config.pooling)


OBJECTIVES = {
    "pair": Objective(lambda layout: layout.row, pair_reads, pair, lambda layout: layout.enc),
}


# --- losses -----------------------------------------------------------------------------------


def distance(pred: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """d(Pred(text), Enc(code)), a scalar, 0 at best (InfoNCE: towards 0).

    cosine: 1 - cos, in [0, 2]. l2: Euclidean norm of the difference. mse: mean square of it.
    infonce: cross-entropy, in nats, of finding the right target among the batch's (2018,
    arXiv 1807.03748); B rows of pure chance give ln B.
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
        return F.cross_entropy(cosines(pred, target) / TEMPERATURE, labels)
    raise ValueError(f"no distance {kind}")


def spread(pred: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """R, a scalar that grows when the embeddings of a batch crowd together; needs B >= 2.

    vicreg: for each view, variance and covariance (arXiv 2105.04906): hinge of each channel's
        standard deviation at 1, plus the squared off-diagonal covariances over C.
    sigreg: for each view, distance from an isotropic Gaussian (LeJEPA, arXiv 2511.08544).
    cross: mean squared cosine between each pred and the targets of the *other* rows. With the
        cosine distance it makes the spectral contrastive loss (arXiv 2106.04156).
    """
    pred, target = pred.float(), target.float()
    if kind == "vicreg":
        return (variance_covariance(pred) + variance_covariance(target)) / 2
    if kind == "sigreg":
        return (sigreg(pred) + sigreg(target)) / 2
    if kind == "cross":
        return off_diagonal(cosines(pred, target)).square().mean()
    raise ValueError(f"no spread term {kind}")


def variance_covariance(x: torch.Tensor) -> torch.Tensor:
    """VICReg's two terms for one view (B, C)."""
    x = x - x.mean(0)
    std = (x.square().sum(0) / (len(x) - 1) + 1e-4).sqrt()
    cov = x.T @ x / (len(x) - 1)  # (C, C)
    return F.relu(1 - std).mean() + off_diagonal(cov).square().sum() / x.size(1)


def sigreg(x: torch.Tensor, n_slices: int = 256, n_knots: int = 17) -> torch.Tensor:
    """Epps-Pulley statistic of x (B, C) on random directions: about 1 for a standard Gaussian
    sample, of order B for a point.

    For each of n_slices unit directions, the squared distance between the empirical
    characteristic function of the projections and the Gaussian's exp(-t^2 / 2), weighted by that
    same Gaussian and integrated over t in [0, 3] (both are even in modulus), times B.
    """
    directions = F.normalize(torch.randn(x.size(1), n_slices, device=x.device), dim=0)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(directions, 0)  # one loss, so one choice for all processes
    t = torch.linspace(0, 3, n_knots, device=x.device)
    gauss = (-t.square() / 2).exp()
    angle = (x @ directions)[..., None] * t  # (B, n_slices, n_knots)
    gap = (angle.cos().mean(0) - gauss).square() + angle.sin().mean(0).square()
    return 2 * len(x) * torch.trapezoid(gap * gauss, t, dim=-1).mean()


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of every row of a (N, C) with every row of b (M, C): (N, M)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def off_diagonal(square: torch.Tensor) -> torch.Tensor:
    """The N (N - 1) entries of an (N, N) matrix that are not on its diagonal, as a vector."""
    return square[~torch.eye(len(square), dtype=torch.bool, device=square.device)]
