"""Claims about lab/reversal.py: it asks for the model's own chances, of every kind of fact."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, error_line

import train
from config import Config
from data import load_data
from generators.relations import SIZES, Facts, Sizes, facts_of, reversal_metrics
from lab import reversal
from plumbing.processes import pick_device
from run import load_run, make_model

FACTS = Facts(n_relations=3, n_entities=36)
ARGS = ["--device=cpu", "--dtype=float32"]


@pytest.fixture
def few_facts(monkeypatch):
    monkeypatch.setitem(SIZES, "relations", Sizes(3, 20, 16, 40, 30))


def made_model():
    config = Config(dataset="relations", views="facts", tokenizer="words", block_size=16,
                    batch_size=8, n_layer=2, n_head=2, n_embd=32)  # fmt: skip
    return make_model(config, load_data(config).tokenizer.vocab_size).eval()


def test_ask_gives_the_models_own_probabilities(few_facts):
    facts, splits = facts_of("relations")
    assert facts == FACTS
    trunk, rows = made_model(), splits["train"]["rows"][:4]
    first, second = reversal.ask(trunk, facts, rows, contextlib.nullcontext)
    assert first.shape == (4, facts.vocab_size)
    assert second.shape == (4, facts.side, facts.vocab_size)
    for n, row in enumerate(torch.from_numpy(rows)):
        logits = trunk.logits(trunk.everywhere(row[None], torch.ones(1, 5, dtype=torch.long)))[0]
        want = logits[..., : facts.vocab_size].log_softmax(-1).detach().numpy()
        np.testing.assert_allclose(first[n], want[2], atol=1e-5)
        symbol = row[3].item() - (facts.vocab_size - 2 * facts.side)
        np.testing.assert_allclose(second[n, symbol], want[3], atol=1e-5)


def test_chunks_of_questions_measure_the_same_as_all_at_once(few_facts):
    facts, splits = facts_of("relations")
    trunk, rows = made_model(), splits["train"]["rows"][:70]  # two chunks of 35
    whole = reversal.ask(trunk, facts, rows, contextlib.nullcontext)
    expected = reversal_metrics(facts, *whole, rows[:, 3:])
    got = reversal.measure(trunk, facts, rows, contextlib.nullcontext)
    assert got == pytest.approx(expected, abs=1e-5) and got.keys() == expected.keys()


@pytest.fixture
def trained(few_facts, tmp_path, monkeypatch, capsys):
    """A function that trains a tiny model on facts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *paths: None)

    def run(*options):
        train.main([*TINY, "--dataset=relations", "--views=facts", "--tokenizer=words",
                    "--max_iters=1", *options])  # fmt: skip
        capsys.readouterr()

    return run


def test_it_measures_every_kind_of_fact_and_keeps_the_numbers(trained, capsys):
    trained()
    reversal.main([*ARGS, "--n=20"])  # the newest run
    printed = capsys.readouterr().out
    results = json.loads(Path("out/tiny/relations.json").read_text())
    assert set(results["facts"]) == {"train", "atomic", "held_out"} and results["step"] == 1
    assert {"commit", "torch", "trained"} < results.keys()
    facts, splits = facts_of("relations")
    device, autocast = pick_device("cpu", "float32")
    trunk = load_run(Path("out/tiny"), device).model
    for name, measures in results["facts"].items():
        rows = splits[name]["rows"]
        chosen = np.random.default_rng(0).permutation(len(rows))[:20]
        expected = reversal.measure(trunk, facts, rows[chosen], autocast)
        assert measures == pytest.approx({"n": 20, **expected})
        [line] = [line for line in printed.splitlines() if line.split()[:1] == [name]]
        assert line.split()[1] == "20" and line.split()[4] == f"{measures['joint']:.3f}"
    assert f"chance: joint {1 / 36:.4f}" in printed
    reversal.main(["out/tiny", *ARGS, "--n=20"])
    again = json.loads(Path("out/tiny/relations.json").read_text())
    assert again["facts"] == results["facts"]


def test_a_kind_of_which_there_is_none_is_left_out(trained, monkeypatch):
    monkeypatch.setitem(SIZES, "relations", Sizes(3, 20, 16, 0, 30))
    trained("--jepa_weight=0")
    reversal.main(["out/tiny", *ARGS])
    facts = json.loads(Path("out/tiny/relations.json").read_text())["facts"]
    assert set(facts) == {"atomic", "held_out"}
    assert all(measures["n"] == 30 for measures in facts.values())  # there are no more


def test_mistakes_are_one_line(tiny_run, capsys):
    assert "n=0" in error_line(capsys, reversal.main, ["--n=0"])
    assert "no checkpoint" in error_line(capsys, reversal.main, ["out/none", *ARGS])
    assert "one run" in error_line(capsys, reversal.main, ["out/a", "out/b", *ARGS])
    tiny_run(max_iters=1)
    line = error_line(capsys, reversal.main, ["out/tiny", *ARGS])
    assert "word_problems" in line and "dataset=relations" in line
