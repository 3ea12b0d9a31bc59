"""The model: a GPT with learnable [PRED] embeddings and a block-causal mask, and what a trunk is.

    B  rows of a batch        nh  attention heads       V  size of the (padded) vocabulary
    T  tokens of a row        hs  channels of a head    k  number of [PRED] tokens
    C  channels (n_embd)      N   positions that somebody reads, of all B * T

The GPT is nanoGPT's (GPT-2: learned positions, pre-norm, GELU, tied output layer). What is new is
who may see whom. A row holds several *blocks* of tokens, a block may continue another one, and
one rule (`block_causal_mask`) gives both the attention mask and the positions. What the blocks hold
is the business of views.py. Nothing outside this file looks inside the GPT: it is a `Trunk`, and
docs/new-trunk.md shows how another network becomes one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import Config
from plumbing.cache import KVCache
from plumbing.kernels import attend, mask_for, summed_cross_entropy

PAD = 0  # block number of padding, by which it is known: no token value is special


# --- who sees whom ----------------------------------------------------------------------------


def visible_blocks(parents: Sequence[int | None]) -> torch.Tensor:
    """(n, n) bool: may a token of block b see block c? parents[b] is the block that b continues.

    A block sees itself, its parent, its parent's parent, ...
    """
    sees = torch.eye(len(parents), dtype=torch.bool)  # every block sees itself
    for block, ancestor in enumerate(parents):
        while ancestor is not None:  # and walks up to its root
            sees[block, ancestor] = True
            ancestor = parents[ancestor]
    return sees


def block_causal_mask(block: torch.Tensor, sees: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mask and positions of rows of blocks.

    A token sees the earlier tokens of its own block and every token of the blocks it continues:

        q q a a P t t        q = question      continues nothing
      q 1 . . . . . .        a = answer        continues q
      q 1 1 . . . . .        P = [PRED]        continues q
      a 1 1 1 . . . .        t = answer again  continues nothing
      a 1 1 1 1 . . .
      P 1 1 . . 1 . .        so a sees q (an ordinary causal language model),
      t . . . . . 1 .        P never sees a, and t sees neither q nor P
      t . . . . . 1 1

    Positions count along the same path: a token's position is the number of tokens it sees, less
    itself, so a block that continues nothing starts at 0, wherever it stands in the row.

    Args:
        block: (B, T) int, the block each token belongs to; a block stands right of its parent.
        sees: (n, n) bool from `visible_blocks`.
    Returns:
        attn_mask (B, T, T) bool, True = may attend; position_ids (B, T) int, padding at 0.
    """
    T = block.size(1)
    earlier = torch.ones(T, T, dtype=torch.bool, device=block.device).tril()  # or the token itself
    attn_mask = sees[block[:, :, None], block[:, None, :]] & earlier  # (B, T, T)
    position_ids = (attn_mask.sum(-1) - 1).masked_fill(block == PAD, 0)
    return attn_mask, position_ids


