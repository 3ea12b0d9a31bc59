"""Claims about evaluate.py: a split is answered, once, and runs are compared on the same rows.

And about what it takes from generate.py: answers and their scores."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, error_line, sums

import data
import evaluate
import generate
import train
from config import Config
from generate import Asking, answer, answer_shares, final_number, longest_answer, score, share_of
from plumbing.tokenizers import train_tokenizer
from views import tokenize

# --- scores (of generate.py) ------------------------------------------------------------------

NUMBERS = [
    ("5+3=8\n#### 8", 8), ("#### 1,234", 1234), ("#### $1,234,567", 1234567), ("#### -7", -7),
    ("#### -$7", -7), ("#### 3.50", 3.5), ("#### .5", 0.5), ("#### 42 apples", 42),
    ("#### 12%", 12), ("####8", 8), ("#### 3\n#### 4", 4), ("#### 18.\nSo it is 20", 18),
    ("#### 0", 0), ("#### 007", 7), ("the answer is 8", None), ("", None), ("####", None),
    ("#### none", None), ("#### 1/2", 0.5), ("8 ####", None), ("#### 8 ####", None),
    ("#### 3.5/2", None), ("#### $-7", -7), ("#### +5", 5), ("#### \u22125", -5), ("#### - 3", -3),
    ("#### €5", 5), ("#### 5 €", 5), ("#### 3/4 cup", 0.75), ("#### 1e3", 1000),
    ("#### 2.5E-1", 0.25), ("#### \\boxed{5}", 5), ("#### $5$", 5), ("#### $\\boxed{-5}$.", -5),
    ("#### 21 °C", 21), ("#### 60 km/h", 60), ("#### 9 sq. ft.", 9), ("#### 4 m²", 4),
    ("####\n8", 8), ("#### 5 * 3", None), ("#### 10:45", None), ("#### 7,2", None),
    ("#### 1,23,456", None), ("#### 0,123", None), ("#### 2021-05-03", None), ("#### 5-3", None),
    ("#### 3/4/2021", None), ("#### 3/0", None), ("#### 1.234.567", None), ("#### --5", None),
    ("#### 5x3", None), ("#### 5 to 7", None), ("#### 5²", None), ("#### 1e99999", None),
    ("#### 5 million", None), ("#### 5k", None), ("#### $5 Billion.", None), ("#### 2 dozen", None),
    ("#### 10 AM", None), ("#### 3 p.m.", None), ("#### 5 km", 5), ("#### 5 pmol", 5),
    ("#### 15 thousand", None),
]  # fmt: skip


@pytest.mark.parametrize("text, value", NUMBERS)
def test_the_number_after_the_last_mark(text, value):
    assert final_number(text) == (None if value is None else pytest.approx(value))


def test_numbers_are_compared_exactly():
    assert final_number("#### 3/4") == final_number("#### 0.75") == final_number("#### 75e-2")
    assert final_number("#### 1/3") != final_number("#### 0.3333333333333333")
    assert final_number("#### 0.1") != final_number("#### 0.10000000000000001")
    assert final_number("#### " + "9" * 6000) == 10**6000 - 1  # what a model may go on about
    assert final_number("#### 5" + " " * 3000 + "!") is None  # in no time


@pytest.mark.parametrize("output, target, contains", [
    ("so 72 it is", "#### 72", True), ("172", "#### 72", False), ("72.5", "#### 72", False),
    ("1234 of them", "#### 1,234", True), ("1,234.", "#### $1234", True), ("5", "#### -5", False),
    ("3 - 8 = \u22125", "#### - 5", True), ("3/4", "#### 3", False), ("", "#### 3", False),
    ("#### 0.50", "#### .5", True),  # the same number
    ("5+3=8\n#### 9", "5+3=8\n#### 8", True), ("#### 720", "#### 72", False),
    ("it is -5", "#### 5", False), ("10-5", "#### 5", True), ("(1)-5", "#### 5", True),
    ("1/5", "#### 5", False), ("7,5", "#### 5", False), ("at 5:30", "#### 5", False),
    ("5e3", "#### 5", False), ("7, 5, 6", "#### 5", True), ("5.", "#### 5", True),
    ("none", "no #### none", False), ("no #### none", "#### none", True),  # of no number the text
])  # fmt: skip
def test_a_number_stands_somewhere_in_an_answer(output, target, contains):
    assert score(output, target, "number")["contains"] is contains
    if target.startswith("#### "):
        assert score(output, target[5:], "final")["contains"] is contains


@pytest.mark.parametrize("output, target, kind, exact, prefix", [
    ("4+4=8\n#### 8", "5+3=8\n#### 8", "number", True, False),
    ("5+3=8\n#### 9", "5+3=8\n#### 8", "number", False, False),
    ("no number", "no number", "number", False, True),  # a missing number is wrong, on either side
    ("1,000", "1000", "final", True, False),
    ("", "8", "final", False, False),
    ("[a-z]+", "[a-z]+", "string", True, True),
    ("[a-z]+x", "[a-z]+", "string", False, True),
    ("[a-z]", "[a-z]+", "string", False, False),
    (" [a-z]+", "[a-z]+", "string", False, False),
])  # fmt: skip
def test_scores(output, target, kind, exact, prefix):
    scores = score(output, target, kind)
    contains = scores.pop("contains")
    assert scores == {"exact": exact, "prefix": prefix}
    assert contains or not (exact or prefix)


def test_another_spelling_of_a_regex_is_equivalent_but_not_exact():
    scores = score("([0-9])|([a-z])", "([a-z])|([0-9])", "regex")
    assert scores == {"exact": False, "prefix": False, "contains": False, "equivalent": True}
    assert not score("([0-9])|([A-Z])", "([a-z])|([0-9])", "regex")["equivalent"]
    assert not score("((((", "([a-z])|([0-9])", "regex")["equivalent"]
    assert score("((((", "((((", "regex")["equivalent"]  # the very string


# --- answers ----------------------------------------------------------------------------------


def oracle(monkeypatch, answers):
    """A trunk that answers every question from a list, or with nothing."""
    trunk = torch.nn.Module()

    def generate_known(asked, prompts, max_new_tokens, eot, sampling=generate.GREEDY):
        assert asked is trunk and not trunk.training and sampling.temperature == 0
        return [answers.get(tuple(prompt), [eot])[:max_new_tokens] for prompt in prompts]

    monkeypatch.setattr(generate, "generate", generate_known)
    return trunk


def pairs_of(rows, **options):
    texts = [row[key] for row in rows for key in ("question", "answer")]
    tokenizer = train_tokenizer(texts, 320)
    config = Config(block_size=128, **options)
    pairs = [{"text": r["question"], "code": r["answer"], "system": r.get("system", "")}
             for r in rows]  # fmt: skip
    return tokenize(pairs, tokenizer, config)[0], tokenizer


@pytest.mark.parametrize("options", [{}, {"views": "steps"}, {"layout": "plan"}])
def test_an_oracle_scores_one_and_silence_nothing(options, monkeypatch):
    rows = sums(20)
    pairs, tokenizer = pairs_of(rows, **options)
    known = {
        tuple(pairs.prompt(i)): pairs.view(i, 1)[pairs.question_length[i] :] + pairs.view(i, 2)
        for i in range(20)
    }
    for kind in ("number", "string"):
        asking = Asking(oracle(monkeypatch, known), tokenizer, nullcontext, 99, kind)
        records = answer(asking, pairs, list(range(20)))
        assert asking.trunk.training  # as it was
        assert [r["target"] for r in records] == [row["answer"] for row in rows]
        assert [r["prompt"] for r in records] == [row["question"] for row in rows]
        assert all(r["exact"] and r["prefix"] and r["stopped"] for r in records)
        asking = asking._replace(max_new_tokens=longest_answer(pairs))  # which is just enough
        assert answer_shares(asking, pairs, 20) == {
            "exact": 1, "prefix": 1, "contains": 1, "stopped": 1}  # fmt: skip
        silent = asking._replace(trunk=oracle(monkeypatch, {}))
        for r in answer(silent, pairs, [0, 7]):
            assert (r["output"], r["exact"], r["prefix"], r["stopped"]) == ("", False, False, True)
    cut = Asking(oracle(monkeypatch, known), tokenizer, nullcontext, 4, "string")
    [cut] = answer(cut, pairs, [3])
    assert (cut["stop"], cut["stopped"], cut["exact"], cut["tokens"]) == ("length", False, False, 4)


def test_shares_are_of_the_first_questions_whatever_order_they_are_asked_in(monkeypatch):
    pairs, tokenizer = pairs_of(sums(20))
    known = {tuple(pairs.prompt(i)): pairs.answer(i) for i in (0, 3, 19)}
    asking = Asking(oracle(monkeypatch, known), tokenizer, nullcontext, 99, "string")
    assert answer_shares(asking, pairs, 10) == {
        "exact": 0.2, "prefix": 0.2, "contains": 0.2, "stopped": 1}  # fmt: skip
    assert answer_shares(asking, pairs, 99)["exact"] == 3 / 20
    assert answer_shares(asking, pairs, 0) == {}
    assert share_of([{"exact": True}, {"exact": False}], "exact") == 0.5


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny_run):
    tiny_run()
    return Path("out/tiny")


def run(*args):
    evaluate.main(["--device=cpu", "--dtype=float32", "--split=val", *args])


def test_it_answers_every_question_and_goes_on_where_it_stopped(trained, capsys):
    run("--batch_size=8")
    path = trained / "generations-val.jsonl"
    whole = path.read_text()
    about, *records = map(json.loads, whole.splitlines())
    results = json.loads((trained / "accuracy-val.json").read_text())
    assert sorted(r["row"] for r in records) == list(range(20)) and results["n"] == 20
    assert results["provenance"] == about and about["step"] == 6
    for key in ("exact", "prefix", "contains", "stopped"):
        share = sum(r[key] for r in records) / 20
        low, high = results[f"{key}_95"]
        assert results[key] == share and low <= share <= high

    # As after a kill in the middle of a line: the answers so far are kept as they are.
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:9]) + lines[8] + lines[9][:20])  # and of two at once
    capsys.readouterr()
    run("--batch_size=8")
    assert "holds 8 of 20 answers" in capsys.readouterr().out
    again = path.read_text().splitlines(keepends=True)
    assert again[1:9] == lines[1:9]
    timeless = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in again[1:]]
    assert timeless == [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_answers_of_another_checkpoint_are_not_taken_for_its_own(trained, tiny_run, capsys):
    run()
    summary = (trained / "accuracy-val.json").read_text()
    tiny_run(max_iters=3)
    (trained / "generations-val.jsonl").write_text(
        Path("out/earlier/tiny-1/generations-val.jsonl").read_text())
    (trained / "accuracy-val.json").write_text(summary)
    run()
    printed = capsys.readouterr().out
    assert "generations-val.jsonl holds" not in printed and "moved the answers" in printed
    assert len((trained / "earlier/generations-val-1.jsonl").read_text().splitlines()) == 21
    assert json.loads((trained / "accuracy-val.json").read_text())["provenance"]["step"] == 3
    assert (trained / "earlier/accuracy-val-1.json").read_text() == summary


def test_a_file_called_as_a_split_is_another_set_of_questions(trained, capsys):
    """So even if it holds the very same rows."""
    rows = [json.dumps(row) + "\n" for row in sums(100)]
    Path("train.jsonl").write_text("".join(rows))
    run("--split=train", "--n=3")
    about = (trained / "generations-train-first-3.jsonl").read_text().splitlines()[0]
    digest = json.loads(about)["questions_sha256"]
    run("--file=train.jsonl", "--n=3")
    about = (trained / "generations-train-first-3.jsonl").read_text().splitlines()[0]
    assert json.loads(about)["questions"] == "train.jsonl"
    assert json.loads(about)["questions_sha256"] == digest
    assert "moved the answers of another evaluation" in capsys.readouterr().out


def test_a_file_is_read_as_the_runs_own_and_held_against_train(tmp_path, monkeypatch, capsys):
    """By the run's fields, without its groups; a table too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda folder: None)
    Path("own").mkdir()
    for name, rows in (("train", sums(100)), ("val", sums(20, 500))):
        lines = [json.dumps({"q": row["question"], "a": row["answer"], "who": i // 2}) + "\n"
                 for i, row in enumerate(rows)]  # fmt: skip
        Path("own", f"{name}.jsonl").write_text("".join(lines))
    train.main([*TINY, "--dataset=own", "--fields=q:a", "--group=who", "--out_dir=out/own"])
    trained, asked = {row["question"] for row in sums(100)}, sums(4) + sums(6, 900)
    n = sum(row["question"] in trained for row in asked)
    lines = [f'"{row["question"].upper()}","{row["answer"]}"\n' for row in asked]
    Path("asked.csv").write_text("q,a\n" + "".join(lines))
    capsys.readouterr()
    run("out/own", "--file=asked.csv")
    assert n < 10 and f"{n} of 10 questions of asked.csv are in train" in capsys.readouterr().out


def test_runs_are_compared_on_the_same_rows(trained, tiny_run, capsys):
    tiny_run(out_dir="out/other", seed=2)
    capsys.readouterr()
    run("out/tiny", "out/other", "--n=10")
    out = capsys.readouterr().out
    assert "other against tiny" in out and "McNemar p = 1" in out  # both know nothing
    assert json.loads(Path("out/other/accuracy-val-first-10.json").read_text())["n"] == 10


def test_runs_are_compared_by_one_rule(trained, tiny_run):
    """A file of pairs is scored by the first run's rule, however the others' data are scored."""
    tiny_run(out_dir="out/other", seed=2, score="string")
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(5, 900)))

    def rules(*names):
        run(*(f"out/{name}" for name in names), "--file=mine.jsonl")
        found = [json.loads(Path("out", name, "accuracy-mine.json").read_text()) for name in names]
        return [results["provenance"]["score"] for results in found]

    assert rules("other") == ["string"]  # by itself
    assert rules("tiny", "other") == ["number", "number"]


