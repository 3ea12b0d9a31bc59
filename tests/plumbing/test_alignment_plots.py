"""Claims about plumbing/alignment_plots.py, on embeddings made up for them."""

import statistics
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from test_eval_alignment import measured

from eval_alignment import tables
from plumbing import alignment_plots

ABOUT = {
    "split": "val", "n_pairs": 24, "pairs_seed": 0, "chance": 1 / 24,
    "commit": "abc", "torch": "2", "time": "now",
    "data": {"dataset": "made", "source": "test", "train_sha256": "0" * 64, "tokenizer": "bpe"},
}  # fmt: skip


def record(step, value):
    keys = ("ce", "matched", "mismatched", "retrieval_at_1")
    return {"step": step, **{f"val_{key}": value for key in keys}}


def test_curves_are_the_mean_over_seeds_at_the_steps_they_share():
    group = [measured("a_s1", 1, [record(3, 0.2), record(6, 0.4), record(9, 0.1)]),
             measured("a_s2", 2, [record(3, 0.4), record(6, 0.8)])]  # fmt: skip
    models = [("a", group), ("untrained", [measured("untrained", 5)])]
    figure = alignment_plots.draw_pairs(models, tables(models)[0], ABOUT)
    axes = {axis.get_title(): axis for axis in figure.axes}
    [ce] = axes["validation cross-entropy, nats per label"].lines
    assert ce.get_xdata().tolist() == [3, 6] and ce.get_ydata() == pytest.approx([0.3, 0.6])
    matched, _ = axes["cosine: matched (line), mismatched (dots)"].lines
    floor = models[1][1][0].numbers["matched"]  # an untrained model is step 0 of every run
    assert matched.get_ydata() == pytest.approx([floor, 0.3, 0.6])
    [band] = axes["validation cross-entropy, nats per label"].collections
    edges = band.get_datalim(band.axes.transData).intervaly
    sd = statistics.stdev([0.4, 0.8])
    assert edges == pytest.approx([0.3 - statistics.stdev([0.2, 0.4]), 0.6 + sd])
    _, chance = axes["retrieval@1 (dashed: chance)"].lines
    assert chance.get_ydata()[0] == 1 / 16  # of the pairs in training, not of those measured here


def test_both_pages_can_be_drawn_whatever_has_collapsed(tmp_path):
    made = {size: torch.ones(3, 24, 8) + size * torch.randn(3, 24, 8) for size in (0, 1e-8, 1)}
    models = [(f"{size}", [measured("a", views=views)]) for size, views in made.items()]
    models.append(("untrained", [measured()]))
    first, second = tables(models)
    alignment_plots.draw_pairs(models, first, ABOUT).savefig(tmp_path / "1.png", dpi=20)
    alignment_plots.draw_panel(models, second, ABOUT).savefig(tmp_path / "2.png", dpi=20)


def test_equal_answers_are_blank_in_the_matrix_and_left_out_of_the_histogram():
    groups = np.array([0] * 20 + [1, 2, 3, 4])
    models = [("a", [measured("a", groups=groups)]), ("untrained", [measured("b", 2)])]
    figure = alignment_plots.draw_pairs(models, tables(models)[0], ABOUT)
    shared, plain = (axis.images[0].get_array().filled(np.nan) for axis in figure.axes
                     if axis.get_ylabel() == "[PRED] of question")  # fmt: skip
    same = (groups[:, None] == groups) & ~np.eye(24, dtype=bool)
    assert np.array_equal(np.isnan(shared), same) and not np.isnan(plain).any()
    cosines = models[0][1][0].cosines.numpy()
    histogram = figure.axes[0]
    mean = cosines[groups[:, None] != groups].mean()
    assert histogram.lines[0].get_xdata()[0] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("groups, value", [(np.zeros(24, int), 1.0), (None, np.nan)])
def test_both_pages_can_be_drawn_of_one_answer_and_of_a_diverged_model(groups, value, tmp_path):
    views = torch.randn(3, 24, 8)
    views[:, 3] *= value
    models = [("a", [measured("a", views=views, groups=groups)]), ("untrained", [measured("b", 2)])]
    first, second = tables(models)
    alignment_plots.draw_pairs(models, first, ABOUT).savefig(tmp_path / "1.png", dpi=20)
    alignment_plots.draw_panel(models, second, ABOUT).savefig(tmp_path / "2.png", dpi=20)


def test_a_collapsed_model_is_a_dot_in_the_plane(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    point = torch.ones(3, 24, 8) + 1e-3 * torch.randn(3, 24, 8)
    models = [("a", [measured("a", views=point)]), ("untrained", [measured("b", 2)])]
    figure = alignment_plots.draw_panel(models, tables(models)[1], ABOUT)
    dot, cloud = (axis for axis in figure.axes if "PCA" in axis.get_title())
    assert dot.get_xlim() == cloud.get_xlim()
    reach = [max(np.abs(c.get_offsets()).max() for c in axis.collections[1:])
             for axis in (dot, cloud)]  # fmt: skip
    assert reach[0] < 0.01 * reach[1]


def test_tsne_is_drawn_where_scikit_learn_is_installed(monkeypatch):
    models = [("untrained", [measured()])]

    def titles():
        figure = alignment_plots.draw_panel(models, tables(models)[1], ABOUT)
        return [axis.get_title() for axis in figure.axes if axis.get_title().startswith("untr")]

    class TSNE:
        def __init__(self, perplexity, init, random_state):
            assert 0 < perplexity < 3 * 24 and random_state == 0

        def fit_transform(self, x):
            norms = np.linalg.norm(x, axis=1)
            assert x.shape == (3 * 24, 8) and np.allclose(norms, 1, atol=1e-5)
            return x[:, :2]

    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert titles() == ["untrained: PCA"]
    package, manifold = ModuleType("sklearn"), ModuleType("sklearn.manifold")
    manifold.TSNE = TSNE
    monkeypatch.setitem(sys.modules, "sklearn", package)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", manifold)
    assert titles() == ["untrained: PCA", "untrained: t-SNE"]


def test_principal_plane_keeps_distances_of_what_lies_in_a_plane():
    points = torch.randn(30, 2) * torch.tensor([3.0, 1.0])
    turned = points @ torch.linalg.qr(torch.randn(7, 2))[0].T + 5
    plane = alignment_plots.principal_plane(turned)
    torch.testing.assert_close(torch.cdist(plane, plane), torch.cdist(points, points),
                               rtol=1e-3, atol=1e-3)  # fmt: skip
    assert plane[:, 0].var() > plane[:, 1].var()
