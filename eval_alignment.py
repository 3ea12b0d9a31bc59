"""Do the two views of a held-out pair meet, or has the model collapsed? A figure and its numbers.

    python eval_alignment.py              every run under out/ on the newest run's data
    python eval_alignment.py RUN ...      these runs (folders or checkpoint files)

Writes alignment.png and alignment.json beside the runs. It only evaluates, it never trains. An
untrained model of the first run's size is measured as the floor: a cosine means nothing without
the cosine of mismatched pairs, and neither means much without what no training at all gives.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import fail, parse_args
from data import load_data
from jepa import alignment, cosines, off_diagonal, verdict
from model import GPT
from run import (
    encode_pairs,
    exit_quietly,
    load_run,
    pick_device,
    read_metrics,
    runs_newest_first,
    versions,
)

MATCHED, MISMATCHED = "#c8553d", "#7d8ca3"
N_SHOWN = 32  # pairs in the similarity matrix


@dataclass(frozen=True)
class Args:
    # which pairs
    split: str = "val"  # val | test; choose on val, report on test
    n_pairs: int = 256  # held-out pairs, the same for every run
    data_dir: str = ""  # folder of the data, if it is no longer where the runs found it
    # how
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16


@dataclass
class Measured:
    """One model on the held-out pairs."""

    numbers: dict[str, Any]  # what alignment.json holds
    cosines: torch.Tensor  # (n, n) every pred with every target
    curve: list[dict]  # evaluations during training, from metrics.jsonl


def main(argv: list[str]) -> None:
    values, names = parse_args(Args, argv, "python eval_alignment.py [RUN ...] [--key=value ...]")
    args = Args(**values)
    if args.split not in ("val", "test") or args.n_pairs < 2:
        fail(f"split={args.split} must be val or test, and n_pairs={args.n_pairs} at least 2")
    device, autocast = pick_device(args.device, args.dtype)
    paths = [Path(name) for name in names] or same_data(runs_newest_first())

    measured, floor, digest = [], None, None
    for path in paths:
        run = load_run(path, device)
        trained_on = run.provenance["data"]
        data = load_data(
            replace(run.config, data_dir=args.data_dir or run.config.data_dir), run.tokenizer
        )
        if data.provenance["train_sha256"] != trained_on["train_sha256"]:
            fail(f"{run.path} was trained on {trained_on['dataset']} from {trained_on['source']}, "
                 f"other data than {data.provenance['source']} holds; --data_dir names a folder")
        if digest not in (None, trained_on["train_sha256"]):
            fail(f"{run.path} was trained on other data than {paths[0]}: compare runs on one set")
        pairs = data.pairs.get(args.split)
        if pairs is None or pairs.has_target(np.arange(min(args.n_pairs, len(pairs)))).sum() < 2:
            fail(f"{data.provenance['source']} has fewer than 2 {args.split} pairs")
        digest = trained_on["train_sha256"]

        def measure(name, model, step, curve, config=run.config, pairs=pairs):
            val_ce, pred, target = encode_pairs(model, pairs, args.n_pairs, device, autocast)
            measures = alignment(pred, target)
            numbers = {
                "name": name, "step": step, "jepa_weight": config.jepa_weight if step else None,
                "seed": config.seed, "ce": val_ce, **measures, "pairs": verdict(measures),
            }  # fmt: skip
            return Measured(numbers, cosines(pred, target), curve)

        curve = [r for r in read_metrics(run.path.parent / "metrics.jsonl") if "val_ce" in r]
        measured.append(measure(run.name, run.model, run.step, curve))
        if floor is None:
            torch.manual_seed(run.config.seed)
            untrained = GPT(run.config, run.tokenizer.vocab_size, pairs.layout.parents).to(device)
            floor = measure("untrained", untrained, 0, [])
    # JEPA first, then the baselines, then the floor
    measured = [*sorted(measured, key=lambda m: m.numbers["jepa_weight"] == 0), floor]

    n = len(floor.cosines)
    about = {"split": args.split, "n_pairs": n, "data": data.provenance, **versions()}
    folder = (paths[0] if paths[0].is_dir() else paths[0].parent).resolve().parent
    numbers = [m.numbers for m in measured]
    results = json.dumps({**about, "models": numbers}, indent=1)
    (folder / "alignment.json").write_text(results + "\n")
    figure = draw(measured, about)
    figure.savefig(folder / "alignment.png", dpi=110)
    header, *rows = table(numbers)
    print(f"\n{n} held-out pairs of {data.provenance['dataset']} ({args.split}); retrieval@1 by "
          f"chance {1 / n:.3f}")
    for cells in (header, *rows):
        print(f"{cells[0]:<24}" + "".join(f"{cell:>15}" for cell in cells[1:]))
    print(f"wrote {folder / 'alignment.png'} and alignment.json")


def same_data(paths: list[Path]) -> list[Path]:
    """Of the runs, newest first, those that were trained on the same data as the first."""

    def digest(path: Path) -> str:
        try:
            about = json.loads((path / "config.json").read_text())
            return about["provenance"]["data"]["train_sha256"]
        except (OSError, ValueError, KeyError):
            return fail(f"{path}/config.json is missing or damaged; name the runs to compare")

    digests = {path: digest(path) for path in paths}
    return sorted(path for path in paths if digests[path] == digests[paths[0]])


def table(numbers: list[dict]) -> list[list[str]]:
    """Header and a row per model."""
    header = ["model", "CE", "matched", "mismatched", "retrieval@1", "mean rank",
              "rank pred", "rank target", "pairs are"]  # fmt: skip
    return [header] + [
        [m["name"], f"{m['ce']:.3f}", f"{m['matched']:.3f}", f"{m['mismatched']:.3f}",
         f"{m['retrieval_at_1']:.3f}", f"{m['mean_rank']:.1f}", f"{m['effective_rank_pred']:.1f}",
         f"{m['effective_rank_target']:.1f}", m["pairs"]]
        for m in numbers
    ]  # fmt: skip


def draw(measured: list[Measured], about: dict[str, Any]):
    """The figure: per model a histogram and a similarity matrix, then training, then the table."""
    from matplotlib.figure import Figure

    n_models = len(measured)
    figure = Figure(figsize=(max(11, 3.6 * n_models), 13.5), layout="constrained")
    data = about["data"]
    figure.suptitle(
        f"PRED against answer: {about['n_pairs']} held-out pairs of {data['dataset']} "
        f"({about['split']})",
        fontsize=15, fontweight="bold",
    )  # fmt: skip
    heights = [3, 3, 3, 0.5 + 0.32 * (n_models + 1)]
    top, middle, low, bottom = figure.subfigures(4, 1, height_ratios=heights)

    low_end = min(m.cosines.min().item() for m in measured)
    bins = torch.linspace(max(-1, low_end - 0.02), 1, 61).numpy()
    for m, axis in zip(measured, top.subplots(1, n_models, squeeze=False)[0]):
        for values, name, color in (
            (off_diagonal(m.cosines), "mismatched", MISMATCHED),
            (m.cosines.diagonal(), "matched", MATCHED),
        ):
            axis.hist(values.numpy(), bins, density=True, color=color, alpha=0.75, label=name)
            axis.axvline(values.mean(), color=color, lw=1.2, ls="--")
        weight = m.numbers["jepa_weight"]
        kind = "" if weight is None else f"\nλ = {weight:g}, step {m.numbers['step']}"
        axis.set_title(f"{m.numbers['name']}{kind}", fontsize=11)
        axis.set(xlabel="cosine", yticks=[])
        axis.spines[["top", "right", "left"]].set_visible(False)
    top.axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    top.axes[0].set_ylabel("density")

    for m, axis in zip(measured, middle.subplots(1, n_models, squeeze=False)[0]):
        image = axis.imshow(m.cosines[:N_SHOWN, :N_SHOWN], vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(xlabel="answer", ylabel="[PRED] of question", xticks=[], yticks=[])
    shown = min(N_SHOWN, about["n_pairs"])
    middle.colorbar(image, ax=middle.axes[:n_models], shrink=0.8, label="cosine")
    middle.axes[0].set_title(f"{shown} pairs: alignment is a red diagonal alone", fontsize=10)

    runs = measured[:-1]
    colors = ["#c8553d", "#2a6f97", "#588157", "#9a6fb0", "#d99a2b", "#5c5c5c", "#2fa4a0"]
    cosine, retrieval, ce = low.subplots(1, 3)
    for i, m in enumerate(runs):
        color, name = colors[i % len(colors)], m.numbers["name"]
        steps = [0] + [r["step"] for r in m.curve]  # 0: the untrained model
        floor = measured[-1].numbers

        def series(key, curve=m.curve, floor=floor):
            return [floor[key.removeprefix("val_")]] + [r[key] for r in curve]

        cosine.plot(steps, series("val_matched"), color=color, marker="o", ms=3, label=name)
        cosine.plot(steps, series("val_mismatched"), color=color, marker="o", ms=3, ls=":")
        retrieval.plot(steps, series("val_retrieval_at_1"), color=color, marker="o", ms=3)
        ce.plot(steps[1:], series("val_ce")[1:], color=color, marker="o", ms=3)
    cosine.set_title("cosine: matched (line), mismatched (dots)", fontsize=10)
    cosine.legend(frameon=False, fontsize=9)
    retrieval.set_title("retrieval@1 (dashed: chance)", fontsize=10)
    retrieval.axhline(1 / about["n_pairs"], color="grey", ls="--", lw=1)
    ce.set_title("validation cross-entropy, nats per label", fontsize=10)
    for axis in (cosine, retrieval, ce):
        axis.set_xlabel("training step")
        axis.spines[["top", "right"]].set_visible(False)

    axis = bottom.subplots()
    axis.axis("off")
    header, *rows = table([m.numbers for m in measured])
    cells = axis.table(rows, colLabels=header, loc="center", cellLoc="right",
                       colWidths=[0.2] + [0.1] * (len(header) - 1))  # fmt: skip
    cells.auto_set_font_size(False)
    cells.set_fontsize(9.5)
    cells.scale(1, 1.4)
    for (row, _), cell in cells.get_celld().items():
        cell.set_edgecolor("#d0d0d0")
        cell.visible_edges = "B"
        if row == 0:
            cell.set_text_props(fontweight="bold")
    figure.text(
        0.01, 0.003,
        f"{data['source']}, train sha256 {data['train_sha256'][:12]}, tokenizer "
        f"{data['tokenizer']}, commit {about['commit']}, torch {about['torch']}, {about['time']}; "
        f"chance retrieval@1 {1 / about['n_pairs']:.3f}",
        fontsize=7, color="grey",
    )  # fmt: skip
    return figure


if __name__ == "__main__":
    exit_quietly(main)
