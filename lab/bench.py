"""How fast is it, on this machine, and against what?

    python -m lab.bench [RECIPE] [--key=value ...] [--parts=training,generation,...]

training    a JEPA step over a plain one; against nanoGPT's step and the official two-row one
generation  against recomputing every token, and against transformers on the same weights
data        from a file to the first batch in a fresh process, up to a million pairs
curves      a step's time against the length and the number of rows
profile     where a step's time goes; the trunk's FLOP/s against the fastest matrix product here

What is compared takes turns in one process, so that a machine whose speed drifts slows all alike;
figures are medians over the rounds, ratios are taken within a round and carry their quartiles.
Prints a table per part and writes out/bench.json. transformers, which only the comparisons with it
need, is not in requirements.txt; without it they are left out.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import Config, fail, find_recipe, load_config, parse_args
from data import Data, jsonl_files, load_data
from generate import generate
from jepa import OBJECTIVES
from lab.peers import (
    as_transformers,
    generate_theirs,
    nanogpt_step,
    official_step,
    transformers,
)
from model import PAD, Trunk, block_causal_mask
from plumbing.files import write_json, write_lines
from plumbing.processes import ROOT, Processes, pick_device, run_main, versions
from run import make_model
from train import Training, make_optimizer, plan, train_step
from views import CODE, TEXT, Pairs

NO_TRANSFORMERS = "transformers is not installed: left out what is compared with it"

ROUNDS = 10  # of each comparison, after one that is not counted
SLOW_ROUNDS = 5  # where a round takes a minute
NEW_TOKENS = 128
ROWS = (10_000, 100_000, 1_000_000)  # of made-up files
TOKENS = 2048  # of a step whose rows have one of these lengths
LENGTHS = (64, 128, 256, 512, 1024)
BATCHES = (4, 8, 32, 64)


class Setup(NamedTuple):
    """What every part measures with."""

    config: Config
    data: Data
    device: torch.device
    autocast: Callable
    argv: list[str]  # what load_config made the config of


def main(argv: list[str]) -> None:
    known = {"training": training, "generation": generation, "data": loading, "curves": curves,
             "profile": profile}
    if {"-h", "--help"} & set(argv):
        usage = "python -m lab.bench [RECIPE] [--key=value ...] [--parts=a,b,...]"
        parse_args(Config, ["--help"], f"{usage}\nparts: {', '.join(known)}; all by default")
    wanted = [arg.removeprefix("--parts=") for arg in argv if arg.startswith("--parts=")]
    parts = wanted[-1].split(",") if wanted else list(known)
    if set(parts) - set(known):
        fail(f"--parts={','.join(parts)}: the parts are {', '.join(known)}")
    argv = [arg for arg in argv if not arg.startswith("--parts=")]
    config = load_config(argv)
    device, autocast = pick_device(config.device, config.dtype)
    data = load_data(config)
    about = {"config": asdict(config), "data": data.provenance, **machine(device), **versions()}
    print(f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, torch "
          f"{about['torch']}, transformers {about['transformers']}, commit {about['commit']}")
    path, results = Path("out/bench.json"), {}
    for part in parts:
        results[part] = known[part](Setup(config, data, device, autocast, argv))
        write_json(path, {**about, "parts": results})
    print(f"\nwrote {path}")


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures depend on, beside the code."""
    processor = platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "processor": processor, "device": str(device), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512_bf16": bool(features.get("avx512_bf16")),
        "amx_bf16": bool(features.get("amx_bf16")),
        "transformers": transformers.__version__ if transformers else "none",
    }  # fmt: skip


def dtype_of(autocast, device: torch.device) -> torch.dtype:
    """What our matrix products run in."""
    with autocast():
        on = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if on else torch.float32


# --- taking turns -----------------------------------------------------------------------------

Arms = dict[str, Callable[[int], int]]  # name: a function of the round's step -> tokens it did


def take_turns(arms: Arms, steps: list[int], device: torch.device) -> dict[str, np.ndarray]:
    """(rounds, 2) for each arm: seconds and tokens. The first of the steps only warms up."""
    seen = {name: [] for name in arms}
    for step in steps:
        for name, work in arms.items():
            begin = now(device)
            tokens = work(step)
            seen[name].append((now(device) - begin, tokens))
    return {name: np.array(rounds[1:]) for name, rounds in seen.items()}


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def quartiles_of(values) -> dict[str, float | list[float]]:
    """Median and quartiles."""
    low, median, high = np.percentile([float(value) for value in values], (25, 50, 75)).tolist()
    return {"median": median, "quartiles": [low, high]}


