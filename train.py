"""Train a GPT on cross-entropy and a JEPA loss between two views of each pair.

    python train.py config/gsm8k_jepa.py [--key=value ...]      (--help lists the keys)

A flat script: read main() from top to bottom. The loss: `objective`, below.
"""

import copy
import json
import math
import shlex
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from config import Config, fail, load_config
from data import Data, load_data
from evaluate import SHARES, answer, longest_answer, share
from jepa import alignment, distance, spread, verdict
from model import GPT, PAD, read_hidden
from run import (
    checkpoint_state,
    config_of,
    encode_pairs,
    exit_quietly,
    join_processes,
    leave_processes,
    pick_device,
    read_checkpoint,
    read_records,
    rewrite_records,
    save_checkpoint,
    set_aside,
    versions,
)
from views import Pairs, Rows


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then a cosine down to min_lr at lr_decay_iters."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    last = max(config.lr_decay_iters or config.max_iters, config.warmup_iters + 1)
    progress = min(1, (step - config.warmup_iters) / (last - config.warmup_iters))
    half_cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + half_cosine * (config.learning_rate - config.min_lr)


def evaluates(step: int, config: Config) -> bool:
    """Is there an evaluation after `step` steps?"""
    return step >= config.max_iters or (step > 0 and step % config.eval_interval == 0)


