"""A grid over config fields and seeds: train every cell, then results.csv, a table and heat.png.

    python sweep.py gsm8k_nano --n_pred=0,1,2 --jepa_weight=0.5,1,2 --seed=0,1,2 [--jobs=2]

Values with commas make an axis of the grid; a single value holds for every cell. A cell is a
train.py of its own, in out/sweep-<recipe>/<key=value,...>/ with what it prints in log.txt.
--jobs=N trains N cells at a time, which share the cores; --out_dir=... is the sweep's folder.

Ctrl-C stops: cells in training save first, a second Ctrl-C does not wait. The same command again
skips what is finished and resumes what was interrupted; when nothing is left it only writes the
results anew. A cell whose config has changed is trained again, its old folder moves to earlier/.
Exit code 1: a cell failed.
"""

import csv
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import Config, check, convert, fail, find_recipe, help_text, read_recipe
from run import exit_quietly, read_records, set_aside

USAGE = "python sweep.py RECIPE --key=value,value,... [--key=value ...] [--jobs=N]"
FIGURES = {  # of a finished cell: digits in the table; val_exact where eval_answers asks for it
    "val_ce": 3, "val_exact": 3, "val_matched": 3, "val_mismatched": 3, "val_retrieval_at_1": 3,
    "val_effective_rank": 1, "tflop": 2, "seconds": 1,
}  # fmt: skip
PANELS = (  # of heat.png: title, figure, and a colour map in which brighter is better
    ("validation CE, nats per label", lambda r: r["val_ce"], "viridis_r"),
    ("cosine, matched − mismatched", lambda r: r["val_matched"] - r["val_mismatched"], "viridis"),
    ("retrieval@1", lambda r: r["val_retrieval_at_1"], "viridis"),
)


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

    results = [{**cell.values, **(final(cell) or {})} for cell in cells]
    trained = [result for result in results if "val_ce" in result]
    if trained:
        write_csv(folder / "results.csv", list(axes), results)
        print("\n".join(table(list(axes), trained)))
        about = provenance(recipe, given, results)
        draw(axes, trained, about).savefig(folder / "heat.png", dpi=120)
        print(f"{about}\nwrote {folder / 'results.csv'} and heat.png")
    if len({result["data_sha256"] for result in trained}) > 1:
        print("warning: DIFFERENT DATA. The cells cannot be compared; results.csv has the sha256")
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
            texts[key] = text.split(",")
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
        fail("sweep.py resumes by itself, and writes to one out_dir: neither can be an axis")
    if all(len(values) == 1 for values in given.values()):
        fail("nothing to sweep: give a field several values, as in --jepa_weight=0.5,1,2")
    return find_recipe(recipes[0]), given, int(jobs)


def make_cells(recipe: Path, given: dict[str, list]) -> list[Cell]:
    """Every combination of the values, the last axis fastest, its config checked as a whole."""
    settings = {**read_recipe(recipe), "recipe": recipe.stem, "init_from": "scratch"}
    root = given.get("out_dir", [""])[0] or f"out/sweep-{recipe.stem}"
    cells = {}
    for combination in itertools.product(*given.values()):
        own = dict(zip(given, combination))
        values = {key: value for key, value in own.items() if len(given[key]) > 1}
        name = ",".join(f"{k}={short(v)}" for k, v in values.items()).replace("/", "_")
        own["out_dir"] = f"{root}/{name}"
        config = Config(**{**settings, **own})
        check(config)
        if name in cells:
            fail(f"two cells are called {name}: an axis has a value twice")
        overrides = (f"--{key}={value}" for key, value in own.items())
        cells[name] = Cell(values, (str(recipe), *overrides), config, Path(root) / name)
    return list(cells.values())


def short(value: Any) -> str:
    """A value in a name: 1.0 is 1. Unlike %g it keeps different values apart."""
    return str(value).removesuffix(".0")


# --- training ---------------------------------------------------------------------------------


