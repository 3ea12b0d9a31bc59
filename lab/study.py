"""The study of English → regex: which JEPA setting, if any, beats the plain language model?

    python study.py STAGE [--dataset=pairs.jsonl] [--jobs=2] [--key=value ...]

    coarse      23 arms, one seed
    families    the best of each family, five seeds
    main        three arms, five seeds
    two         two of those, for other data
    longer      at equal compute, with and without dropout
    dropout     the same with the best dropout of each arm
    converged   at equal compute until it levels off, for all rows of a file
    variants    every layout, loss and option, one seed

An arm is a few config fields over one recipe, nlrx_jepa; its runs lie in out/study-<stage>/. The
same command again skips what is finished; with other options give another --out_dir, or they are
trained again in its place. Compared are greedy exact match on 512 validation questions, at several
points of training and so of compute, and the collapse panel. Writes results.json, study.png and a
table as in LOG.md. --ask=val, test or a file of pairs has the trained models answer those too, of
a file the first 2,000 whose answer is in neither train nor validation; --samples and --judge choose
among several answers, as in evaluate.py.
"""

import json
import math
import shlex
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import Config, check, fail, find_recipe, parse_args, read_recipe
from data import load_data, read_jsonl
from evaluate import SHARES, Args, evaluate
from run import exit_quietly, load_run, pick_device, read_records
from sweep import Cell, all_of, final, mean_sd, number, train_cells
from views import CODE

