"""Claims about objectives/tube.py, held against rows drawn by hand and sums over single steps."""

import contextlib
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Gradients, error_line, sums, training

import data
import evaluate
import sample
import train
from alignment import embed_pairs
from config import Config, load_config
from eval_alignment import embed_layers
from jepa import OBJECTIVES, distance, spread
from lab.search import rows_of
from objectives.tube import SIGNS, drawn, walk
from plumbing.files import read_records
from plumbing.jsonl import as_pair
from plumbing.processes import Processes
from plumbing.tokenizers import train_tokenizer
from run import make_model
from views import CODE, TEXT, Pairs, tokenize

FORMS = tuple(SIGNS)
TUBE = dict(n_pred=0, jepa_weight=2.0, spread="none", spread_weight=0.0)


# --- where it reads ---------------------------------------------------------------------------

# s is a system prompt or the like, | the separator, . the end mark; the columns of the walk:
DRAWN = [
    # 0 1 2 3 4 5 6
    ("  q q q | a a .", (0, 2, 3, 5)),  # nothing stands before: it begins at the first state
    ("  q | a .", (0, 0, 1, 2)),  # no step in the question, one in the answer
    ("  s s q q | a .", (1, 3, 4, 5)),  # it begins at the state before the question's first token
    ("  s q | | | a a a .", (0, 1, 4, 7)),  # a template: the state before the answer's first token
]  # fmt: skip


def by_hand(drawings, **settings):
    """Pairs whose rows are those drawn; each token is a number of its own."""
    lengths, framing = [], []
    for drawing in drawings:
        row = drawing.split()
        text = max(i for i, letter in enumerate(row) if letter == "|") + 1
        lengths.append((text, len(row) - text, len(row) - text))
        framing.append((row.count("s"), row.count("|")))
    lengths = np.array(lengths)
    begin = np.cumsum([0, *lengths[:-1, :2].sum(1)])
    starts = np.stack([begin, begin + lengths[:, 0], begin + lengths[:, 0]], 1)
    n = int(lengths[:, :2].sum())
    config = Config(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, **TUBE,
                       "objective": "tube", "batch_size": len(drawings), **settings})  # fmt: skip
    return Pairs(np.arange(n, dtype=np.int32), np.ones(n, bool), starts, lengths, lengths[:, 0],
                 np.array(framing), config, vocab_size=n)  # fmt: skip


def test_the_walk_is_the_one_drawn_by_hand():
    pairs = by_hand([drawing for drawing, _ in DRAWN])
    assert walk(pairs, np.arange(4)).T.tolist() == [list(ends) for _, ends in DRAWN]
    assert walk(pairs, np.array([2, 0])).T.tolist() == [list(DRAWN[2][1]), list(DRAWN[0][1])]


@pytest.mark.parametrize("drawing, _", [DRAWN[0], DRAWN[2], DRAWN[3]])
def test_a_span_is_drawn_as_released(drawing, _):
    """start ~ U{0 .. L-1}, end ~ U{start+1 .. L}, the end again where that is the whole walk."""
    pairs, n = by_hand([drawing]), 4000
    first, asked, frame, last = walk(pairs, np.array([0]))[:, 0]
    L = asked - first + last - frame
    columns = drawn(pairs, np.zeros(n, int), np.random.default_rng(0)).numpy()
    assert (columns[:, :4] == (first, asked, frame, last)).all()
    spans = Counter()
    for of_question, to_question, of_answer, to_answer in columns[:, 4:].tolist():
        assert first <= of_question <= to_question <= asked
        assert frame <= of_answer <= to_answer <= last
        spans[of_question - first + of_answer - frame, to_question - first + to_answer - frame] += 1
    expected = {(s, e): 1 / L / (L - s - (s == 0)) for s in range(L) for e in range(s + 1, L + 1)
                if (s, e) != (0, L)}  # fmt: skip
    assert spans.keys() == expected.keys() and sum(expected.values()) == pytest.approx(1)
    for span, p in expected.items():
        assert abs(spans[span] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n)


