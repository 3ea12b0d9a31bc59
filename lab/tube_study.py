"""Does JEPA, the tube or the bag answer better than λ = 0 at equal compute? One plan, to its end.

    python -m lab.tube_study --dataset=synth_train.jsonl [--jobs=2]       all three stages
    python -m lab.tube_study STAGE --dataset=...      one of them: rates | lengths | confirm

The plan, which was fixed before the first run:

0. Before anything else 2,000 rows of the file are set aside as test, and 512 as validation: whole
   questions, by a fixed seed. Their digests are recorded. No run is given the test to read.
1. rates: each arm trains 600 steps at each of three learning rates, with a seed that is used
   nowhere else. It keeps the rate with the highest exact match on validation.
2. lengths: each arm trains with five seeds at the compute (floating-point operations) that λ = 0
   takes for 600 steps, and at that of 1,000. Then λ = 0 and the arm that leads it most so far train
   at that of 2,000; with all six arms there it would not be done in eight hours on two cores.
3. confirm: the one contrast that counts is the arm and the length with the largest lead over λ = 0
   in mean exact match on validation. Both train with ten fresh seeds, and are asked the test, once.

The verdict is read off the 95 % interval of the difference in exact match on the test, paired by
seed: a gain where it lies above 0, no gain where it lies below +2 points, else undecided. It is an
interval over seeds, for these 2,000 questions.

The same command again goes on where it was. A stage refuses to run before the one that it builds
on. Writes results.json and tube_study.png. There are 108 runs, of 4 to 15 minutes on one core each.
"""

import json
import re
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import Config, fail, find_recipe, parse_args
from data import read_questions, together
from evaluate import Args, evaluate
from lab.arms import INFONCE
from lab.sweep import Cell, each_once, make_cell, result_of, train_cells, warn_of_dtypes
from plumbing.files import (
    read_json,
    read_records,
    write_figure,
    write_json,
    write_lines,
)
from plumbing.jsonl import questions_of, row_of, sha256_of_rows
from plumbing.processes import pick_device, run_main, versions
from plumbing.stats import mean_sd, paired_interval, paired_t, plus_minus, smallest_difference
from run import load_run


class Arm(NamedTuple):
    recipe: str
    fields: dict[str, Any]  # over the recipe and BASE


# InfoNCE has λ .05 on average in each of its arms.
ALONE = dict(INFONCE, spread="none", spread_weight=0.0)
PLAIN = "λ = 0"
ARMS = {
    PLAIN: Arm("nlrx_baseline", {}),
    "pair, InfoNCE in a quarter": Arm(
        "nlrx_jepa", dict(ALONE, jepa_weight=0.2, jepa_dropout=0.75)),
    "tube, cosine": Arm("nlrx_tube", {}),
    "tube, InfoNCE": Arm("nlrx_tube", ALONE),
    "bag, InfoNCE": Arm("nlrx_jepa", dict(ALONE, objective="bag")),
    "the paper's": Arm("nlrx_paper", {}),
}  # fmt: skip
BASE = dict(system_prompt="drop", eval_answers=512, eval_pairs=512, log_interval=50)
N_TEST, N_VAL, SPLIT_SEED = 2000, 512, 18
# λ = 0 was tried before, on another split: 1e-3 .652 exact on validation, 2e-3 .643, 4e-3 .410.
RATES, RATE_STEPS, RATE_SEED = (5e-4, 1e-3, 2e-3), 600, 100
LENGTHS, SEEDS, FRESH_SEEDS = (600, 1000, 2000), range(5), range(10, 20)
WORTH = 0.02  # a difference in exact match that would be worth something
PANEL = ("val_exact", "val_prefix", "val_ce", "val_matched", "val_mismatched",
         "val_retrieval_at_1")  # fmt: skip
CONTROLS = (
    "λ = 0 with dropout and weight decay of its own",
    "the same loss with answers of other questions as targets",
    "Turk, and a model of another size",
)
Panel = dict[str, float]  # the evaluation at the end of a run
Cells = dict[tuple[str, float], Cell]  # by arm, and by rate or seed


