"""Claims about train.py, most of them by running train.main on a tiny model (see conftest)."""

import contextlib
import hashlib
import json
import math
import re
import signal
from collections import deque
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Gradients, error_line, patch_in_kernels_of_a_gpu, sums, training
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from config import Config, load_config, read_recipe
from generate import generate
from model import GPT, block_ends, read_hidden
from plumbing.files import read_checkpoint
from plumbing.plots import plot_losses
from plumbing.processes import ROOT, compile_or_not
from run import FORMAT, Progress, load_run, make_model, tokenizer_of
from views import CODE, PRED, TARGET, TEXT

CPU = torch.device("cpu")
LANGUAGE_MODEL = (TEXT, CODE)
NO_SPREAD = dict(spread="none", spread_weight=0)
COLLAPSES = dict(jepa_weight=20, learning_rate=3e-3, max_iters=18, **NO_SPREAD)


def checkpoint(folder="out/tiny", name="ckpt.pt"):
    return read_checkpoint(Path(folder) / name, FORMAT)


def records(folder="out/tiny"):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    """Equal bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def setup(**options):
    """Config, training pairs and a fresh model, as train.main would make them (needs tiny_run)."""
    config = load_config(TINY + [f"--{key}={value}" for key, value in options.items()])
    loaded = data.load_data(config)
    torch.manual_seed(config.seed)
    return config, loaded.pairs["train"], make_model(config, loaded.tokenizer.vocab_size)


def step_gradients(model, pairs):
    """Gradients, not clipped, and loss terms of step 0, without an update."""
    gradients = Gradients(model)
    pairs = replace(pairs, config=replace(pairs.config, grad_clip=0.0))
    total = train.train_step(training(model, pairs, gradients), 0)
    return gradients.seen, {key: total[key] for key in ("ce", "jepa", "spread", "loss")}


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)


def far_apart(got, want):
    """Some gradient differs by more than a tenth of its size."""
    return any((got[n] - want[n]).norm() > 0.1 * want[n].norm() for n in want)


# --- the baseline -----------------------------------------------------------------------------


def test_zero_weight_is_the_plain_language_model(tiny_run):
    """Bit for bit, with dropout and two micro-batches: a plain loop that knows nothing of JEPA."""
    options = dict(jepa_weight=0, dropout=0.1, gradient_accumulation_steps=2)
    tiny_run(**options)
    config, pairs, model = setup(**options)
    optimizer = train.make_optimizer(model, config)
    model.train()
    for step in range(config.max_iters):
        batches = [pairs.pack(pairs.batch(2 * step + i), LANGUAGE_MODEL) for i in range(2)]
        n_labels = sum((batch.targets != -1).sum().item() for batch in batches)
        for batch in batches:  # what is read beside the labels has dropout, so draws random numbers
            (model(batch, block_ends(batch.block))[1] / n_labels).backward()
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, config)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    assert same(checkpoint()["model"], dict(model.state_dict()))


def test_zero_weight_ignores_every_other_jepa_setting(tiny_run):
    tiny_run(jepa_weight=0, max_iters=3, **NO_SPREAD)
    plain = checkpoint()["model"]
    for options in (
        dict(jepa_loss="infonce", spread="vicreg", spread_weight=0.5),
        dict(jepa_dropout=0.5, stop_grad=True, jepa_warmup_iters=2),
        dict(ema=0.9, spread="cross"),
    ):
        tiny_run(jepa_weight=0, max_iters=3, **options)
        assert same(checkpoint()["model"], plain)


def test_zero_weight_does_not_depend_on_n_pred(tiny_run):
    """Without clipping: the sum behind the gradient's norm is grouped by the number of tensors."""
    weights = []
    for k in (0, 1, 3):
        tiny_run(jepa_weight=0, max_iters=3, n_pred=k, grad_clip=0)
        weights.append(checkpoint()["model"])
        weights[-1].pop("pred.weight", None)
    assert same(weights[1], weights[0]) and same(weights[2], weights[0])


# --- the optimizer and its schedule -----------------------------------------------------------


def test_every_parameter_is_optimized_exactly_once(tiny_run):
    config, _, model = setup(bias=True, weight_decay=0.3)
    groups = train.make_optimizer(model, config).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups)
    assert decay == {id(p): 0.3 if p.dim() == 2 else 0.0 for p in model.parameters()}
    assert id(model.pred.weight) in decay and id(model.lm_head.weight) in decay


