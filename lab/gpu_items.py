"""What gpu_report.py measures: a model at a time, each item a function that returns its figures.

    Lab       the models, rows and device of all items
    items_of  the items by name, the most important first, the longest to compile last
"""

import contextlib
import copy
import gc
import io
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from config import Config, find_recipe, read_recipe
from data import load_data
from generate import generate, generate_plain
from lab import bench, timing
from lab.peers import EXAMPLES, official_step, peer_of
from model import Trunk, block_causal_mask
from plumbing.processes import pick_device
from plumbing.tables import first_line
from train import Training, train_step
from views import TEXT

# Largest share by which hidden states and gradients may be off the CPU's, which runs in fp32.
LIMITS = {"fp32": 1e-4, "bf16": 5e-2}
CHECKED_TOKENS = 24  # of generation with a cache against generation without one
CALLS = 10  # of attention in a round: one takes less than a clock can tell


class Sizes(NamedTuple):
    """How large everything is."""

    vocab_size: int  # of the GPTs
    gpts: dict[str, dict[str, int]]  # name: what differs from the recipe gsm8k_jepa
    few: int  # rows of a step that is compared with the CPU's
    batch: int | None  # examples of a step of the pretrained model; None is its recipe's
    warm: int  # steps before any that count: a GPU loads a kernel when a shape first asks for it
    rounds: int  # that count, of each comparison
    attention: tuple[tuple[int, int], ...]  # rows x tokens of question and answer
    generation: tuple[int, ...]  # batch sizes
    backend: str  # of torch.compile


CHECKED, OURS = "small GPT", "GPT 45M"
FULL = Sizes(
    50304, {CHECKED: dict(n_layer=4, n_embd=256), OURS: {},
            "GPT-2 124M": dict(n_layer=12, n_head=12, n_embd=768, batch_size=64)},
    4, None, 30, 5, ((16, 160), (4, 1024), (2, 4096)), (1, 16, 64, 256), "inductor",
)  # fmt: skip
SMALL = dict(n_layer=1, n_head=2, n_embd=32, batch_size=4)
TINY = Sizes(512, {CHECKED: SMALL, OURS: SMALL}, 2, 4, 1, 1, ((2, 32),), (1, 4), "eager")


