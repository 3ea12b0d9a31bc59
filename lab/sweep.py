"""A grid over config fields and seeds: train every cell, then results.csv, a table and heat.png.

    python -m lab.sweep gsm8k_nano --n_pred=0,1,2 --jepa_weight=0.5,1,2 --seed=0,1,2 [--jobs=2]

Values with commas make an axis of the grid; a single value holds for every cell, and so does that
of lora_modules, whose commas are its own. A cell is a train.py of its own, in
out/sweep-<recipe>/<key=value,...>/ with what it prints in log.txt. --jobs=N trains N cells at a
time, which share the cores; --out_dir=... is the sweep's folder.

Ctrl-C stops: cells in training save first, a second Ctrl-C does not wait. The same command again
skips what is finished and resumes what was interrupted; when nothing is left it only writes the
results anew. A cell whose config or data file has changed is trained again, its old folder moves
to earlier/; fields that say where a run happens (device, data_dir, log_interval, ...) do not count.
Runs of different data are never averaged. A second sweep in a folder, and one whose cells an
earlier, killed one still trains, is refused. Exit code 1: a cell failed.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from config import Config, check, fail, find_recipe, read_recipe, what
from data import files_of, same_split, split_rows
from plumbing.columns import FIELDS
from plumbing.files import (
    claim,
    has_checkpoint,
    keep_weights_alone,
    open_log,
    owner_of,
    read_records,
    set_aside,
    write_figure,
    write_text,
)
from plumbing.options import convert, help_text
from plumbing.output import Bar, stops
from plumbing.processes import ROOT, clock, run_main
from plumbing.stats import mean_sd, plus_minus
from run import FORMAT

USAGE = "python -m lab.sweep RECIPE --key=value,value,... [--key=value ...] [--jobs=N]"
FIGURES = {  # of a finished cell: digits in the table; val_exact where eval_answers asks for it
    "val_ce": 3, "val_exact": 3, "val_matched": 3, "val_mismatched": 3, "val_retrieval_at_1": 3,
    "val_effective_rank": 1, "tflop": 2, "seconds": 1,
}  # fmt: skip
PANELS = (  # of heat.png: title, figure of a result, a colour map in which brighter is better
    ("validation CE, nats per label", lambda result: result["val_ce"], "viridis_r"),
    ("cosine, matched − mismatched",
     lambda result: result["val_matched"] - result["val_mismatched"], "viridis"),
    ("retrieval@1", lambda result: result["val_retrieval_at_1"], "viridis"),
)  # fmt: skip
# Fields that rows may depend on, the tokens' own left out.
DATA = ("data_dir", *(key for key in FIELDS if key not in (
    "tokenizer", "bpe_vocab_size", "labels", "views", "layout", "train_rows",
    "objective")))  # fmt: skip


@dataclass(frozen=True)
class Cell:
    values: dict[str, Any]  # its place on the axes
    command: tuple[str, ...]  # recipe and overrides, for train.py
    config: Config  # what train.py makes of them
    folder: Path


def main(argv: list[str]) -> None:
    recipe, given, jobs = parse(argv)
    axes = {key: values for key, values in given.items() if len(values) > 1}
    cells = make_cells(recipe, given)
    folder = cells[0].folder.parent
    print(f"recipe {recipe}: {len(cells)} cells in {folder}", flush=True)
    n_failed = train_cells(cells, jobs)

    results = [{**cell.values, **(result_of(cell) or {})} for cell in cells]
    trained = [result for result in results if "val_ce" in result]
    if trained:
        write_csv(folder / "results.csv", list(axes), results)
        refuse_mixed(list(axes), trained, folder)
        print("\n".join(table(list(axes), trained)))
        made_of = footer(recipe, given, results)
        write_figure(folder / "heat.png", draw(axes, trained, made_of), dpi=120)
        print(f"{made_of}\nwrote {folder / 'results.csv'} and heat.png")
    if len({result["data_sha256"] for result in trained}) > 1:
        print("warning: DIFFERENT DATA. The cells cannot be compared; results.csv has the sha256")
    if "dtype" not in axes:
        warn_of_dtypes(trained)
    if n_failed:
        raise SystemExit(1)


# --- the grid ---------------------------------------------------------------------------------


def parse(argv: list[str]) -> tuple[Path, dict[str, list], int]:
    """Recipe, the values of each field that was given, and how many cells to train at a time."""
    texts, recipes = {}, []
    for arg in argv:
        if arg in ("-h", "--help"):
            print(f"usage: {USAGE}\n\n{__doc__}\nThe fields:\n{help_text(Config)}")
            raise SystemExit(0)
        key, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("-"):
            recipes.append(arg)
        elif not equals or not arg.startswith("--"):
            fail(f"{arg}: options are written --key=value,value,... (--help lists them)")
        else:
            texts[key] = [text] if key == "lora_modules" else text.split(",")
    if len(recipes) != 1:
        fail(f"one recipe, got {' '.join(recipes) or 'none'}; usage: {USAGE}")
    jobs = ",".join(texts.pop("jobs", ["1"]))
    if not jobs.isdecimal() or int(jobs) < 1:
        fail(f"jobs={jobs} must be a whole number, at least 1")
    given = {
        key: [convert(Config, key, value, "on the command line") for value in values]
        for key, values in texts.items()
    }
    if "init_from" in given or len(given.get("out_dir", [])) > 1:
        fail("a sweep resumes by itself, and writes to one out_dir: neither can be an axis")
    if all(len(values) == 1 for values in given.values()):
        fail("nothing to sweep: give a field several values, as in --jepa_weight=0.5,1,2")
    return find_recipe(recipes[0]), given, int(jobs)


def make_cells(recipe: Path, given: dict[str, list]) -> list[Cell]:
    """Every combination of the values, the last axis fastest, its config checked as a whole."""
    root = given.get("out_dir", [""])[0] or f"out/sweep-{recipe.stem}"
    cells = {}
    for combination in itertools.product(*given.values()):
        overrides = dict(zip(given, combination))
        values = {key: value for key, value in overrides.items() if len(given[key]) > 1}
        name = ",".join(f"{k}={short(v)}" for k, v in values.items()).replace("/", "_")
        cell = make_cell(recipe, {**overrides, "out_dir": f"{root}/{name}"}, values)
        if name in cells:
            fail(f"two cells are called {name}: an axis has a value twice")
        cells[name] = cell
    return list(cells.values())


def make_cell(recipe: Path, overrides: dict[str, Any], values: dict[str, Any]) -> Cell:
    """The cell at `values` of the axes, its config checked; `overrides` have its out_dir."""
    settings = {**read_recipe(recipe), "recipe": recipe.stem, "init_from": "scratch"}
    config = Config(**{**settings, **overrides})
    check(config)
    command = (str(recipe), *(f"--{key}={value}" for key, value in overrides.items()))
    return Cell(values, command, config, Path(config.out_dir))


def make_arm_cell(recipe: Path, folder: Path, arm: str, fields: dict[str, Any], seed: int) -> Cell:
    """The cell of a study's arm and seed: `fields` over the recipe, in a folder of its own."""
    name = arm.replace(" ", "_").replace(",", "").replace("λ", "lambda")
    overrides = {**fields, "seed": seed, "out_dir": f"{folder}/{name}-{seed}"}
    return make_cell(recipe, overrides, {"arm": arm, "seed": seed})