def test_a_jepa_run_moves_every_parameter(tiny_run):
    _, _, model = setup(bias=True)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    tiny_run(bias=True, max_iters=2)
    after = checkpoint()["model"]
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_learning_rate_warms_up_peaks_and_ends_at_min_lr():
    config = Config(max_iters=100, warmup_iters=10, learning_rate=0.01, min_lr=0.001)
    rates = [train.learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.001 * (i + 1) for i in range(10)])
    assert rates[10] == max(rates) == pytest.approx(0.01)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx((0.01 + 0.001) / 2)  # half-way down the cosine
    assert rates[100] == pytest.approx(0.001)
    config = replace(config, warmup_iters=2, lr_decay_iters=50)
    assert train.learning_rate(50, config) == train.learning_rate(99, config) == 0.001


# --- the step ---------------------------------------------------------------------------------


def test_two_micro_batches_are_one_large_batch(tiny_run, monkeypatch):
    """Both losses alike, with unequal numbers of labels: a mean of means would be off."""
    monkeypatch.setattr(
        data.Pairs, "batch",
        lambda self, step: np.arange(self.config.batch_size) + step * self.config.batch_size,
    )  # fmt: skip
    options = dict(jepa_weight=2, **NO_SPREAD)  # which compares the examples of a micro-batch
    _, halves, model = setup(batch_size=8, gradient_accumulation_steps=2, **options)
    halves.lengths[:8, 1:] = 2  # cut half of the answers short
    labels = halves.lengths[:16, 1].reshape(2, 8).sum(1)
    assert labels[1] > 2 * labels[0]
    twice, terms_twice = step_gradients(model, halves)
    _, whole, model = setup(batch_size=16, **options)
    whole.lengths[:8, 1:] = 2
    once, terms_once = step_gradients(model, whole)
    assert terms_once["jepa"] > 0.1
    assert terms_twice == pytest.approx(terms_once, rel=1e-5)
    assert_close(twice, once)


@pytest.mark.parametrize("stop_grad", [False, True])
def test_step_equals_plain_passes_and_stop_grad_stops_the_target(tiny_run, stop_grad):
    """A reference with a pass per view; detaching its target is all that stop_grad may do."""
    _, pairs, model = setup(stop_grad=stop_grad, ce_weight=0.5, jepa_weight=2, **NO_SPREAD)
    got, terms = step_gradients(model, pairs)
    examples = pairs.batch(0)

    def reference(detach):
        model.zero_grad()
        lm, p, t = (pairs.pack(examples, b) for b in (LANGUAGE_MODEL, (TEXT, PRED), (TARGET,)))
        logits = model.logits(model.everywhere(lm.idx, lm.block))
        ce = F.cross_entropy(logits.flatten(0, 1), lm.targets.flatten(), ignore_index=-1)
        pred = read_hidden(model.everywhere(p.idx, p.block), p.block, PRED)
        target = read_hidden(model.everywhere(t.idx, t.block), t.block, TARGET)
        jepa = (1 - F.cosine_similarity(pred, target.detach() if detach else target)).mean()
        loss = 0.5 * ce + 2 * jepa
        loss.backward()
        assert terms == pytest.approx(
            {"ce": ce.item(), "jepa": jepa.item(), "spread": 0, "loss": loss.item()}, rel=1e-5)
        return {n: w.grad.clone() for n, w in model.named_parameters()}

    assert_close(got, reference(detach=stop_grad))
    assert far_apart(got, reference(detach=not stop_grad))


def test_the_spread_term_is_weighted_and_spreads(tiny_run):
    _, pairs, model = setup(spread="cross", spread_weight=3, jepa_weight=2, ce_weight=0.5)
    gradients, terms = step_gradients(model, pairs)
    assert terms["spread"] > 0
    expected = 0.5 * terms["ce"] + 2 * terms["jepa"] + 3 * terms["spread"]
    assert terms["loss"] == pytest.approx(expected, rel=1e-5)
    _, pairs, model = setup(jepa_weight=2, ce_weight=0.5, **NO_SPREAD)
    assert far_apart(gradients, step_gradients(model, pairs)[0])


def skipped_steps(pairs, n):
    """Which of the first n steps skip the JEPA term, as a whole and in every micro-batch."""
    examples = np.arange(3)
    has_jepa = np.array(
        [[pairs.with_jepa(examples, step, micro) for micro in (0, 1)] for step in range(n)])
    assert (has_jepa == has_jepa[:, :1, :1]).all()
    return (~has_jepa[:, 0, 0]).tolist()


