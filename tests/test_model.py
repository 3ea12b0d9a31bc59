"""Claims about model.py: who sees whom, one row for three passes, the GPT, generation."""

import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from config import Config
from model import (
    GPT,
    PAD,
    SummedCrossEntropy,
    attend,
    block_causal_mask,
    read_hidden,
    visible_blocks,
)

V = 64
Q, A, P, T = 1, 2, 3, 4  # question, answer, [PRED], target
PARENTS = (None, None, Q, Q, None)
EOT = V - 1

# Written by hand, not taken from the code: the blocks whose tokens see block X.
SEEN_BY = {Q: {Q, A, P}, A: {A}, P: {P}, T: {T}}


def make_gpt(seed=0, scale=1.0, **options):
    """A tiny float64 model; scale > 1 gives it strong opinions without training."""
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, n_pred=2)
    torch.manual_seed(seed)
    gpt = GPT(Config(**{**sizes, **options}), V, PARENTS).double()
    with torch.no_grad():
        for p in gpt.parameters():
            if p.dim() == 2:
                p.mul_(scale)
    return gpt


def make_rows(examples, blocks=(Q, A, P, T), n_pred=2):
    """idx, block and targets of (question, answer) token lists, padded on the right."""
    rows = []
    for q, a in examples:
        pieces = {Q: q, A: a, P: [V + i for i in range(n_pred)], T: a}
        idx = [token for b in blocks for token in pieces[b]]
        block = [b for b in blocks for _ in pieces[b]]
        targets = [after if b == A else -1 for after, b in zip(idx[1:], block[1:])] + [-1]
        rows.append((idx, block, targets))
    width = max(len(idx) for idx, _, _ in rows)
    fills = (7, PAD, -1)  # padding is known by its block: token 7 is an ordinary one
    return [
        torch.tensor([values + [fill] * (width - len(values)) for values in column])
        for column, fill in zip(zip(*rows), fills)
    ]


EXAMPLES = [
    ([5, 9, 2, 40], [11, 3, 8, EOT]),
    ([21, 6], [17, 33, 50, 1, 4, EOT]),
    ([8, 30, 12, 44, 2, 19, 7], [60, EOT]),
]


# --- who sees whom ----------------------------------------------------------------------------

PICTURE = """
    1 . . . . . .
    1 1 . . . . .
    1 1 1 . . . .
    1 1 1 1 . . .
    1 1 . . 1 . .
    . . . . . 1 .
    . . . . . 1 1
"""
PADDED_PICTURE = """
    1 . . . . . .
    1 1 . . . . .
    1 . 1 . . . .
    1 . 1 1 . . .
    . . . . 1 . .
    . . . . . 1 .
    . . . . . 1 1
"""


def test_mask_and_positions_equal_the_hand_drawn_ones():
    block = torch.tensor([[Q, Q, A, A, P, T, T], [Q, A, P, P, T, PAD, PAD]])
    mask, positions = block_causal_mask(block, visible_blocks(PARENTS))
    for row, picture in enumerate((PICTURE, PADDED_PICTURE)):
        drawn = [[c == "1" for c in line.split()] for line in picture.split("\n") if line.strip()]
        assert mask[row].tolist() == drawn
    assert positions.tolist() == [[0, 1, 2, 3, 2, 0, 1], [0, 1, 1, 2, 0, 0, 0]]


def test_a_block_sees_its_grandparent():
    sees = visible_blocks((None, None, 1, 2))  # 3 continues 2, which continues 1
    assert sees.int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]


def test_model_uses_the_mask_and_the_positions(monkeypatch):
    gpt = make_gpt()
    idx, block, _ = make_rows(EXAMPLES[:1])
    hidden = gpt.hidden(idx, block)
    mask, positions = block_causal_mask(block, gpt.sees)
    causal = torch.ones_like(mask).tril()
    count = torch.arange(idx.size(1)).expand_as(positions)
    ordinary = (block == Q) | (block == A)  # an ordinary causal row up to here
    for replaced in ((causal, positions), (mask, count)):
        monkeypatch.setattr(model_module, "block_causal_mask", lambda *_, r=replaced: r)
        changed = ~torch.isclose(gpt.hidden(idx, block), hidden, atol=1e-6).all(-1)
        assert torch.equal(changed, ~ordinary)