def shown(ratio: dict | None) -> str:
    """A ratio and its quartiles as text; nothing where there is none."""
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} ({ratio['quartiles'][0]:.2f}-{ratio['quartiles'][1]:.2f})"


def rate(rounds: np.ndarray) -> np.ndarray:
    """Tokens per second of each round."""
    return rounds[:, 1] / rounds[:, 0]


# --- what is measured -------------------------------------------------------------------------


def untrained(setup: Setup, config: Config) -> Trunk:
    """A model of the config as training starts from it."""
    torch.manual_seed(config.seed)
    return make_model(config, setup.data.tokenizer.vocab_size).to(setup.device)


def start_training(setup: Setup, config: Config) -> Training:
    """An untrained model, ready for steps on the training pairs."""
    model, pairs = untrained(setup, config), replace(setup.data.pairs["train"], config=config)
    optimizer = make_optimizer(model, config)
    return Training(pairs, model, model, None, optimizer, setup.autocast, Processes())


def with_config(t: Training, config: Config) -> Training:
    """The same model and optimizer, but steps by another config."""
    return t._replace(pairs=replace(t.pairs, config=config))


# --- training ---------------------------------------------------------------------------------


def training(setup: Setup) -> dict:
    """Steps of our variants, then steps of the peers beside two of ours, on the same examples."""
    config, device = setup.config, setup.device
    t, variants = start_training(setup, config), variants_of(config)
    done = {}  # tokens of each variant's latest step: nanoGPT's are made as large

    def ours(name):
        own = with_config(t, variants[name])

        def step(number):
            done[name] = train_step(own, number)["tokens"]
            return done[name]

        return step

    arms: Arms = {name: ours(name) for name in variants}
    half = replace(t.pairs, config=variants["JEPA, stop_grad, dropout .5"])
    steps = steps_by_turns(half)
    rounds = take_turns(arms, [steps[-1], *steps[:ROUNDS]], device)

    against: Arms = {name: arms[name] for name in ("CE only", "JEPA")}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        against[f"nanoGPT, {name}"] = nanogpt_step(
            t.pairs, config, lambda: done["CE only"], device, dtype
        )
        if transformers and config.views == "pairs":
            against[f"official two rows, {name}"] = official_step(
                t.pairs, variants["JEPA"], device, dtype
            )
    peers = take_turns(against, [steps[-1], *steps[:SLOW_ROUNDS]], device)

    # nanoGPT has a label at every token, our rows at the answer's only: part of the difference.
    examples = np.concatenate([half.batch(step) for step in steps[:ROUNDS]])
    lengths = half.lengths[examples]
    answers = lengths[:, CODE - 1].sum() / lengths[:, [TEXT - 1, CODE - 1]].sum()
    seen = {**peers, **rounds}
    results = {
        "rounds": ROUNDS, "share_of_answers": float(answers),
        "arms": {name: arm_result(name, seen[name], rounds) for name in seen},
        "ratios": {f"{ours_is} over {peer}": quartiles_of(rate(peers[ours_is]) / rate(peers[peer]))
                   for peer, ours_is in compared(peers)},
    }  # fmt: skip
    print_training(results, compared(peers))
    if not transformers:
        print(NO_TRANSFORMERS)
    elif config.views != "pairs":
        print(f"the official recipe trains on pairs, not {config.views}: left out")
    return results


def variants_of(config: Config) -> dict[str, Config]:
    """The steps of ours that are measured; one model takes them all, so none has an average."""
    half = replace(config, jepa_weight=config.jepa_weight or 1.0, jepa_dropout=0.5,
                   jepa_dropout_per="batch", stop_grad=True, ema=0.0)  # fmt: skip
    return {
        "CE only": replace(half, jepa_weight=0.0),
        "JEPA": replace(half, jepa_dropout=0.0, stop_grad=False),
        "JEPA, stop_grad": replace(half, jepa_dropout=0.0),
        "JEPA, stop_grad, dropout .5": half,
    }


def steps_by_turns(pairs: Pairs) -> list[int]:
    """Numbers of steps, by turns one that carries JEPA and one that dropout .5 has spared it: half
    of all steps are of either kind."""
    carry, spare = [], []
    for step in range(100):
        (carry if pairs.with_jepa(pairs.batch(step), step, 0).any() else spare).append(step)
    return [step for both in zip(carry, spare) for step in both]


