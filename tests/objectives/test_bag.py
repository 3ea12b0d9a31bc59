"""Claims about objectives/bag.py: its target by hand and by slow loops, and nothing moves it."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error_line, sums, training

import data
import evaluate
import train
from alignment import embed_pairs
from config import Config, load_config
from jepa import OBJECTIVES
from lab.judge import judged
from lab.search import rows_of
from model import read_hidden
from objectives.bag import bags, idf_of, projection
from plumbing.files import read_records
from plumbing.jsonl import as_pair
from plumbing.processes import Processes
from plumbing.tokenizers import train_tokenizer
from run import load_run, make_model
from views import CODE, PRED, TARGET, TEXT, layout_of, tokenize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([row[key] for row in sums(50) for key in row], 320)


def pairs_of(bpe, rows=None, **options):
    rows = rows or [{**as_pair(row), "system": "Add." * (i % 2)} for i, row in enumerate(sums(9))]
    sizes = dict(objective="bag", block_size=128, batch_size=len(rows), n_layer=2, n_head=2,
                 n_embd=32)  # fmt: skip
    pairs, _ = tokenize(rows, bpe, Config(**{**sizes, **options}))
    return replace(pairs, idf=idf_of(pairs))


def target_of(pairs, batch):
    hidden = torch.zeros(*batch.idx.shape, pairs.config.n_embd)
    return OBJECTIVES["bag"].views(hidden, batch, pairs.config)[1]


def batch_of(pairs, examples):
    objective = OBJECTIVES["bag"]
    batch = pairs.pack(examples, objective.row(pairs.layout), pairs.has_target(examples))
    return batch._replace(given=objective.given(pairs, examples, np.random.default_rng(0)))


def test_idf_by_hand(bpe):
    """Three answers: Z Z Y, Z, X and an end mark each."""
    rows = [{"text": t, "code": c} for t, c in (("a", "ZZY"), ("b", "Z"), ("c", "X"))]
    pairs = pairs_of(bpe, rows)
    [z], [y], [x] = bpe.encode(["Z", "Y", "X"])
    expected = {z: math.log(4 / 3), y: math.log(4 / 2), x: math.log(4 / 2), bpe.eot: 0}
    for token in range(pairs.vocab_size):
        assert pairs.idf[token] == pytest.approx(expected.get(token, math.log(4)), abs=1e-6)
    [first, *_] = bags(pairs, np.arange(3), None)
    assert {i: v.item() for i, v in enumerate(first) if v} == pytest.approx(
        {z: 2 * math.log(4 / 3), y: math.log(2)}, abs=1e-5)  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"layout": "isolated"}, {"views": "steps"}])
def test_target_and_idf_equal_slow_loops(bpe, options):
    pairs = pairs_of(bpe, **options)
    enc, n = pairs.layout.enc, len(pairs)
    answers = [pairs.view(example, enc) for example in range(n)]
    assert (not min(map(len, answers))) == ("views" in options)  # an example without a next step
    having = [sum(token in answer for answer in answers) for token in range(pairs.vocab_size)]
    matrix = torch.randn(pairs.vocab_size, 32, generator=torch.Generator().manual_seed(0))
    target = target_of(pairs, batch_of(pairs, np.arange(n)))
    for got, answer in zip(target, answers):
        total = torch.zeros(32)
        for token in answer:
            total += math.log((1 + n) / (1 + having[token])) * matrix[token]
        want = total / total.norm() * math.sqrt(32) if answer else total  # of length √C
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_pred_is_all_that_it_costs(bpe):
    """k tokens for each example with the term, and no answer alone; in whatever layout."""
    for layout, row in (("tree", (TEXT, CODE, PRED)), ("plan", (TEXT, PRED, CODE)),
                        ("isolated", (TEXT, PRED, CODE))):  # fmt: skip
        assert OBJECTIVES["bag"].row(layout_of(Config(layout=layout))) == row
    flops = {}
    for k, weight in ((3, 0.5), (3, 0.0)):
        pairs = pairs_of(bpe, n_pred=k, jepa_weight=weight)
        model = make_model(pairs.config, pairs.vocab_size)
        t = train.Training(pairs, model, model, None, None, None, Processes())
        micro = train.plan(t, 0, 0)
        assert (micro.batch.block == PRED).sum() == (9 * k if weight else 0)
        assert not (micro.batch.block == TARGET).any()
        flops[weight] = train.cost(model, pairs.config, [micro])
    assert flops[0.5]["tokens"] - flops[0.0]["tokens"] == 27
    assert flops[0.5]["flops"] < 1.12 * flops[0.0]["flops"]  # 3 of about 35 tokens


def test_the_target_does_not_move_and_pred_alone_has_the_gradient(bpe):
    pairs = pairs_of(bpe, jepa_loss="infonce", spread="none", spread_weight=0.0)
    examples = np.arange(9)
    batch = batch_of(pairs, examples)
    targets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = make_model(pairs.config, pairs.vocab_size)
        hidden, _ = model(batch, OBJECTIVES["bag"].reads(batch, pairs.config))
        pred, target = OBJECTIVES["bag"].views(hidden, batch, pairs.config)
        assert pred.requires_grad and not target.requires_grad
        assert torch.equal(pred, read_hidden(hidden, batch.block, PRED))
        targets.append(target)
    assert torch.equal(*targets)
    cosine = F.cosine_similarity(target[:, None], target[None], dim=-1)
    assert cosine[~torch.eye(9, dtype=torch.bool)].max() < 0.999  # not of one point


def test_equal_answers_are_one_group_and_so_are_equal_bags(bpe):
    rows = [{"text": t, "code": c} for t, c in (
        ("a", "XY"), ("b", "YX"), ("c", "XY"), ("d", "XYY"), ("e", "Z"))]  # fmt: skip
    assert all(len(ids) == len(row["code"]) for row in rows for ids in bpe.encode([row["code"]]))
    pairs = pairs_of(bpe, rows)
    groups = pairs.groups(np.arange(5))
    target = target_of(pairs, batch_of(pairs, np.arange(5)))
    for i in range(5):
        for j in range(5):
            assert (groups[i] == groups[j]) == torch.allclose(target[i], target[j], atol=1e-4)
    assert len(set(groups.tolist())) == 3
    assert len(set(pairs_of(bpe, rows, objective="pair").groups(np.arange(5)).tolist())) == 4


def test_who_judges_answers_has_the_views_that_the_panel_has(bpe):
    pairs = pairs_of(bpe)
    torch.manual_seed(0)
    model = make_model(pairs.config, pairs.vocab_size).eval()
    _, pred, target = embed_pairs(model, pairs, 9, contextlib.nullcontext)
    answers = [pairs.answer(example) for example in range(9)]
    _, cosine = judged(model, pairs, list(range(9)), answers)
    torch.testing.assert_close(cosine, F.cosine_similarity(pred, target), rtol=1e-4, atol=1e-5)


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(120)))
    return "--dataset=pairs.jsonl"


def test_idf_is_of_train_alone_and_in_the_provenance(own_file):
    given = [own_file, "--objective=bag", "--tokenizer=bpe", "--bpe_vocab_size=320"]
    loaded = data.load_data(load_config(given))
    assert np.array_equal(loaded.pairs["val"].idf, idf_of(loaded.pairs["train"]))
    again = data.load_data(load_config(given))  # its tokens out of the cache
    assert again.provenance["idf_sha256"] == loaded.provenance["idf_sha256"]
    fewer = data.load_data(load_config([*given, "--train_rows=60"]))
    assert fewer.provenance["idf_sha256"] != loaded.provenance["idf_sha256"]
    pair = data.load_data(load_config([own_file, *given[2:]]))
    assert pair.pairs["val"].idf is None and "idf_sha256" not in pair.provenance


def test_it_trains_judges_and_goes_on(tiny_run, capsys):
    options = dict(objective="bag", jepa_loss="infonce", spread="none", spread_weight=0, seed=3)
    tiny_run(**options, max_iters=8, out_dir="out/whole")
    tiny_run(**options, max_iters=4, lr_decay_iters=8)
    tiny_run(**options, max_iters=8, init_from="resume")
    whole, resumed = (torch.load(f"out/{name}/ckpt.pt")["model"] for name in ("whole", "tiny"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    records = read_records(Path("out/tiny/metrics.jsonl"))
    assert all(math.isfinite(v) for r in records for v in r.values())
    assert "idf_sha256" in load_run(Path("out/tiny"), CPU).provenance["data"]
    Path("more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(5, 700)))
    for asked in ("--split=val", "--file=more.jsonl"):
        evaluate.main(["out/tiny", asked, "--n=3", "--samples=2", "--judge=3"])
        assert "judge=0" not in capsys.readouterr().out
    tiny_run(**{**options, "jepa_weight": 0}, max_iters=3)
    assert math.isfinite(read_records(Path("out/tiny/metrics.jsonl"))[-1]["val_matched"])


def test_the_cosine_alone_does_not_collapse(tiny_run, monkeypatch):
    """Four answers, which a word of the question decides."""
    words = {"red": "stop", "green": "go on", "amber": "wait", "white": "turn"}
    rows = [{"text": f"light {i}: {word}", "code": words[word]}
            for i in range(60) for word in words]  # fmt: skip
    monkeypatch.setattr(data, "load_rows", lambda config: (
        {"train": rows[:200], "val": rows[200:]}, "lights", "test"))  # fmt: skip
    tiny_run(objective="bag", jepa_loss="cosine", spread="none", spread_weight=0, max_iters=240,
             eval_interval=240, learning_rate=1e-2, eval_pairs=40)  # fmt: skip
    last = read_records(Path("out/tiny/metrics.jsonl"))[-1]
    assert last["val_matched"] > 0.7 and last["val_mismatched"] < 0.6 * last["val_matched"]
    assert last["val_retrieval_at_1"] > 0.9 and last["val_chance"] == 1 / 4


def test_one_answer_alone_leaves_nothing_to_foresee_and_no_nan(bpe):
    pairs = pairs_of(bpe, [{"text": t, "code": "Z"} for t in "abc"])
    assert torch.equal(target_of(pairs, batch_of(pairs, np.arange(3))), torch.zeros(3, 32))
    torch.manual_seed(0)
    model = make_model(pairs.config, pairs.vocab_size)
    assert math.isfinite(train.train_step(training(model, pairs), 0)["grad_norm"])


def test_the_projection_is_the_same_in_every_run_and_keeps_angles():
    assert torch.equal(projection(500, 64, CPU), projection.__wrapped__(500, 64, CPU))
    bag = torch.rand(2, 500)
    before, after = F.cosine_similarity(*bag, dim=0), F.cosine_similarity(
        *(bag @ projection(500, 512, CPU)), dim=0)  # fmt: skip
    assert abs(before - after) < 0.1


@pytest.mark.parametrize("option", ["layout=reverse", "pooling=mean", "stop_grad=True", "ema=0.9"])
def test_what_makes_no_sense_with_it_is_refused(option, capsys):
    assert option in error_line(capsys, load_config, ["--objective=bag", f"--{option}"])


def test_it_cannot_search():
    with pytest.raises(ValueError, match=r"does not predict Enc\(answer\), so it cannot search"):
        rows_of(Config(objective="bag"))