def short(value: Any) -> str:
    """A value in a name: 1.0 is 1. Unlike %g it keeps different values apart."""
    return str(value).removesuffix(".0")


# --- training ---------------------------------------------------------------------------------


def is_sweep(folder: Path) -> bool:
    """Does a folder that is there hold nothing, or runs of a sweep or study?"""
    names = {path.name for path in folder.iterdir()}
    return not names or ".lock" in names or any(
        path.name in ("log.txt", "metrics.jsonl", "ckpt.pt") for path in folder.glob("*/*"))


class Child(NamedTuple):
    """The train.py of a cell, while it runs."""

    name: str  # of the cell, for what is printed
    cell: Cell
    process: subprocess.Popen
    started: float


def train_cells(cells: list[Cell], jobs: int) -> int:
    """Train what is not finished, `jobs` at a time; how many failed. A signal ends the sweep."""
    claim(cells[0].folder.parent, is_sweep)
    owners = {cell.folder.name: owner_of(cell.folder) for cell in cells}
    if living := [f"{name} (process {owner})" for name, owner in owners.items() if owner]:
        fail(f"in training already, by an earlier sweep that was killed or by hand: "
             f"{', '.join(living)}; wait until they end, or stop them with kill")
    digests_of.cache_clear()  # files may have changed since an earlier call
    waiting = []
    for i, cell in enumerate(cells, 1):
        name, result = f"[{i}/{len(cells)}] {cell.folder.name}", result_of(cell)
        if result:
            print(f"{name} | {summary(result)} | was finished", flush=True)
        else:
            waiting.append((name, cell))
            if earlier_provenance(cell, of_any_data=True) and not earlier_provenance(cell):
                print(f"{name} | was trained on other data than there is now, or another split of "
                      "it: trained anew, the old run moves to earlier/", flush=True)
    with noting_signals() as signals:
        n_failed = train_waiting(waiting, min(jobs, len(waiting)), signals)
    if signals:
        print("stopped; the same command goes on from here")
        raise SystemExit(128 + signals[0])
    return n_failed