RECIPE = "nlrx_jepa"
BASE = dict(
    train_rows=2000, system_prompt="drop", max_iters=600, eval_interval=150, eval_answers=512,
    eval_pairs=512, log_interval=50, spread="none", spread_weight=0.0,
)  # fmt: skip
# How the variants were run, before the first two were found to cost λ = 0 a sixth of its accuracy.
EARLIER = dict(labels="answer", bpe_vocab_size=1024, min_lr=2e-4, max_iters=500, eval_interval=250)
NCE = dict(jepa_loss="infonce", jepa_weight=0.05, jepa_warmup_iters=0)
DEFAULT = dict(jepa_weight=0.3, spread="cross", spread_weight=0.6)
MAIN = {"λ 0": dict(jepa_weight=0.0), "cosine λ .3, cross": DEFAULT, "InfoNCE λ .05": NCE}
STAGES = {
    "variants": ((0,), {name: dict(DEFAULT, **EARLIER, **options) for name, options in {
        "tree (the default)": {}, "isolated": dict(layout="isolated"), "plan": dict(layout="plan"),
        "reverse": dict(direction="reverse"), "front": dict(pred_place="front"),
        "k 0": dict(n_pred=0), "k 4": dict(n_pred=4), "stop_grad": dict(stop_grad=True),
        "ema .99": dict(ema=0.99), "Enc mean": dict(pooling="mean"),
        "l2": dict(jepa_loss="l2"), "mse": dict(jepa_loss="mse"),
        "InfoNCE": dict(jepa_loss="infonce", spread="none", spread_weight=0.0),
        "cosine alone": dict(spread="none", spread_weight=0.0),
        "vicreg": dict(spread="vicreg", spread_weight=0.1),
        "sigreg": dict(spread="sigreg", spread_weight=0.02),
        "half the steps": dict(jepa_dropout=0.5),
        "half the examples": dict(jepa_dropout=0.5, jepa_dropout_per="example"),
        "λ 0": dict(jepa_weight=0.0),
    }.items()}),
    "coarse": ((0,), {  # seeds, arms
        "λ 0": dict(jepa_weight=0.0),
        "λ 0, lr 2e-3": dict(jepa_weight=0.0, learning_rate=2e-3),
        "λ 0, lr 5e-4": dict(jepa_weight=0.0, learning_rate=5e-4),
        "cosine λ .3, cross": DEFAULT,
        "cosine λ .3, cross, lr 2e-3": dict(DEFAULT, learning_rate=2e-3),
        "cosine λ .3, cross, lr 5e-4": dict(DEFAULT, learning_rate=5e-4),
        "InfoNCE λ .05": NCE,
        "InfoNCE λ .05, lr 2e-3": dict(NCE, learning_rate=2e-3),
        "InfoNCE λ .05, lr 5e-4": dict(NCE, learning_rate=5e-4),
        "cosine λ 1": dict(jepa_weight=1.0, jepa_warmup_iters=0),
        "InfoNCE λ .05, stop_grad": dict(NCE, stop_grad=True),
        "cosine λ .3, cross, k 4": dict(DEFAULT, n_pred=4),
        "plan, λ 0": dict(layout="plan", jepa_weight=0.0),
        "plan, InfoNCE λ .05": dict(NCE, layout="plan"),
        "InfoNCE λ .2, LD .75": dict(NCE, jepa_weight=0.2, jepa_dropout=0.75),
        "cosine λ .5, sigreg .02": dict(jepa_weight=0.5, spread="sigreg", spread_weight=0.02),
        "cosine λ .5, vicreg .1": dict(jepa_weight=0.5, spread="vicreg", spread_weight=0.1),
        "cosine λ .5, sigreg .005": dict(jepa_weight=0.5, spread="sigreg", spread_weight=0.005),
        "cosine λ .5, vicreg .5": dict(jepa_weight=0.5, spread="vicreg", spread_weight=0.5),
        "cosine λ .3, cross, stop_grad": dict(DEFAULT, stop_grad=True),
        "InfoNCE λ .05, k 0": dict(NCE, n_pred=0),
        "InfoNCE λ .05, k 2": dict(NCE, n_pred=2),
        "InfoNCE λ .1, LD .5": dict(NCE, jepa_weight=0.1, jepa_dropout=0.5),
    }),
    "main": (range(5), MAIN),
    "two": (range(5), {arm: MAIN[arm] for arm in ("λ 0", "InfoNCE λ .05")}),
    "families": (range(5), {  # with what did best of it in the coarse pass and did not collapse
        "λ 0": MAIN["λ 0"],
        "plan, λ 0": dict(layout="plan", jepa_weight=0.0),
        "plan, InfoNCE λ .05": dict(NCE, layout="plan"),
        "InfoNCE λ .05, k 2": dict(NCE, n_pred=2),
        "InfoNCE λ .05, k 4": dict(NCE, n_pred=4),
        "InfoNCE λ .05, stop_grad": dict(NCE, stop_grad=True),
        "InfoNCE λ .1, LD .5": dict(NCE, jepa_weight=0.1, jepa_dropout=0.5),
        "cosine λ .5, sigreg .005": dict(jepa_weight=0.5, spread="sigreg", spread_weight=0.005),
    }),
    "longer": (range(5, 10), {  # other seeds, as many operations in all arms on Turk
        "λ 0, dropout .1, 1,645 steps": dict(
            jepa_weight=0.0, dropout=0.1, max_iters=1645, eval_interval=411),
        "InfoNCE λ .05, dropout .1, 1,200 steps": dict(
            NCE, dropout=0.1, max_iters=1200, eval_interval=300),
        "λ 0, 1,645 steps": dict(jepa_weight=0.0, max_iters=1645, eval_interval=411),
        "InfoNCE λ .05, 1,200 steps": dict(NCE, max_iters=1200, eval_interval=300),
    }),
    "converged": (range(3), {  # with --train_rows=0, 13 epochs of NL-RX
        "λ 0, 3,000 steps": dict(jepa_weight=0.0, max_iters=3000, eval_interval=750),
        "InfoNCE λ .2, LD .75, 2,727 steps": dict(
            NCE, jepa_weight=0.2, jepa_dropout=0.75, max_iters=2727, eval_interval=682),
    }),
    "dropout": (range(5, 10), {  # as longer, each arm with its best dropout and share of JEPA steps
        "λ 0, dropout .2, 1,645 steps": dict(
            jepa_weight=0.0, dropout=0.2, max_iters=1645, eval_interval=411),
        "InfoNCE λ .2, LD .75, dropout .2, 1,504 steps": dict(
            NCE, jepa_weight=0.2, jepa_dropout=0.75, dropout=0.2, max_iters=1504,
            eval_interval=376),
    }),
}  # fmt: skip
USAGE = f"python study.py STAGE [--key=value ...]\n\n{__doc__}"
ROLES = {"system": "system", "user": "text", "assistant": "code"}
CURVES = ("val_exact", "val_prefix", "val_stopped", "val_ce", "flops")
PANEL = ("val_matched", "val_mismatched", "val_retrieval_at_1", "val_effective_rank")


@dataclass(frozen=True)
class Options(Config):
    # of the study; beside them any field that python train.py --help lists
    jobs: int = 1  # runs to train at a time
    ask: str = ""  # val | test | a .jsonl of pairs: what to answer after training
    samples: int = 0  # as in evaluate.py
    judge: float = 0.0  # as in evaluate.py


