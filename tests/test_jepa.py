"""Claims about jepa.py, held against values worked out by hand and against slow loops."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from jepa import (
    TEMPERATURE,
    alignment,
    collapse_panel,
    difference_spectrum,
    distance,
    effective_rank,
    linear_r2,
    sigreg,
    spread,
    verdict,
    within_cosine,
)

DISTANCES = ("cosine", "l2", "mse", "infonce")
SPREADS = ("vicreg", "sigreg", "cross")


# --- distances --------------------------------------------------------------------------------


def test_distances_equal_hand_computed_values():
    pred = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    target = torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    # cosines 24/25 and 0; differences (-1, 1) and (1, -2)
    assert distance(pred, target, "cosine").item() == pytest.approx((1 / 25 + 1) / 2)
    expected = (math.sqrt(2) + math.sqrt(5)) / 2
    assert distance(pred, target, "l2").item() == pytest.approx(expected)
    assert distance(pred, target, "mse").item() == pytest.approx((1 + 1 + 1 + 4) / 4)
    # infonce: cosines with the own and the other target, over the temperature
    rows = [(24 / 25, 4 / 5), (0, 4 / 5)]
    terms = [math.log(1 + math.exp((other - own) / TEMPERATURE)) for own, other in rows]
    assert distance(pred, target, "infonce").item() == pytest.approx(sum(terms) / 2)


def test_cosine_is_0_for_identical_1_for_orthogonal_2_for_opposite():
    x = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    orthogonal = torch.tensor([[-4.0, 3.0, 0.0], [5.0, 0.0, 0.0]])
    for other, expected in ((x, 0), (7 * x, 0), (orthogonal, 1), (-x, 2)):
        assert distance(x, other, "cosine").item() == pytest.approx(expected, abs=1e-6)


def test_l2_and_mse_of_identical_views_are_0():
    x = torch.randn(5, 8)
    assert distance(x, x, "l2") == 0
    assert distance(x, x, "mse") == 0


@pytest.mark.parametrize("B", [2, 16])
def test_infonce_of_uninformative_embeddings_is_log_batch(B):
    pred, target = torch.randn(1, 8).expand(B, 8), torch.randn(1, 8).expand(B, 8)
    assert distance(pred, target, "infonce").item() == pytest.approx(math.log(B), rel=1e-5)


def test_infonce_is_near_0_for_right_pairs_and_large_for_shuffled_ones():
    x = torch.eye(8)
    assert distance(x, x, "infonce").item() < 1e-4
    assert distance(x, x.roll(1, 0), "infonce").item() == pytest.approx(1 / TEMPERATURE, rel=0.01)


# --- spread -----------------------------------------------------------------------------------


def test_cosine_and_cross_are_0_only_for_right_and_spread_pairs():
    """The two sides of the spectral contrastive loss: pull pairs together, push others apart."""
    def both(pred, target):
        terms = distance(pred, target, "cosine"), spread(pred, target, "cross")
        return [term.item() for term in terms]

    x = torch.eye(4)
    assert both(x, x) == pytest.approx([0, 0], abs=1e-6)
    point = torch.ones(4, 4)
    assert both(point, point) == pytest.approx([0, 1], abs=1e-6)  # collapse: cosine is content
    # shuffled: every pair is orthogonal, and 4 of the 12 wrong pairs have cosine 1
    assert both(x, x.roll(1, 0)) == pytest.approx([1, 4 / 12], abs=1e-6)


def test_vicreg_equals_a_plain_loop():
    torch.manual_seed(1)
    pred, target = 0.7 * torch.randn(6, 3), 1.4 * torch.randn(6, 3)

    def one_view(x):
        B, C = len(x), len(x[0])
        mean = [sum(row[c] for row in x) / B for c in range(C)]
        cov = [[sum((row[c] - mean[c]) * (row[d] - mean[d]) for row in x) / (B - 1)
                for d in range(C)] for c in range(C)]  # fmt: skip
        variance = sum(max(0, 1 - math.sqrt(cov[c][c] + 1e-4)) for c in range(C)) / C
        covariance = sum(cov[c][d] ** 2 for c in range(C) for d in range(C) if c != d) / C
        return variance + covariance

    expected = (one_view(pred.tolist()) + one_view(target.tolist())) / 2
    assert spread(pred, target, "vicreg").item() == pytest.approx(expected, rel=1e-4)


def test_vicreg_of_a_collapsed_batch_is_its_whole_hinge():
    x = torch.randn(1, 8).expand(5, 8)
    assert spread(x, x, "vicreg").item() == pytest.approx(1 - math.sqrt(1e-4), abs=1e-5)


def test_sigreg_equals_a_slow_loop_over_slices_and_knots():
    torch.manual_seed(1)
    x = 0.5 + 2 * torch.randn(7, 3)
    n_slices, n_knots = 5, 9
    torch.manual_seed(2)
    got = sigreg(x, n_slices, n_knots).item()
    torch.manual_seed(2)
    directions = F.normalize(torch.randn(3, n_slices), dim=0).T.tolist()
    step = 3 / (n_knots - 1)
    total = 0.0
    for direction in directions:
        projected = [sum(a * b for a, b in zip(row, direction)) for row in x.tolist()]
        values = []
        for knot in range(n_knots):
            t = knot * step
            real = sum(math.cos(t * p) for p in projected) / len(projected)
            imaginary = sum(math.sin(t * p) for p in projected) / len(projected)
            gauss = math.exp(-t * t / 2)
            values.append(((real - gauss) ** 2 + imaginary**2) * gauss)
        trapezoids = [(a + b) / 2 * step for a, b in pairwise(values)]
        total += 2 * len(projected) * sum(trapezoids)  # twice: t and -t
    assert got == pytest.approx(total / n_slices, rel=1e-4)


def test_sigreg_of_a_gaussian_is_sampling_noise_and_of_a_point_is_huge():
    """The statistic is B times a squared gap whose mean for a Gaussian sample is (1 - e^(-t^2))/B:
    2 * integral of (1 - e^(-t^2)) e^(-t^2 / 2) over [0, 3] = 1.06, whatever B is."""
    B = 2000
    gaussian = torch.randn(B, 4)
    noise = sigreg(gaussian).item()
    assert noise == pytest.approx(1.06, rel=0.35)
    point = torch.full((B, 4), 0.5)
    assert sigreg(point).item() > 200 * noise
    for wrong in (2 * gaussian, gaussian + 1, gaussian[:, :1].expand(B, 4)):
        assert sigreg(wrong).item() > 20 * noise


@pytest.mark.parametrize("kind", ["vicreg", "sigreg"])
def test_spread_is_the_mean_over_both_views(kind, monkeypatch):
    torch.manual_seed(1)
    a, b = torch.randn(6, 3), 0.1 * torch.randn(6, 3)
    directions = torch.randn(3, 256)  # sigreg draws new ones for each view: hold them fixed
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: directions)
    expected = (spread(a, a, kind) + spread(b, b, kind)) / 2
    assert spread(a, a, kind) != spread(b, b, kind)
    torch.testing.assert_close(spread(a, b, kind), expected)


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*DISTANCES, *SPREADS])
def test_gradients_stay_finite_when_everything_has_collapsed(kind):
    loss = distance if kind in DISTANCES else spread
    row = torch.randn(1, 8)
    for made in (row, torch.zeros(1, 8)):
        for other in (made, torch.randn(1, 8)):
            pred = made.repeat(4, 1).requires_grad_()
            target = other.repeat(4, 1).requires_grad_()
            value = loss(pred, target, kind)
            value.backward()
            assert torch.isfinite(value)
            assert torch.isfinite(pred.grad).all() and torch.isfinite(target.grad).all()


@pytest.mark.parametrize("kind", [*DISTANCES, *SPREADS])
def test_both_views_get_a_gradient_and_bfloat16_is_computed_in_float32(kind):
    loss = distance if kind in DISTANCES else spread
    pred = torch.randn(6, 8).bfloat16().requires_grad_()
    target = torch.randn(6, 8).bfloat16().requires_grad_()
    torch.manual_seed(1)  # sigreg's directions
    value = loss(pred, target, kind)
    value.backward()
    assert pred.grad.abs().sum() > 0 and target.grad.abs().sum() > 0
    torch.manual_seed(1)
    assert value.dtype == torch.float32 and value == loss(pred.float(), target.float(), kind)


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


# --- the rest of the collapse panel -----------------------------------------------------------


def rotation(C):
    return torch.linalg.qr(torch.randn(C, C))[0]


@pytest.mark.parametrize("x, expected", [
    (torch.eye(5), 0), (torch.ones(5, 3), 1), (torch.tensor([[1.0, 0], [1, 1]]), math.sqrt(0.5)),
    # u, u, -u, -u: of the 6 pairs 2 agree and 4 do not
    (torch.tensor([[1.0], [2], [-1], [-3]]) * torch.ones(1, 4), -1 / 3),
])  # fmt: skip
def test_within_cosine_equals_hand_computed_values(x, expected):
    assert within_cosine(x) == pytest.approx(expected, abs=1e-6)


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


def test_panel_of_views_that_a_rotation_joins():
    text = torch.randn(400, 16)
    code = text @ rotation(16)
    panel = collapse_panel(code, text, code)
    assert panel["matched"] == panel["retrieval_at_1"] == panel["mean_rank"] == pytest.approx(1)
    assert (panel["linear_r2"], panel["linear_r2_flaw"]) == (pytest.approx(1, abs=1e-4), "")
    assert panel["linear_r2_shuffled"] == pytest.approx(0, abs=0.03)
    for key in ("within_pred", "within_target", "mismatched"):
        assert panel[key] == pytest.approx(0, abs=0.02)
    assert 15 < panel["effective_rank_pred"] == pytest.approx(panel["effective_rank_target"])
    same = collapse_panel(text, text, text)
    assert max(same["singular_values"]) < 1e-4 < 1 < min(same["singular_values_shuffled"])
    assert verdict(panel) == verdict(same) == "aligned"


def test_panel_of_shuffled_views_finds_nothing():
    text = torch.randn(400, 16)
    code = text[torch.randperm(400)]
    panel = collapse_panel(text, text, code)
    for key in ("matched", "mismatched", "linear_r2", "linear_r2_shuffled"):
        assert panel[key] == pytest.approx(0, abs=0.05)
    assert panel["retrieval_at_1"] < 0.03 and panel["mean_rank"] == pytest.approx(200, abs=30)
    right, wrong = panel["singular_values"], panel["singular_values_shuffled"]
    assert right == pytest.approx(wrong, rel=0.1)


def test_no_measure_of_the_panel_praises_a_point():
    """Cosine, singular values and any fit to the data would."""
    point = torch.randn(1, 16).expand(64, 16)
    panel = collapse_panel(point, point, point)
    assert panel["singular_values"] == panel["singular_values_shuffled"]
    assert max(panel["singular_values"]) < 1e-4
    assert panel["within_pred"] == panel["within_target"] == pytest.approx(1)
    assert panel["linear_r2"] == panel["linear_r2_shuffled"] == panel["retrieval_at_1"] == 0
    assert panel["linear_r2_flaw"] == "point" and verdict(panel) == "collapsed"


@pytest.mark.parametrize("loss", [distance, spread])
def test_an_unknown_kind_is_refused_by_name(loss):
    with pytest.raises(ValueError, match="euclid"):
        loss(torch.ones(2, 2), torch.ones(2, 2), "euclid")