def made(name, records, digest="same", n=4):
    return {"run": name, "questions_sha256": digest, "n": n}, records


def right(*rows, targets="abcd"):
    return [{"row": i, "target": target, "exact": i in rows} for i, target in enumerate(targets)]


def test_a_comparison_counts_where_only_one_is_right():
    line = evaluate.comparison(made("a", right(0, 1)), made("b", right(1, 2, 3)))
    assert line == ("b against a: right where it was wrong 2, wrong where it was right 1, "
                    "McNemar p = 1")  # fmt: skip
    # Rows that were too long for one of them are wrong there, and no other question.
    line = evaluate.comparison(made("a", right(0, 1)[1:]), made("b", right(0, 1)))
    assert "right where it was wrong 1, wrong where it was right 0" in line


@pytest.mark.parametrize("other", [
    made("b", right(0), digest="other"), made("b", right(0)[:3], n=3),
    made("b", right(0, targets="abce")),  # as when one answers with the number alone
])  # fmt: skip
def test_runs_that_answered_other_questions_are_not_compared(other, capsys):
    line = error_line(capsys, evaluate.comparison, made("a", right(0, 1)), other)
    assert "b answered other questions than a" in line


def test_runs_with_other_right_answers_are_not_compared(trained, tiny_run, capsys):
    tiny_run(out_dir="out/other", answer_view="final")
    line = error_line(capsys, run, "out/tiny", "out/other", "--n=3", "--max_new_tokens=2")
    assert "other answered other questions than tiny" in line


