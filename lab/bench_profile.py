"""Where a step's time goes: the part `profile` of bench.py."""

from dataclasses import replace

import numpy as np
import torch

from jepa import OBJECTIVES
from lab import bench_tables, timing
from lab.timing import Setup, dtype_of, now, quartiles_of, rounds_of, start_training, with_config
from model import PAD
from train import Training, plan, train_step

PHASES = ("data", "trunk, forward", "output layer and loss, forward",
          "output layer and loss, backward", "trunk, backward",
          "clipping and optimizer")  # fmt: skip


def profile(setup: Setup) -> dict:
    """Seconds of the phases of train_step, by hooks on the model and on gradients."""
    config, device = setup.config, setup.device
    # One batch packed into one row per example, or hooks would see two passes.
    once = replace(config, gradient_accumulation_steps=1, stop_grad=False, ema=0.0)
    t = start_training(setup, config)
    arms = {
        "CE only": with_config(t, replace(once, jepa_weight=0.0)),
        "JEPA": with_config(t, replace(once, jepa_weight=config.jepa_weight or 1.0,
                                       jepa_dropout=0.0)),
    }  # fmt: skip
    stamps = stamped_phases(arms["CE only"])
    dtype = dtype_of(setup.autocast, device)
    matrices = [torch.randn(2, n, n, device=device).to(dtype) for n in (1024, 2048)]
    seconds, flops = {name: [] for name in arms}, {name: [] for name in arms}
    ceiling = []
    for number in rounds_of("profile", timing.ROUNDS + 1):
        for name, arm in arms.items():
            stamps[:] = [now(device)]
            train_step(arm, number)
            stamps.append(now(device))
            assert len(stamps) == len(PHASES) + 1
            seconds[name].append(np.diff(stamps))
            flops[name].append(trunk_flops(arm, number))
        ceiling.append(fastest_product(matrices, device))

    ceiling = np.array(ceiling[1:])  # the first round only warms up
    results = {"rounds": timing.ROUNDS, "ceiling_flops_per_second": quartiles_of(ceiling),
               "ceiling_dtype": str(dtype), "arms": {}}  # fmt: skip
    for name, arm in arms.items():
        spent = np.array(seconds[name][1:])  # (rounds, phases)
        speed = np.array(flops[name][1:]) / spent[:, [1, 4]].sum(1)
        results["arms"][name] = {
            "seconds": {p: quartiles_of(s) for p, s in zip(PHASES, spent.T)},
            "share": {p: quartiles_of(s) for p, s in zip(PHASES, spent.T / spent.sum(1))},
            "padding": padding(arm), "trunk_flops_per_second": quartiles_of(speed),
            "trunk_over_ceiling": quartiles_of(speed / ceiling),
        }  # fmt: skip
    bench_tables.print_profile(results)
    return results


def stamped_phases(t: Training) -> list[float]:
    """A list to which each step of the model adds the times at which it goes from one of PHASES to
    the next; the caller adds the step's begin and end."""
    model, stamps = t.model, []
    last, logits = last_gradient(t), model.logits

    def stamp(*_):
        stamps.append(now(model.device))

    def stamped_logits(hidden):
        stamp()
        hidden.register_hook(stamp)  # called once its gradient, and the layer's weights', is done
        return logits(hidden)

    model.register_forward_pre_hook(stamp)
    model.logits = stamped_logits
    model.register_forward_hook(stamp)
    last.register_post_accumulate_grad_hook(stamp)
    return stamps


def last_gradient(t: Training) -> torch.nn.Parameter:
    """The parameter whose gradient comes last: with it, backward is over. Takes a step to see."""
    order = []
    hooks = [p.register_post_accumulate_grad_hook(order.append) for p in t.model.parameters()]
    train_step(t, 0)
    for hook in hooks:
        hook.remove()
    return order[-1]


def trunk_flops(t: Training, step: int) -> int:
    """Operations of a step but for its output layer, forward and backward."""
    config, batch = t.pairs.config, plan(t, step, 0).batch
    read = OBJECTIVES[config.objective].reads(batch, config) | (batch.targets != -1)
    return 3 * t.model.flops(batch._replace(targets=None), read)


def fastest_product(matrices: list[torch.Tensor], device: torch.device) -> float:
    """Operations a second of the fastest of a few products of two matrices, (2, n, n) each."""
    best = 0.0
    for a, b in matrices:
        for _ in range(3):
            begin = now(device)
            a @ b
            best = max(best, 2 * len(a) ** 3 / (now(device) - begin))
    return best


def padding(t: Training) -> float:
    """Share of an epoch's positions that hold no token."""
    steps = range(len(t.pairs) // t.pairs.config.batch_size)
    blocks = [plan(t, step, 0).batch.block for step in steps]
    return sum((b == PAD).sum().item() for b in blocks) / sum(b.numel() for b in blocks)
