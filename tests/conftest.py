"""What several tests need: a seed, signal handlers put back, data that loads in milliseconds."""

import contextlib
import os
import signal

import pytest
import torch
import torch.nn.functional as F

import data
import model
import train
from plumbing.files import HELD
from plumbing.output import stops
from plumbing.processes import Processes

# Tests make claims about a CPU: neither they nor what they start shall see an NVIDIA GPU.
# lab/gpu_report.py checks one. Windows takes an empty value for none.
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

# Tiny matrices: a second thread costs more than it brings, and bit-equality needs a fixed number.
torch.set_num_threads(1)

# nohup has SIGHUP ignored, in all that it starts; tests send it.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY = [
    "--device=cpu", "--dtype=float32", "--out_dir=out/tiny", "--dataset=word_problems",
    "--tokenizer=bpe", "--bpe_vocab_size=320", "--n_layer=2", "--n_head=2", "--n_embd=32",
    "--block_size=64", "--batch_size=8", "--max_iters=6", "--warmup_iters=2", "--eval_interval=3",
    "--eval_pairs=16", "--log_interval=1",
]  # fmt: skip


def release():
    """Give all folders back, as the end of the process would."""
    for lock in HELD.values():
        if lock is not None:
            os.close(lock)
    HELD.clear()


@pytest.fixture(autouse=True)
def own_seed_and_signal_handlers():
    """No test inherits another's random state, nor the handlers that train.main installs."""
    torch.manual_seed(0)
    before = {number: signal.getsignal(number) for number in stops()}
    yield
    release()  # the folders of its runs
    for number, handler in before.items():
        signal.signal(number, handler)


def training(model, pairs, optimizer=None):
    """A Training of one process, in float32."""
    optimizer = optimizer or train.make_optimizer(model, pairs.config)
    return train.Training(pairs, model, model, None, optimizer, contextlib.nullcontext, Processes())


class Gradients:
    """In an optimizer's place: notes the gradients that it would have used."""

    def __init__(self, model):
        self.model, self.seen = model, {}

    def step(self):
        self.seen = {name: p.grad.clone() for name, p in self.model.named_parameters()
                     if p.grad is not None}  # fmt: skip

    def zero_grad(self, set_to_none):
        self.model.zero_grad(set_to_none)


def patch_in_kernels_of_a_gpu(patch):
    """What model.py calls on CUDA, here too: dynamo compiles that once, the CPU's forms anew."""
    patch.setattr(model, "summed_cross_entropy",
                  lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum"))
    patch.setattr(model, "attend", F.scaled_dot_product_attention)
    patch.setattr(model, "mask_for", lambda x, mask: mask)


def error_line(capsys, function, *args, **kwargs):
    """The one line that the call writes to stderr before it exits with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        function(*args, **kwargs)
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def sums(n, start=0):
    """n rows in GSM8K's form, a few tokens each, with answers of unequal length."""
    rows = []
    for i in range(start, start + n):
        a, b = 3 + i * 7 % 40, 2 + i * i % 31
        extra = f"Check: {a}={a + b}-{b}\n" * (i % 3)
        rows.append({"question": f"What is {a} plus {b}?",
                     "answer": f"{a}+{b}={a + b}\n{extra}#### {a + b}"})  # fmt: skip
    return rows


@pytest.fixture
def tiny_run(tmp_path, monkeypatch, capsys):
    """A function that trains a tiny model: train.main in a folder of its own, on 100 sums.

    Keyword arguments are options on top of TINY. Returns what the run printed."""
    monkeypatch.chdir(tmp_path)
    rows = {"train": sums(100), "val": sums(20, 500)}
    monkeypatch.setattr(data, "load_rows", lambda config: (dict(rows), "sums", "test"))
    monkeypatch.setattr(train, "plot_losses", lambda folder: None)  # half a second each

    def run(**options):
        capsys.readouterr()
        train.main(TINY + [f"--{key}={value}" for key, value in options.items()])
        return capsys.readouterr().out

    return run