def test_a_file_of_pairs(trained, capsys):
    rows = [*sums(5, 900), {"question": "Too long? " * 40, "answer": "#### 1"}]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--file=mine.jsonl", "--score=number")
    results = json.loads((trained / "accuracy-mine.json").read_text())
    assert (results["n"], results["left_out"]) == (6, 1)  # what was not answered is wrong
    said = capsys.readouterr().out
    assert "1 of 6 questions are longer, with their answer, than block_size=64" in said
    [head, row] = said.rstrip().splitlines()[-2:]
    assert head.split()[:4] == ["run", "n", "left", "out"] and row.split()[:3] == ["tiny", "6", "1"]


def longest(rows, tokenizer):
    return max(len(ids) for ids in tokenizer.encode([row["answer"] for row in rows])) + 1


def test_a_target_longer_than_any_of_train_can_be_right(trained, monkeypatch, capsys):
    """The longest of what is asked limits the answers too; both lengths are said."""
    long = {"question": "Count?", "answer": "one, two, three, four, five, six\n#### 6"}
    rows = [*sums(3, 900), long]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []
    monkeypatch.setattr(evaluate, "answer", lambda asking, pairs, examples, choose: (
        asked.append(asking) or answer(asking, pairs, examples)))  # fmt: skip
    run("--file=mine.jsonl")
    tokenizer = asked[0].tokenizer
    known, long = longest(sums(100), tokenizer), longest(rows, tokenizer)
    assert asked[0].max_new_tokens == long > known
    said = capsys.readouterr().out
    assert f"answers of at most {long} tokens" in said
    assert f"longest answer of train has {known}, of those asked {long}" in said
    run("--file=mine.jsonl", "--n=3")  # the first three are no longer than train's
    assert asked[-1].max_new_tokens == known
    capsys.readouterr()
    run("--file=mine.jsonl", f"--max_new_tokens={known}")
    said = capsys.readouterr().out
    assert f"1 of 4 right answers are longer than max_new_tokens={known}" in said


