"""Claims about train.py, most of them by running train.main on a tiny model (see conftest)."""

import hashlib
import json
import math
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, error_line, sums
from torch.utils.flop_counter import FlopCounterMode

import data
import run
import train
from config import load_config
from model import GPT, read_hidden
from run import read_checkpoint
from views import CODE, PRED, TARGET, TEXT

REAL_PLOT = train.plot_losses  # tiny_run replaces it
CPU = torch.device("cpu")
LANGUAGE_MODEL = (TEXT, CODE)


def checkpoint(folder="out/tiny", name="ckpt.pt"):
    return read_checkpoint(Path(folder) / name)


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
    train_pairs = loaded.pairs["train"]
    model = GPT(config, loaded.tokenizer.vocab_size, train_pairs.layout.parents)
    return config, train_pairs, model


def step_gradients(model, pairs):
    """Gradients and loss terms of step 0, without an update."""
    model.zero_grad()
    no_autocast = run.pick_device("cpu", "float32")[1]
    total, *_ = train.forward_backward(model, pairs, 0, CPU, no_autocast)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, total


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
        n_labels = sum((rows.targets != -1).sum().item() for rows in batches)
        for rows in batches:
            (model(*rows)[1] / n_labels).backward()
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, config)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    assert same(checkpoint()["model"], dict(model.state_dict()))


def test_zero_weight_ignores_every_other_jepa_setting(tiny_run):
    tiny_run(jepa_weight=0, max_iters=3)
    plain = checkpoint()["model"]
    for options in (
        dict(jepa_loss="infonce", spread="vicreg", spread_weight=0.5),
        dict(jepa_dropout=0.5, stop_grad=True),
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


def test_learning_rate_warms_up_peaks_and_ends_at_min_lr(tiny_run):
    config, _, _ = setup(max_iters=100, warmup_iters=10, learning_rate=0.01, min_lr=0.001)
    rates = [train.learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.001 * (i + 1) for i in range(10)])
    assert rates[10] == max(rates) == pytest.approx(0.01)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx((0.01 + 0.001) / 2)  # half-way down the cosine
    assert rates[100] == pytest.approx(0.001)
    config, _, _ = setup(max_iters=100, lr_decay_iters=50, learning_rate=0.01, min_lr=0.001)
    assert train.learning_rate(50, config) == train.learning_rate(99, config) == 0.001


# --- the step ---------------------------------------------------------------------------------


def test_two_micro_batches_are_one_large_batch(tiny_run, monkeypatch):
    """Both losses alike, with unequal numbers of labels: a mean of means would be off."""
    monkeypatch.setattr(
        data.Pairs, "batch",
        lambda self, step: np.arange(self.config.batch_size) + step * self.config.batch_size,
    )  # fmt: skip
    _, halves, model = setup(batch_size=8, gradient_accumulation_steps=2, jepa_weight=2)
    halves.lengths[:8, 1:] = 2  # cut half of the answers short
    labels = halves.lengths[:16, 1].reshape(2, 8).sum(1)
    assert labels[1] > 2 * labels[0]
    twice, terms_twice = step_gradients(model, halves)
    _, whole, model = setup(batch_size=16, jepa_weight=2)
    whole.lengths[:8, 1:] = 2
    once, terms_once = step_gradients(model, whole)
    assert terms_once["jepa"] > 0.1
    assert terms_twice == pytest.approx(terms_once, rel=1e-5)
    assert_close(twice, once)


@pytest.mark.parametrize("stop_grad", [False, True])
def test_step_equals_plain_passes_and_stop_grad_stops_the_target(tiny_run, stop_grad):
    """A reference with a pass per view; detaching its target is all that stop_grad may do."""
    _, pairs, model = setup(stop_grad=stop_grad, ce_weight=0.5, jepa_weight=2)
    got, terms = step_gradients(model, pairs)
    rows = pairs.batch(0)

    def reference(detach):
        model.zero_grad()
        lm, p, t = (pairs.pack(rows, b) for b in (LANGUAGE_MODEL, (TEXT, PRED), (TARGET,)))
        logits = model.hidden(lm.idx, lm.block) @ model.wte.weight.T
        ce = F.cross_entropy(logits.flatten(0, 1), lm.targets.flatten(), ignore_index=-1)
        pred = read_hidden(model.hidden(p.idx, p.block), p.block, PRED)
        target = read_hidden(model.hidden(t.idx, t.block), t.block, TARGET)
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
    _, pairs, model = setup(jepa_weight=2, ce_weight=0.5)
    assert far_apart(gradients, step_gradients(model, pairs)[0])


