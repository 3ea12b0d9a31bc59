"""The study's arms are sound, its statistics right, and it runs from end to end."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import error_line, sums

from config import Config
from data import load_data, read_questions
from lab import study
from lab.arms import BASE, STAGES, Stage
from plumbing.files import write_lines
from plumbing.stats import paired_t
from views import CODE

TINY_ARM = dict(n_layer=1, n_head=1, n_embd=32, max_iters=4, eval_interval=2, bpe_vocab_size=320,
                eval_pairs=12, eval_answers=8, train_rows=64, device="cpu")  # fmt: skip


def tiny_stage(arms):
    """A stage of one seed whose arms train in seconds."""
    return Stage("tiny", (0,), {arm: {**TINY_ARM, **fields} for arm, fields in arms.items()})


def test_every_arm_is_a_config_and_has_a_folder_of_its_own():
    for name, stage in STAGES.items():
        cells = study.cells_of(study.parse([name]))
        folders = {cell.folder for cell in cells.values()}
        assert len(folders) == len(cells) == len(stage.arms) * len(stage.seeds)
        for (arm, seed), cell in cells.items():
            assert f"--seed={seed}" in cell.command and cell.config.seed == seed
            for key, value in {**BASE, **stage.arms[arm]}.items():
                assert getattr(cell.config, key) == value


def test_help_names_every_stage_and_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        study.main(["--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0 and said.startswith("usage: python -m lab.study STAGE")
    lines = [line.split() for line in said.splitlines()]
    for name, stage in STAGES.items():
        assert [name, *stage.summary.split()] in lines
    for option in ("jobs=int", "ask=str", "samples=int", "judge=float"):
        assert f"--{option}" in said


def test_a_stage_runs_to_its_tables_and_picks_up_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(120)))
    arms = {"λ 0": dict(jepa_weight=0.0), "cosine λ 1": dict(jepa_weight=1.0)}
    monkeypatch.setitem(study.STAGES, "tiny", tiny_stage(arms))
    monkeypatch.setattr(study, "RECIPE", "nlrx_baseline")
    study.main(["tiny", "--dataset=sums.jsonl", "--jobs=2"])
    folder = Path("out/study-tiny")
    results = json.loads((folder / "results.json").read_text())
    assert set(results["arms"]) == set(arms) and results["provenance"]["data"]["train_rows"] == 64
    for arm in results["arms"].values():
        assert arm["step"] == [[2, 4]] and len(arm["val_exact"][0]) == 2
    assert (folder / "study.png").stat().st_size > 10_000
    first = capsys.readouterr().out
    study.main(["tiny", "--dataset=sums.jsonl"])
    again = capsys.readouterr().out
    assert again.count("was finished") == 2
    assert first[first.index("| arm") :] == again[again.index("| arm") :]
    tables = first[first.index("| arm") :].split("\n\n")
    assert len(tables) == 2 and "TFLOP" in tables[0] and "retrieval@1" in tables[1]
    for table in tables:  # Markdown, narrow enough for a page
        table = [line for line in table.splitlines() if line.startswith("|")]
        [columns] = {line.count("|") - 1 for line in table}
        assert columns <= 7 and len(table) == 2 + len(arms)

    rows = [*sums(120), *sums(9, 5000)]  # all of the first were trained on or held out
    Path("more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for questions in ("val", "more.jsonl"):
        study.main(["tiny", "--dataset=sums.jsonl", f"--ask={questions}"])
        table = f"of {questions} | exact | prefix | contains | stopped | p |"
        assert table in capsys.readouterr().out
    study.main(["tiny", "--dataset=sums.jsonl", "--ask=val", "--samples=2", "--judge=3"])
    assert "of val, best of 3, judge 3 |" in capsys.readouterr().out
    new = [json.loads(line) for line in (folder / "new-more.jsonl").read_text().splitlines()]
    cells = study.cells_of(study.parse(["tiny", "--dataset=sums.jsonl"]))
    data = load_data(cells["λ 0", 0].config)
    known = {data.tokenizer.decode(pairs.view(example, CODE))
             for pairs in (data.pairs["train"], data.pairs["val"])
             for example in range(len(pairs))}  # fmt: skip
    asked = {row["code"] for row in new}
    assert 9 <= len(new) < 129 - 64 - 12 and not known & asked
    assert set(new[0]) == {"text", "code"}
    Path("some.csv").write_text("question,answer\n9 plus 9000,#### 9009\n")
    study.main(["tiny", "--dataset=sums.jsonl", "--ask=some.csv"])
    assert "on 1 of some.csv |" in capsys.readouterr().out

    path = folder / "cosine_lambda_1-0" / "config.json"
    made = json.loads(path.read_text())
    made["provenance"]["data"]["train_sha256"] = "of other rows"
    path.write_text(json.dumps(made))
    study.main(["tiny", "--dataset=sums.jsonl"])  # trained anew, and not averaged with the other
    said = capsys.readouterr().out
    assert said.count("was finished") == said.count("trained anew") == 1
    assert (folder / "earlier" / f"{path.parent.name}-1").exists()
    with monkeypatch.context() as patched:
        patched.setattr(study, "finished_of", lambda cells: {
            at: {"data_sha256": at[0]} for at in cells})  # fmt: skip
        plan = study.parse(["tiny", "--dataset=sums.jsonl"])
        assert "different data" in error_line(capsys, study.collect, plan, study.cells_of(plan))
    shutil.rmtree(path.parent)  # an arm that cannot be trained: the other still has its row
    arms["cosine λ 1"] = dict(device="cuda:99")
    monkeypatch.setitem(study.STAGES, "tiny", tiny_stage(arms))
    with pytest.raises(SystemExit) as exit_:
        study.main(["tiny", "--dataset=sums.jsonl"])
    said = capsys.readouterr().out
    assert exit_.value.code == 1 and "| arm, n = 1 |" in said
    assert said.count("| λ 0 |") == 2 and "| cosine λ 1 |" not in said


def test_new_questions_are_read_back_by_the_fields_they_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, numbers in (("known.csv", range(60)), ("more.csv", range(50, 70))):
        lines = [f"double,{i},{2 * i}\n" for i in numbers]
        Path(name).write_text("task,input,output\n" + "".join(lines))
    config = Config(dataset="known.csv", tokenizer="bpe", bpe_vocab_size=320,
                    fields="task+input:output")  # fmt: skip
    write_lines(Path("new.jsonl"), study.new_questions(Path("more.csv"), config))
    assert [pair["text"] for pair in read_questions(Path("new.jsonl"), config)] == [
        f"double\n{i}" for i in range(60, 70)]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"answer_view": "final"}, {"views": "steps_random"}])
def test_training_rows_are_no_new_questions(options, tmp_path, monkeypatch, capsys):
    """Whatever is trained on of their answers."""
    monkeypatch.chdir(tmp_path)
    write = lambda path, rows: Path(path).write_text(  # noqa: E731
        "".join(json.dumps(row) + "\n" for row in rows))  # fmt: skip

    def rows(*numbers):
        return [{"question": f"What is {i} and {i}?", "answer": f"Add {i}.\nTwice.\n#### {2 * i}"}
                for i in numbers]  # fmt: skip

    write("known.jsonl", rows(*range(60)))
    again = {"question": " what is 3  and 3?", "answer": "New.\nTwice.\n#### 77777"}
    write("more.jsonl", [*rows(*range(50, 70)), again])
    config = Config(dataset="known.jsonl", tokenizer="bpe", bpe_vocab_size=320, **options)
    new = study.new_questions(Path("more.jsonl"), config)
    assert [row["text"] for row in new] == [f"What is {i} and {i}?" for i in range(60, 70)]
    assert "10 of the 21 pairs of more.jsonl are new" in capsys.readouterr().out
    assert "nothing in it is new" in error_line(
        capsys, study.new_questions, Path("known.jsonl"), config)  # fmt: skip


def made_up(exact):
    """Results of an arm: `exact` has a curve for each seed."""
    curves = {key: [[0.5 for _ in curve] for curve in exact] for key in study.CURVES + study.PANEL}
    return {**curves, "val_exact": exact, "flops": [[1e12, 2e12] for _ in exact],
            "step": [[50, 100] for _ in exact]}  # fmt: skip


def test_the_answers_table_tests_every_arm_against_the_reference():
    results = {"λ 0": made_up([[0.1, 0.3], [0.2, 0.4], [0.3, 0.8]]),
               "arm": made_up([[0.1, 0.5], [0.2, 0.8], [0.3, 0.9]])}  # fmt: skip
    lines = study.answers_table(results, "λ 0")
    reference, arm = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    assert lines[0].startswith("| arm, n = 3 | TFLOP |")
    assert reference[:5] == ["λ 0", "2.0", "0.200 ± 0.100", "0.500 ± 0.265", ""]
    p = paired_t([0.5, 0.8, 0.9], [0.3, 0.4, 0.8])
    assert arm[3:5] == ["0.733 ± 0.208", f"{p:.2g}"]
    assert [study.nearest_to_half(steps) for steps in ([150, 300, 450, 600], [3, 6, 8])] == [1, 0]
    del results["λ 0"]  # where the reference is not finished there is nothing to test against
    assert study.answers_table(results, "λ 0")[2].split("|")[5].strip() == ""


def test_mistakes_are_one_line(capsys):
    assert "coarse" in error_line(capsys, study.main, [])
    assert "coarse" in error_line(capsys, study.main, ["fine"])
    assert "unknown key" in error_line(capsys, study.main, ["coarse", "--datset=x"])
    assert "jobs" in error_line(capsys, study.main, ["coarse", "--jobs=many"])
    for fixed in ("seed=7", "init_from=resume", "jepa_weight=.1"):
        assert "coarse sets" in error_line(capsys, study.main, ["coarse", f"--{fixed}"])
    assert "eval_answers=0" in error_line(capsys, study.main, ["coarse", "--eval_answers=0"])
    for wrong in ("ask=nowhere.jsonl", "ask=train", "ask=test"):  # before anything is trained
        args = ["coarse", f"--{wrong}", "--dataset=pairs.jsonl"]
        assert wrong[4:8] in error_line(capsys, study.main, args)
    assert "no test split" in error_line(
        capsys, study.main, ["coarse", "--ask=test", "--dataset=pairs.csv"])  # fmt: skip
    assert "--ask=val" in error_line(capsys, study.main, ["coarse", "--samples=2"])
    assert "samples=0" in error_line(capsys, study.main, ["coarse", "--ask=val", "--judge=2"])