def test_references_without_a_number_are_counted(trained, capsys):
    rows = [*sums(4, 900), {"question": "When?", "answer": "#### 2021-05-03"},
            {"question": "Sure?", "answer": "#### yes"}]  # fmt: skip
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--file=mine.jsonl")  # scored as the run's data are
    assert "2 of 6 references hold no number: never right" in capsys.readouterr().out
    Path("none.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    line = error_line(capsys, run, "--file=none.jsonl", "--score=number")
    assert "none of 2 answers" in line and "--score=string" in line
    run("--file=none.jsonl", "--score=string")
    assert "hold no number" not in capsys.readouterr().out


def test_scoring_is_the_checkpoints(trained, monkeypatch):
    """Decided once, by train; what would be decided today does not count."""
    about = torch.load(trained / "ckpt.pt")["provenance"]["data"]
    assert about["scoring"] == "number"
    assert about["scoring_by"] == "a number follows the #### of 100 of 100 answers of train"
    monkeypatch.setattr(data, "scoring_of", lambda *args: {"scoring": "string", "scoring_by": ""})
    for given, scoring in (((), "number"), (("--score=string",), "string")):
        run("--n=2", *given)
        results = json.loads((trained / "accuracy-val-first-2.json").read_text())
        assert results["provenance"]["score"] == scoring
    train.main([*TINY, "--max_iters=8", "--init_from=resume"])
    assert torch.load(trained / "ckpt.pt")["provenance"]["data"]["scoring"] == "number"


def test_a_question_too_long_keeps_its_place_and_is_wrong(trained, tiny_run, capsys):
    """In the numbers of rows, in the first n, and beside a run whose context is long enough."""
    rows = [{"question": "Too long? " * 40, "answer": "#### 1"}, *sums(5, 900)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--file=mine.jsonl", "--n=3")
    records = run_records(trained / "generations-mine-first-3.jsonl")
    assert {r["row"]: r["prompt"] for r in records} == {i: rows[i]["question"] for i in (1, 2)}
    results = json.loads((trained / "accuracy-mine-first-3.json").read_text())
    assert (results["n"], results["left_out"]) == (3, 1)
    tiny_run(out_dir="out/long", block_size=512)
    capsys.readouterr()
    run("out/tiny", "out/long", "--file=mine.jsonl", "--max_new_tokens=4")
    assert "long against tiny" in capsys.readouterr().out
    assert len(run_records(Path("out/long/generations-mine.jsonl"))) == 6


def run_records(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_a_missing_answer_is_a_wrong_one():
    ours = [{"row": i, "exact": i < 3} for i in range(5)]
    theirs = [{"row": i, "exact": True} for i in (4, 1)]
    assert evaluate.mcnemar_counts(ours, theirs) == (2, 1)


def test_answers_of_other_code_are_given_anew(trained, monkeypatch, capsys):
    """Its rule for what is right may be another one, too."""
    run()
    versions = evaluate.versions()
    monkeypatch.setattr(evaluate, "versions", lambda: {**versions, "commit": "of today"})
    run()
    assert "moved the answers of another evaluation" in capsys.readouterr().out
    results = json.loads((trained / "accuracy-val.json").read_text())
    assert results["provenance"]["commit"] == "of today"
    assert json.loads((trained / "earlier/accuracy-val-1.json").read_text())["provenance"][
        "commit"] == versions["commit"]  # fmt: skip


def test_validation_that_came_out_of_train_is_answered_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *paths: None)
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(60)))
    train.main([*TINY, "--dataset=sums.jsonl", "--eval_pairs=6"])
    run("--score=regex")
    results = json.loads(Path("out/tiny/accuracy-val.json").read_text())
    assert results["n"] == 6 and results["equivalent"] >= results["exact"]


