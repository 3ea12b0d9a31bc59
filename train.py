"""Train a GPT on cross-entropy and a JEPA loss between two views of each pair.

    python train.py config/gsm8k_jepa.py [--key=value ...]      (--help lists the keys)

    train_step  a step of training, the loss in the middle of it: start here
    train       the loop around it: evaluate, save, report, stop
    main        what comes before the loop: config, data, model, an earlier run to go on from
"""

import copy
import math
import shlex
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from alignment import alignment, embed_pairs, panel_line, target_groups, verdict
from config import Config, fail, load_config
from data import load_data
from generate import Asking, answer_shares, longest_answer
from jepa import OBJECTIVES, distance, spread
from model import PAD, Batch, Trunk
from plumbing.files import claim_run
from plumbing.output import Bar
from plumbing.plots import plot_losses
from plumbing.processes import (
    Processes,
    StopSignal,
    compile_or_not,
    join_processes,
    pick_device,
    run_main,
)
from plumbing.track import refuse_tracker
from run import Folder, Progress, make_model, provenance_of, read_to_resume, restore, start_folder
from views import Pairs, layout_of


class Training(NamedTuple):
    """What a step works with."""

    pairs: Pairs  # train, with the config
    model: Trunk  # whose weights are updated
    forward: Callable  # the model, wrapped where gradients are averaged over processes
    ema: Trunk | None  # an average of the weights, which encodes the targets
    optimizer: torch.optim.Optimizer
    autocast: Callable  # opens the context in which a forward pass runs in the config's dtype
    processes: Processes  # this one among those that share each batch


# --- one step ---------------------------------------------------------------------------------


def train_step(t: Training, step: int) -> dict[str, float]:
    """Micro-batches, losses, gradients, update. Returns the terms of the loss, the gradient's norm,
    and the tokens and floating-point operations that it took."""
    config, device, world = t.pairs.config, t.model.device, t.processes.world
    objective = OBJECTIVES[config.objective]
    # At first JEPA's gradient is the larger one, and clipping their sum would shrink CE's part.
    grown = min(1.0, step / config.jepa_warmup_iters) if config.jepa_warmup_iters else 1.0

    def weighted(ce, jepa, regularizer):
        return config.ce_weight * ce + grown * (
            config.jepa_weight * jepa + config.spread_weight * regularizer
        )

    micro_batches = [plan(t, step, micro) for micro in range(config.gradient_accumulation_steps)]
    # Means are over all labels and all JEPA examples of the step, not of a micro-batch: several
    # micro-batches then give the gradient of one large batch, but where the examples of a batch are
    # compared with each other (infonce, a spread term): those are compared in each alone.
    n_labels = sum((micro.batch.targets != -1).sum().item() for micro in micro_batches)
    n_jepa = sum(micro.has_jepa.sum() for micro in micro_batches)
    total = dict(ce=0.0, jepa=0.0, spread=0.0)
    for micro in micro_batches:
        batch = Batch(*map(t.processes.mine, micro.batch)).to(device)  # (B, T) each
        with t.autocast():
            hidden, ce_sum = t.forward(batch, objective.reads(batch, config))
        ce = ce_sum / n_labels  # nats per label
        jepa = regularizer = torch.zeros((), device=device)
        if micro.has_jepa.any():
            pred, target = pred_and_target(t, micro, hidden, batch)  # (n, C) each
            share = float(micro.has_jepa.sum() / n_jepa)  # of the step's JEPA examples
            jepa = share * distance(pred, target, config.jepa_loss, micro.groups)
            if config.spread != "none" and len(pred) > 1:  # one example has nothing to be apart of
                regularizer = share * spread(pred, target, config.spread, micro.groups)
        loss = weighted(ce, jepa, regularizer)  # γ CE + λ d + μ R
        (world * loss).backward()  # DistributedDataParallel takes the mean, we want the sum
        for name, value in zip(total, (ce, jepa, regularizer)):
            total[name] += value.item()

    total["ce"] = t.processes.sum(total["ce"], device)  # the other terms are the same in each
    total["loss"] = weighted(*total.values())
    limit = config.grad_clip or math.inf  # inf only measures the norm
    norm = torch.nn.utils.clip_grad_norm_(t.model.parameters(), limit).item()
    if not (math.isfinite(total["loss"]) and math.isfinite(norm)):
        fail(f"loss {total['loss']} with gradient norm {norm} at step {step}: stopped before the "
             f"update; {config.out_dir} keeps the last checkpoint, a lower learning_rate may help")
    t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    if t.ema:
        with torch.no_grad():
            for average, p in zip(t.ema.parameters(), t.model.parameters()):
                average.lerp_(p, 1 - config.ema)  # ema * average + (1 - ema) * p
    if not n_jepa:  # these were not computed, which is not 0
        del total["jepa"], total["spread"]
    return {**total, "grad_norm": norm, **cost(t.model, config, micro_batches)}


