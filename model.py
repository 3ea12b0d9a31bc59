"""A GPT with learnable [PRED] embeddings and a block-causal mask: the whole model, in one file.

    B  rows of a batch        nh  attention heads       V  size of the (padded) vocabulary
    T  tokens of a row        hs  channels of a head    k  number of [PRED] tokens
    C  channels (n_embd)

The GPT is nanoGPT's (GPT-2: learned positions, pre-norm, GELU, tied output layer). What is new is
who may see whom. A row holds several *blocks* of tokens, a block may continue another one, and
one rule (`block_causal_mask`) gives both the attention mask and the positions. This file knows
blocks by number only; what they hold is the business of views.py.
"""

import contextlib
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import Config

PAD = 0  # block number of padding, by which it is known: no token value is special
GROW = 32  # columns by which a key/value cache grows


def visible_blocks(parents: Sequence[int | None]) -> torch.Tensor:
    """(n, n) bool: may a token of block b see block c? parents[b] is the block that b continues.

    A block sees itself, its parent, its parent's parent, ...
    """
    sees = torch.eye(len(parents), dtype=torch.bool)
    for block, ancestor in enumerate(parents):
        while ancestor is not None:
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
    earlier = torch.ones(T, T, dtype=torch.bool, device=block.device).tril()
    attn_mask = sees[block[:, :, None], block[:, None, :]] & earlier
    position_ids = (attn_mask.sum(-1) - 1).masked_fill(block == PAD, 0)
    return attn_mask, position_ids


def read_hidden(
    hidden: torch.Tensor, block: torch.Tensor, which: int, pooling: str = "last"
) -> torch.Tensor:
    """Hidden state of block `which`, at its last token or its mean: (B, T, C), (B, T) -> (B, C)."""
    if pooling == "mean":
        inside = (block == which)[..., None]  # (B, T, 1)
        return (hidden * inside).sum(1) / inside.sum(1).clamp(min=1)
    T = block.size(1)
    columns = torch.arange(T, device=block.device)
    at = torch.where(block == which, columns, -1).amax(1)  # (B,)
    return hidden[torch.arange(len(at), device=at.device), at]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax attention: q (B, nh, T, hs), k and v (B, nh, S, hs), mask (B, 1, T, S): bool, True =
    may attend, or what is added to the scores (see `additive`)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # On a CPU with bf16, torch's fused kernel is slower than writing it out: forward and backward
    # took 43 ms against 14 ms (B 16, nh 8, T 150, hs 64; two cores, torch 2.13).
    mask = additive(mask, q.dtype) if mask.dtype == torch.bool else mask
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1) + mask
    return scores.softmax(-1) @ v


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as a term: 0 where it is True, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # Dropout sits here and not on the attention weights: fused kernels would not take those.
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, cache=None, keep=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:  # decoding: add these T tokens to the ones before, see them all
            k, v = cache.append(k, v)
        y = attend(q, k, v, mask[:, None])  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.c_proj(y if keep is None else y[keep]))


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

    def forward(self, x, mask, cache=None, keep=None):
        """(B, T, C) -> (B, T, C); with keep (B, T) bool, only the N positions kept: (N, C)."""
        y = self.attn(self.ln_1(x), mask, cache, keep)
        x = (x if keep is None else x[keep]) + y
        return x + self.mlp(self.ln_2(x))


class SummedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits.float(), targets, reduction="sum") for a CPU, where it pays.

    With V = 50304 the logits are the largest tensor of a step, and torch's own takes several passes
    over float32 copies of them: 28 % of a step. This works on a few rows at a time, which stay in
    the processor's cache, and writes the gradient over the logits: 10 %.
    """

    @staticmethod
    def forward(ctx, logits, targets):  # (N, V), (N,) -> scalar
        own = logits.gather(1, targets[:, None]).float()
        largest = logits.amax(1, keepdim=True).float()
        lse = torch.empty_like(largest)  # log of the summed exponentials, (N, 1)
        for rows, top, at, out in zip(*(t.split(64) for t in (logits, largest, targets, lse))):
            exp = rows.to(torch.float32, copy=True).sub_(top).exp_()
            total = exp.sum(1, keepdim=True)
            out.copy_(total.log().add_(top))
            if ctx.needs_input_grad[0]:  # the gradient, softmax less one-hot, while exp is at hand
                minus_one = torch.full_like(total, -1.0)
                rows.copy_(exp.div_(total).scatter_add_(1, at[:, None], minus_one))
        ctx.save_for_backward(logits)
        return (lse - own).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0].mul_(grad), None


class KVCache:
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

    def resize(self, stay: torch.Tensor, S: int) -> None:
        """Keep the rows of `stay` (B,) bool, and make room for S columns: zeros, not garbage, for
        what the mask hides is still multiplied by 0."""
        more = (0, 0, 0, S - self.n)
        self.k, self.v = (F.pad(x[stay, :, : self.n], more) for x in (self.k, self.v))


@contextlib.contextmanager
def packed_weights(model: nn.Module):
    """Within, and only on a CPU in bf16, the linear layers run on weights that oneDNN laid out for
    its kernels once, and not anew in every product: that is most of a product of few rows. The 24
    of six layers of 512 channels, one thread: 1 row 3.0 for 9.3 ms, 16 rows 7.5 for 11.6, 64 rows
    25 for 32, no gain from 128 rows on. torch has no public name for this; without it, nothing.
    """
    on_cpu = next(model.parameters()).device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not (on_cpu and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()):  # fmt: skip
        yield
        return

    def linear(weight, bias, x, then="none"):
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), weight, bias, then, [], "none")

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    mlps = [module for module in model.modules() if isinstance(module, MLP)]
    for layer in layers:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().bfloat16())
        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
        layer.forward = partial(linear, weight, bias)
    for mlp in mlps:  # GELU in the same kernel
        mlp.c_fc.forward = partial(mlp.c_fc.forward, then="gelu")
        mlp.gelu.forward = lambda x: x
    try:
        yield
    finally:
        for module in layers + [mlp.gelu for mlp in mlps]:
            del module.forward  # the class's own again


class GPT(nn.Module):
    """GPT-2 over rows of blocks.

    Args:
        config: sizes (n_layer, n_head, n_embd, block_size, n_pred), dropout, bias.
        vocab_size: V, rows of the token table and the output layer.
        parents: for each block number, the block it continues or None (see `visible_blocks`).
    """

    def __init__(self, config: Config, vocab_size: int, parents: Sequence[int | None]):
        super().__init__()
        self.block_size, self.vocab_size = config.block_size, vocab_size
        self.read_everywhere = config.pooling == "mean"
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        # [PRED] number i is written as token V + i. It lives outside the vocabulary, so it can
        # be neither a label nor sampled.
        self.pred = None
        if config.n_pred:  # from_pretrained draws no random numbers: see init_weights
            empty = torch.empty(config.n_pred, config.n_embd)
            self.pred = nn.Embedding.from_pretrained(empty, freeze=False)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied
        self.register_buffer("sees", visible_blocks(parents), persistent=False)
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

    def forward(self, idx, block, targets=None):
        """Hidden states and, where there are labels, the summed cross-entropy.

        Args:
            idx: (B, T) tokens below V, or V + i for [PRED] number i.
            block: (B, T) the block of each token.
            targets: (B, T) next tokens, -1 where there is no label; None skips the output layer.
        Returns:
            hidden (B, T, C) after the final norm, where someone reads it: at labels and at the
            last token of each block (everywhere if pooling is "mean"), 0 elsewhere; the sum (not
            the mean: the caller knows how many labels its whole step has) of the cross-entropy in
            nats, or None.
        """
        attn_mask, position_ids = block_causal_mask(block, self.sees)
        # Most of the last layer and the output layer, the widest of all, run on these alone.
        labelled, keep = self.where_read(block, targets)
        kept = self.encode(idx, position_ids, attn_mask, keep=keep)  # (N, C)
        hidden = kept.new_zeros(*idx.shape, kept.size(-1))
        hidden[keep] = kept
        if targets is None:
            return hidden, None
        logits = self.lm_head(kept[labelled[keep]])  # (labels, V)
        if logits.device.type != "cpu":
            return hidden, F.cross_entropy(logits.float(), targets[labelled], reduction="sum")
        return hidden, SummedCrossEntropy.apply(logits, targets[labelled])

    def where_read(self, block, targets):
        """(B, T) bool each: positions with a label, and those whose final hidden state is read."""
        labelled = torch.zeros_like(block, dtype=torch.bool) if targets is None else targets != -1
        is_end = block != F.pad(block, (0, 1), value=-1)[:, 1:]
        return labelled, labelled | is_end | self.read_everywhere

    def flops(self, block, targets=None):
        """Floating-point operations of `forward`'s matrix products, two per multiply-add; backward
        takes twice as many. Padding and masked scores are computed too, so they count."""
        (B, T), C, n_layer = block.shape, self.wte.embedding_dim, len(self.h)
        labelled, keep = self.where_read(block, targets)
        whole_row = 6 * C * C + 4 * T * C  # per token: c_attn; scores and weighted sum
        rest = 18 * C * C  # the attention's c_proj and the MLP; in the last layer where read
        n_rest = (n_layer - 1) * B * T + keep.sum().item()
        output = 2 * C * self.vocab_size * labelled.sum().item()
        return n_layer * B * T * whole_row + n_rest * rest + output

    def hidden(self, idx, block):
        """Hidden states after the final norm at every position: (B, T), (B, T) -> (B, T, C)."""
        attn_mask, position_ids = block_causal_mask(block, self.sees)
        return self.encode(idx, position_ids, attn_mask)

    def encode(self, idx, position_ids, attn_mask, caches=None, keep=None):
        """Token embeddings through all layers: (B, T) -> hidden (B, T, C), or (N, C) with keep."""
        x = self.wte(idx.clamp(max=self.vocab_size - 1))
        if self.pred is not None:
            is_pred = idx >= self.vocab_size
            pred = self.pred((idx - self.vocab_size).clamp(min=0))
            x = torch.where(is_pred[..., None], pred, x)
        x = self.drop(x + self.wpe(position_ids))
        if x.device.type == "cpu":  # made once, not in every layer
            autocast = torch.is_autocast_enabled("cpu")
            dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
            attn_mask = additive(attn_mask, dtype)
        for i, layer in enumerate(self.h):
            last = i == len(self.h) - 1
            x = layer(x, attn_mask, caches[i] if caches else None, keep if last else None)
        return self.ln_f(x)

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, eot, *, temperature=1.0, top_k=0, top_p=1.0, seed=0,
                 cached=True):
        """Continue token lists of any lengths, as one batch with a key/value cache.

        Args:
            prompts: lists of token ids, each of 1 to block_size.
            eot: end of text. It stops a row, and is the largest id that may be drawn (separator
                and padding of the table lie above it).
            temperature, top_k, top_p: 0 is greedy; top_k=0 and top_p=1 switch those off.
            cached: False recomputes every row from its first token, the slow and obvious way
                that the tests hold the cache against.
        Returns:
            a list of new tokens per prompt; it ends in eot where the model stopped by itself.
        """
        assert prompts and all(0 < len(p) <= self.block_size for p in prompts)
        device = self.wte.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        length = torch.tensor([len(p) for p in prompts], device=device)
        B, width = len(prompts), max(len(p) for p in prompts)
        S = width + min(max_new_tokens, self.block_size - int(length.min()))
        # Prompts are padded on the right; new tokens of all rows go to column width, width + 1, ...
        tokens = torch.zeros(B, S, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        columns = torch.arange(S, device=device)
        # One block per row, with padding (block 0) between the prompt and what it is continued by.
        block = ((columns < length[:, None]) | (columns >= width)).long()
        apart = torch.eye(2, dtype=torch.bool, device=device)
        mask, position_ids = block_causal_mask(block, apart)
        # A full row goes on with the last position, unread: it is cut below.
        position_ids = position_ids.clamp(max=self.block_size - 1)

        caches = [KVCache() for _ in self.h] if cached else None
        done = torch.zeros(B, dtype=torch.bool, device=device)
        rows = torch.arange(B, device=device)  # those still in the batch
        start = 0
        with packed_weights(self) if cached else contextlib.nullcontext():
            for new in range(width, S):
                end = new
                if cached and new > width:
                    # Now and then finished rows leave and the caches grow. In between, shapes
                    # stay what they are: a CPU prepares matrix products anew for every shape.
                    if (new - width) % GROW == 1 % GROW:
                        stay, room = ~done[rows], min(new + GROW - 1, S)
                        rows = rows[stay]
                        for cache in caches:
                            cache.resize(stay, room)
                    start, end = new - 1, room
                # The last token of a row is its prompt's end at first, then the newest column.
                last = length[rows, None] - 1 if new == width else new - 1
                alone = new == start + 1
                hidden = self.encode(
                    tokens[rows, start:new], position_ids[rows, start:new],
                    mask[rows, start:new, :end], caches,
                    keep=None if alone else (columns[start:new] == last).expand(len(rows), -1),
                ).view(len(rows), -1)  # (rows, C)
                logits = self.lm_head(hidden).float()[:, : eot + 1]
                drawn = sample(logits, temperature, top_k, top_p, generator, rows, B)
                tokens[rows, new] = drawn
                done[rows] |= (drawn == eot) | (length[rows] + new - width + 1 >= self.block_size)
                if done.all():
                    break
        rows = [tokens[i, width : width + self.block_size - len(p)].tolist()
                for i, p in enumerate(prompts)]
        return [row[: row.index(eot) + 1] if eot in row else row for row in rows]


def sample(logits, temperature, top_k, top_p, generator, rows=slice(None), n=None):
    """Draw a token per row: logits (B, V) -> (B,). Temperature 0 takes the likeliest.

    The rows may be those left of n: random numbers are drawn for all n, so that what a row gets
    does not depend on which others are left.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1), None
    if top_k:  # likeliest first; sorting all of 50,000 takes 40 times as long
        probs, order = probs.topk(min(top_k, probs.size(-1)))
    elif top_p < 1:
        probs, order = probs.sort(-1, descending=True)
    if top_p < 1:  # the smallest set of tokens whose probability reaches p, never less than one
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    cumulative = probs.cumsum(-1)
    # Ends in exactly 1, which no random number reaches, so nothing of probability 0 is drawn.
    cumulative /= cumulative[:, -1:].clone()
    u = torch.rand(n or len(logits), 1, generator=generator, device=logits.device)[rows]
    drawn = torch.searchsorted(cumulative, u, right=True)
    return (drawn if order is None else order.gather(-1, drawn))[:, 0]
