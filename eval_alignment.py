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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignment import alignment, held_out_batches, verdict
from config import fail, parse_args, what
from data import Data
from jepa import OBJECTIVES, cosines, off_diagonal
from model import Trunk, block_ends, read_hidden
from plumbing.alignment_plots import Models, draw_pairs, draw_panel
from plumbing.files import read_records, write_figure, write_json
from plumbing.linear_map import difference_spectrum, linear_r2
from plumbing.processes import pick_device, run_main, versions
from plumbing.stats import mean_sd, plus_minus
from run import Run, data_of, load_run, make_model, runs_newest_first
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


def main(argv: list[str]) -> None:
    usage = f"python eval_alignment.py [RUN ...] [--key=value ...]\n\n{__doc__}"
    values, names = parse_args(Args, argv, usage)
    args = Args(**values)
    if args.split not in ("val", "test") or args.n_pairs < 2:
        fail(f"split={args.split} must be val or test, and n_pairs={args.n_pairs} at least 2")
    if args.pairs_seed < 0:
        fail(f"pairs_seed={args.pairs_seed} must not be below 0")
    device, autocast = pick_device(args.device, args.dtype)
    paths = [Path(name) for name in names] or same_data(runs_newest_first())

    measured, floor, first_texts, data = [], None, None, None
    for path in paths:
        run = load_run(path, device)
        digest = data and data.provenance["train_sha256"]
        data = data_of(run, args.data_dir)
        if digest not in (None, data.provenance["train_sha256"]):
            fail(f"{run.path} was trained on other data than {paths[0]}: compare runs on one set")
        pairs = chosen_pairs(data, args)
        texts = [[run.tokenizer.decode(pairs.view(example, view)) for view in (TEXT, CODE)]
                 for example in range(len(pairs))]  # fmt: skip
        if texts != (first_texts := first_texts or texts):
            print(f"note: {run.name} is measured on other pairs than {measured[0].numbers['name']} "
                  "(views or block_size differ)")
        m = measure(run, pairs, autocast)
        m.curve = [r for r in read_records(run.path.parent / "metrics.jsonl") if "val_ce" in r]
        m.n_eval = min(run.config.eval_pairs, len(data.pairs["val"]))
        measured.append(m)
        floor = floor or measure(untrained(run), pairs, autocast)
    # JEPA first, then the baselines, then the floor
    measured.sort(key=lambda m: m.numbers["jepa_weight"] == 0)
    models = [*by_settings(measured), ("untrained", [floor])]
    write_results(paths[0], models, args, data.provenance)


def write_results(first_path: Path, models: Models, args: Args, data: dict[str, Any]) -> None:
    """alignment.json, both figures and both tables."""
    n = len(models[-1][1][0].cosines)
    about = {"split": args.split, "n_pairs": n, "pairs_seed": args.pairs_seed, "data": data,
             **versions()}  # fmt: skip
    folder = (first_path if first_path.is_dir() else first_path.parent).resolve().parent
    write_json(folder / "alignment.json", {
        **about, "models": [m.numbers for _, group in models for m in group],
        "over_seeds": over_seeds(models)})  # fmt: skip
    first, second = tables(models)
    write_figure(folder / "alignment.png", draw_pairs(models, first, about))
    write_figure(folder / "alignment_panel.png", draw_panel(models, second, about))
    print(f"\n{n} held-out pairs of {data['dataset']} ({args.split}); retrieval@1 by chance "
          f"{1 / n:.3f}")
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


def chosen_pairs(data: Data, args: Args) -> Pairs:
    """n_pairs of the split (all, if it has fewer): the first, or a random choice with a seed."""
    pairs, source = data.pairs.get(args.split), data.provenance["source"]
    if pairs is not None:
        n, rng = min(args.n_pairs, len(pairs)), np.random.default_rng(args.pairs_seed)
        at = rng.choice(len(pairs), n, replace=False) if args.pairs_seed else np.arange(n)
        pairs = pairs.take(at)
    if pairs is None or pairs.has_target(np.arange(len(pairs))).sum() < 2:
        fail(f"{source} has fewer than 2 {args.split} pairs")
    return pairs


def untrained(run: Run) -> Run:
    """The same network before its first step: the floor."""
    torch.manual_seed(run.config.seed)
    model = make_model(run.config, run.tokenizer.vocab_size).to(run.model.device)
    return replace(run, name="untrained", model=model.eval(), step=0)


