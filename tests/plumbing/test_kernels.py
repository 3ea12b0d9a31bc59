"""Claims about plumbing/kernels.py: each quick way equals the plain one, and packed weights do so
with several threads at once."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from test_model import EOT, make_gpt

from generate import Sampling, generate, generate_steps
from plumbing import kernels
from plumbing.kernels import (
    SummedCrossEntropy,
    additive,
    attend,
    mask_for,
    packed_weights,
    summed_cross_entropy,
)

# --- attention --------------------------------------------------------------------------------


def test_attend_equals_scaled_dot_product_attention():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = torch.rand(2, 1, 9, 9) > 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    torch.testing.assert_close(
        attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_the_mask_may_be_made_once_beforehand():
    """In the dtype that attention runs in: that of the stream, or autocast's."""
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    assert torch.equal(attend(q, k, v, mask_for(q, mask)), attend(q, k, v, mask))
    assert mask_for(q.double(), mask).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert mask_for(q, mask).dtype == torch.bfloat16
    drawn = additive(torch.tensor([[True, False], [True, True]]), torch.float32)
    assert drawn.tolist() == [[0, -torch.inf], [0, 0]]


# --- cross-entropy ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_summed_cross_entropy_is_torchs_in_value_and_gradient(dtype):
    """Computed in float32 for bfloat16 logits too; only the gradient is rounded to their dtype."""
    torch.manual_seed(1)
    logits = (5 * torch.randn(150, 40)).to(dtype)  # more rows than a slice holds, no multiple
    targets = torch.randint(40, (150,))
    got, want = logits.clone().requires_grad_(), logits.float().requires_grad_()
    # A copy goes in: the function writes the gradient over what it was given.
    value = SummedCrossEntropy.apply(got.clone(), targets)
    reference = F.cross_entropy(want, targets, reduction="sum")
    torch.testing.assert_close(value, reference)
    (0.37 * value).backward()
    (0.37 * reference).backward()
    assert got.grad.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 2**-7  # rounded, scaled and rounded again
    torch.testing.assert_close(got.grad.float(), want.grad, rtol=rtol, atol=1e-6)


def test_summed_cross_entropy_does_not_run_backward_twice():
    """It wrote the gradient over the logits and scaled it there: a second one would be wrong."""
    logits, targets = torch.randn(70, 40, requires_grad=True), torch.randint(40, (70,))
    value = summed_cross_entropy(logits * 1, targets)
    value.backward(retain_graph=True)
    first = logits.grad.clone()
    with pytest.raises(RuntimeError, match="only once"):
        value.backward()
    assert torch.equal(logits.grad, first)


def test_summed_cross_entropy_without_gradient_leaves_the_logits():
    logits, targets = torch.randn(70, 40), torch.randint(40, (70,))
    before = logits.clone()
    want = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(summed_cross_entropy(logits, targets), want)
    assert torch.equal(logits, before)
    assert summed_cross_entropy(logits[:0], targets[:0]) == 0


