"""Do the two views of a held-out pair meet, or has the model collapsed? Figures and their numbers.

    python eval_alignment.py              every run under out/ on the newest run's data
    python eval_alignment.py RUN ...      these runs (folders or checkpoint files)

Writes alignment.png, alignment_panel.png and alignment.json beside the runs. It only evaluates, it
never trains. Runs that differ in nothing but their seed are one model: mean and sd. An
untrained model of the first run's size is measured as the floor: a cosine means nothing without
the cosine of mismatched pairs, and neither means much without what no training at all gives.
"""

import itertools
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config, fail, parse_args
from draw_alignment import draw_pairs, draw_panel
from jepa import alignment, collapse_panel, cosines, verdict
from model import GPT, read_hidden
from run import (
    data_of,
    exit_quietly,
    load_run,
    pick_device,
    read_records,
    runs_newest_first,
    versions,
)
from sweep import mean_sd, number
from views import CODE, PRED, TEXT, Pairs

FIRST_TABLE = {  # measure: title, digits
    "ce": ("CE", 3), "matched": ("matched", 3), "mismatched": ("mismatched", 3),
    "retrieval_at_1": ("retrieval@1", 3), "mean_rank": ("mean rank", 1),
    "effective_rank_pred": ("rank pred", 1), "effective_rank_target": ("rank target", 1),
}  # fmt: skip
SECOND_TABLE = {
    "within_pred": ("within pred", 3), "within_target": ("within target", 3),
    "linear_r2": ("linear R²", 3), "linear_r2_shuffled": ("shuffled R²", 3),
}  # fmt: skip


@dataclass(frozen=True)
class Args:
    # which pairs
    split: str = "val"  # val | test; choose on val, report on test
    n_pairs: int = 256  # held-out pairs, the same for every run of the same views
    pairs_seed: int = 0  # 0: the first n_pairs of the split; else a random choice with this seed
    data_dir: str = ""  # folder of the data, if it is no longer where the runs found it
    # how
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16


@dataclass
class Measured:
    """One model on the held-out pairs."""

    numbers: dict[str, Any]  # what alignment.json holds
    cosines: torch.Tensor  # (n, n) every pred with every target
    views: torch.Tensor  # (3, n, C) Enc(text), Enc(code), Pred(text)
    settings: str  # the config, less what seeds of one recipe may differ in
    curve: list[dict] = field(default_factory=list)  # evaluations in training, of metrics.jsonl
    n_eval: int = 0  # pairs in each of those


Models = list[tuple[str, list[Measured]]]  # a name, and a Measured for every seed