@dataclass(frozen=True)
class Options:
    dataset: str = ""  # a file of pairs, of which test and validation are set aside
    jobs: int = 1  # runs to train at a time
    out_dir: str = "out/tube-study"  # folder of the study


class Study(NamedTuple):
    folder: Path
    data: Path  # the folder with train and validation; the test lies beside it
    jobs: int
    found: dict[str, Any]  # what results.json holds


def main(argv: list[str]) -> None:
    usage = f"python -m lab.tube_study [STAGE] --dataset=FILE [--key=value ...]\n\n{__doc__}"
    values, names = parse_args(Options, argv, usage)
    options = Options(**values)
    stages = {"rates": rates, "lengths": lengths, "confirm": confirm}
    if len(names) > 1 or not {*names} <= {*stages}:
        fail(f"one stage of {', '.join(stages)}, or none for all of them; got {' '.join(names)}")
    if not options.dataset or options.jobs < 1:
        fail(f"dataset={options.dataset!r} must name a file of pairs, and jobs={options.jobs} be "
             "at least 1")  # fmt: skip
    study = open_study(options)
    for name in names or stages:
        before = [*stages][: [*stages].index(name)][-1:]
        if before and before[0] not in study.found:
            fail(f"{name} builds on {before[0]}, which {study.folder} does not hold; run python -m "
                 f"lab.tube_study {before[0]} --dataset={options.dataset} first")
        if name not in study.found:
            study.found[name] = stages[name](study)
            study.found["provenance"] |= {"command": shlex.join(argv), **versions()}
            write_json(study.folder / "results.json", study.found)
    print("\n".join(told(study.found)))
    if "lengths" in study.found:
        write_figure(study.folder / "tube_study.png", draw(study.found), dpi=120)
    print(f"{study.folder} holds results.json and, once there are lengths, tube_study.png")


# --- what is set aside ------------------------------------------------------------------------


def open_study(options: Options) -> Study:
    """The study's folder with its plan and splits, and what was found so far by this very plan.
    Nothing is written over those of another one."""
    path, folder = Path(options.dataset), Path(options.out_dir)
    data = folder / path.name.partition(".")[0]
    splits, split = in_three(path)
    plan = {"arms": ARMS, "base": BASE, "rates": RATES, "rate_steps": RATE_STEPS,
            "rate_seed": RATE_SEED, "lengths": LENGTHS, "seeds": [*SEEDS],
            "fresh_seeds": [*FRESH_SEEDS], "worth": WORTH, "split": split}
    plan = json.loads(json.dumps(plan))  # as it is read back
    begun = folder / "results.json"
    found = read_json(begun) if begun.exists() else {"plan": plan, "provenance": {"commits": []}}
    if found["plan"] != plan:
        other = [key for key in plan if plan[key] != found["plan"].get(key)]
        fail(f"{begun} was begun with another plan or on other rows ({', '.join(other)}); name "
             "another --out_dir")  # fmt: skip
    for name, rows in splits.items():
        write_lines((folder if name == "test" else data) / f"{name}.jsonl", rows)
    write_json(begun, found)
    return Study(folder, data, options.jobs, found)


def in_three(path: Path) -> tuple[dict[str, list[dict]], dict[str, Any]]:
    """The file's rows as test, val and train: whole questions, in an order of chance; and what they
    are, with digests."""
    rows = read_questions(path, Config())
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    question = together(questions_of(rows), np.empty(0))[order]
    turn = question[np.sort(np.unique(question, return_index=True)[1])]  # as they come first
    sizes = np.bincount(question)
    ends = sizes[turn].cumsum()
    part = np.empty(len(sizes), int)  # 0 test, 1 validation, 2 train
    part[turn] = np.searchsorted([N_TEST, N_TEST + N_VAL], ends - sizes[turn], side="right")
    splits = {split: [row_of(pair, "") for pair in rows.take(order[part[question] == number])[:]]
              for number, split in enumerate(("test", "val", "train"))}  # fmt: skip
    if not splits["train"]:
        fail(f"{path} has {len(rows)} rows: {N_TEST} for the test and {N_VAL} for validation leave "
             "none to train on")  # fmt: skip
    about = {"source": path.name, "source_sha256": rows.sha256, "seed": SPLIT_SEED}
    return splits, about | {split: {"rows": len(some), "sha256": sha256_of_rows(some)}
                            for split, some in splits.items()}  # fmt: skip


