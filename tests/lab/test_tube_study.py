"""The plan of the tube's study: what it sets aside, what it compares, and from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import error_line, sums

import lab.tube_study as study
import train
from lab.sweep import result_of
from plumbing.files import read_json, read_records, sha256_of
from plumbing.stats import paired_interval

TINY = dict(n_layer=1, n_head=1, n_embd=32, bpe_vocab_size=320, eval_pairs=12, eval_answers=8,
            batch_size=8, device="cpu", system_prompt="drop")  # fmt: skip


def write_pairs(rows, name="sums.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with 120 sums, and a plan of few and tiny runs, which this process trains itself."""
    monkeypatch.chdir(tmp_path)
    write_pairs(sums(120))
    few = ("λ = 0", "tube, InfoNCE", "the paper's")
    for name, value in dict(
        BASE=TINY, ARMS={arm: study.ARMS[arm] for arm in few}, N_TEST=20, N_VAL=12,
        RATES=(1e-3, 2e-3), RATE_STEPS=2, LENGTHS=(3, 4), SEEDS=range(2), FRESH_SEEDS=range(5, 7),
    ).items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(train, "plot_losses", lambda folder: None)
    begun = []

    def train_cells(cells, jobs):
        for cell in cells:
            if not result_of(cell):
                begun.append(cell.folder)
                train.main([*cell.command])

    monkeypatch.setattr(study, "train_cells", train_cells)
    return begun


RUN = ["--dataset=sums.jsonl"]


def test_every_arm_differs_from_the_plain_one_in_its_objective_alone():
    free = {"recipe", "out_dir", "objective", "jepa_weight", "jepa_loss", "jepa_dropout", "n_pred",
            "jepa_warmup_iters", "spread", "spread_weight"}  # fmt: skip
    one = study.Study(Path("out/x"), Path("out/x/data"), 1, {})
    cells = {arm: study.make(one, "rates", arm, 600, 1e-3, 1) for arm in study.ARMS}
    assert len({cell.folder for cell in cells.values()}) == len(cells) == 6
    plain = vars(cells[study.PLAIN].config)
    assert plain["jepa_weight"] == 0 and plain["eval_interval"] == plain["max_iters"] == 600
    for arm, cell in cells.items():
        assert {k for k, v in vars(cell.config).items() if v != plain[k]} <= free, arm
    of = {arm: cell.config for arm, cell in cells.items() if arm != study.PLAIN}
    assert {arm: (c.objective, c.jepa_loss, c.jepa_weight, c.jepa_dropout)
            for arm, c in of.items()} == {
        "pair, InfoNCE in a quarter": ("pair", "infonce", 0.2, 0.75),
        "tube, cosine": ("tube", "cosine", 0.02, 0), "tube, InfoNCE": ("tube", "infonce", 0.05, 0),
        "bag, InfoNCE": ("bag", "infonce", 0.05, 0), "the paper's": ("pair", "cosine", 2.0, 0),
    }  # fmt: skip
    assert all(c.spread == "none" and not c.jepa_warmup_iters for c in of.values())
    assert of["the paper's"].n_pred == 3
    assert not {*study.SEEDS} & {*study.FRESH_SEEDS} and len(study.FRESH_SEEDS) == 10
    assert study.RATE_SEED not in (*study.SEEDS, *study.FRESH_SEEDS) and len(study.SEEDS) == 5
    assert len(study.RATES) == 3


def test_whole_questions_are_set_aside_and_the_same_ones_in_every_process(small, monkeypatch):
    rows = sums(100)
    rows += [{**row, "answer": f"again {row['answer']}"} for row in rows[:30]]  # asked twice
    write_pairs(rows)
    one = study.open_study(study.Options("sums.jsonl", out_dir="out/x"))
    about = one.found["plan"]["split"]
    found = {split: read_records(Path("out/x") / where) for split, where in (
        ("test", "test.jsonl"), ("val", "sums/val.jsonl"), ("train", "sums/train.jsonl"))}
    assert {split: len(some) for split, some in found.items()} == {
        split: about[split]["rows"] for split in found}  # fmt: skip
    assert sum(map(len, found.values())) == 130
    assert 20 <= len(found["test"]) <= 21 and 12 <= len(found["val"]) <= 13
    questions = {split: {row["text"] for row in some} for split, some in found.items()}
    assert not questions["test"] & questions["val"] | questions["train"] & questions["val"]
    assert not questions["test"] & questions["train"]
    assert not (Path("out/x/sums") / "test.jsonl").exists()  # training does not meet it
    # Keys of questions are other numbers in every process.
    real = study.questions_of
    monkeypatch.setattr(study, "questions_of", lambda rows: real(rows) * np.int64(-7919))
    assert study.in_three(Path("sums.jsonl"))[1] == about
    assert all(sha256_of(Path("out/x") / where) == about[split]["sha256"] for split, where in (
        ("test", "test.jsonl"), ("val", "sums/val.jsonl"), ("train", "sums/train.jsonl")))