class MicroBatch(NamedTuple):
    """The examples of a micro-batch as rows; `alone` has their targets in rows of their own, where
    a target needs no gradient (its tokens carry no label then)."""

    has_jepa: np.ndarray  # (B,) bool, which examples carry the JEPA term
    groups: np.ndarray  # (n,) of the n that do: equal where they have the same target
    batch: Batch
    alone: Batch | None


def plan(t: Training, step: int, micro: int) -> MicroBatch:
    """Micro-batch `micro` of a step, of all processes together."""
    pairs, config, layout = t.pairs, t.pairs.config, t.pairs.layout
    objective = OBJECTIVES[config.objective]
    row, target = objective.row(layout), objective.target(layout)  # blocks, one block
    examples = pairs.batch(step * config.gradient_accumulation_steps + micro)
    has_jepa = pairs.with_jepa(examples, step, micro)
    groups = pairs.groups(examples[has_jepa])
    if separate_target(config):
        row = tuple(block for block in row if block != target or block in layout.plain)
    # jepa_dropout draws from (seed, step, micro): this is another stream.
    given = objective.given(pairs, examples, np.random.default_rng((config.seed, step, micro, 1)))
    batch, alone = pairs.pack(examples, row, has_jepa)._replace(given=given), None
    if separate_target(config) and (n := has_jepa.sum()):
        # All processes get as many: the first ones stand again at the end if they do not share out.
        n += -n % t.processes.world
        alone = pairs.pack(np.resize(examples[has_jepa], n), (target,))._replace(targets=None)
    return MicroBatch(has_jepa, groups, batch, alone)


def separate_target(config: Config) -> bool:
    """The target shares the row of its question and answer, unless it needs no gradient: then it
    runs in a pass of its own, forward only."""
    return config.stop_grad or config.ema > 0


def pred_and_target(t: Training, micro: MicroBatch, hidden: torch.Tensor, batch: Batch):
    """Pred and target of the n examples that carry the JEPA term, (n, C) each, out of the hidden
    states of this process's rows. Terms that compare examples see those of all processes: each
    computes the whole loss, and of its gradient what its own examples cause."""
    config, objective = t.pairs.config, OBJECTIVES[t.pairs.config.objective]
    has_jepa = torch.from_numpy(micro.has_jepa).to(hidden.device)  # (B,) of all processes
    pred, target = objective.views(hidden, batch, config)
    pred = t.processes.gather(pred)[has_jepa]
    if micro.alone is None:
        return pred, t.processes.gather(target)[has_jepa]
    alone = Batch(*(t.processes.mine(x).to(hidden.device) for x in micro.alone[:2]), None)
    # After the row's pass, since autocast keeps the weights that it has cast.
    with torch.no_grad(), t.autocast():
        hidden, _ = (t.ema or t.model)(alone, objective.reads(alone, config))
    _, target = objective.views(hidden, alone, config)
    return pred, t.processes.gather(target)[: len(pred)]  # without the ones that stand again


def cost(model: Trunk, config: Config, micro_batches: list[MicroBatch]) -> dict[str, int]:
    """Tokens, padding left out, and operations that a step takes in all processes."""
    tokens, flops = 0, 0
    for _, _, batch, alone in micro_batches:
        for rows, passes in ((batch, 3), (alone, 1)):  # backward is twice forward
            if rows is not None:
                tokens += (rows.block != PAD).sum().item()
                read = OBJECTIVES[config.objective].reads(rows, config)
                flops += passes * model.flops(rows, read)
    return {"tokens": tokens, "flops": flops}


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine down to min_lr at lr_decay_iters."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    last = max(config.lr_decay_iters or config.max_iters, config.warmup_iters + 1)
    progress = min(1, (step - config.warmup_iters) / (last - config.warmup_iters))  # 0 to 1
    half_cosine = (1 + math.cos(math.pi * progress)) / 2  # 1 to 0
    return config.min_lr + half_cosine * (config.learning_rate - config.min_lr)


