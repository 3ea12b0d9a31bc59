"""Claims about jepa.py, held against values worked out by hand and against slow loops."""

import contextlib
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import sums

import alignment
import eval_alignment
import train
from config import Config
from jepa import OBJECTIVES, TEMPERATURE, Objective, cosines, distance, spread, wrong_pairs
from lab.judge import judged
from model import block_ends
from plumbing.jsonl import as_pair
from plumbing.processes import Processes
from plumbing.spreads import sigreg
from plumbing.tokenizers import train_tokenizer
from run import make_model
from views import CODE, PRED, TARGET, TEXT, layout_of, tokenize

DISTANCES = ("cosine", "l2", "mse", "infonce")
SPREADS = ("vicreg", "sigreg", "cross")
LAYOUTS = ("tree", "isolated", "plan", "reverse", "front")


# --- objectives -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([row[key] for row in sums(50) for key in row], 320)


def pairs_of(bpe, n=9, rows=None, **options):
    rows = rows or [{**as_pair(row), "system": "Add." * (i % 2)} for i, row in enumerate(sums(n))]
    sizes = dict(block_size=128, batch_size=len(rows), n_layer=2, n_head=2, n_embd=32)
    return tokenize(rows, bpe, Config(**{**sizes, **options}))[0]


def model_of(pairs):
    """Weights five times the usual size, so that no two embeddings are alike."""
    torch.manual_seed(0)
    model = make_model(pairs.config, pairs.vocab_size).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.dim() == 2 else 1)
    return model


FACTS = [{"text": f"{i} plus", "code": f" {2 * i}", "target": f"{2 * i} less" * (i % 2)}
         for i in range(8)]  # fmt: skip
CASES = [
    *({"layout": layout, "pooling": pooling, "n_pred": k} for layout in LAYOUTS
      for pooling in ("last", "mean") for k in (0, 1, 3) if k or layout not in ("plan", "front")),
    *({"views": views, "pooling": pooling} for views in ("steps", "facts")
      for pooling in ("last", "mean")),
    {"views": "split", "block_size": 32},
    {"views": "facts", "n_pred": 0},
]  # fmt: skip


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_reads_cover_every_hidden_state_that_the_views_need(options, bpe):
    """The others may be nan: neither the embeddings nor their gradient are."""
    pairs = pairs_of(bpe, rows=FACTS if options.get("views") == "facts" else None, **options)
    model, config, objective = model_of(pairs), pairs.config, OBJECTIVES["pair"]
    examples = np.arange(len(pairs))
    has_jepa = pairs.has_target(examples) & (examples % 3 != 1)
    assert 1 < has_jepa.sum() < len(pairs)
    batch = pairs.pack(examples, objective.row(pairs.layout), has_jepa)
    read = objective.reads(batch, config)
    assert read.dtype == torch.bool and read.shape == batch.block.shape
    everywhere = model.everywhere(batch.idx, batch.block)
    known = everywhere.detach().masked_fill(~read[..., None], math.nan).requires_grad_()
    carry = torch.from_numpy(has_jepa)
    got = [view[carry] for view in objective.views(known, batch, config)]
    for view, want in zip(got, objective.views(everywhere, batch, config)):
        assert view.shape == (has_jepa.sum(), 32) and torch.isfinite(view).all()
        assert torch.equal(view, want[carry])
    for view, want in zip(objective.views(model(batch, read)[0], batch, config), got):
        torch.testing.assert_close(view[carry], want, rtol=1e-4, atol=1e-5)
    sum(view.square().sum() for view in got).backward()
    assert torch.isfinite(known.grad).all()


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_cover_the_target_in_a_row_of_its_own(layout, pooling, bpe):
    """As stop_grad and ema encode it."""
    pairs = pairs_of(bpe, layout=layout, pooling=pooling)
    model, config, objective = model_of(pairs), pairs.config, OBJECTIVES["pair"]
    alone = pairs.pack(np.arange(9), (objective.target(pairs.layout),))
    hidden, _ = model(alone._replace(targets=None), objective.reads(alone, config))
    _, target = objective.views(hidden, alone, config)
    everywhere = model.everywhere(alone.idx, alone.block)
    _, want = objective.views(everywhere, alone, config)
    assert torch.isfinite(target).all()
    torch.testing.assert_close(target, want, rtol=1e-4, atol=1e-5)


