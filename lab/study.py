"""The study of English → regex: which JEPA setting, if any, beats the plain language model?

    python -m lab.study STAGE [--dataset=pairs.jsonl] [--jobs=2] [--key=value ...]

A stage trains some arms with some seeds; lab/arms.py has them all. An arm is a few config fields
over one recipe; its runs lie in out/study-<stage>/. The same command again skips what is finished;
with other options give another --out_dir, or they are trained again in its place.

Compared are greedy exact match on 512 validation questions, at several points of training and so
of compute, and the collapse panel. Writes results.json, study.png and two tables. --ask=val, test
or a file of pairs has the trained models answer those too, of a file the first 2,000 whose question
and answer are in neither train nor validation; --samples and --judge choose among several answers,
as in evaluate.py.
"""

import json
import shlex
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import Config, fail, find_recipe, parse_args, read_recipe
from data import files_of, load_data, questions_seen, read_questions
from evaluate import Args, evaluate
from generate import SHARES
from lab.arms import BASE, RECIPE, STAGES, Stage
from lab.sweep import Cell, each_once, make_arm_cell, result_of, train_cells, warn_of_dtypes
from plumbing.files import read_records, write_figure, write_json, write_lines
from plumbing.jsonl import row_of
from plumbing.processes import pick_device, run_main
from plumbing.stats import mean_sd, paired_t, plus_minus
from run import load_run
from views import Pairs, columns_of

USAGE = "\n".join([
    f"python -m lab.study STAGE [--key=value ...]\n\n{__doc__}\nThe stages:",
    *(f"  {name:<12}{stage.summary}" for name, stage in STAGES.items()),
])  # fmt: skip
N_ASKED = 2000  # of a file, at most
CURVES = ("val_exact", "val_prefix", "val_stopped", "val_ce", "flops")
PANEL = ("val_matched", "val_mismatched", "val_retrieval_at_1", "val_effective_rank")

Cells = dict[tuple[str, int], Cell]  # by arm and seed
Results = dict[str, dict[str, list[list[float]]]]  # arm -> figure -> a curve per seed


@dataclass(frozen=True)
class Options(Config):
    # of the study; beside them any field that python train.py --help lists
    jobs: int = 1  # runs to train at a time
    ask: str = ""  # val | test | a file of pairs: what to answer after training
    samples: int = 0  # as in evaluate.py
    judge: float = 0.0  # as in evaluate.py
    ask_score: str = "auto"  # as --score in evaluate.py; regex counts equivalent ones too


class Plan(NamedTuple):
    """What the command line asks for."""

    stage: Stage
    given: dict[str, Any]  # fields for all arms
    folder: Path
    jobs: int
    ask: str  # val | test | a .jsonl of pairs; empty asks nothing after training
    args: Args  # how it is asked


def main(argv: list[str]) -> None:
    plan = parse(argv)
    cells = cells_of(plan)
    n_failed = train_cells(list(cells.values()), plan.jobs)
    results = collect(plan, cells)
    reference = next(iter(plan.stage.arms))
    print("\n".join([*answers_table(results, reference), "", *panel_table(results)]))
    write_results(plan, cells, results, shlex.join(argv))
    if plan.ask:
        runs = {arm: [cells[arm, seed] for seed in plan.stage.seeds] for arm in results}
        print("\n".join(["", *ask(plan, runs, reference)]))
    if n_failed:
        raise SystemExit(1)


# --- what is to be done -----------------------------------------------------------------------


def parse(argv: list[str]) -> Plan:
    """The plan, or a line that says what is wrong with it: now, and not after hours of training."""
    given, names = parse_args(Options, argv, USAGE)
    if len(names) != 1 or names[0] not in STAGES:
        fail(f"name a stage: {', '.join(STAGES)}")
    [name] = names
    stage, jobs, asked = STAGES[name], given.pop("jobs", 1), given.pop("ask", "")
    choosing = {key: given.pop(key) for key in ("samples", "judge") if key in given}
    if jobs < 1:
        fail(f"jobs={jobs} must be at least 1")
    args = Args(score=given.pop("ask_score", "auto"), **choosing)
    if args.samples and not asked:
        fail(f"samples={args.samples} answers to what? --ask=val, test or a file of pairs")
    config = Config(**{**read_recipe(find_recipe(RECIPE)), **BASE, **given})
    if asked == "test" and (files := files_of(config)) and "test" not in files:
        fail(f"ask=test: {config.dataset} has no test split; --ask=questions.jsonl asks a file")
    if asked in ("val", "test"):
        args = replace(args, split=asked)
    elif asked:
        read_questions(Path(asked), config)
    for key, value in given.items():
        if key in ("seed", "init_from") or any(key in fields for fields in stage.arms.values()):
            fail(f"{key}={value}: {name} sets {key} itself, arm by arm or seed by seed")
    if given.get("patience"):
        fail(f"patience={given['patience']}: the arms are compared at equal steps")
    if not given.get("eval_answers", 1):
        fail("eval_answers=0: the arms are compared by the answers they give")
    folder = Path(given.pop("out_dir", f"out/study-{name}"))
    return Plan(stage, given, folder, jobs, asked, args)


