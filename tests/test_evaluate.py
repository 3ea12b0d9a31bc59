"""Scores, intervals and the evaluation of a whole split."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, error_line, sums

import evaluate
import train
from config import Config
from evaluate import answer, best, judged, mcnemar, number, score, wilson
from model import GPT
from tokenizer import train_tokenizer
from views import tokenize

NUMBERS = [
    ("5+3=8\n#### 8", 8), ("#### 1,234", 1234), ("#### $1,234,567", 1234567), ("#### -7", -7),
    ("#### -$7", -7), ("#### 3.50", 3.5), ("#### .5", 0.5), ("#### 42 apples", 42),
    ("#### 12%", 12), ("####8", 8), ("#### 3\n#### 4", 4), ("#### 18.\nSo it is 20", 18),
    ("#### 0", 0), ("#### 007", 7), ("the answer is 8", None), ("", None), ("####", None),
    ("#### none", None), ("#### 1/2", None), ("8 ####", None), ("#### 8 ####", None),
    ("#### 3.5/2", None),
]  # fmt: skip


@pytest.mark.parametrize("text, value", NUMBERS)
def test_the_number_after_the_last_mark(text, value):
    assert number(text) == (None if value is None else pytest.approx(value))


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
    assert score(output, target, kind) == {"exact": exact, "prefix": prefix}


def test_another_spelling_of_a_regex_is_equivalent_but_not_exact():
    scores = score("([0-9])|([a-z])", "([a-z])|([0-9])", "regex")
    assert scores == {"exact": False, "prefix": False, "equivalent": True}
    assert not score("([0-9])|([A-Z])", "([a-z])|([0-9])", "regex")["equivalent"]
    assert not score("((((", "([a-z])|([0-9])", "regex")["equivalent"]
    assert score("((((", "((((", "regex")["equivalent"]  # the very string


def test_wilson_interval():
    """Against the roots of its definition: |share - p| = z sqrt(p (1 - p) / n)."""
    for count, n in ((0, 10), (3, 10), (10, 10), (500, 1319)):
        for p in wilson(count, n):
            gap = 1.959964 * math.sqrt(p * (1 - p) / n)
            assert abs(count / n - p) == pytest.approx(gap, abs=1e-7)
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize("only_a, only_b, p", [
    (0, 0, 1), (5, 5, 1), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 9, 2 * 11 / 1024), (3, 4, 1),
])  # fmt: skip
def test_mcnemar_is_a_fair_coin(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p)


# --- answers ----------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Answers every question from a list, or with nothing."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def generate(self, prompts, max_new_tokens, eot, temperature):
        assert not self.training and temperature == 0
        return [self.answers.get(tuple(prompt), [eot])[:max_new_tokens] for prompt in prompts]


def pairs_of(rows, **options):
    texts = [row[key] for row in rows for key in ("question", "answer")]
    tokenizer = train_tokenizer(texts, 320)
    config = Config(block_size=128, **options)
    pairs = [{"text": r["question"], "code": r["answer"], "system": r.get("system", "")}
             for r in rows]  # fmt: skip
    return tokenize(pairs, tokenizer, config)[0], tokenizer


@pytest.mark.parametrize("options", [{}, {"views": "steps"}, {"layout": "plan"}])
def test_an_oracle_scores_one_and_silence_nothing(options):
    rows = sums(20)
    pairs, tokenizer = pairs_of(rows, **options)
    known = {
        tuple(pairs.prompt(i)): pairs.view(i, 1)[pairs.asked[i] :] + pairs.view(i, 2)
        for i in range(20)
    }
    for kind in ("number", "string"):
        records = answer(Oracle(known), tokenizer, pairs, list(range(20)), 99, torch.no_grad, kind)
        assert [r["target"] for r in records] == [row["answer"] for row in rows]
        assert all(r["exact"] and r["prefix"] and r["stopped"] for r in records)
        for r in answer(Oracle({}), tokenizer, pairs, [0, 7], 99, torch.no_grad, kind):
            assert (r["output"], r["exact"], r["prefix"], r["stopped"]) == ("", False, False, True)
    cut = answer(Oracle(known), tokenizer, pairs, [3], 4, torch.no_grad, "string")[0]
    assert (cut["stop"], cut["stopped"], cut["exact"], cut["tokens"]) == ("length", False, False, 4)


def a_model(pairs):
    """Weights ten times the usual size, so that its answers differ."""
    config = replace(pairs.config, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config, pairs.vocab_size, pairs.layout.parents).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() == 2 else 1)
    return model


@pytest.mark.parametrize("options", [{}, {"labels": "all"}, {"layout": "plan"}, {"n_pred": 3}])
def test_answers_are_judged_as_each_one_is_alone(options):
    """Against a row per answer without padding: its own softmax at every token, and both views."""
    rows = [{**row, "system": "Add." * (i % 2)} for i, row in enumerate(sums(6))]
    pairs, tokenizer = pairs_of(rows, **options)
    model, k, V = a_model(pairs), pairs.config.n_pred, pairs.vocab_size
    answers = [[*tokenizer.encode([text])[0], tokenizer.eot] for text in ("1", "5+3=8\n#### 8", "")]
    of = [0, 0, 1, 2, 3, 3, 5]
    answers = [answers[i % 3] for i in range(len(of))]
    log_p, cosine = judged(model, pairs, of, answers)
    for row, ids, p, cos in zip(of, answers, log_p, cosine):
        prompt = pairs.prompt(row)
        idx = torch.tensor([prompt + ids])
        hidden = model.hidden(idx, torch.ones_like(idx))[0]
        chances = model.lm_head(hidden).log_softmax(-1)
        at = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        assert p == pytest.approx(sum(chances[i, t].item() for i, t in zip(at, ids)), abs=1e-3)
        asked = torch.tensor([pairs.view(row, 1) + [V + i for i in range(k)]])
        system = tokenizer.encode([rows[row]["system"] + "\n"])[0] if rows[row]["system"] else []
        alone = torch.tensor([system + ids])
        pred, enc = (model.hidden(view, torch.ones_like(view))[0, -1] for view in (asked, alone))
        assert cos == pytest.approx(torch.cosine_similarity(pred, enc, dim=0).item(), abs=1e-4)


@pytest.mark.parametrize("judge", [0.0, 1e6])
def test_the_best_of_several_answers(judge):
    """The likeliest, or the one nearest to the prediction, of those that ended by themselves."""
    pairs, tokenizer = pairs_of(sums(4))
    model, eot = a_model(pairs), tokenizer.eot
    texts = ["#### 1", "#### 2", "#### 3", "#### 4", "1+1=2"]
    ended = [[*ids, eot] for ids in tokenizer.encode(texts)]
    rows = [2, 0] + [2] * 3 + [0] * 3
    cut = [tokenizer.encode(["5"])[0]]
    given = [cut[0], ended[0], *ended[1:4], *ended[3:], ended[0]]
    chosen = best(model, pairs, rows, given, judge, eot)
    for row, ids in zip((2, 0), chosen):
        candidates = [a for r, a in zip(rows, given) if r == row and a[-1] == eot]
        measures = judged(model, pairs, [row] * len(candidates), candidates)
        assert ids == candidates[int(measures[bool(judge)].argmax())]
    assert best(model, pairs, [1, 1], cut * 2, judge, eot) == cut  # none ended


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
    for key in ("exact", "prefix", "stopped"):
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


def test_runs_are_compared_on_the_same_rows(trained, tiny_run, capsys):
    tiny_run(out_dir="out/other", seed=2)
    capsys.readouterr()
    run("out/tiny", "out/other", "--n=10")
    out = capsys.readouterr().out
    assert "other against tiny" in out and "McNemar p = 1" in out  # both know nothing
    assert json.loads(Path("out/other/accuracy-val-first-10.json").read_text())["n"] == 10


def test_runs_are_compared_by_one_rule(trained, tiny_run, capsys):
    """A file of pairs is scored by the first run's rule, however the others' data are scored."""
    Path("gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(60)))
    tiny_run(out_dir="out/other", dataset="gsm8k.jsonl", eval_pairs=6)  # by itself: number
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(5, 900)))
    run("out/tiny", "out/other", "--file=mine.jsonl")
    for name in ("tiny", "other"):
        about = json.loads(Path("out", name, "accuracy-mine.json").read_text())["provenance"]
        assert about["score"] == "string"


def test_a_file_of_pairs(trained, capsys):
    rows = [*sums(5, 900), {"question": "Too long? " * 40, "answer": "#### 1"}]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--file=mine.jsonl", "--score=number")
    results = json.loads((trained / "accuracy-mine.json").read_text())
    assert (results["n"], results["left_out"]) == (6, 1)  # what was not answered is wrong


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
    tiny_run(jepa_weight=0, out_dir="out/plain")
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
    assert all(0 <= r["val_exact"] <= r["val_prefix"] <= 1 for r in evaluations)
    asked = torch.load("out/tiny/ckpt.pt")["model"]
    tiny_run()  # asking changed nothing else
    plain = torch.load("out/tiny/ckpt.pt")["model"]
    assert all(torch.equal(asked[k], plain[k]) for k in plain)