def main(argv: list[str]) -> None:
    values, names = parse_args(Args, argv, "python eval_alignment.py [RUN ...] [--key=value ...]")
    args = Args(**values)
    if args.split not in ("val", "test") or args.n_pairs < 2:
        fail(f"split={args.split} must be val or test, and n_pairs={args.n_pairs} at least 2")
    if args.pairs_seed < 0:
        fail(f"pairs_seed={args.pairs_seed} must not be below 0")
    device, autocast = pick_device(args.device, args.dtype)
    paths = [Path(name) for name in names] or same_data(runs_newest_first())

    measured, floor, digest, first = [], None, None, None
    for path in paths:
        run = load_run(path, device)
        data = data_of(run, args.data_dir)
        if digest not in (None, data.provenance["train_sha256"]):
            fail(f"{run.path} was trained on other data than {paths[0]}: compare runs on one set")
        digest = data.provenance["train_sha256"]
        pairs = data.pairs.get(args.split)
        pairs = choose(pairs, args.n_pairs, args.pairs_seed) if pairs is not None else None
        if pairs is None or pairs.has_target(np.arange(len(pairs))).sum() < 2:
            fail(f"{data.provenance['source']} has fewer than 2 {args.split} pairs")
        shown = [[run.tokenizer.decode(pairs.view(row, view)) for view in (TEXT, CODE)]
                 for row in range(len(pairs))]  # fmt: skip
        first = first or shown
        if shown != first:
            print(f"note: {run.name} is measured on other pairs than {measured[0].numbers['name']} "
                  "(views or block_size differ)")
        m = measure(run.name, run.model, run.config, run.step, pairs, device, autocast)
        m.curve = [r for r in read_records(run.path.parent / "metrics.jsonl") if "val_ce" in r]
        m.n_eval = min(run.config.eval_pairs, len(data.pairs["val"]))
        measured.append(m)
        if floor is None:
            torch.manual_seed(run.config.seed)
            untrained = GPT(run.config, run.tokenizer.vocab_size, pairs.layout.parents).to(device)
            floor = measure("untrained", untrained, run.config, 0, pairs, device, autocast)
    # JEPA first, then the baselines, then the floor
    measured.sort(key=lambda m: m.numbers["jepa_weight"] == 0)
    models = [*by_settings(measured), ("untrained", [floor])]

    n = len(floor.cosines)
    about = {"split": args.split, "n_pairs": n, "pairs_seed": args.pairs_seed,
             "data": data.provenance, **versions()}  # fmt: skip
    folder = (paths[0] if paths[0].is_dir() else paths[0].parent).resolve().parent
    results = {**about, "models": [m.numbers for m in [*measured, floor]],
               "over_seeds": over_seeds(models)}  # fmt: skip
    (folder / "alignment.json").write_text(json.dumps(results, indent=1) + "\n")
    first, second = tables(models)
    draw_pairs(models, first, about).savefig(folder / "alignment.png", dpi=110)
    draw_panel(models, second, about).savefig(folder / "alignment_panel.png", dpi=110)
    print(f"\n{n} held-out pairs of {data.provenance['dataset']} ({args.split}); retrieval@1 by "
          f"chance {1 / n:.3f}")
    for rows in (first, second):
        for cells in rows:
            print(f"{cells[0]:<24}" + "".join(f"{cell:>15}" for cell in cells[1:]))
        print()
    print(f"wrote {folder / 'alignment.png'}, alignment_panel.png and alignment.json")


# --- models -----------------------------------------------------------------------------------


def same_data(paths: list[Path]) -> list[Path]:
    """Of the runs, newest first, those that were trained on the same views of the same data as the
    first."""

    def digest(path: Path) -> tuple[str, str]:
        try:
            about = json.loads((path / "config.json").read_text())
            return about["provenance"]["data"]["train_sha256"], about["config"]["views"]
        except (OSError, ValueError, KeyError):
            return fail(f"{path}/config.json is missing or damaged; name the runs to compare")

    digests = {path: digest(path) for path in paths}
    return sorted(path for path in paths if digests[path] == digests[paths[0]])


def choose(pairs: Pairs, n: int, seed: int) -> Pairs:
    """n pairs of a split (all, if it has fewer): the first, or a random choice if seed is not 0."""
    n = min(n, len(pairs))
    at = np.random.default_rng(seed).choice(len(pairs), n, replace=False) if seed else np.arange(n)
    return replace(pairs, starts=pairs.starts[at], lengths=pairs.lengths[at], asked=pairs.asked[at])


def measure(name, model: GPT, config: Config, step, pairs, device, autocast) -> Measured:
    """The whole panel for one model; step 0 is an untrained one."""
    ce, layers = encode_layers(model, pairs, device, autocast)
    by_layer = [alignment(pred, code) for _, code, pred in layers]
    keys = ("matched", "mismatched", "effective_rank_pred", "effective_rank_target")
    text, code, pred = layers[-1]
    panel = collapse_panel(pred, text, code)
    numbers = {
        "name": name, "step": step, "jepa_weight": config.jepa_weight if step else None,
        "seed": config.seed, "ce": ce, **panel, "pairs": verdict(panel),
        "layers": {key: [measures[key] for measures in by_layer] for key in keys},
    }  # fmt: skip
    settings = asdict(replace(config, seed=0, out_dir="", device="", data_dir="", init_from=""))
    return Measured(numbers, cosines(pred, code), layers[-1], str((step, settings)))