def test_jepa_dropout_skips_the_share_it_says(tiny_run):
    n, (_, pairs, _) = 1000, setup(jepa_dropout=0.3)
    skipped = skipped_steps(pairs, n)
    assert abs(sum(skipped) / n - 0.3) < 0.058  # four standard deviations
    assert skipped == skipped_steps(pairs, n)
    other, never = (replace(pairs, config=replace(pairs.config, **change))
                    for change in (dict(seed=2), dict(jepa_dropout=0.0)))  # fmt: skip
    assert skipped != skipped_steps(other, n)
    assert not any(skipped_steps(never, n))


def test_a_skipped_step_runs_without_pred_and_target(tiny_run, monkeypatch):
    seen, real = [], GPT.forward

    def forward(self, batch, *rest):
        if self.training:
            seen.append(set(batch.block.unique().tolist()) - {0})
        return real(self, batch, *rest)

    monkeypatch.setattr(GPT, "forward", forward)
    options = dict(jepa_dropout=0.5, max_iters=10, eval_interval=10)
    said = tiny_run(**options)
    _, pairs, _ = setup(**options)
    skipped = skipped_steps(pairs, 10)
    assert 0 < sum(skipped) < 10
    assert seen == [{TEXT, CODE} if skip else {TEXT, CODE, PRED, TARGET} for skip in skipped]
    # ... and says so in the log: no value, since 0 would be a perfect one
    steps = [r for r in records() if "lr" in r]
    assert [("jepa" not in r, "spread" not in r) for r in steps] == [(s, s) for s in skipped]
    assert [line.split(" | ")[3] == "jepa -" for line in progress_lines(said)] == skipped


def test_the_baseline_logs_no_jepa_value(tiny_run):
    said = tiny_run(jepa_weight=0)
    steps = [r for r in records() if "lr" in r]
    assert len(steps) == 6 and all(r.keys().isdisjoint({"jepa", "spread"}) for r in steps)
    assert all(" | jepa - | " in line for line in progress_lines(said))


# --- shared answers ---------------------------------------------------------------------------


