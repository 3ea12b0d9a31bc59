"""Claims about eval_alignment.py, on tiny models trained by tiny_run (conftest)."""

import json
import math
import re
import shutil
import statistics
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, error_line, sums

import data
import eval_alignment
from alignment import alignment, embed_pairs, verdict
from config import load_config
from data import Data
from eval_alignment import (
    FIRST_TABLE,
    SECOND_TABLE,
    Args,
    Measured,
    by_settings,
    chosen_pairs,
    collapse_panel,
    common_name,
    embed_layers,
    over_seeds,
    tables,
    within_cosine,
)
from jepa import cosines
from model import block_causal_mask
from plumbing.files import read_records
from plumbing.jsonl import as_pair
from plumbing.tokenizers import train_tokenizer
from run import load_run, make_model
from views import CODE, TARGET, TEXT, tokenize

CPU = torch.device("cpu")
ARGS = ["--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([row["answer"] for row in sums(50)], 320)


def pairs_of(bpe, n=20, **options):
    config = load_config(TINY + [f"--{key}={value}" for key, value in options.items()])
    return tokenize([as_pair(row) for row in sums(n)], bpe, config)[0]


def model_of(pairs):
    torch.manual_seed(0)
    return make_model(pairs.config, pairs.vocab_size).eval()


def measured(name="a", seed=1, curve=(), views=None, groups=None, **settings):
    """A Measured of made embeddings, as the figures and tables need it."""
    torch.manual_seed(seed)
    text, code, pred = views = torch.randn(3, 24, 8) if views is None else views
    panel = collapse_panel(pred, text, code, groups)
    layers = {key: [panel[key]] * 3 for key in (
        "matched", "mismatched", "effective_rank_pred", "effective_rank_target")}  # fmt: skip
    numbers = {"name": name, "step": 6, "jepa_weight": 1.0, "seed": seed, "ce": 2.0 + seed,
               **panel, "pairs": verdict(panel), "layers": layers}  # fmt: skip
    return Measured(numbers, cosines(pred, code), views, str(settings), groups, list(curve), 1 / 16)


# --- what is read, layer by layer -------------------------------------------------------------


@pytest.mark.parametrize("options, text", [
    ({}, TEXT), ({"n_pred": 0}, TEXT), ({"n_pred": 3}, TEXT), ({"pooling": "mean"}, TEXT),
    ({"layout": "plan"}, TEXT), ({"layout": "isolated"}, TEXT), ({"layout": "front"}, TEXT),
    ({"layout": "reverse"}, TARGET),
])  # fmt: skip
def test_views_equal_embed_pairs_and_a_pass_over_the_view_alone(options, text, bpe):
    pairs = pairs_of(bpe, **options)
    model = model_of(pairs)
    ce, layers = embed_layers(model, pairs, nullcontext)
    assert layers.shape == (3, 3, 20, 32)
    expected, pred, target = embed_pairs(model, pairs, 20, nullcontext)
    assert ce == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(layers[-1, 1], target)
    torch.testing.assert_close(layers[-1, 2], pred)
    for example in range(20):
        idx = torch.tensor([pairs.view(example, text)])
        hidden = model.everywhere(idx, torch.full_like(idx, TEXT))[0]
        alone = hidden.mean(0) if "pooling" in options else hidden[-1]
        torch.testing.assert_close(layers[-1, 0, example], alone, rtol=1e-4, atol=1e-5)


def test_layers_equal_a_walk_through_the_model(bpe):
    pairs = pairs_of(bpe)
    model = model_of(pairs)
    _, layers = embed_layers(model, pairs, nullcontext)
    for example in (0, 7, 19):
        for view, block in ((0, TEXT), (1, CODE)):
            idx = torch.tensor([pairs.view(example, block)])
            mask, positions = block_causal_mask(torch.full_like(idx, TEXT), model.sees)
            x = model.wte(idx) + model.wpe(positions)
            for depth in range(3):
                x = x if depth == 0 else model.h[depth - 1](x, mask)
                read = model.ln_f(x)[0, -1]
                torch.testing.assert_close(
                    layers[depth, view, example], read, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_without_hooks(bpe):
    pairs = pairs_of(bpe, n=2)
    model = model_of(pairs)
    embed_layers(model, pairs, nullcontext)
    assert not any(module._forward_hooks for module in model.modules())


def test_pairs_without_a_second_view_are_left_out(bpe):
    pairs = pairs_of(bpe)
    pairs.lengths[::2, TARGET - 1] = 0
    model = model_of(pairs)
    ce, layers = embed_layers(model, pairs, nullcontext)
    expected, pred, target = embed_pairs(model, pairs, 20, nullcontext)
    assert ce == pytest.approx(expected, rel=1e-5)
    assert layers.shape[2] == len(pred) == 10
    torch.testing.assert_close(layers[-1, 1:], torch.stack([target, pred]))


def chosen(pairs, n, seed):
    """The pairs that a run with this validation split is measured on."""
    made = Data({"val": pairs}, None, {"source": "made"}, "string")
    return chosen_pairs(made, Args(n_pairs=n, pairs_seed=seed))


def test_pairs_seed_chooses_and_0_takes_the_first(bpe):
    pairs = pairs_of(bpe)
    first = chosen(pairs, 8, 0)
    assert [first.view(i, TEXT) for i in range(8)] == [pairs.view(i, TEXT) for i in range(8)]
    some = chosen(pairs, 8, 3)
    assert len(some) == 8 == len(np.unique(some.starts[:, 0]))
    assert np.array_equal(some.starts, chosen(pairs, 8, 3).starts)
    assert not np.array_equal(some.starts, chosen(pairs, 8, 4).starts)
    assert not np.array_equal(some.starts, first.starts)
    for i in range(8):  # every view still belongs to its example
        [at] = np.flatnonzero(pairs.starts[:, 0] == some.starts[i, 0])
        for block in (TEXT, CODE, TARGET):
            assert some.view(i, block) == pairs.view(at, block)
        assert some.question_length[i] == pairs.question_length[at]
    assert len(chosen(pairs, 99, 0)) == len(chosen(pairs, 99, 5)) == 20


@pytest.mark.parametrize("seed", [0, 3])
def test_chosen_pairs_know_which_rows_they_were_made_of(seed, bpe):
    """Also where rows before them were left out."""
    rows = [as_pair(row) for row in sums(20)]
    rows[2] = {**rows[2], "text": "Too long? " * 40}
    config = load_config(TINY)
    pairs, left_out = tokenize(rows, bpe, config)
    assert (len(pairs), left_out) == (19, 1)
    some = chosen(pairs, 8, seed)
    assert len(some.source_row) == 8 == len(set(some.source_row.tolist()))
    for example, row in enumerate(some.source_row):
        assert bpe.decode(some.view(example, TEXT)) == rows[row]["text"]
        assert bpe.decode(some.view(example, CODE)) == rows[row]["code"]


def test_fewer_than_two_pairs_are_one_line(bpe, capsys):
    pairs = pairs_of(bpe)
    pairs.lengths[1:, TARGET - 1] = 0
    assert "made has fewer than 2 val pairs" in error_line(capsys, chosen, pairs, 20, 0)
    none = Data({"val": pairs}, None, {"source": "made"}, "string")
    line = error_line(capsys, chosen_pairs, none, Args(split="test"))
    assert "made has fewer than 2 test pairs" in line


# --- the collapse panel -------------------------------------------------------------------------


def rotation(C):
    return torch.linalg.qr(torch.randn(C, C))[0]


@pytest.mark.parametrize("x, expected", [
    (torch.eye(5), 0), (torch.ones(5, 3), 1), (torch.tensor([[1.0, 0], [1, 1]]), math.sqrt(0.5)),
    # u, u, -u, -u: of the 6 pairs 2 agree and 4 do not
    (torch.tensor([[1.0], [2], [-1], [-3]]) * torch.ones(1, 4), -1 / 3),
])  # fmt: skip
def test_within_cosine_equals_hand_computed_values(x, expected):
    assert within_cosine(x) == pytest.approx(expected, abs=1e-6)


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


def test_no_measure_of_the_panel_takes_an_equal_answer_for_a_wrong_one():
    """Two answers, told apart perfectly. An equal answer of another pair is no second one."""
    groups = np.arange(24) % 2
    views = torch.eye(2, 6)[groups]
    panel = collapse_panel(views, views, views, groups)
    assert panel["retrieval_at_1"] == 1 and panel["mismatched"] == 0
    assert panel["within_pred"] == panel["within_target"] == 0
    assert panel["chance"] == 1 / 2 and verdict(panel) == "aligned"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_panel_of_a_diverged_model_says_so(value):
    views = torch.randn(3, 24, 8)
    views[:, 5, 2] = value
    panel = collapse_panel(*views)
    assert verdict(panel) == "not finite" and panel["linear_r2_flaw"] == "not finite"
    assert all(map(math.isnan, panel["singular_values"]))
    group = [measured("a_s1", 1, views=views), measured("a_s2", 2)]
    assert tables([("a", group)])[0][1][3] == "nan ± nan"


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
        _, pred, target = embed_pairs(run.model, pairs, 16, nullcontext)
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
    # No time left is shown that has a sixtieth second.
    assert not re.search(r"ETA \d+:[6-9]", printed)
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
    told = "left out, as of other data or views than out/steps: whole\n"
    assert told in printed and "whole" not in printed.replace(told, "") and "note" not in printed
    eval_alignment.main([*ARGS, "--n_pairs=8", "out/whole", "out/steps"])
    assert "untrained views=pairs" in (printed := capsys.readouterr().out)
    assert "untrained views=steps" in printed


@pytest.mark.parametrize("options, names", [
    (dict(n_embd=64), ("n_embd=32", "n_embd=64")), (dict(n_layer=1), ("n_layer=2", "n_layer=1")),
    (dict(n_head=4), ("n_head=2", "n_head=4")), (dict(n_pred=2), ("n_pred=1", "n_pred=2")),
    (dict(bpe_vocab_size=340), ("tokenizer=bpe-", "tokenizer=bpe-")),
    (dict(layout="isolated"), ("layout=tree", "layout=isolated")),
    (dict(views="steps"), ("views=pairs", "views=steps")),
    (dict(pooling="mean"), ("pooling=last", "pooling=mean")),
    (dict(block_size=33), ("pairs=", "pairs=")),  # other pairs are left out
])  # fmt: skip
def test_what_cannot_be_compared_has_a_table_and_a_floor_of_its_own(
    options, names, tiny_run, tmp_path, monkeypatch, capsys
):
    no_figure, drawn = SimpleNamespace(savefig=lambda *args, **options: None), []
    for page in ("draw_pairs", "draw_panel"):
        monkeypatch.setattr(eval_alignment, page, lambda models, table, about: (
            drawn.append([name for name, _ in models]) or no_figure))  # fmt: skip
    tiny_run(max_iters=1, out_dir="out/a")
    tiny_run(max_iters=1, jepa_weight=0, out_dir="out/b")
    tiny_run(max_iters=1, out_dir="out/c", **options)
    capsys.readouterr()
    eval_alignment.main([*ARGS, "--n_pairs=8", "out/b", "out/c", "out/a"])
    printed = capsys.readouterr().out
    first, second = drawn[0], drawn[2]
    assert drawn == [first, first, second, second]
    assert first[:2] == ["a", "b"] and second[:1] == ["c"]  # JEPA first within a group
    for floor, name in zip((first[2:], second[1:]), names):
        assert len(floor) == 1 and floor[0].startswith(f"untrained {name}")
    assert first[2] != second[1]
    assert printed.count(" held-out pairs of sums (val)") == 2
    assert [line.split()[0] for line in printed.splitlines()
            if line.startswith(("a ", "b ", "c ", "untrained "))] == [
                *(2 * ["a", "b", "untrained"]), *(2 * ["c", "untrained"])]  # fmt: skip
    results = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert [(m["name"], m["group"]) for m in results["models"]] == [
        ("a", 1), ("b", 1), (first[2], 1), ("c", 2), (second[1], 2)]
    assert [row["group"] for row in results["over_seeds"]] == [1, 1, 1, 2, 2]
    assert [group["figures"] for group in results["groups"]] == [
        ["alignment.png", "alignment_panel.png"], ["alignment-2.png", "alignment_panel-2.png"]]
    for group in results["groups"]:
        assert group["chance"] == 1 / group["n_pairs"]
        for name in group["figures"]:
            assert (tmp_path / "out" / name).exists()


def test_each_floor_is_what_its_first_run_was_before_training(tiny_run, monkeypatch):
    no_figure = SimpleNamespace(savefig=lambda *args, **options: None)
    for page in ("draw_pairs", "draw_panel"):
        monkeypatch.setattr(eval_alignment, page, lambda *args: no_figure)
    tiny_run(max_iters=1, out_dir="out/a")
    tiny_run(max_iters=1, out_dir="out/b", n_embd=64)

    def floors(*runs):
        eval_alignment.main([*ARGS, "--n_pairs=8", *runs])
        models = json.loads(Path("out/alignment.json").read_text())["models"]
        return [m["layers"] for m in models if m["name"].startswith("untrained")]

    one, other, both = floors("out/a"), floors("out/b"), floors("out/a", "out/b")
    assert both == one + other and one != other


def test_runs_on_one_layout_and_size_share_a_floor_whatever_else_they_differ_in(
    tiny_run, monkeypatch, capsys
):
    no_figure = SimpleNamespace(savefig=lambda *args, **options: None)
    for page in ("draw_pairs", "draw_panel"):
        monkeypatch.setattr(eval_alignment, page, lambda *args: no_figure)
    tiny_run(max_iters=1, out_dir="out/a")
    tiny_run(max_iters=1, out_dir="out/b", jepa_loss="infonce", dropout=0.1, learning_rate=1e-2)
    capsys.readouterr()
    eval_alignment.main([*ARGS, "--n_pairs=8"])
    assert capsys.readouterr().out.count("untrained") == 2  # once in each of two tables


def test_shared_answers_are_counted_in_the_tables(tiny_run, monkeypatch, capsys):
    rows = {"train": sums(100), "val": [
        {**row, "answer": f"#### {i % 2}"} for i, row in enumerate(sums(20, 500))]}
    monkeypatch.setattr(data, "load_rows", lambda config: (dict(rows), "sums", "test"))
    tiny_run(max_iters=1)
    capsys.readouterr()
    eval_alignment.main([*ARGS, "--n_pairs=8"])  # with figures
    assert ("8 held-out pairs of sums (val), 8 share their answer; retrieval@1 by chance 0.500"
            in capsys.readouterr().out)  # fmt: skip
    [trained, floor] = json.loads(Path("out/alignment.json").read_text())["models"]
    assert trained["chance"] == floor["chance"] == 1 / 2


def test_cells_of_a_table_never_touch(capsys):
    about = {"shared": 0, "n_pairs": 2, "chance": 0.5, "split": "val", "data": {"dataset": "a"}}
    eval_alignment.print_tables([[["run", "1.0", "of one answer only", "not finite"]]], about)
    assert " 1.0 of one answer only     not finite\n" in capsys.readouterr().out


@pytest.mark.parametrize("arg", ["--split=train", "--n_pairs=1", "--pairs_seed=-1"])
def test_a_mistake_is_one_line(arg, capsys):
    key, value = arg.removeprefix("--").split("=")
    assert f"{key}={value}" in error_line(capsys, eval_alignment.main, [*ARGS, arg])


def test_runs_on_other_data_are_not_compared(tiny_run, monkeypatch, capsys):
    tiny_run(out_dir="out/one")
    monkeypatch.setattr(data, "load_rows", lambda config: (
        {"train": sums(90, 1000), "val": sums(20, 500)}, "sums", "test"))  # fmt: skip
    assert "other data" in error_line(capsys, eval_alignment.main, [*ARGS, "out/one"])
