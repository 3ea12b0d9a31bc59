"""Draw the blocks, mask and read positions of a training row, as text and as out/mask.png.

    python -m lab.draw_mask [RECIPE] [--key=value ...]      for example with --layout=plan

A toy pair with every block of the layout, packed by views.py and masked by model.py. Training
leaves out [PRED] and the target at λ = 0, encodes the target in a row of its own with stop_grad,
and has no end marks in facts and running text.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import load_config
from model import PAD, block_causal_mask, visible_blocks
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
        question_length=np.array([5]), config=config, vocab_size=7,
    )  # fmt: skip
    layout = pairs.layout
    row = pairs.pack(np.array([0]), layout.row)
    n = int((row.block != PAD).sum())
    sees = visible_blocks(layout.parents)
    mask, positions = (t[0, :n] for t in block_causal_mask(row.block, sees))
    idx, block, targets = (t[0, :n].tolist() for t in row)
    words = [WORDS[i] if i < len(WORDS) else f"[PRED{i - len(WORDS)}]" for i in idx]
    labels = ["" if t < 0 else WORDS[t] for t in targets]
    reads = [""] * n
    for name, which in (("Pred", layout.pred), ("Enc", layout.enc)):
        mean = config.pooling == "mean" and name == "Enc"
        what = f"{name} is the mean of this block" if mean else f"{name} is read here"
        reads[n - 1 - block[::-1].index(which)] += what

    width = max(len(word) for word in words) + 2
    letters = [BLOCKS[b][0] for b in block]
    print(" " * (width + 5) + " ".join(letters) + "   pos  label")
    for i, word in enumerate(words):
        cells = " ".join("1" if seen else "." for seen in mask[i])
        note = f"{labels[i]:<8}{reads[i]}"
        print(f"{word:>{width}}  {letters[i]}  {cells}   {positions[i]:3}  {note}".rstrip())
    path = Path("out/mask.png")
    tokens = [Token(*column) for column in zip(words, block, positions.tolist(), labels, reads)]
    write_figure(path, draw(tokens, mask))
    print(f"wrote {path}")


class Token(NamedTuple):
    """A row of the drawing."""

    word: str
    block: int
    position: int
    label: str  # the next token, where it is to be predicted
    read: str  # which embedding is read here


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