def hidden_changes(gpt, idx, block, row, column):
    """(B, T): which hidden states change in any bit when the token at (row, column) does."""
    before = gpt.hidden(idx, block)
    if block[row, column] == P:  # its embedding is the token
        with torch.no_grad():
            gpt.pred.weight[idx[row, column] - V] += 0.1
    else:
        idx = idx.clone()
        idx[row, column] = (idx[row, column] + 1) % V
    return (gpt.hidden(idx, block) != before).any(-1)


@pytest.mark.parametrize("looks", [Q, A, P, T], ids=lambda b: f"seen_from_{'_qaPt'[b]}")
@pytest.mark.parametrize("changed", [Q, A, P, T], ids=lambda b: f"change_{'_qaPt'[b]}")
def test_a_token_changes_exactly_the_hidden_states_that_may_see_it(changed, looks):
    """Float32, bit for bit: every token of one block is changed in turn, another block watched."""
    idx, block, _ = make_rows(EXAMPLES[:2])
    for column in (block[0] == changed).nonzero()[:, 0].tolist():
        changes = hidden_changes(make_gpt().float(), idx, block, 0, column)
        expected = (block[0] == looks) & (looks in SEEN_BY[changed])
        if looks == changed:  # within a block, later tokens never influence earlier ones
            expected = expected & (torch.arange(idx.size(1)) >= column)
        assert torch.equal(changes[0] & (block[0] == looks), expected)
        # The other row and the padding never change (row 1's [PRED] are the same parameters).
        assert not changes[block == PAD].any()
        assert changed == P or not changes[1].any()


# --- one row for three passes -----------------------------------------------------------------


def losses(ce_sum, n_labels, pred, target):
    ce, jepa = ce_sum / n_labels, (1 - F.cosine_similarity(pred, target)).mean()
    return ce, jepa, 0.7 * ce + 1.3 * jepa


def gradients(gpt, loss):
    gpt.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in gpt.named_parameters()}


def assert_close_gradients(got, want):
    """Up to float32 rounding: the cross-entropy is computed in it, whatever the model's dtype."""
    assert got.keys() == want.keys()
    for name in want:
        assert want[name].abs().max() > 0, name
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)


def test_packed_row_equals_separate_passes():
    gpt = make_gpt(scale=4)
    idx, block, targets = make_rows(EXAMPLES)
    read, ce_sum = gpt(idx, block, targets)
    hidden = gpt.hidden(idx, block)
    # forward spares the last layer where nothing is read: all but labels and ends of blocks
    ends = torch.stack([F.pad(b, (0, 1), value=-1).diff() != 0 for b in block])
    kept = (targets != -1) | ends
    assert not kept.all()
    torch.testing.assert_close(read, hidden * kept[..., None], rtol=1e-9, atol=1e-9)
    n_labels = sum(len(a) for _, a in EXAMPLES)
    assert (targets != -1).sum() == n_labels
    pred, target = (read_hidden(read, block, b) for b in (P, T))
    packed = losses(ce_sum, n_labels, pred, target)
    packed_gradients = gradients(gpt, packed[2])

    # One example at a time, so that nothing is padded, and each block as in a row of its own.
    ce, preds, encs = 0.0, [], []
    for row, (q, a) in enumerate(EXAMPLES):
        of = {b: hidden[row, block[row] == b] for b in (Q, A, P, T)}
        for blocks, labelled in (((Q, A), True), ((Q, P), False), ((T,), False)):
            own_idx, own_block, own_targets = make_rows([(q, a)], blocks)
            own = gpt.hidden(own_idx, own_block)
            expected = torch.cat([of[b] for b in blocks])
            torch.testing.assert_close(own[0], expected, rtol=1e-9, atol=1e-9)
            if labelled:
                logits = own[0] @ gpt.wte.weight.T
                ce = ce + F.cross_entropy(
                    logits, own_targets[0], ignore_index=-1, reduction="sum")
        preds.append(gpt.hidden(*make_rows([(q, a)], (Q, P))[:2])[0, -1])
        encs.append(gpt.hidden(*make_rows([(q, a)], (T,))[:2])[0, -1])
    separate = losses(ce, n_labels, torch.stack(preds), torch.stack(encs))
    for got, want in zip(packed, separate):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert_close_gradients(packed_gradients, gradients(gpt, separate[2]))


