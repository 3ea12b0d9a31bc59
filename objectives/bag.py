"""[PRED] foresees which words the answer has: a target that no training can move.

A target that is a hidden state may collapse, and costs the answer once more. This one is a vector
of tf-idf: how often each token stands in the answer, times the logarithm of how rare it is among
the answers of train; and that times one random matrix (V, C), the same in every run. Answers of
other tokens are apart from the first step on, and [PRED] is all that it costs.

The idf is computed anew from train whenever data is read. Its digest is part of the provenance,
with which a resumed run is compared.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from config import Config
from model import Batch, read_hidden
from views import TARGET, Layout, Pairs, layout_of


def row(layout: Layout) -> tuple[int, ...]:
    """The layout's, but for the answer alone."""
    return tuple(block for block in layout.row if block != TARGET)


def idf_of(train: Pairs) -> np.ndarray:
    """(V,) ln((1 + n) / (1 + m)) for a token that m of the n answers have: 0 for the end mark."""
    V, column = train.vocab_size, train.layout.enc - 1
    starts, lengths = train.starts[:, column], train.lengths[:, column]
    example = np.repeat(np.arange(len(train)), lengths)
    within = np.arange(len(example)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    tokens = np.unique(example * V + train.tokens[starts[example] + within]) % V  # once an answer
    idf = np.log((1 + len(train)) / (1 + np.bincount(tokens, minlength=V)))
    return idf.round(6)  # machines differ in the last bits of a logarithm


def give_idf(pairs: dict[str, Pairs]) -> dict[str, str]:
    """Put the idf of train into every split; its digest, as provenance."""
    idf = idf_of(pairs["train"])
    for split in pairs.values():
        split.idf = idf
    return {"idf_sha256": hashlib.sha256(idf.tobytes()).hexdigest()}


def bags(pairs: Pairs, examples: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """(B, V) float32, tf-idf of the answer of each example."""
    V, enc = pairs.vocab_size, pairs.layout.enc
    counts = np.stack([np.bincount(pairs.view(example, enc), minlength=V) for example in examples])
    return torch.from_numpy((counts * pairs.idf).astype(np.float32))


@lru_cache(maxsize=1)
def projection(V: int, C: int, device: torch.device) -> torch.Tensor:
    """(V, C) random numbers of a fixed seed. Multiplied by it, bags keep their angles, nearly."""
    return torch.randn(V, C, generator=torch.Generator().manual_seed(0)).to(device)


def views(hidden: torch.Tensor, batch: Batch, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Pred, and the projected bag in the place of Enc, (B, C) each. A bag has the length √C, like a
    state behind a layer norm: so l2 and mse are on the scale that they have with Enc."""
    V, C = batch.given.size(1), hidden.size(-1)
    target = batch.given @ projection(V, C, hidden.device)
    pred = read_hidden(hidden, batch.block, layout_of(config).pred)
    return pred, C**0.5 * F.normalize(target, dim=-1)