def test_no_position_is_read_that_the_views_do_not_need(bpe):
    """Reading the last tokens of the blocks keeps most positions out of the last layer."""
    pairs = pairs_of(bpe)
    batch = pairs.pack(np.arange(9), pairs.layout.row)
    read = OBJECTIVES["pair"].reads(batch, pairs.config)
    assert torch.equal(read, block_ends(batch.block)) and read.float().mean() < 0.2
    mean = Config(pooling="mean")
    assert OBJECTIVES["pair"].reads(batch, mean).all()


def test_pair_has_the_rows_and_the_target_of_the_layout():
    objective = OBJECTIVES["pair"]
    drawn = {"tree": ((TEXT, CODE, PRED, TARGET), TARGET), "isolated": ((TEXT, PRED, CODE), CODE),
             "plan": ((TEXT, PRED, CODE, TARGET), TARGET)}  # fmt: skip
    for layout, (row, target) in drawn.items():
        layout = layout_of(Config(layout=layout))
        assert (objective.row(layout), objective.target(layout)) == (row, target)


# --- reading exists once: training, evaluating, judging ---------------------------------------


def by_every_reader(pairs, model, monkeypatch):
    """Pred and target (n, C) of all pairs, as each of the four that read embeddings has them."""
    n, config = len(pairs), pairs.config
    found = {}
    t = train.Training(pairs, model, model, None, None, contextlib.nullcontext, Processes())
    micro = train.plan(t, 0, 0)
    hidden, _ = model(micro.batch, OBJECTIVES[config.objective].reads(micro.batch, config))
    views = train.pred_and_target(t, micro, hidden, micro.batch)
    order = np.argsort(pairs.batch(0)[micro.has_jepa])
    found["training"] = [view.detach()[order] for view in views]
    _, *found["embed_pairs"] = alignment.embed_pairs(model, pairs, n, contextlib.nullcontext)
    _, layers = eval_alignment.embed_layers(model, pairs, contextlib.nullcontext)
    found["embed_layers"] = [layers[-1, 2], layers[-1, 1]]

    seen, real = [], OBJECTIVES[config.objective]
    spy = real._replace(views=lambda *args: seen.append(real.views(*args)) or seen[-1])
    with monkeypatch.context() as patch:
        patch.setitem(OBJECTIVES, config.objective, spy)
        _, cosine = judged(model, pairs, list(range(n)), [pairs.answer(e) for e in range(n)])
    found["judged"] = [torch.cat(views) for views in zip(*seen)]
    torch.testing.assert_close(F.cosine_similarity(*found["judged"]), cosine)
    return found


def assert_close(got, want, name):
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4,
                                   msg=lambda text: f"{name}: {text}")  # fmt: skip


@pytest.mark.parametrize("options", [
    {}, {"n_pred": 0}, {"n_pred": 3}, {"pooling": "mean"}, {"labels": "all"}, {"stop_grad": True},
    {"stop_grad": True, "pooling": "mean"}, {"layout": "isolated", "stop_grad": True},
    *({"layout": layout} for layout in LAYOUTS[1:]), {"objective": "tube_two_views", "n_pred": 0},
], ids=lambda options: "-".join(map(str, options.values())) or "defaults")  # fmt: skip
def test_all_that_read_embeddings_read_the_same(options, bpe, monkeypatch):
    pairs = pairs_of(bpe, n=19, **options)  # two batches of held-out pairs
    model = model_of(pairs)
    found = by_every_reader(pairs, model, monkeypatch)
    pred, target = found["embed_pairs"]
    assert pred.shape == target.shape == (19, 32)
    assert torch.cdist(pred, target).min() > 0.1  # so that a mix-up would show
    for name, (other_pred, other_target) in found.items():
        assert_close((other_pred, other_target), (pred, target), name)


def test_an_objective_of_ones_own_is_a_row_of_the_table(bpe, monkeypatch):
    """Pred from where the answer begins, the target from where it ends: nobody reads elsewhere."""
    def reads(batch, config):
        block = batch.block
        return (block == CODE) & (block.roll(1, 1) != CODE) | block_ends(block) & (block == CODE)

    def views(hidden, batch, config):
        block = batch.block
        rows = torch.arange(len(block))
        last = block.size(1) - 1 - (block == CODE).flip(1).int().argmax(1)
        return hidden[rows, (block == CODE).int().argmax(1)], hidden[rows, last]

    monkeypatch.setitem(OBJECTIVES, "ends", Objective(
        lambda layout: layout.plain, reads, views, lambda layout: None))  # fmt: skip
    pairs = pairs_of(bpe, n=19, objective="ends")
    model = model_of(pairs)
    found = by_every_reader(pairs, model, monkeypatch)
    for example in range(19):
        text, code = pairs.view(example, TEXT), pairs.view(example, CODE)
        idx = torch.tensor([text + code])
        hidden = model.everywhere(idx, torch.full_like(idx, TEXT))
        want = hidden[0, len(text)], hidden[0, -1]
        for name, views in found.items():
            assert_close([view[example] for view in views], want, name)


