"""Several processes compute what one does; devices, signals and the way out."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, error_line, sums

import train
from plumbing.processes import (
    ROOT,
    Processes,
    StopSignal,
    clock,
    compile_or_not,
    has_bf16,
    join_processes,
    pick_device,
    run_main,
)

CPU = torch.device("cpu")


SETTINGS = {"stop_grad=False": [], "stop_grad=True": ["--stop_grad=True"],
            "example": ["--jepa_dropout=0.5", "--jepa_dropout_per=example"],
            "tube": ["--objective=tube", "--n_pred=0", "--jepa_loss=infonce"],
            "bag": ["--objective=bag", "--jepa_loss=infonce"]}  # fmt: skip
# Terms over the gathered batch, examples dropped unevenly, gradients accumulated.
GATHERED = dict(jepa_loss="infonce", jepa_weight=0.5, spread="cross", spread_weight=0.5,
                jepa_dropout=0.4, jepa_dropout_per="example",
                gradient_accumulation_steps=2)  # fmt: skip
APART = dict(stop_grad=True, jepa_dropout=0.4, jepa_dropout_per="example", spread="sigreg",
             spread_weight=0.1)  # fmt: skip

# Gradients of a step by [process alone, two processes, two without the wrapper] for each of the
# settings; then whole runs.
SCRIPT = """
import contextlib, json, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from config import load_config
from data import load_data
from plumbing.processes import Processes, join_processes
from run import make_model
import train

def step(options, processes, wrapped):
    config = load_config(options)
    data = load_data(config)
    torch.manual_seed(0)
    model = make_model(config, data.tokenizer.vocab_size)
    forward = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda set_to_none: None  # they are looked at below
    t = train.Training(data.pairs["train"], model, forward, None, optimizer,
                       contextlib.nullcontext, processes)
    total = train.train_step(t, 0)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return [total[key] for key in ("ce", "jepa", "spread")], gradients

settings, runs = json.loads(sys.argv[1])
train.plot_losses = lambda folder: None
processes = join_processes("cpu")
steps = {name: [step(options, Processes(), False), step(options, processes, True),
                step(options, processes, False)] for name, options in settings.items()}
if processes.rank == 0:
    torch.save(steps, "steps.pt")

class Staying(Processes):
    def leave(self):
        pass

for options, of in zip(runs, [Staying] * (len(runs) - 1) + [Processes]):
    train.join_processes = lambda device, of=of: of(*processes)  # a process can join only once
    train.main(options)