def reviews(n, first=0):
    """n rows with two answers, which a word of each decides."""
    words = {"Bad": ("slow", "loud", "stale", "dull"), "Good": ("bright", "warm", "fresh", "calm")}
    rows = []
    for i in range(first, first + n):
        code = ("Bad", "Good")[i * 5 // 3 % 2]
        rows.append({"text": f"visit {i}: it was {words[code][i % 4]}", "code": code})
    return rows


@pytest.fixture
def review_run(tiny_run, monkeypatch):
    """As tiny_run, on 200 reviews."""
    rows = {"train": reviews(200), "val": reviews(40, 500)}
    monkeypatch.setattr(data, "load_rows", lambda config: (dict(rows), "reviews", "test"))
    return tiny_run


@pytest.mark.parametrize("options", [
    dict(jepa_loss="infonce", **NO_SPREAD), dict(spread="cross"),
    dict(jepa_loss="infonce", stop_grad=True, **NO_SPREAD),
    dict(spread="cross", jepa_dropout=0.5, jepa_dropout_per="example"),
    dict(jepa_loss="infonce", layout="isolated", **NO_SPREAD),
])  # fmt: skip
def test_a_step_takes_no_equal_answer_for_a_wrong_one(review_run, options):
    """The terms of the step, from its embeddings and its answers, by a plain loop."""
    _, pairs, model = setup(**options, dropout=0)
    t = training(model, pairs)
    micro = train.plan(t, 0, 0)
    examples = pairs.batch(0)[micro.has_jepa]
    answers = [pairs.view(example, CODE) for example in examples]
    assert len({tuple(answer) for answer in answers}) == 2 < len(answers)
    batch = micro.batch
    read = train.OBJECTIVES["pair"].reads(batch, pairs.config)
    pred, target = train.pred_and_target(t, micro, model(batch, read)[0], batch)
    cosine = F.cosine_similarity(pred[:, None], target[None], dim=-1).tolist()
    squares, terms = [], []
    for i, answer in enumerate(answers):
        others = [cosine[i][j] for j, other in enumerate(answers) if other != answer]
        among = [math.exp(c / 0.07) for c in [cosine[i][i], *others]]
        squares += [c * c for c in others]
        terms.append(-math.log(among[0] / sum(among)))
    total = step_gradients(model, pairs)[1]
    if "infonce" in options.values():
        assert total["jepa"] == pytest.approx(sum(terms) / len(terms), rel=1e-3)
    else:
        assert total["spread"] == pytest.approx(sum(squares) / len(squares), rel=1e-3)


def test_without_shared_answers_training_is_what_it_was(tiny_run, monkeypatch):
    """To the bit: beside the losses without groups."""
    options = dict(dropout=0.1, jepa_dropout=0.5, gradient_accumulation_steps=2, batch_size=4)
    for i, kind in enumerate((dict(spread="cross"), dict(jepa_loss="infonce", **NO_SPREAD))):
        with monkeypatch.context() as patch:  # every answer its own
            rows = {"train": sums(40), "val": sums(20, 500)}
            for n, row in enumerate(rows["train"]):
                row["answer"] += f" {n}"
            patch.setattr(data, "load_rows", lambda config, rows=rows: (dict(rows), "sums", "test"))
            tiny_run(**options, **kind, out_dir=f"out/with-{i}")
            for name in ("distance", "spread"):
                real = getattr(train, name)
                patch.setattr(train, name, lambda *args, real=real: real(*args[:3]))
            tiny_run(**options, **kind, out_dir=f"out/without-{i}")
        ended = [checkpoint(f"out/{name}-{i}")["model"] for name in ("with", "without")]
        assert same(*ended)


def test_a_run_that_tells_two_answers_apart_is_aligned_and_not_collapsed(review_run):
    said = review_run(max_iters=240, eval_interval=80, learning_rate=1e-2, batch_size=16, n_layer=1,
                      eval_pairs=40, eval_answers=40)  # fmt: skip
    last = records()[-1]
    assert last["val_exact"] == 1 and last["val_retrieval_at_1"] > 0.9
    assert last["val_matched"] > 0.8 and last["val_mismatched"] < 0.4
    assert (last["val_chance"], last["val_shared"]) == (1 / 2, 40)
    assert "COLLAPSE" not in said and "the pairs' embeddings are aligned" in said
    assert said.count("of 40 (chance 0.500, 40 share their answer)") == 3


def test_a_run_on_one_answer_alone_is_told_so_and_goes_to_its_end(review_run, monkeypatch):
    rows = [{**row, "code": "Good"} for row in reviews(60)]
    monkeypatch.setattr(data, "load_rows", lambda config: (
        {"train": rows[:40], "val": rows[40:]}, "reviews", "test"))  # fmt: skip
    for options in ({}, dict(jepa_loss="infonce", **NO_SPREAD)):
        said = review_run(**options)
        assert "the pairs' embeddings are of one answer only" in said and "COLLAPSE" not in said
        steps = [r for r in records() if "lr" in r]
        assert len(steps) == 6 and all(math.isfinite(v) for r in steps for v in r.values())
        assert all(r["jepa" if options else "spread"] == 0 for r in steps)


# --- stop, resume, save -----------------------------------------------------------------------


@pytest.mark.parametrize("number, code, at", [(signal.SIGTERM, 143, 4), (signal.SIGINT, 130, 2)])
def test_resumed_equals_uninterrupted(tiny_run, monkeypatch, capsys, number, code, at):
    """Bit for bit with every random stream in play. Six steps are an epoch: the SIGTERM comes
    in the middle of one, the SIGINT just before an evaluation."""
    options = dict(
        dropout=0.1, gradient_accumulation_steps=2, jepa_dropout=0.5, spread="sigreg",
        spread_weight=0.1, ema=0.9, max_iters=8, eval_interval=3,
    )  # fmt: skip
    tiny_run(**options, out_dir="out/whole")

    real = train.learning_rate  # called once a step

    def learning_rate(step, config):
        if step == at:
            signal.raise_signal(number)
        return real(step, config)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    with pytest.raises(SystemExit) as stopped:
        tiny_run(**options)
    assert stopped.value.code == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (f"{number.name}: saved out/tiny/ckpt.pt at step {at + 1}; to go on: python "
                    "train.py --out_dir=out/tiny --init_from=resume")
    assert checkpoint()["step"] == at + 1  # it finished its step
    assert max(r["step"] for r in records() if "lr" in r) == at
    monkeypatch.setattr(train, "learning_rate", real)
    tiny_run(**options, init_from="resume")

    whole, resumed = checkpoint("out/whole"), checkpoint()
    for part in ("model", "ema", "optimizer", "step", "rng"):
        assert same(whole[part], resumed[part]), part
    assert timeless(whole["progress"]) == timeless(resumed["progress"])
    assert same(checkpoint("out/whole", "best.pt")["model"], checkpoint(name="best.pt")["model"])
    logged = [timeless(r) for r in records("out/tiny")]
    assert logged == [timeless(r) for r in records("out/whole")]
    assert any("spread" in r for r in logged)  # the JEPA term was there


def timeless(record):
    return {key: value for key, value in record.items() if key != "seconds"}


@pytest.mark.parametrize("options", [
    {}, {"jepa_weight": 0}, {"stop_grad": True}, {"pooling": "mean"}, {"bias": True, "n_pred": 0},
    {"gradient_accumulation_steps": 3, "labels": "all"}, {"layout": "plan", "n_pred": 2},
    {"jepa_dropout": 0.5, "jepa_dropout_per": "example", "n_layer": 1},
    {"objective": "tube", "n_pred": 0}, {"objective": "tube_printed", "n_pred": 0},
])  # fmt: skip
def test_the_operations_of_a_step_are_those_that_torch_counts(options, tiny_run):
    """Without the (B, B) products of a spread term, which are nothing beside the model's."""
    _, pairs, model = setup(**options, **NO_SPREAD)
    with FlopCounterMode(display=False) as counter:
        total = train.train_step(training(model, pairs), 1)
    assert total["flops"] == counter.get_total_flops() > 0


def test_operations_add_up_over_a_run(tiny_run):
    tiny_run()
    flops = [r["flops"] for r in records()]
    assert flops == sorted(flops) and flops[-1] > 3 * flops[0] > 0
    assert checkpoint()["progress"]["flops"] == flops[-1]


def test_a_non_finite_loss_stops_before_the_update(tiny_run, monkeypatch, capsys):
    """The loss alone: its gradient is what it would have been."""
    real_step, real_distance, before = train.train_step, train.distance, []

    def train_step(t, step):
        if step == 5:
            before.append((Path("out/tiny/ckpt.pt").read_bytes(), t.model,
                           {n: w.clone() for n, w in t.model.state_dict().items()}))
        return real_step(t, step)

    def distance(*args):
        return real_distance(*args) + (math.nan if before else 0)

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(train, "distance", distance)
    with pytest.raises(SystemExit) as stopped:
        tiny_run(max_iters=9)
    assert stopped.value.code not in (0, None)
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(r"loss nan with gradient norm \d.* at step 5", line)
    [(saved, model, weights)] = before
    assert Path("out/tiny/ckpt.pt").read_bytes() == saved
    assert checkpoint()["step"] == 3  # the last evaluation
    assert same(weights, dict(model.state_dict()))


def test_a_non_finite_gradient_is_noticed_though_the_loss_is_finite(tiny_run, monkeypatch, capsys):
    real, models = train.train_step, []

    def train_step(t, step):
        t.model.ln_f.weight.register_hook(lambda gradient: gradient * math.inf)
        models.append(t.model)
        return real(t, step)

    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(SystemExit) as stopped:
        tiny_run()
    assert stopped.value.code not in (0, None)
    assert re.search(r"loss \d\S* with gradient norm (inf|nan) at step 0", capsys.readouterr().err)
    assert len(models) == 1  # stopped at the first step, and before its update:
    assert torch.equal(models[0].ln_f.weight, torch.ones(32))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [3, 6])  # an evaluation in between, and the last thing that is done