# --- distances --------------------------------------------------------------------------------


def test_distances_equal_hand_computed_values():
    pred = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    target = torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    # cosines 24/25 and 0; differences (-1, 1) and (1, -2)
    assert distance(pred, target, "cosine").item() == pytest.approx((1 / 25 + 1) / 2)
    expected = (math.sqrt(2) + math.sqrt(5)) / 2
    assert distance(pred, target, "l2").item() == pytest.approx(expected)
    assert distance(pred, target, "mse").item() == pytest.approx((1 + 1 + 1 + 4) / 4)
    # infonce: cosines with the own and the other target, over the temperature
    rows = [(24 / 25, 4 / 5), (0, 4 / 5)]
    terms = [math.log(1 + math.exp((other - own) / TEMPERATURE)) for own, other in rows]
    assert distance(pred, target, "infonce").item() == pytest.approx(sum(terms) / 2)


def test_cosine_is_0_for_identical_1_for_orthogonal_2_for_opposite():
    x = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    orthogonal = torch.tensor([[-4.0, 3.0, 0.0], [5.0, 0.0, 0.0]])
    for other, expected in ((x, 0), (7 * x, 0), (orthogonal, 1), (-x, 2)):
        assert distance(x, other, "cosine").item() == pytest.approx(expected, abs=1e-6)


def test_l2_and_mse_of_identical_views_are_0():
    x = torch.randn(5, 8)
    assert distance(x, x, "l2") == 0
    assert distance(x, x, "mse") == 0


@pytest.mark.parametrize("B", [2, 16])
def test_infonce_of_uninformative_embeddings_is_log_batch(B):
    pred, target = torch.randn(1, 8).expand(B, 8), torch.randn(1, 8).expand(B, 8)
    assert distance(pred, target, "infonce").item() == pytest.approx(math.log(B), rel=1e-5)


def test_infonce_is_near_0_for_right_pairs_and_large_for_shuffled_ones():
    x = torch.eye(8)
    assert distance(x, x, "infonce").item() < 1e-4
    assert distance(x, x.roll(1, 0), "infonce").item() == pytest.approx(1 / TEMPERATURE, rel=0.01)


# --- spread -----------------------------------------------------------------------------------


def test_cosine_and_cross_are_0_only_for_right_and_spread_pairs():
    """The two sides of the spectral contrastive loss: pull pairs together, push others apart."""
    def both(pred, target):
        terms = distance(pred, target, "cosine"), spread(pred, target, "cross")
        return [term.item() for term in terms]

    x = torch.eye(4)
    assert both(x, x) == pytest.approx([0, 0], abs=1e-6)
    point = torch.ones(4, 4)
    assert both(point, point) == pytest.approx([0, 1], abs=1e-6)  # collapse: cosine is content
    # shuffled: every pair is orthogonal, and 4 of the 12 wrong pairs have cosine 1
    assert both(x, x.roll(1, 0)) == pytest.approx([1, 4 / 12], abs=1e-6)


def test_vicreg_equals_a_plain_loop():
    torch.manual_seed(1)
    pred, target = 0.7 * torch.randn(6, 3), 1.4 * torch.randn(6, 3)

    def one_view(x):
        B, C = len(x), len(x[0])
        mean = [sum(row[c] for row in x) / B for c in range(C)]
        cov = [[sum((row[c] - mean[c]) * (row[d] - mean[d]) for row in x) / (B - 1)
                for d in range(C)] for c in range(C)]  # fmt: skip
        variance = sum(max(0, 1 - math.sqrt(cov[c][c] + 1e-4)) for c in range(C)) / C
        covariance = sum(cov[c][d] ** 2 for c in range(C) for d in range(C) if c != d) / C
        return variance + covariance

    expected = (one_view(pred.tolist()) + one_view(target.tolist())) / 2
    assert spread(pred, target, "vicreg").item() == pytest.approx(expected, rel=1e-4)