def cells_of(plan: Plan) -> Cells:
    """A run for each arm and seed: the recipe, the study's base, what was given, the arm."""
    recipe = find_recipe(RECIPE)
    return {(arm, seed): make_arm_cell(recipe, plan.folder, arm,
                                       {**BASE, **plan.given, **fields}, seed)
            for arm, fields in plan.stage.arms.items() for seed in plan.stage.seeds}  # fmt: skip


# --- what came of it --------------------------------------------------------------------------


def collect(plan: Plan, cells: Cells) -> Results:
    """The evaluations of every arm that is finished with all its seeds."""
    finished = finished_of(cells)
    if len({result["data_sha256"] for result in finished.values()}) > 1:
        fail(f"the runs in {plan.folder} were trained on different data: with another --out_dir "
             "these are trained anew")
    warn_of_dtypes(finished.values())
    results = {}
    for arm in plan.stage.arms:
        if all((arm, seed) in finished for seed in plan.stage.seeds):
            curves = [evaluations(cells[arm, seed].folder) for seed in plan.stage.seeds]
            results[arm] = {key: [[record[key] for record in curve] for curve in curves]
                            for key in ("step", *CURVES, *PANEL)}  # fmt: skip
    if not results:
        fail("no arm is finished")
    return results


def finished_of(cells: Cells) -> dict[tuple[str, int], dict]:
    """Figures of the finished runs, with commit and data."""
    return {at: result for at, cell in cells.items() if (result := result_of(cell))}


def evaluations(folder: Path) -> list[dict]:
    return [record for record in read_records(folder / "metrics.jsonl") if "val_ce" in record]


def write_results(plan: Plan, cells: Cells, results: Results, command: str) -> None:
    """results.json and study.png. Their provenance is that of a run, but for the commits: those of
    all runs, and not that of the code which makes the tables."""
    seeds = plan.stage.seeds
    first = cells[next(iter(results)), seeds[0]]
    made = json.loads((first.folder / "config.json").read_text())
    provenance = {
        **made["provenance"],
        **{key: each_once(finished_of(cells).values(), key) for key in ("commit", "trained_in")},
        "recipe": RECIPE, "command": command, "base": {**BASE, **plan.given}, "seeds": [*seeds],
    }  # fmt: skip
    content = {"provenance": provenance, "arms": results, "options": plan.stage.arms}
    write_json(plan.folder / "results.json", content)
    write_figure(plan.folder / "study.png", draw(results, provenance), dpi=120)
    print(f"wrote {plan.folder / 'results.json'} and study.png")


def answers_table(results: Results, reference: str) -> list[str]:
    """A Markdown row per arm: exact match midway and at the end, and what it took. p tests the end
    against that of the arm `reference`, seed by seed."""
    n = len(next(iter(results.values()))["val_exact"])  # the same for all: every seed counts
    lines = [f"| arm, n = {n} | TFLOP | exact, midway | exact | p | prefix | stopped |",
             "|---|" + "---|" * 6]  # fmt: skip
    expected = at_end(results[reference])["val_exact"] if reference in results else []
    for arm, curves in results.items():
        end = at_end(curves)
        midway = [exact[nearest_to_half(steps)]
                  for exact, steps in zip(curves["val_exact"], curves["step"])]
        p = "" if arm == reference else shown_p(end["val_exact"], expected)
        lines.append(
            f"| {arm} | {statistics.fmean(end['flops']) / 1e12:.1f} | {shown(midway, 3)} | "
            f"{shown(end['val_exact'], 3)} | {p} | {shown(end['val_prefix'], 3)} | "
            f"{shown(end['val_stopped'], 3)} |")  # fmt: skip
    return lines


def nearest_to_half(steps: list[int]) -> int:
    return min(range(len(steps)), key=lambda i: abs(2 * steps[i] - steps[-1]))


def panel_table(results: Results) -> list[str]:
    """A Markdown row per arm: cross-entropy and the collapse panel at the end."""
    lines = ["| arm | CE | matched | mismatched | retrieval@1 | rank |", "|---|" + "---|" * 5]
    for arm, curves in results.items():
        end = at_end(curves)
        panel = [shown(end[key], 1 if "rank" in key else 2) for key in PANEL]
        lines.append(f"| {arm} | {shown(end['val_ce'], 3)} | {' | '.join(panel)} |")
    return lines


def at_end(curves: dict[str, list[list[float]]]) -> dict[str, list[float]]:
    """The last value of every curve: figure -> one per seed."""
    return {key: [curve[-1] for curve in of_seeds] for key, of_seeds in curves.items()}


def shown(values: list[float], digits: int) -> str:
    return plus_minus(*mean_sd(values), digits)


def shown_p(values: list[float], expected: list[float]) -> str:
    """Empty for a single seed, and where the reference is not finished."""
    testable = len(values) > 1 and len(expected) == len(values)
    return f"{paired_t(values, expected):.2g}" if testable else ""


