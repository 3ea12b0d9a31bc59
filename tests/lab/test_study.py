"""The study's arms are sound, its statistics right, and it runs from end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import error_line, sums

import study


def test_every_arm_is_a_config_and_has_a_folder_of_its_own():
    for seeds, arms in study.STAGES.values():
        cells = [study.make_cell(Path("out"), arm, {**study.BASE, **options}, seed)
                 for arm, options in arms.items() for seed in seeds]  # fmt: skip
        assert len({cell.folder for cell in cells}) == len(cells) == len(arms) * len(seeds)
        for cell in cells:
            assert f"--seed={cell.config.seed}" in cell.command


@pytest.mark.parametrize("t, n, p", [
    (2.776445, 5, 0.05), (4.604095, 5, 0.01), (2.262157, 10, 0.05), (0.0, 5, 1.0),
    (8.610302, 5, 0.001),
])  # fmt: skip
def test_paired_t_gives_the_tables_values(t, n, p):
    noise = np.resize([1.0, -1.0], n) - np.resize([1.0, -1.0], n).mean()
    noise /= noise.std(ddof=1) / np.sqrt(n)
    reference = np.linspace(0.3, 0.9, n)
    assert study.paired_t(reference + noise + t, reference) == pytest.approx(p, abs=1e-5)
    assert study.paired_t(reference - noise - t, reference) == pytest.approx(p, abs=1e-5)


def test_equal_differences_need_no_density():
    assert study.paired_t([0.5, 0.6], [0.5, 0.6]) == 1
    assert study.paired_t([1.5, 2.5], [0.5, 1.5]) == 0


def test_a_stage_runs_to_its_table_and_picks_up_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(120)))
    tiny = dict(n_layer=1, n_head=1, n_embd=32, max_iters=4, eval_interval=2, bpe_vocab_size=320,
                eval_pairs=12, eval_answers=8, train_rows=64, device="cpu")  # fmt: skip
    arms = {"λ 0": dict(jepa_weight=0.0), "cosine λ 1": dict(jepa_weight=1.0)}
    monkeypatch.setitem(study.STAGES, "tiny", ((0,), {k: {**tiny, **v} for k, v in arms.items()}))
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

    rows = [*sums(120), *sums(9, 5000)]  # all of the first were trained on or held out
    Path("more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for questions in ("val", "more.jsonl"):
        study.main(["tiny", "--dataset=sums.jsonl", f"--ask={questions}"])
        table = f"of {questions} | n | exact | prefix | stopped | equivalent | p |"
        assert table in capsys.readouterr().out
    study.main(["tiny", "--dataset=sums.jsonl", "--ask=val", "--samples=2", "--judge=3"])
    assert "of val, best of 3, judge 3 |" in capsys.readouterr().out
    new = [json.loads(line) for line in (folder / "new-more.jsonl").read_text().splitlines()]
    options = {**study.BASE, **tiny, "dataset": "sums.jsonl"}
    data = study.load_data(study.make_cell(folder, "λ 0", options, 0).config)
    known = {data.tokenizer.decode(data.pairs[split].view(row, study.CODE))
             for split in ("train", "val") for row in range(len(data.pairs[split]))}  # fmt: skip
    asked = {row["messages"][-1]["content"] for row in new}
    assert 9 <= len(new) < 129 - 64 - 12 and not known & asked
    assert [message["role"] for message in new[0]["messages"]] == ["user", "assistant"]

    made = folder / "cosine_lambda_1-0" / "config.json"
    about = json.loads(made.read_text())
    about["provenance"]["data"]["train_sha256"] = "of other rows"
    made.write_text(json.dumps(about))
    assert "different data" in error_line(capsys, study.main, ["tiny", "--dataset=sums.jsonl"])
    shutil.rmtree(made.parent)  # an arm that cannot be trained: the other still has its row
    arms["cosine λ 1"] = dict(device="cuda:99")
    monkeypatch.setitem(study.STAGES, "tiny", ((0,), {k: {**tiny, **v} for k, v in arms.items()}))
    with pytest.raises(SystemExit) as exit_:
        study.main(["tiny", "--dataset=sums.jsonl"])
    assert exit_.value.code == 1 and "| λ 0 | 1 |" in capsys.readouterr().out


def test_mistakes_are_one_line(capsys):
    assert "coarse" in error_line(capsys, study.main, [])
    assert "coarse" in error_line(capsys, study.main, ["fine"])
    assert "unknown key" in error_line(capsys, study.main, ["coarse", "--datset=x"])
    assert "jobs" in error_line(capsys, study.main, ["coarse", "--jobs=many"])
    for own in ("seed=7", "init_from=resume", "jepa_weight=.1"):
        assert "coarse sets" in error_line(capsys, study.main, ["coarse", f"--{own}"])
    assert "eval_answers=0" in error_line(capsys, study.main, ["coarse", "--eval_answers=0"])
    for wrong in ("ask=nowhere.jsonl", "ask=train", "ask=test"):  # before anything is trained
        args = ["coarse", f"--{wrong}", "--dataset=pairs.jsonl"]
        assert wrong[4:8] in error_line(capsys, study.main, args)
    assert "--ask=val" in error_line(capsys, study.main, ["coarse", "--samples=2"])
    assert "samples=0" in error_line(capsys, study.main, ["coarse", "--ask=val", "--judge=2"])