def compared(peers: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """The name of each peer, and of the step of ours that it is compared with."""
    return [(name, "CE only" if name.startswith("nanoGPT") else "JEPA")
            for name in peers if name not in ("CE only", "JEPA")]  # fmt: skip


def arm_result(name: str, seen: np.ndarray, rounds: dict[str, np.ndarray]) -> dict:
    """Milliseconds and speed of one arm; for ours, in `rounds`, the time over a CE-only step."""
    seconds, over = seen[:, 0], None
    if name in rounds:
        base = rounds["CE only"][:, 0]
        if name.endswith("dropout .5"):  # a step with JEPA and one without are one value
            seconds, base = (values.reshape(-1, 2).mean(1) for values in (seconds, base))
        over = quartiles_of(seconds / base)
    return {"ms": 1e3 * statistics.median(seconds), "over_ce_only": over,
            "tokens_per_second": quartiles_of(rate(seen))}  # fmt: skip


def print_training(results: dict, compared: list[tuple[str, str]]) -> None:
    print(f"\ntraining, real (unpadded) tokens, {results['share_of_answers']:.0%} of our plain "
          f"row's in the answer\n{'':<30}{'ms a step':>10}{'tokens/s':>10}"
          f"{'step over CE only':>22}")  # fmt: skip
    for name, arm in results["arms"].items():
        print(f"{name:<30}{arm['ms']:>10,.0f}{arm['tokens_per_second']['median']:>10,.0f}"
              f"{shown(arm['over_ce_only']):>22}")
    for name, ours_is in compared:
        ratio = results["ratios"][f"{ours_is} over {name}"]
        print(f"{ours_is} has {shown(ratio)} times the tokens/s of {name}")


# --- generation -------------------------------------------------------------------------------


def generation(setup: Setup) -> dict:
    """Greedy, on untrained weights; no token is an end of text, so that all rows run to the end."""
    config, held_out = setup.config, setup.data.pairs["val"]
    room = config.block_size - NEW_TOKENS
    prompts = [held_out.view(example, TEXT) for example in range(len(held_out))]
    prompts = [prompt for prompt in prompts if len(prompt) <= room]
    if len(prompts) < 64:
        why = (f"left out: needs 64 held-out questions of at most {room} tokens (block_size less "
               f"{NEW_TOKENS}), got {len(prompts)}")
        print(f"\ngeneration {why}")
        return {"skipped": why}
    model = untrained(setup, config).eval()
    theirs = None
    if transformers:
        dtype = dtype_of(setup.autocast, setup.device)
        theirs = as_transformers(model, config).to(dtype)

    results = {"rounds": SLOW_ROUNDS, "new_tokens": NEW_TOKENS, "batches": {}}
    lengths = [len(prompt) for prompt in prompts[:64]]
    print(f"\ngeneration, {NEW_TOKENS} new tokens a row, greedy, prompts of {min(lengths)} to "
          f"{max(lengths)} tokens\n"
          f"{'batch':>5}  {'':<16}{'ms a step':>12}{'tokens/s':>10}{'ours is faster by':>22}")
    for B in (1, 16, 64):
        arms = generation_arms(setup, model, theirs, prompts[:B])
        if B == 16:
            del arms["without a cache"]
        rounds = take_turns(arms, list(range(SLOW_ROUNDS + 1)), setup.device)
        results["batches"][B] = {}
        for name, seen in rounds.items():
            rates = quartiles_of(rate(seen))
            faster = None if name == "ours" else quartiles_of(rate(rounds["ours"]) / rate(seen))
            results["batches"][B][name] = {"tokens_per_second": rates, "ours_is_faster_by": faster}
            print(f"{B:>5}  {name:<16}{1e3 * B / rates['median']:>12.1f}{rates['median']:>10,.0f}"
                  f"{shown(faster):>22}")
    if not transformers:
        print(NO_TRANSFORMERS)
    return results


def generation_arms(setup: Setup, model: Trunk, theirs, prompts: list[list[int]]) -> Arms:
    """Ways to continue these prompts by NEW_TOKENS each."""
    B = len(prompts)

    def ours(_):
        with setup.autocast():  # the end of text is an id that cannot be drawn
            rows = generate(model, prompts, NEW_TOKENS, eot=model.vocab_size)
        assert all(len(row) == NEW_TOKENS for row in rows)
        return B * NEW_TOKENS

    def uncached(_):
        """Every eighth token, each the whole pass that it takes: all would be minutes."""
        seen = range(4, NEW_TOKENS, 8)
        for t in seen:
            with setup.autocast():
                next_tokens(model, [prompt + prompt[-1:] * t for prompt in prompts])
        return B * len(seen)

    arms: Arms = {"ours": ours, "without a cache": uncached}
    if theirs:
        eot = setup.data.tokenizer.eot
        arms["transformers"] = lambda _: generate_theirs(theirs, prompts, NEW_TOKENS, eot).numel()
    return arms


@torch.inference_mode()
def next_tokens(trunk: Trunk, rows: list[list[int]]) -> torch.Tensor:
    """The likeliest token after each row, by one pass over all of them without a cache: (B,)."""
    device = trunk.device
    length = torch.tensor([[len(row)] for row in rows], device=device)  # (B, 1)
    tokens = [torch.tensor(row) for row in rows]
    idx = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)  # (B, T)
    columns = torch.arange(idx.size(1), device=device)
    block = (columns < length).long()  # one block, the rest is padding: plainly causal
    mask, position_ids = block_causal_mask(block, trunk.sees)
    hidden = trunk.layers(trunk.embed(idx), position_ids, mask, read=columns == length - 1)
    return trunk.logits(hidden).float().argmax(-1)