def main(argv: list[str]) -> None:
    given, names = parse_args(Options, argv, USAGE)
    if len(names) != 1 or names[0] not in STAGES:
        fail(f"name a stage: {', '.join(STAGES)}")
    [stage] = names
    jobs = given.pop("jobs", 1)
    if jobs < 1:
        fail(f"jobs={jobs} must be at least 1")
    choosing = {key: given.pop(key) for key in ("samples", "judge") if key in given}
    questions = Args(score="regex", split=given.pop("ask", ""), **choosing)
    if questions.samples and not questions.split:
        fail(f"samples={questions.samples} answers to what? --ask=val, test or a file of pairs")
    file = given.get("dataset", "")
    if questions.split == "test" and file.endswith(".jsonl"):
        fail(f"ask=test: {file} has no test split; --ask=questions.jsonl asks a file")
    if questions.split not in ("", "val", "test"):  # now, and not after hours of training
        read_jsonl(Path(questions.split), given.get("bad_lines", "error"))
    seeds, arms = STAGES[stage]
    for key in given:
        if key in ("seed", "init_from") or any(key in options for options in arms.values()):
            fail(f"{key}={given[key]}: {stage} sets {key} itself, arm by arm or seed by seed")
    if not given.get("eval_answers", 1):
        fail("eval_answers=0: the arms are compared by the answers they give")
    folder = Path(given.pop("out_dir", f"out/study-{stage}"))
    cells = {(arm, seed): make_cell(folder, arm, {**BASE, **given, **options}, seed)
             for arm, options in arms.items() for seed in seeds}  # fmt: skip
    n_failed = train_cells(list(cells.values()), jobs)

    finished = {at: figures for at, cell in cells.items() if (figures := final(cell))}
    if len({figures["data_sha256"] for figures in finished.values()}) > 1:
        fail(f"the runs in {folder} were trained on different data: with another --out_dir these "
             "are trained anew")
    results = {}
    for arm in arms:
        if all((arm, seed) in finished for seed in seeds):  # an arm counts with all its seeds
            curves = [evaluations(cells[arm, seed].folder) for seed in seeds]
            results[arm] = {key: [[record[key] for record in curve] for curve in curves]
                            for key in ("step", *CURVES, *PANEL)}  # fmt: skip
    if not results:
        fail("no arm is finished")
    first = next(iter(arms))  # p is against this one
    print("\n".join(table(results, first)))
    about = json.loads((cells[next(iter(results)), seeds[0]].folder / "config.json").read_text())
    # The runs' commits, not that of this table.
    commits = all_of(finished.values(), "commit")
    provenance = {**about["provenance"], "commit": commits, "recipe": RECIPE,
                  "command": shlex.join(argv), "base": {**BASE, **given},
                  "seeds": [*seeds]}  # fmt: skip
    (folder / "results.json").write_text(
        json.dumps({"provenance": provenance, "arms": results, "options": arms}, indent=1) + "\n")
    draw(results, provenance).savefig(folder / "study.png", dpi=120)
    print(f"wrote {folder / 'results.json'} and study.png")
    if questions.split:
        by_arm = {arm: [cells[arm, seed] for seed in seeds] for arm in results}
        print("\n".join(ask(by_arm, first, questions, folder)))
    if n_failed:
        raise SystemExit(1)


def ask(arms: dict[str, list[Cell]], first: str, args: Args, folder: Path) -> list[str]:
    """A Markdown row per arm: what its models answer right of a split, or of what is new in a file
    of pairs: answers that no model was trained on and no setting was chosen by."""
    questions, config = args.split, next(iter(arms.values()))[0].config
    if questions not in ("val", "test"):
        data = load_data(config)  # all arms have the same rows
        known = {data.tokenizer.decode(pairs.view(row, CODE))
                 for split in ("train", "val") for pairs in [data.pairs[split]]
                 for row in range(len(pairs))}  # fmt: skip
        rows = read_jsonl(Path(questions), config.bad_lines)[:]
        new = [[{"role": role, "content": row[key]} for role, key in ROLES.items() if row[key]]
               for row in rows if row["code"] not in known]  # fmt: skip
        args = replace(args, file=str(folder / f"new-{Path(questions).name}"))
        lines = (json.dumps({"messages": messages}) + "\n" for messages in new[:2000])
        Path(args.file).write_text("".join(lines))
    device, autocast = pick_device(config.device, config.dtype)
    found = {arm: [evaluate(load_run(cell.folder, device), args, autocast)[0] for cell in cells]
             for arm, cells in arms.items()}  # fmt: skip
    n = next(iter(found.values()))[0]["n"]
    reference = [summary["exact"] for summary in found.get(first, [])]
    drawn = f", best of {args.samples + 1}, judge {args.judge:g}" if args.samples else ""
    lines = [f"| arm, on {n} of {questions}{drawn} | n | {' | '.join(SHARES)} | p |",
             "|---|---|" + "---|" * (len(SHARES) + 1)]  # fmt: skip
    for arm, summaries in found.items():
        shares = {key: [summary[key] for summary in summaries] for key in SHARES}
        cells = [shown(values, 3) for values in shares.values()]
        p = "" if arm == first else shown_p(shares["exact"], reference)
        lines.append(f"| {arm} | {len(summaries)} | {' | '.join(cells)} | {p} |")
    return lines


