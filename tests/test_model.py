"""Claims about model.py: who sees whom, one row for three passes, what is read, the GPT."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from config import Config
from model import (
    GPT,
    PAD,
    Batch,
    Trunk,
    block_causal_mask,
    block_ends,
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
    """A Batch of (question, answer) token lists, padded on the right."""
    rows = []
    for q, a in examples:
        pieces = {Q: q, A: a, P: [V + i for i in range(n_pred)], T: a}
        idx = [token for b in blocks for token in pieces[b]]
        block = [b for b in blocks for _ in pieces[b]]
        targets = [after if b == A else -1 for after, b in zip(idx[1:], block[1:])] + [-1]
        rows.append((idx, block, targets))
    width = max(len(idx) for idx, _, _ in rows)
    fills = (7, PAD, -1)  # padding is known by its block: token 7 is an ordinary one
    return Batch(*(
        torch.tensor([values + [fill] * (width - len(values)) for values in column])
        for column, fill in zip(zip(*rows), fills)
    ))  # fmt: skip


def nowhere(idx):
    """Hidden states that are read: none."""
    return torch.zeros_like(idx, dtype=torch.bool)


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
    idx, block, _ = make_rows(EXAMPLES[:1])[:3]
    hidden = gpt.everywhere(idx, block)
    mask, positions = block_causal_mask(block, gpt.sees)
    causal = torch.ones_like(mask).tril()
    count = torch.arange(idx.size(1)).expand_as(positions)
    ordinary = (block == Q) | (block == A)  # an ordinary causal row up to here
    for replaced in ((causal, positions), (mask, count)):
        monkeypatch.setattr(model_module, "block_causal_mask", lambda *_, r=replaced: r)
        changed = ~torch.isclose(gpt.everywhere(idx, block), hidden, atol=1e-6).all(-1)
        assert torch.equal(changed, ~ordinary)


def hidden_changes(gpt, idx, block, row, column):
    """(B, T): which hidden states change in any bit when the token at (row, column) does."""
    before = gpt.everywhere(idx, block)
    if block[row, column] == P:  # its embedding is the token
        with torch.no_grad():
            gpt.pred.weight[idx[row, column] - V] += 0.1
    else:
        idx = idx.clone()
        idx[row, column] = (idx[row, column] + 1) % V
    return (gpt.everywhere(idx, block) != before).any(-1)


@pytest.mark.parametrize("looks", [Q, A, P, T], ids=lambda b: f"seen_from_{'_qaPt'[b]}")
@pytest.mark.parametrize("changed", [Q, A, P, T], ids=lambda b: f"change_{'_qaPt'[b]}")
def test_a_token_changes_exactly_the_hidden_states_that_may_see_it(changed, looks):
    """Float32, bit for bit: every token of one block is changed in turn, another block watched."""
    idx, block, _ = make_rows(EXAMPLES[:2])[:3]
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
    idx, block, targets = make_rows(EXAMPLES)[:3]
    # forward spares the last layer where nothing is read: all but labels and ends of blocks
    ends = torch.stack([F.pad(b, (0, 1), value=-1).diff() != 0 for b in block])
    read, ce_sum = gpt(Batch(idx, block, targets), ends)
    hidden = gpt.everywhere(idx, block)
    kept = (targets != -1) | ends
    assert not kept.all()
    torch.testing.assert_close(read[kept], hidden[kept], rtol=1e-9, atol=1e-9)
    assert read[~kept].isnan().all()
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
            own_idx, own_block, own_targets = make_rows([(q, a)], blocks)[:3]
            own = gpt.everywhere(own_idx, own_block)
            expected = torch.cat([of[b] for b in blocks])
            torch.testing.assert_close(own[0], expected, rtol=1e-9, atol=1e-9)
            if labelled:
                logits = own[0] @ gpt.wte.weight.T
                ce = ce + F.cross_entropy(
                    logits, own_targets[0], ignore_index=-1, reduction="sum")
        preds.append(gpt.everywhere(*make_rows([(q, a)], (Q, P))[:2])[0, -1])
        encs.append(gpt.everywhere(*make_rows([(q, a)], (T,))[:2])[0, -1])
    separate = losses(ce, n_labels, torch.stack(preds), torch.stack(encs))
    for got, want in zip(packed, separate):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert_close_gradients(packed_gradients, gradients(gpt, separate[2]))


def test_padding_changes_nothing():
    gpt = make_gpt(scale=4)
    batch = make_rows(EXAMPLES)
    assert (batch.block == PAD).any()

    def run(batch):
        hidden, ce = gpt(batch, block_ends(batch.block))
        pred, target = (read_hidden(hidden, batch.block, b) for b in (P, T))
        return hidden, ce + (1 - F.cosine_similarity(pred, target)).sum()

    hidden, loss = run(batch)
    together = gradients(gpt, loss)
    alone_loss = 0.0
    for row, example in enumerate(EXAMPLES):
        alone, own_loss = run(make_rows([example]))
        torch.testing.assert_close(
            hidden[row, : alone.size(1)], alone[0], rtol=1e-9, atol=1e-9, equal_nan=True)
        alone_loss = alone_loss + own_loss
    torch.testing.assert_close(loss, alone_loss, rtol=1e-6, atol=1e-6)
    assert_close_gradients(together, gradients(gpt, alone_loss))


def test_read_hidden_is_the_last_token_of_the_block():
    block = torch.tensor([[Q, Q, A, P, PAD], [Q, A, A, P, P]])
    hidden = torch.arange(10.0).view(2, 5, 1)
    for which, expected in ((Q, [1, 5]), (A, [2, 7]), (P, [3, 9])):
        assert read_hidden(hidden, block, which)[:, 0].tolist() == expected


def test_read_hidden_is_the_mean_over_the_block():
    """What is nan elsewhere stays out of it, and a block that a row lacks gives 0."""
    block = torch.tensor([[Q, Q, A, P, PAD], [Q, A, A, P, P]])
    hidden = torch.arange(10.0).view(2, 5, 1)
    for which, expected in ((Q, [0.5, 5]), (A, [2, 6.5]), (P, [3, 8.5]), (T, [0, 0])):
        only = hidden.masked_fill((block != which)[..., None], math.nan)
        assert read_hidden(only, block, which, "mean")[:, 0].tolist() == expected


def test_ends_of_blocks_equal_the_hand_drawn_ones():
    block = torch.tensor([[Q, Q, A, P, PAD, PAD], [Q, A, A, P, P, T]])
    drawn = [". 1 1 1 . 1", "1 . 1 . 1 1"]  # padding counts as a block, which nobody reads
    assert block_ends(block).tolist() == [[c == "1" for c in row.split()] for row in drawn]


# --- what is read -----------------------------------------------------------------------------


def test_hidden_states_that_nobody_asked_for_are_nan():
    """Those asked for, by `read` or by a label, equal what `everywhere` computes."""
    gpt = make_gpt(scale=4)
    batch = make_rows(EXAMPLES)
    hidden = gpt.everywhere(batch.idx, batch.block)
    labelled, alone = batch.targets != -1, batch._replace(targets=None)
    everything, some = torch.ones_like(labelled), torch.rand(labelled.shape) < 0.3
    assert (some & ~labelled).any() and (labelled & ~some).any()
    for asked, read, wanted in (
        (batch, nowhere(batch.idx), labelled),
        (batch, some, some | labelled),
        (batch, everything, everything),
        (alone, some, some),
        (alone, nowhere(batch.idx), nowhere(batch.idx)),
    ):
        found, _ = gpt(asked, read)
        torch.testing.assert_close(found[wanted], hidden[wanted], rtol=1e-12, atol=1e-12)
        assert found[~wanted].isnan().all()


def test_a_loss_on_an_unread_position_is_nan():
    """Not a number that is silently wrong: whoever reads where nobody asked finds out at once."""
    gpt = make_gpt()
    batch = make_rows(EXAMPLES)
    read = block_ends(batch.block) & (batch.block == P)
    hidden, ce = gpt(batch, read)
    pred, target = (read_hidden(hidden, batch.block, b) for b in (P, T))
    assert pred.isfinite().all() and ce.isfinite()
    assert (1 - F.cosine_similarity(pred, target)).mean().isnan()
    assert (pred - target).norm().isnan()
    assert read_hidden(hidden, batch.block, T, "mean").isnan().all()


def test_the_last_layer_computes_only_positions_read():
    gpt, shapes = make_gpt(scale=4), {}
    for name, module in gpt.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: shapes.update({name: tuple(output.shape)}))
    batch = make_rows(EXAMPLES)
    (B, S), n = batch.idx.shape, 17
    read = nowhere(batch.idx)
    read.view(-1)[torch.randperm(B * S)[:n]] = True
    mask, positions = block_causal_mask(batch.block, gpt.sees)
    found = gpt.layers(gpt.embed(batch.idx), positions, mask, read=read.nonzero(as_tuple=True))
    assert n < B * S and found.shape == (n, 32)
    assert shapes["h.1.attn.c_attn"] == (B, S, 96)  # keys and values of all are needed
    for name in ("attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        assert shapes[f"h.1.{name}"][:-1] == (n,)
        assert shapes[f"h.0.{name}"][:-1] == (B, S)
    assert shapes["ln_f"] == (n, 32)
    everywhere = gpt.everywhere(batch.idx, batch.block)
    torch.testing.assert_close(found, everywhere[read], rtol=1e-12, atol=1e-12)


def test_reading_less_leaves_the_gradient_as_it_is():
    gpt = make_gpt(scale=4)
    batch = make_rows(EXAMPLES)
    grads = []
    for read in (block_ends(batch.block), torch.ones_like(batch.block, dtype=torch.bool)):
        hidden, ce = gpt(batch, read)
        pred, target = (read_hidden(hidden, batch.block, b) for b in (P, T))
        grads.append(gradients(gpt, ce + (1 - F.cosine_similarity(pred, target)).sum()))
    assert_close_gradients(*grads)


def test_streams_are_what_enters_each_layer():
    gpt, streams = make_gpt(scale=4), []
    batch = make_rows(EXAMPLES)
    last, _ = gpt(batch, torch.ones_like(batch.block, dtype=torch.bool), streams)
    mask, positions = block_causal_mask(batch.block, gpt.sees)
    enters = [gpt.embed(batch.idx) + gpt.wpe(positions)]
    for layer in gpt.h:
        enters.append(layer(enters[-1], mask))
    assert len(streams) == len(gpt.h) == 2
    for got, want in zip([*streams, last], enters):
        torch.testing.assert_close(got, gpt.ln_f(want), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("read", [block_ends, nowhere, torch.ones_like])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no_labels"])
def test_flops_are_those_that_torch_counts(labels, read):
    gpt, batch = make_gpt(), make_rows(EXAMPLES)
    batch = batch if labels else batch._replace(targets=None)
    read = read(batch.block).bool()
    with FlopCounterMode(display=False) as counter:
        gpt(batch, read)
    assert gpt.flops(batch, read) == counter.get_total_flops() > 0


class Bag(Trunk):
    """The least that a trunk is: a token's state is the mean of the embeddings that it sees."""

    def __init__(self):
        super().__init__(PARENTS)
        self.width, self.vocab_size, self.longest_path = 8, V, 32
        self.table = nn.Embedding(V + 2, self.width)

    def embed(self, idx):
        return self.table(idx)

    def layers(self, x, position_ids, attn_mask, cache=None, read=None, streams=None):
        seen = attn_mask.to(x.dtype)
        x = seen @ x / seen.sum(-1, keepdim=True)
        return x if read is None else x[read]

    def logits(self, hidden):
        return hidden @ self.table.weight[:V].T