def test_padding_changes_nothing():
    gpt = make_gpt(scale=4)
    idx, block, targets = make_rows(EXAMPLES)
    assert (block == PAD).any()

    def run(idx, block, targets):
        hidden, ce = gpt(idx, block, targets)
        pred, target = (read_hidden(hidden, block, b) for b in (P, T))
        return hidden, ce + (1 - F.cosine_similarity(pred, target)).sum()

    hidden, loss = run(idx, block, targets)
    together = gradients(gpt, loss)
    alone_loss = 0.0
    for row, example in enumerate(EXAMPLES):
        alone, own_loss = run(*make_rows([example]))
        torch.testing.assert_close(
            hidden[row, : alone.size(1)], alone[0], rtol=1e-9, atol=1e-9)
        alone_loss = alone_loss + own_loss
    torch.testing.assert_close(loss, alone_loss, rtol=1e-6, atol=1e-6)
    assert_close_gradients(together, gradients(gpt, alone_loss))


def test_read_hidden_is_the_last_token_of_the_block():
    block = torch.tensor([[Q, Q, A, P, PAD], [Q, A, A, P, P]])
    hidden = torch.arange(10.0).view(2, 5, 1)
    for which, expected in ((Q, [1, 5]), (A, [2, 7]), (P, [3, 9])):
        assert read_hidden(hidden, block, which)[:, 0].tolist() == expected


# --- the language model -----------------------------------------------------------------------


