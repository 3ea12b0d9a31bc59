"""Claims about plumbing/linear_map.py: its figures, and that collapse cannot fake them."""

import math

import pytest
import torch
import torch.nn.functional as F

from plumbing.linear_map import difference_spectrum, linear_r2


def rotation(C):
    return torch.linalg.qr(torch.randn(C, C))[0]


def test_difference_spectrum_equals_hand_computed_values():
    x = torch.diag(torch.tensor([1.0, 5.0, 2.0]))
    assert difference_spectrum(x, 3 * x) == pytest.approx([0, 0, 0], abs=1e-6)
    assert difference_spectrum(x, -x) == pytest.approx([2, 2, 2])  # twice a rotation
    # e1, e2, e3 less e2, e3, e1: a circulant with eigenvalues 1 - w, w the cube roots of 1
    expected = [math.sqrt(3), math.sqrt(3), 0]
    assert difference_spectrum(x, x.roll(1, 0)) == pytest.approx(expected, abs=1e-6)
    # One direction apart: a single value, sqrt(N) times the distance of two orthogonal units.
    e1, e2 = torch.eye(8, 130).expand(2, 8, 130)[:, :2].unbind(1)
    values = difference_spectrum(e1[:1].expand(150, 130), e2[:1].expand(150, 130))
    assert len(values) == 100
    assert values[0] == pytest.approx(math.sqrt(2 * 150)) and max(values[1:]) < 1e-3


def test_linear_r2_of_a_rotation_is_1_and_of_shuffled_or_unrelated_views_0():
    x = torch.randn(256, 16)
    for code in (x, 5 * x @ rotation(16)):
        assert linear_r2(x, code) == (pytest.approx(1, abs=1e-4), "")
    for code in (x[torch.randperm(256)], torch.randn(256, 16)):
        assert linear_r2(x, code) == (pytest.approx(0, abs=0.03), "")


def test_linear_r2_is_the_share_of_the_code_that_the_text_determines():
    """12 of the code's 16 channels are a rotation of the text, 4 are noise of the same size."""
    text = torch.randn(2000, 12)
    code = torch.cat([text @ rotation(12), torch.randn(2000, 4)], 1) @ rotation(16)
    # Unit length couples the channels a little, hence the width.
    assert linear_r2(text, code)[0] == pytest.approx(12 / 16, abs=0.05)


def test_linear_r2_is_held_out():
    """More channels than pairs: any fit is perfect on its own half, and tells nothing."""
    text, code = torch.randn(64, 200), torch.randn(64, 200)
    x, y = text[:32], code[:32]
    assert torch.allclose(x @ torch.linalg.pinv(x) @ y, y, atol=1e-3)
    assert abs(linear_r2(text, code)[0]) < 0.05
    # Orthogonal rows: no pair tells about another one, although the views are identical.
    assert linear_r2(torch.eye(64), torch.eye(64))[0] == pytest.approx(0, abs=1e-6)


def test_linear_r2_equals_ridge_with_leave_one_out_by_refitting():
    torch.manual_seed(4)
    text = torch.randn(24, 5)
    code = F.normalize(text, dim=-1) @ torch.randn(5, 4) + 0.3 * torch.randn(24, 4)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    x, y = (F.normalize(view.double(), dim=-1)[order] for view in (text, code))
    x, y = ((v - v[:12].mean(0)) / v[:12].std(0) for v in (x, y))

    def ridge(x, y, penalty):  # with an intercept, by the normal equations
        mx, my = x.mean(0), y.mean(0)
        square = (x - mx).T @ (x - mx) + penalty * torch.eye(5, dtype=torch.double)
        weights = torch.linalg.solve(square, (x - mx).T @ (y - my))
        return lambda new: (new - mx) @ weights + my

    def error(penalty):
        fits = [ridge(x[:12][rest], y[:12][rest], penalty)
                for rest in ([j for j in range(12) if j != i] for i in range(12))]  # fmt: skip
        return sum((y[i] - fit(x[i])).square().sum().item() for i, fit in enumerate(fits))

    largest = torch.linalg.svdvals(x[:12])[0].item() ** 2
    penalty = min((largest * 10 ** (i / 2) for i in range(-10, 7)), key=error)
    assert largest * 1e-5 < penalty < largest * 1e3  # inside the grid, so that it is a choice
    sse = (y[12:] - ridge(x[:12], y[:12], penalty)(x[12:])).square().sum()
    expected = 1 - sse / y[12:].square().sum()
    assert linear_r2(text, code)[0] == pytest.approx(expected.item(), abs=1e-4)
    assert 0.3 < expected < 0.95


@pytest.mark.parametrize("size", [0, 1e-6, 1e-3, 0.05])
def test_linear_r2_of_views_collapsed_to_a_point_is_0(size):
    """What is left to vary is the same in both views, so it could be predicted perfectly."""
    x = torch.randn(1, 32) + size * torch.randn(256, 32)
    assert linear_r2(x, x @ rotation(32)) == (0, "point")


@pytest.mark.parametrize("place", [0, 0.1, 1, 10])
@pytest.mark.parametrize("noise", [0, 0.02])
def test_linear_r2_of_views_collapsed_to_a_line_is_0(place, noise):
    """Points at random places on one line, through the origin or not, which both views share."""
    x = place * torch.randn(1, 32) + torch.randn(256, 1) * torch.randn(1, 32)
    x = x + noise * torch.randn(256, 32)
    flaw = "point" if place == 10 else "line"  # from afar a line is a point
    assert linear_r2(x, x @ rotation(32)) == (0, flaw)


def test_linear_r2_survives_what_it_cannot_measure():
    assert linear_r2(torch.randn(7, 4), torch.randn(7, 4)) == (0, "few")
    assert linear_r2(torch.zeros(20, 4), torch.zeros(20, 4)) == (0, "point")
    r2, flaw = linear_r2(torch.ones(64, 4), torch.randn(64, 4))  # nothing to predict from
    assert flaw == "" and r2 == pytest.approx(0, abs=0.2) and r2 <= 0.01