def in_a_line(work: Callable) -> tuple:
    """What work() returns, and an empty text; or None, and the one line that says why not."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return work(), ""
    except SystemExit:  # of `fail`
        return None, (told.getvalue().strip().splitlines() or ["it stopped without a word"])[-1]
    except Exception as error:  # an item may fail in any way
        return None, first_line(error)[:300]


class Lab:
    """Models, rows and device of all items."""

    def __init__(self, device: str, tiny: bool, trunk: str):
        """trunk: --trunk= of the pretrained model; empty is that of the recipe smollm2_jepa."""
        self.sizes = TINY if tiny else FULL
        device, autocast = pick_device(device, "auto")
        # With 384 tokens, made-up problems are about as long as GSM8K's in GPT-2's vocabulary.
        data = load_data(Config(dataset="word_problems", tokenizer="bpe", bpe_vocab_size=384))
        data.tokenizer = SimpleNamespace(vocab_size=self.sizes.vocab_size)
        self.setup = timing.Setup(Config(), data, device, autocast, [])
        plain = dict(block_size=512, jepa_warmup_iters=0)
        ours = Config(**{**read_recipe(find_recipe("gsm8k_jepa")), **plain})
        theirs = Config(**{**read_recipe(find_recipe("smollm2_jepa")), **plain})
        theirs = replace(theirs, trunk=trunk or theirs.trunk,
                         batch_size=self.sizes.batch or theirs.batch_size)  # fmt: skip
        self.pretrained = Path(theirs.trunk).name
        self.configs = {name: replace(ours, **gpt) for name, gpt in self.sizes.gpts.items()}
        self.configs[self.pretrained] = theirs
        self.made = {}

    def weights(self, name: str) -> Trunk:
        """A model on the CPU, made or read once; whoever changes it takes a copy."""
        if name not in self.made:
            setup = self.setup._replace(device=torch.device("cpu"))
            self.made[name] = in_a_line(lambda: timing.untrained(setup, self.configs[name]))
        model, reason = self.made[name]
        if reason:
            raise RuntimeError(reason)
        return model

    def model(self, name: str) -> Trunk:
        """A copy of it on the device."""
        return copy.deepcopy(self.weights(name)).to(self.setup.device)

    def arms(self, name: str, batch_size: int = 0) -> dict[str, Config]:
        """CE only and JEPA."""
        variants = bench.variants_of(self.configs[name])
        return {arm: replace(variants[arm], batch_size=batch_size or variants[arm].batch_size)
                for arm in ("CE only", "JEPA")}  # fmt: skip


def items_of(lab: Lab) -> dict[str, Callable[[], dict]]:
    """What is measured, by name, the most important first, the longest to compile last."""
    gpts, last, items = list(lab.sizes.gpts), lab.pretrained, {}
    for name in (CHECKED, last):
        for dtype in LIMITS:
            items[f"correct: {name}, {dtype}"] = partial(correct, lab, name, dtype)
        items[f"correct: {name}, cached generation"] = partial(cached, lab, name)
    items[f"correct: {CHECKED}, fp32, compiled"] = partial(correct, lab, CHECKED, "fp32", True)
    for name in gpts[1:]:
        for how in ("eager", "compiled"):
            items[f"steps: {name}, {how}"] = partial(steps, lab, name, how == "compiled")
    items[f"steps: {last}, eager"] = partial(steps, lab, last, False)
    for B, T in lab.sizes.attention:
        items[f"attention: {B} x {T}"] = partial(attention, lab, B, T)
    for name in (last, gpts[-1]):
        items[f"two rows: {name}"] = partial(two_rows, lab, name)
    for name in (OURS, last):
        for B in lab.sizes.generation:
            items[f"generation: {name}, {B}"] = partial(generation, lab, name, B)
    # The last, since compiling thirty layers took minutes.
    items[f"steps: {last}, compiled"] = partial(steps, lab, last, True)
    return items


def compiled(model: Trunk, backend: str) -> None:
    """Compile it in place, as train.py does, and with nothing left of other models."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile(dynamic=True, backend=backend)


def correct(lab: Lab, name: str, dtype: str, compiles: bool = False) -> dict:
    """How far a step on the device is off that of the CPU in fp32, on the same weights and rows."""
    config = lab.arms(name, lab.sizes.few)["JEPA"]
    setups = [lab.setup._replace(device=torch.device("cpu"), autocast=contextlib.nullcontext),
              lab.setup._replace(autocast=contextlib.nullcontext)]  # fmt: skip
    if dtype == "bf16":
        device_type = lab.setup.device.type
        setups[1] = setups[1]._replace(
            autocast=lambda: torch.autocast(device_type, torch.bfloat16))  # fmt: skip
    models = copy.deepcopy(lab.weights(name)), lab.model(name)
    if compiles:
        compiled(models[1], lab.sizes.backend)
    want, got = (seen_in_a_step(timing.start_training(setup, replace(config, grad_clip=0.0), model))
                 for setup, model in zip(setups, models))  # fmt: skip
    off = {key: ((got[key] - want[key]).norm() / want[key].norm()).item()
           for key in ("hidden", "gradient")}  # fmt: skip
    right = all(share <= LIMITS[dtype] for share in off.values())
    return {**off, "loss": [got["loss"], want["loss"]], "right": right}


def seen_in_a_step(t: Training) -> dict:
    """Loss, hidden states where they are read and all gradients of a step, on the CPU."""
    seen = {}

    def forward(batch, read):
        hidden, ce_sum = t.model(batch, read)
        seen["hidden"] = hidden[read].detach().float().cpu()
        return hidden, ce_sum

    t.optimizer.register_step_pre_hook(lambda *_: seen.update(gradient=torch.cat(
        [p.grad.flatten().float().cpu() for p in t.model.parameters()])))  # fmt: skip
    seen["loss"] = train_step(t._replace(forward=forward), 0)["loss"]
    return seen