"""


def write_sums(folder):
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(120)))


def arguments(name, options):
    options = {"dataset": "sums.jsonl", "lr_decay_iters": 6, "out_dir": f"out/{name}", **options}
    given = [arg for arg in TINY if arg.split("=")[0][2:] not in options]
    return [*given, *(f"--{key}={value}" for key, value in options.items())]


def start(folder, script, *arguments):
    """A script in two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    return subprocess.Popen(
        [sys.executable, *launch, *arguments], text=True, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    """What it printed, and its errors; it does not outlive the test."""
    try:
        return process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends the others
        process.communicate()
        raise


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What two processes left: steps.pt, the runs "gathered", stopped half-way, and "apart", and
    what they printed. One start for all of it, which takes longer than the work."""
    folder = tmp_path_factory.mktemp("by_two")
    write_sums(folder)
    (folder / "script.py").write_text(SCRIPT)
    plain = [*arguments("x", {}), "--grad_clip=0"]
    work = [{name: [*plain, *options] for name, options in SETTINGS.items()},
            [arguments("gathered", {**GATHERED, "max_iters": 3}), arguments("apart", APART)]]
    process = start(folder, "script.py", json.dumps(work))
    out, err = finish(process)
    assert process.returncode == 0, err
    return folder, out


@pytest.fixture
def folder(by_two, tmp_path, monkeypatch):
    """A copy of it, in the working directory."""
    monkeypatch.chdir(shutil.copytree(by_two[0], tmp_path / "copy"))
    monkeypatch.setattr(train, "plot_losses", lambda folder: None)


def assert_same_losses(one, two):
    one, two = (
        [json.loads(line) for line in Path(f"out/{name}/metrics.jsonl").read_text().splitlines()]
        for name in (one, two)
    )
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for key in a.keys() & {"ce", "jepa", "spread", "loss", "grad_norm", "val_ce"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), key
    return one, two


def test_two_processes_are_one_and_one_goes_on_where_two_stopped(folder):
    train.main(arguments("one", GATHERED))
    train.main(arguments("gathered", {**GATHERED, "init_from": "resume"}))
    for a, b in zip(*assert_same_losses("one", "gathered")):
        assert (a["tokens"], a["flops"]) == (b["tokens"], b["flops"])
    one, two = (torch.load(f"out/{name}/ckpt.pt") for name in ("one", "gathered"))
    assert one.keys() == two.keys() and one["model"].keys() == two["model"].keys()
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-3, atol=1e-4)


def test_targets_without_gradient_are_shared_out_too(folder):
    """Not tokens and operations: an odd example is encoded twice."""
    train.main(arguments("one", APART))
    assert_same_losses("one", "apart")


def test_the_first_process_alone_prints_and_writes(by_two):
    folder, out = by_two
    assert out.count("done in") == 2  # of two runs
    assert not list(folder.glob("**/*.tmp")) and not list(folder.glob("out/earlier"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_of_two_processes_has_the_gradients_of_one(by_two, setting):
    """And it would not if training called the model around its wrapper."""
    alone, two, around = torch.load(by_two[0] / "steps.pt")[setting]
    assert two[0] == pytest.approx(alone[0], rel=1e-5) and alone[0][1] > 0 and alone[0][2] > 0
    torch.testing.assert_close(two[1], alone[1], rtol=1e-3, atol=1e-6)
    assert around[0] == pytest.approx(alone[0], rel=1e-5)  # the losses show nothing of it
    assert (around[1] - alone[1]).norm() > 0.1 * alone[1].norm()


def test_sigterm_to_all_saves_once_and_ends(tmp_path):
    write_sums(tmp_path)
    options = arguments("stopped", dict(max_iters=100_000, eval_interval=100_000))
    process = start(tmp_path, train.__file__, *options)
    path = tmp_path / "out/stopped/metrics.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (path.exists() and path.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    out, _ = finish(process)
    assert process.returncode != 0
    assert torch.load(tmp_path / "out/stopped/ckpt.pt")["step"] > 0
    assert out.count("SIGTERM: saved out/stopped/ckpt.pt at step ") == 1


# --- joining ----------------------------------------------------------------------------------


@pytest.fixture
def of_two(monkeypatch):
    """This process as one of two, with what it would join the other one with noted."""
    seen = {}
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, timeout: seen.update(backend=backend, timeout=timeout))
    return seen


def test_a_batch_that_cannot_be_shared_is_refused(of_two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, train.main, arguments("odd", {"batch_size": 7}))
    assert "batch_size=7 cannot be shared evenly by 2 processes" in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_one_gpu_for_all_processes_is_refused(device, of_two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, train.main, arguments("x", {"device": device}))
    assert f"device={device} would put all 2 processes on one GPU" in line
    assert "--device=cuda gives each its own" in line
    assert not of_two and not any(tmp_path.iterdir())


def test_more_processes_than_gpus_are_refused(of_two, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    line = error_line(capsys, join_processes, "auto")
    assert "no GPU of its own" in line and "--nproc_per_node=1" in line and not of_two


def test_a_long_evaluation_by_the_first_process_outlasts_no_timeout(of_two):
    assert join_processes("cpu") == Processes(0, 2)
    assert of_two["backend"] == "gloo" and of_two["timeout"].days >= 1


def test_all_but_the_first_process_print_no_more(of_two, monkeypatch, capsys):
    before = sys.stdout
    monkeypatch.setattr(sys, "stdout", before)  # to be put back
    join_processes("cpu")
    assert sys.stdout is before
    monkeypatch.setenv("RANK", "1")
    assert join_processes("cpu") == Processes(1, 2)
    print("nobody reads this")
    sys.stdout.close()
    assert capsys.readouterr().out == ""


def test_processes_share_rows_out_and_each_row_goes_to_one():
    rows = torch.arange(12).view(6, 2)
    shares = [Processes(rank, 3).mine(rows) for rank in range(3)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), rows)  # as `gather` puts them together


def test_a_single_process_shares_nothing_out():
    alone, rows = Processes(), torch.arange(6)
    assert torch.equal(alone.mine(rows), rows) and alone.gather(rows) is rows
    assert alone.sum(3.5, CPU) == 3.5 and alone.agree(15, CPU) == 15
    alone.leave()


# --- devices, signals, the way out ------------------------------------------------------------


@pytest.mark.parametrize("device", [
    "nonsense", "", "cuda:99", "cpu:x",
    "hpu",
    "meta",
    "vulkan",
])  # fmt: skip
def test_an_impossible_device_is_one_short_line(device, capsys):
    line = error_line(capsys, pick_device, device, "auto")
    assert f"device={device} cannot be used here" in line
    assert len(line) < 400  # torch lists its sixty backends where one is missing


def test_an_unknown_dtype_is_one_line(capsys):
    assert "dtype=fp32 is not one of" in error_line(capsys, pick_device, "cpu", "fp32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_computes_in_the_dtype_asked_for(dtype, capsys):
    device, autocast = pick_device("cpu", dtype)
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, dtype)
    assert device == CPU and f"device cpu {dtype}" in capsys.readouterr().out


@pytest.mark.parametrize("features, fast", [
    ({}, False), ({"avx512_bf16": False, "amx_bf16": False}, False), ({"avx512_bf16": True}, True),
    ({"amx_bf16": True}, True),
])  # fmt: skip
def test_auto_takes_bf16_where_there_are_instructions_for_it(features, fast, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    pick_device("cpu", "auto")
    assert has_bf16(CPU) is fast
    assert f"device cpu {'bfloat16' if fast else 'float32'}" in capsys.readouterr().out


def test_a_signal_is_noted_and_nothing_else_is_done(capsys):
    stop = StopSignal()
    assert stop.number == 0
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM and capsys.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends at once


def test_ctrl_c_ends_in_a_line(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device"), "No space left on device"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "a smaller batch_size needs less"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "ran out of memory"),
    (MemoryError("Unable to allocate 9 TiB"), "ran out of memory"),
])  # fmt: skip
def test_what_is_not_the_script_s_fault_ends_in_a_line(error, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed=1"])

    def main(argv):
        assert argv == ["--seed=1"]
        raise error

    assert said in error_line(capsys, run_main, main)


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError("shapes"), NotImplementedError])
def test_a_mistake_in_the_code_keeps_its_traceback(error):
    def main(argv):
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        run_main(main)


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (59.4, "0:59"), (59.7, "1:00"), (119.6, "2:00"), (3600, "60:00"),
])  # fmt: skip
def test_a_clock_has_no_sixtieth_second(seconds, text):
    assert clock(seconds) == text


# --- compiling, as on CUDA (that gradients stay the same: tests/test_train.py) -----------------


def test_model_that_cannot_be_compiled_runs_eagerly(capsys):
    class Layer(torch.nn.Linear):
        def compile(self, **options):
            super().compile(backend=lambda graph, inputs: graph)
            raise RuntimeError("no compiler\nand a long story")

    model, x = Layer(3, 2), torch.randn(4, 3)
    want = model(x)
    compile_or_not(model, contextlib.nullcontext, lambda: model(x).sum().backward())
    said = capsys.readouterr().out
    assert said == "not compiled, running eagerly: RuntimeError: no compiler\n"
    assert torch.equal(model(x), want) and model._compiled_call_impl is None


def test_a_model_whose_first_run_fails_runs_eagerly_without_what_it_left(capsys):
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    model.compile = lambda **options: None

    def try_once():
        model(x).sum().backward()
        raise RuntimeError("unsupported GPU")

    compile_or_not(model, contextlib.nullcontext, try_once)
    assert "not compiled, running eagerly: RuntimeError: unsupported GPU" in capsys.readouterr().out
    assert all(p.grad is None for p in model.parameters())
