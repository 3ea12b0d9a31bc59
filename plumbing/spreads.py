"""What the spread terms vicreg and sigreg of jepa.py measure of one view."""

import torch
import torch.nn.functional as F


def variance_covariance(x: torch.Tensor) -> torch.Tensor:
    """VICReg's two terms for one view (B, C)."""
    x = x - x.mean(0)
    std = (x.square().sum(0) / (len(x) - 1) + 1e-4).sqrt()
    cov = x.T @ x / (len(x) - 1)  # (C, C)
    off_diagonal = cov[~torch.eye(len(cov), dtype=torch.bool, device=cov.device)]
    return F.relu(1 - std).mean() + off_diagonal.square().sum() / x.size(1)


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