def train_cells(cells: list[Cell], jobs: int) -> int:
    """Train what is not finished, `jobs` at a time; how many failed. A signal ends the sweep."""
    waiting = []
    for i, cell in enumerate(cells, 1):
        name, result = f"[{i}/{len(cells)}] {cell.folder.name}", final(cell)
        if result:
            print(f"{name} | {summary(result)} | was finished", flush=True)
        else:
            waiting.append((name, cell))
    jobs = min(jobs, len(waiting))
    running, took, n_failed, signals, n_passed_on = {}, [], 0, [], 0
    before = {
        number: signal.signal(number, lambda number, frame: signals.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while running or (waiting and not signals):
            while waiting and len(running) < jobs and not signals:
                name, cell = waiting.pop(0)
                running[launch(cell, jobs)] = name, cell, time.time()
            time.sleep(0.1)
            for child in [c for c in running if c.poll() is not None]:
                name, cell, started = running.pop(child)
                result = final(cell)
                if child.returncode == 0 and result:
                    took.append(time.time() - started)
                    eta = statistics.fmean(took) * (len(waiting) + len(running)) / jobs
                    end = f"{summary(result)} | ETA {eta // 60:.0f}:{eta % 60:02.0f}"
                elif signals:
                    end = "stopped"
                else:
                    n_failed += 1
                    end = f"FAILED, exit code {child.returncode}: {last_line(cell)}"
                print(f"{name} | {end}", flush=True)
            if len(signals) > n_passed_on:
                n_passed_on += 1
                for child in running:
                    child.terminate()  # SIGTERM for both: a background child may ignore SIGINT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in running:  # only after an error of our own
            child.terminate()
    if signals:
        print("stopped; the same command goes on from here")
        raise SystemExit(128 + signals[0])
    return n_failed


def launch(cell: Cell, jobs: int) -> subprocess.Popen:
    """Start or resume the train.py of a cell."""
    has_checkpoint = (cell.folder / "ckpt.pt").exists()
    resume = has_checkpoint and earlier_run(cell) is not None
    if has_checkpoint and not resume:
        set_aside(cell.folder)  # train.py would move the new log.txt along with it
    cell.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-u", str(Path(__file__).with_name("train.py")), *cell.command]
    environment = dict(os.environ)
    if jobs > 1:  # two processes with two threads each on two cores slow each other 3 to 10 times
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    with open(cell.folder / "log.txt", "a" if resume else "w") as log:
        # In a session of its own: the terminal sends Ctrl-C to a whole process group, our SIGTERM
        # would be the child's second signal, and the second one ends it before it has saved.
        return subprocess.Popen(
            [*command, f"--init_from={'resume' if resume else 'scratch'}"], env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def last_line(cell: Cell) -> str:
    lines = (cell.folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'no output'} ({cell.folder / 'log.txt'})"


# --- results ----------------------------------------------------------------------------------


def earlier_run(cell: Cell) -> dict[str, Any] | None:
    """Provenance of the run in a cell's folder, if it was made with the cell's very config."""
    try:
        about = json.loads((cell.folder / "config.json").read_text())
        config = Config(**about["config"])  # a field that is newer than the run has its default
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = replace(config, init_from="scratch", out_dir=cell.config.out_dir) == cell.config
    return about["provenance"] if same else None


def final(cell: Cell) -> dict[str, Any] | None:
    """Figures of the cell's last evaluation, with commit and data; None if it is not finished."""
    about = earlier_run(cell)
    for record in read_records(cell.folder / "metrics.jsonl") if about else []:
        if "val_ce" in record and record["step"] == cell.config.max_iters:
            data, record["tflop"] = about["data"], record["flops"] / 1e12
            return {
                **{key: record[key] for key in FIGURES if key in record},
                "commit": commits_of(about), "data": data["dataset"],
                "data_sha256": data["train_sha256"],
            }
    return None


def commits_of(about: dict[str, Any]) -> str:
    """Of a run's provenance; a run that was resumed by other code has several."""
    sittings = [*about.get("earlier", []), about]
    return " AND ".join(dict.fromkeys(sitting["commit"] for sitting in sittings))


def all_of(results: Iterable[dict[str, Any]], key: str, length: int = 99) -> str:
    """What finished cells have as their data, digests or commits, each once."""
    return " AND ".join(sorted({v[:length] for r in results for v in r[key].split(" AND ")}))


def summary(r: dict[str, Any]) -> str:
    return (f"val ce {r['val_ce']:.4f} | cosine matched {r['val_matched']:.3f} mismatched "
            f"{r['val_mismatched']:.3f} | retrieval@1 {r['val_retrieval_at_1']:.3f} | "
            f"{r['seconds']:.0f} s")  # fmt: skip


def write_csv(path: Path, axes: list[str], results: list[dict]) -> None:
    """A row per cell; a cell that failed has no figures."""
    columns = [*axes, *figures_of(results), "commit", "data", "data_sha256"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)


def figures_of(results: list[dict]) -> dict[str, int]:
    """The figures that some cell has, with their digits."""
    return {f: digits for f, digits in FIGURES.items() if any(f in result for result in results)}


def grouped(results: list[dict], keys: list[str]) -> dict[tuple, list[dict]]:
    """The results by their values of `keys`, in the order of the grid."""
    groups = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; a single value has none, which is not 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def number(mean: float, sd: float | None, digits: int = 3, gap: str = " ") -> str:
    mean = round(mean, digits) + 0.0  # no -0.000
    return f"{mean:.{digits}f}" + (f"{gap}± {sd:.{digits}f}" if sd is not None else "")


def table(axes: list[str], trained: list[dict]) -> list[str]:
    """Lines: for each combination of the axes but the seed, mean ± sample sd over the seeds."""
    keys = [key for key in axes if key != "seed"]
    figures = figures_of(trained)
    rows = [[*keys, "n", *(f.removeprefix("val_").replace("_at_", "@") for f in figures)]]
    for values, group in grouped(trained, keys).items():
        cells = (number(*mean_sd([r[f] for r in group]), digits) if f in group[0] else ""
                 for f, digits in figures.items())  # fmt: skip
        rows.append([*map(short, values), str(len(group)), *cells])
    widths = [max(map(len, column)) for column in zip(*rows)]
    title = "mean ± sample sd over n seeds" if "seed" in axes else "one seed, so no sd"
    return ["", title, *("  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in rows)]


def provenance(recipe: Path, given: dict[str, list], results: list[dict]) -> str:
    """Two lines: what was trained, on which data, by which code."""
    trained = [r for r in results if "val_ce" in r]

    fixed = {k: v[0] for k, v in given.items() if len(v) == 1 and k != "out_dir"}
    overrides = "".join(f" --{key}={value}" for key, value in fixed.items())
    seeds = len(given.get("seed", [1]))
    missing = f", {len(results) - len(trained)} FAILED" if len(trained) < len(results) else ""
    return (f"recipe {recipe.stem}{overrides}; {len(results)} cells{missing}, {seeds} "
            f"seed{'s' * (seeds > 1)}; commit {all_of(trained, 'commit')}\n"
            f"data {all_of(trained, 'data')}, "
            f"train sha256 {all_of(trained, 'data_sha256', 12)}")  # fmt: skip


def draw(axes: dict[str, list], trained: list[dict], about: str):
    """Heat maps over the first two axes but the seed; where there is one, a line with error bars.

    Each combination of further axes has a row of panels. Seeds alone are drawn as the axis.
    """
    from matplotlib.figure import Figure  # takes a second to import, and needs no display

    keys = [key for key in axes if key != "seed"] or ["seed"]
    groups = grouped(trained, keys)
    further = list(itertools.product(*(axes[key] for key in keys[2:])))
    n_down, n_across = (len(axes[key]) for key in keys[:2]) if keys[1:] else (4, len(axes[keys[0]]))
    size = max(12, 3 + 2.4 * n_across), 1.2 + len(further) * (1.1 + 0.7 * n_down)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(further), len(PANELS), squeeze=False)
    for (title, value, colors), column in zip(PANELS, panels.T):
        stats = {at: mean_sd([value(r) for r in group]) for at, group in groups.items()}
        for rest, axis in zip(further, column):
            if keys[1:]:
                draw_heat(axis, axes[keys[0]], axes[keys[1]], rest, stats, colors)
                axis.set(xlabel=keys[1], ylabel=keys[0])
            else:
                draw_line(axis, axes[keys[0]], stats)
                axis.set_xlabel(keys[0])
            where = ", ".join(f"{key}={short(v)}" for key, v in zip(keys[2:], rest))
            axis.set_title(f"{title}\n{where}".strip(), fontsize=10)
    n = sorted({len(group) for group in groups.values()})
    seeds = "one seed" if n == [1] else f"mean ± sample sd over {'-'.join(map(str, n))} seeds"
    figure.suptitle(seeds + ("; brighter is better" if keys[1:] else ""), fontsize=11)
    figure.supxlabel(about, fontsize=7, color="grey", parse_math=False, x=0.01, ha="left")
    return figure


def draw_line(axis, values: list, stats: dict[tuple, tuple]) -> None:
    """A point per value, evenly spaced in the order given: an axis may hold words."""
    for i, value in enumerate(values):
        if (value,) in stats:
            mean, sd = stats[(value,)]
            axis.errorbar(i, mean, sd, marker="o", capsize=4, color="#2a6f97")
            axis.annotate(number(mean, sd, gap="\n"), (i, mean), (7, 0), fontsize=8,
                          textcoords="offset points", va="center",
                          bbox=dict(fc="white", ec="none", pad=0.5, alpha=0.8))  # fmt: skip
    there = [i for i, value in enumerate(values) if (value,) in stats]
    axis.plot(there, [stats[(values[i],)][0] for i in there], color="#2a6f97", lw=1, alpha=0.5)
    axis.set_xticks(range(len(values)), map(short, values))
    axis.set_xlim(-0.3, len(values) - 0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw_heat(axis, rows: list, columns: list, rest: tuple, stats: dict, colors: str) -> None:
    """A square per pair of values; a colour means the same in every row of panels."""
    low, high = (f(mean for mean, _ in stats.values()) for f in (min, max))
    high = max(high, low + 0.1)  # do not paint noise in contrasts
    grid = [[stats.get((r, c, *rest), (float("nan"), None)) for c in columns] for r in rows]
    means = [[mean for mean, _ in line] for line in grid]
    image = axis.imshow(means, cmap=colors, vmin=low, vmax=high, aspect="auto")
    for i, line in enumerate(grid):
        for j, (mean, sd) in enumerate(line):
            text = "failed" if mean != mean else number(mean, sd, gap="\n")
            dark = sum(image.cmap(image.norm(mean))[:3]) < 1.2 and mean == mean
            axis.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(len(columns)), map(short, columns))
    axis.set_yticks(range(len(rows)), map(short, rows))
    axis.tick_params(length=0)


if __name__ == "__main__":
    exit_quietly(main)
