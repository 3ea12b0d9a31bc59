"""How fast is it, on this machine, and against what?

    python -m lab.bench --quick          the five ratios that matter, in two or three minutes
    python -m lab.bench [RECIPE] [--key=value ...] [--parts=training,generation,...]
    python -m lab.bench A.json B.json    prints the results of several machines side by side

training    a JEPA step over a plain one; against nanoGPT's step and the official two-row one
generation  against recomputing every token, and against transformers on the same weights
data        from a file to the first batch in a fresh process, up to a million pairs
curves      a step's time against the length and the number of rows
profile     where a step's time goes; the trunk's FLOP/s against the fastest matrix product here

What is compared takes turns in one process, so that a machine whose speed drifts slows all alike;
figures are medians over the rounds, ratios are taken within a round and carry their quartiles.
Prints a table per part and writes out/bench.json (--quick: out/bench-quick.json). No arm runs in a
dtype that the device only emulates. transformers, which only the comparisons with it need, is not
in requirements.txt; without it they are left out.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from config import Config, fail, load_config, parse_args
from data import load_data
from generate import generate
from lab import bench_tables, timing
from lab.bench_loading import loading
from lab.bench_profile import profile
from lab.peers import (
    EXAMPLES,
    as_transformers,
    generate_theirs,
    nanogpt_step,
    official_step,
    padded_to_block_size,
    peer_of,
    transformers,
)
from lab.timing import (
    Arms,
    Setup,
    dtype_of,
    dtypes,
    quartiles_of,
    rate,
    start_training,
    take_turns,
    untrained,
    with_config,
    with_pairs,
)
from model import Trunk, block_causal_mask
from plumbing.files import write_json
from plumbing.processes import pick_device, run_main, versions
from train import Training, train_step
from views import CODE, TEXT, Pairs

NO_TRANSFORMERS = "transformers is not installed: left out what is compared with it"
NO_BF16 = "left out the arms in bf16: {} is not known to have instructions for it"

NEW_TOKENS = 128
QUICK_NEW_TOKENS = 32
TOKENS = 2048  # of a step whose rows have one of these lengths
LENGTHS = (64, 128, 256, 512, 1024)
BATCHES = (4, 8, 32, 64)
USAGE = """python -m lab.bench [RECIPE] [--key=value ...] [--quick] [--parts=a,b,...]
       python -m lab.bench A.json B.json ...   (results side by side)