# --- runs -------------------------------------------------------------------------------------


def make(study: Study, stage: str, arm: str, steps: int, rate: float, seed: int) -> Cell:
    """A run: the arm's recipe, over it BASE, over that its own fields and these. It is measured at
    its end alone."""
    recipe, fields = ARMS[arm]
    overrides = {**BASE, **fields, "dataset": str(study.data), "max_iters": steps,
                 "eval_interval": steps, "learning_rate": rate, "seed": seed}  # fmt: skip
    name = re.sub(r"\W+", "-", arm.replace("λ", "lambda"))
    folder = f"{study.folder}/{stage}/{name},{steps}-steps,rate-{rate:g},seed-{seed}"
    return make_cell(find_recipe(recipe), {**overrides, "out_dir": folder}, {})


def trained(study: Study, cells: Cells, may_diverge: bool = False) -> dict[tuple, Panel]:
    """Train what is not finished; the panel of each run. The end if one fails; with may_diverge,
    one whose rate was too high has no panel instead."""
    train_cells(list(cells.values()), study.jobs)
    results = {at: result for at, cell in cells.items() if (result := result_of(cell))}
    missing = [cell.folder / "log.txt" for at, cell in cells.items() if at not in results]
    if may_diverge:
        missing = [log for log in missing if "a lower learning_rate may" not in log.read_text()]
    if missing:
        fail(f"{len(missing)} runs failed, see {missing[0]}; the same command goes on")
    warn_of_dtypes(results.values())
    commits = study.found["provenance"]["commits"]
    commits += {*each_once(results.values(), "commit").split(" AND ")} - {*commits}
    return {at: panel_of(cells[at]) for at in results}


def panel_of(cell: Cell) -> Panel:
    [*_, last] = [r for r in read_records(cell.folder / "metrics.jsonl") if "val_ce" in r]
    return {**{key: last[key] for key in PANEL}, "tflop": last["flops"] / 1e12}


def rates(study: Study) -> dict[str, Any]:
    """The best learning rate of each arm, and the operations of its steps."""
    cells = {(arm, rate): make(study, "rates", arm, RATE_STEPS, rate, RATE_SEED)
             for arm in ARMS for rate in RATES}  # fmt: skip
    results = trained(study, cells, may_diverge=True)
    found = {}
    for arm in ARMS:
        of_arm = {rate: results[arm, rate] for rate in RATES if (arm, rate) in results}
        if not of_arm:
            fail(f"{arm} diverged at each of the rates {', '.join(map(str, RATES))}")
        best = max(of_arm, key=lambda r, of=of_arm: (of[r]["val_exact"], -of[r]["val_ce"]))
        found[arm] = {"rate": best, "edge": best in (RATES[0], RATES[-1]),
                      "tflop_per_step": of_arm[best]["tflop"] / RATE_STEPS,
                      "val_exact": {str(r): of["val_exact"] for r, of in of_arm.items()}}
    return found


def at_compute(study: Study, stage: str, arms: Iterable[str], length: int, seeds) -> Cells:
    """A run for each arm and seed, at the arm's own rate and with as many steps as take the
    operations of `length` steps of λ = 0."""
    found, cells = study.found["rates"], {}
    for seed in seeds:
        for arm in arms:
            share = found[PLAIN]["tflop_per_step"] / found[arm]["tflop_per_step"]
            steps, rate = round(length * share), found[arm]["rate"]
            cells[arm, seed] = make(study, stage, arm, steps, rate, seed)
    return cells


def by_arm(panels: dict[tuple, Panel]) -> dict[str, list[Panel]]:
    """A panel per seed, for each arm."""
    found = {}
    for (arm, _), panel in panels.items():
        found.setdefault(arm, []).append(panel)
    return found