@torch.no_grad()
def encode_layers(model: GPT, pairs: Pairs, device: torch.device, autocast):
    """Cross-entropy and, layer by layer, Enc(text), Enc(code) and Pred(text) of the pairs.

    It is run.encode_pairs with an ear at every layer (a test compares them). Enc(text) is the view
    that Pred continues, encoded alone.

    Returns: mean cross-entropy per label in nats; (n_layer + 1, 3, m, C) float32 on the CPU for the
    m pairs that have both views: after the embeddings, then after each layer, all read through the
    final norm as the last one is.
    """
    layout, pooling, n = pairs.layout, pairs.config.pooling, len(pairs)
    reads = (layout.parents[PRED] or TEXT, pooling), (layout.enc, pooling), (layout.pred, "last")
    order = np.argsort(pairs.lengths.sum(1), kind="stable")  # little padding
    has_target = pairs.has_target(np.arange(n))
    encoded = torch.empty(len(model.h) + 1, 3, n, pairs.config.n_embd)
    ce, n_labels, streams = 0.0, 0, []  # streams: of one batch, after each layer, (B, T, C)
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: streams.append(output))
        for module in (model.drop, *model.h[:-1])
    ]
    model.eval()
    for at in np.split(order, range(16, n, 16)):
        rows = pairs.pack(at, layout.row, has_target[at]).to(device)
        streams.clear()
        with autocast():
            last, ce_sum = model(*rows)
            ce, n_labels = ce + ce_sum.item(), n_labels + (rows.targets != -1).sum().item()
            for layer, hidden in enumerate([*map(model.ln_f, streams), last]):
                for view, (block, how) in enumerate(reads):
                    read = read_hidden(hidden, rows.block, block, how)
                    encoded[layer, view, at] = read.float().cpu()
    for hook in hooks:
        hook.remove()
    return ce / n_labels, encoded[:, :, has_target]


# --- seeds of one recipe ----------------------------------------------------------------------


def by_settings(measured: list[Measured]) -> Models:
    """Runs that differ in their seed alone are put together, in the order of the first of each."""
    groups: dict[Any, list[Measured]] = {}
    for m in measured:
        copy = 0  # two checkpoints of one seed are not two seeds
        while m.numbers["seed"] in (o.numbers["seed"] for o in groups.get((m.settings, copy), [])):
            copy += 1
        groups.setdefault((m.settings, copy), []).append(m)
    return [(common_name([m.numbers["name"] for m in group]), group) for group in groups.values()]


def common_name(names: list[str]) -> str:
    """What the names begin with, without what is left of a seed: run_s1, run_s2 -> run, and
    seed=1, seed=2 -> all seeds."""
    if len(names) == 1:
        return names[0]
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names))
    start = "".join(letters[0] for letters in same)
    return re.sub(r"[-_,.= ]*(seed|s)?[-_,.= ]*\d*$", "", start) or "all seeds"


def over_seeds(models: Models) -> list[dict[str, Any]]:
    """Mean and sample standard deviation (None for a single seed) of each model's measures."""
    rows = []
    for name, group in models:
        stats = {k: mean_sd([m.numbers[k] for m in group]) for k in {**FIRST_TABLE, **SECOND_TABLE}}
        rows.append({
            "name": name, "n": len(group), "seeds": [m.numbers["seed"] for m in group],
            "mean": {k: mean for k, (mean, _) in stats.items()},
            "sd": {k: sd for k, (_, sd) in stats.items()},
        })  # fmt: skip
    return rows


def tables(models: Models) -> list[list[list[str]]]:
    """Two tables, each a header and a row per model; what is said in words is counted."""
    first = [["model", "n", *(title for title, _ in FIRST_TABLE.values()), "pairs are"]]
    second = [["model", "n", *(title for title, _ in SECOND_TABLE.values()), "R² counts"]]
    for (name, group), row in zip(models, over_seeds(models)):
        pairs = [m.numbers["pairs"] for m in group]
        flaws = (m.numbers["linear_r2_flaw"] for m in group)
        counts = [f"no ({flaw})" if flaw else "yes" for flaw in flaws]
        for table, columns, words in (first, FIRST_TABLE, pairs), (second, SECOND_TABLE, counts):
            cells = [number(row["mean"][k], row["sd"][k], d) for k, (_, d) in columns.items()]
            counted = [f"{n} {word}" for word, n in Counter(words).items()]
            said = words[0] if len(counted) == 1 else ", ".join(counted)
            table.append([name, str(len(group)), *cells, said])
    return [first, second]


if __name__ == "__main__":
    exit_quietly(main)