def test_vicreg_of_a_collapsed_batch_is_its_whole_hinge():
    x = torch.randn(1, 8).expand(5, 8)
    assert spread(x, x, "vicreg").item() == pytest.approx(1 - math.sqrt(1e-4), abs=1e-5)


def test_sigreg_equals_a_slow_loop_over_slices_and_knots():
    torch.manual_seed(1)
    x = 0.5 + 2 * torch.randn(7, 3)
    n_slices, n_knots = 5, 9
    torch.manual_seed(2)
    got = sigreg(x, n_slices, n_knots).item()
    torch.manual_seed(2)
    directions = F.normalize(torch.randn(3, n_slices), dim=0).T.tolist()
    step = 3 / (n_knots - 1)
    total = 0.0
    for direction in directions:
        projected = [sum(a * b for a, b in zip(row, direction)) for row in x.tolist()]
        values = []
        for knot in range(n_knots):
            t = knot * step
            real = sum(math.cos(t * p) for p in projected) / len(projected)
            imaginary = sum(math.sin(t * p) for p in projected) / len(projected)
            gauss = math.exp(-t * t / 2)
            values.append(((real - gauss) ** 2 + imaginary**2) * gauss)
        trapezoids = [(a + b) / 2 * step for a, b in pairwise(values)]
        total += 2 * len(projected) * sum(trapezoids)  # twice: t and -t
    assert got == pytest.approx(total / n_slices, rel=1e-4)


def test_sigreg_of_a_gaussian_is_sampling_noise_and_of_a_point_is_huge():
    """The statistic is B times a squared gap whose mean for a Gaussian sample is (1 - e^(-t^2))/B:
    2 * integral of (1 - e^(-t^2)) e^(-t^2 / 2) over [0, 3] = 1.06, whatever B is."""
    B = 2000
    gaussian = torch.randn(B, 4)
    noise = sigreg(gaussian).item()
    assert noise == pytest.approx(1.06, rel=0.35)
    point = torch.full((B, 4), 0.5)
    assert sigreg(point).item() > 200 * noise
    for wrong in (2 * gaussian, gaussian + 1, gaussian[:, :1].expand(B, 4)):
        assert sigreg(wrong).item() > 20 * noise


@pytest.mark.parametrize("kind", ["vicreg", "sigreg"])
def test_spread_is_the_mean_over_both_views(kind, monkeypatch):
    torch.manual_seed(1)
    a, b = torch.randn(6, 3), 0.1 * torch.randn(6, 3)
    directions = torch.randn(3, 256)  # sigreg draws new ones for each view: hold them fixed
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: directions)
    expected = (spread(a, a, kind) + spread(b, b, kind)) / 2
    assert spread(a, a, kind) != spread(b, b, kind)
    torch.testing.assert_close(spread(a, b, kind), expected)


# --- shared answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("options, block", [
    ({}, TARGET), ({"layout": "isolated"}, CODE), ({"layout": "reverse"}, TEXT),
])  # fmt: skip
def test_groups_are_equal_exactly_where_the_tokens_that_enc_reads_are(options, block, bpe):
    """Also where one target begins with another, and where tokens are 0."""
    rows = [{"text": t, "code": c} for t, c in [
        ("a", "1"), ("b", "11"), ("a", "11"), ("c", "1"), ("a", "2"), ("d", "1!"), ("e", "1!!")]]
    pairs = pairs_of(bpe, rows=rows, **options)
    groups = pairs.groups(np.arange(len(pairs)))
    for i in range(len(pairs)):
        for j in range(len(pairs)):
            assert (groups[i] == groups[j]) == (pairs.view(i, block) == pairs.view(j, block))
    assert len(set(groups.tolist())) == 5
    few = pairs.groups(np.array([3, 1, 0]))  # of those asked for alone, in their order
    assert few.shape == (3,) and few.dtype.kind == "i"
    assert (few[0] == few[2]) == (groups[3] == groups[0])
    assert pairs.groups(np.array([], int)).shape == (0,)


@pytest.mark.parametrize("kind", [*DISTANCES, *SPREADS])
def test_groups_without_shared_answers_change_no_bit(kind):
    loss = distance if kind in DISTANCES else spread
    found = []
    for groups in (None, np.array([3, 1, 0, 7, 4]), torch.tensor([3, 1, 0, 7, 4])):
        torch.manual_seed(1)
        views = torch.randn(2, 5, 8).requires_grad_()
        value = loss(*views, kind, groups)
        value.backward()
        found.append((value.detach(), views.grad))
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0]) and torch.equal(gradient, found[0][1])


