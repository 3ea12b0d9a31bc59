"""Keys and values of the tokens so far, so that generation computes each token once."""

from collections import defaultdict

import torch
import torch.nn.functional as F


class LayerCache:
    """Keys and values of one layer, (B, nh, S, hs) each; the first n of S columns are filled."""

    def __init__(self):
        self.k, self.v, self.n = None, None, 0

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes T more columns and returns all S, of which the mask must hide the unfilled ones."""
        T = k.size(2)
        if self.n == 0:  # the prompts
            self.k, self.v = k, v
        else:
            self.k[:, :, self.n : self.n + T], self.v[:, :, self.n : self.n + T] = k, v
        self.n += T
        return self.k, self.v


class KVCache(defaultdict):
    """A LayerCache for each layer, by its number."""

    def __init__(self):
        super().__init__(LayerCache)

    def resize(self, stay: torch.Tensor, S: int) -> None:
        """Keep the rows of `stay` (B,) bool, and make room for S columns: zeros, not garbage, for
        what the mask hides is still multiplied by 0."""
        for layer in self.values():
            more = (0, 0, 0, S - layer.n)
            layer.k, layer.v = (F.pad(x[stay, :, : layer.n], more) for x in (layer.k, layer.v))
