"""Claims about eval_alignment.py and its figures, on tiny models trained by tiny_run (conftest)."""

import json
import shutil
import statistics
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, error_line, sums

import data
import draw_alignment
import eval_alignment
from config import load_config
from eval_alignment import (
    FIRST_TABLE,
    SECOND_TABLE,
    Measured,
    by_settings,
    choose,
    common_name,
    encode_layers,
    over_seeds,
    tables,
)
from jepa import alignment, collapse_panel, cosines, verdict
from model import GPT, block_causal_mask
from run import encode_pairs, load_run, read_records
from views import CODE, TARGET, TEXT, tokenize

CPU = torch.device("cpu")
ARGS = ["--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def bpe():
    return data.train_tokenizer([row["answer"] for row in sums(50)], 320)


def pairs_of(bpe, n=20, **options):
    config = load_config(TINY + [f"--{key}={value}" for key, value in options.items()])
    return tokenize([data.as_pair(row) for row in sums(n)], bpe, config)[0]


def model_of(pairs):
    torch.manual_seed(0)
    return GPT(pairs.config, pairs.vocab_size, pairs.layout.parents).eval()


def measured(name="a", seed=1, curve=(), views=None, **settings):
    """A Measured of made embeddings, as the figures and tables need it."""
    torch.manual_seed(seed)
    text, code, pred = views = torch.randn(3, 24, 8) if views is None else views
    panel = collapse_panel(pred, text, code)
    layers = {key: [panel[key]] * 3 for key in (
        "matched", "mismatched", "effective_rank_pred", "effective_rank_target")}  # fmt: skip
    numbers = {"name": name, "step": 6, "jepa_weight": 1.0, "seed": seed, "ce": 2.0 + seed,
               **panel, "pairs": verdict(panel), "layers": layers}  # fmt: skip
    return Measured(numbers, cosines(pred, code), views, str(settings), list(curve), 16)


# --- what is read, layer by layer -------------------------------------------------------------


@pytest.mark.parametrize("options, text", [
    ({}, TEXT), ({"n_pred": 0}, TEXT), ({"n_pred": 3}, TEXT), ({"pooling": "mean"}, TEXT),
    ({"layout": "plan"}, TEXT), ({"layout": "isolated"}, TEXT), ({"pred_place": "front"}, TEXT),
    ({"direction": "reverse"}, TARGET),
])  # fmt: skip
def test_views_equal_encode_pairs_and_a_pass_over_the_view_alone(options, text, bpe):
    pairs = pairs_of(bpe, **options)
    model = model_of(pairs)
    ce, layers = encode_layers(model, pairs, CPU, torch.no_grad)
    assert layers.shape == (3, 3, 20, 32)
    expected, pred, target = encode_pairs(model, pairs, 20, CPU, torch.no_grad)
    assert ce == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(layers[-1, 1], target)
    torch.testing.assert_close(layers[-1, 2], pred)
    for row in range(20):
        idx = torch.tensor([pairs.view(row, text)])
        hidden = model.hidden(idx, torch.full_like(idx, TEXT))[0]
        alone = hidden.mean(0) if "pooling" in options else hidden[-1]
        torch.testing.assert_close(layers[-1, 0, row], alone, rtol=1e-4, atol=1e-5)


def test_layers_equal_a_walk_through_the_model(bpe):
    pairs = pairs_of(bpe)
    model = model_of(pairs)
    _, layers = encode_layers(model, pairs, CPU, torch.no_grad)
    for row in (0, 7, 19):
        for view, block in ((0, TEXT), (1, CODE)):
            idx = torch.tensor([pairs.view(row, block)])
            mask, positions = block_causal_mask(torch.full_like(idx, TEXT), model.sees)
            x = model.wte(idx) + model.wpe(positions)
            for depth in range(3):
                x = x if depth == 0 else model.h[depth - 1](x, mask)
                read = model.ln_f(x)[0, -1]
                torch.testing.assert_close(layers[depth, view, row], read, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_without_hooks(bpe):
    pairs = pairs_of(bpe, n=2)
    model = model_of(pairs)
    encode_layers(model, pairs, CPU, torch.no_grad)
    assert not any(module._forward_hooks for module in model.modules())


def test_pairs_without_a_second_view_are_left_out(bpe):
    pairs = pairs_of(bpe)
    pairs.lengths[::2, TARGET - 1] = 0
    model = model_of(pairs)
    ce, layers = encode_layers(model, pairs, CPU, torch.no_grad)
    expected, pred, target = encode_pairs(model, pairs, 20, CPU, torch.no_grad)
    assert ce == pytest.approx(expected, rel=1e-5)
    assert layers.shape[2] == len(pred) == 10
    torch.testing.assert_close(layers[-1, 1:], torch.stack([target, pred]))


def test_pairs_seed_chooses_and_0_takes_the_first(bpe):
    pairs = pairs_of(bpe)
    first = choose(pairs, 8, 0)
    assert [first.view(i, TEXT) for i in range(8)] == [pairs.view(i, TEXT) for i in range(8)]
    chosen = choose(pairs, 8, 3)
    assert len(chosen) == 8 == len(np.unique(chosen.starts[:, 0]))
    assert np.array_equal(chosen.starts, choose(pairs, 8, 3).starts)
    assert not np.array_equal(chosen.starts, choose(pairs, 8, 4).starts)
    assert not np.array_equal(chosen.starts, first.starts)
    for i in range(8):  # every view still belongs to its example
        [at] = np.flatnonzero(pairs.starts[:, 0] == chosen.starts[i, 0])
        for block in (TEXT, CODE, TARGET):
            assert chosen.view(i, block) == pairs.view(at, block)
        assert chosen.asked[i] == pairs.asked[at]
    assert len(choose(pairs, 99, 0)) == len(choose(pairs, 99, 5)) == 20


# --- seeds ------------------------------------------------------------------------------------


def test_runs_are_put_together_that_differ_in_their_seed_alone():
    runs = [measured("a_s1", 1), measured("b", 1, weight=0), measured("a_s2", 2),
            measured("best of a_s2", 2), measured("c", 3, weight=2)]  # fmt: skip
    groups = [(name, [m.numbers["name"] for m in group]) for name, group in by_settings(runs)]
    assert groups == [
        ("a", ["a_s1", "a_s2"]), ("b", ["b"]),
        ("best of a_s2", ["best of a_s2"]),  # the same seed again is no second seed
        ("c", ["c"]),
    ]  # fmt: skip


@pytest.mark.parametrize("names, expected", [
    (["debug"], "debug"), (["run_s1"], "run_s1"), (["run_s1", "run_s2"], "run"),
    (["debug", "debug_s1"], "debug"), (["gsm8k-seed10", "gsm8k-seed11"], "gsm8k"),
    (["jepa_weight=0.5,seed=0", "jepa_weight=0.5,seed=1"], "jepa_weight=0.5"),
    (["0", "1"], "all seeds"),
    (["seed=1", "seed=2", "seed=10"], "all seeds"),
])  # fmt: skip
def test_a_model_of_several_seeds_is_named_by_what_its_runs_share(names, expected):
    assert common_name(names) == expected


def test_tables_show_mean_and_sample_deviation_and_count_words():
    group = [measured("a_s1", 1), measured("a_s2", 2), measured("a_s4", 4)]
    for m, pairs, flaw in zip(group, ("aligned", "collapsed", "aligned"), ("", "", "line")):
        m.numbers |= {"pairs": pairs, "linear_r2_flaw": flaw}
    models = [("a", group), ("b", [measured("b", 3)])]
    first, second = tables(models)
    assert first[0][:3] == [*second[0][:2], "CE"] == ["model", "n", "CE"]
    ce = [3.0, 4.0, 6.0]
    assert first[1][:3] == ["a", "3", f"{sum(ce) / 3:.3f} ± {statistics.stdev(ce):.3f}"]
    assert first[1][-1] == "2 aligned, 1 collapsed" and second[1][-1] == "2 yes, 1 no (line)"
    assert first[2][:3] == ["b", "1", "5.000"] and "±" not in "".join(second[2])
    assert second[2][-1] == "yes"
    assert {len(row) for row in first} == {len(FIRST_TABLE) + 3}
    row = over_seeds(models)[0]
    assert (row["n"], row["seeds"], row["sd"]["ce"]) == (3, [1, 2, 4], statistics.stdev(ce))
    assert over_seeds(models)[1]["sd"]["ce"] is None  # one seed has no spread, which is not 0
    assert row["mean"].keys() == {**FIRST_TABLE, **SECOND_TABLE}.keys()


# --- the command ------------------------------------------------------------------------------


def test_the_command_measures_every_run_beside_an_untrained_model(tiny_run, tmp_path, capsys):
    for weight in (1, 0):
        for seed in (1, 2):
            tiny_run(jepa_weight=weight, seed=seed, out_dir=f"out/w{weight}_s{seed}")
    eval_alignment.main([*ARGS, "--n_pairs=16"])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert (results["split"], results["n_pairs"], results["pairs_seed"]) == ("val", 16, 0)
    assert {"commit", "torch"} < results.keys() and len(results["data"]["train_sha256"]) == 64
    names = [m["name"] for m in results["models"]]
    assert names == ["w1_s1", "w1_s2", "w0_s1", "w0_s2", "untrained"]
    for m in results["models"][:-1]:
        # The same pairs as in training: the last evaluation there says the same.
        last = read_records(Path("out", m["name"], "metrics.jsonl"))[-1]
        for key in ("ce", "matched", "mismatched", "retrieval_at_1", "mean_rank"):
            assert m[key] == pytest.approx(last[f"val_{key}"], abs=1e-5)
        run = load_run(Path("out", m["name"]), CPU)
        pairs = data.load_data(run.config, run.tokenizer).pairs["val"]
        _, pred, target = encode_pairs(run.model, pairs, 16, CPU, torch.no_grad)
        assert m["effective_rank_pred"] == pytest.approx(
            alignment(pred, target)["effective_rank_pred"], rel=1e-4)  # fmt: skip
        for key, by_layer in m["layers"].items():
            assert len(by_layer) == 3 and by_layer[-1] == pytest.approx(m[key], rel=1e-4)
        assert len(m["singular_values"]) == len(m["singular_values_shuffled"]) == 16
        assert m["within_target"] <= 1 and m["linear_r2"] <= 1
    groups = [(row["name"], row["seeds"]) for row in results["over_seeds"]]
    assert groups == [("w1", [1, 2]), ("w0", [1, 2]), ("untrained", [1])]
    for name in ("alignment.png", "alignment_panel.png"):
        assert (tmp_path / "out" / name).stat().st_size > 20_000
    lines = [line.split() for line in printed.splitlines()]
    shown = [line for line in lines if line and line[0] in ("w1", "w0", "untrained")]
    assert [line[:2] for line in shown] == 2 * [["w1", "2"], ["w0", "2"], ["untrained", "1"]]


def test_another_choice_of_pairs_is_recorded_and_gives_other_numbers(
    tiny_run, tmp_path, monkeypatch
):
    tiny_run()
    no_figure = SimpleNamespace(savefig=lambda *args, **options: None)
    for page in ("draw_pairs", "draw_panel"):
        monkeypatch.setattr(eval_alignment, page, lambda *args: no_figure)
    shutil.copytree("out/tiny", "elsewhere/tiny")

    def results(*args, at="out"):
        eval_alignment.main([*ARGS, "--n_pairs=8", *args])
        return json.loads(Path(at, "alignment.json").read_text())

    first, chosen = results(), results("--pairs_seed=5")
    assert (first["pairs_seed"], chosen["pairs_seed"]) == (0, 5)
    matched = [r["models"][0]["matched"] for r in (first, chosen)]
    assert matched[0] != pytest.approx(matched[1], abs=1e-6)
    # A run named by its folder: the results lie beside it.
    again = results("elsewhere/tiny/ckpt.pt", "--pairs_seed=5", at="elsewhere")
    assert again["models"] == chosen["models"]


def test_other_views_of_the_same_data_are_left_out_or_noted(tiny_run, monkeypatch, capsys):
    no_figure = SimpleNamespace(savefig=lambda *args, **options: None)
    for page in ("draw_pairs", "draw_panel"):
        monkeypatch.setattr(eval_alignment, page, lambda *args: no_figure)
    tiny_run(out_dir="out/whole")
    tiny_run(out_dir="out/steps", views="steps")
    capsys.readouterr()
    eval_alignment.main([*ARGS, "--n_pairs=8"])
    printed = capsys.readouterr().out
    assert "steps" in printed and "whole" not in printed and "note" not in printed
    eval_alignment.main([*ARGS, "--n_pairs=8", "out/whole", "out/steps"])
    assert "note: steps is measured on other pairs than whole" in capsys.readouterr().out


@pytest.mark.parametrize("arg", ["--split=train", "--n_pairs=1", "--pairs_seed=-1"])
def test_a_mistake_is_one_line(arg, capsys):
    key, value = arg.removeprefix("--").split("=")
    assert f"{key}={value}" in error_line(capsys, eval_alignment.main, [*ARGS, arg])


def test_runs_on_other_data_are_not_compared(tiny_run, monkeypatch, capsys):
    tiny_run(out_dir="out/one")
    monkeypatch.setattr(data, "load_rows", lambda config: (
        {"train": sums(90, 1000), "val": sums(20, 500)}, "sums", "test"))  # fmt: skip
    assert "other data" in error_line(capsys, eval_alignment.main, [*ARGS, "out/one"])


# --- figures ----------------------------------------------------------------------------------

ABOUT = {
    "split": "val", "n_pairs": 24, "pairs_seed": 0, "commit": "abc", "torch": "2", "time": "now",
    "data": {"dataset": "made", "source": "test", "train_sha256": "0" * 64, "tokenizer": "bpe"},
}  # fmt: skip


def record(step, value):
    keys = ("ce", "matched", "mismatched", "retrieval_at_1")
    return {"step": step, **{f"val_{key}": value for key in keys}}


def test_curves_are_the_mean_over_seeds_at_the_steps_they_share():
    group = [measured("a_s1", 1, [record(3, 0.2), record(6, 0.4), record(9, 0.1)]),
             measured("a_s2", 2, [record(3, 0.4), record(6, 0.8)])]  # fmt: skip
    models = [("a", group), ("untrained", [measured("untrained", 5)])]
    figure = draw_alignment.draw_pairs(models, tables(models)[0], ABOUT)
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


@pytest.mark.parametrize("size", [0, 1e-8, 1])
def test_both_pages_can_be_drawn_whatever_has_collapsed(size, tmp_path):
    views = torch.ones(3, 24, 8) + size * torch.randn(3, 24, 8)
    models = [("a", [measured("a", views=views)]), ("untrained", [measured()])]
    first, second = tables(models)
    draw_alignment.draw_pairs(models, first, ABOUT).savefig(tmp_path / "1.png")
    draw_alignment.draw_panel(models, second, ABOUT).savefig(tmp_path / "2.png")


def test_a_collapsed_model_is_a_dot_in_the_plane(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    point = torch.ones(3, 24, 8) + 1e-3 * torch.randn(3, 24, 8)
    models = [("a", [measured("a", views=point)]), ("untrained", [measured("b", 2)])]
    figure = draw_alignment.draw_panel(models, tables(models)[1], ABOUT)
    dot, cloud = (axis for axis in figure.axes if "PCA" in axis.get_title())
    assert dot.get_xlim() == cloud.get_xlim()
    reach = [max(np.abs(c.get_offsets()).max() for c in axis.collections[1:])
             for axis in (dot, cloud)]  # fmt: skip
    assert reach[0] < 0.01 * reach[1]


def test_tsne_is_drawn_where_scikit_learn_is_installed(monkeypatch):
    models = [("untrained", [measured()])]

    def titles():
        figure = draw_alignment.draw_panel(models, tables(models)[1], ABOUT)
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
    plane = draw_alignment.principal_plane(turned)
    torch.testing.assert_close(torch.cdist(plane, plane), torch.cdist(points, points),
                               rtol=1e-3, atol=1e-3)  # fmt: skip
    assert plane[:, 0].var() > plane[:, 1].var()