def test_infonce_and_cross_without_groups_are_what_they_were_to_the_bit():
    """The formulas that they had before answers could be shared."""
    pred, target = torch.randn(2, 7, 8)
    cosine = F.normalize(pred, dim=-1) @ F.normalize(target, dim=-1).T
    infonce = F.cross_entropy(cosine / TEMPERATURE, torch.arange(7))
    cross = cosine[~torch.eye(7, dtype=torch.bool)].square().mean()
    assert torch.equal(distance(pred, target, "infonce", np.arange(7)), infonce)
    assert torch.equal(spread(pred, target, "cross", np.arange(7)), cross)


def test_shared_answers_are_no_negatives():
    """A plain loop over the wrong pairs of each row, its own target beside them."""
    pred, target = torch.randn(2, 6, 8)
    groups = [0, 1, 0, 2, 1, 0]
    cosine, infonce, wrong = cosines(pred, target).tolist(), [], []
    for i in range(6):
        others = [cosine[i][j] for j in range(6) if groups[j] != groups[i]]
        among = [math.exp(c / TEMPERATURE) for c in [cosine[i][i], *others]]
        infonce.append(-math.log(among[0] / sum(among)))
        wrong += [c * c for c in others]
    got = distance(pred, target, "infonce", np.array(groups)).item()
    assert got == pytest.approx(sum(infonce) / 6, rel=1e-4)
    got = spread(pred, target, "cross", np.array(groups)).item()
    assert got == pytest.approx(sum(wrong) / len(wrong), rel=1e-4)


def test_a_perfect_encoder_of_two_answers_has_no_loss():
    groups = np.array([0, 1, 1, 0, 1, 0])
    x = torch.eye(2)[groups]
    assert distance(x, x, "infonce", groups).item() < 1e-5
    assert spread(x, x, "cross", groups).item() < 1e-10
    assert distance(x, x, "infonce").item() > 1  # as it was
    assert spread(x, x, "cross").item() > 0.3


@pytest.mark.parametrize("loss, kind", [(distance, "infonce"), (spread, "cross")])
def test_a_batch_of_one_answer_costs_nothing_and_keeps_its_graph(loss, kind):
    views = torch.randn(2, 4, 8).requires_grad_()
    value = loss(*views, kind, np.zeros(4, int))
    assert value.item() == 0 and value.requires_grad
    value.backward()
    assert (views.grad == 0).all()


def test_wrong_pairs_are_those_with_another_answer():
    assert torch.equal(wrong_pairs(torch.ones(3, 5)), ~torch.eye(3, dtype=torch.bool))
    expected = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]).bool()
    assert torch.equal(wrong_pairs(torch.ones(3, 5), np.array([4, 2, 4])), expected)


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*DISTANCES, *SPREADS])
def test_gradients_stay_finite_when_everything_has_collapsed(kind):
    loss = distance if kind in DISTANCES else spread
    row = torch.randn(1, 8)
    for made in (row, torch.zeros(1, 8)):
        for other in (made, torch.randn(1, 8)):
            pred = made.repeat(4, 1).requires_grad_()
            target = other.repeat(4, 1).requires_grad_()
            value = loss(pred, target, kind)
            value.backward()
            assert torch.isfinite(value)
            assert torch.isfinite(pred.grad).all() and torch.isfinite(target.grad).all()


@pytest.mark.parametrize("kind", [*DISTANCES, *SPREADS])
def test_both_views_get_a_gradient_and_bfloat16_is_computed_in_float32(kind):
    loss = distance if kind in DISTANCES else spread
    pred = torch.randn(6, 8).bfloat16().requires_grad_()
    target = torch.randn(6, 8).bfloat16().requires_grad_()
    torch.manual_seed(1)  # sigreg's directions
    value = loss(pred, target, kind)
    value.backward()
    assert pred.grad.abs().sum() > 0 and target.grad.abs().sum() > 0
    torch.manual_seed(1)
    assert value.dtype == torch.float32 and value == loss(pred.float(), target.float(), kind)


@pytest.mark.parametrize("loss", [distance, spread])
def test_an_unknown_kind_is_refused_by_name(loss):
    with pytest.raises(ValueError, match="euclid"):
        loss(torch.ones(2, 2), torch.ones(2, 2), "euclid")