def test_an_evaluation_that_meets_divergence_first_is_one_line_and_saves_nothing(
    tiny_run, monkeypatch, capsys, value, at
):
    real = train.train_step

    def train_step(t, step):
        total = real(t, step)
        if step == at - 1:
            with torch.no_grad():
                t.model.ln_f.weight[3] = value
        return total

    monkeypatch.setattr(train, "train_step", train_step)
    line = error_line(capsys, tiny_run)
    assert re.search(rf"validation cross-entropy nan at step {at}: .*out/tiny keeps", line)
    assert not Path("out/tiny/ckpt.pt").exists() if at == 3 else checkpoint()["step"] == 3
    assert all(math.isfinite(v) for r in records() for v in r.values())


def test_weights_that_are_no_numbers_are_not_saved(tiny_run, monkeypatch, capsys):
    """A SIGTERM comes after an update has ruined them, before the next loss could tell."""
    real = train.train_step

    def train_step(t, step):
        total = real(t, step)
        if step == 4:
            with torch.no_grad():
                t.model.ln_f.weight[0] = math.nan
            signal.raise_signal(signal.SIGTERM)
        return total

    monkeypatch.setattr(train, "train_step", train_step)
    line = error_line(capsys, tiny_run)
    assert "weights are not finite at step 5" in line and "out/tiny keeps" in line
    assert checkpoint()["step"] == 3
    assert all(w.isfinite().all() for w in checkpoint()["model"].values())


def falling_until(step_of_best, monkeypatch):
    """val_ce falls until this step of training, then rises."""
    real = train.embed_pairs

    def embed_pairs(*args):
        _, pred, target = real(*args)
        step = len([r for r in records() if "lr" in r])
        return 5 + abs(step - step_of_best) / 10, pred, target

    monkeypatch.setattr(train, "embed_pairs", embed_pairs)


