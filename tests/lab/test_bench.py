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
from lab import bench, peers
from model import Batch
from plumbing.processes import pick_device
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
    for name, value in (
        ("ROUNDS", 4), ("SLOW_ROUNDS", 1), ("NEW_TOKENS", 16), ("ROWS", (300,)), ("TOKENS", 128),
        ("LENGTHS", (8, 16, 32)), ("BATCHES", (2,)),
    ):
        monkeypatch.setattr(bench, name, value)

    def run(*argv):
        bench.main([*TINY, *argv])
        return json.loads((tmp_path / "out/bench.json").read_text())

    return run


def start(*argv):
    """What every part measures with, on the sums of `small`, and a model about to train."""
    config = bench.load_config([*TINY, *argv])
    device, autocast = pick_device(config.device, config.dtype)
    setup = bench.Setup(config, data.load_data(config), device, autocast, [])
    return setup, bench.start_training(setup, config)


def test_the_phases_are_all_of_a_step_and_change_nothing_of_it(small):
    """They come in the order of PHASES, and the step with them is the step that trains."""
    _, plain = start()
    _, watched = start()
    stamps = bench.stamped_phases(watched)
    train_step(plain, 0)  # as the one by which the last gradient is found
    for step in range(2):
        stamps.clear()
        assert train_step(plain, step) == train_step(watched, step)
        assert len(stamps) == len(bench.PHASES) - 1 and stamps == sorted(stamps)


def test_the_last_gradient_ends_backward(small):
    _, t = start()
    last, without = bench.last_gradient(t), []
    last.register_post_accumulate_grad_hook(
        lambda _: without.append(sum(p.grad is None for p in t.model.parameters())))  # fmt: skip
    train_step(t, 1)
    assert without == [0]


def test_the_trunk_and_the_output_layer_are_all_of_the_operations(small):
    _, t = start()
    batch = bench.plan(t, 0, 0).batch
    output_layer = 6 * t.model.width * t.model.vocab_size * (batch.targets != -1).sum().item()
    assert bench.trunk_flops(t, 0) + output_layer == train_step(t, 0)["flops"]


def test_ours_are_the_steps_that_are_named(small):
    """Tokens tell which blocks a step has computed, an average of weights would be another step."""
    _, t = start("--ema=0.9", "--stop_grad=true")
    variants = bench.variants_of(t.pairs.config)
    assert not any(variant.ema for variant in variants.values())
    carries, spared = bench.steps_by_turns(
        bench.with_config(t, variants["JEPA, stop_grad, dropout .5"]).pairs)[:2]  # fmt: skip
    tokens = {name: [train_step(bench.with_config(t, variant), step)["tokens"]
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
    assert {"CE only", "JEPA", "JEPA, stop_grad", "nanoGPT, fp32", "nanoGPT, bf16"} <= set(arms)
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
    assert loading["300 pairs"]["pairs"] == 270  # a tenth is for validation
    assert {"cold", "warm"} < set(loading["sums"])
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
