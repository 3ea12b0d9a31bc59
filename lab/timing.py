"""What the parts of bench.py time with: taking turns, medians with their quartiles, the machine.

    take_turns(what, arms, ...)  seconds and tokens of things to compare, round by round
    dtypes(device)               in which a peer's step is timed: none that the device only emulates
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import Config
from data import Data
from lab.peers import transformers
from model import Trunk
from plumbing.output import Bar
from plumbing.processes import Processes, clock, has_bf16
from run import make_model
from train import Training, make_optimizer
from views import Pairs

ROUNDS = 10  # of each comparison, after one that is not counted
SLOW_ROUNDS = 5  # where a round takes a minute
QUICK_ROUNDS = 3  # of --quick


class Setup(NamedTuple):
    """What every part measures with."""

    config: Config
    data: Data
    device: torch.device
    autocast: Callable
    argv: list[str]  # what load_config made the config of


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures depend on, beside the code."""
    processor = platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor, "device": str(device), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "has_bf16": has_bf16(device),
        "transformers": transformers.__version__ if transformers else "none",
    }  # fmt: skip


def dtype_of(autocast, device: torch.device) -> torch.dtype:
    """What our matrix products run in."""
    with autocast():
        on = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if on else torch.float32


def dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """In which the peers are timed, by name. A dtype that the device only emulates takes many
    times as long and tells nothing."""
    both = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return both if has_bf16(device) else {"fp32": both["fp32"]}


# --- taking turns -----------------------------------------------------------------------------

Arms = dict[str, Callable[[int], int]]  # name: a function of the round's step -> tokens it did


def take_turns(
    what: str, arms: Arms, steps: list[int], device: torch.device
) -> dict[str, np.ndarray]:
    """(rounds, 2) for each arm: seconds and tokens. The first of the steps only warms up."""
    seen = {name: [] for name in arms}
    for number in rounds_of(what, len(steps)):
        for name, work in arms.items():
            begin = now(device)
            tokens = work(steps[number])
            seen[name].append((now(device) - begin, tokens))
    return {name: np.array(rounds[1:]) for name, rounds in seen.items()}


def rounds_of(what: str, n: int) -> Iterator[int]:
    """0 to n - 1, with a line after each that says how long the rest will take."""
    begin, bar = time.perf_counter(), Bar(what, "round", n)
    for number in range(n):
        yield number
        took = time.perf_counter() - begin
        left = took / (number + 1) * (n - number - 1)
        if not bar.move():
            print(f"  {what}: round {number + 1} of {n} after {clock(took)}, {clock(left)} to go",
                  flush=True)  # fmt: skip


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def quartiles_of(values) -> dict[str, float | list[float]]:
    """Median and quartiles."""
    low, median, high = np.percentile([float(value) for value in values], (25, 50, 75)).tolist()
    return {"median": median, "quartiles": [low, high]}


def rate(rounds: np.ndarray) -> np.ndarray:
    """Tokens per second of each round."""
    return rounds[:, 1] / rounds[:, 0]


# --- what is timed ----------------------------------------------------------------------------


def untrained(setup: Setup, config: Config) -> Trunk:
    """A model of the config as training starts from it."""
    torch.manual_seed(config.seed)
    return make_model(config, setup.data.tokenizer.vocab_size).to(setup.device)


def start_training(setup: Setup, config: Config, model: Trunk | None = None) -> Training:
    """A model, untrained if none is given, ready for steps on the training pairs."""
    model = model or untrained(setup, config)
    pairs = replace(setup.data.pairs["train"], config=config, vocab_size=model.vocab_size)
    optimizer = make_optimizer(model, config)
    return Training(pairs, model, model, None, optimizer, setup.autocast, Processes())


def with_config(t: Training, config: Config) -> Training:
    """The same model and optimizer, but steps by another config."""
    return with_pairs(t, replace(t.pairs, config=config))


def with_pairs(t: Training, pairs: Pairs) -> Training:
    """The same model and optimizer, but steps on other pairs."""
    return t._replace(pairs=pairs)