def test_several_answers_to_each_question(trained, tiny_run, capsys):
    run("--samples=3", "--judge=5")
    path = trained / "accuracy-val-best-of-4-judge-5.json"
    about = json.loads(path.read_text())["provenance"]
    assert (about["samples"], about["judge"], about["temperature"]) == (3, 5, 0.7)
    tiny_run(jepa_weight=0, spread="none", spread_weight=0, out_dir="out/plain")
    capsys.readouterr()
    run("out/plain", "--samples=3", "--judge=5")
    assert "its cosines judge nothing" in capsys.readouterr().out
    assert Path("out/plain/accuracy-val-best-of-4-judge-0.json").exists()
    assert "samples=0 gives none" in error_line(capsys, run, "--judge=5")
    assert "samples=-1" in error_line(capsys, run, "--samples=-1")


def test_mistakes_are_one_line(trained, capsys):
    assert "no test split" in error_line(capsys, evaluate.main, ["--device=cpu"])
    assert "split=all" in error_line(capsys, run, "--split=all")
    assert "score=bleu" in error_line(capsys, run, "--score=bleu")
    assert "nowhere.jsonl" in error_line(capsys, run, "--file=nowhere.jsonl")
    assert "no checkpoint" in error_line(capsys, run, "out/none")


def test_training_logs_answers_when_asked(tiny_run):
    tiny_run(eval_answers=10)
    logged = [json.loads(line) for line in Path("out/tiny/metrics.jsonl").read_text().splitlines()]
    evaluations = [r for r in logged if "val_ce" in r]
    assert len(evaluations) == 2
    assert all(0 <= r["val_exact"] <= r["val_contains"] <= 1 for r in evaluations)
    asked = torch.load("out/tiny/ckpt.pt")["model"]
    tiny_run()  # asking changed nothing else
    plain = torch.load("out/tiny/ckpt.pt")["model"]
    assert all(torch.equal(asked[k], plain[k]) for k in plain)