def test_it_runs_stage_by_stage_and_then_only_tells(small, monkeypatch, capsys):
    for stage, before in (("lengths", "rates"), ("confirm", "lengths")):
        line = error_line(capsys, study.main, [stage, *RUN])
        assert f"{stage} builds on {before}" in line and not small
    study.main(["rates", *RUN])
    assert len(small) == 6 and not Path("out/tube-study/tube_study.png").exists()
    monkeypatch.setattr(study, "evaluate", None)  # nobody asks the test yet
    study.main(["lengths", *RUN])
    assert len(small) == 6 + 3 * 2 + 2 * 2


@pytest.fixture
def finished(small, capsys):
    """A whole study; what it said, and what it holds."""
    study.main(RUN)
    return capsys.readouterr().out, read_json(Path("out/tube-study/results.json"))


def test_the_whole_plan(finished, small, capsys, monkeypatch):
    said, found = finished
    assert len(small) == 6 + 6 + 4 + 4  # rates; the short length; the long one; fresh seeds
    for arm, of in found["rates"].items():
        best = max(of["val_exact"].items(), key=lambda item: item[1])
        assert of["val_exact"][str(of["rate"])] == best[1] and of["edge"]
        assert of["tflop_per_step"] > 0, arm

    # equal operations, in fewer steps where a step costs more
    per_step = {arm: of["tflop_per_step"] for arm, of in found["rates"].items()}
    assert per_step["the paper's"] > 1.2 * per_step["λ = 0"]
    configs = [read_json(folder / "config.json")["config"] for folder in small]
    for config in configs:
        if "lengths" in config["out_dir"]:
            [arm] = [a for a in study.ARMS if study.ARMS[a].recipe == config["recipe"]]
            steps = {round(n * per_step["λ = 0"] / per_step[arm]) for n in (3, 4)}
            assert config["max_iters"] in steps
            assert config["learning_rate"] == found["rates"][arm]["rate"]
    seeds = [{c["seed"] for c in configs if stage in c["out_dir"]}
             for stage in ("/rates/", "/lengths/", "/confirm/")]  # fmt: skip
    assert seeds == [{100}, {0, 1}, {5, 6}]

    # the contrast is the largest lead on validation
    runs = found["lengths"]["runs"]
    means = {(arm, n): sum(run["val_exact"] for run in some) / 2
             for n, of in runs.items() for arm, some in of.items()}  # fmt: skip
    ahead = {at: mean - means["λ = 0", at[1]] for at, mean in means.items() if at[0] != "λ = 0"}
    contrast = found["lengths"]["contrast"]
    assert contrast["lead"] == pytest.approx(max(ahead.values()))
    assert ahead[contrast["arm"], str(contrast["length"])] == pytest.approx(contrast["lead"])
    assert {*runs["4"]} == {"λ = 0", max(("tube, InfoNCE", "the paper's"),
                                        key=lambda arm: ahead[arm, "3"])}  # fmt: skip

    # the test is asked by the fresh seeds of two arms, and by nobody else
    asked = sorted(Path("out/tube-study").glob("*/*/accuracy-test.json"))
    assert len(asked) == 4 and {path.parent.parent.name for path in asked} == {"confirm"}
    confirmed = found["confirm"]
    exact = {arm: [run["exact"] for run in of] for arm, of in confirmed["test"].items()}
    assert all(run["n"] == 20 for of in confirmed["test"].values() for run in of)
    plain, ours = exact["λ = 0"], exact[contrast["arm"]]
    assert confirmed["interval"] == pytest.approx(list(paired_interval(ours, plain)))
    assert confirmed["verdict"] in ("gain", "no gain", "undecided")

    plan, made = found["plan"], found["provenance"]
    assert plan["split"]["train"]["rows"] == 88 and len(made["commits"]) == 1
    assert made["command"] == "--dataset=sums.jsonl" and made["torch"]
    assert Path("out/tube-study/tube_study.png").stat().st_size > 10_000
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 and {line.count("|") - 1 for line in table} == {5}
    assert "20 test questions, asked once" in said and "the best at an edge" in said

    # the same command trains and asks nothing more, and says the same
    monkeypatch.setattr(study, "evaluate", None)
    study.main(RUN)
    assert len(small) == 20
    again = capsys.readouterr().out
    assert said[said.index("\n| arm") :] == again[again.index("\n| arm") :]

    # neither with other rows, nor with another plan; the test stays what it was
    write_pairs(sums(119))
    assert "other rows (split)" in error_line(capsys, study.main, RUN)
    assert sha256_of(Path("out/tube-study/test.jsonl")) == plan["split"]["test"]["sha256"]
    write_pairs(sums(120))
    monkeypatch.setattr(study, "SEEDS", range(3))
    assert "another plan or on other rows (seeds)" in error_line(capsys, study.main, RUN)


