"""Where torch on a CPU is slow: attention, the cross-entropy of a large vocabulary, and products of
few rows. Each has a plain equivalent that the tests hold it to; on other devices that one runs.
"""

import contextlib
import math
import threading
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax attention: q (B, nh, T, hs), k and v (B, nh, S, hs), mask (B, 1, T, S): bool, True =
    may attend, or what is added to the scores (see `mask_for`)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # With bf16, torch's fused kernel is slower than writing it out: forward and backward took 43 ms
    # against 14 ms (B 16, nh 8, T 150, hs 64; two cores, torch 2.13).
    mask = additive(mask, q.dtype) if mask.dtype == torch.bool else mask
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1) + mask
    return scores.softmax(-1) @ v


def mask_for(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mask as `attend` is quickest with for the stream x: made once, not in every layer."""
    if x.device.type != "cpu":
        return mask
    autocast = torch.is_autocast_enabled("cpu")
    return additive(mask, torch.get_autocast_dtype("cpu") if autocast else x.dtype)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as a term: 0 where it is True, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over N labels of the cross-entropy in nats, float32: (N, V), (N,) -> scalar. On a CPU it
    uses the logits up: they hold the gradient afterwards, and backward runs once."""
    if logits.device.type == "cpu":
        return SummedCrossEntropy.apply(logits, targets)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


class SummedCrossEntropy(torch.autograd.Function):
    """With V = 50304 the logits are the largest tensor of a step, and torch's own takes several
    passes over float32 copies of them: 28 % of a step. This works on a few rows at a time, which
    stay in the processor's cache, and writes the gradient over the logits: 10 %."""

    @staticmethod
    def forward(ctx, logits, targets):
        at_target = logits.gather(1, targets[:, None]).float()
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
        ctx.spent = False
        return (lse - at_target).sum()

    @staticmethod
    def backward(ctx, grad):
        if ctx.spent:  # the gradient has been scaled in place and handed on
            raise RuntimeError("summed_cross_entropy: backward runs only once")
        ctx.spent = True
        return ctx.saved_tensors[0].mul_(grad), None


packing = threading.RLock()  # taken again where a forgotten generator is collected within it
users: dict[int, int] = {}  # how many are within packed_weights, by the id of their model


@contextlib.contextmanager
def packed_weights(model: nn.Module):
    """Within, and only on a CPU in bf16, linear layers without gradient run on weights that oneDNN
    laid out for its kernels once, and not anew in every product: 1 row through six layers of 512
    channels takes 3.0 for 9.3 ms, 64 rows 25 for 32, from 128 rows on there is no gain. torch has
    no public name for this. Several threads may be within for one model: the first one packs, the
    last one unpacks."""
    if not can_pack(model):
        yield
        return
    with packing:
        if id(model) not in users:
            pack(model)
        users[id(model)] = users.get(id(model), 0) + 1
    try:
        yield
    finally:
        with packing:
            users[id(model)] -= 1
            if not users[id(model)]:
                del users[id(model)]
                unpack(model)


def in_bf16() -> bool:
    on = torch.is_autocast_enabled("cpu")
    return on and torch.get_autocast_dtype("cpu") == torch.bfloat16


def can_pack(model: nn.Module) -> bool:
    on_cpu = next(model.parameters()).device.type == "cpu"
    return (on_cpu and in_bf16() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # fmt: skip


def pack(model: nn.Module) -> None:
    """Give the linear layers, and the pairs of c_fc and GELU, a forward of their own. It falls back
    on the class's where gradients or another dtype are wanted: another thread may."""

    def product(weight, bias, then, x):
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), weight, bias, then, [], "none")

    def forward(layer, packed, x):
        plain = torch.is_grad_enabled() or not in_bf16()
        return type(layer).forward(layer, x) if plain else packed(x)

    def mlp_forward(mlp, fused, x):  # GELU in the same kernel as c_fc
        return mlp.dropout(mlp.c_proj(fused(x)))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    reorder = torch.ops.mkldnn._reorder_linear_weight  # all of them, before any layer is changed
    weights = [reorder(layer.weight.detach().bfloat16()) for layer in layers]
    for layer, weight in zip(layers, weights):
        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
        layer.forward = partial(forward, layer, partial(product, weight, bias, "none"))
        layer.fused_gelu = partial(product, weight, bias, "gelu")
    for mlp in [module for module in model.modules() if hasattr(module, "gelu")]:  # model.MLP
        mlp.forward = partial(forward, mlp, partial(mlp_forward, mlp, mlp.c_fc.fused_gelu))


def unpack(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("forward", "fused_gelu"):
            module.__dict__.pop(name, None)  # the class's own forward again