def test_three_states_are_drawn_as_printed():
    """r < s < t, every choice of three as likely as any other, the separator's state among them."""
    pairs, n = by_hand(["q q q | a a .", "q | a ."], objective="tube_printed"), 3000
    columns = drawn(pairs, np.zeros(n, int), np.random.default_rng(0))
    counts = Counter(map(tuple, columns.tolist()))
    assert len(counts) == math.comb(6, 3) and max(max(c) for c in counts) == 5  # never the end mark
    assert all(r < s < t for r, s, t in counts)
    assert all(abs(count / n - 1 / 20) < 4.5 * math.sqrt(19) / 20 / n**0.5
               for count in counts.values())  # fmt: skip
    both = drawn(pairs, np.array([0, 1]), np.random.default_rng(0))  # padding is never chosen
    assert both[1].tolist() == [0, 1, 2]


def test_two_views_are_the_question_and_the_answer():
    pairs = by_hand([drawing for drawing, _ in DRAWN], objective="tube_two_views")
    columns = drawn(pairs, np.arange(4), np.random.default_rng(0))
    assert columns.tolist() == [list(ends) for _, ends in DRAWN]


def test_draws_depend_on_seed_step_and_micro_batch_alone():
    pairs = by_hand(["q q q q q q | a a a a a ."] * 64)
    pairs.config = replace(pairs.config, gradient_accumulation_steps=2)

    def given(step, micro, **changed):
        some = replace(pairs, config=replace(pairs.config, **changed))
        t = train.Training(some, None, None, None, None, None, Processes())
        return train.plan(t, step, micro).batch.given

    assert torch.equal(given(3, 1), given(3, 1))
    assert torch.equal(given(3, 1), given(3, 1, jepa_loss="infonce", dropout=0.5))
    for other in (given(4, 1), given(3, 0), given(3, 1, seed=7)):
        assert not torch.equal(given(3, 1), other)
    # and are no function of which examples jepa_dropout leaves out
    halved = dict(jepa_dropout=0.5, jepa_dropout_per="example")
    assert torch.equal(given(3, 1), given(3, 1, **halved))
    some = replace(pairs, config=replace(pairs.config, **halved))
    kept = np.concatenate([some.with_jepa(np.arange(64), step, 0) for step in range(40)])
    start = torch.cat([given(step, 0)[:, 4] for step in range(40)]).numpy()
    assert abs(start[kept].mean() - start[~kept].mean()) < 0.3  # of 0 to 5


# --- what it makes of the states --------------------------------------------------------------


def steps_of(ends):
    """The steps of a walk, one by one: (column before, column)."""
    first, asked, frame, last = ends
    return [(i - 1, i) for i in (*range(first + 1, asked + 1), *range(frame + 1, last + 1))]


def plain_views(hidden, columns, form, ends):
    """patch and rest of one example out of its hidden states (T, C), step by step."""
    def total(steps):
        return sum((hidden[i] - hidden[j] for j, i in steps), torch.zeros_like(hidden[0]))

    first, asked, frame, _ = ends
    if form == "tube_two_views":
        question = [(j, i) for j, i in steps_of(ends) if i <= asked]
        return total(question), total(steps_of(ends)[len(question) :])
    if form == "tube_printed":
        r, s, t = columns
        return total([(i - 1, i) for i in range(r + 1, s + 1)]), hidden[t] - hidden[s]
    start, end = (columns[4 + i] - first + columns[6 + i] - frame for i in (0, 1))
    steps = steps_of(ends)
    return total(steps[start:end]), total(steps[:start] + steps[end:])


