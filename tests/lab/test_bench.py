"""Claims about bench.py: what it compares with is what it says, and every part runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY, error_line, sums

import bench
import data
import peers
from config import Config
from model import GPT

V = 64
SIZES = Config(n_layer=2, n_head=2, n_embd=32, block_size=32, n_pred=0)


def test_plain_gpt_is_our_gpt_with_a_label_everywhere():
    """So what bench.py measures against computes the same loss, by other means."""
    plain, gpt = peers.PlainGPT(SIZES, V, (None,)), GPT(SIZES, V, (None, None))
    gpt.load_state_dict(plain.state_dict())
    idx, targets = torch.randint(V, (2, 3, 32))
    loss = plain(idx, targets)
    ours = gpt(idx, torch.ones_like(idx), targets)[1] / targets.numel()
    torch.testing.assert_close(loss, ours)
    grads = torch.autograd.grad(loss, list(plain.parameters()))
    for got, want in zip(grads, torch.autograd.grad(ours, list(gpt.parameters()))):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_transformers_gets_our_weights_and_gives_our_answers():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    gpt = GPT(SIZES, V, (None, None)).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            if p.dim() == 2:
                p.mul_(8)  # strong opinions, so that rounding decides nothing
        gpt.wte.weight[V - 1] = 0  # practically never said: no row stops early
    prompts = [[5, 9, 2, 40, 13], [21], [8, 30, 12]]
    theirs = peers.as_transformers(gpt, SIZES)
    idx = torch.arange(20)[None]
    logits = gpt.lm_head(gpt.hidden(idx, torch.ones_like(idx)))
    torch.testing.assert_close(theirs(idx).logits, logits, rtol=1e-3, atol=1e-3)
    rows = peers.generate_theirs(theirs, prompts, 12, V - 1)
    assert rows.tolist() == gpt.generate(prompts, 12, V - 1, temperature=0)


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


def test_an_unknown_part_is_refused(small, capsys):
    line = error_line(capsys, small, "--parts=training,speed")
    assert "speed" in line and "profile" in line