def measure(run: Run, pairs: Pairs, autocast) -> Measured:
    """The whole panel for one model; step 0 is an untrained one."""
    ce, layers = embed_layers(run.model, pairs, autocast)
    by_layer = [alignment(pred, code) for _, code, pred in layers]
    keys = ("matched", "mismatched", "effective_rank_pred", "effective_rank_target")
    text, code, pred = layers[-1]
    panel = collapse_panel(pred, text, code)
    numbers = {
        "name": run.name, "step": run.step,
        "jepa_weight": run.config.jepa_weight if run.step else None,
        "seed": run.config.seed, "ce": ce, **panel, "pairs": verdict(panel),
        "layers": {key: [measures[key] for measures in by_layer] for key in keys},
    }  # fmt: skip
    settings = {**what(run.config), "seed": None, "step": run.step}
    return Measured(numbers, cosines(pred, code), layers[-1], str(settings))


@torch.no_grad()
def embed_layers(trunk: Trunk, pairs: Pairs, autocast):
    """Cross-entropy and, layer by layer, Enc(text), Enc(code) and Pred(text) of the pairs.

    It is alignment.embed_pairs with an ear at every layer (a test compares them). Enc(text) is the
    view that Pred continues, encoded alone.

    Returns: mean cross-entropy per label in nats; (layers + 1, 3, m, C) float32 on the CPU for the
    m pairs that have both views: after the embeddings, then after each layer, all read through the
    final norm as the last one is.
    """
    config, objective = pairs.config, OBJECTIVES[pairs.config.objective]
    text_block = pairs.layout.parents[PRED] or TEXT
    has_target = pairs.has_target(np.arange(len(pairs)))
    encoded, ce, n_labels = None, 0.0, 0
    for at, batch in held_out_batches(pairs, len(pairs)):
        batch, streams = batch.to(trunk.device), []
        with autocast():
            read = objective.reads(batch.block, config) | block_ends(batch.block)
            last, ce_sum = trunk(batch, read, streams)
        ce, n_labels = ce + ce_sum.item(), n_labels + (batch.targets != -1).sum().item()
        if encoded is None:
            encoded = torch.empty(len(streams) + 1, 3, len(pairs), trunk.width)
        for layer, hidden in enumerate([*streams, last]):
            text = read_hidden(hidden, batch.block, text_block, config.pooling)
            pred, code = objective.views(hidden, batch.block, config)
            for view, read in enumerate((text, code, pred)):
                encoded[layer, view, at] = read.float().cpu()
    return ce / n_labels, encoded[:, :, has_target]


def collapse_panel(
    pred: torch.Tensor, text: torch.Tensor, target: torch.Tensor
) -> dict[str, float | str | list[float]]:
    """Every measure there is on N pairs: Pred(text), Enc(text) and Enc(code), (N, C) each.

    To `alignment` of pred and target it adds the cosines within each of the two, and for
    Enc(text) and Enc(code), as in the paper, `linear_r2` and `difference_spectrum`; both once
    more for shuffled pairs, since collapse makes right and wrong pairs alike.
    """
    r2, flaw = linear_r2(text, target)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(text), generator=generator) for _ in range(5)]
    return {
        **alignment(pred, target),
        "within_pred": within_cosine(pred), "within_target": within_cosine(target),
        "linear_r2": r2, "linear_r2_flaw": flaw,
        "linear_r2_shuffled": sum(linear_r2(text, target[order])[0] for order in orders) / 5,
        "singular_values": difference_spectrum(text, target),
        "singular_values_shuffled": difference_spectrum(text, target[orders[0]]),
    }  # fmt: skip


def within_cosine(x: torch.Tensor) -> float:
    """Mean cosine of two different rows of one view (N, C): 1 when all of them point one way."""
    return off_diagonal(cosines(x.float(), x.float())).mean().item()


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
            cells = [plus_minus(row["mean"][k], row["sd"][k], d) for k, (_, d) in columns.items()]
            counted = [f"{n} {word}" for word, n in Counter(words).items()]
            said = words[0] if len(counted) == 1 else ", ".join(counted)
            table.append([name, str(len(group)), *cells, said])
    return [first, second]


if __name__ == "__main__":
    run_main(main)