def make_optimizer(model: Trunk, config: Config) -> torch.optim.AdamW:
    """AdamW over every parameter once; weight decay on matrices only, and none on [PRED] where
    that has a learning rate of its own."""
    parameters = [p for p in model.parameters() if p.requires_grad]  # a tied output layer once
    groups = []
    if config.pred_rate != 1 and model.pred is not None:
        parameters = [p for p in parameters if p is not model.pred.weight]
        groups = [{"params": [model.pred.weight], "weight_decay": 0.0, "rate": config.pred_rate}]
    groups += [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


# --- the loop ---------------------------------------------------------------------------------


def train(t: Training, folder: Folder, progress: Progress) -> dict[str, float]:
    """Steps until max_iters or a signal. Returns the measures of the last evaluation."""
    config, device, stop = t.pairs.config, t.model.device, StopSignal()
    measures, warned, recent = {}, False, deque(maxlen=20)  # recent: seconds and tokens of steps
    bar = Bar("training", "step", config.max_iters, progress.step)
    t.model.train()
    while True:
        stopping = t.processes.agree(stop.number, device)

        # once in a while: evaluate on the same held-out pairs, and save
        if folder.first and evaluates(progress.step, config):  # others wait for its next step
            measures = evaluate(t, folder, progress)
            if config.jepa_weight and verdict(measures) == "collapsed" and not warned:
                warned = True
                print("warning: COLLAPSE. Wrong pairs score almost the cosine of right ones:\n"
                      "  the JEPA loss is low because all embeddings point one way. A spread term "
                      "prevents it:\n  --jepa_weight=0.3 --spread=cross --spread_weight=0.6")
            folder.save("ckpt.pt", t, progress, resumable=True)
            plot_losses(folder.path)
        elif folder.first and stopping:
            folder.save("ckpt.pt", t, progress, resumable=True)
        if stopping:
            print(f"{signal.Signals(stopping).name}: saved {folder.path}/ckpt.pt at step "
                  f"{progress.step}; to go on: {folder.how_to_resume()}")
            t.processes.leave()
            raise SystemExit(128 + stopping)
        enough = progress.is_enough(config) and evaluates(progress.step, config)
        # The first process alone has measured; without patience, there is nothing to agree on.
        if progress.step >= config.max_iters or (
            config.patience and t.processes.agree(int(enough and folder.first), device)
        ):
            return measures  # of the evaluation just above

        # one step
        begin, step = time.time(), progress.step
        lr = learning_rate(step, config)
        for group in t.optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)
        total = train_step(t, step)
        took = time.time() - begin

        # report
        recent.append((took, total["tokens"]))
        progress.tokens, progress.flops = (getattr(progress, name) + total.pop(name)
                                           for name in ("tokens", "flops"))  # fmt: skip
        progress.seconds += took
        folder.log(step=step, **total, lr=lr, tokens=progress.tokens, flops=progress.flops,
                   seconds=progress.seconds)
        shown = bar.move(said=f"loss {total['loss']:.4f}")
        if step % config.log_interval == 0 and not shown:
            print(progress.line(total, recent, measures, config), flush=True)
        progress.step += 1


def evaluates(step: int, config: Config) -> bool:
    """Is there an evaluation after `step` steps?"""
    return step >= config.max_iters or (step > 0 and step % config.eval_interval == 0)


