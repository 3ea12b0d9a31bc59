"""Draw the blocks, mask and read positions of a training row, as text and as out/mask.png.

    python -m lab.draw_mask [RECIPE] [--key=value ...]      for example with --layout=plan

A toy pair with every block of the layout, packed by views.py and masked by model.py. Training
leaves out [PRED] and the target at λ = 0, encodes the target in a row of its own with stop_grad,
and has no end marks in facts and running text. demo.py draws rows of a trained run with the same
functions. Of the tube one draw is shown, another one with --seed: patch and rest are sums of the
states that they stand at, with these signs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import load_config
from jepa import OBJECTIVES
from model import block_causal_mask, visible_blocks
from objectives.tube import SIGNS, drawn
from plumbing.files import write_figure
from plumbing.processes import run_main
from views import AGAIN, CODE, PRED, TARGET, TEXT, Pairs

BLOCKS = {  # letter in the drawing, name, colour
    TEXT: ("q", "question", "#2a6f97"),
    CODE: ("a", "answer", "#588157"),
    PRED: ("P", "[PRED]", "#c8553d"),
    TARGET: ("t", "answer again", "#9a6fb0"),
    AGAIN: ("g", "question again", "#d99a2b"),
}
WORDS = ["two", "plus", "three", "?", "<sep>", "five", "<eot>"]  # the toy pair; token i is word i


def main(argv: list[str]) -> None:
    config = load_config(argv)
    pairs = Pairs(
        tokens=np.arange(7), is_label=np.arange(7) >= (0 if config.labels == "all" else 5),
        starts=np.array([[0, 5, 5]]), lengths=np.array([[5, 2, 2]]),
        question_length=np.array([5]), framing=np.array([[0, 1]]), config=config, vocab_size=7,
    )  # fmt: skip
    words = [*WORDS, *(f"[PRED{i}]" for i in range(config.n_pred))]
    tokens, mask = row_of(pairs, 0, words.__getitem__)
    width = max(len(token.word) for token in tokens) + 2
    letters = [BLOCKS[token.block][0] for token in tokens]
    print(" " * (width + 5) + " ".join(letters) + "   pos  label")
    for token, letter, sees in zip(tokens, letters, mask):
        cells = " ".join("1" if seen else "." for seen in sees)
        note = f"{token.label:<8}{token.read}"
        print(f"{token.word:>{width}}  {letter}  {cells}   {token.position:3}  {note}".rstrip())
    path = Path("out/mask.png")
    write_figure(path, draw(tokens, mask))
    print(f"wrote {path}")


class Token(NamedTuple):
    """A row of the drawing."""

    word: str
    block: int
    position: int
    label: str  # the next token, where it is to be predicted
    read: str  # which embedding is read here


def row_of(
    pairs: Pairs, example: int, word_of: Callable[[int], str]
) -> tuple[list[Token], torch.Tensor]:
    """The tokens of an example's row, with every block of its layout, and which of them each one
    sees: (n, n) bool. word_of says how a token, or [PRED] from V on, is written."""
    layout = pairs.layout
    row = pairs.pack(np.array([example]), OBJECTIVES[pairs.config.objective].row(layout))
    mask, positions = (t[0] for t in block_causal_mask(row.block, visible_blocks(layout.parents)))
    idx, block, targets = (t[0].tolist() for t in row[:3])
    labels = ["" if t < 0 else word_of(t) for t in targets]
    columns = map(word_of, idx), block, positions.tolist(), labels, reads_of(pairs, example, block)
    return [Token(*column) for column in zip(*columns)], mask


def reads_of(pairs: Pairs, example: int, block: list[int]) -> list[str]:
    """What is read at each token of an example's row, in words."""
    config, layout, reads = pairs.config, pairs.layout, [""] * len(block)
    if config.objective in SIGNS:
        rng = np.random.default_rng(config.seed)
        [columns] = drawn(pairs, np.array([example]), rng).tolist()
        for name, signs in zip(("patch", "rest"), SIGNS[config.objective]):
            for column in range(len(block)):
                sign = sum(s for s, at in zip(signs, columns) if at == column)
                reads[column] += f" {'+' if sign > 0 else '-'}{name}" if sign else ""
        return [what.strip() for what in reads]
    for name, which in (("Pred", layout.pred), ("Enc", layout.enc)):
        mean = config.pooling == "mean" and name == "Enc"
        what = f"{name} is the mean of this block" if mean else f"{name} is read here"
        if config.objective == "bag" and name == "Enc":
            which, what = CODE, "its tokens are to be foreseen"
        if which in block:
            reads[len(block) - 1 - block[::-1].index(which)] += what
    return reads


def shortened(
    tokens: list[Token], mask: torch.Tensor, most: int
) -> tuple[list[Token], torch.Tensor]:
    """The row with at most `most` tokens of each block, its first and its last ones; the word
    before a gap ends in three dots."""
    kept, block = [], [token.block for token in tokens]
    for b in dict.fromkeys(block):
        at = [i for i, other in enumerate(block) if other == b]
        if len(at) > most:
            first = at[: most // 2]
            gap = first[-1]
            tokens = [t._replace(word=t.word + " …") if i == gap else t
                      for i, t in enumerate(tokens)]  # fmt: skip
            at = first + at[len(at) - most + most // 2 :]
        kept += at
    return [tokens[i] for i in kept], mask[kept][:, kept]


def draw(tokens: list[Token], mask):
    """The mask as coloured squares, a row per token, with its label and what is read there."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    n, colors = len(tokens), {b: color for b, (_, _, color) in BLOCKS.items()}
    figure = Figure(figsize=(4.6 + 0.42 * n, 1.9 + 0.38 * n), layout="constrained")
    axis = figure.subplots()
    for i, token in enumerate(tokens):
        for j, seen in enumerate(tokens):
            color = colors[seen.block] if mask[i, j] else "#f1f1f1"
            axis.add_patch(Rectangle((j, i), 0.94, 0.94, color=color))
        axis.text(n + 0.4, i + 0.5, str(token.position), va="center", family="monospace")
        axis.text(n + 1.5, i + 0.5, token.label, va="center", color=colors[CODE])
        axis.text(n + 3.5, i + 0.5, token.read, va="center", color=colors[token.block],
                  weight="bold")  # fmt: skip
    for title, x in (("position", n + 0.1), ("label", n + 1.9)):
        axis.text(x, -0.25, title, ha="left", fontsize=8, color="grey")
    axis.set(xlim=(0, n + 7.5), ylim=(n, -0.6), aspect="equal")
    words = [token.word for token in tokens]
    axis.set_xticks([i + 0.5 for i in range(n)], words, rotation=60, ha="right")
    axis.set_yticks([i + 0.5 for i in range(n)], words)
    for tick_labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        for i, label in enumerate(tick_labels):
            label.set_color(colors[tokens[i].block])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    shown = [b for b in BLOCKS if any(token.block == b for token in tokens)]
    figure.legend(handles=[Patch(color=colors[b], label=BLOCKS[b][1]) for b in shown],
                  ncols=len(shown), loc="outside upper left", frameon=False)  # fmt: skip
    axis.set_title("each row: what this token may see", fontsize=10, loc="left")
    return figure


if __name__ == "__main__":
    run_main(main)