@pytest.mark.parametrize("form", FORMS)
def test_the_views_are_sums_of_single_steps(form):
    """An independent computation of the released loss, on the same states and draws: spans within
    the question, within the answer and over the question's end among them; and its gradient."""
    pairs = by_hand(["q q q | a a .", "s s q q q q | | a a a .", "q | a a a ."] * 40,
                    objective=form)  # fmt: skip
    examples = np.arange(120)
    batch = pairs.pack(examples, (TEXT, CODE))
    batch = batch._replace(given=drawn(pairs, examples, np.random.default_rng(0)))
    hidden = torch.randn(*batch.idx.shape, 32).double().requires_grad_()
    patch, rest = OBJECTIVES[form].views(hidden, batch, pairs.config)
    ends, kinds = walk(pairs, examples).T.tolist(), Counter()
    wanted = [plain_views(hidden[e], batch.given[e].tolist(), form, ends[e]) for e in examples]
    if form == "tube":
        for of_question, to_question, of_answer, to_answer in batch.given[:, 4:].tolist():
            kinds[to_question > of_question, to_answer > of_answer] += 1
        assert min(kinds[True, True], kinds[True, False], kinds[False, True]) > 10
    for got, want in zip((patch, rest), map(torch.stack, zip(*wanted))):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    usable = np.array([first < asked for first, asked, _, _ in ends])  # two views, then
    at = torch.from_numpy(np.flatnonzero(usable))
    loss = distance(patch[at], rest[at], "cosine")
    plain = 1 - sum(F.cosine_similarity(p, r, dim=0) for p, r in (wanted[i] for i in at)) / len(at)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    [got], [want] = (torch.autograd.grad(each, hidden, retain_graph=True) for each in (loss, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    read = OBJECTIVES[form].reads(batch, pairs.config)
    assert (got[~read] == 0).all()  # what it did not ask for it does not use
    assert read.sum(1).max() <= {"tube": 6, "tube_printed": 3, "tube_two_views": 4}[form]


def test_a_released_span_over_the_questions_end_by_hand():
    """States 0, 1, 2, 10, 20, 40 of q q q | a a: the steps are 1, 1 and 10, 20; | is left out."""
    pairs = by_hand(["q q q | a a ."])
    batch = pairs.pack(np.array([0]), (TEXT, CODE))
    hidden = torch.tensor([0.0, 1, 2, 10, 20, 40, 99])[None, :, None]
    possible = drawn(pairs, np.zeros(500, int), np.random.default_rng(0))[:, 4:].tolist()
    for start, end, patch, rest in ((1, 3, 11, 21), (0, 2, 2, 30), (2, 4, 30, 2), (2, 3, 10, 22),
                                    (1, 2, 1, 31), (0, 3, 12, 20)):  # fmt: skip
        ends = [0, 2, 3, 5]
        inside = [min(start, 2), min(end, 2), 3 + max(start - 2, 0), 3 + max(end - 2, 0)]
        given = torch.tensor([[*ends, *inside]])
        views = OBJECTIVES["tube"].views(hidden, batch._replace(given=given), pairs.config)
        assert [view.item() for view in views] == [patch, rest]
        assert inside in possible


# --- walks that are too short -----------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([row[key] for row in sums(50) for key in row], 320)


def pairs_of(bpe, rows, **options):
    sizes = dict(block_size=128, batch_size=len(rows), n_layer=2, n_head=2, n_embd=32)
    return tokenize(rows, bpe, Config(**{**sizes, **TUBE, "grad_clip": 0.0, **options}))[0]


def rows_by_length(bpe):
    rows = [{"text": t, "code": c} for t, c in (("Z", "Y"), ("Z", "YX"), ("ZY", "X"), ("ZYX", "Q"))]
    assert [len(ids) for row in rows for ids in bpe.encode([row["text"], row["code"]])] == [
        1, 1, 1, 2, 2, 1, 3, 1]  # fmt: skip
    return rows


def test_a_walk_of_one_step_carries_no_term_and_one_of_two_steps_does(bpe):
    rows = rows_by_length(bpe)
    carries = {"tube": [0, 1, 1, 1], "tube_printed": [0, 1, 1, 1], "tube_two_views": [0, 0, 1, 1]}
    for form, expected in carries.items():
        pairs = pairs_of(bpe, rows, objective=form)
        assert pairs.with_jepa(np.arange(4), 0, 0).tolist() == list(map(bool, expected))
        # with a token before the question, that one has a step more
        framed = pairs_of(bpe, [{**row, "system": "Z"} for row in rows], objective=form)
        assert framed.with_jepa(np.arange(4), 0, 0).all()
    assert pairs_of(bpe, rows, objective="pair").with_jepa(np.arange(4), 0, 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_with_short_walks_is_finite_and_takes_the_mean_of_the_others(bpe, form):
    pairs = pairs_of(bpe, rows_by_length(bpe), objective=form)
    torch.manual_seed(0)
    model = make_model(pairs.config, pairs.vocab_size)
    t = training(model, pairs, Gradients(model))
    total = train.train_step(t, 0)
    batch, examples = train.plan(t, 0, 0).batch, pairs.batch(0)
    hidden = model.everywhere(batch.idx, batch.block)
    losses = []
    for i, ends in enumerate(walk(pairs, examples).T.tolist()):
        if pairs.has_target(examples)[i]:
            patch, rest = plain_views(hidden[i], batch.given[i].tolist(), form, ends)
            losses.append(1 - F.cosine_similarity(patch, rest, dim=0).item())
    assert len(losses) == (2 if form == "tube_two_views" else 3)
    assert total["jepa"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert math.isfinite(total["grad_norm"])


# --- the step ---------------------------------------------------------------------------------


def mixed(n=9):
    return [{**as_pair(row), "system": "Add." * (i % 2)} for i, row in enumerate(sums(n))]


def a_step(pairs, step=0):
    """Terms and gradients of a step, with a model of one kind for all."""
    torch.manual_seed(0)
    model = make_model(pairs.config, pairs.vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.dim() == 2 else 1)
    gradients = Gradients(model)
    t = training(model, pairs, gradients)
    return train.train_step(t, step), gradients.seen, t


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [
    {}, dict(jepa_loss="infonce"), dict(jepa_loss="mse", spread="vicreg", spread_weight=0.5),
    dict(jepa_loss="l2", spread="cross", spread_weight=0.5), dict(labels="all"),
    dict(objective="tube_printed"), dict(objective="tube_two_views", jepa_loss="infonce"),
])  # fmt: skip
def test_a_padded_batch_equals_rows_alone_in_loss_and_gradients(bpe, options):
    """The reference runs each row by itself, as an ordinary language model, and sums steps."""
    pairs = pairs_of(bpe, mixed(), **{"objective": "tube", "ce_weight": 0.5, **options})
    config, form = pairs.config, pairs.config.objective
    total, got, t = a_step(pairs)
    model, given, examples = t.model, train.plan(t, 0, 0).batch.given, pairs.batch(0)
    assert (train.plan(t, 0, 0).batch.block == 0).any()  # there is padding
    views, ce, n_labels = [], 0.0, 0
    for example, columns, ends in zip(examples, given.tolist(), walk(pairs, examples).T.tolist()):
        text, code = pairs.view(example, TEXT), pairs.view(example, CODE)
        idx = torch.tensor([text + code])
        [hidden] = model.everywhere(idx, torch.ones_like(idx))
        first = 1 if config.labels == "all" else len(text)
        logits = model.logits(hidden[first - 1 : -1])
        ce = ce + F.cross_entropy(logits, idx[0, first:], reduction="sum")
        n_labels += len(logits)
        views.append(plain_views(hidden, columns, form, ends))
    patch, rest = map(torch.stack, zip(*views))
    groups = pairs.groups(examples)
    loss = 0.5 * ce / n_labels + 2.0 * distance(patch, rest, config.jepa_loss, groups)
    if config.spread != "none":
        loss = loss + 0.5 * spread(patch, rest, config.spread, groups)
    loss.backward()
    assert total["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_close(got, {name: p.grad for name, p in model.named_parameters()})
    without, gradients, _ = a_step(replace(pairs, config=replace(config, jepa_weight=0.0)))
    assert "jepa" not in without
    assert any((gradients[n] - got[n]).norm() > 0.05 * got[n].norm() for n in got)


def test_the_gradient_runs_through_patch_and_rest(bpe):
    pairs = pairs_of(bpe, mixed(), objective="tube")
    _, _, t = a_step(pairs)
    batch = train.plan(t, 0, 0).batch
    for stopped in (0, 1):
        hidden = t.model.everywhere(batch.idx, batch.block).detach().requires_grad_()
        views = list(OBJECTIVES["tube"].views(hidden, batch, pairs.config))
        views[stopped] = views[stopped].detach()
        distance(*views, "cosine").backward()
        assert hidden.grad.abs().sum() > 0


def test_two_micro_batches_are_one_large_batch(bpe, monkeypatch):
    """With draws that go by the example alone, and one walk that carries no term."""
    def given(pairs, examples, rng):
        return torch.cat([drawn(pairs, np.array([e]), np.random.default_rng(e)) for e in examples])

    monkeypatch.setitem(OBJECTIVES, "tube", OBJECTIVES["tube"]._replace(given=given))
    monkeypatch.setattr(Pairs, "batch", lambda self, step: (
        np.arange(self.config.batch_size) + step * self.config.batch_size))  # fmt: skip
    rows = [*mixed(7), *rows_by_length(bpe)[:1]]
    once = pairs_of(bpe, rows, objective="tube")
    twice = replace(once, config=replace(once.config, batch_size=4, gradient_accumulation_steps=2))
    (one, of_one, _), (two, of_two, _) = a_step(once), a_step(twice)
    assert one["jepa"] > 0 and two["jepa"] == pytest.approx(one["jepa"], rel=1e-5)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert_close(of_two, of_one)


def test_a_step_costs_at_most_three_percent_more_operations(tiny_run):
    """Counted as training counts them, at the sizes of gsm8k_nano and of nlrx_jepa, with labels on
    the answer alone; where every token is a label, all its states are there anyway."""
    for recipe in ("gsm8k_nano", "nlrx_jepa"):
        flops = {}
        for labels in ("answer", "all"):
            for weight in (0, 0.02):
                config = load_config([
                    recipe, f"--labels={labels}", "--n_pred=0", "--dataset=word_problems",
                    "--tokenizer=bpe", "--bpe_vocab_size=320", "--data_dir=",
                    f"--objective={'tube' if weight else 'pair'}", f"--jepa_weight={weight}",
                ])  # fmt: skip
                loaded = data.load_data(config)
                model = make_model(config, loaded.tokenizer.vocab_size)
                t = train.Training(loaded.pairs["train"], model, model, None, None, None,
                                   Processes())  # fmt: skip
                micro_batches = [train.plan(t, step, 0) for step in range(3)]
                flops[labels, weight] = train.cost(model, config, micro_batches)["flops"]
            most = 1.03 if labels == "answer" else 1.001
            assert 0.9 < flops[labels, 0.02] / flops[labels, 0] < most


# --- the commands -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_it_trains_is_measured_and_answers(form, tiny_run, capsys):
    options = dict(objective=form, n_pred=0, spread="none", spread_weight=0, eval_answers=4)
    tiny_run(**options)
    of_tube = read_records(train.Path("out/tiny/metrics.jsonl"))
    assert all(0 < r["jepa"] < 2 for r in of_tube if "lr" in r)
    tiny_run(**options, jepa_weight=0)  # the panel is there without the term as well
    plain = read_records(train.Path("out/tiny/metrics.jsonl"))
    for records in (of_tube, plain):
        panels = [r for r in records if "val_ce" in r]
        assert len(panels) == 2 and all(math.isfinite(v) for r in panels for v in r.values())
        assert all(-1 <= r["val_matched"] <= 1 for r in panels)
    assert not any("jepa" in r for r in plain)
    sample.main(["out/tiny", "--num_samples=1", "--max_new_tokens=4"])
    assert "--- right answer" in capsys.readouterr().out
    evaluate.main(["out/tiny", "--split=val", "--n=4", "--samples=1", "--judge=3"])
    said = capsys.readouterr().out
    assert "judge=0 for it" in said and "exact" in said


def test_an_evaluation_draws_the_same_positions_every_time(bpe):
    pairs = pairs_of(bpe, mixed(20), objective="tube", eval_pairs=20)
    _, _, t = a_step(pairs)
    found = [embed_pairs(t.model, pairs, 20, contextlib.nullcontext) for _ in range(2)]
    layers = embed_layers(t.model, pairs, contextlib.nullcontext)[1]
    for view, again, layer in zip(found[0][1:], found[1][1:], (layers[-1, 2], layers[-1, 1])):
        assert view.shape == (20, 32) and torch.equal(view, again)
        torch.testing.assert_close(view, layer, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("option", ["n_pred=1", "layout=plan", "views=steps", "pooling=mean",
                                    "stop_grad=True", "ema=0.9"])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_what_makes_no_sense_with_it_is_refused(form, option, capsys):
    given = [f"--objective={form}", "--n_pred=0", f"--{option}"]
    line = error_line(capsys, load_config, given)
    key, _ = option.split("=")
    assert option in line and f"objective={form} reads" in line and f"goes with {key}=" in line


def test_it_cannot_search():
    with pytest.raises(ValueError, match=r"does not predict Enc\(answer\), so it cannot search"):
        rows_of(Config(objective="tube"))
