"""Semantic Tube Prediction (arXiv 2602.22617): the states of a row should lie along a line.

The walk of a row leads in steps from state to state, through its question and then through its
answer, each from the state before its first token; end marks, templates and system prompts are no
part of it. Where nothing stands before the question, the walk begins at its first state. `patch` is
one stretch of the walk and `rest` another, as sums of their steps:

    tube            as released: a random span, and all of the walk but that span
    tube_printed    as printed: from r to s and from s to t, for states r < s < t at random; a step
                    over what stands between question and answer counts too
    tube_two_views  the question, and the answer

There is no [PRED] and no second row, so this costs next to nothing.
"""

import numpy as np
import torch

from config import Config
from model import Batch
from views import CODE, TEXT, Pairs

# How patch and rest are made of the states at the columns of `drawn`: a stretch is its last state
# less its first.
SIGNS = {
    "tube": ((0, 0, 0, 0, -1, 1, -1, 1), (-1, 1, -1, 1, 1, -1, 1, -1)),
    "tube_printed": ((-1, 1, 0), (0, -1, 1)),
    "tube_two_views": ((-1, 1, 0, 0), (0, 0, -1, 1)),
}


def walk(pairs: Pairs, examples: np.ndarray) -> np.ndarray:
    """(4, B) columns in rows of question and answer: where the steps of the question begin and end,
    and where those of the answer do.

        q q q | a a .      | is the separator and . the end mark
        0   2 3   5        two steps in the question, two in the answer
    """
    before, after = pairs.framing[examples].T
    text, code = pairs.lengths[examples][:, [TEXT - 1, CODE - 1]].T
    return np.stack([np.maximum(before, 1) - 1, text - after - 1, text - 1, text + code - 2])


def drawn(pairs: Pairs, examples: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """(B, n) the columns whose states make patch and rest, see SIGNS."""
    columns = first, asked, frame, last = walk(pairs, examples)
    if pairs.config.objective == "tube":
        in_question, in_answer = asked - first, last - frame  # steps
        n = np.maximum(in_question + in_answer, 2)  # a shorter walk carries no term
        start = rng.integers(0, n)
        end = rng.integers(start + 1, n + (start > 0))  # n at most, and never the whole walk
        # What of the span lies in the question, and what in the answer: one may be nothing.
        of_question = [first + np.clip(at, 0, in_question) for at in (start, end)]
        of_answer = [frame + np.clip(at - in_question, 0, in_answer) for at in (start, end)]
        columns = [*columns, *of_question, *of_answer]
    elif pairs.config.objective == "tube_printed":
        n = last - first + 1
        order = rng.random((len(n), n.max()))
        order[np.arange(n.max()) >= n[:, None]] = 2  # no states of this row: never chosen
        columns = first + np.sort(order.argsort(1)[:, :3]).T
    return torch.from_numpy(np.stack(columns, 1).astype(np.int64))


def reads(batch: Batch, config: Config) -> torch.Tensor:
    """The states that were drawn, and no others."""
    return torch.zeros_like(batch.block, dtype=torch.bool).scatter_(1, batch.given, True)


def views(hidden: torch.Tensor, batch: Batch, config: Config) -> torch.Tensor:
    """patch in the place of Pred and rest in that of Enc: (2, B, C)."""
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    states = hidden[rows, batch.given].float()  # (B, n, C)
    signs = torch.tensor(SIGNS[config.objective], device=hidden.device)  # (2, n)
    return (states * signs[:, None, :, None]).sum(2)