def questions(lab: Lab, n: int) -> list[list[int]]:
    """n of the held-out questions, over again if there are fewer."""
    pairs = lab.setup.data.pairs["val"]
    return [pairs.view(i % len(pairs), TEXT) for i in range(n)]


@torch.no_grad()
def cached(lab: Lab, name: str) -> dict:
    """Greedy answers in fp32, with a cache and in one batch, against each alone and anew."""
    model = lab.model(name).eval()
    for p in model.parameters() if name == CHECKED else ():  # strong opinions: no two tokens are
        p.mul_(8 if p.dim() == 2 else 1)  # so near each other that rounding decides
    prompts = questions(lab, lab.sizes.few)
    rows, plain = (way(model, prompts, CHECKED_TOKENS, model.vocab_size)
                   for way in (generate, generate_plain))  # fmt: skip
    return {"rows": len(rows), "equal_rows": sum(a == b for a, b in zip(rows, plain)),
            "right": rows == plain}  # fmt: skip


def watched(lab: Lab, arms: timing.Arms, warm: int) -> dict[str, dict]:
    """Of arms that take turns: seconds of each counted round, after `warm` (1 or more) that do not
    count, and peak memory in GB over all of them (none on a CPU)."""
    device, peak = lab.setup.device, {}

    def with_peak(name, work, step):
        torch.cuda.reset_peak_memory_stats(device)
        tokens = work(step)
        peak[name] = max(peak.get(name, 0.0), torch.cuda.max_memory_allocated(device) / 1e9)
        return tokens

    on_cuda = device.type == "cuda"
    works = {name: partial(with_peak, name, work) if on_cuda else work
             for name, work in arms.items()}  # fmt: skip
    numbers = list(range(warm + lab.sizes.rounds))
    rounds = timing.take_turns("rounds", works, numbers, device)
    return {name: {"rounds": seen[-lab.sizes.rounds:], "peak_gb": peak.get(name)}
            for name, seen in rounds.items()}  # fmt: skip


def steps(lab: Lab, name: str, compiles: bool) -> dict:
    """Training steps of one model with and without JEPA, which take turns."""
    arms, flops = lab.arms(name), {arm: [] for arm in lab.arms(name)}
    t, before = timing.start_training(lab.setup, arms["JEPA"], lab.model(name)), time.perf_counter()
    if compiles:
        compiled(t.model, lab.sizes.backend)

    def work(arm, step):
        done = train_step(timing.with_config(t, arms[arm]), step)
        flops[arm].append(done["flops"])
        return done["tokens"]

    works = {arm: partial(work, arm) for arm in arms}
    timing.take_turns("steps", works, [0], lab.setup.device)
    first, graphs = time.perf_counter() - before, graphs_made()
    seen = watched(lab, works, lab.sizes.warm)
    result = {"batch": arms["JEPA"].batch_size, "first_seconds": first,
              "recompilations": graphs_made() - graphs if compiles else None, "arms": {},
              "jepa_over_ce": timing.quartiles_of(
                  seen["JEPA"]["rounds"][:, 0] / seen["CE only"]["rounds"][:, 0])}  # fmt: skip
    for arm, about in seen.items():
        rounds = about["rounds"]
        speed = [f / s / 1e12 for f, s in zip(flops[arm][-len(rounds):], rounds[:, 0])]
        result["arms"][arm] = {"tokens_per_second": timing.quartiles_of(timing.rate(rounds)),
                               "tflops": timing.quartiles_of(speed), "peak_gb": about["peak_gb"]}
    return result