# --- products of few rows ---------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_compute_the_same_and_are_gone_afterwards(bias):
    gpt = make_gpt(bias=bias).float()
    x = torch.randn(3, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = gpt.h[0].mlp(x), gpt.lm_head(x)
        with packed_weights(gpt):
            packed = gpt.h[0].mlp(x), gpt.lm_head(x)
            used = "forward" in vars(gpt.lm_head)
    torch.testing.assert_close(packed, expected, rtol=2**-6, atol=2**-6)
    supported = hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    assert used == (supported and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert_nothing_packed(gpt)
    with packed_weights(gpt):  # float32 is left alone
        assert "forward" not in vars(gpt.lm_head)


def assert_nothing_packed(model):
    for module in model.modules():
        assert not {"forward", "fused_gelu"} & vars(module).keys()
    assert not kernels.users


@pytest.fixture
def packing(monkeypatch):
    """A CPU that can pack, whatever it is: oneDNN's two products in plain torch, with the weight
    laid out as no other layer could use it. Returns how often each was called, by thread too."""
    calls = Counter()

    def reorder(weight):
        calls["packed"] += 1
        assert weight.dtype == torch.bfloat16 and not weight.requires_grad
        return weight.T.contiguous()

    def product(x, weight, bias, then, scalars, algorithm):
        calls[then] += 1
        calls[threading.get_ident()] += 1
        assert (scalars, algorithm) == ([], "none") and not torch.is_grad_enabled()
        assert x.dtype == weight.dtype == torch.bfloat16
        # As the real ones do: one rounding, at the end.
        y = x.float() @ weight.float() + (0 if bias is None else bias.float())
        return (F.gelu(y) if then == "gelu" else y).bfloat16()

    ops = {"_is_mkldnn_bf16_supported": lambda: True, "_reorder_linear_weight": reorder,
           "_linear_pointwise": product}  # fmt: skip
    for name, op in ops.items():
        monkeypatch.setattr(torch.ops.mkldnn, name, op, raising=False)
    return calls


def in_bf16():
    return torch.autocast("cpu", torch.bfloat16)


def outputs(gpt, x):
    """Of every kind of linear layer that is packed."""
    layer = gpt.h[0]
    return layer.mlp(x), layer.attn.c_attn(x), layer.attn.c_proj(x), gpt.lm_head(x)


@pytest.mark.parametrize("bias", [False, True])
def test_packing_runs_every_linear_layer_on_packed_weights(bias, packing):
    gpt, x = make_gpt(bias=bias).float(), torch.randn(3, 32)
    with torch.no_grad(), in_bf16():
        expected = outputs(gpt, x)
        with packed_weights(gpt):
            assert packing["packed"] == 2 * 4 + 1
            torch.testing.assert_close(outputs(gpt, x), expected, rtol=2**-6, atol=2**-6)
        assert (packing["gelu"], packing["none"]) == (1, 4)
        again = outputs(gpt, x)
    assert (packing["gelu"], packing["none"]) == (1, 4), "plain again"
    assert all(torch.equal(a, b) for a, b in zip(again, expected))
    assert_nothing_packed(gpt)


def test_packed_weights_are_gone_after_an_error(packing):
    gpt = make_gpt().float()
    with pytest.raises(KeyError), in_bf16(), packed_weights(gpt):
        raise KeyError
    assert packing["packed"] and not packing["none"]
    assert_nothing_packed(gpt)


def test_packed_weights_are_those_of_now(packing):
    gpt, x = make_gpt().float(), torch.randn(3, 32)
    for _ in range(2):
        with torch.no_grad(), in_bf16():
            expected = gpt.lm_head(x)
            with packed_weights(gpt):
                torch.testing.assert_close(gpt.lm_head(x), expected, rtol=2**-6, atol=2**-6)
            gpt.lm_head.weight.normal_()
    assert packing["none"] == 2


def test_the_first_packs_and_the_last_unpacks(packing):
    gpt, other, x = make_gpt().float(), make_gpt(1).float(), torch.randn(3, 32)
    with torch.no_grad(), in_bf16(), ExitStack() as first, ExitStack() as second:
        first.enter_context(packed_weights(gpt))
        second.enter_context(packed_weights(gpt))
        assert packing["packed"] == 9, "once"
        with packed_weights(other):  # has a count of its own
            assert packing["packed"] == 18
        assert "forward" not in vars(other.lm_head)
        first.close()
        packing.clear()
        gpt.lm_head(x)
        assert packing["none"] == 1, "the second one is still within"
        second.close()
        gpt.lm_head(x)
        assert packing["none"] == 1
    assert_nothing_packed(gpt)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_several_threads_generate_at_once_on_one_model(temperature, packing, monkeypatch):
    """Each gets what it gets alone, packed to its end, though all are within at the same time and
    leave one after the other. It once ended in AttributeError: the first one had unpacked."""
    n = 4
    gpt = make_gpt(scale=8, block_size=64).float().eval()
    jobs = [([[5 + i, 9, 2], [21 + i], [8, 30, 12, i]], 6 + 8 * i) for i in range(n)]

    def job(prompts, new):
        before = packing[threading.get_ident()]
        with in_bf16():
            rows = generate(gpt, prompts, new, EOT, Sampling(temperature, seed=new))
        return rows, packing[threading.get_ident()] - before

    alone = [job(*each) for each in jobs]
    assert_nothing_packed(gpt)
    for rows, products in alone:  # 9 in each pass
        assert products == 9 * max(map(len, rows))
    assert len({str(rows) for rows, _ in alone}) == n

    # All meet at their first product, so that nobody has left before everybody is within.
    meeting, product, met = threading.Barrier(n), torch.ops.mkldnn._linear_pointwise, set()

    def meet_first(*args):
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            meeting.wait(timeout=30)
        return product(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", meet_first)
    packing["packed"] = 0
    with ThreadPoolExecutor(n) as pool:
        together = list(pool.map(job, *zip(*jobs)))
    assert len(met) == n and packing["packed"] == 9, "they were within at the same time"
    assert together == alone
    assert_nothing_packed(gpt)


def test_iterators_take_turns_on_packed_weights(packing):
    """One is closed half-way and one dropped; the last one to go unpacks. In between, the caller
    trains on the plain layers."""
    gpt, prompts = make_gpt(scale=8, block_size=64).float().eval(), [[5, 9, 2], [21]]

    def begin(seed):
        return generate_steps(gpt, prompts, 12, EOT, Sampling(seed=seed))

    def take(steps):
        with in_bf16():
            return next(steps, (None, torch.tensor([])))[1].tolist()

    alone = [[take(steps) for _ in range(13)] for steps in map(begin, range(4))]
    assert_nothing_packed(gpt)
    packing["packed"], steps, together = 0, [*map(begin, range(4))], [[], [], [], []]
    for number in range(12):
        for at, each in enumerate(steps):
            together[at] += [take(each)] if each else []  # a step's tokens
        if number == 4:
            steps[1].close()
            steps[1] = None
        if number == 6:
            steps[2], before = None, packing["none"]
            gpt.lm_head(torch.randn(2, 32)).sum().backward()
            assert packing["none"] == before
        assert "forward" in vars(gpt.lm_head), "somebody is still within"
    assert packing["packed"] == 9, "once"
    steps[0].close(), steps[3].close()
    assert_nothing_packed(gpt)
    for at, n in enumerate((12, 5, 7, 12)):
        assert together[at] == alone[at][:n]


def test_threads_that_come_and_go_leave_nothing_packed(packing):
    """Each begins an answer many times, and ends some of them early."""
    gpt, prompts = make_gpt(scale=8, block_size=64).float().eval(), [[5, 9, 2], [21]]

    def job(seed):
        found = []
        for n in (3, 12, 1, 5) * 3:
            with in_bf16():
                steps = generate_steps(gpt, prompts, 12, EOT, Sampling(seed=seed))
                found.append([tokens.tolist() for (_, tokens), _ in zip(steps, range(n))])
                steps.close()
        return found

    alone = [job(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(job, range(4))) == alone
    assert_nothing_packed(gpt)


def test_within_packed_weights_other_threads_and_gradients_get_the_plain_layers(packing):
    """A thread that trains or evaluates in float32 on the model while another one generates."""
    gpt, x = make_gpt(bias=True).float(), torch.randn(3, 32)

    def in_float32():
        with torch.no_grad():
            return outputs(gpt, x)

    def with_gradients():
        gpt.zero_grad()
        with in_bf16():
            found = outputs(gpt, x)
        sum(y.float().square().sum() for y in found).backward()
        return *found, *(p.grad for p in gpt.parameters() if p.grad is not None)

    cases = (in_float32, with_gradients)
    expected = [case() for case in cases]
    with torch.no_grad(), in_bf16(), packed_weights(gpt), ThreadPoolExecutor(1) as pool:
        for case, want in zip(cases, expected):
            got = pool.submit(case).result()
            assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want))
            with torch.enable_grad(), torch.autocast("cpu", enabled=False):  # the same thread
                got = case()
            assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want))
        assert not packing["none"] and not packing["gelu"]
        outputs(gpt, x)
        assert packing["none"] and packing["gelu"], "and packed all the while"
    assert_nothing_packed(gpt)


def test_without_the_operators_or_bf16_nothing_is_packed(packing, monkeypatch):
    gpt = make_gpt().float()
    with packed_weights(gpt):
        assert_nothing_packed(gpt)
    with torch.autocast("cpu", torch.float16), packed_weights(gpt):
        assert_nothing_packed(gpt)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with in_bf16(), packed_weights(gpt):
        assert_nothing_packed(gpt)
    assert not packing