def evaluate(t: Training, folder: Folder, progress: Progress) -> dict[str, float]:
    """Measure the held-out pairs, log and print it, keep the best weights; the measures."""
    config, data = t.pairs.config, folder.data
    val_ce, pred, target = embed_pairs(t.model, data.pairs["val"], config.eval_pairs, t.autocast)
    groups = target_groups(data.pairs["val"], config.eval_pairs)
    measures = alignment(pred, target, groups)
    if not math.isfinite(val_ce + measures["matched"]):  # before the last checkpoint is replaced
        fail(f"validation cross-entropy {val_ce} at step {progress.step}: training diverged; "
             f"{config.out_dir} keeps the last checkpoint, a lower learning_rate may help")
    val_jepa = distance(pred, target, config.jepa_loss, groups).item()
    limit = max(longest_answer(data.pairs[split]) for split in ("train", "val"))
    asking = Asking(t.model, data.tokenizer, t.autocast, limit, data.scoring)
    answers = answer_shares(asking, data.pairs["val"], config.eval_answers)
    sizes = {key: value for key, value in asdict(progress).items() if not key.startswith("best")}
    better = progress.measured(val_ce)
    if progress.is_enough(config):  # sweeps take the run for finished
        sizes["stopped_early"] = True
    folder.log(**sizes, val_ce=val_ce, val_jepa=val_jepa,
               **{f"val_{name}": value for name, value in {**answers, **measures}.items()},
               val_effective_rank=min(measures["effective_rank_pred"],
                                      measures["effective_rank_target"]))  # fmt: skip
    print(f"step {progress.step}: val ce {val_ce:.4f} | jepa {val_jepa:.4f} | "
          + panel_line(measures, len(pred))
          + "".join(f" | {key} {value:.3f}" for key, value in answers.items()), flush=True)
    if better:
        folder.save("best.pt", t, progress, resumable=False)
    if progress.is_enough(config):
        print(f"stopped early: no better val ce in {config.patience} evaluations since step "
              f"{progress.best_step}, {progress.best_ce:.4f}; --best asks best.pt, that step's")
    return {**measures, "step": progress.step}


# --- before the loop --------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    started = time.time()
    config, saved, tokenizer, notes = load_config(argv), None, None, []
    out_dir = Path(config.out_dir)
    if any(out_dir.glob("*/ckpt.pt")):
        fail(f"out_dir={out_dir} holds other runs; name a folder of its own, as in "
             f"--out_dir={shlex.quote(str(out_dir / config.recipe))}")
    if out_dir.exists():
        claim_run(out_dir)  # before its checkpoint is read
    if config.init_from != "scratch":
        config, saved, tokenizer, notes = read_to_resume(config, argv)
    if separate_target(config) and not OBJECTIVES[config.objective].target(layout_of(config)):
        fail(f"objective={config.objective} reads its target in the row itself: stop_grad and ema "
             "have nothing to encode apart")
    processes = join_processes(config.device)
    if not processes.rank:
        refuse_tracker(config.track)
    if config.batch_size % processes.world:
        fail(f"batch_size={config.batch_size} cannot be shared evenly by {processes.world} "
             "processes")
    print("\n".join(notes), end="\n" if notes else "")
    device, autocast = pick_device(config.device, config.dtype)
    data = load_data(config, tokenizer)

    torch.manual_seed(config.seed)
    about = saved and saved.get("trunk")
    model = make_model(config, data.tokenizer.vocab_size, about).to(device)
    ema = copy.deepcopy(model).requires_grad_(False) if config.ema else None
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"model {n_parameters / 1e6:.1f}M parameters, {config.max_iters} steps, run {out_dir}")
    t = Training(data.pairs["train"], model, model, ema, make_optimizer(model, config), autocast,
                 processes)  # fmt: skip
    if config.compile and device.type == "cuda":  # first: it draws dropout, so random numbers
        batch = plan(t, 0, 0).batch.to(device)
        read = OBJECTIVES[config.objective].reads(batch, config)
        compile_or_not(model, autocast, lambda: model(batch, read)[1].backward())
    progress = restore(t, saved, data) if saved else Progress()
    if processes.world > 1:  # [PRED] has no gradient in a step without JEPA
        t = t._replace(forward=DistributedDataParallel(model, find_unused_parameters=True))
        if processes.rank:  # the first process draws what a single one would, others their own
            torch.manual_seed(config.seed + processes.rank + progress.step * processes.world)
    provenance = {**provenance_of(argv, data, model, saved), "parameters": n_parameters}
    folder = Folder(out_dir, data, provenance, processes.rank == 0)
    if folder.first:
        folder = start_folder(folder, config, progress, again=evaluates(progress.step, config))

    print(f"ready after {time.time() - started:.1f} s")
    try:
        measures = train(t, folder, progress)
    finally:
        folder.tracker.finish()
    processes.leave()
    if not folder.first:
        return
    # They look for runs in out/.
    run = "" if out_dir.parent == Path("out") else f" {shlex.quote(str(out_dir))}"
    ends = (f"the pairs' embeddings are {verdict(measures)}" if config.jepa_weight else
            "at λ = 0 nothing aligned the pairs' embeddings")
    print(f"done in {time.time() - started:.0f} s: {out_dir}/ckpt.pt; {ends}. Next: python "
          f"sample.py{run}, python evaluate.py{run}, python eval_alignment.py{run}")


if __name__ == "__main__":
    run_main(main)