def test_patience_stops_after_so_many_evaluations_without_a_better_one(tiny_run, monkeypatch):
    falling_until(4, monkeypatch)
    said = tiny_run(max_iters=20, eval_interval=2, patience=3)
    assert [r["step"] for r in records() if "val_ce" in r] == [2, 4, 6, 8, 10]
    assert ["stopped_early" in r for r in records() if "val_ce" in r] == [False] * 4 + [True]
    assert records()[-1]["stopped_early"] is True
    assert "stopped early: no better val ce in 3 evaluations since step 4, 5.0000" in said
    assert "done in" in said
    assert (checkpoint()["step"], checkpoint(name="best.pt")["step"]) == (10, 4)
    falling_until(99, monkeypatch)  # never worse: all steps
    assert "stopped early" not in tiny_run(max_iters=6, eval_interval=2, patience=1)
    falling_until(0, monkeypatch)
    assert "stopped early" not in tiny_run(max_iters=6, eval_interval=2)  # without patience
    assert not any("stopped_early" in r for r in records())


def test_patience_counts_once_what_a_resumed_run_measures_again(tiny_run, monkeypatch):
    """Stopped at an evaluation and resumed, or stopped early and resumed: nothing more to do."""
    falling_until(2, monkeypatch)
    options = dict(eval_interval=2, patience=3)
    tiny_run(max_iters=6, **options)
    tiny_run(max_iters=20, **options, init_from="resume")
    assert [r["step"] for r in records() if "val_ce" in r] == [2, 4, 6, 8]
    assert "stopped early" in tiny_run(max_iters=20, **options, init_from="resume")
    assert checkpoint()["step"] == 8
    tiny_run(max_iters=10, eval_interval=2, patience=0, init_from="resume")  # on purpose
    assert checkpoint()["step"] == 10 and not any("stopped_early" in r for r in records())


def test_the_baseline_does_not_move_the_jepa_run_away(tiny_run, capsys):
    options = [arg for arg in TINY if not arg.startswith("--out_dir")]
    Path("mine.py").write_text("jepa_weight = 0.3\n")
    for weight, moved in ((0.3, False), (0, False), (0, True)):
        capsys.readouterr()
        train.main(["mine.py", *options, f"--jepa_weight={weight}", "--max_iters=1"])
        assert ("moved the earlier run" in capsys.readouterr().out) == moved
    [jepa, baseline] = sorted(path.name for path in Path("out").glob("mine*"))
    assert baseline == "mine,jepa_weight=0" or "jepa_weight=0" in baseline != jepa
    assert (Path("out") / jepa / "ckpt.pt").exists()


def test_a_second_run_moves_the_first_aside_intact(tiny_run):
    def contents(folder):
        return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != ".lock"}

    firsts = []
    for seed in (1, 2, 3):
        tiny_run(max_iters=1, seed=seed)
        firsts.append(contents("out/tiny"))
    assert {"ckpt.pt", "best.pt", "config.json", "metrics.jsonl"} == firsts[0].keys()
    assert contents("out/earlier/tiny-1") == firsts[0]
    assert contents("out/earlier/tiny-2") == firsts[1]
    assert contents("out/tiny") == firsts[2] != firsts[1]


@pytest.mark.parametrize("left", ["ckpt-previous.pt", "best.pt"])
def test_a_checkpoint_of_any_name_is_moved_aside_and_not_written_over(tiny_run, left):
    """A kill between two renames leaves one without ckpt.pt, and so does whoever deletes that."""
    tiny_run()
    for name in {"ckpt.pt", "ckpt-previous.pt", "best.pt"} - {left}:
        Path("out/tiny", name).unlink()
    kept = Path("out/tiny", left).read_bytes()
    assert "moved the earlier run to out/earlier/tiny-1" in tiny_run(max_iters=1)
    assert Path("out/earlier/tiny-1", left).read_bytes() == kept


def test_a_folder_of_runs_is_not_taken_for_a_run(tiny_run, capsys):
    """Or else its second use would move all of them out of the way."""
    tiny_run(max_iters=1)
    line = error_line(capsys, tiny_run, out_dir="out")
    assert "out_dir=out holds other runs" in line and Path("out/tiny/ckpt.pt").exists()


# --- what a run says and writes ---------------------------------------------------------------


def progress_lines(said):
    return [line for line in said.splitlines() if re.match(r"step \d+/", line)]