def make_cell(folder: Path, arm: str, options: dict, seed: int) -> Cell:
    """One run: the recipe, the study's base, the arm's options, a seed."""
    path = find_recipe(RECIPE)
    name = arm.replace(" ", "_").replace(",", "").replace("λ", "lambda")
    own = {**options, "seed": seed, "out_dir": f"{folder}/{name}-{seed}"}
    config = Config(**{**read_recipe(path), "recipe": path.stem, **own})
    check(config)
    command = (str(path), *(f"--{key}={value}" for key, value in own.items()))
    return Cell({"arm": arm, "seed": seed}, command, config, Path(own["out_dir"]))


def evaluations(folder: Path) -> list[dict]:
    return [record for record in read_records(folder / "metrics.jsonl") if "val_ce" in record]


def table(results: dict[str, dict], first: str) -> list[str]:
    """A Markdown row per arm: exact match midway and at the end, and the panel, mean ± sd; the
    last column tests the end against that of the arm `first`, seed by seed."""
    lines = ["| arm | n | TFLOP | exact, midway | exact | prefix | stopped | CE | matched | "
             "mismatched | retrieval@1 | rank | p |", "|---|" + "---|" * 12]  # fmt: skip
    reference = [curve[-1] for curve in results[first]["val_exact"]] if first in results else []
    for arm, r in results.items():
        last = {key: [curve[-1] for curve in r[key]] for key in r}
        midway = [curve[len(curve) // 2 - 1] for curve in r["val_exact"]]
        p = "" if arm == first else shown_p(last["val_exact"], reference)
        cells = [shown(last[key], 3) for key in ("val_prefix", "val_stopped", "val_ce")]
        cells += [shown(last[key], 1 if "rank" in key else 2) for key in PANEL]
        lines.append(f"| {arm} | {len(midway)} | {statistics.fmean(last['flops']) / 1e12:.1f} | "
                     f"{shown(midway, 3)} | {shown(last['val_exact'], 3)} | "
                     + " | ".join(cells) + f" | {p} |")  # fmt: skip
    return lines


def shown(values: list[float], digits: int) -> str:
    return number(*mean_sd(values), digits)


def shown_p(values: list[float], reference: list[float]) -> str:
    """Empty for a single seed, and where the reference is not finished."""
    testable = len(values) > 1 and len(reference) == len(values)
    return f"{paired_t(values, reference):.2g}" if testable else ""


def paired_t(a: list[float], b: list[float]) -> float:
    """Two-sided p of the paired t-test of n differences, by integrating Student's density."""
    differences = np.subtract(a, b)
    n, sd = len(differences), differences.std(ddof=1)
    if sd == 0:
        return 1.0 if differences.mean() == 0 else 0.0
    t, df = abs(differences.mean()) / (sd / math.sqrt(n)), n - 1
    x = np.linspace(0, t, 20001)
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    inside = np.trapezoid(np.exp(log_c) * (1 + x * x / df) ** (-(df + 1) / 2), x)
    return max(0.0, 1 - 2 * float(inside))


def draw(results: dict[str, dict], about: dict):
    """Exact match against compute, and retrieval@1 against the cosine gap, per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    curves, gap = figure.subplots(1, 2, width_ratios=[3, 2])
    styles = ["-", "--", ":", "-."]
    for i, (arm, r) in enumerate(results.items()):
        exact, flops = np.array(r["val_exact"]), np.array(r["flops"]).mean(0) / 1e12
        style = dict(color=f"C{i % 10}", ls=styles[i // 10 % 4])
        curves.plot(flops, exact.mean(0), marker="o", ms=3, label=arm, **style)
        if len(exact) > 1:
            sd = exact.std(0, ddof=1)
            curves.fill_between(flops, exact.mean(0) - sd, exact.mean(0) + sd, alpha=0.15,
                                color=style["color"], lw=0)  # fmt: skip
        end = {key: np.array(r[key])[:, -1].mean() for key in PANEL}
        at = end["val_matched"] - end["val_mismatched"], end["val_retrieval_at_1"]
        gap.plot(*at, "o", color=style["color"])
        if len(results) > 10:  # than there are colours
            gap.annotate(arm, at, fontsize=6, xytext=(3, 2), textcoords="offset points")
    curves.set(xlabel="TFLOP spent in training", ylabel="exact match, validation")
    curves.legend(frameon=False, fontsize=7)
    gap.set(xlabel="cosine, matched − mismatched", ylabel="retrieval@1")
    data = about["data"]
    figure.suptitle(f"{data['dataset']}, {data['train_rows']} rows", parse_math=False)
    figure.supxlabel(
        f"seeds {about['seeds']}, mean ± sd; train sha256 {data['train_sha256'][:12]}, commit "
        f"{about['commit']}, torch {about['torch']}, {about['time']}", fontsize=7, color="grey",
        parse_math=False,
    )  # fmt: skip
    return figure


if __name__ == "__main__":
    exit_quietly(main)