def lengths(study: Study) -> dict[str, Any]:
    """All arms at the shorter lengths, λ = 0 and the leader at the longest one; the contrast."""
    *short, longest = LENGTHS
    cells = {n: at_compute(study, "lengths", ARMS, n, SEEDS) for n in short}
    found = {n: by_arm(trained(study, some)) for n, some in cells.items()}
    leader = max(leads(found), key=leads(found).get)[0]
    cells = at_compute(study, "lengths", [PLAIN, leader], longest, SEEDS)
    found[longest] = by_arm(trained(study, cells))
    arm, length = max(leads(found), key=leads(found).get)
    return {"runs": {str(n): of_arms for n, of_arms in found.items()},
            "contrast": {"arm": arm, "length": length, "lead": leads(found)[arm, length]}}


def leads(found: dict[int, dict[str, list[Panel]]]) -> dict[tuple[str, int], float]:
    """Of every arm but λ = 0, at every length: how far its mean exact match lies above that of
    λ = 0, on validation."""
    means = {(arm, n): statistics.fmean(run["val_exact"] for run in runs)
             for n, of_arms in found.items() for arm, runs in of_arms.items()}  # fmt: skip
    return {(arm, n): mean - means[PLAIN, n] for (arm, n), mean in means.items() if arm != PLAIN}


def confirm(study: Study) -> dict[str, Any]:
    """The contrast again with fresh seeds, and its answers to the test; the verdict."""
    contrast = study.found["lengths"]["contrast"]
    arms = PLAIN, contrast["arm"]
    cells = at_compute(study, "confirm", arms, contrast["length"], FRESH_SEEDS)
    panels, answers = trained(study, cells), {}
    args = Args(file=str(study.folder / "test.jsonl"), score="regex")
    for at, cell in cells.items():
        device, autocast = pick_device(cell.config.device, cell.config.dtype)
        summary, _ = evaluate(load_run(cell.folder, device), args, autocast)
        answers[at] = {key: summary[key] for key in ("n", "exact", "prefix", "stopped",
                                                     "equivalent")}  # fmt: skip
    test = by_arm(answers)
    plain, ours = ([run["exact"] for run in test[arm]] for arm in arms)
    low, high = paired_interval(ours, plain)
    return {**contrast, "validation": by_arm(panels), "test": test, "interval": [low, high],
            "difference": statistics.fmean(ours) - statistics.fmean(plain),
            "p": paired_t(ours, plain), "smallest": smallest_difference(ours, plain),
            "verdict": "gain" if low > 0 else "no gain" if high < WORTH else "undecided"}


# --- what came of it --------------------------------------------------------------------------


def told(found: dict[str, Any]) -> list[str]:
    """What was found so far: a Markdown table, and the contrast in words."""
    lines = [""]
    for arm, of in found["rates"].items():
        tried = ", ".join(f"{rate} {exact:.3f}" for rate, exact in of["val_exact"].items())
        edge = " (the best at an edge: one beyond it may be better)" if of["edge"] else ""
        lines.append(f"{arm}: exact at rate {tried}{edge}")
    lines += ["", *table(found)] if "lengths" in found else []
    return lines + (in_words(found["confirm"]) if "confirm" in found else [])


def table(found: dict[str, Any]) -> list[str]:
    """A row per arm: exact match on validation at each length, and in brackets prefix."""
    runs = found["lengths"]["runs"]
    operations = {n: statistics.fmean(run["tflop"] for run in of_arms[PLAIN])
                  for n, of_arms in runs.items()}  # fmt: skip
    heads = [f"{int(n):,} steps of λ = 0, {t:.1f} TFLOP" for n, t in operations.items()]
    lines = [f"| arm, n = {len(SEEDS)} | rate | {' | '.join(heads)} | retrieval@1 |",
             "|---|---|" + "---|" * (len(heads) + 1)]  # fmt: skip
    for arm, chosen in found["rates"].items():
        cells, last = [], None
        for of_arms in runs.values():
            last = of_arms.get(arm, last)
            cells.append("" if arm not in of_arms else shown(of_arms[arm], "val_exact")
                         + f" ({statistics.fmean(run['val_prefix'] for run in of_arms[arm]):.3f})")
        lines.append(f"| {arm} | {chosen['rate']:g} | {' | '.join(cells)} | "
                     f"{shown(last, 'val_retrieval_at_1', 2)} |")  # fmt: skip
    return lines


def shown(runs: list[dict], key: str, digits: int = 3) -> str:
    return plus_minus(*mean_sd([run[key] for run in runs]), digits)