def test_a_run_may_be_named_as_train_spells_it(trained, tiny_run, capsys):
    """As --out_dir, alone or beside others; without a name it is the newest."""
    tiny_run(out_dir="out/other", seed=2)
    run("--out_dir=out/tiny", "--n=4", "--max_new_tokens=2")
    assert (trained / "accuracy-val-first-4.json").exists()
    assert not Path("out/other/accuracy-val-first-4.json").exists()
    capsys.readouterr()
    run("out/other", "--out_dir=out/tiny", "--n=4", "--max_new_tokens=2")
    assert "tiny against other" in capsys.readouterr().out
    run("--n=5", "--max_new_tokens=2")
    assert Path("out/other/accuracy-val-first-5.json").exists()
    assert "no checkpoint" in error_line(capsys, run, "--out_dir=out/none")


@pytest.mark.parametrize("seconds, eta", [
    (59.4, "0:59"), (59.7, "1:00"), (119.6, "2:00"), (60.2, "1:00"), (3599.9, "60:00"),
])  # fmt: skip
def test_the_time_left_has_no_sixtieth_second(seconds, eta, trained, monkeypatch, capsys):
    """The first half of the questions takes `seconds`, and so will the other."""
    times = iter([0.0, seconds, 2 * seconds])
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(time=lambda: next(times)))
    run("--n=4", "--batch_size=2", "--max_new_tokens=1")
    assert re.findall(r"ETA (.*)", capsys.readouterr().out) == [eta, "0:00"]


@pytest.mark.parametrize("views, instead", [
    ("split", "eval_alignment.py"), ("facts", "lab.reversal"),
])  # fmt: skip
def test_what_asks_no_question_is_not_evaluated(views, instead, capsys):
    asked = SimpleNamespace(path="out/tiny/ckpt.pt", config=Config(views=views))
    line = error_line(capsys, evaluate.refuse_or_adapt, asked, evaluate.Args())
    assert f"views={views}" in line and instead in line
    steps = SimpleNamespace(path="out/tiny/ckpt.pt", config=Config(views="steps"))
    line = error_line(capsys, evaluate.refuse_or_adapt, steps, evaluate.Args(samples=2))
    assert "samples=2" in line and "views=steps" in line