parts: {}; all by default; --quick is two or three minutes"""


def main(argv: list[str]) -> None:
    known = {"training": training, "generation": generation, "data": loading, "curves": curves,
             "profile": profile}
    if {"-h", "--help"} & set(argv):
        parse_args(Config, ["--help"], USAGE.format(", ".join(known)))
    if argv and all(arg.endswith(".json") for arg in argv):
        return bench_tables.side_by_side([Path(arg) for arg in argv])
    wanted = [arg.removeprefix("--parts=") for arg in argv if arg.startswith("--parts=")]
    is_quick = "--quick" in argv
    if is_quick and wanted:
        fail(f"--quick and --parts={wanted[-1]}: give one of them")
    parts = wanted[-1].split(",") if wanted else list(known)
    if set(parts) - set(known):
        fail(f"--parts={','.join(parts)}: the parts are {', '.join(known)}")
    if is_quick:
        known, parts = {"quick": quick}, ["quick"]
    argv = [arg for arg in argv if not arg.startswith("--parts=") and arg != "--quick"]
    config = load_config(argv)
    if config.objective != "pair":  # with and without stop_grad, against the official recipe
        fail(f"objective={config.objective}: what is compared here are the steps of pair")
    device, autocast = pick_device(config.device, config.dtype)
    about, dtype = timing.machine(device), dtype_of(autocast, device)
    if device.type == "cpu" and dtype not in dtypes(device).values():
        fail(f"dtype={config.dtype} is only emulated by {about['processor']}: --dtype=float32")
    data = load_data(config)
    about = {"config": asdict(config), "data": data.provenance, **about,
             "dtype": str(dtype).removeprefix("torch."), **versions()}  # fmt: skip
    print(f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, torch "
          f"{about['torch']}, transformers {about['transformers']}, commit {about['commit']}")
    if not about["has_bf16"]:
        print(NO_BF16.format(about["processor"]))
    path, results = Path(f"out/bench{'-quick' * is_quick}.json"), {}
    for part in parts:
        results[part] = known[part](Setup(config, data, device, autocast, argv))
        write_json(path, {**about, "parts": results})
    print(f"\nwrote {path}")


# --- training ---------------------------------------------------------------------------------


def training(setup: Setup) -> dict:
    """Steps of our variants, then steps of the peers beside two of ours, on the same examples."""
    config, device = setup.config, setup.device
    t, variants = start_training(setup, config), variants_of(config)
    done = {}  # tokens of each variant's latest step: nanoGPT's are made as large

    def ours(name):
        train = step_with(with_config(t, variants[name]))

        def step(number):
            done[name] = train(number)
            return done[name]

        return step

    arms: Arms = {name: ours(name) for name in variants}
    half = replace(t.pairs, config=variants["JEPA, stop_grad, dropout .5"])
    steps = steps_by_turns(half)
    rounds = take_turns("variants", arms, [steps[-1], *steps[: timing.ROUNDS]], device)

    against: Arms = {name: arms[name] for name in ("CE only", "JEPA")}
    for name, dtype in dtypes(device).items():
        against[f"nanoGPT, {name}"] = nanogpt_step(
            t.pairs, config, lambda: done["CE only"], device, dtype
        )
        if transformers and config.views == "pairs":
            against[f"official two rows, {name}"] = official_step(
                t.pairs, variants["JEPA"], device, dtype
            )
    peers = take_turns("peers", against, [steps[-1], *steps[: timing.SLOW_ROUNDS]], device)

    # nanoGPT has a label at every token, our rows at the answer's only: part of the difference.
    examples = np.concatenate([half.batch(step) for step in steps[: timing.ROUNDS]])
    lengths = half.lengths[examples]
    answers = lengths[:, CODE - 1].sum() / lengths[:, [TEXT - 1, CODE - 1]].sum()
    seen = {**peers, **rounds}
    results = {
        "rounds": timing.ROUNDS, "share_of_answers": float(answers),
        "arms": {name: arm_result(name, seen[name], rounds) for name in seen},
        "ratios": {f"{ours_is} over {peer}": faster(peers[ours_is], peers[peer])
                   for peer, ours_is in compared(peers)},
    }  # fmt: skip
    bench_tables.print_training(results)
    if not transformers:
        print(NO_TRANSFORMERS)
    elif config.views != "pairs":
        print(f"the official recipe trains on pairs, not {config.views}: left out")
    return results


def step_with(t: Training) -> Callable[[int], int]:
    """An arm: a step of training, which gives its tokens."""
    return lambda number: train_step(t, number)["tokens"]


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


def faster(ours: np.ndarray, theirs: np.ndarray) -> dict:
    """How many times the tokens per second of theirs ours has."""
    return quartiles_of(rate(ours) / rate(theirs))


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


# --- generation -------------------------------------------------------------------------------


def generation(setup: Setup) -> dict:
    """Greedy, on untrained weights; no token is an end of text, so that all rows run to the end."""
    prompts, why = some_prompts(setup, 64, NEW_TOKENS)
    if why:
        print(f"\ngeneration {why}")
        return {"skipped": why}
    model, theirs = untrained(setup, setup.config).eval(), None
    if transformers:
        theirs = as_transformers(model, setup.config).to(dtype_of(setup.autocast, setup.device))

    lengths = [len(prompt) for prompt in prompts]
    results = {"rounds": timing.SLOW_ROUNDS, "new_tokens": NEW_TOKENS,
               "prompt_tokens": [min(lengths), max(lengths)], "batches": {}}  # fmt: skip
    for B in (1, 16, 64):
        arms = generation_arms(setup, model, prompts[:B], NEW_TOKENS)
        if B == 16:
            del arms["without a cache"]
        if theirs:
            eot = setup.data.tokenizer.eot
            arms["transformers"] = lambda _, rows=prompts[:B], eot=eot: generate_theirs(
                theirs, rows, NEW_TOKENS, eot).numel()  # fmt: skip
        steps = list(range(timing.SLOW_ROUNDS + 1))
        rounds = take_turns(f"generation, batch {B}", arms, steps, setup.device)
        results["batches"][B] = {
            name: {"tokens_per_second": quartiles_of(rate(seen)),
                   "ours_is_faster_by": None if name == "ours" else faster(rounds["ours"], seen)}
            for name, seen in rounds.items()
        }  # fmt: skip
    bench_tables.print_generation(results)
    if not transformers:
        print(NO_TRANSFORMERS)
    return results


def some_prompts(setup: Setup, n: int, new_tokens: int) -> tuple[list[list[int]], str]:
    """n held-out questions that leave room for new_tokens; or why there are not as many."""
    held_out, block_size = setup.data.pairs["val"], setup.config.block_size
    room = block_size - new_tokens
    prompts = [held_out.view(example, TEXT) for example in range(len(held_out))]
    prompts = [prompt for prompt in prompts if len(prompt) <= room]
    if len(prompts) >= n:
        return prompts[:n], ""
    return [], (f"left out: needs {n} held-out questions of at most {room} tokens (block_size less "
                f"{new_tokens}), got {len(prompts)}")  # fmt: skip


def generation_arms(
    setup: Setup, model: Trunk, prompts: list[list[int]], new_tokens: int
) -> Arms:
    """Our ways to continue these prompts by new_tokens each."""
    B = len(prompts)

    def ours(_):
        with setup.autocast():  # the end of text is an id that cannot be drawn
            rows = generate(model, prompts, new_tokens, eot=model.vocab_size)
        assert all(len(row) == new_tokens for row in rows)
        return B * new_tokens

    def uncached(_):
        """Every eighth token, each the whole pass that it takes: all would be minutes."""
        seen = range(4, new_tokens, 8)
        for t in seen:
            with setup.autocast():
                next_tokens(model, [prompt + prompt[-1:] * t for prompt in prompts])
        return B * len(seen)

    return {"ours": ours, "without a cache": uncached}


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


# --- curves -----------------------------------------------------------------------------------


def curves(setup: Setup) -> dict:
    """A step's time as rows grow longer and as there are more of them."""
    config = replace(setup.config, block_size=max(LENGTHS) + setup.config.n_pred, dropout=0.0,
                     gradient_accumulation_steps=1, jepa_dropout=0.0, ema=0.0)  # fmt: skip
    t = start_training(setup, config)

    def step_of(B, T):
        own = with_pairs(t, made_up(config, setup.data.tokenizer.vocab_size, B, T))
        return step_with(own)

    shapes = [(TOKENS // T, T) for T in LENGTHS] + [(B, LENGTHS[1]) for B in BATCHES]
    arms: Arms = {f"{B} x {T}": step_of(B, T) for B, T in shapes}
    rounds = take_turns("curves", arms, list(range(timing.SLOW_ROUNDS + 1)), setup.device)
    long, longer = (f"{TOKENS // T} x {T}" for T in LENGTHS[-2:])
    power = 1 + quartiles_of(np.log2(rate(rounds[long]) / rate(rounds[longer])))["median"]
    shapes = {name: {"ms": quartiles_of(1e3 * seen[:, 0]),
                     "us_per_token": quartiles_of(1e6 * seen[:, 0] / seen[:, 1])}
              for name, seen in rounds.items()}  # fmt: skip
    results = {"rounds": timing.SLOW_ROUNDS, "shapes": shapes, "power_of_length": power}
    bench_tables.print_curves(results)
    return results


def made_up(config: Config, vocab_size: int, B: int, T: int) -> Pairs:
    """One batch of B pairs of random tokens; text and code are a half of T each."""
    half, starts = T // 2, np.arange(B)[:, None] * T
    return Pairs(
        np.random.default_rng(0).integers(vocab_size, size=B * T, dtype=np.int32),
        np.ones(B * T, bool), starts + np.array([0, half, half]),
        np.tile([half, T - half, T - half], (B, 1)), np.full(B, half), np.zeros((B, 2), int),
        replace(config, batch_size=B), vocab_size,
    )  # fmt: skip


# --- the quick look ---------------------------------------------------------------------------


def quick(setup: Setup) -> dict:
    """The ratios that matter. Rows of other kinds and ours step on the same
    EXAMPLES examples, so that rows are compared and not batches."""
    config, device, variants = setup.config, setup.device, variants_of(setup.config)
    few = replace(variants["JEPA"], batch_size=EXAMPLES, gradient_accumulation_steps=1)
    t = start_training(setup, config)
    ours = with_config(t, few)
    arms: Arms = {
        "CE only": step_with(with_config(t, variants["CE only"])),
        "JEPA": step_with(with_config(t, variants["JEPA"])),
        "one row": step_with(ours),
        "the same row padded": step_with(with_pairs(t, padded_to_block_size(ours.pairs))),
    }
    left_out = []
    if not transformers:
        left_out.append(NO_TRANSFORMERS)
    elif config.views != "pairs":
        left_out.append(f"the official recipe trains on pairs, not {config.views}: left out")
    else:
        dtype = dtype_of(setup.autocast, device)
        for name, padded in (("two rows", False), ("two rows padded", True)):
            peer = peer_of(t.model, few)  # the same weights
            arms[name] = official_step(ours.pairs, few, device, dtype, padded, peer)
    steps = list(range(timing.QUICK_ROUNDS + 1))
    rounds = take_turns("training", arms, steps, device)
    ratios = {"JEPA step over CE-only step, time":
              quartiles_of(rounds["JEPA"][:, 0] / rounds["CE only"][:, 0])}  # fmt: skip
    for name in [name for name in arms if name not in ("CE only", "JEPA", "one row")]:
        to = f" to {config.block_size}" if name.endswith("padded") else ""
        ratios[f"one row over {name}{to}, speed"] = faster(rounds["one row"], rounds[name])

    prompts, why = some_prompts(setup, 16, QUICK_NEW_TOKENS)
    if why:
        left_out.append(f"generation {why}")
    else:
        ways = generation_arms(setup, untrained(setup, config).eval(), prompts, QUICK_NEW_TOKENS)
        spoken = take_turns("generation", ways, steps, device)
        ratios["generation, batch 16: cached over not, speed"] = faster(*spoken.values())
    seconds = {name: statistics.median(seen[:, 0]) for name, seen in rounds.items()}
    results = {"rounds": timing.QUICK_ROUNDS, "seconds": seconds, "ratios": ratios,
               "left_out": left_out}  # fmt: skip
    bench_tables.print_quick(results)
    return results


if __name__ == "__main__":
    run_main(main)