def test_the_defaults_are_not_the_objective_that_collapses_and_debug_writes_that_one_out():
    assert Config().jepa_weight > 0 and Config().spread != "none" and Config().spread_weight > 0
    published = load_config(["configs/debug.py"])
    assert (published.jepa_loss, published.jepa_weight) == ("cosine", 1)
    assert (published.spread, published.spread_weight) == ("none", 0)
    assert {"jepa_loss", "jepa_weight", "spread", "spread_weight"} <= read_recipe(
        ROOT / "configs/debug.py").keys()  # whatever the defaults become


def test_a_debug_run_collapses_and_with_the_options_that_its_warning_names_not(tiny_run, capsys):
    debug = ["configs/debug.py", "--device=cpu", "--dtype=float32"]
    train.main(debug)
    said = capsys.readouterr().out
    assert said.count("warning: COLLAPSE") == 1 and "the pairs' embeddings are collapsed" in said
    [cure] = [line.split() for line in said.splitlines() if line.startswith("  --")]
    assert cure == ["--jepa_weight=0.3", "--spread=cross", "--spread_weight=0.6"]
    config = load_config(["configs/debug.py", *cure])
    assert (config.jepa_weight, config.spread, config.spread_weight) == (0.3, "cross", 0.6)
    train.main([*debug, *cure])
    said = capsys.readouterr().out
    assert "done in" in said and "COLLAPSE" not in said and "collapsed" not in said


def test_collapse_is_warned_of_exactly_once(tiny_run):
    said = tiny_run(**COLLAPSES)
    panels = [r for r in records() if "val_matched" in r]
    collapses = [r for r in panels if r["val_mismatched"] > 0.9 * r["val_matched"] > 0.45]
    assert len(collapses) > 1
    assert said.count("warning: COLLAPSE") == 1


def test_no_collapse_warning_for_the_baseline(tiny_run, monkeypatch):
    monkeypatch.setattr(train, "verdict", lambda measures: "collapsed")
    assert "warning" not in tiny_run(jepa_weight=0)
    assert tiny_run().count("warning: COLLAPSE") == 1


def test_the_last_line_says_what_came_of_the_embeddings_and_what_to_run_next(tiny_run, monkeypatch):
    last = tiny_run(max_iters=1).splitlines()[-1]
    assert "out/tiny/ckpt.pt; the pairs' embeddings are not aligned. Next: python " in last
    monkeypatch.setattr(train, "verdict", lambda measures: "partly aligned")
    last = tiny_run(max_iters=1, out_dir="elsewhere/tiny").splitlines()[-1]
    assert "the pairs' embeddings are partly aligned. " in last
    named = re.findall(r"python (\w+\.py) elsewhere/tiny", last)  # out/ is looked through anyway
    assert named == ["sample.py", "evaluate.py", "eval_alignment.py"]
    last = tiny_run(max_iters=1, out_dir="two words/tiny").splitlines()[-1]  # to be copied as it is
    assert last.count(".py 'two words/tiny'") == 3
    assert all((ROOT / name).exists() for name in named)


def test_the_last_line_of_a_baseline_passes_no_judgement_on_its_embeddings(tiny_run):
    """Nothing aligned them: that they are not is no news, and no fault."""
    last = tiny_run(max_iters=1, jepa_weight=0).splitlines()[-1]
    assert "at λ = 0 nothing aligned the pairs' embeddings" in last
    assert "not aligned" not in last and "embeddings are" not in last
    assert "python sample.py, python evaluate.py, python eval_alignment.py" in last