def plain_gpt(gpt, idx):
    """GPT-2 written again from its weights: causal attention, no blocks. idx (B, T) -> (B, T, C)"""
    w = gpt.state_dict()
    B, S = idx.shape
    C = w["wte.weight"].size(1)

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["wte.weight"][idx] + w["wpe.weight"][:S]
    for i in range(2):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, -1)
        q, k, v = (t.reshape(B, S, 2, C // 2).transpose(1, 2) for t in (q, k, v))  # two heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + linear(y.reshape(B, S, C), f"h.{i}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
        x = x + linear(inner, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f")


def test_question_and_answer_rows_are_an_ordinary_gpt():
    gpt = make_gpt(scale=4, bias=True)
    with torch.no_grad():
        for p in gpt.parameters():
            if p.dim() == 1:  # biases start at 0 and would hide
                p.add_(0.3 * torch.randn_like(p))
    idx = torch.randint(V, (3, 20))
    block = torch.tensor([[Q] * 8 + [A] * 12, [Q] + [A] * 19, [Q] * 20])
    torch.testing.assert_close(gpt.hidden(idx, block), plain_gpt(gpt, idx), rtol=1e-9, atol=1e-9)


def test_attend_equals_scaled_dot_product_attention():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = torch.rand(2, 1, 9, 9) > 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    torch.testing.assert_close(
        attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_initial_loss_is_log_vocab_and_the_head_is_tied():
    gpt = make_gpt()
    idx, block = torch.randint(V, (8, 32)), torch.full((8, 32), Q)
    targets = torch.randint(V, (8, 32))
    ce = gpt(idx, block, targets)[1].item() / targets.numel()
    assert abs(ce - math.log(V)) < 0.05
    assert gpt.lm_head.weight is gpt.wte.weight


def test_output_layer_runs_on_labelled_positions_only():
    gpt, seen = make_gpt(), []
    gpt.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    idx, block, targets = make_rows(EXAMPLES)
    assert (targets != -1).sum() == 12 < idx.numel()
    gpt(idx, block, targets)
    assert seen.pop() == (12, 32)
    gpt(idx, block)
    assert not seen, "no labels, no output layer"
    assert gpt(idx, block, torch.full_like(idx, -1))[1] == 0


def test_parameters_have_gpt2_names():
    inside = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    modules = ["ln_f"] + [f"h.{i}.{name}" for i in range(2) for name in inside]
    expected = {f"{m}.{kind}" for m in modules for kind in ("weight", "bias")}
    expected |= {"wte.weight", "wpe.weight", "lm_head.weight", "pred.weight"}
    assert set(make_gpt(bias=True).state_dict()) == expected


def test_no_weight_but_pred_depends_on_n_pred():
    plain = make_gpt(n_pred=0).state_dict()
    for k in (1, 3):
        weights = make_gpt(n_pred=k).state_dict()
        assert weights.pop("pred.weight").shape == (k, 32)
        assert weights.keys() == plain.keys()
        assert all(torch.equal(weights[name], plain[name]) for name in plain)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_any_number_of_pred_tokens_trains(k):
    gpt = make_gpt(n_pred=k)
    idx, block, targets = make_rows(EXAMPLES, n_pred=k)
    assert (idx >= V).sum() == k * len(EXAMPLES)
    hidden, ce = gpt(idx, block, targets)
    pred = read_hidden(hidden, block, P if k else Q)
    (ce + (1 - F.cosine_similarity(pred, read_hidden(hidden, block, T))).sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in gpt.parameters())


def test_pred_learns_from_the_jepa_loss_and_never_from_cross_entropy():
    gpt = make_gpt()
    idx, block, targets = make_rows(EXAMPLES)
    gpt(idx, block, targets)[1].backward()
    assert gpt.wte.weight.grad.abs().sum() > 0
    assert gpt.pred.weight.grad is None or not gpt.pred.weight.grad.any()
    hidden = gpt.hidden(idx, block)
    pred, target = (read_hidden(hidden, block, b) for b in (P, T))
    (1 - F.cosine_similarity(pred, target)).mean().backward()
    assert gpt.pred.weight.grad.abs().sum(1).gt(0).all()  # both [PRED], the last sees the first


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


# --- generation -------------------------------------------------------------------------------

PROMPTS = [[5, 9, 2, 40, 13], [21], [8, 30, 12], [3, 3, 3, 3, 3, 3, 3, 61]]


def make_talker(seed=0, quiet=True):
    """A model with strong opinions; quiet: one that practically never says end of text."""
    gpt = make_gpt(seed, scale=8)
    if quiet:
        with torch.no_grad():
            gpt.wte.weight[EOT] = 0  # logit 0, below the largest of 63 others
    return gpt.eval()


@pytest.mark.parametrize("options", [
    dict(temperature=0),
    dict(temperature=1.0),
    dict(temperature=1.5, top_k=5),
    dict(temperature=2.0, top_p=0.8),
    dict(temperature=1.2, top_k=20, top_p=0.95),
], ids=["greedy", "sampled", "top_k", "top_p", "both"])  # fmt: skip
def test_cached_generation_equals_uncached(options):
    gpt = make_talker(quiet=False)
    cached = gpt.generate(PROMPTS, 16, EOT, **options, seed=3)
    assert cached == gpt.generate(PROMPTS, 16, EOT, **options, seed=3, cached=False)
    assert len({tuple(row) for row in cached}) == len(PROMPTS)  # each prompt its own text


@pytest.mark.parametrize("grow", [1, 3, 32])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_rows_that_finish_and_leave_change_no_other(temperature, grow, monkeypatch):
    """Uncached, every row stays to the end. The cached batch shrinks and its caches grow."""
    monkeypatch.setattr(model_module, "GROW", grow)
    gpt, batches = make_gpt(block_size=64), []
    prompts = [[i, 1, *range(i % 5)] for i in range(24)]
    expected = gpt.generate(prompts, 50, 7, temperature=temperature, cached=False)
    gpt.ln_f.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    assert gpt.generate(prompts, 50, 7, temperature=temperature) == expected
    if temperature:  # at temperature 0 this model never stops
        assert len({len(row) for row in expected}) > 5
        assert batches[0] == 24 > batches[-1] and batches == sorted(batches, reverse=True)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_compute_the_same_and_are_gone_afterwards(bias):
    gpt = make_gpt(bias=bias).float()
    x = torch.randn(3, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = gpt.h[0].mlp(x), gpt.lm_head(x)
        with model_module.packed_weights(gpt):
            packed = gpt.h[0].mlp(x), gpt.lm_head(x)
            used = "forward" in vars(gpt.lm_head)
    torch.testing.assert_close(packed, expected, rtol=2**-6, atol=2**-6)
    supported = hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    assert used == (supported and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert not any("forward" in vars(module) for module in gpt.modules())
    with model_module.packed_weights(gpt):  # float32 is left alone
        assert "forward" not in vars(gpt.lm_head)


def test_greedy_generation_is_the_argmax_of_a_plain_gpt():
    gpt = make_talker()
    gpt_with_bias = make_gpt(bias=True)  # the reference reads biases; these are all 0
    gpt_with_bias.load_state_dict(gpt.state_dict(), strict=False)
    for prompt, new in zip(PROMPTS, gpt.generate(PROMPTS, 6, EOT, temperature=0)):
        ids = list(prompt)
        for _ in range(6):
            hidden = plain_gpt(gpt_with_bias, torch.tensor([ids]))[0, -1]
            ids.append((gpt.wte.weight @ hidden).argmax().item())
        assert ids == prompt + new


def test_batched_greedy_generation_equals_one_by_one():
    gpt = make_talker()
    batch = gpt.generate(PROMPTS, 12, EOT, temperature=0)
    assert batch == [gpt.generate([p], 12, EOT, temperature=0)[0] for p in PROMPTS]


def test_a_prompt_may_end_in_pred_tokens():
    gpt = make_talker()
    prompts = [[*p, V, V + 1] for p in PROMPTS]
    new = gpt.generate(prompts, 8, EOT, temperature=0)
    assert new == gpt.generate(prompts, 8, EOT, temperature=0, cached=False)
    assert new != gpt.generate(PROMPTS, 8, EOT, temperature=0)
    with torch.no_grad():
        gpt.pred.weight.copy_(torch.randn_like(gpt.pred.weight))
    assert new != gpt.generate(prompts, 8, EOT, temperature=0)  # it is read, not skipped


def test_generation_stops_at_end_of_text_and_draws_nothing_above_it():
    eot, new = 7, 10  # of 64 ids, 56 lie above
    gpt, passes = make_gpt(), []
    gpt.ln_f.register_forward_hook(lambda *_: passes.append(1))
    rows = gpt.generate([[i] for i in range(32)], new, eot, temperature=1.0)
    assert max(max(row) for row in rows) <= eot
    stopped = [row for row in rows if row[-1] == eot]
    assert 0 < len(stopped) < len(rows)
    assert all(eot not in row[:-1] for row in stopped)
    assert all(len(row) == new and eot not in row for row in rows if row not in stopped)
    passes.clear()
    [row] = gpt.generate([[1]], 30, eot, temperature=1.0)
    assert row[-1] == eot and len(row) == len(passes) < 30  # no pass after the last row's end


def test_a_row_stops_at_block_size():
    gpt = make_talker()
    prompts = [[1] * n for n in (32, 31, 30, 4)]  # block_size is 32
    rows = gpt.generate(prompts, 20, EOT, temperature=0)
    assert [len(row) for row in rows] == [0, 1, 2, 20]
    alone = [gpt.generate([p], 20, EOT, temperature=0)[0] for p in prompts]
    assert rows == alone  # a full row does not disturb the others


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    gpt = make_talker()
    greedy = gpt.generate(PROMPTS, 12, EOT, temperature=0)
    assert gpt.generate(PROMPTS, 12, EOT, temperature=3.0, top_k=1) == greedy
    assert gpt.generate(PROMPTS, 12, EOT, temperature=3.0, top_p=1e-6) == greedy


def test_temperature_top_k_and_top_p_do_what_they_say():
    """Probabilities .5 .3 .15 .05: top_p = .7 needs the first two; top_k = 3 drops the last;
    temperature 1/2 squares them."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(4000, 4)

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        generator = torch.Generator().manual_seed(0)
        drawn = model_module.sample(logits, temperature, top_k, top_p, generator)
        return drawn.bincount(minlength=4) / len(logits)

    for options, expected in (
        (dict(), [0.15, 0.5, 0.05, 0.3]),
        (dict(top_k=3), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        (dict(top_p=0.7), [0, 0.5 / 0.8, 0, 0.3 / 0.8]),
        (dict(temperature=0.5), [p * p / 0.365 for p in (0.15, 0.5, 0.05, 0.3)]),
    ):
        got = shares(**options)
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=0.03)
        assert all((share == 0) == (want == 0) for share, want in zip(got, expected))


def test_same_seed_same_text_other_seed_other_text():
    gpt = make_talker()
    first = gpt.generate(PROMPTS, 12, EOT, temperature=2.0, seed=1)
    assert first == gpt.generate(PROMPTS, 12, EOT, temperature=2.0, seed=1)
    assert first != gpt.generate(PROMPTS, 12, EOT, temperature=2.0, seed=2)
