"""Are two views "almost linear" in each other, as the paper says? Its two figures, made so that
collapse cannot fake them: shuffled pairs are measured beside the right ones (see eval_alignment).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


def difference_spectrum(text: torch.Tensor, code: torch.Tensor, n: int = 100) -> list[float]:
    """The n largest singular values of Enc(text) - Enc(code), rows of both at unit length: the
    paper's figure. They are small when views meet, and just as small when all has collapsed; nan
    where training diverged."""
    difference = F.normalize(text.float(), dim=-1) - F.normalize(code.float(), dim=-1)
    if not difference.isfinite().all():
        return [math.nan] * min(*difference.shape, n)
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
        ratio below 1.5, that a single number per pair predicts them; a half circle has 1.37),
        "not finite" (training diverged).
    """
    n = len(text) // 2
    if n < 4:
        return 0.0, "few"
    if not (text.isfinite().all() and code.isfinite().all()):
        return 0.0, "not finite"
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0)).to(text.device)
    x, y = (F.normalize(view.double(), dim=-1)[order] for view in (text, code))
    variances = torch.linalg.svdvals(y[n:] - y[n:].mean(0)).square()
    if variances.sum() < 0.01 * (len(y) - n):
        return 0.0, "point"
    if variances.sum().square() < 1.5 * variances.square().sum():
        return 0.0, "line"

    fitted = ridge(x[:n], y[:n])
    y_held = fitted.scaled(y[n:])
    sse = (y_held - fitted(x[n:])).square().sum()
    return (1 - sse / y_held.square().sum()).item(), ""


class Ridge(NamedTuple):
    """A ridge map x -> y, where channels of both are centred and scaled: see `ridge`."""

    x_mean: torch.Tensor  # (C,)
    x_std: torch.Tensor
    y_mean: torch.Tensor
    y_std: torch.Tensor
    weights: torch.Tensor  # (C, C)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What `scaled(y)` is to be, (n, C)."""
        return (x - self.x_mean) / self.x_std @ self.weights

    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        """y, centred and scaled as the map has it, (n, C)."""
        return (y - self.y_mean) / self.y_std


def ridge(x: torch.Tensor, y: torch.Tensor) -> Ridge:
    """The ridge map x -> y, (n, C) each in float64, whose penalty has the least leave-one-out error
    among these pairs."""

    def scale_of(view):
        std, mean = torch.std_mean(view, 0)
        # The floor keeps a channel that is rounding noise from counting like the others.
        return mean, std.maximum((std.square().mean().sqrt() / 1000).clamp(min=1e-6))

    (x_mean, x_std), (y_mean, y_std) = scale_of(x), scale_of(y)
    x, y = (x - x_mean) / x_std, (y - y_mean) / y_std
    u, s, vt = torch.linalg.svd(x, full_matrices=False)

    def leave_one_out_error(penalty):
        shrink = s.square() / (s.square() + penalty)
        leverage = 1 / len(x) + u.square() @ shrink  # each row took part in the mean
        residual = y - u @ (shrink[:, None] * (u.T @ y))
        return (residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().sum()

    scale = s[0].square().clamp(min=1e-12)
    penalty = min(scale * torch.logspace(-5, 3, 17), key=leave_one_out_error)
    weights = vt.T @ ((s / (s.square() + penalty))[:, None] * (u.T @ y))  # (C, C)
    return Ridge(x_mean, x_std, y_mean, y_std, weights)