def skipped_steps(pairs, n):
    """Which of the first n steps skip the JEPA term, as a whole and in every micro-batch."""
    rows = np.arange(3)
    kept = np.array([[pairs.with_jepa(rows, step, micro) for micro in (0, 1)] for step in range(n)])
    assert (kept == kept[:, :1, :1]).all()
    return (~kept[:, 0, 0]).tolist()


def test_jepa_dropout_skips_the_share_it_says(tiny_run):
    _, pairs, _ = setup(jepa_dropout=0.3)
    skipped = skipped_steps(pairs, 2000)
    assert abs(sum(skipped) / 2000 - 0.3) < 0.04  # four standard deviations
    assert skipped == skipped_steps(pairs, 2000)
    _, other, _ = setup(jepa_dropout=0.3, seed=2)
    assert skipped != skipped_steps(other, 2000)
    _, never, _ = setup(jepa_dropout=0)
    assert not any(skipped_steps(never, 2000))


def test_a_skipped_step_runs_without_pred_and_target(tiny_run, monkeypatch):
    seen, real = [], GPT.forward

    def forward(self, idx, block, targets=None):
        if self.training:
            seen.append(set(block.unique().tolist()) - {0})
        return real(self, idx, block, targets)

    monkeypatch.setattr(GPT, "forward", forward)
    options = dict(jepa_dropout=0.5, max_iters=10, eval_interval=10)
    tiny_run(**options)
    _, pairs, _ = setup(**options)
    skipped = skipped_steps(pairs, 10)
    assert 0 < sum(skipped) < 10
    assert seen == [{TEXT, CODE} if skip else {TEXT, CODE, PRED, TARGET} for skip in skipped]
    # ... and says so in the log
    assert [("jepa" not in r) for r in records() if "lr" in r] == skipped


# --- stop, resume, save -----------------------------------------------------------------------


@pytest.mark.parametrize("number, code, at", [(signal.SIGTERM, 143, 4), (signal.SIGINT, 130, 2)])
def test_resumed_equals_uninterrupted(tiny_run, monkeypatch, number, code, at):
    """Bit for bit with every random stream in play. Six steps are an epoch: the SIGTERM comes
    in the middle of one, the SIGINT just before an evaluation."""
    options = dict(
        dropout=0.1, gradient_accumulation_steps=2, jepa_dropout=0.5, spread="sigreg",
        spread_weight=0.1, max_iters=8, eval_interval=3,
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
    assert checkpoint()["step"] == at + 1  # it finished its step
    assert max(r["step"] for r in records() if "lr" in r) == at
    monkeypatch.setattr(train, "learning_rate", real)
    tiny_run(**options, init_from="resume")

    whole, resumed = checkpoint("out/whole"), checkpoint()
    for part in ("model", "optimizer", "step", "tokens", "best_ce", "rng"):
        assert same(whole[part], resumed[part]), part
    assert same(checkpoint("out/whole", "best.pt")["model"], checkpoint(name="best.pt")["model"])

    def timeless(folder):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records(folder)]

    assert timeless("out/whole") == timeless("out/tiny")
    assert any("spread" in r for r in timeless("out/tiny"))  # the JEPA term was there


@pytest.mark.parametrize("options", [
    {}, {"jepa_weight": 0}, {"stop_grad": True}, {"pooling": "mean"}, {"bias": True, "n_pred": 0},
    {"gradient_accumulation_steps": 3, "labels": "all"}, {"layout": "plan", "n_pred": 2},
    {"jepa_dropout": 0.5, "jepa_dropout_per": "example", "n_layer": 1},
])  # fmt: skip
def test_the_operations_of_a_step_are_those_that_torch_counts(options, tiny_run):
    _, pairs, model = setup(**options)
    no_autocast = run.pick_device("cpu", "float32")[1]
    with FlopCounterMode(display=False) as counter:
        *_, flops = train.forward_backward(model, pairs, 1, CPU, no_autocast)
    assert flops == counter.get_total_flops() > 0