def test_another_network_is_a_trunk_by_its_embed_layers_and_logits():
    bag, batch = Bag(), make_rows(EXAMPLES)
    read, labelled = block_ends(batch.block), batch.targets != -1
    hidden, ce = bag(batch, read)
    everywhere = bag.everywhere(batch.idx, batch.block)
    torch.testing.assert_close(hidden[read | labelled], everywhere[read | labelled])
    assert hidden[~(read | labelled)].isnan().all()
    logits = everywhere[labelled] @ bag.table.weight[:V].T
    want = F.cross_entropy(logits, batch.targets[labelled], reduction="sum")
    torch.testing.assert_close(ce, want)
    assert bag.device.type == "cpu" and bag.flops(batch, read) == 2 * batch.idx.numel() * 66 * 8


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
    torch.testing.assert_close(
        gpt.everywhere(idx, block), plain_gpt(gpt, idx), rtol=1e-9, atol=1e-9)


def test_initial_loss_is_log_vocab_and_the_head_is_tied():
    gpt = make_gpt()
    idx, block = torch.randint(V, (8, 32)), torch.full((8, 32), Q)
    targets = torch.randint(V, (8, 32))
    ce = gpt(Batch(idx, block, targets), nowhere(idx))[1].item() / targets.numel()
    assert abs(ce - math.log(V)) < 0.05
    assert gpt.lm_head.weight is gpt.wte.weight


