"""The figure that a training run draws of itself."""

import json
from pathlib import Path

from plumbing.files import read_records, write_figure


def plot_losses(folder: Path) -> None:
    """loss.png of a run. Training does not depend on it: what keeps it from being drawn is said."""
    try:
        write_figure(folder / "loss.png", draw_losses(folder), dpi=120)
    except Exception as error:  # matplotlib's many ways to fail, no right to write, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{folder / 'loss.png'} could not be drawn ({reason}); training goes on")


def draw_losses(folder: Path):
    """Training and validation losses over steps, one panel per term."""
    from matplotlib.figure import Figure  # takes a second to import, and needs no display

    records = read_records(folder / "metrics.jsonl")
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, term, label in zip(
        figure.subplots(1, 2), ("ce", "jepa"), ("cross-entropy, nats per label", "JEPA distance")
    ):
        for key, style in ((term, dict(lw=0.8, alpha=0.7)), (f"val_{term}", dict(marker="o"))):
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                name = "validation" if key.startswith("val_") else "training"
                axis.plot(*zip(*points), label=name, **style)
        axis.set(title=label, xlabel="step")
        axis.legend(frameon=False)
    figure.suptitle(folder.name, parse_math=False)  # a $ in it is no formula
    made = json.loads((folder / "config.json").read_text())["provenance"]
    data = f"{made['data']['dataset']}, train sha256 {made['data']['train_sha256'][:12]}"
    figure.supxlabel(f"{data}, commit {made['commit']}", fontsize=7, color="grey",
                     parse_math=False)  # fmt: skip
    return figure