def test_operations_add_up_over_a_run(tiny_run):
    tiny_run()
    flops = [r["flops"] for r in records()]
    assert flops == sorted(flops) and flops[-1] > 3 * flops[0] > 0
    assert checkpoint()["flops"] == flops[-1]


def test_a_non_finite_loss_stops_before_the_update(tiny_run, monkeypatch, capsys):
    real, before = train.forward_backward, []

    def forward_backward(model, train_pairs, step, *rest):
        total, *costs = real(model, train_pairs, step, *rest)
        if step == 5:
            before.append((Path("out/tiny/ckpt.pt").read_bytes(), model,
                           {n: w.clone() for n, w in model.state_dict().items()}))
            total["loss"] = math.nan
        return total, *costs

    monkeypatch.setattr(train, "forward_backward", forward_backward)
    with pytest.raises(SystemExit) as stopped:
        tiny_run(max_iters=9)
    assert stopped.value.code not in (0, None)
    [line] = capsys.readouterr().err.splitlines()
    assert "nan" in line and "step 5" in line
    [(saved, model, weights)] = before
    assert Path("out/tiny/ckpt.pt").read_bytes() == saved
    assert checkpoint()["step"] == 3  # the last evaluation
    assert same(weights, dict(model.state_dict()))


def test_a_non_finite_gradient_is_noticed_though_the_loss_is_finite(tiny_run, monkeypatch):
    real, models = train.forward_backward, []

    def forward_backward(model, *rest):
        result = real(model, *rest)
        model.ln_f.weight.grad[0] = math.inf
        models.append(model)
        return result

    monkeypatch.setattr(train, "forward_backward", forward_backward)
    with pytest.raises(SystemExit) as stopped:
        tiny_run()
    assert stopped.value.code not in (0, None)
    assert len(models) == 1  # stopped at the first step, and before its update:
    assert torch.equal(models[0].ln_f.weight, torch.ones(32))


def test_a_second_run_moves_the_first_aside_intact(tiny_run):
    def contents(folder):
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}

    firsts = []
    for seed in (1, 2, 3):
        tiny_run(max_iters=1, seed=seed)
        firsts.append(contents("out/tiny"))
    assert {"ckpt.pt", "best.pt", "config.json", "metrics.jsonl"} <= firsts[0].keys()
    assert contents("out/earlier/tiny-1") == firsts[0]
    assert contents("out/earlier/tiny-2") == firsts[1]
    assert contents("out/tiny") == firsts[2] != firsts[1]


def test_a_folder_of_runs_is_not_taken_for_a_run(tiny_run, capsys):
    """Or else its second use would move all of them out of the way."""
    tiny_run(max_iters=1)
    line = error_line(capsys, tiny_run, out_dir="out")
    assert "out_dir=out holds other runs" in line and Path("out/tiny/ckpt.pt").exists()


# --- what a run says and writes ---------------------------------------------------------------


def test_collapse_is_warned_of_exactly_once(tiny_run):
    said = tiny_run(jepa_weight=20, learning_rate=3e-3, max_iters=18)
    panels = [r for r in records() if "val_matched" in r]
    collapses = [r for r in panels if r["val_mismatched"] > 0.9 * r["val_matched"] > 0.45]
    assert len(collapses) > 1
    assert said.count("warning: COLLAPSE") == 1


def test_no_collapse_warning_for_the_baseline(tiny_run, monkeypatch):
    monkeypatch.setattr(train, "verdict", lambda measures: "collapsed")
    assert "warning" not in tiny_run(jepa_weight=0)
    assert tiny_run().count("warning: COLLAPSE") == 1


