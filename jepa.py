"""The JEPA side: distances between two views, terms against collapse, and how to see collapse.

All functions take `pred` and `target`, (B, C) each, where row i of one belongs to row i of the
other, and compute in float32 unless they say so. `distance` and `spread` are losses; `alignment`
measures as training goes, `collapse_panel` all there is to measure.
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
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(directions, 0)  # one loss, so one choice for all processes
    t = torch.linspace(0, 3, n_knots, device=x.device)
    gauss = (-t.square() / 2).exp()
    angle = (x @ directions)[..., None] * t  # (B, n_slices, n_knots)
    gap = (angle.cos().mean(0) - gauss).square() + angle.sin().mean(0).square()
    return 2 * len(x) * torch.trapezoid(gap * gauss, t, dim=-1).mean()


def alignment(pred: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """The collapse panel's numbers that an evaluation in training logs, on N pairs; N >= 2.

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


def collapse_panel(
    pred: torch.Tensor, text: torch.Tensor, target: torch.Tensor
) -> dict[str, float | str | list[float]]:
    """Every measure of this file on N pairs: Pred(text), Enc(text) and Enc(code), (N, C) each.

    To `alignment` of pred and target it adds the cosines within each of the two, and for
    Enc(text) and Enc(code), as in the paper, `linear_r2` and `difference_spectrum`; both once
    more for shuffled pairs, since collapse makes right and wrong pairs alike.
    """
    r2, flaw = linear_r2(text, target)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(text), generator=generator) for _ in range(5)]
    return {
        **alignment(pred, target),
        "within_pred": within_cosine(pred), "within_target": within_cosine(target),
        "linear_r2": r2, "linear_r2_flaw": flaw,
        "linear_r2_shuffled": sum(linear_r2(text, target[order])[0] for order in orders) / 5,
        "singular_values": difference_spectrum(text, target),
        "singular_values_shuffled": difference_spectrum(text, target[orders[0]]),
    }  # fmt: skip


def within_cosine(x: torch.Tensor) -> float:
    """Mean cosine of two different rows of one view (N, C): 1 when all of them point one way."""
    return off_diagonal(cosines(x.float(), x.float())).mean().item()


def difference_spectrum(text: torch.Tensor, code: torch.Tensor, n: int = 100) -> list[float]:
    """The n largest singular values of Enc(text) - Enc(code), rows of both at unit length: the
    paper's figure. They are small when views meet, and just as small when all has collapsed."""
    difference = F.normalize(text.float(), dim=-1) - F.normalize(code.float(), dim=-1)
    return torch.linalg.svdvals(difference)[:n].tolist()


def linear_r2(text: torch.Tensor, code: torch.Tensor) -> tuple[float, str]:
    """Held-out R^2 of a ridge map Enc(text) -> Enc(code), (N, C) each: are the views "almost
    linear" in each other, as the paper says?

    In float64, rows at unit length. A random half of the pairs fits: channels are centred and
    scaled by its mean and standard deviation, the penalty has the least leave-one-out error
    within it. The other half is scored, R^2 = 1 - SSE / SST with SST about the fit half's mean:
    1 for a linear map, about 0 or less where text says nothing about code. With N / 2 below C, as
    is usual, a map that is exactly linear but of full rank cannot be learned, and scores less.

    Returns:
        R^2 and "". Or 0 and what would make it meaningless: "few" (below 8 pairs), "point" (the
        held-out codes keep less than 1 % of their squared length about the mean, as when their
        cosines exceed .99), "line" (they vary, but so much along one direction, participation
        ratio below 1.5, that a single number per pair predicts them; a half circle has 1.37).
    """
    n = len(text) // 2
    if n < 4:
        return 0.0, "few"
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).to(text.device)
    x, y = (F.normalize(view.double(), dim=-1)[order] for view in (text, code))
    variances = torch.linalg.svdvals(y[n:] - y[n:].mean(0)).square()
    if variances.sum() < 0.01 * (len(y) - n):
        return 0.0, "point"
    if variances.sum().square() < 1.5 * variances.square().sum():
        return 0.0, "line"

    def standardised(view):
        std, mean = torch.std_mean(view[:n], 0)
        # The floor keeps a channel that is rounding noise from counting like the others.
        floor = (std.square().mean().sqrt() / 1000).clamp(min=1e-6)
        return ((view - mean) / std.maximum(floor)).split([n, len(view) - n])

    (x, x_held), (y, y_held) = standardised(x), standardised(y)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)

    def leave_one_out_error(penalty):
        shrink = s.square() / (s.square() + penalty)
        leverage = 1 / n + u.square() @ shrink  # 1 / n: each row took part in the mean
        residual = y - u @ (shrink[:, None] * (u.T @ y))
        return (residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().sum()

    scale = s[0].square().clamp(min=1e-12)
    penalty = min(scale * torch.logspace(-5, 3, 17), key=leave_one_out_error)
    weights = vt.T @ ((s / (s.square() + penalty))[:, None] * (u.T @ y))  # (C, C)
    sse = (y_held - x_held @ weights).square().sum()
    return (1 - sse / y_held.square().sum()).item(), ""


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