def draw(results: Results, provenance: dict):
    """Exact match against compute, and retrieval@1 against the cosine gap, per arm."""
    from matplotlib.figure import Figure  # takes a second to import, and needs no display

    figure = Figure(figsize=(13, 6), layout="constrained")
    compute, gap = figure.subplots(1, 2, width_ratios=[3, 2])
    styles = ["-", "--", ":", "-."]
    for i, (arm, curves) in enumerate(results.items()):
        exact, flops = np.array(curves["val_exact"]), np.array(curves["flops"]).mean(0) / 1e12
        style = dict(color=f"C{i % 10}", ls=styles[i // 10 % 4])
        compute.plot(flops, exact.mean(0), marker="o", ms=3, label=arm, **style)
        if len(exact) > 1:
            sd = exact.std(0, ddof=1)
            compute.fill_between(flops, exact.mean(0) - sd, exact.mean(0) + sd, alpha=0.15,
                                 color=style["color"], lw=0)  # fmt: skip
        end = {key: statistics.fmean(values) for key, values in at_end(curves).items()}
        at = end["val_matched"] - end["val_mismatched"], end["val_retrieval_at_1"]
        gap.plot(*at, "o", color=style["color"])
        if len(results) > 10:  # than there are colours
            gap.annotate(arm, at, fontsize=6, xytext=(3, 2), textcoords="offset points")
    compute.set(xlabel="TFLOP spent in training", ylabel="exact match, validation")
    compute.legend(frameon=False, fontsize=7)
    gap.set(xlabel="cosine, matched − mismatched", ylabel="retrieval@1")
    data = provenance["data"]
    figure.suptitle(f"{data['dataset']}, {data['train_rows']} rows", parse_math=False)
    figure.supxlabel(
        f"seeds {provenance['seeds']}, mean ± sd; train sha256 {data['train_sha256'][:12]}, commit "
        f"{provenance['commit']}, torch {provenance['torch']}, {provenance['time']}",
        fontsize=7, color="grey", parse_math=False,
    )  # fmt: skip
    return figure


# --- asking the trained models ----------------------------------------------------------------


def ask(plan: Plan, runs: dict[str, list[Cell]], reference: str) -> list[str]:
    """A Markdown row per arm: what its models answer right of a split, or of what is new in a file
    of pairs: answers that no model was trained on and no setting was chosen by."""
    config = next(iter(runs.values()))[0].config
    args = replace(plan.args, dtype=config.dtype)
    if plan.ask not in ("val", "test"):
        name = Path(plan.ask).name.partition(".")[0]
        args = replace(args, file=str(plan.folder / f"new-{name}.jsonl"))
        write_lines(Path(args.file), new_questions(Path(plan.ask), config))
    device, autocast = pick_device(config.device, config.dtype)
    summaries = {
        arm: [evaluate(load_run(cell.folder, device), args, autocast)[0] for cell in cells]
        for arm, cells in runs.items()
    }
    seeds = next(iter(summaries.values()))  # every arm that is finished has them all
    keys = [key for key in SHARES if key in seeds[0]]  # equivalent is there for regexes alone
    drawn = f", best of {args.samples + 1}, judge {args.judge:g}" if args.samples else ""
    head = f"| arm, n = {len(seeds)}, on {seeds[0]['n']} of {plan.ask}{drawn}"
    lines = [f"{head} | {' | '.join(keys)} | p |", "|---|" + "---|" * (len(keys) + 1)]
    expected = [summary["exact"] for summary in summaries.get(reference, [])]
    for arm, of_seeds in summaries.items():
        shares = {key: [summary[key] for summary in of_seeds] for key in keys}
        told = " | ".join(shown(values, 3) for values in shares.values())
        p = "" if arm == reference else shown_p(shares["exact"], expected)
        lines.append(f"| {arm} | {told} | {p} |")
    return lines


def new_questions(path: Path, config: Config) -> list[dict]:
    """The first pairs of a file of which neither question nor answer is in train or validation, as
    rows. Questions are compared as the splits do it. Answers are compared as they are trained on:
    the number alone, perhaps."""
    data, rows = load_data(config), read_questions(path, config)  # all arms have the same data
    asked = Pairs(*columns_of(rows[:], data.tokenizer, config), config, data.tokenizer.vocab_size)

    def answers_of(pairs: Pairs) -> list[str]:
        return [data.tokenizer.decode(pairs.answer(example)) for example in range(len(pairs))]

    seen = questions_seen(rows, config, "train", "val")
    answers = {answer for split in ("train", "val") for answer in answers_of(data.pairs[split])}
    new = [row for row, is_seen, answer in zip(rows, seen, answers_of(asked))
           if not is_seen and answer not in answers]  # fmt: skip
    if not new:
        fail(f"ask={path}: question or answer of each of its {len(rows)} pairs is in train or "
             "validation, so nothing in it is new to the models; python evaluate.py RUN ... "
             "--file=... asks all of it")
    print(f"{len(new)} of the {len(rows)} pairs of {path} are new: neither question nor answer is "
          f"in train or validation; the first {min(len(new), N_ASKED)} are asked")
    return [row_of(pair, config.fields) for pair in new[:N_ASKED]]


if __name__ == "__main__":
    run_main(main)
