"""The JEPA side: distances between two views, terms against collapse, and how to see collapse.

All functions take `pred` and `target`, (B, C) each, where row i of one belongs to row i of the
other, and compute in float32. `distance` and `spread` are losses; `alignment` measures.
"""

import math

import torch
import torch.nn.functional as F

TEMPERATURE = 0.07  # of InfoNCE


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
    t = torch.linspace(0, 3, n_knots, device=x.device)
    gauss = (-t.square() / 2).exp()
    angle = (x @ directions)[..., None] * t  # (B, n_slices, n_knots)
    gap = (angle.cos().mean(0) - gauss).square() + angle.sin().mean(0).square()
    return 2 * len(x) * torch.trapezoid(gap * gauss, t, dim=-1).mean()


def alignment(pred: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """The collapse panel's numbers on N pairs; N >= 2.

    matched: mean cosine of a pair. mismatched: mean cosine over all wrong pairs. If the two are
    close, the model tells no pair from another, however high they are. retrieval_at_1: share of
    preds whose nearest target is their own (chance 1 / N; a tie counts as a miss). mean_rank: of
    the own target, 1 at best, (N + 1) / 2 by chance. effective_rank_pred, effective_rank_target:
    see `effective_rank`.
    """
    pred, target = pred.float(), target.float()
    similarity = cosines(pred, target)  # (N, N)
    own = similarity.diagonal()
    # The own target included; the slack makes equal targets tie, whatever their last bits.
    at_least = (similarity >= own[:, None] - 1e-6).sum(1)
    return {
        "matched": own.mean().item(),
        "mismatched": off_diagonal(similarity).mean().item(),
        "retrieval_at_1": (at_least == 1).float().mean().item(),
        "mean_rank": at_least.float().mean().item(),
        "effective_rank_pred": effective_rank(pred),
        "effective_rank_target": effective_rank(target),
    }


def effective_rank(x: torch.Tensor) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values of x (N, C), each over
    their sum. 1 when all rows point one way, at most min(N, C)."""
    s = torch.linalg.svdvals(x.float())
    p = s / s.sum()
    return math.exp(torch.special.entr(p).sum().item())


def verdict(measures: dict[str, float]) -> str:
    """`alignment` in words: "not aligned" where right pairs have a cosine of at most 0.5, as in an
    untrained model; else "collapsed" where wrong pairs score more than 0.9 of that (all embeddings
    point one way), "aligned" where they score at most half of it, "partly aligned" between."""
    matched, mismatched = measures["matched"], measures["mismatched"]
    if matched <= 0.5:
        return "not aligned"
    if mismatched > 0.9 * matched:
        return "collapsed"
    return "aligned" if mismatched <= 0.5 * matched else "partly aligned"


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of every row of a (N, C) with every row of b (M, C): (N, M)."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def off_diagonal(square: torch.Tensor) -> torch.Tensor:
    """The N (N - 1) entries of an (N, N) matrix that are not on its diagonal, as a vector."""
    return square[~torch.eye(len(square), dtype=torch.bool, device=square.device)]
