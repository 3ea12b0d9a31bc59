"""Do the two views of a held-out pair meet, or has the model collapsed? Figures and their numbers.

    python eval_alignment.py              every run under out/ on the newest run's data
    python eval_alignment.py RUN ...      these runs (folders or checkpoint files)

Writes alignment.png, alignment_panel.png and alignment.json beside the runs. It only evaluates, it
never trains. Runs that differ in nothing but their seed are one model: mean and sd. An
untrained model is measured as the floor: a cosine means nothing without the cosine of mismatched
pairs, and neither means much without what no training at all gives.

Runs of other sizes, tokenizers, views or pairs cannot share a floor. Each group that can has its
own tables, floor and figures: alignment.png and alignment_panel.png for the first, then
alignment-2.png and alignment_panel-2.png, and so on. One alignment.json holds all of them.
"""

import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from alignment import alignment, held_out_batches, target_groups, verdict
from config import fail, parse_args, what
from data import Data
from jepa import OBJECTIVES, cosines, wrong_pairs
from model import Trunk, block_ends, read_hidden
from plumbing.alignment_plots import Models, draw_pairs, draw_panel
from plumbing.files import read_records, write_figure, write_json
from plumbing.linear_map import difference_spectrum, linear_r2
from plumbing.processes import pick_device, run_main, versions
from plumbing.stats import mean_sd, plus_minus
from run import Run, data_of, load_run, make_model, runs_newest_first
from views import CODE, PRED, TARGET, TEXT, Pairs

FIRST_TABLE = {  # measure: title, digits
    "ce": ("CE", 3), "matched": ("matched", 3), "mismatched": ("mismatched", 3),
    "retrieval_at_1": ("retrieval@1", 3), "mean_rank": ("mean rank", 1),
    "effective_rank_pred": ("rank pred", 1), "effective_rank_target": ("rank target", 1),
}  # fmt: skip
SECOND_TABLE = {
    "within_pred": ("within pred", 3), "within_target": ("within target", 3),
    "linear_r2": ("linear R²", 3), "linear_r2_shuffled": ("shuffled R²", 3),
}  # fmt: skip
# Fields that decide what an untrained model scores; beside them the tokenizer and the pairs do.
COMPARABLE = ("trunk", "n_layer", "n_head", "n_embd", "n_pred", "bias", "views", "layout",
              "objective", "pooling", "labels", "label_end")  # fmt: skip


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
    groups: np.ndarray | None = None  # (n,) equal where two pairs have the same answer
    curve: list[dict] = field(default_factory=list)  # evaluations in training, of metrics.jsonl
    eval_chance: float = 0.0  # of retrieval@1 in those


class Comparison(NamedTuple):
    """Models that may stand in one table, the floor last, and the data as the first of them has
    it."""

    models: Models
    data: dict[str, Any]


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

    measured, floors, data = {}, {}, None  # by what makes them comparable
    for path in paths:
        run = load_run(path, device)
        digest = data and data.provenance["train_sha256"]
        data = data_of(run, args.data_dir)
        if digest not in (None, data.provenance["train_sha256"]):
            fail(f"{run.path} was trained on other data than {paths[0]}: compare runs on one set")
        pairs = chosen_pairs(data, args)
        m = measure(run, pairs, autocast)
        m.curve = [r for r in read_records(run.path.parent / "metrics.jsonl") if "val_ce" in r]
        n_eval = min(run.config.eval_pairs, len(data.pairs["val"]))
        m.eval_chance = (m.curve or [{}])[-1].get("val_chance", 1 / n_eval)
        alike = comparable(run, pairs)
        if alike not in floors:
            floors[alike] = measure(untrained(run), pairs, autocast), data.provenance
        measured.setdefault(alike, []).append(m)
    dtypes = {m.numbers["trained_in"]: None for some in measured.values() for m in some}
    if len(dtypes) > 1:
        print(f"note: trained in {', '.join(dtypes)}; only seeds of one dtype are averaged")
    comparisons = []
    for alike, some in measured.items():
        # JEPA first, then the baselines, then the floor
        some.sort(key=lambda m: m.numbers["jepa_weight"] == 0)
        floor, about_data = floors[alike]
        floor.numbers["name"] = name = floor_name(alike, list(measured))
        comparisons.append(Comparison([*by_settings(some), (name, [floor])], about_data))
    write_results(paths[0], comparisons, args)


