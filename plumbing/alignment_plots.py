"""The two figures of eval_alignment.py, which measures what they show.

    draw_pairs   alignment.png: cosines of right and wrong pairs, training, a table
    draw_panel   alignment_panel.png: measures by layer, singular values, views in a plane, a table

A model here is a name and a list of eval_alignment.Measured, one for every seed. Curves are means
over the seeds in a band of one standard deviation; where one seed has to do, its title says so.
Pairs with the same answer are no wrong pair of each other: they are left out, blank in the matrix.
"""

import contextlib
import functools
import math
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from jepa import wrong_pairs

MATCHED, MISMATCHED = "#c8553d", "#7d8ca3"
COLORS = ["#c8553d", "#2a6f97", "#588157", "#9a6fb0", "#d99a2b", "#5c5c5c", "#2fa4a0"]
GREY = "#a8a8a8"  # the untrained model
VIEWS = (("Enc(text)", "#2a6f97"), ("Enc(code)", "#588157"), ("Pred(text)", "#c8553d"))
N_SHOWN = 32  # pairs in the similarity matrix, and joined by lines in the plane

Models = list[tuple[str, list[Any]]]  # a name, and an eval_alignment.Measured for every seed


def draw_pairs(models: Models, table: list[list[str]], about: dict[str, Any]):
    """The figure: per model a histogram and a similarity matrix, then training, then the table."""
    title = "PRED against answer"
    figure, (top, middle, low, bottom) = start_figure(title, models, about, [3, 3, 3.2])
    low_end = min(m.cosines.min().item() for _, group in models for m in group)
    bins = torch.linspace(max(-1, low_end - 0.02), 1, 61).numpy()
    for (name, group), axis in zip(models, top.subplots(1, len(models), squeeze=False)[0]):
        for values, label, color in (
            (torch.cat([m.cosines[wrong_pairs(m.cosines, m.groups)] for m in group]),
             "mismatched", MISMATCHED),
            (torch.cat([m.cosines.diagonal() for m in group]), "matched", MATCHED),
        ):
            values = values[values.isfinite()]  # none without wrong pairs, or after divergence
            if len(values):
                axis.hist(values.numpy(), bins, density=True, color=color, alpha=0.75, label=label)
                axis.axvline(values.mean(), color=color, lw=1.2, ls="--")
        weight, step = group[0].numbers["jepa_weight"], group[0].numbers["step"]
        seeds = f", {len(group)} seeds" if len(group) > 1 else ""
        kind = "" if weight is None else f"\nλ = {weight:g}, step {step}{seeds}"
        axis.set_title(f"{name}{kind}", fontsize=11, parse_math=False)
        axis.set(xlabel="cosine", yticks=[])
        axis.spines[["top", "right", "left"]].set_visible(False)
    top.axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    top.axes[0].set_ylabel("density")

    for (_, group), axis in zip(models, middle.subplots(1, len(models), squeeze=False)[0]):
        right_or_wrong = wrong_pairs(group[0].cosines, group[0].groups).fill_diagonal_(True)
        shown = group[0].cosines.where(right_or_wrong, math.nan)[:N_SHOWN, :N_SHOWN]
        image = axis.imshow(shown.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        seed = f" (seed {group[0].numbers['seed']})" if len(group) > 1 else ""
        axis.set(xlabel=f"answer{seed}", ylabel="[PRED] of question", xticks=[], yticks=[])
    middle.colorbar(image, ax=middle.axes[: len(models)], shrink=0.8, label="cosine")
    middle.axes[0].set_title(f"{len(shown)} pairs: alignment is a red diagonal alone", fontsize=10)

    cosine, retrieval, ce = low.subplots(1, 3)
    floor = models[-1][1][0].numbers
    for (name, group), color in zip(models[:-1], COLORS * len(models)):
        curves = [{r["step"]: r for r in m.curve} for m in group]
        steps = sorted(set.intersection(*map(set, curves)))
        for axis, key, ls in ((cosine, "matched", "-"), (cosine, "mismatched", ":"),
                              (retrieval, "retrieval_at_1", "-"), (ce, "ce", "-")):  # fmt: skip
            values = [[c[step][f"val_{key}"] for step in steps] for c in curves]
            at = steps
            if axis is cosine:  # step 0 is the untrained model
                at, values = [0, *steps], [[floor[key], *v] for v in values]
            plot_band(axis, at, values, color, ls=ls, label=name if ls == "-" else None)
        retrieval.axhline(group[0].eval_chance, color="grey", ls="--", lw=1)
    finish(cosine, "cosine: matched (line), mismatched (dots)", "training step")
    finish(retrieval, "retrieval@1 (dashed: chance)", "training step")
    finish(ce, "validation cross-entropy, nats per label", "training step")
    add_legend(low, cosine)
    add_table(bottom, table)
    return figure


def draw_panel(models: Models, table: list[list[str]], about: dict[str, Any]):
    """The second page: by layer, singular values, the views in the plane, the second table."""
    projections = {"PCA": principal_plane}
    with contextlib.suppress(ImportError):  # scikit-learn is welcome, not required
        from sklearn.manifold import TSNE

        projections["t-SNE"] = functools.partial(tsne_plane, TSNE)
    from matplotlib.collections import LineCollection

    figure, (top, *rows, bottom) = start_figure(
        "Collapse panel", models, about, [3.3, *(3.3 for _ in projections)]
    )
    cosine, rank, spectrum = top.subplots(1, 3)
    spectrum.set_yscale("log")
    for (name, group), color in zip(models, [*(COLORS * len(models))[: len(models) - 1], GREY]):
        for axis, key, ls in (
            (cosine, "matched", "-"), (cosine, "mismatched", ":"),
            (rank, "effective_rank_pred", "-"), (rank, "effective_rank_target", ":"),
        ):  # fmt: skip
            values = [m.numbers["layers"][key] for m in group]
            plot_band(axis, range(len(values[0])), values, color, ls=ls,
                      label=name if ls == "-" else None)  # fmt: skip
        for key, ls in ("singular_values", "-"), ("singular_values_shuffled", ":"):
            values = np.array([m.numbers[key] for m in group])
            values[values < 1e-4 * values.max()] = np.nan  # rounding noise
            plot_band(spectrum, range(1, values.shape[1] + 1), values, color, ls=ls, marker="")
    finish(cosine, "cosine:\nmatched (line), mismatched (dots)", "layer")
    finish(rank, "effective rank:\n[PRED] (line), answer (dots)", "layer")
    finish(spectrum, "singular values of Enc(text) − Enc(code):\npairs (line), shuffled (dots)",
           "number of the singular value")  # fmt: skip
    add_legend(top, cosine)

    for row, (kind, project) in zip(rows, projections.items()):
        views = [normalize(group[0].views.flatten(0, 1), dim=-1) for _, group in models]
        planes = [project(x.nan_to_num()).numpy() for x in views]  # (3 n, 2) each
        for (name, group), axis, plane in zip(
            models, row.subplots(1, len(models), squeeze=False)[0], planes
        ):
            text, code, pred = np.split(plane, 3)
            shown = np.stack([pred, code], 1)[:N_SHOWN]  # (32, 2, 2): the ends of a line
            axis.add_collection(LineCollection(shown, color=GREY, lw=0.5, label="some pairs"))
            for points, (label, color) in zip((text, code, pred), VIEWS):
                axis.scatter(*points.T, s=8, color=color, alpha=0.6, lw=0, label=label)
            seed = f", seed {group[0].numbers['seed']}" if len(group) > 1 else ""
            axis.set_title(f"{name}{seed}: {kind}", fontsize=10, parse_math=False)
            axis.set(xticks=[], yticks=[])
            if kind == "PCA":  # one scale for all: a model that has collapsed is a dot
                reach = 1.05 * max(np.abs(p).max() for p in planes)
                axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    rows[0].axes[0].legend(frameon=False, fontsize=9, loc="upper left", markerscale=2)
    add_table(bottom, table)
    return figure


def principal_plane(x: torch.Tensor) -> torch.Tensor:
    """Coordinates of the rows of x (N, C) along its two principal components: (N, 2)."""
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return u[:, :2] * s[:2]


def tsne_plane(TSNE: type, x: torch.Tensor) -> torch.Tensor:
    """t-SNE of the rows of x (N, C): (N, 2). It shows neighbours; its distances mean nothing."""
    tsne = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="random", random_state=0)
    return torch.from_numpy(tsne.fit_transform(x.numpy()))