@contextlib.contextmanager
def noting_signals() -> Iterator[list[int]]:
    """Within, Ctrl-C, SIGTERM and SIGHUP do nothing but add their numbers to a list."""
    received, before = [], {}
    for number in stops():
        before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_waiting(waiting: list[tuple[str, Cell]], jobs: int, signals: list[int]) -> int:
    """Train the cells, by name; how many failed. Once there are `signals`, no further one is
    started, and each signal is passed on to those in training."""
    waiting, running, took = list(waiting), [], []
    n_failed = n_passed_on = 0
    bar = Bar("cells", "cell", len(waiting))
    try:
        while running or (waiting and not signals):
            while waiting and len(running) < jobs and not signals:
                name, cell = waiting.pop(0)
                running.append(Child(name, cell, launch(cell, jobs), time.time()))
            time.sleep(0.1)
            bar.move(0)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                result = result_of(child.cell)
                if child.process.returncode == 0 and result:
                    keep_weights_alone(child.cell.folder / "ckpt.pt", FORMAT)
                    took.append(time.time() - child.started)
                    left = statistics.fmean(took) * (len(waiting) + len(running)) / jobs
                    end = f"{summary(result)} | ETA {clock(left)}"
                elif signals:
                    end = "stopped"
                else:
                    n_failed += 1
                    end = f"FAILED, exit code {child.process.returncode}: {last_line(child.cell)}"
                print(f"{child.name} | {end}", flush=True)
                bar.move()
            if len(signals) > n_passed_on:
                n_passed_on += 1
                for child in running:
                    child.process.terminate()  # SIGTERM: a background child may ignore SIGINT
    finally:
        for child in running:  # only after an error of our own
            child.process.terminate()
    return n_failed


