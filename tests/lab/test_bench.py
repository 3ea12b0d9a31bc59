"""Claims about lab/bench.py: what it compares with is what it says, and every part runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY, error_line, sums

import data
from config import Config
from generate import generate, generate_plain
from lab import bench, bench_loading, bench_profile, bench_tables, peers, timing
from model import PAD, Batch
from plumbing.processes import has_bf16, pick_device
from run import make_model
from train import train_step

V = 64
SIZES = Config(n_layer=2, n_head=2, n_embd=32, block_size=32, n_pred=0)


def test_plain_gpt_is_our_gpt_with_a_label_everywhere():
    """So what bench.py measures against computes the same loss, by other means."""
    plain, gpt = peers.PlainGPT(SIZES, V, (None,)), make_model(SIZES, V)
    gpt.load_state_dict(plain.state_dict())
    idx, targets = torch.randint(V, (2, 3, 32))
    loss = plain(idx, targets)
    row = Batch(idx, torch.ones_like(idx), targets)
    ours = gpt(row, torch.zeros_like(idx, dtype=torch.bool))[1] / targets.numel()
    torch.testing.assert_close(loss, ours)
    grads = torch.autograd.grad(loss, list(plain.parameters()))
    for got, want in zip(grads, torch.autograd.grad(ours, list(gpt.parameters()))):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


PROMPTS = [[5, 9, 2, 40, 13], [21], [8, 30, 12]]


def opinionated():
    """Our model with strong opinions, so that rounding decides nothing."""
    torch.manual_seed(0)
    gpt = make_model(SIZES, V).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return gpt


def test_transformers_gets_our_weights_and_gives_our_answers():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    gpt = opinionated()
    theirs = peers.as_transformers(gpt, SIZES)
    idx = torch.arange(20)[None]
    logits = gpt.logits(gpt.everywhere(idx, torch.ones_like(idx)))
    torch.testing.assert_close(theirs(idx).logits, logits, rtol=1e-3, atol=1e-3)
    rows = peers.generate_theirs(theirs, PROMPTS, 12, V - 1)
    assert rows.tolist() == generate(gpt, PROMPTS, 12, V)  # V is never said: no row stops early


def test_a_pass_without_a_cache_says_what_generation_says():
    gpt = opinionated()
    says = bench.next_tokens(gpt, PROMPTS)[:, None].tolist()
    assert says == generate(gpt, PROMPTS, 1, V) == generate_plain(gpt, PROMPTS, 1, V)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """bench.main on 200 sums with a tiny model; what it wrote."""
    monkeypatch.chdir(tmp_path)
    rows = {"train": sums(200), "val": sums(70, 500)}
    monkeypatch.setattr(data, "load_rows", lambda config: (dict(rows), "sums", "test"))
    for module, name, value in (
        (timing, "ROUNDS", 4), (timing, "SLOW_ROUNDS", 1), (timing, "QUICK_ROUNDS", 2),
        (bench, "NEW_TOKENS", 16), (bench, "QUICK_NEW_TOKENS", 16), (bench, "TOKENS", 128),
        (bench, "LENGTHS", (8, 16, 32)), (bench, "BATCHES", (2,)), (bench_loading, "ROWS", (300,)),
    ):
        monkeypatch.setattr(module, name, value)

    def run(*argv):
        bench.main([*TINY, *argv])
        [report] = (tmp_path / "out").glob("bench*.json")
        return json.loads(report.read_text())

    return run


def start(*argv):
    """What every part measures with, on the sums of `small`, and a model about to train."""
    config = bench.load_config([*TINY, *argv])
    device, autocast = pick_device(config.device, config.dtype)
    setup = timing.Setup(config, data.load_data(config), device, autocast, [])
    return setup, timing.start_training(setup, config)


def test_the_phases_are_all_of_a_step_and_change_nothing_of_it(small):
    """They come in the order of PHASES, and the step with them is the step that trains."""
    _, plain = start()
    _, watched = start()
    stamps = bench_profile.stamped_phases(watched)
    train_step(plain, 0)  # as the one by which the last gradient is found
    for step in range(2):
        stamps.clear()
        assert train_step(plain, step) == train_step(watched, step)
        assert len(stamps) == len(bench_profile.PHASES) - 1 and stamps == sorted(stamps)


def test_the_last_gradient_ends_backward(small):
    _, t = start()
    last, without = bench_profile.last_gradient(t), []
    last.register_post_accumulate_grad_hook(
        lambda _: without.append(sum(p.grad is None for p in t.model.parameters())))  # fmt: skip
    train_step(t, 1)
    assert without == [0]


def test_the_trunk_and_the_output_layer_are_all_of_the_operations(small):
    _, t = start()
    batch = bench_profile.plan(t, 0, 0).batch
    output_layer = 6 * t.model.width * t.model.vocab_size * (batch.targets != -1).sum().item()
    assert bench_profile.trunk_flops(t, 0) + output_layer == train_step(t, 0)["flops"]


def test_ours_are_the_steps_that_are_named(small):
    """Tokens tell which blocks a step has computed, an average of weights would be another step."""
    _, t = start("--ema=0.9", "--stop_grad=true")
    variants = bench.variants_of(t.pairs.config)
    assert not any(variant.ema for variant in variants.values())
    carries, spared = bench.steps_by_turns(
        timing.with_config(t, variants["JEPA, stop_grad, dropout .5"]).pairs)[:2]  # fmt: skip
    tokens = {name: [train_step(timing.with_config(t, variant), step)["tokens"]
                     for step in (carries, spared)] for name, variant in variants.items()}
    assert tokens["JEPA"] == tokens["JEPA, stop_grad"]
    assert all(more > less for more, less in zip(tokens["JEPA"], tokens["CE only"]))
    assert tokens["JEPA, stop_grad, dropout .5"] == [tokens["JEPA"][0], tokens["CE only"][1]]


def test_made_up_pairs_have_one_length_and_a_label_everywhere(small):
    setup, t = start()
    pairs = bench.made_up(setup.config, t.model.vocab_size, 4, 16)
    assert pairs.lengths.tolist() == [[8, 8, 8]] * 4 and len(pairs.batch(0)) == 4
    batch = pairs.pack(pairs.batch(0), pairs.layout.plain)
    assert batch.idx.shape == (4, 16) and (batch.targets != -1).sum() == 4 * 15


def numbers(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [n for branch in tree for n in numbers(branch)]
    return [tree] if isinstance(tree, (int, float)) else []


def test_training_and_profile_report_every_arm(small, capsys):
    results = small("--parts=training,profile", "--jepa_weight=0")
    arms = results["parts"]["training"]["arms"]
    assert {"CE only", "JEPA", "JEPA, stop_grad", "nanoGPT, fp32"} <= set(arms)
    assert ("nanoGPT, bf16" in arms) == has_bf16(torch.device("cpu"))
    assert ("official two rows, fp32" in arms) == bool(bench.transformers)
    assert arms["CE only"]["over_ce_only"]["median"] == 1
    profile = results["parts"]["profile"]["arms"]
    for arm in profile.values():
        assert all(0 <= share["median"] <= 1 for share in arm["share"].values())
        assert 0 <= arm["padding"] < 0.5
    assert "generation" not in results["parts"]
    for part in ("training", "profile"):
        assert all(math.isfinite(n) and n >= 0 for n in numbers(results["parts"][part]))
    assert results["data"]["train_sha256"] and results["processor"] and results["threads"] == 1
    assert "trunk, forward" in capsys.readouterr().out


def test_generation_data_and_curves_report_every_arm(small):
    Path("test").touch()  # the data's source in words, and by accident a file here
    results = small("--parts=generation,data,curves", "--block_size=256")
    batches = results["parts"]["generation"]["batches"]
    assert set(batches) == {"1", "16", "64"} and "without a cache" in batches["64"]
    loading, curves = (results["parts"][part] for part in ("data", "curves"))
    assert loading["sets"]["300 pairs"]["pairs"] == 270  # a tenth is for validation
    assert {"cold", "warm"} < set(loading["sets"]["sums"])
    assert set(curves["shapes"]) == {"16 x 8", "8 x 16", "4 x 32", "2 x 16"}
    assert all(math.isfinite(n) and n > 0 for n in numbers([batches, loading, curves["shapes"]]))


def test_without_transformers_the_rest_runs_and_says_so(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "transformers", None)
    parts = small("--parts=training,generation")["parts"]
    assert not any(name.startswith("official") for name in parts["training"]["arms"])
    assert "transformers" not in parts["generation"]["batches"]["16"]
    assert capsys.readouterr().out.count(bench.NO_TRANSFORMERS) == 2


def test_too_few_questions_leave_out_generation_alone(small, capsys):
    parts = small("--parts=generation,curves", "--block_size=32")["parts"]
    assert "needs 64 held-out questions of at most 16 tokens" in parts["generation"]["skipped"]
    assert parts["curves"]["shapes"] and "generation left out" in capsys.readouterr().out


def test_a_window_needs_more_tokens_than_there_are(small, capsys):
    line = error_line(capsys, small, "--parts=training", "--block_size=100000")
    assert "block_size=100000" in line


def test_help_names_the_module_and_its_parts(small, capsys):
    with pytest.raises(SystemExit) as exit_:
        small("--help")
    shown = capsys.readouterr().out
    assert exit_.value.code == 0 and "python -m lab.bench" in shown
    assert "training, generation, data, curves, profile" in shown and "--jepa_weight" in shown


def test_an_unknown_part_is_refused(small, capsys):
    line = error_line(capsys, small, "--parts=training,speed")
    assert "speed" in line and "profile" in line


# --- the quick look, dtypes, several machines -------------------------------------------------


def test_quick_reports_its_ratios_and_a_line_per_round(small, capsys):
    report = small("--quick")
    assert Path("out/bench-quick.json").exists() and set(report["parts"]) == {"quick"}
    ratios = report["parts"]["quick"]["ratios"]
    rows = ["", " padded to 64"] if bench.transformers else []
    assert list(ratios) == [
        "JEPA step over CE-only step, time", "one row over the same row padded to 64, speed",
        *(f"one row over two rows{row}, speed" for row in rows),
        "generation, batch 16: cached over not, speed",
    ]  # fmt: skip
    assert all(math.isfinite(n) and n > 0 for n in numbers(ratios))
    printed = capsys.readouterr().out
    for part in ("training", "generation"):
        assert [f"{part}: round {i} of 3 after" in printed for i in (1, 2, 3)] == [True] * 3
    assert "one row over the same row padded to 64" in printed


def test_quick_compares_rows_of_the_same_examples(small):
    """What is padded has the same tokens, and is the same step but for rounding."""
    _, t = start("--block_size=128", "--batch_size=4")
    padded = timing.with_pairs(t, peers.padded_to_block_size(t.pairs))
    examples = t.pairs.batch(0)
    rows, wide = (each.pairs.pack(examples, t.pairs.layout.row) for each in (t, padded))
    assert wide.idx.size(1) == 128 > rows.idx.size(1)
    assert (wide.block != PAD).sum() == (rows.block != PAD).sum()
    got, want = (train_step(timing.with_pairs(start("--block_size=128", "--batch_size=4")[1],
                                              each.pairs), 0)
                 for each in (padded, t))  # fmt: skip
    assert got.pop("flops") > want.pop("flops")
    assert got == pytest.approx(want, rel=1e-4)


def test_the_official_rows_lose_nothing_without_their_padding(small):
    pytest.importorskip("transformers")
    _, t = start("--jepa_weight=1")
    seen = []
    for padded in (True, False):
        torch.manual_seed(0)
        step = peers.official_step(t.pairs, t.pairs.config, torch.device("cpu"), torch.float32,
                                   padded)  # fmt: skip
        seen.append(step(0))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("knows", [True, False])
def test_no_arm_runs_in_a_dtype_that_is_only_emulated(knows, small, monkeypatch, capsys):
    """The capabilities of the processor decide, as they do for dtype=auto."""
    features = {"avx512_bf16": knows, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    report = small("--parts=training")
    arms = report["parts"]["training"]["arms"]
    assert ("nanoGPT, bf16" in arms) == knows and "nanoGPT, fp32" in arms
    assert report["has_bf16"] is knows and report["dtype"] == "float32"
    assert ("left out the arms in bf16" in capsys.readouterr().out) != knows
    if not knows:
        line = error_line(capsys, small, "--quick", "--dtype=bfloat16")
        assert "only emulated" in line and "--dtype=float32" in line


def test_reports_stand_side_by_side(small, capsys):
    """A column per file, a row for each figure that one of them has."""
    for name, options in (("old", ("--quick",)), ("new", ("--parts=training,generation",
                                                          "--block_size=128"))):
        Path("out").mkdir(exist_ok=True)
        small(*options)
        next(Path("out").glob("bench*.json")).rename(f"{name}.json")
    capsys.readouterr()
    bench.main(["old.json", "new.json"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | old | new |" and lines[1] == "|---|---|---|"
    assert all(line.count("|") == 4 for line in lines)
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in lines}
    old, new = rows["JEPA step over CE-only step, time (quick)"]
    assert old.strip() and not new.strip()
    old, new = rows["JEPA, stop_grad over CE only, time (training)"]
    assert new.strip() and not old.strip()
    assert rows["dtype"] == [" float32 ", " float32 "]
    assert "batch 64 over without a cache, speed (generation)" in rows


def test_what_is_no_report_is_refused(tmp_path, capsys):
    for name, text in (("a", "{}"), ("b", "no JSON"), ("c", "[1]")):
        (tmp_path / f"{name}.json").write_text(text)
        line = error_line(capsys, bench.main, [str(tmp_path / f"{name}.json")])
        assert f"{name}.json is no report" in line
    assert "cannot read" in error_line(capsys, bench.main, [str(tmp_path / "none.json")])
    assert "room for 5" in error_line(capsys, bench.main, ["a.json"] * 6)
    assert "one of them" in error_line(capsys, bench.main, ["--quick", "--parts=data"])
    for objective in ("bag", "tube_printed"):
        given = ["debug", "--n_pred=0", f"--objective={objective}"]
        assert f"objective={objective}: what" in error_line(capsys, bench.main, given)
    assert bench_tables.shown(None) == ""