def write_results(first_path: Path, comparisons: list[Comparison], args: Args) -> None:
    """alignment.json, and both figures and both tables of each comparison."""
    folder = (first_path if first_path.is_dir() else first_path.parent).resolve().parent
    groups, made = [], versions()
    for number, (models, data) in enumerate(comparisons, 1):
        floor = models[-1][1][0].numbers
        n, shared = len(models[-1][1][0].cosines), floor["shared"]
        about = {"split": args.split, "n_pairs": n, "shared": shared, "chance": floor["chance"],
                 "pairs_seed": args.pairs_seed, "data": data, **made}  # fmt: skip
        first, second = tables(models)
        ending = f"-{number}" if number > 1 else ""
        figures = {f"alignment{ending}.png": draw_pairs(models, first, about),
                   f"alignment_panel{ending}.png": draw_panel(models, second, about)}
        for name, figure in figures.items():
            write_figure(folder / name, figure)
        groups.append({**about, "figures": list(figures), "over_seeds": over_seeds(models),
                       "models": [m.numbers for _, seeds in models for m in seeds]})  # fmt: skip
        print_tables([first, second], about)
    # The first group's facts stand at the top; the rows of all groups in one list, with its number.
    rows = {key: [{**row, "group": number} for number, group in enumerate(groups, 1)
                  for row in group.pop(key)] for key in ("models", "over_seeds")}  # fmt: skip
    about = {key: value for key, value in groups[0].items() if key != "figures"}
    write_json(folder / "alignment.json", {**about, **rows, "groups": groups})
    names = [name for group in groups for name in group["figures"]]
    print(f"wrote {folder / names[0]}, {', '.join(names[1:])} and alignment.json")


def print_tables(both: list[list[list[str]]], about: dict[str, Any]) -> None:
    """The tables of a comparison under a line that says what they are of."""
    shared = f", {about['shared']} share their answer" if about["shared"] else ""
    print(f"\n{about['n_pairs']} held-out pairs of {about['data']['dataset']} ({about['split']})"
          f"{shared}; retrieval@1 by chance {about['chance']:.3f}")
    for rows in both:
        width = max(24, *(len(cells[0]) + 2 for cells in rows))
        for cells in rows:
            print(f"{cells[0]:<{width}}" + "".join(f" {cell:>14}" for cell in cells[1:]))
        print()


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
    if others := sorted(path.name for path in paths if digests[path] != digests[paths[0]]):
        print(f"left out, as of other data or views than {paths[0]}: {', '.join(others)}")
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


def comparable(run: Run, pairs: Pairs) -> tuple[tuple[str, Any], ...]:
    """Name and value of all that two runs have to share to stand in one table, with one floor."""
    views = [[pairs.view(example, block) for block in (TEXT, CODE, TARGET)]
             for example in range(len(pairs))]  # fmt: skip
    digest = hashlib.sha256(str([*views, pairs.question_length.tolist()]).encode()).hexdigest()
    tokenizer = f"{run.tokenizer.name}-{run.tokenizer.sha256[:8]}"
    fields = ((key, getattr(run.config, key)) for key in COMPARABLE)
    base = [("weights", run.model.about["sha256"][:8])] if run.model.about else []
    return (*fields, *base, ("tokenizer", tokenizer), ("pairs", digest[:8]))