def test_it_goes_on_where_it_was_stopped(small, monkeypatch, capsys):
    """Between two runs, and between two that are asked the test."""
    real, n_trained = train.main, []

    def stop_at(n):
        def main(argv):
            if len(n_trained) == n:
                raise KeyboardInterrupt
            n_trained.append(argv)
            real(argv)

        monkeypatch.setattr(train, "main", main)

    for n in (4, 14):
        stop_at(n)
        with pytest.raises(KeyboardInterrupt):
            study.main(RUN)
        monkeypatch.setattr(study, "SEEDS", range(3))  # the plan was recorded before the first run
        assert "another plan" in error_line(capsys, study.main, RUN)
        monkeypatch.setattr(study, "SEEDS", range(2))
    assert "lengths" not in read_json(Path("out/tube-study/results.json"))
    stop_at(99)
    ask, n_asked = study.evaluate, []

    def evaluate(*args):
        if len(n_asked) == 2:
            raise KeyboardInterrupt
        n_asked.append(args)
        return ask(*args)

    monkeypatch.setattr(study, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        study.main(RUN)
    monkeypatch.setattr(study, "evaluate", ask)
    study.main(RUN)
    assert len(n_trained) == 20  # each run once
    assert "confirm" in read_json(Path("out/tube-study/results.json"))


def test_a_rate_that_diverges_is_no_choice_and_no_end(small, monkeypatch):
    real = study.train_cells

    def train_cells(cells, jobs):
        for cell in cells:
            if "rate-0.002" in cell.folder.name and "lambda" in cell.folder.name:
                cell.folder.mkdir(parents=True, exist_ok=True)
                (cell.folder / "log.txt").write_text("... a lower learning_rate may help\n")
            else:
                real([cell], jobs)

    monkeypatch.setattr(study, "train_cells", train_cells)
    study.main(["rates", *RUN])
    found = read_json(Path("out/tube-study/results.json"))["rates"]
    assert found["λ = 0"]["rate"] == 0.001 and [*found["λ = 0"]["val_exact"]] == ["0.001"]


def test_a_run_that_fails_ends_the_stage(small, monkeypatch, capsys):
    monkeypatch.setattr(study, "train_cells", lambda cells, jobs: [
        (cell.folder.mkdir(parents=True), (cell.folder / "log.txt").write_text("disk full"))
        for cell in cells])  # fmt: skip
    assert "6 runs failed" in error_line(capsys, study.main, ["rates", *RUN])
    assert "rates" not in read_json(Path("out/tube-study/results.json"))


@pytest.mark.parametrize("difference, verdict, says", [
    (0.05, "gain", "*** A GAIN ***"), (-0.02, "no gain", "NO GAIN: the interval lies below +2"),
    (0.012, "undecided", "UNDECIDED"),
])  # fmt: skip
def test_verdicts_are_said_as_the_plan_has_them(difference, verdict, says, monkeypatch):
    """Ten seeds which differ by a point from their mean, or by four in the last case."""
    noise = np.resize([0.01, -0.01], 10) if verdict != "undecided" else np.resize([0.04, -0.04], 10)
    panel = dict(val_matched=0.8, val_mismatched=0.1, val_retrieval_at_1=0.5)

    def answers(value):
        return [dict(n=2000, exact=v, prefix=v, stopped=1.0, equivalent=v) for v in value]

    test = {"λ = 0": answers(0.6 + 0 * noise), "tube, cosine": answers(0.6 + difference + noise)}
    ours, plain = ([run["exact"] for run in test[arm]] for arm in ("tube, cosine", "λ = 0"))
    low, high = paired_interval(ours, plain)
    assert verdict == ("gain" if low > 0 else "no gain" if high < study.WORTH else "undecided")
    lines = study.in_words({
        "arm": "tube, cosine", "length": 1000, "test": test, "interval": [low, high], "p": 0.03,
        "difference": difference, "smallest": 0.017, "verdict": verdict,
        "validation": {"tube, cosine": [panel] * 10}})  # fmt: skip
    assert says in "\n".join(lines)
    assert ("Still to be run" in lines[-1] and "0.80" in lines[-2]) == (verdict == "gain")


def test_no_arm_and_no_rate_is_left_out_of_the_leads():
    runs = {n: {arm: [dict(val_exact=v), dict(val_exact=v + 0.1)] for arm, v in of.items()}
            for n, of in ((600, {"λ = 0": 0.5, "a": 0.6, "b": 0.4}),
                          (2000, {"λ = 0": 0.7, "b": 0.71}))}  # fmt: skip
    found = study.leads(runs)
    assert found == pytest.approx({("a", 600): 0.1, ("b", 600): -0.1, ("b", 2000): 0.01})


@pytest.mark.parametrize("argv, says", [
    ([], "dataset=''"), (["nonsense", *RUN], "rates, lengths, confirm"),
    (["rates", "confirm", *RUN], "one stage"), ([*RUN, "--jobs=0"], "jobs=0"),
    (["--dataset=nowhere.jsonl"], "nowhere.jsonl"), (["--dataset=few.jsonl"], "leave none"),
])  # fmt: skip
def test_mistakes_are_one_line(small, capsys, argv, says):
    write_pairs(sums(25), "few.jsonl")
    assert says in error_line(capsys, study.main, argv)
