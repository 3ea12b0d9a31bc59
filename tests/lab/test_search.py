"""Search finds what brute force over plain rows finds, by the embeddings that training measured."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_line, sums

import evaluate
from alignment import alignment, embed_pairs
from data import load_rows
from lab import search
from run import data_of, load_run

CPU = torch.device("cpu")


def unit(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def run(tiny_run):
    tiny_run(jepa_loss="infonce", spread="none", spread_weight=0)
    return load_run(Path("out/tiny"), CPU)


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 99, 300])
def test_nearest_is_what_sorting_all_cosines_gives(monkeypatch, k):
    monkeypatch.setattr(search, "CHUNK", 32)  # the last of several is not full
    vectors, queries = unit(99, 8).astype(np.float16), unit(7, 8, seed=1)
    cosines, rows = search.nearest(vectors, queries, k)
    plain = queries @ vectors.astype(np.float32).T
    order = np.argsort(-plain, 1)[:, :k]
    assert np.array_equal(rows, order)
    assert np.allclose(cosines, np.take_along_axis(plain, order, 1), atol=1e-6)


def test_a_million_vectors_are_searched_where_they_lie(tmp_path):
    n, C = 1_000_000, 16
    vectors = np.memmap(tmp_path / "vectors", np.float16, "w+", shape=(n, C))
    for begin in range(0, n, 100_000):
        vectors[begin : begin + 100_000] = 0.5 * unit(100_000, C, seed=begin)
    at, queries = [7, 65_536, 999_999], unit(3, C, seed=3)
    vectors[at] = queries
    vectors = np.memmap(tmp_path / "vectors", np.float16, "r", shape=(n, C))
    cosines, rows = search.nearest(vectors, queries, 2)
    assert rows[:, 0].tolist() == at
    assert np.allclose(cosines[:, 0], 1, atol=1e-3) and (cosines[:, 1] <= 0.5).all()


def test_ranks_are_those_of_a_plain_loop():
    answers, own = unit(90, 4), np.arange(200) % 90
    queries = answers[own] + unit(200, 4, seed=1)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    ranks = search.ranks_of(queries, answers, own)
    for query, rank, row in zip(queries, ranks, own):
        cosines = answers @ query
        assert rank == 1 + sum(c >= cosines[row] for i, c in enumerate(cosines) if i != row)
    assert len(set(ranks)) > 10


def test_a_tie_and_what_is_not_a_number_count_against_the_model():
    same, own = np.ones((5, 3), np.float32) / 3**0.5, np.arange(5)
    assert search.ranks_of(same, same, own).tolist() == [5] * 5
    assert search.ranks_of(same * np.nan, same, own).tolist() == [5] * 5


def test_measures_by_hand():
    found = search.measures(np.array([1, 1, 2, 10, 20]))
    assert found == pytest.approx({"recall_at_1": 0.4, "recall_at_10": 0.8, "mrr": 2.65 / 5})


# --- texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, dict(n_pred=0), dict(n_pred=3), dict(layout="isolated"), dict(layout="plan"),
    dict(layout="front"), dict(pooling="mean"),
], ids=str)  # fmt: skip
def test_texts_are_embedded_as_in_a_row_of_training(tiny_run, options):
    tiny_run(max_iters=1, **options)
    run = load_run(Path("out/tiny"), CPU)
    pairs = data_of(run, "").pairs["val"]
    _, pred, target = embed_pairs(run.model, pairs, len(pairs), nullcontext)
    rows = sums(20, 500)
    answers = [row["answer"] for row in rows]
    found = (search.embed_questions(run, [row["question"] for row in rows], nullcontext),
             search.embed_answers(run, answers, nullcontext))  # fmt: skip
    for mine, theirs in zip(found, (pred, target)):
        theirs = torch.nn.functional.normalize(theirs, dim=-1).numpy()
        assert mine.shape == theirs.shape and np.abs(mine - theirs).max() < 1e-5


def test_eval_says_what_training_said(run, capsys):
    pairs = data_of(run, "").pairs["val"]
    _, pred, target = embed_pairs(run.model, pairs, len(pairs), nullcontext)
    expected = alignment(pred, target)
    search.main(["out/tiny", "--eval", "--device=cpu"])
    said = capsys.readouterr().out
    stored = json.loads(Path("out/tiny/search.json").read_text())
    assert stored["recall_at_1"] == pytest.approx(expected["retrieval_at_1"])
    assert f"recall@1 {stored['recall_at_1']:.3f} [" in said and "20 different answers" in said
    about = stored["provenance"]
    assert about["n"] == 20 and about["pairs"] == "sums, val" and about["trained"]["data"]


def test_equal_answers_are_one(run):
    pairs = data_of(run, "").pairs["val"]
    twice = pairs.take(np.array([3, 5, 3, 4, 5]))
    answers, own = search.different_answers(twice)
    assert len(answers) == 3
    assert [answers.answer(i) for i in own] == [twice.answer(i) for i in range(5)]


def test_eval_on_a_file_counts_the_questions_that_were_trained_on(run, monkeypatch, capsys):
    known = sums(100)[:3] + sums(5, 900)
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    monkeypatch.setattr(evaluate, "questions_seen", lambda rows, config, split: np.ones(3, bool))
    search.main(["out/tiny", "--eval", "--answers=asked.jsonl", "--device=cpu"])
    said = capsys.readouterr().out
    assert "3 of 8 questions of asked.jsonl are in train" in said
    assert "8 questions of asked.jsonl, 8 different answers" in said
    stored = json.loads(Path("out/tiny/search-asked.json").read_text())
    assert stored["provenance"]["pairs"] == "asked.jsonl"


# --- the table --------------------------------------------------------------------------------


def test_a_table_is_made_once_and_holds_each_answer_once(run, monkeypatch, capsys):
    monkeypatch.setattr(search, "CHUNK", 3)
    long = "1+1=" * 100
    answers = ["1+1=2", "3+4=7", "1+1=2", long, "2+2=4", "9", "8"]
    table = search.open_table(run, answers, nullcontext)
    assert "1 of 6 answers are longer than block_size=64: left out" in capsys.readouterr().out
    assert table.answers == ["1+1=2", "3+4=7", "2+2=4", "9", "8"]
    expected = search.embed_answers(run, table.answers, nullcontext)
    assert table.vectors.dtype == np.float16
    assert np.abs(table.vectors - expected).max() < 1e-3
    with monkeypatch.context() as patched:
        patched.setattr(search, "embed", None)  # not computed again
        again = search.open_table(run, answers, nullcontext)
    assert again.answers == table.answers and np.array_equal(again.vectors, table.vectors)
    about = json.loads(next(Path("out/tiny/search").glob("*/about.json")).read_text())
    assert about["kept"] == 5 and about["trained"] == run.provenance
    search.open_table(run, answers[:2], nullcontext)
    assert len(list(Path("out/tiny/search").iterdir())) == 2  # of other answers


def test_the_bar_moves_answer_by_answer(run, monkeypatch):
    """Not chunk by chunk: nearly all tables are a single one."""
    steps = []

    class Counting:
        move = staticmethod(steps.append)

    monkeypatch.setattr(search, "Bar", lambda what, unit, total: Counting)
    search.open_table(run, [str(i) for i in range(150)], nullcontext)
    assert steps == [64, 64, 22]


def test_another_checkpoint_has_a_table_of_its_own(run, tiny_run):
    search.open_table(run, ["1", "2"], nullcontext)
    kept = Path("out/kept")
    shutil.move("out/tiny/search", kept)
    tiny_run(seed=2, max_iters=1)
    shutil.move(kept, "out/tiny/search")
    other = load_run(Path("out/tiny"), CPU)
    table = search.open_table(other, ["1", "2"], nullcontext)
    assert np.abs(table.vectors - search.embed_answers(other, ["1", "2"], nullcontext)).max() < 1e-3


# --- the command ------------------------------------------------------------------------------


def test_a_query_shows_the_nearest_answers_of_train(run, capsys):
    search.main(["out/tiny", "--query=What is 3 plus 2?", "--top=3", "--device=cpu"])
    said = capsys.readouterr().out
    assert "100 different ones of 100 answers of sums, train" in said
    query = search.embed_questions(run, ["What is 3 plus 2?"], nullcontext)
    answers = [row["answer"] for row in sums(100)]
    cosines = search.embed_answers(run, answers, nullcontext) @ query[0]
    best = np.argsort(-cosines)[:3]
    shown = said.split("\n--- ")[1:]
    assert [part.partition("\n")[2].strip() for part in shown] == [answers[i] for i in best]
    for number, (part, i) in enumerate(zip(shown, best), 1):
        assert part.startswith(f"{number}, cosine {cosines[i]:.3f}")


def test_answers_come_from_a_file_of_pairs_of_texts_or_of_a_field(run, capsys):
    rows = [{"question": "what?", "answer": "4+4=8", "note": "five"},
            {"question": "why?", "answer": "5+5=10", "note": "ten"}]  # fmt: skip
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("lines.txt").write_text("4+4=8\n\n5+5=10\n")
    Path("notes.jsonl").write_text("".join(json.dumps({"note": row["note"]}) + "\n"
                                           for row in rows))  # fmt: skip
    for options, expected in (
        (["--answers=rows.jsonl"], {"4+4=8", "5+5=10"}),
        (["--answers=lines.txt"], {"4+4=8", "5+5=10"}),
        (["--answers=rows.jsonl", "--field=note"], {"five", "ten"}),
        (["--answers=notes.jsonl", "--field=note"], {"five", "ten"}),
    ):
        search.main(["out/tiny", "--query=What is 4 plus 4?", "--device=cpu", *options])
        said = capsys.readouterr().out
        assert {part.partition("\n")[2].strip() for part in said.split("\n--- ")[1:]} == expected


@pytest.mark.parametrize("n, is_said", [(1, False), (2, True)])
def test_different_system_prompts_are_said(tiny_run, monkeypatch, capsys, n, is_said):
    """They stand before question and answer alike, and so tell answers apart."""
    rows = [row | {"system": f"Be number {i % n}."} for i, row in enumerate(sums(60))]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("data.load_rows", load_rows)  # not the fixture's
    tiny_run(dataset="mixed.jsonl", max_iters=1)
    capsys.readouterr()
    for option, says in (("--eval", "behind 2 different system prompts, as in training"),
                         ("--query=what?", "began with 2 different system prompts")):  # fmt: skip
        search.main(["out/tiny", option, "--device=cpu"])
        said = capsys.readouterr().out
        assert (says in said) == is_said and ("note:" in said) == is_said


def test_a_run_without_jepa_says_that_nothing_taught_it(tiny_run, capsys):
    tiny_run(jepa_weight=0, max_iters=1)
    search.main(["out/tiny", "--eval", "--device=cpu"])
    assert "trained without JEPA" in capsys.readouterr().out


@pytest.mark.parametrize("options, says", [
    ([], "give either"),
    (["--query=what?", "--eval"], "give either"),
    (["--query=what?", "--top=0"], "top=0"),
    (["--eval", "--answers=a.jsonl", "--field=b"], "needs pairs"),
    (["--query=what?", "--field=b"], "--answers=FILE"),
    (["--query=what?", "--answers=gone.jsonl"], "gone.jsonl"),
    (["--query=what?", "--answers=gone.txt"], "gone.txt"),
    (["--query=" + "what? " * 100], "longer than the context"),
    (["--query=what?", "--answers=long.txt"], "none of 1 answers fits"),
    (["--query=what?", "--answers=empty.txt"], "empty.txt holds no answer"),
    (["--query=what?", "--answers=long.txt", "--field=b"], "field=b"),
    (["--eval", "--answers=long.jsonl"], "none of the 1 pairs fits"),
    (["out/none", "--query=what?"], "out/none"),
])  # fmt: skip
def test_mistakes_are_one_line(run, capsys, options, says):
    Path("long.txt").write_text("1+1=" * 100)
    Path("empty.txt").write_text("\n")
    Path("long.jsonl").write_text(json.dumps({"question": "1+1=" * 100, "answer": "2"}))
    names = [] if options[:1] == ["out/none"] else ["out/tiny"]
    assert says in error_line(capsys, search.main, [*names, *options, "--device=cpu"])


@pytest.mark.parametrize("option", [dict(layout="reverse"), dict(views="steps")], ids=str)
def test_a_run_that_cannot_search_is_refused(tiny_run, capsys, option):
    tiny_run(max_iters=1, **option)
    [(name, value)] = option.items()
    line = error_line(capsys, search.main, ["out/tiny", "--query=what?", "--device=cpu"])
    assert f"a run with {name}={value}" in line
