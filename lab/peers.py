"""What bench.py compares with: nanoGPT's step, the official two-row recipe, transformers' GPT-2.

Each step is a function of its number that trains once and gives the tokens it counts for.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from config import Config, fail
from model import GPT, PAD, Batch, Trunk
from train import make_optimizer
from views import CODE, TEXT, Pairs

try:
    import transformers
except ImportError:
    transformers = None

EXAMPLES = 4  # in a step of the official recipe: its logits of 16 would take 20 GB


class PlainGPT(GPT):
    """The same GPT as nanoGPT runs it: full causal windows through torch's fused attention, logits
    and F.cross_entropy at every position, the mean over them."""

    def forward(self, idx, targets):
        B, T = idx.shape
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(T, device=idx.device)))
        for layer in self.h:
            attn = layer.attn
            q, k, v = attn.c_attn(layer.ln_1(x)).split(x.size(-1), dim=-1)
            q, k, v = (t.view(B, T, attn.n_head, -1).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
            y = y.transpose(1, 2).contiguous().view(B, T, -1)
            x = x + attn.dropout(attn.c_proj(y))
            x = x + layer.mlp(layer.ln_2(x))
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def nanogpt_step(pairs: Pairs, config: Config, n_tokens: Callable[[], int], device, dtype):
    """Fixed windows of the token stream, as many as hold the n_tokens of our own step."""
    plain = PlainGPT(replace(config, n_pred=0), pairs.vocab_size, (None,)).to(device)
    optimizer = make_optimizer(plain, config)
    stream = torch.from_numpy(pairs.tokens.astype(np.int64))
    T = config.block_size
    if len(stream) <= T:
        fail(f"{len(stream)} tokens to train on are less than a window of block_size={T}; lower it")

    def step(number):
        rng = torch.Generator().manual_seed(number)
        at = torch.randint(len(stream) - T, (max(1, round(n_tokens() / T)),), generator=rng)
        idx, targets = (
            torch.stack([stream[i + shift : i + shift + T] for i in at]).to(device)
            for shift in (0, 1)
        )
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = plain(idx, targets)
        loss.backward()
        update(plain, optimizer, config)
        return idx.numel()

    return step


class PaddedPairs(Pairs):
    """Pairs whose rows are padded to block_size, however short they are."""

    def pack(self, examples, blocks, has_jepa=True):
        idx, block, targets, _ = super().pack(examples, blocks, has_jepa)
        room = max(0, self.config.block_size - idx.size(1))
        return Batch(*(F.pad(rows, (0, room), value=fill)
                       for rows, fill in ((idx, 0), (block, PAD), (targets, -1))))  # fmt: skip


def padded_to_block_size(pairs: Pairs) -> PaddedPairs:
    return PaddedPairs(*(getattr(pairs, field.name) for field in fields(pairs)))


def official_step(pairs: Pairs, config: Config, device, dtype, padded: bool = True, model=None):
    """A step of the official recipe: per example a row [q a], with labels, and a row [q P | a],
    whose halves an additive mask keeps apart, in one batch; logits everywhere; the gradient through
    both views. As shipped its rows are `padded` to block_size, else to the longest of the batch.
    Its tokens are those that our row needs. model: of `peer_of`; None is an untrained GPT-2."""
    pairs = replace(pairs, config=config)
    k, V = config.n_pred, pairs.vocab_size
    model = (model or empty_gpt2(config, V + k)).to(device).train()
    optimizer = make_optimizer(model, replace(config, pred_rate=1.0))  # one table for all tokens

    def step(number):
        examples = pairs.batch(number)
        lengths = pairs.lengths[examples][:, [TEXT - 1, CODE - 1]].sum(1) + k
        fits = np.flatnonzero(lengths <= config.block_size)[:EXAMPLES]
        examples, B = examples[fits], len(fits)
        T = config.block_size if padded else int(lengths[fits].max())
        n_tokens = (pairs.pack(examples, pairs.layout.row).block != PAD).sum().item()
        idx = torch.zeros(2 * B, T, dtype=torch.long)
        labels = torch.full((2 * B, T), -100)
        mask = torch.full((2 * B, 1, T, T), -math.inf).triu(1)
        pred_at, enc_at = torch.empty(B, dtype=torch.long), torch.empty(B, dtype=torch.long)
        for i, example in enumerate(examples):
            q, a = pairs.view(example, TEXT), pairs.view(example, CODE)
            both = torch.tensor(q + a)
            idx[i, : len(both)] = both
            labels[i, len(q) : len(both)] = both[len(q) :]
            q = q + [V + j for j in range(k)]
            idx[B + i, : len(q) + len(a)] = torch.tensor(q + a)
            mask[B + i, 0, len(q) :, : len(q)] = -math.inf
            pred_at[i], enc_at[i] = len(q) - 1, len(q) + len(a) - 1
        idx, labels, mask = idx.to(device), labels.to(device), mask.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = model(input_ids=idx, attention_mask=mask, labels=labels,
                        output_hidden_states=True, use_cache=False)
        hidden, at = out.hidden_states[-1], torch.arange(B, 2 * B)
        cosine = F.cosine_similarity(hidden[at, pred_at].float(), hidden[at, enc_at].float())
        (out.loss + config.jepa_weight * (1 - cosine).mean()).backward()
        update(model, optimizer, config)
        return n_tokens

    return step


def update(model: torch.nn.Module, optimizer, config: Config) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def empty_gpt2(config: Config, vocab_size: int):
    """transformers' GPT-2 of our size and with our GELU, without dropout."""
    sizes = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, activation_function="gelu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(sizes)


def as_transformers(model: GPT, config: Config):
    """Our weights as transformers' GPT-2, float32."""
    theirs = empty_gpt2(config, model.vocab_size).eval()
    weights = model.state_dict()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            name = name.removeprefix("transformer.")
            if name not in weights:  # a bias that ours does without
                p.zero_()
            elif name.startswith("h.") and p.dim() == 2:  # theirs is (in, out)
                p.copy_(weights[name].T)
            else:
                p.copy_(weights[name])
    return theirs.to(model.device)


def peer_of(model: Trunk, config: Config):
    """A trunk's weights as transformers runs them; [PRED] are rows of the table, as the official
    recipe adds them to a model."""
    V = model.vocab_size
    lm = copy.deepcopy(model.lm) if model.about else as_transformers(model, config)
    lm.resize_token_embeddings(V + config.n_pred, mean_resizing=False)
    if config.n_pred:
        with torch.no_grad():
            lm.get_input_embeddings().weight[V:] = model.pred.weight
    return lm


def generate_theirs(theirs, prompts: list[list[int]], new_tokens: int, eot: int) -> torch.Tensor:
    """(B, new_tokens) greedy continuations by transformers, prompts padded on the left."""
    width = max(map(len, prompts))
    idx = torch.tensor([[eot] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(
        input_ids=idx.to(theirs.device), attention_mask=mask.to(theirs.device),
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=eot,
    )  # fmt: skip
    assert out.shape == (len(prompts), width + new_tokens)
    return out[:, width:]