def block_ends(block: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: the last token of each block of each row, which is where views are read."""
    return block != F.pad(block, (0, 1), value=-1)[:, 1:]


def read_hidden(
    hidden: torch.Tensor, block: torch.Tensor, which: int, pooling: str = "last"
) -> torch.Tensor:
    """Hidden state of block `which`, at its last token or its mean: (B, T, C), (B, T) -> (B, C).
    A row without that block gives that of its last column, for the caller to leave out."""
    if pooling == "mean":
        inside = (block == which)[..., None]  # (B, T, 1)
        return hidden.where(inside, 0).sum(1) / inside.sum(1).clamp(min=1)
    T = block.size(1)
    columns = torch.arange(T, device=block.device)
    at = torch.where(block == which, columns, -1).amax(1)  # (B,) the block's last column
    return hidden[torch.arange(len(at), device=at.device), at]  # (B, C)


class Batch(NamedTuple):
    """Rows of blocks for a trunk, (B, T) each: tokens, the block of each token, next tokens."""

    idx: torch.Tensor  # below V, or V + i for [PRED] number i
    block: torch.Tensor  # PAD, or a number of views.py
    targets: torch.Tensor  # -1: no label
    given: torch.Tensor = torch.empty(0)  # (B, ...), what an objective has beside the rows

    def to(self, device: torch.device) -> "Batch":
        if device.type != "cuda":
            return Batch(*(t.to(device) for t in self))
        return Batch(*(t.pin_memory().to(device, non_blocking=True) for t in self))


# --- the trunk: what the rest of the project may use of a network -----------------------------


class Trunk(nn.Module):
    """A decoder over rows of blocks. A subclass has `embed`, `layers`, `logits` and the attributes;
    `forward` composes them, and training calls nothing else: the wrappers for several processes
    and for compiling see only forward, and a gradient made around it is averaged over no
    processes, without a word."""

    width: int  # C
    vocab_size: int  # V
    longest_path: int  # tokens that one may see, itself included
    n_drawn = 0  # ids below it may be drawn; 0: those up to end of text, as in our vocabularies
    about: dict[str, str] | None = None  # what makes a pretrained one again, beside the config

    def __init__(self, parents: Sequence[int | None]):
        """parents: for each block number, the block it continues or None (see visible_blocks)."""
        super().__init__()
        self.register_buffer("sees", visible_blocks(parents), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.sees.device

    def embed(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens below V, or V + i for [PRED] number i -> (B, T, C)."""
        raise NotImplementedError

    def layers(self, x, position_ids, attn_mask, cache=None, read=None, streams=None):
        """Embeddings to hidden states after the final norm.

        Args:
            x: (B, T, C); position_ids: (B, T); attn_mask: (B, T, S) bool, True = may attend.
            cache: of `new_cache`, with the S - T tokens before these; these are added to it.
            read: index of the N positions wanted, (rows, columns) or (B, T) bool; None is all.
            streams: a list; what enters each layer is put there, (B, T, C) each, read through the
                final norm as the last one's output is.
        Returns:
            (B, T, C), or (N, C) with read.
        """
        raise NotImplementedError

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., V)."""
        raise NotImplementedError

    def new_cache(self) -> KVCache:
        """An empty key/value cache for `layers`."""
        return KVCache()

    def trained(self) -> dict[str, torch.Tensor]:
        """What training changes: the weights that a checkpoint holds."""
        return self.state_dict()

    def load_trained(self, state: dict[str, torch.Tensor]) -> None:
        """RuntimeError if `state` is no other such trunk's."""
        self.load_state_dict(state)

    def forward(self, batch: Batch, read: torch.Tensor, streams: list | None = None):
        """Hidden states where they are read and, where there are labels, the summed cross-entropy.

        Args:
            batch: the rows; its targets may be None, which skips the output layer.
            read: (B, T) bool, positions whose hidden state is wanted, beside those with a label.
            streams: see `layers`.
        Returns:
            hidden (B, T, C) after the final norm, nan where nobody asked; the sum of the cross-
            entropy in nats (the caller knows how many labels its whole step has), or None.
        """
        idx, block, targets, _ = batch
        attn_mask, position_ids = block_causal_mask(block, self.sees)  # (B, T, T), (B, T)
        labelled = torch.zeros_like(read) if targets is None else targets != -1
        # Listed here, once: a compiler splits the graph wherever a size depends on values.
        wanted = (labelled | read).nonzero(as_tuple=True)  # (N,), (N,)
        with_label = labelled[wanted].nonzero(as_tuple=True)  # (labels,) of the N
        x = self.embed(idx)  # (B, T, C)
        found = self.layers(x, position_ids, attn_mask, read=wanted, streams=streams)  # (N, C)
        # Not 0 but nan where nobody asked: a loss on such a state shows at once.
        hidden = found.new_full((*idx.shape, found.size(-1)), math.nan)  # (B, T, C)
        hidden[wanted] = found
        if targets is None:
            return hidden, None
        # Positions without a label never reach the output layer, the widest of all.
        logits = self.logits(found[with_label])  # (labels, V)
        return hidden, summed_cross_entropy(logits, targets[wanted][with_label])

    def everywhere(self, idx: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm at every position: (B, T), (B, T) -> (B, T, C)."""
        attn_mask, position_ids = block_causal_mask(block, self.sees)
        return self.layers(self.embed(idx), position_ids, attn_mask)

    def flops(self, batch: Batch, read: torch.Tensor) -> int:
        """Floating-point operations of `forward`'s matrix products, two per multiply-add; backward
        takes twice as many. Padding is computed too, so it counts. This is the usual estimate: one
        multiply-add per weight and token. A subclass that knows better says so."""
        return 2 * batch.idx.numel() * sum(p.numel() for p in self.parameters() if p.dim() > 1)


def pred_table(k: int, C: int) -> nn.Embedding | None:
    """The [PRED] embeddings (k, C), without values yet and without drawing random numbers; None for
    k = 0. Number i is token V + i, outside the vocabulary: neither a label nor ever sampled."""
    return nn.Embedding.from_pretrained(torch.empty(k, C), freeze=False) if k else None


def embed_tokens(idx: torch.Tensor, table: nn.Embedding, pred: nn.Embedding | None):
    """Rows of the table (V, C), and of [PRED] for the tokens from V on: (B, T) -> (B, T, C)."""
    V = table.num_embeddings
    x = table(idx.clamp(max=V - 1))  # (B, T, C), of [PRED] whatever the last row is
    if pred is None:
        return x
    return torch.where((idx >= V)[..., None], pred((idx - V).clamp(min=0)), x)


# --- the GPT ----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # Dropout sits here and not on the attention weights: fused kernels would not take those.
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, cache=None, read=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)  # (B, T, 3, nh, hs)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if cache is not None:  # decoding: add these T tokens to the ones before, see them all
            k, v = cache.append(k, v)
        y = attend(q, k, v, mask[:, None])  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.dropout(self.c_proj(y if read is None else y[read]))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        # Exact GELU, as in nanoGPT; GPT-2's tanh form took 2.4 times as long on a CPU in bf16.
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache=None, read=None):
        """(B, T, C) -> (B, T, C); with read, an index of N positions, (N, C) of these alone."""
        y = self.attn(self.ln_1(x), mask, cache, read)  # (B, T, C) or (N, C)
        x = (x if read is None else x[read]) + y  # the residual stream, of the same positions
        return x + self.mlp(self.ln_2(x))


class GPT(Trunk):
    """GPT-2 over rows of blocks, of a config's sizes (n_layer, n_head, n_embd, block_size, n_pred);
    vocab_size is V, rows of the token table and of the output layer."""

    def __init__(self, config: Config, vocab_size: int, parents: Sequence[int | None]):
        super().__init__(parents)
        self.width, self.vocab_size = config.n_embd, vocab_size
        self.longest_path = config.block_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)  # tokens
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # positions along a path
        self.pred = pred_table(config.n_pred, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied: one matrix reads tokens and writes them
        self.init_weights()

    def init_weights(self):
        """GPT-2's: N(0, 0.02); the two projections back into the residual stream N(0, 0.02 /
        sqrt(2 n_layer)), so that its variance does not grow with depth; biases 0; norms 1.
        [PRED] comes last: the other weights are then the same whatever k is."""
        for name, p in self.named_parameters():
            if p.dim() == 2 and name != "pred.weight":
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(self.h)) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if self.pred is not None:
            nn.init.normal_(self.pred.weight, std=0.02)

    def embed(self, idx):
        return embed_tokens(idx, self.wte, self.pred)

    def layers(self, x, position_ids, attn_mask, cache=None, read=None, streams=None):
        x = self.drop(x + self.wpe(position_ids))  # (B, T, C)
        mask = mask_for(x, attn_mask)  # in the form that attention is quickest with
        for i, layer in enumerate(self.h):
            if streams is not None:
                streams.append(self.ln_f(x))
            # After its attention, the last layer runs on the positions that are read alone.
            last = i == len(self.h) - 1
            x = layer(x, mask, None if cache is None else cache[i], read if last else None)
        return self.ln_f(x)

    def logits(self, hidden):
        return self.lm_head(hidden)

    def flops(self, batch, read):
        """As Trunk.flops, to the operation: masked scores are computed too, so they count."""
        (B, T), C, n_layer = batch.idx.shape, self.width, len(self.h)
        n_labels = 0 if batch.targets is None else (batch.targets != -1).sum().item()
        wanted = read if batch.targets is None else read | (batch.targets != -1)
        whole_row = 6 * C * C + 4 * T * C  # per token: c_attn; scores and weighted sum
        rest = 18 * C * C  # the attention's c_proj and the MLP; in the last layer where read
        n_rest = (n_layer - 1) * B * T + wanted.sum().item()
        output = 2 * C * self.vocab_size * n_labels  # the output layer, at labels alone
        return n_layer * B * T * whole_row + n_rest * rest + output
