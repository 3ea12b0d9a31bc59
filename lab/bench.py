"""How fast is it, on this machine, and against what?

    python bench.py [RECIPE] [--key=value ...] [--parts=training,generation,...]

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
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from config import Config, fail, find_recipe, load_config
from data import Data, jsonl_files, load_data
from model import GPT, PAD
from peers import (
    as_transformers,
    generate_theirs,
    nanogpt_step,
    official_step,
    transformers,
    update,
)
from run import exit_quietly, pick_device, versions
from train import forward_backward, make_optimizer
from views import CODE, TEXT, Pairs

NO_TRANSFORMERS = "transformers is not installed: left out what is compared with it"

ROUNDS = 10  # of each comparison, after one that is not counted
SLOW_ROUNDS = 5  # where a round takes a minute
NEW_TOKENS = 128
ROWS = (10_000, 100_000, 1_000_000)  # of made-up files
TOKENS = 2048  # of a step whose rows have one of these lengths
LENGTHS = (64, 128, 256, 512, 1024)
BATCHES = (4, 8, 32, 64)


def main(argv: list[str]) -> None:
    known = {"training": training, "generation": generation, "data": loading, "curves": curves,
             "profile": profile}
    if {"-h", "--help"} & set(argv):
        print(f"--parts=a,b,...  of {', '.join(known)}; all by default. Beyond that, as train.py:")
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
    results = {}
    for part in parts:
        results[part] = known[part](config, data, device, autocast, argv)
        path = Path("out/bench.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**about, "parts": results}, indent=1) + "\n")
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
            begin = time.perf_counter()
            tokens = work(step)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seen[name].append((time.perf_counter() - begin, tokens))
    return {name: np.array(rounds[1:]) for name, rounds in seen.items()}


def quartiles_of(values) -> dict[str, float | list[float]]:
    """Median and quartiles."""
    low, median, high = np.percentile([float(value) for value in values], (25, 50, 75)).tolist()
    return {"median": median, "quartiles": [low, high]}


def shown(ratio: dict) -> str:
    return f"{ratio['median']:.2f} ({ratio['quartiles'][0]:.2f}-{ratio['quartiles'][1]:.2f})"


def rate(rounds: np.ndarray) -> np.ndarray:
    """Tokens per second of each round."""
    return rounds[:, 1] / rounds[:, 0]


# --- training ---------------------------------------------------------------------------------


def training(config: Config, data: Data, device, autocast, argv) -> dict:
    pairs = data.pairs["train"]
    V = data.tokenizer.vocab_size
    half = replace(config, jepa_weight=config.jepa_weight or 1.0, jepa_dropout=0.5,
                   jepa_dropout_per="batch", stop_grad=True)  # fmt: skip
    variants = {
        "CE only": replace(half, jepa_weight=0.0),
        "JEPA": replace(half, jepa_dropout=0.0, stop_grad=False),
        "JEPA, stop_grad": replace(half, jepa_dropout=0.0),
        "JEPA, stop_grad, dropout .5": half,
    }
    torch.manual_seed(config.seed)
    model = GPT(config, V, pairs.layout.parents).to(device)
    optimizer = make_optimizer(model, config)
    n_tokens = 0  # of our plain row, so that nanoGPT's steps can be made as large

    def ours(variant):
        own = replace(pairs, config=variant)

        def step(number):
            nonlocal n_tokens
            _, n, _ = forward_backward(model, own, number, device, autocast)
            update(model, optimizer, config)
            n_tokens = n if variant is variants["CE only"] else n_tokens
            return n

        return step

    # Every other step carries JEPA under dropout .5, as half of all steps do.
    own = replace(pairs, config=half)
    carry, spare = [], []
    for step in range(100):
        (carry if own.with_jepa(own.batch(step), step, 0).any() else spare).append(step)
    steps = [step for both in zip(carry, spare) for step in both]
    arms: Arms = {name: ours(variant) for name, variant in variants.items()}
    rounds = take_turns(arms, [steps[-1], *steps[:ROUNDS]], device)

    against: Arms = {name: arms[name] for name in ("CE only", "JEPA")}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        against[f"nanoGPT, {name}"] = nanogpt_step(pairs, config, lambda: n_tokens, device, dtype)
        if transformers and config.views == "pairs":
            against[f"official two rows, {name}"] = official_step(
                pairs, variants["JEPA"], device, dtype
            )
    peers = take_turns(against, [steps[-1], *steps[:SLOW_ROUNDS]], device)

    # nanoGPT has a label at every token, our rows at the answer's only: part of the difference.
    lengths = pairs.lengths[np.concatenate([pairs.batch(step) for step in steps[:ROUNDS]])]
    answers = lengths[:, CODE - 1].sum() / lengths[:, [TEXT - 1, CODE - 1]].sum()
    results = {"rounds": ROUNDS, "share_of_answers": float(answers), "arms": {}, "ratios": {}}
    base = rounds["CE only"][:, 0]
    print(f"\ntraining, real (unpadded) tokens, {answers:.0%} of our plain row's in the answer")
    print(f"{'':<30}{'ms a step':>10}{'tokens/s':>10}"
          f"{'step over CE only':>22}")
    for name, seen in {**peers, **rounds}.items():
        seconds, over = seen[:, 0], None
        if name in variants:
            over = seconds / base
            if name.endswith("dropout .5"):  # a step with JEPA and one without are one value
                seconds = seconds.reshape(-1, 2).mean(1)
                over = seconds / base.reshape(-1, 2).mean(1)
            over = quartiles_of(over)
        tokens_per_second = quartiles_of(rate(seen))
        results["arms"][name] = {"ms": 1e3 * statistics.median(seconds), "over_ce_only": over,
                                 "tokens_per_second": tokens_per_second}  # fmt: skip
        print(f"{name:<30}{results['arms'][name]['ms']:>10,.0f}"
              f"{tokens_per_second['median']:>10,.0f}{shown(over) if over else '':>22}")
    for name, seen in peers.items():
        ours_is = "CE only" if name.startswith("nanoGPT") else "JEPA"
        if name not in variants:
            ratio = quartiles_of(rate(peers[ours_is]) / rate(seen))
            results["ratios"][f"{ours_is} over {name}"] = ratio
            print(f"{ours_is} has {shown(ratio)} times the tokens/s of {name}")
    if not transformers:
        print(NO_TRANSFORMERS)
    elif config.views != "pairs":
        print(f"the official recipe trains on pairs, not {config.views}: left out")
    return results


# --- generation -------------------------------------------------------------------------------


def generation(config: Config, data: Data, device, autocast, argv) -> dict:
    """Greedy, on untrained weights that never say end of text, so that all rows run to the end."""
    eot, held_out = data.tokenizer.eot, data.pairs["val"]
    room = config.block_size - NEW_TOKENS
    torch.manual_seed(config.seed)
    model = GPT(config, data.tokenizer.vocab_size, held_out.layout.parents).to(device).eval()
    with torch.no_grad():
        model.wte.weight[eot] = 0
    prompts = [held_out.view(row, TEXT) for row in range(len(held_out))]
    prompts = [prompt for prompt in prompts if len(prompt) <= room]
    if len(prompts) < 64:
        why = (f"left out: needs 64 held-out questions of at most {room} tokens (block_size less "
               f"{NEW_TOKENS}), got {len(prompts)}")
        print(f"\ngeneration {why}")
        return {"skipped": why}
    if transformers:
        theirs = as_transformers(model, config).to(dtype_of(autocast, device))

    def ours(B, new_tokens=NEW_TOKENS, **options):
        with autocast():
            rows = model.generate(prompts[:B], new_tokens, eot, temperature=0, **options)
        assert all(len(row) == new_tokens for row in rows)
        return B * new_tokens

    def uncached(B):
        """Every eighth token, each the whole pass that it takes: all would be minutes."""
        seen = range(4, NEW_TOKENS, 8)
        for t in seen:
            longer = [prompt + prompt[-1:] * t for prompt in prompts[:B]]
            with autocast():
                model.generate(longer, 1, eot, temperature=0, cached=False)
        return B * len(seen)

    results = {"rounds": SLOW_ROUNDS, "new_tokens": NEW_TOKENS, "batches": {}}
    print(f"\ngeneration, {NEW_TOKENS} new tokens a row, greedy, prompts of "
          f"{min(map(len, prompts[:64]))} to {max(map(len, prompts[:64]))} tokens\n"
          f"{'batch':>5}  {'':<16}{'ms a step':>12}{'tokens/s':>10}{'ours is faster by':>22}")
    for B in (1, 16, 64):
        arms: Arms = {"ours": lambda _, B=B: ours(B)}
        if B != 16:
            arms["without a cache"] = lambda _, B=B: uncached(B)
        if transformers:
            arms["transformers"] = lambda _, B=B: generate_theirs(
                theirs, prompts[:B], NEW_TOKENS, eot).numel()
        rounds = take_turns(arms, list(range(SLOW_ROUNDS + 1)), device)
        results["batches"][B] = {}
        for name, seen in rounds.items():
            rates = quartiles_of(rate(seen))
            faster = None if name == "ours" else quartiles_of(rate(rounds["ours"]) / rate(seen))
            results["batches"][B][name] = {"tokens_per_second": rates, "ours_is_faster_by": faster}
            print(f"{B:>5}  {name:<16}{1e3 * B / rates['median']:>12.1f}{rates['median']:>10,.0f}"
                  f"{shown(faster) if faster else '':>22}")
    if not transformers:
        print(NO_TRANSFORMERS)
    return results


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


def loading(config: Config, data: Data, device, autocast, argv) -> dict:
    """From a file to the first batch in fresh processes: cold, and warm with its tokens on disk.
    Then files of more and more pairs, 20 words each."""
    argv = [arg if arg.startswith("--") else str(find_recipe(arg).resolve()) for arg in argv]
    own = []  # a fresh process runs in another folder
    if config.dataset.endswith((".jsonl", ".txt")):
        own = [f"--dataset={Path(config.dataset).resolve()}"]
    elif files := jsonl_files(config):
        own = [f"--data_dir={files['train'].resolve().parent}"]
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    results = {"rounds": SLOW_ROUNDS}
    print(f"\nfrom file to first batch{'':<8}{'training pairs':>16}{'cold, s':>10}{'warm, s':>10}"
          f"{'peak, MB':>12}{'warm':>8}")
    with tempfile.TemporaryDirectory() as folder:
        sets = {data.provenance["dataset"]: own}
        for n in ROWS:
            sets[f"{n:,} pairs"] = [f"--dataset={make_pairs(Path(folder) / f'{n}.jsonl', n)}"]
        for name, options in sets.items():
            seen = {"cold": [], "warm": []}
            for _ in range(SLOW_ROUNDS):
                shutil.rmtree(Path(folder) / "out", ignore_errors=True)
                for rounds in seen.values():
                    done = subprocess.run(
                        [sys.executable, "-c", FRESH, *argv, *options], capture_output=True,
                        text=True, cwd=folder, env={**os.environ, "PYTHONPATH": path},
                    )  # fmt: skip
                    if done.returncode:
                        fail(f"a fresh process could not load: {done.stderr.strip()[-200:]}")
                    seconds, peak, n_pairs = json.loads(done.stdout.splitlines()[-1])
                    rounds.append((seconds, peak / (1e6 if sys.platform == "darwin" else 1e3)))
            results[name] = {"pairs": n_pairs}
            for state, rounds in seen.items():
                seconds, megabytes = zip(*rounds)
                results[name][state] = {"seconds": quartiles_of(seconds),
                                        "MB": quartiles_of(megabytes)}  # fmt: skip
            cold, warm = results[name]["cold"], results[name]["warm"]
            print(f"{name:<32}{n_pairs:>16,}{cold['seconds']['median']:>10.2f}"
                  f"{warm['seconds']['median']:>10.2f}{cold['MB']['median']:>12,.0f}"
                  f"{warm['MB']['median']:>8,.0f}")
    return results


def make_pairs(path: Path, n: int) -> Path:
    """A file of n pairs of made-up words, all different."""
    r = random.Random(0)
    words = [a + b for a in "bcdfghklmnprst" for b in ("ar", "en", "il", "od", "un", "ast", "ell")]
    with open(path, "w") as file:
        for i in range(n):
            row = {"text": f"{' '.join(r.choices(words, k=12))} {i}",
                   "code": f"{i} {' '.join(r.choices(words, k=8))}"}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return path


# --- curves -----------------------------------------------------------------------------------


def curves(config: Config, data: Data, device, autocast, argv) -> dict:
    """A step's time as rows grow longer and as there are more of them."""
    V = data.tokenizer.vocab_size
    shapes = [(TOKENS // T, T) for T in LENGTHS] + [(B, LENGTHS[1]) for B in BATCHES]
    config = replace(config, block_size=max(LENGTHS) + config.n_pred, dropout=0.0,
                     gradient_accumulation_steps=1, jepa_dropout=0.0)  # fmt: skip
    torch.manual_seed(config.seed)
    model = GPT(config, V, data.pairs["train"].layout.parents).to(device)
    optimizer = make_optimizer(model, config)
    arms: Arms = {}
    for B, T in shapes:  # text and code are a half each
        rng = np.random.default_rng(0)
        half, starts = T // 2, np.arange(B)[:, None] * T
        pairs = Pairs(
            rng.integers(V, size=B * T, dtype=np.int32), np.ones(B * T, bool),
            starts + np.array([0, half, half]), np.tile([half, T - half, T - half], (B, 1)),
            np.full(B, half), replace(config, batch_size=B), V,
        )  # fmt: skip

        def step(_, pairs=pairs):
            n_tokens = forward_backward(model, pairs, 0, device, autocast)[1]
            update(model, optimizer, config)
            return n_tokens

        arms[f"{B} x {T}"] = step
    rounds = take_turns(arms, list(range(SLOW_ROUNDS + 1)), device)
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


# --- profile ----------------------------------------------------------------------------------


def profile(config: Config, data: Data, device, autocast, argv) -> dict:
    """Seconds of a step's parts, by hooks on the model in the step that train.py runs."""
    pairs = data.pairs["train"]
    torch.manual_seed(config.seed)
    model = GPT(config, data.tokenizer.vocab_size, pairs.layout.parents).to(device)
    optimizer = make_optimizer(model, config)
    stamps, n_labels = [], 0

    def stamp(*_):
        if device.type == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    def at_output_layer(module, inputs):
        nonlocal n_labels
        stamp()
        n_labels = len(inputs[0])
        if inputs[0].requires_grad:  # called once its gradient, and the layer's weights', is done
            inputs[0].register_hook(stamp)

    model.register_forward_pre_hook(stamp)
    model.register_forward_hook(stamp)
    model.lm_head.register_forward_pre_hook(at_output_layer)
    phases = ("data", "trunk, forward", "output layer and loss, forward",
              "output layer and loss, backward", "trunk, backward", "clipping and optimizer")

    # One batch packed into one row per example, or hooks would see two passes.
    arms = {"CE only": dict(jepa_weight=0.0),
            "JEPA": dict(jepa_weight=config.jepa_weight or 1.0, jepa_dropout=0.0, stop_grad=False,
                         ema=0.0)}  # fmt: skip
    arms = {name: replace(pairs, config=replace(config, gradient_accumulation_steps=1, **options))
            for name, options in arms.items()}  # fmt: skip
    dtype = dtype_of(autocast, device)
    ceilings = {n: torch.randn(2, n, n, device=device).to(dtype).unbind() for n in (1024, 2048)}
    seen, trunk_flops = {name: [] for name in arms}, {name: [] for name in arms}
    ceiling = []
    for number in range(ROUNDS + 1):
        for name, own in arms.items():
            stamps.clear()
            stamp()
            *_, flops = forward_backward(model, own, number, device, autocast)
            stamp()
            update(model, optimizer, config)
            stamp()
            seen[name].append(np.diff(stamps))
            # The output layer: three products of 2 C V operations a label.
            trunk_flops[name].append(flops - 6 * model.lm_head.weight.numel() * n_labels)
        best = 0.0
        for n, (a, b) in ceilings.items():
            for _ in range(3):
                stamps.clear()
                stamp()
                a @ b
                stamp()
                best = max(best, 2 * n**3 / (stamps[1] - stamps[0]))
        ceiling.append(best)

    results = {"rounds": ROUNDS, "ceiling_flops_per_second": quartiles_of(ceiling[1:]),
               "ceiling_dtype": str(dtype), "arms": {}}  # fmt: skip
    for name, own in arms.items():
        seconds = np.array(seen[name][1:])  # (rounds, phases)
        assert seconds.shape[1] == len(phases)
        speed = np.array(trunk_flops[name][1:]) / seconds[:, [1, 4]].sum(1)
        blocks = own.layout.row if name == "JEPA" else own.layout.plain
        batches = [own.pack(own.batch(i), blocks, name == "JEPA").block
                   for i in range(len(own) // config.batch_size)]
        padding = sum((b == PAD).sum().item() for b in batches) / sum(b.numel() for b in batches)
        results["arms"][name] = {
            "seconds": {p: quartiles_of(s) for p, s in zip(phases, seconds.T)},
            "share": {p: quartiles_of(s) for p, s in zip(phases, (seconds.T / seconds.sum(1)))},
            "padding": padding, "trunk_flops_per_second": quartiles_of(speed),
            "trunk_over_ceiling": quartiles_of(speed / np.array(ceiling[1:])),
        }  # fmt: skip
    print(f"\nwhere a step's time goes, ms (share)\n{'':<34}"
          + "".join(f"{name:>18}" for name in arms))
    for phase in phases:
        cells = [f"{1e3 * a['seconds'][phase]['median']:,.0f} ({a['share'][phase]['median']:.1%})"
                 for a in results["arms"].values()]
        print(f"{phase:<34}" + "".join(f"{cell:>18}" for cell in cells))
    for title, cell in (
        ("padding, over an epoch", lambda a: f"{a['padding']:.1%}"),
        ("trunk, GFLOP/s", lambda a: f"{a['trunk_flops_per_second']['median'] / 1e9:,.0f}"),
        ("of the fastest matrix product", lambda a: shown(a["trunk_over_ceiling"])),
    ):
        print(f"{title:<34}" + "".join(f"{cell(a):>18}" for a in results["arms"].values()))
    print(f"fastest matrix product, {dtype}: {statistics.median(ceiling[1:]) / 1e9:,.0f} GFLOP/s")
    return results


if __name__ == "__main__":
    exit_quietly(main)