def test_the_progress_line_says_from_which_step_its_validation_cosines_are(tiny_run):
    lines = progress_lines(tiny_run(max_iters=9))
    assert len(lines) == 9 and all(line.startswith(f"step {i}/9") for i, line in enumerate(lines))
    assert all("cos" not in line for line in lines[:3])
    panels = {r["step"]: r for r in records() if "val_matched" in r}
    for step, line in enumerate(lines[3:], 3):
        seen = panels[step // 3 * 3]
        shown = f"{seen['val_matched']:.2f}/{seen['val_mismatched']:.2f} at step {seen['step']}"
        assert f" | val cos {shown} | " in line


def test_the_progress_line_counts_the_remaining_time_in_clock_time():
    total = dict(loss=1.0, ce=1.0)
    for seconds, shown in ((59.7, "1:00"), (119.6, "2:00"), (59.4, "0:59")):
        recent = deque([(seconds, 100)])
        line = Progress().line(total, recent, {}, Config(max_iters=2))
        assert line.endswith(f"ETA {shown}")


@pytest.mark.parametrize("jepa_weight", [1, 0])
def test_metrics_have_the_promised_fields(tiny_run, jepa_weight):
    tiny_run(jepa_weight=jepa_weight)
    steps = [r for r in records() if "lr" in r]
    evaluations = [r for r in records() if "val_ce" in r]
    assert [r["step"] for r in steps] == [0, 1, 2, 3, 4, 5]
    assert [r["step"] for r in evaluations] == [3, 6]
    wanted = {"step", "ce", "loss", "lr", "grad_norm", "tokens", "flops", "seconds"}
    if jepa_weight:
        wanted |= {"jepa", "spread"}
    assert all(wanted == r.keys() for r in steps)
    wanted = {"step", "tokens", "flops", "seconds"} | {f"val_{name}" for name in (
        "ce", "jepa", "matched", "mismatched", "retrieval_at_1", "chance", "shared", "mean_rank",
        "effective_rank", "effective_rank_pred", "effective_rank_target")}  # fmt: skip
    assert all(wanted == r.keys() for r in evaluations)  # of the baseline too
    assert all(math.isfinite(value) for r in records() for value in r.values())
    tokens = [r["tokens"] for r in steps]
    assert tokens == sorted(set(tokens)) and tokens[0] > 0


def test_a_run_writes_a_plot_a_config_and_a_checkpoint_with_provenance(tiny_run, monkeypatch):
    monkeypatch.setattr(train, "plot_losses", plot_losses)
    folder = Path("out/no $ {formula")
    tiny_run(seed=5, max_iters=2, out_dir=folder)
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    about = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    for config in (about["config"], state["config"]):
        assert config["seed"] == 5 and config["n_embd"] == 32
    assert about["provenance"] == state["provenance"]

    provenance = state["provenance"]
    model = load_run(folder, CPU).model
    assert provenance["parameters"] == sum(p.numel() for p in model.parameters()) > 0
    assert provenance["torch"] == torch.__version__
    assert provenance["commit"] and "--seed=5" in provenance["command"]
    published = "".join(json.dumps(row) + "\n" for row in sums(100))
    assert provenance["data"]["train_sha256"] == hashlib.sha256(published.encode()).hexdigest()
    assert provenance["data"]["dataset"] == "sums" and provenance["data"]["train_rows"] == 100
    assert provenance["data"]["tokenizer_sha256"] == state["tokenizer"]["sha256"]
    assert tokenizer_of(state, folder).sha256 == state["tokenizer"]["sha256"]


def test_overfits_eight_examples_and_then_answers_them(tiny_run, monkeypatch):
    """Training, checkpoint, tokenizer and generation together: it learns what it is shown."""
    rows = sums(8)
    monkeypatch.setattr(
        data, "load_rows", lambda config: ({"train": rows, "val": rows}, "sums", "test"))
    tiny_run(n_embd=64, max_iters=100, eval_interval=100, learning_rate=6e-3, warmup_iters=10)
    assert records()[-2]["ce"] < 0.05  # the last step; the last record is the evaluation
    trained = load_run(Path("out/tiny"), CPU)
    encode = trained.tokenizer.encode
    prompts = [[*ids, trained.tokenizer.sep] for ids in encode([r["question"] for r in rows])]
    answers = generate(trained.model, prompts, 50, trained.tokenizer.eot)
    assert all(answer[-1] == trained.tokenizer.eot for answer in answers)
    assert [trained.tokenizer.decode(a) for a in answers] == [r["answer"] for r in rows]


# --- compiled, as on CUDA ---------------------------------------------------------------------


def test_compiled_model_gives_the_same_gradients(tiny_run, monkeypatch, capsys):
    """Traced by dynamo in rows of two kinds and lengths; its eager backend needs no compiler."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(GPT, "compile", lambda self, **kw: real(self, backend="eager", **kw))
    _, pairs, model = setup(n_layer=1)
    want = step_gradients(model, pairs)[0]
    batch = pairs.pack(pairs.batch(0), pairs.layout.row)

    def try_once():
        model(batch, block_ends(batch.block))[1].backward()

    compile_or_not(model, contextlib.nullcontext, try_once)
    assert "compiled\n" in capsys.readouterr().out and model._compiled_call_impl is not None
    assert all(p.grad is None for p in model.parameters())
    assert_close(step_gradients(model, pairs)[0], want)
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_with_a_gpus_kernels_rows_of_any_length_share_their_graphs(tiny_run, monkeypatch):
    """One graph before each of the two places where positions are counted, and one after them."""
    patch_in_kernels_of_a_gpu(monkeypatch)
    _, pairs, model = setup(n_layer=1)
    t, graphs, shapes = training(model, pairs), [], set()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model.compile(dynamic=True, backend=backend)
    for step in range(4):
        train.train_step(t, step)
        shapes.add(train.plan(t, step, 0).batch.idx.shape)
        assert len(graphs) == 3
    assert len(shapes) > 1