def launch(cell: Cell, jobs: int) -> subprocess.Popen:
    """Start or resume the train.py of a cell."""
    resume = (cell.folder / "ckpt.pt").exists() and earlier_provenance(cell) is not None
    if has_checkpoint(cell.folder) and not resume:
        set_aside(cell.folder)  # train.py would move the new log.txt along with it
    command = [sys.executable, "-u", str(ROOT / "train.py"), *cell.command]
    environment = dict(os.environ)
    if jobs > 1:  # two processes with two threads each on two cores slow each other 3 to 10 times
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    with open_log(cell.folder / "log.txt", more=resume) as log:
        # In a session of its own: the terminal sends Ctrl-C to a whole process group, our SIGTERM
        # would be the child's second signal, and the second one ends it before it has saved.
        return subprocess.Popen(
            [*command, f"--init_from={'resume' if resume else 'scratch'}"], env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def last_line(cell: Cell) -> str:
    """What a cell's train.py said last, and where the rest is."""
    lines = (cell.folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'no output'} ({cell.folder / 'log.txt'})"


# --- results ----------------------------------------------------------------------------------


def earlier_provenance(cell: Cell, of_any_data: bool = False) -> dict[str, Any] | None:
    """Provenance of the run in a cell's folder, if it trained what the cell's config says."""
    try:
        made = json.loads((cell.folder / "config.json").read_text())
        config = Config(**made["config"])  # a field that is newer than the run has its default
        same = what(config) == what(cell.config) and (
            of_any_data or same_data(cell, made))
        return made["provenance"] if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def same_data(cell: Cell, made: dict[str, Any]) -> bool:
    """Was a run (its config.json) trained on what the cell's config loads now, and on the same part
    of it? For files the digests of their rows tell, and how many were kept on one side of the
    split; generators are a part of the code, and the hub is not asked."""
    was, now = made["provenance"]["data"], digests_of(*(getattr(cell.config, k) for k in DATA))
    if not now:
        return made["config"].get("data_dir", "") == cell.config.data_dir
    same_test = was.get("test_sha256") in (None, now.get("test_sha256", was.get("test_sha256")))
    return same_test and same_split(was, now)


@functools.cache
def digests_of(*values: Any) -> dict[str, str]:
    """What provenance has of the files that a config with these fields of DATA reads, the sha256 of
    each split among it; nothing where it reads no file, or one that is gone."""
    config = Config(**dict(zip(DATA, values)))
    paths = (config.dataset, config.data_dir, *files_of(config).values())
    return split_rows(config)[1] if any(Path(path).exists() for path in paths if path) else {}


def result_of(cell: Cell) -> dict[str, Any] | None:
    """Figures of the cell's last evaluation, with commit and data; None if it is not finished."""
    provenance = earlier_provenance(cell)
    records = read_records(cell.folder / "metrics.jsonl") if provenance else []
    for record in records:
        stopped = record.get("stopped_early") and record is records[-1]  # else it went on
        if "val_ce" in record and (record["step"] == cell.config.max_iters or stopped):
            figures = {**record, "tflop": record["flops"] / 1e12}
            return {
                **{key: figures[key] for key in FIGURES if key in figures},
                "commit": of_sittings(provenance, "commit"),
                "trained_in": of_sittings(provenance, "dtype"),
                "data": provenance["data"]["dataset"],
                "data_sha256": provenance["data"]["train_sha256"],
            }  # fmt: skip
    return None


def of_sittings(provenance: dict[str, Any], key: str) -> str:
    """The commit or dtype of a run; one that was resumed by other code, or elsewhere, has
    several."""
    sittings = [*provenance.get("earlier", []), provenance]
    return " AND ".join(dict.fromkeys(sitting.get(key, "unknown") for sitting in sittings))


def each_once(results: Iterable[dict[str, Any]], key: str, length: int = 99) -> str:
    """What finished cells have as their data, digests, commits or dtypes, each once."""
    found = {part[:length] for result in results for part in result[key].split(" AND ")}
    return " AND ".join(sorted(found))


def warn_of_dtypes(results: Iterable[dict[str, Any]]) -> None:
    dtypes = {*each_once(results, "trained_in").split(" AND ")} - {"unknown"}
    if len(dtypes) > 1:
        print(f"warning: DIFFERENT DTYPES. Runs were trained in {' and '.join(sorted(dtypes))}, "
              "which alone can move a result; --dtype=float32 in a new --out_dir is the same "
              "everywhere")  # fmt: skip


def summary(result: dict[str, Any]) -> str:
    return (f"val ce {result['val_ce']:.4f} | cosine matched {result['val_matched']:.3f} "
            f"mismatched {result['val_mismatched']:.3f} | retrieval@1 "
            f"{result['val_retrieval_at_1']:.3f} | {result['seconds']:.0f} s")  # fmt: skip


def refuse_mixed(axes: list[str], trained: list[dict], folder: Path) -> None:
    """Exit before runs of different data are averaged, as when the hub goes away half-way."""
    for group in grouped(trained, [key for key in axes if key != "seed"]).values():
        if len({result["data_sha256"] for result in group}) > 1:
            told = ", ".join(f"seed {result.get('seed')} {result['data']} "
                             f"{result['data_sha256'][:12]}" for result in group)  # fmt: skip
            fail(f"DIFFERENT DATA: these runs are not averaged ({told}); {folder}/results.csv has "
                 "each, another --out_dir trains all of them anew")


def write_csv(path: Path, axes: list[str], results: list[dict]) -> None:
    """A row per cell; a cell that failed has no figures."""
    columns = [*axes, *figures_of(results), "commit", "trained_in", "data", "data_sha256"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_text(path, text.getvalue())


def figures_of(results: list[dict]) -> dict[str, int]:
    """The figures that some cell has, with their digits."""
    return {key: n for key, n in FIGURES.items() if any(key in result for result in results)}


def grouped(results: list[dict], keys: list[str]) -> dict[tuple, list[dict]]:
    """The results by their values of `keys`, in the order of the grid."""
    groups = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups


def table(axes: list[str], trained: list[dict]) -> list[str]:
    """Lines: for each combination of the axes but the seed, mean ± sample sd over the seeds."""
    keys = [key for key in axes if key != "seed"]
    figures = figures_of(trained)
    rows = [[*keys, "n", *(key.removeprefix("val_").replace("_at_", "@") for key in figures)]]
    for values, group in grouped(trained, keys).items():
        told = [
            plus_minus(*mean_sd([result[key] for result in group]), digits)
            if key in group[0] else "" for key, digits in figures.items()
        ]  # fmt: skip
        rows.append([*map(short, values), str(len(group)), *told])
    widths = [max(map(len, column)) for column in zip(*rows)]
    title = "mean ± sample sd over n seeds" if "seed" in axes else "one seed, so no sd"
    lines = ("  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows)
    return ["", title, *lines]


def footer(recipe: Path, given: dict[str, list], results: list[dict]) -> str:
    """Two lines: what was trained, on which data, by which code."""
    trained = [result for result in results if "val_ce" in result]
    fixed = {key: values[0] for key, values in given.items()
             if len(values) == 1 and key != "out_dir"}  # fmt: skip
    overrides = "".join(f" --{key}={value}" for key, value in fixed.items())
    seeds = len(given.get("seed", [1]))
    missing = f", {len(results) - len(trained)} FAILED" if len(trained) < len(results) else ""
    return (f"recipe {recipe.stem}{overrides}; {len(results)} cells{missing}, {seeds} "
            f"seed{'s' * (seeds > 1)}; commit {each_once(trained, 'commit')}\n"
            f"data {each_once(trained, 'data')}, "
            f"train sha256 {each_once(trained, 'data_sha256', 12)}")  # fmt: skip


# --- heat.png ---------------------------------------------------------------------------------


def draw(axes: dict[str, list], trained: list[dict], made_of: str):
    """Heat maps over the first two axes but the seed; where there is one, a line with error bars.

    Each combination of further axes has a row of panels. Seeds alone are drawn as the axis.
    """
    from matplotlib.figure import Figure  # takes a second to import, and needs no display

    keys = [key for key in axes if key != "seed"] or ["seed"]
    is_grid = len(keys) > 1
    groups = grouped(trained, keys)
    further = list(itertools.product(*(axes[key] for key in keys[2:])))
    n_down = len(axes[keys[0]]) if is_grid else 4
    n_across = len(axes[keys[1]]) if is_grid else len(axes[keys[0]])
    size = max(12, 3 + 2.4 * n_across), 1.2 + len(further) * (1.1 + 0.7 * n_down)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(further), len(PANELS), squeeze=False)
    for (title, figure_of, colors), column in zip(PANELS, panels.T):
        stats = {at: mean_sd([figure_of(result) for result in group])
                 for at, group in groups.items()}  # fmt: skip
        for rest, panel in zip(further, column):
            if is_grid:
                draw_heat(panel, axes[keys[0]], axes[keys[1]], rest, stats, colors)
                panel.set(xlabel=keys[1], ylabel=keys[0])
            else:
                draw_line(panel, axes[keys[0]], stats)
                panel.set_xlabel(keys[0])
            where = ", ".join(f"{key}={short(value)}" for key, value in zip(keys[2:], rest))
            panel.set_title(f"{title}\n{where}".strip(), fontsize=10)
    n = sorted({len(group) for group in groups.values()})
    seeds = "one seed" if n == [1] else f"mean ± sample sd over {'-'.join(map(str, n))} seeds"
    figure.suptitle(seeds + ("; brighter is better" if is_grid else ""), fontsize=11)
    figure.supxlabel(made_of, fontsize=7, color="grey", parse_math=False, x=0.01, ha="left")
    return figure


def draw_line(panel, values: list, stats: dict[tuple, tuple]) -> None:
    """A point per value, evenly spaced in the order given: an axis may hold words."""
    for i, value in enumerate(values):
        if (value,) in stats:
            mean, sd = stats[(value,)]
            panel.errorbar(i, mean, sd, marker="o", capsize=4, color="#2a6f97")
            panel.annotate(plus_minus(mean, sd, gap="\n"), (i, mean), (7, 0), fontsize=8,
                           textcoords="offset points", va="center",
                           bbox=dict(fc="white", ec="none", pad=0.5, alpha=0.8))  # fmt: skip
    there = [i for i, value in enumerate(values) if (value,) in stats]
    panel.plot(there, [stats[(values[i],)][0] for i in there], color="#2a6f97", lw=1, alpha=0.5)
    panel.set_xticks(range(len(values)), map(short, values))
    panel.set_xlim(-0.3, len(values) - 0.3)
    panel.spines[["top", "right"]].set_visible(False)


def draw_heat(panel, rows: list, columns: list, rest: tuple, stats: dict, colors: str) -> None:
    """A square per pair of values; a colour means the same in every row of panels."""
    low, high = (extreme(mean for mean, _ in stats.values()) for extreme in (min, max))
    high = max(high, low + 0.1)  # do not paint noise in contrasts
    failed = float("nan"), None
    grid = [[stats.get((row, column, *rest), failed) for column in columns] for row in rows]
    means = [[mean for mean, _ in line] for line in grid]
    image = panel.imshow(means, cmap=colors, vmin=low, vmax=high, aspect="auto")
    for i, line in enumerate(grid):
        for j, (mean, sd) in enumerate(line):
            text = "failed" if mean != mean else plus_minus(mean, sd, gap="\n")
            dark = sum(image.cmap(image.norm(mean))[:3]) < 1.2 and mean == mean
            panel.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    panel.set_xticks(range(len(columns)), map(short, columns))
    panel.set_yticks(range(len(rows)), map(short, rows))
    panel.tick_params(length=0)


if __name__ == "__main__":
    run_main(main)