def floor_name(alike: tuple, all_of_them: list[tuple]) -> str:
    """untrained, and in what the group differs from the others, if there are any. The tokens of
    the pairs differ with most else: they are named where nothing else differs."""
    differs = [each for each in alike if any(each not in other for other in all_of_them)]
    told = [f"{key}={value}" for key, value in differs if key != "pairs" or len(differs) == 1]
    return " ".join(["untrained", *told])


def untrained(run: Run) -> Run:
    """The same network before its first step: the floor."""
    torch.manual_seed(run.config.seed)
    model = make_model(run.config, run.tokenizer.vocab_size).to(run.model.device)
    return replace(run, name="untrained", model=model.eval(), step=0)


def measure(run: Run, pairs: Pairs, autocast) -> Measured:
    """The whole panel for one model; step 0 is an untrained one."""
    ce, layers = embed_layers(run.model, pairs, autocast)
    groups = target_groups(pairs, len(pairs))
    by_layer = [alignment(pred, code, groups) for _, code, pred in layers]
    keys = ("matched", "mismatched", "effective_rank_pred", "effective_rank_target")
    sittings = [*run.provenance.get("earlier", []), run.provenance]
    dtypes = [sitting.get("dtype", "unknown") for sitting in sittings]
    text, code, pred = layers[-1]
    panel = collapse_panel(pred, text, code, groups)
    numbers = {
        "name": run.name, "step": run.step,
        "jepa_weight": run.config.jepa_weight if run.step else None,
        "seed": run.config.seed, "ce": ce, **panel, "pairs": verdict(panel),
        "trained_by": run.provenance["commit"] if run.step else None,
        "trained_in": " AND ".join(dict.fromkeys(dtypes)) if run.step else None,
        "layers": {key: [measures[key] for measures in by_layer] for key in keys},
    }  # fmt: skip
    settings = {**what(run.config), "dtype": numbers["trained_in"], "seed": None, "step": run.step}
    return Measured(numbers, cosines(pred, code), layers[-1], str(settings), groups)


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
            read = objective.reads(batch, config) | block_ends(batch.block)
            last, ce_sum = trunk(batch, read, streams)
        ce, n_labels = ce + ce_sum.item(), n_labels + (batch.targets != -1).sum().item()
        if encoded is None:
            encoded = torch.empty(len(streams) + 1, 3, len(pairs), trunk.width)
        for layer, hidden in enumerate([*streams, last]):
            text = read_hidden(hidden, batch.block, text_block, config.pooling)
            pred, code = objective.views(hidden, batch, config)
            for view, read in enumerate((text, code, pred)):
                encoded[layer, view, at] = read.float().cpu()
    return ce / n_labels, encoded[:, :, has_target]


def collapse_panel(
    pred: torch.Tensor, text: torch.Tensor, target: torch.Tensor, groups=None
) -> dict[str, float | str | list[float]]:
    """Every measure there is on N pairs: Pred(text), Enc(text) and Enc(code), (N, C) each; groups
    (N,) are equal where two of them have the same answer.

    To `alignment` of pred and target it adds the cosines within each of the two, and for
    Enc(text) and Enc(code), as in the paper, `linear_r2` and `difference_spectrum`; both once
    more for shuffled pairs, since collapse makes right and wrong pairs alike.
    """
    r2, flaw = linear_r2(text, target)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(text), generator=generator) for _ in range(5)]
    return {
        **alignment(pred, target, groups),
        "within_pred": within_cosine(pred, groups),
        "within_target": within_cosine(target, groups),
        "linear_r2": r2, "linear_r2_flaw": flaw,
        "linear_r2_shuffled": sum(linear_r2(text, target[order])[0] for order in orders) / 5,
        "singular_values": difference_spectrum(text, target),
        "singular_values_shuffled": difference_spectrum(text, target[orders[0]]),
    }  # fmt: skip


def within_cosine(x: torch.Tensor, groups=None) -> float:
    """Mean cosine of two rows of one view (N, C) whose answers differ: 1 when all point one way."""
    return cosines(x.float(), x.float())[wrong_pairs(x, groups)].mean().item()


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