# --- data -------------------------------------------------------------------------------------

# What a fresh process does until it has a batch.
FRESH = """
import json, resource, sys, time
from config import load_config
from data import load_data
config = load_config(sys.argv[1:])
begin = time.perf_counter()
train = load_data(config).pairs["train"]
train.pack(train.batch(0), train.layout.row)
seconds = time.perf_counter() - begin
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(train)]))
"""


def loading(setup: Setup) -> dict:
    """From a file to the first batch in fresh processes: cold, and warm with its tokens on disk.
    Then files of more and more pairs, 20 words each."""
    results = {"rounds": SLOW_ROUNDS}
    print(f"\nfrom file to first batch{'':<8}{'training pairs':>16}{'cold, s':>10}{'warm, s':>10}"
          f"{'peak, MB':>12}{'warm':>8}")
    argv, own = from_anywhere(setup)
    with tempfile.TemporaryDirectory() as folder:
        sets = {setup.data.provenance["dataset"]: own}
        for n in ROWS:
            sets[f"{n:,} pairs"] = [f"--dataset={make_pairs(Path(folder) / f'{n}.jsonl', n)}"]
        for name, options in sets.items():
            rounds = [load_twice([*argv, *options]) for _ in range(SLOW_ROUNDS)]
            results[name] = {"pairs": rounds[0][0].pairs}
            for state, loads in zip(("cold", "warm"), zip(*rounds)):
                results[name][state] = {"seconds": quartiles_of(load.seconds for load in loads),
                                        "MB": quartiles_of(load.megabytes for load in loads)}
            cold, warm = results[name]["cold"], results[name]["warm"]
            print(f"{name:<32}{results[name]['pairs']:>16,}{cold['seconds']['median']:>10.2f}"
                  f"{warm['seconds']['median']:>10.2f}{cold['MB']['median']:>12,.0f}"
                  f"{warm['MB']['median']:>8,.0f}")
    return results


def from_anywhere(setup: Setup) -> tuple[list[str], list[str]]:
    """The command line without relative paths, and an option that names the data by a whole one:
    a fresh process runs in another folder."""
    argv = [arg if arg.startswith("--") else str(find_recipe(arg).resolve()) for arg in setup.argv]
    config = setup.config
    if config.dataset.endswith((".jsonl", ".txt")):
        return argv, [f"--dataset={Path(config.dataset).resolve()}"]
    if files := jsonl_files(config):
        return argv, [f"--data_dir={files['train'].resolve().parent}"]
    return argv, []


class Load(NamedTuple):
    """What a fresh process took to its first batch."""

    seconds: float
    megabytes: float  # at its peak
    pairs: int  # to train on