@pytest.mark.parametrize("jepa_weight", [1, 0])
def test_metrics_have_the_promised_fields(tiny_run, jepa_weight):
    tiny_run(jepa_weight=jepa_weight)
    steps = [r for r in records() if "lr" in r]
    evaluations = [r for r in records() if "val_ce" in r]
    assert [r["step"] for r in steps] == [0, 1, 2, 3, 4, 5]
    assert [r["step"] for r in evaluations] == [3, 6]
    wanted = {"step", "ce", "loss", "lr", "tokens", "seconds"}
    if jepa_weight:
        wanted.add("jepa")
    assert all(wanted <= r.keys() for r in steps)
    wanted = {f"val_{name}" for name in (
        "ce", "jepa", "matched", "mismatched", "retrieval_at_1", "effective_rank")}  # fmt: skip
    assert all(wanted <= r.keys() for r in evaluations)  # of the baseline too
    assert all(math.isfinite(value) for r in records() for value in r.values())
    tokens = [r["tokens"] for r in steps]
    assert tokens == sorted(set(tokens)) and tokens[0] > 0


def test_a_run_writes_a_plot_a_config_and_a_checkpoint_with_provenance(tiny_run, monkeypatch):
    monkeypatch.setattr(train, "plot_losses", REAL_PLOT)
    folder = Path("out/no $ {formula")
    tiny_run(seed=5, max_iters=2, out_dir=folder)
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    about = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    for config in (about["config"], state["config"]):
        assert config["seed"] == 5 and config["n_embd"] == 32
    assert about["provenance"] == state["provenance"]
    assert about["parameters"] > 0

    provenance = state["provenance"]
    assert provenance["torch"] == torch.__version__
    assert provenance["commit"] and "--seed=5" in provenance["command"]
    published = "".join(json.dumps(row) + "\n" for row in sums(100))
    assert provenance["data"]["train_sha256"] == hashlib.sha256(published.encode()).hexdigest()
    assert provenance["data"]["dataset"] == "sums" and provenance["data"]["train_rows"] == 100
    assert provenance["data"]["tokenizer_sha256"] == state["tokenizer"]["sha256"]
    assert run.tokenizer_of(state, folder).sha256 == state["tokenizer"]["sha256"]


def test_overfits_eight_examples_and_then_answers_them(tiny_run, monkeypatch):
    """Training, checkpoint, tokenizer and generation together: it learns what it is shown."""
    rows = sums(8)
    monkeypatch.setattr(
        data, "load_rows", lambda config: ({"train": rows, "val": rows}, "sums", "test"))
    tiny_run(n_embd=64, max_iters=100, eval_interval=100, learning_rate=6e-3, warmup_iters=10)
    assert records()[-2]["ce"] < 0.05  # the last step; the last record is the evaluation
    trained = run.load_run(Path("out/tiny"), CPU)
    encode = trained.tokenizer.encode
    prompts = [[*ids, trained.tokenizer.sep] for ids in encode([r["question"] for r in rows])]
    answers = trained.model.generate(prompts, 50, trained.tokenizer.eot, temperature=0)
    assert all(answer[-1] == trained.tokenizer.eot for answer in answers)
    assert [trained.tokenizer.decode(a) for a in answers] == [r["answer"] for r in rows]


# --- compiling, as on CUDA --------------------------------------------------------------------


def test_compiled_model_gives_the_same_gradients(tiny_run, monkeypatch, capsys):
    """Traced by dynamo in rows of two kinds and lengths; its eager backend needs no compiler."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(GPT, "compile", lambda self, **kw: real(self, backend="eager", **kw))
    _, pairs, model = setup()
    want = step_gradients(model, pairs)[0]
    loaded = data.Data({"train": pairs}, None, {}, "string")
    train.compile_or_not(model, loaded, CPU, run.pick_device("cpu", "float32")[1])
    assert "\ncompiled" in capsys.readouterr().out and model._compiled_call_impl is not None
    assert all(p.grad is None for p in model.parameters())
    assert_close(step_gradients(model, pairs)[0], want)
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_model_that_cannot_be_compiled_runs_eagerly(tiny_run, monkeypatch, capsys):
    def no_compiler(self, **options):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(GPT, "compile", no_compiler)
    _, pairs, model = setup()
    want = step_gradients(model, pairs)[0]
    loaded = data.Data({"train": pairs}, None, {}, "string")
    train.compile_or_not(model, loaded, CPU, run.pick_device("cpu", "float32")[1])
    assert "not compiled, running eagerly: RuntimeError: no compiler\n" in capsys.readouterr().out
    assert_close(step_gradients(model, pairs)[0], want)