def start_figure(title: str, models: Models, about: dict[str, Any], heights: list[float]):
    """A figure with title and provenance; its rows of the heights given, and one for the table."""
    from matplotlib.figure import Figure

    heights = [*heights, 0.5 + 0.32 * (len(models) + 1)]
    size = max(11, 3.6 * len(models)), 1.25 * sum(heights)
    figure, data = Figure(figsize=size, layout="constrained"), about["data"]
    chosen = f"pairs_seed {about['pairs_seed']}, " if about["pairs_seed"] else ""
    figure.suptitle(f"{title}: {about['n_pairs']} held-out pairs of {data['dataset']} "
                    f"({about['split']})", fontsize=15, fontweight="bold",
                    parse_math=False)  # fmt: skip
    figure.text(
        0.01, 0.003,
        f"{chosen}{data['source']}, train sha256 {data['train_sha256'][:12]}, tokenizer "
        f"{data['tokenizer']}, commit {about['commit']}, torch {about['torch']}, {about['time']}; "
        f"chance retrieval@1 {about['chance']:.3f}",
        fontsize=7, color="grey", parse_math=False,
    )  # fmt: skip
    return figure, figure.subfigures(len(heights), 1, height_ratios=heights)


def plot_band(axis, x, values, color, marker="o", **style):
    """Mean of the seeds' curves, values (seeds, points), in a band of one standard deviation."""
    mean = np.mean(values, 0)
    axis.plot(x, mean, color=color, marker=marker, ms=3, **style)
    if len(values) > 1:
        sd = np.std(values, 0, ddof=1)
        axis.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.15, lw=0)


def finish(axis, title: str, xlabel: str):
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.get_major_locator().set_params(integer=True)


def add_legend(subfigure, axis):
    """Below all its axes, for the lines of one: nothing is hidden."""
    handles, labels = axis.get_legend_handles_labels()
    subfigure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)),
                     frameon=False, fontsize=9)  # fmt: skip


def add_table(subfigure, rows: list[list[str]]):
    axis = subfigure.subplots()
    axis.axis("off")
    widths = [max(len(cell) for cell in column) + 3 for column in zip(*rows)]
    cells = axis.table(rows[1:], colLabels=rows[0], loc="center", cellLoc="right",
                       colWidths=[width / max(sum(widths), 110) for width in widths])  # fmt: skip
    cells.auto_set_font_size(False)
    cells.set_fontsize(9.5)
    cells.scale(1, 1.4)
    for (row, _), cell in cells.get_celld().items():
        cell.set_edgecolor("#d0d0d0")
        cell.visible_edges = "B"
        if row == 0:
            cell.set_text_props(fontweight="bold")