def make_optimizer(model: GPT, config: Config) -> torch.optim.AdamW:
    """AdamW over every parameter once; weight decay on matrices only."""
    parameters = list(model.parameters())  # the tied output layer comes once
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def forward_backward(
    model: GPT, train: Pairs, step: int, device: torch.device, autocast, ema: GPT | None = None,
    forward=None, rank: int = 0, world: int = 1,
) -> tuple[dict[str, float], int, int]:
    """Accumulate the gradient of one step's loss; the loss's terms, the tokens and the floating-
    point operations it took.

    `ema`, where there is one, encodes the targets. Of `world` processes, this is number `rank`: it
    takes every world-th row, and `forward` is the model wrapped so that gradients are averaged.
    """  # fmt: skip
    config, layout, forward = train.config, train.layout, forward or model
    n_micro = config.gradient_accumulation_steps
    # At first JEPA's gradient is the larger one, and clipping their sum would shrink CE's part.
    grown = min(1.0, step / config.jepa_warmup_iters) if config.jepa_warmup_iters else 1.0
    # The target shares the row of its question and answer, unless it needs no gradient: then it
    # runs in a pass of its own, forward only.
    apart = config.stop_grad or ema is not None
    examples = [train.batch(step * n_micro + i) for i in range(n_micro)]
    with_jepa = [train.with_jepa(rows, step, i) for i, rows in enumerate(examples)]
    blocks = [b for b in layout.row if not apart or b != layout.enc or b in layout.plain]
    batches = [train.pack(rows, blocks, keep) for rows, keep in zip(examples, with_jepa)]
    mine = slice(rank, None, world)
    # Mean over all labels and all JEPA examples of the step, not of a micro-batch: n_micro
    # micro-batches then give the gradient of one large batch, for both losses alike.
    n_labels = sum((rows.targets != -1).sum().item() for rows in batches)
    n_pairs = sum(keep.sum() for keep in with_jepa)  # examples that carry the JEPA term
    n_tokens = flops = 0
    total = {"ce": 0.0, "jepa": 0.0, "spread": 0.0}

    def objective(ce, jepa, regularizer):
        return config.ce_weight * ce + grown * (
            config.jepa_weight * jepa + config.spread_weight * regularizer
        )

    for numbers, keep, rows in zip(examples, with_jepa, batches):
        rows = Rows(*(t[mine] for t in rows))
        n_tokens += (rows.block != PAD).sum().item()
        flops += 3 * model.flops(rows.block, rows.targets)
        rows = rows.to(device)
        with autocast():
            hidden, ce_sum = forward(*rows)
        ce = ce_sum / n_labels
        jepa = regularizer = torch.zeros((), device=device)
        if keep.any():
            # Terms that compare examples see those of all processes: each computes all of the
            # loss, and of its gradient what its own examples cause.
            kept = torch.from_numpy(keep).to(device)
            pred = gather(read_hidden(hidden, rows.block, layout.pred), rank, world)[kept]  # (B, C)
            if apart:  # after the other pass: autocast caches its weights
                n_kept = keep.sum()
                even = np.resize(numbers[keep], -(-n_kept // world) * world)  # repeats a few
                own = train.pack(even[mine], (layout.enc,))
                n_tokens += (own.block != PAD).sum().item()
                flops += model.flops(own.block)  # forward only
                own = own.to(device)
                with torch.no_grad(), autocast():
                    hidden = (ema or model)(own.idx, own.block)[0]
                target = read_hidden(hidden, own.block, layout.enc, config.pooling)
                target = gather(target, rank, world)[:n_kept]
            else:
                target = read_hidden(hidden, rows.block, layout.enc, config.pooling)
                target = gather(target, rank, world)[kept]
            share = float(keep.sum() / n_pairs)
            jepa = distance(pred, target, config.jepa_loss) * share
            if config.spread != "none" and len(pred) > 1:
                regularizer = spread(pred, target, config.spread) * share
        loss = objective(ce, jepa, regularizer)
        (world * loss).backward()  # DistributedDataParallel takes the mean, we want the sum
        for name, value in zip(total, (ce, jepa, regularizer)):
            total[name] += value.item()
    if world > 1:
        sums = torch.tensor([total["ce"], n_tokens, flops], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        total["ce"], n_tokens, flops = sums[0].item(), int(sums[1]), int(sums[2])
    total["loss"] = objective(*total.values())
    if not n_pairs:
        del total["jepa"], total["spread"]
    return total, n_tokens, flops


def gather(x: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Rows rank::world of every process, (B / world, C) -> all of them, (B, C); gradients flow to
    one's own only."""
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    parts[rank] = x
    return torch.stack(parts, 1).flatten(0, 1)


def agree(stop_signal: int, world: int, device: torch.device) -> int:
    """The signal that any of the processes got, so that all stop at the same step."""
    if world == 1:
        return stop_signal
    signals = torch.tensor(stop_signal, device=device)
    torch.distributed.all_reduce(signals, torch.distributed.ReduceOp.MAX)
    return int(signals)


def main(argv: list[str]) -> None:
    started = time.time()
    config = load_config(argv)
    out_dir = Path(config.out_dir)
    resume = config.init_from == "resume"
    if any(out_dir.glob("*/ckpt.pt")):
        fail(f"out_dir={out_dir} holds other runs; name a folder of its own, as in "
             f"--out_dir={out_dir / config.recipe}")
    rank, world = join_processes(config.device)
    if config.batch_size % world:
        fail(f"batch_size={config.batch_size} cannot be shared evenly by {world} processes")
    saved = read_checkpoint(out_dir / "ckpt.pt") if resume else None
    if resume:
        check_resume(config, config_of(saved, out_dir / "ckpt.pt"), out_dir)

    # --- data, model, optimizer
    device, autocast = pick_device(config.device, config.dtype)
    data = load_data(config)
    train, tokenizer = data.pairs["train"], data.tokenizer
    if resume:
        was, now = saved["provenance"]["data"], data.provenance
        # Where it lies may differ; the system prompt is part of the rows, and so of their digest.
        same = now.keys() - {"source", "system"}
        changed = [key for key in now if key in same and was.get(key) != now[key]]
        if changed:
            fail(f"{out_dir}/ckpt.pt was trained on other data: {', '.join(changed)} changed")

    torch.manual_seed(config.seed)
    model = GPT(config, tokenizer.vocab_size, train.layout.parents).to(device)
    optimizer = make_optimizer(model, config)
    ema = copy.deepcopy(model).requires_grad_(False) if config.ema else None  # encodes targets
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"model {n_parameters / 1e6:.1f}M parameters, {config.max_iters} steps, run {out_dir}")
    if config.compile and device.type == "cuda":  # first: it draws dropout, so random numbers
        compile_or_not(model, data, device, autocast)
    step, tokens_seen, flops_seen, seconds, best_ce = 0, 0, 0, 0.0, math.inf
    if resume:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, tokens_seen, flops_seen = saved["step"], saved["tokens"], saved["flops"]
        seconds, best_ce = saved["seconds"], saved["best_ce"]
        if ema:
            ema.load_state_dict(saved["ema"])
        torch.set_rng_state(saved["rng"])
        if device.type == "cuda" and saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"], device)
    elif rank == 0 and (out_dir / "ckpt.pt").exists():
        print(f"moved the earlier run to {set_aside(out_dir)}")
    forward = model
    if world > 1:  # [PRED] has no gradient in a step without JEPA
        forward = DistributedDataParallel(model, find_unused_parameters=True)
        if rank:  # the first process draws what a single one would; others their own dropout
            torch.manual_seed(config.seed + rank + step * world)

    # --- the run's folder
    provenance = {"data": data.provenance, **versions(), "command": shlex.join(argv)}
    if resume:  # whose code took the steps before
        was = saved["provenance"]
        sitting = {key: was[key] for key in was if key not in ("data", "earlier")}
        provenance["earlier"] = [*was.get("earlier", []), {"until_step": step, **sitting}]
    metrics_path = out_dir / "metrics.jsonl"
    about = {"config": asdict(config), "provenance": provenance, "parameters": n_parameters}
    if rank == 0:  # the only one that writes
        out_dir.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume:  # the evaluation at this very step too, unless it comes again
            again = evaluates(step, config)
            kept = [r for r in read_records(metrics_path)
                    if r["step"] < step + ("val_ce" in r and not again)]  # fmt: skip
        (out_dir / "config.json").write_text(json.dumps(about, indent=1) + "\n")
        rewrite_records(metrics_path, kept)

    def log(**record):
        if rank == 0:
            with open(metrics_path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def save(name, **more):
        state = checkpoint_state(config, model, tokenizer, step=step, provenance=provenance, **more)
        save_checkpoint(out_dir / name, state)

    def save_last():
        cuda_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        save("ckpt.pt", optimizer=optimizer.state_dict(), tokens=tokens_seen, flops=flops_seen,
             seconds=seconds, best_ce=best_ce, rng=torch.get_rng_state(), cuda_rng=cuda_rng,
             ema=ema.state_dict() if ema else None)

    # Ctrl-C and SIGTERM finish the step, save and exit; a second one ends at once.
    stop_signal = 0

    def on_signal(number, frame):
        nonlocal stop_signal
        stop_signal = number
        signal.signal(number, signal.SIG_DFL)
        print(f"\n{signal.Signals(number).name}: saving after this step", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    # --- training
    warned, measures, recent = False, {}, []
    model.train()
    print(f"ready after {time.time() - started:.1f} s")
    while True:
        stopping = agree(stop_signal, world, device)

        # once in a while: evaluate on the same held-out pairs, and save
        if rank == 0 and evaluates(step, config):  # other processes wait for its next step
            val_ce, pred, target = encode_pairs(
                model, data.pairs["val"], config.eval_pairs, device, autocast
            )
            measures = alignment(pred, target)
            val_jepa = distance(pred, target, config.jepa_loss).item()
            answers = answer_some(model, data, config.eval_answers, autocast)
            log(step=step, val_ce=val_ce, val_jepa=val_jepa, tokens=tokens_seen, flops=flops_seen,
                seconds=seconds, **answers,
                **{f"val_{name}": value for name, value in measures.items()},
                val_effective_rank=min(measures["effective_rank_pred"],
                                       measures["effective_rank_target"]))
            print(f"step {step}: val ce {val_ce:.4f} | jepa {val_jepa:.4f} | "
                  + panel(measures, len(pred))
                  + "".join(f" | {key[4:]} {value:.3f}" for key, value in answers.items()),
                  flush=True)
            if config.jepa_weight and verdict(measures) == "collapsed" and not warned:
                warned = True
                print("warning: COLLAPSE. Wrong question/answer pairs score almost the cosine of "
                      "right ones:\n  the JEPA loss is low because all embeddings point one way. "
                      "A spread term prevents it (--spread=...).")
            if val_ce < best_ce:
                best_ce = val_ce
                save("best.pt")
            save_last()
            plot_losses(metrics_path, out_dir / "loss.png")
        elif rank == 0 and stopping:
            save_last()
        if stopping:
            print(f"saved {out_dir}/ckpt.pt at step {step}; --init_from=resume goes on from there")
            leave_processes(world)
            raise SystemExit(128 + stopping)
        if step >= config.max_iters:
            break

        # one step: n_micro micro-batches, then the update
        t0 = time.time()
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total, tokens, flops = forward_backward(
            model, train, step, device, autocast, ema, forward, rank, world
        )
        tokens_seen, flops_seen = tokens_seen + tokens, flops_seen + flops
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), config.grad_clip or math.inf
        ).item()
        if not (math.isfinite(total["loss"]) and math.isfinite(norm)):
            fail(f"loss {total['loss']} with gradient norm {norm} at step {step}: stopped before "
                 f"the update; {out_dir} keeps the last checkpoint, a lower learning_rate may help")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            with torch.no_grad():
                for average, p in zip(ema.parameters(), model.parameters()):
                    average.lerp_(p, 1 - config.ema)

        # report
        took = time.time() - t0
        seconds += took
        recent = [*recent[-19:], (took, tokens)]
        log(step=step, **total, lr=lr, grad_norm=norm, tokens=tokens_seen, flops=flops_seen,
            seconds=seconds)
        if step % config.log_interval == 0:
            recent_seconds, recent_tokens = map(sum, zip(*recent))
            rate = recent_tokens / recent_seconds
            eta = (config.max_iters - step - 1) * recent_seconds / len(recent)
            shown = f"jepa {total['jepa']:.4f}" if "jepa" in total else "jepa -"
            cosine = (f"cos {measures['matched']:.2f}/{measures['mismatched']:.2f} | "
                      if measures else "")
            print(f"step {step}/{config.max_iters} | loss {total['loss']:.4f} | ce "
                  f"{total['ce']:.4f} | {shown} | {cosine}{rate:,.0f} tokens/s | "
                  f"{1e3 * took:.0f} ms | ETA {eta // 60:.0f}:{eta % 60:02.0f}", flush=True)
        step += 1

    leave_processes(world)
    if rank:
        return
    run = "" if out_dir.parent == Path("out") else f" {out_dir}"  # they look for runs in out/
    print(f"done in {time.time() - started:.0f} s: {out_dir}/ckpt.pt; the pairs' embeddings are "
          f"{verdict(measures)}. Next: python sample.py{run}, python eval_alignment.py{run}")


def panel(measures: dict[str, float], n: int) -> str:
    """The numbers of jepa.alignment in a line, with what chance gives."""
    return (
        f"cosine matched {measures['matched']:.3f} mismatched {measures['mismatched']:.3f} | "
        f"retrieval@1 {measures['retrieval_at_1']:.3f} of {n} (chance {1 / n:.3f}) | effective "
        f"rank {measures['effective_rank_pred']:.1f} / {measures['effective_rank_target']:.1f}"
    )


def answer_some(model: GPT, data: Data, n: int, autocast) -> dict[str, float]:
    """Shares of the first n validation questions that it answers right, by evaluate.score."""
    pairs, limit = data.pairs["val"], longest_answer(data.pairs["train"])
    rows = np.argsort(pairs.asked[:n], kind="stable").tolist()
    records = []
    for begin in range(0, len(rows), 64):
        batch = rows[begin : begin + 64]
        records += answer(model, data.tokenizer, pairs, batch, limit, autocast, data.answers)
    return {f"val_{key}": share(records, key) for key in SHARES if records and key in records[0]}


def check_resume(config: Config, saved: Config, out_dir: Path) -> None:
    """Only how long and where to run may differ from the interrupted run."""
    free = dict(init_from="", out_dir="", recipe="", max_iters=1, device="", compile=True,
                data_dir="", eval_interval=1, log_interval=1)  # fmt: skip
    now, was = asdict(replace(config, **free)), asdict(replace(saved, **free))
    changed = [f"{k} was {was[k]!r}, is {now[k]!r}" for k in now if was[k] != now[k]]
    if changed:
        fail(f"{out_dir}/ckpt.pt cannot be resumed with another config: {'; '.join(changed)}")


def compile_or_not(model: GPT, data: Data, device: torch.device, autocast) -> None:
    """Compile forward in place, or say why not and go on uncompiled."""
    train = data.pairs["train"]
    rows = train.pack(train.batch(0), train.layout.row).to(device)
    try:
        model.compile(dynamic=True)
        with autocast():
            model(*rows)[1].backward()
        print("compiled")
    except Exception as error:  # no compiler, an unsupported GPU, ...
        model._compiled_call_impl = None
        print(f"not compiled, running eagerly: {type(error).__name__}: {error}".splitlines()[0])
    model.zero_grad(set_to_none=True)


def plot_losses(metrics_path: Path, path: Path) -> None:
    """Training and validation losses over steps, one panel per term."""
    from matplotlib.figure import Figure  # takes a second to import, and needs no display

    records = read_records(metrics_path)
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, term, label in zip(
        figure.subplots(1, 2), ("ce", "jepa"), ("cross-entropy, nats per label", "JEPA distance")
    ):
        for key, style in ((term, dict(lw=0.8, alpha=0.7)), (f"val_{term}", dict(marker="o"))):
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                name = "validation" if key.startswith("val_") else "training"
                axis.plot(*zip(*points), label=name, **style)
        axis.set(title=label, xlabel="step")
        axis.legend(frameon=False)
    figure.suptitle(metrics_path.parent.name, parse_math=False)  # a $ in it is no formula
    made = json.loads((metrics_path.parent / "config.json").read_text())["provenance"]
    data = f"{made['data']['dataset']}, train sha256 {made['data']['train_sha256'][:12]}"
    figure.supxlabel(f"{data}, commit {made['commit']}", fontsize=7, color="grey",
                     parse_math=False)  # fmt: skip
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    exit_quietly(main)