def test_output_layer_runs_on_labelled_positions_only():
    gpt, seen = make_gpt(), []
    gpt.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    idx, block, targets = make_rows(EXAMPLES)[:3]
    assert (targets != -1).sum() == 12 < idx.numel()
    gpt(Batch(idx, block, targets), block_ends(block))
    assert seen.pop() == (12, 32)
    _, ce = gpt(Batch(idx, block, None), block_ends(block))
    assert ce is None and not seen, "no labels, no output layer"
    assert gpt(Batch(idx, block, torch.full_like(idx, -1)), block_ends(block))[1] == 0


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
    batch = make_rows(EXAMPLES, n_pred=k)
    block = batch.block
    assert (batch.idx >= V).sum() == k * len(EXAMPLES)
    hidden, ce = gpt(batch, block_ends(block))
    pred = read_hidden(hidden, block, P if k else Q)
    (ce + (1 - F.cosine_similarity(pred, read_hidden(hidden, block, T))).sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in gpt.parameters())


def test_pred_learns_from_the_jepa_loss_and_never_from_cross_entropy():
    gpt = make_gpt()
    idx, block, targets = make_rows(EXAMPLES)[:3]
    gpt(Batch(idx, block, targets), block_ends(block))[1].backward()
    assert gpt.wte.weight.grad.abs().sum() > 0
    assert gpt.pred.weight.grad is None or not gpt.pred.weight.grad.any()
    hidden = gpt.everywhere(idx, block)
    pred, target = (read_hidden(hidden, block, b) for b in (P, T))
    (1 - F.cosine_similarity(pred, target)).mean().backward()
    assert gpt.pred.weight.grad.abs().sum(1).gt(0).all()  # both [PRED], the last sees the first