def in_words(found: dict[str, Any]) -> list[str]:
    """The contrast, its verdict, and after a gain the panel and what is still to be run."""
    arm, (low, high) = found["arm"], found["interval"]
    ours, plain = found["test"][arm], found["test"][PLAIN]
    panel = found["validation"][arm]
    lines = [
        "", f"{arm} against λ = 0, at the compute of {found['length']:,} steps of λ = 0, "
        f"{len(ours)} fresh seeds, {ours[0]['n']:,} test questions, asked once:",
        f"exact {shown(ours, 'exact')} against {shown(plain, 'exact')}, prefix "
        f"{shown(ours, 'prefix')} against {shown(plain, 'prefix')}",
        f"difference in exact {100 * found['difference']:+.1f} points, 95 % interval "
        f"[{100 * low:+.1f}, {100 * high:+.1f}], p {found['p']:.2g}; with this spread a difference "
        f"of {100 * found['smallest']:.1f} points would be found four times of five",
    ]  # fmt: skip
    if found["verdict"] == "no gain":
        return [*lines, f"NO GAIN: the interval lies below {100 * WORTH:+.0f} points."]
    if found["verdict"] == "undecided":
        return [*lines, f"UNDECIDED: the interval holds both 0 and {100 * WORTH:+.0f} points."]
    cosines = (f"cosine matched {shown(panel, 'val_matched', 2)}, mismatched "
               f"{shown(panel, 'val_mismatched', 2)}, retrieval@1 "
               f"{shown(panel, 'val_retrieval_at_1', 2)}")  # fmt: skip
    return [*lines, f"*** A GAIN *** at equal compute, each arm at its own rate: {cosines}.",
            f"Still to be run: {'; '.join(CONTROLS)}."]


def draw(found: dict[str, Any]):
    """Exact match against compute for every arm, and the contrast seed by seed."""
    from matplotlib.figure import Figure  # takes a second to import, and needs no display

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    compute, contrast = figure.subplots(1, 2, width_ratios=[3, 2])
    runs = found["lengths"]["runs"]
    for i, arm in enumerate(ARMS):
        points = [(statistics.fmean(run["tflop"] for run in of_arms[arm]),
                   *mean_sd([run["val_exact"] for run in of_arms[arm]]))
                  for of_arms in runs.values() if arm in of_arms]  # fmt: skip
        if points:
            x, mean, sd = zip(*points)
            compute.errorbar(x, mean, sd, marker="o", ms=4, capsize=3, color=f"C{i}", label=arm)
    compute.legend(frameon=False, fontsize=8)
    compute.set(xlabel="TFLOP spent in training", ylabel="exact match, validation")
    if "confirm" in found:
        of = found["confirm"]
        differences = [100 * (a["exact"] - b["exact"])
                       for a, b in zip(of["test"][of["arm"]], of["test"][PLAIN])]  # fmt: skip
        contrast.plot(differences, range(len(differences)), "o", color="grey", label="a seed")
        contrast.errorbar([100 * of["difference"]], [-1.5], fmt="s", color="black", capsize=4,
                          xerr=[[100 * (of["difference"] - of["interval"][0])],
                                [100 * (of["interval"][1] - of["difference"])]],
                          label="mean, 95 % interval")  # fmt: skip
        contrast.axvline(100 * WORTH, color="C2", lw=1, ls="--", label="worth something")
        contrast.set_title(f"{of['arm']} less λ = 0, compute of {of['length']:,} steps", fontsize=9)
        contrast.legend(frameon=False, fontsize=8)
    contrast.axvline(0, color="black", lw=0.8)
    contrast.set(xlabel="difference in exact match on the test, points", yticks=[])
    split, made = found["plan"]["split"], found["provenance"]
    figure.supxlabel(
        f"{split['source']}, train {split['train']['rows']} rows, sha256 "
        f"{split['train']['sha256'][:12]}, test {split['test']['sha256'][:12]}; mean ± sd; commits "
        f"{', '.join(made['commits'])}, torch {made['torch']}, {made['time']}",
        fontsize=7, color="grey", parse_math=False,
    )  # fmt: skip
    return figure


if __name__ == "__main__":
    run_main(main)