def graphs_made() -> int:
    """Graphs that torch.compile has made so far; those after the first step are recompilations."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def attention(lab: Lab, B: int, T: int) -> dict:
    """Attention of the 45M model over the tree of a JEPA row, forward, and with backward."""
    config, device = lab.arms(OURS)["JEPA"], lab.setup.device
    pairs = bench.made_up(config, lab.sizes.vocab_size, B, T)
    block = pairs.pack(pairs.batch(0), pairs.layout.row).block.to(device)  # (B, S)
    sees, S = lab.weights(OURS).sees.to(device), block.size(1)
    mask = block_causal_mask(block, sees)[0][:, None]  # (B, 1, S, S)
    shape = (3, B, config.n_head, S, config.n_embd // config.n_head)
    dtype, backward = timing.dtype_of(lab.setup.autocast, device), device.type == "cuda"
    qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=backward)

    def may_attend(b, head, at, to):  # model.block_causal_mask, one entry at a time
        return sees[block[b, at], block[b, to]] & (at >= to)

    tree = create_block_mask(may_attend, B, None, S, S, device=device)
    fused = torch.compile(flex_attention, dynamic=False) if backward else flex_attention
    ways = {"sdpa": partial(F.scaled_dot_product_attention, attn_mask=mask),
            "flex": partial(fused, block_mask=tree)}  # fmt: skip

    def once(way, then):
        y = ways[way](*qkv)
        return torch.autograd.grad(y.sum(), qkv)[0] if then else y.detach()

    def often(way, then, step):
        for _ in range(CALLS):
            once(way, then)
        return CALLS * B * S

    off, result = [], {"tokens": S, "limit": LIMITS["bf16" if dtype == torch.bfloat16 else "fp32"]}
    for then in (False, True)[: 1 + backward]:
        sdpa, flex = (once(way, then).float() for way in ways)
        off.append(((flex - sdpa).norm() / sdpa.norm()).item())
        rounds = timing.take_turns("attention", {way: partial(often, way, then) for way in ways},
                                  list(range(lab.sizes.rounds + 1)), device)  # fmt: skip
        result["forward and backward" if then else "forward"] = {
            way: timing.quartiles_of(1e3 * seen[:, 0] / CALLS) for way, seen in rounds.items()}
    made = timing.take_turns(
        "block mask",
        {"mask": lambda _: create_block_mask(may_attend, B, None, S, S, device=device).shape[-1]},
        list(range(lab.sizes.rounds + 1)), device)["mask"]  # fmt: skip
    return {**result, "mask_ms": timing.quartiles_of(1e3 * made[:, 0]), "off": max(off),
            "right": max(off) <= result["limit"]}  # fmt: skip


def two_rows(lab: Lab, name: str) -> dict:
    """A step on the same examples: our one row, the official recipe's two as they are shipped, and
    these without padding to block_size. One after another, so that memory holds one model only."""
    config, device = lab.arms(name, EXAMPLES)["JEPA"], lab.setup.device
    dtype = timing.dtype_of(lab.setup.autocast, device)

    def ours():
        return partial(train_step, timing.start_training(lab.setup, config, lab.model(name)))

    def official(pad):
        weights = lab.weights(name)
        pairs = replace(lab.setup.data.pairs["train"], vocab_size=weights.vocab_size)
        return official_step(pairs, config, device, dtype, pad, peer_of(weights, config))

    result = {"examples": EXAMPLES}
    for arm, make in (("one row", ours), ("two rows, padded to 512", partial(official, True)),
                      ("two rows, no padding to 512", partial(official, False))):  # fmt: skip
        work = make()
        arms = {arm: (lambda step, work=work: work(step) and EXAMPLES)}
        seen = watched(lab, arms, lab.sizes.warm)[arm]
        result[arm] = {"examples_per_second": timing.quartiles_of(timing.rate(seen["rounds"])),
                       "peak_gb": seen["peak_gb"]}  # fmt: skip
        del work
        gc.collect()
    return result


def generation(lab: Lab, name: str, B: int) -> dict:
    """Greedy, bench.NEW_TOKENS for each of B questions."""
    model = lab.model(name).eval()
    arms = bench.generation_arms(lab.setup, model, questions(lab, B), bench.NEW_TOKENS)
    seen = watched(lab, {"ours": arms["ours"]}, 1)["ours"]  # all rounds are the same rows
    return {"tokens_per_second": timing.quartiles_of(timing.rate(seen["rounds"])),
            "peak_gb": seen["peak_gb"]}  # fmt: skip