def load_twice(argv: list[str]) -> list[Load]:
    """Two fresh processes one after the other; the first finds no tokens on disk."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            done = subprocess.run([sys.executable, "-c", FRESH, *argv], capture_output=True,
                                  text=True, cwd=folder, env={**os.environ, "PYTHONPATH": path})
            if done.returncode:
                fail(f"a fresh process could not load: {done.stderr.strip()[-200:]}")
            seconds, peak, n_pairs = json.loads(done.stdout.splitlines()[-1])
            megabytes = peak / (1e6 if sys.platform == "darwin" else 1e3)
            loads.append(Load(seconds, megabytes, n_pairs))
    return loads


def make_pairs(path: Path, n: int) -> Path:
    """A file of n pairs of made-up words, all different."""
    r = random.Random(0)
    words = [a + b for a in "bcdfghklmnprst" for b in ("ar", "en", "il", "od", "un", "ast", "ell")]

    def rows() -> Iterator[dict[str, str]]:
        for i in range(n):
            yield {"text": f"{' '.join(r.choices(words, k=12))} {i}",
                   "code": f"{i} {' '.join(r.choices(words, k=8))}"}  # fmt: skip

    write_lines(path, rows())
    return path


# --- curves -----------------------------------------------------------------------------------


def curves(setup: Setup) -> dict:
    """A step's time as rows grow longer and as there are more of them."""
    config = replace(setup.config, block_size=max(LENGTHS) + setup.config.n_pred, dropout=0.0,
                     gradient_accumulation_steps=1, jepa_dropout=0.0, ema=0.0)  # fmt: skip
    t = start_training(setup, config)

    def step_of(B, T):
        own = t._replace(pairs=made_up(config, setup.data.tokenizer.vocab_size, B, T))
        return lambda _: train_step(own, 0)["tokens"]

    shapes = [(TOKENS // T, T) for T in LENGTHS] + [(B, LENGTHS[1]) for B in BATCHES]
    arms: Arms = {f"{B} x {T}": step_of(B, T) for B, T in shapes}
    rounds = take_turns(arms, list(range(SLOW_ROUNDS + 1)), setup.device)
    results = {"rounds": SLOW_ROUNDS, "shapes": {}}
    print(f"\na step of rows x tokens of text and code{'ms':>12}{'us a token':>12}")
    for name, seen in rounds.items():
        each = quartiles_of(1e6 * seen[:, 0] / seen[:, 1])
        results["shapes"][name] = {"ms": quartiles_of(1e3 * seen[:, 0]), "us_per_token": each}
        print(f"{name:<40}{1e3 * statistics.median(seen[:, 0]):>12,.0f}{each['median']:>12.1f}")
    long, longer = (f"{TOKENS // T} x {T}" for T in LENGTHS[-2:])
    power = 1 + quartiles_of(np.log2(rate(rounds[long]) / rate(rounds[longer])))["median"]
    results["power_of_length"] = power
    print(f"doubling the longest rows makes one cost 2^{power:.2f} (attention alone: 2^2)")
    return results


def made_up(config: Config, vocab_size: int, B: int, T: int) -> Pairs:
    """One batch of B pairs of random tokens; text and code are a half of T each."""
    half, starts = T // 2, np.arange(B)[:, None] * T
    return Pairs(
        np.random.default_rng(0).integers(vocab_size, size=B * T, dtype=np.int32),
        np.ones(B * T, bool), starts + np.array([0, half, half]),
        np.tile([half, T - half, T - half], (B, 1)), np.full(B, half),
        replace(config, batch_size=B), vocab_size,
    )  # fmt: skip


# --- profile ----------------------------------------------------------------------------------

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
    for number in range(ROUNDS + 1):
        for name, arm in arms.items():
            stamps[:] = [now(device)]
            train_step(arm, number)
            stamps.append(now(device))
            assert len(stamps) == len(PHASES) + 1
            seconds[name].append(np.diff(stamps))
            flops[name].append(trunk_flops(arm, number))
        ceiling.append(fastest_product(matrices, device))

    ceiling = np.array(ceiling[1:])  # the first round only warms up
    results = {"rounds": ROUNDS, "ceiling_flops_per_second": quartiles_of(ceiling),
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
    print_profile(results)
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
    read = OBJECTIVES[config.objective].reads(batch.block, config) | (batch.targets != -1)
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


def print_profile(results: dict) -> None:
    arms = results["arms"]
    print("\nwhere a step's time goes, ms (share)")
    print(f"{'':<34}" + "".join(f"{name:>18}" for name in arms))
    rows = [
        (phase, lambda arm, phase=phase: f"{1e3 * arm['seconds'][phase]['median']:,.0f} "
                                         f"({arm['share'][phase]['median']:.1%})")
        for phase in PHASES
    ]  # fmt: skip
    rows += [
        ("padding, over an epoch", lambda arm: f"{arm['padding']:.1%}"),
        ("trunk, GFLOP/s", lambda arm: f"{arm['trunk_flops_per_second']['median'] / 1e9:,.0f}"),
        ("of the fastest matrix product", lambda arm: shown(arm["trunk_over_ceiling"])),
    ]
    for title, cell in rows:
        print(f"{title:<34}" + "".join(f"{cell(arm):>18}" for arm in arms.values()))
    ceiling = results["ceiling_flops_per_second"]["median"]
    print(f"fastest matrix product, {results['ceiling_dtype']}: {ceiling / 1e9:,.0f} GFLOP/s")


if __name__ == "__main__":
    run_main(main)
