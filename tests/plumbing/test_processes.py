"""Several processes with torchrun compute what one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, sums

import train


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rows = [json.dumps(row) + "\n" for row in sums(120)]
    (tmp_path / "sums.jsonl").write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *paths: None)
    return tmp_path


def arguments(name, options):
    options = {"dataset": "sums.jsonl", "lr_decay_iters": 6, "out_dir": f"out/{name}", **options}
    given = [arg for arg in TINY if arg.split("=")[0][2:] not in options]
    return [*given, *(f"--{key}={value}" for key, value in options.items())]


def start(name, **options):
    """train.py in two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__]
    return subprocess.Popen(
        [sys.executable, *launch, *arguments(name, options)], text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    return out


def assert_same_losses(one, two, exact=("step", "tokens", "flops")):
    one, two = (
        [json.loads(line) for line in Path(f"out/{name}/metrics.jsonl").read_text().splitlines()]
        for name in (one, two)
    )
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and all(a[key] == b[key] for key in exact)
        for key in a.keys() & {"ce", "jepa", "spread", "loss", "grad_norm", "val_ce"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), key


def test_two_processes_are_one_and_one_goes_on_where_two_stopped(folder):
    """Terms over the gathered batch, examples dropped unevenly, gradients accumulated."""
    options = dict(jepa_loss="infonce", jepa_weight=0.5, spread="cross", spread_weight=0.5,
                   jepa_dropout=0.4, jepa_dropout_per="example",
                   gradient_accumulation_steps=2)  # fmt: skip
    two = start("two", max_iters=3, **options)
    train.main(arguments("one", options))
    assert finish(two).count("done in") == 1  # one writer
    train.main(arguments("two", {**options, "init_from": "resume"}))
    assert_same_losses("one", "two")
    one, two = (torch.load(f"out/{name}/ckpt.pt") for name in ("one", "two"))
    assert one.keys() == two.keys() and one["model"].keys() == two["model"].keys()
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-3, atol=1e-4)


def test_targets_without_gradient_are_shared_out_too(folder):
    options = dict(stop_grad=True, jepa_dropout=0.4, jepa_dropout_per="example", spread="sigreg",
                   spread_weight=0.1)  # fmt: skip
    two = start("two", **options)
    train.main(arguments("one", options))
    finish(two)
    assert_same_losses("one", "two", exact=("step",))  # an odd example is encoded twice


def test_a_batch_that_cannot_be_shared_is_refused(folder):
    process = start("odd", batch_size=7)
    err = process.communicate(timeout=90)[1]
    assert process.returncode != 0
    assert "batch_size=7 cannot be shared evenly by 2 processes" in err


def test_sigterm_to_all_saves_once_and_ends(folder):
    process = start("stopped", max_iters=100_000, eval_interval=100_000)
    path = folder / "out/stopped/metrics.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (path.exists() and path.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert torch.load(folder / "out/stopped/ckpt.pt")["step"] > 0
