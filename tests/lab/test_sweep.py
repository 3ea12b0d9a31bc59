"""Claims about lab/sweep.py. A stand-in for subprocess.Popen trains nothing; one sweep is real."""

import csv
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import error_line, sums

from config import load_config
from data import split_rows
from lab import sweep
from plumbing.files import claim_run
from plumbing.jsonl import sha256_of_rows
from plumbing.processes import ROOT
from plumbing.stats import mean_sd, plus_minus
from run import FORMAT

AT = Path("out/sweep-debug")
REAL_DRAW = sweep.draw


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blank = SimpleNamespace(savefig=lambda file, **options: None)
    monkeypatch.setattr(sweep, "draw", lambda *args: blank)  # half a second each


def cells_of(*argv):
    return sweep.make_cells(*sweep.parse(list(argv))[:2])


def write_run(config, step=None, data="0" * 64, **figures):
    """What train.py leaves in a run's folder; with `step` an evaluation and a checkpoint."""
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    made_of = {"dataset": "word_problems", "train_sha256": data}
    provenance = {"commit": "abc1234", "data": made_of}
    (folder / "config.json").write_text(
        json.dumps({"config": asdict(config), "provenance": provenance}))  # fmt: skip
    measured = set(sweep.FIGURES) - {"val_exact", "tflop"}
    record = dict.fromkeys(measured, 0.5) | {"step": step, "flops": 5e11, **figures}
    lines = [{"step": 0, "ce": 1.0}] + ([record] if step else [])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if step:
        torch.save({"format": FORMAT, "model": {}, "optimizer": {}}, folder / "ckpt.pt")
        (folder / "ckpt-previous.pt").touch()


@pytest.fixture
def trainings(monkeypatch):
    """Popen is replaced: a list of the runs it was asked for.

    `trainings.fate(config)` decides on a run: its figures, or an exit code, or None for a run that
    goes on until it is terminated."""

    class Trainings(list):
        fate = staticmethod(lambda config: {})

    runs = Trainings()

    class Popen:
        def __init__(self, command, stdout, env, **options):
            assert command[1:3] == ["-u", str(ROOT / "train.py")]
            self.config = load_config(command[3:])
            self.env, self.options, self.n_terminated = env, options, 0
            self.alongside = sum(run.returncode is None for run in runs)
            runs.append(self)
            fate = runs.fate(self.config)
            if isinstance(fate, dict):
                write_run(self.config, self.config.max_iters, **fate)
            else:
                stdout.write(b"starting\nerror: no luck today\n\n")
            self.returncode = None
            self.code = {int: fate, dict: 0}.get(type(fate), 143)
            self.polls_left = float("inf") if fate is None else 0

        def poll(self):
            self.polls_left -= 1
            self.returncode = self.code if self.polls_left < 0 else None
            return self.returncode

        def terminate(self):
            self.n_terminated += 1
            self.polls_left = 3  # it takes a while to save

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(
        Popen=Popen, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT))  # fmt: skip
    monkeypatch.setattr(sweep, "time", SimpleNamespace(time=time.time, sleep=lambda s: None))
    return runs


def rows():
    with open(AT / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def exit_code(*argv):
    with pytest.raises(SystemExit) as stopped:
        sweep.main(list(argv))
    return stopped.value.code


# --- the grid ---------------------------------------------------------------------------------


def test_cells_are_the_grid_with_the_last_axis_fastest():
    cells = cells_of("debug", "--jepa_weight=0.5,1", "--max_iters=7", "--stop_grad=True,false",
                     "--seed=0,1")  # fmt: skip
    assert [cell.folder.name for cell in cells][:3] == [
        "jepa_weight=0.5,stop_grad=True,seed=0", "jepa_weight=0.5,stop_grad=True,seed=1",
        "jepa_weight=0.5,stop_grad=False,seed=0",
    ]  # fmt: skip
    assert len(cells) == 8 and {cell.folder.parent for cell in cells} == {AT}
    last = cells[-1]
    assert last.values == {"jepa_weight": 1.0, "stop_grad": False, "seed": 1}
    assert (last.config.max_iters, last.config.stop_grad, last.config.n_layer) == (7, False, 2)


def test_layers_for_adapters_are_one_value():
    argv = ["smollm2_jepa", "--lora_rank=8,16", "--lora_modules=q_proj,v_proj"]
    assert sweep.parse(argv)[1] == {"lora_rank": [8, 16], "lora_modules": ["q_proj,v_proj"]}


def test_cells_of_two_dtypes_are_said(capsys):
    once = {"commit": "a", "dtype": "float32"}
    moved = {**once, "dtype": "bfloat16", "earlier": [once, {"commit": "older"}]}
    told = sweep.of_sittings(moved, "dtype")
    assert told == "float32 AND unknown AND bfloat16"
    sweep.warn_of_dtypes([{"trained_in": "float32"}, {"trained_in": "unknown"}])
    assert capsys.readouterr().out == ""
    sweep.warn_of_dtypes([{"trained_in": "float32"}, {"trained_in": told}])
    assert "DTYPES. Runs were trained in bfloat16 and float32" in capsys.readouterr().out


def test_different_values_have_different_names():
    names = [c.folder.name for c in cells_of("debug", "--jepa_weight=1,0.1234567,0.12345671,1e-7")]
    assert names[0] == "jepa_weight=1" and len(set(names)) == 4
    paths = cells_of("gsm8k_nano", "--data_dir=/some/where,other", "--out_dir=elsewhere")
    assert [str(c.folder) for c in paths] == [
        "elsewhere/data_dir=_some_where", "elsewhere/data_dir=other"]  # fmt: skip


def test_a_finished_cell_keeps_no_optimizer(trainings):
    sweep.main(["debug", "--seed=0,1"])
    cell = cells_of("debug", "--seed=0,1")[0]
    assert torch.load(cell.folder / "ckpt.pt") == {"format": FORMAT, "model": {}}
    assert not (cell.folder / "ckpt-previous.pt").exists()


def test_train_gets_the_config_that_was_checked(trainings):
    argv = ["debug", "--learning_rate=3e-3,1e-2", "--bias=true", "--n_pred=0,2"]
    sweep.main(argv)
    assert [run.config for run in trainings] == [cell.config for cell in cells_of(*argv)]


@pytest.mark.parametrize("argv, word", [
    ([], "one recipe"),
    (["debug", "gsm8k_nano", "--seed=0,1"], "one recipe"),
    (["debu", "--seed=0,1"], "no recipe debu"),
    (["debug"], "nothing to sweep"),
    (["debug", "--seed=1"], "nothing to sweep"),
    (["debug", "--seed=0,x"], "seed"),
    (["debug", "--seed=0,"], "seed"),
    (["debug", "--n_layers=0,1"], "did you mean n_layer"),
    (["debug", "--seed=0,0"], "twice"),
    (["debug", "--jepa_weight=1,1.0"], "twice"),
    (["debug", "--seed"], "--key=value"),
    (["debug", "-seed=0,1"], "--key=value"),
    (["debug", "--n_head=2,4,3"], "n_embd=64"),  # only the last cell is wrong
    (["debug", "--jepa_loss=cosine,cosin"], "cosin"),
    (["debug", "--seed=0,1", "--jobs=0"], "jobs=0"),
    (["debug", "--seed=0,1", "--jobs=1,2"], "jobs=1,2"),
    (["debug", "--seed=0,1", "--jobs=-1"], "jobs=-1"),
    (["debug", "--seed=0,1", "--init_from=resume"], "resumes by itself"),
    (["debug", "--seed=0,1", "--out_dir=a,b"], "out_dir"),
])  # fmt: skip
def test_a_mistake_is_one_line_before_any_cell_starts(argv, word, trainings, capsys):
    assert exit_code(*argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and word in line
    assert trainings == [] and not Path("out").exists()


def test_help_explains_itself(capsys):
    assert exit_code("--help") == 0
    said = capsys.readouterr().out
    assert "--jobs=N" in said and "--jepa_weight=float" in said and "Ctrl-C" in said
    assert said.startswith("usage: python -m lab.sweep RECIPE")


# --- training ---------------------------------------------------------------------------------


def test_finished_cells_are_skipped_and_interrupted_ones_resumed(trainings, capsys):
    argv = ["debug", "--seed=0,1,2,3,4", "--max_iters=9"]
    finished, interrupted, other, unsaved, _ = (c.config for c in cells_of(*argv))
    write_run(finished, 9)
    write_run(interrupted, 6)
    [longer, _] = cells_of("debug", "--seed=2,0", "--max_iters=10")
    write_run(longer.config, 10)  # in the folder of `other`, with another config
    write_run(unsaved)  # died before its first checkpoint
    assert longer.config.out_dir == other.out_dir

    sweep.main(argv)
    asked = {run.config.seed: run.config.init_from for run in trainings}
    assert asked == {1: "resume", 2: "scratch", 3: "scratch", 4: "scratch"}
    said = capsys.readouterr().out
    assert said.count("was finished") == 1 and "[1/5] seed=0 | val ce 0.5000" in said
    # the run with another config is kept, and the new one's log is where it belongs
    moved = json.loads((AT / "earlier/seed=2-1/config.json").read_text())
    assert moved["config"]["max_iters"] == 10
    assert (Path(other.out_dir) / "log.txt").exists()

    trainings.clear()
    (AT / "results.csv").unlink()
    (AT / "heat.png").unlink()
    sweep.main(argv)  # nothing left to train: results anew
    assert trainings == [] and len(rows()) == 5 and (AT / "heat.png").exists()


def test_where_a_cell_was_trained_does_not_make_it_another(trainings, capsys):
    """Only what is trained counts, as for resuming by hand."""
    sweep.main(["debug", "--seed=0,1", "--max_iters=9"])
    trainings.clear()
    sweep.main(["debug", "--seed=0,1", "--max_iters=9", "--log_interval=3", "--device=cpu"])
    assert trainings == [] and capsys.readouterr().out.count("was finished") == 2
    sweep.main(["debug", "--seed=0,1", "--max_iters=9", "--eval_pairs=32"])
    assert [run.config.init_from for run in trainings] == ["scratch", "scratch"]


def test_eta_counts_what_is_left_and_never_has_60_seconds(trainings, monkeypatch, capsys):
    clock = iter([0.0, 59.7, 59.7, 119.4, 119.4, 179.1])  # each cell starts, and takes 59.7 s
    monkeypatch.setattr(sweep, "time", SimpleNamespace(time=lambda: next(clock), sleep=abs))
    sweep.main(["debug", "--seed=0,1,2"])
    said = capsys.readouterr().out
    assert [end.split("\n")[0] for end in said.split("ETA ")[1:]] == ["1:59", "1:00", "0:00"]


def test_a_resumed_run_that_finished_is_not_trained_again(trainings):
    argv = ["debug", "--seed=0,1", "--max_iters=9"]
    for cell in cells_of(*argv):
        write_run(cell.config, 6)
    sweep.main(argv)
    assert [run.config.init_from for run in trainings] == ["resume", "resume"]
    trainings.clear()
    sweep.main(argv)
    assert trainings == []


def test_a_run_that_stopped_early_is_finished_unless_it_went_on(trainings):
    """train.py marks the evaluation after which patience ended the run."""
    argv = ["debug", "--seed=0,1", "--max_iters=9", "--patience=2"]
    for cell in cells_of(*argv):
        write_run(cell.config, 6, stopped_early=True)
    with open(cell.folder / "metrics.jsonl", "a") as file:  # the second one was resumed since
        file.write('{"step": 6, "ce": 1.0}\n')
    sweep.main(argv)
    assert [run.config.seed for run in trainings] == [1]
    assert [row["val_ce"] for row in rows()] == ["0.5", "0.5"]


def test_a_failed_cell_is_reported_and_the_others_go_on(trainings, capsys):
    trainings.fate = lambda config: 2 if config.seed == 1 else {"val_ce": 4.0}
    assert exit_code("debug", "--n_pred=0,1", "--seed=0,1,2") == 1
    assert len(trainings) == 6
    said = capsys.readouterr().out
    failed = [line for line in said.splitlines() if "FAILED, exit code 2" in line]
    assert len(failed) == 2 and failed[0].startswith("[2/6] n_pred=0,seed=1")
    assert "error: no luck today" in failed[0] and "seed=1/log.txt" in failed[0]
    assert [row["val_ce"] for row in rows()] == ["4.0", "", "4.0"] * 2
    assert "2 FAILED" in said.splitlines()[-3]  # in the footer of the results


def test_all_failed_is_exit_code_1_without_results(trainings):
    trainings.fate = lambda config: -9
    assert exit_code("debug", "--seed=0,1") == 1
    assert not (AT / "results.csv").exists()


def test_exit_code_0_without_a_final_evaluation_is_a_failure(trainings, monkeypatch, capsys):
    trainings.fate = lambda config: 0
    assert exit_code("debug", "--seed=0,1") == 1
    assert capsys.readouterr().out.count("FAILED, exit code 0") == 2


@pytest.mark.parametrize("jobs, threads", [(1, None), (2, "4"), (3, "2"), (50, "1")])
def test_jobs_run_side_by_side_and_share_the_cores(trainings, monkeypatch, jobs, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seeds = ",".join(map(str, range(12)))
    sweep.main(["debug", f"--seed={seeds}", f"--jobs={jobs}"])
    assert max(run.alongside for run in trainings) == min(jobs, 12) - 1
    assert {run.env.get("OMP_NUM_THREADS") for run in trainings} == {threads}


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])  # fmt: skip
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_stops_the_children_gently(trainings, monkeypatch, capsys, number, code, times):
    """Each signal is passed on once: a child saves at the first, and ends at once at the second."""

    def fate(config):
        if config.seed == 1:
            for _ in range(times):
                signal.raise_signal(number)

    trainings.fate = fate
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert exit_code("debug", "--seed=0,1,2,3", "--jobs=2") == code
    assert [run.config.seed for run in trainings] == [0, 1]  # no further one is started
    assert [run.n_terminated for run in trainings] == [times, times]
    assert all(run.options["start_new_session"] for run in trainings)  # no Ctrl-C of their own
    assert capsys.readouterr().out.count("| stopped") == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_stopped_sweep_goes_on_where_it_was(capsys):
    """For real: SIGTERM reaches train.py, which saves; the second sweep resumes and finishes it."""
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(100)))
    argv = ["debug", "--n_pred=1,0", "--max_iters=100", "--eval_interval=100", "--eval_pairs=8",
            "--dataset=gsm8k", "--data_dir=.", "--bpe_vocab_size=320", "--device=cpu",
            "--n_layer=1", "--batch_size=4", "--dtype=float32"]  # fmt: skip
    stopped, finished = (cell.config for cell in cells_of(*argv))
    write_run(finished, 100)
    folder, over = Path(stopped.out_dir), threading.Event()

    def stop_it_in_the_middle():
        while not over.wait(0.02):
            if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text():
                return os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_it_in_the_middle)
    thread.start()
    try:
        assert exit_code(*argv) == 143
    finally:
        over.set()
        thread.join()
    assert (folder / "ckpt.pt").exists() and "| stopped" in capsys.readouterr().out
    n_before = len((folder / "metrics.jsonl").read_text().splitlines())
    assert 0 < n_before < 100

    sweep.main(argv)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [*range(101)]
    assert "SIGTERM: saved" in (folder / "log.txt").read_text()  # the log goes on as well
    [row, _] = rows()
    assert float(row["val_ce"]) == records[-1]["val_ce"] and len(row["data_sha256"]) == 64


# --- results ----------------------------------------------------------------------------------


CE = {0: (4.0, 4.2, 4.7), 1: (5.0, 5.1, 5.2)}  # by n_pred and seed


def test_table_has_mean_and_sample_sd_over_the_seeds(trainings, capsys):
    trainings.fate = lambda config: {"val_ce": CE[config.n_pred][config.seed], "seconds": 10.0}
    sweep.main(["debug", "--seed=0,1,2", "--n_pred=0,1"])  # the seed need not come last
    lines = capsys.readouterr().out.splitlines()
    [header] = [line for line in lines if line.split()[:2] == ["n_pred", "n"]]
    assert header.split()[2:] == [
        "ce", "matched", "mismatched", "retrieval@1", "effective_rank", "tflop", "seconds"]
    first, second = lines[lines.index(header) + 1 :][:2]
    # sqrt((.3² + .1² + .4²) / 2) = .361 and .1; the population's would be .294 and .082
    assert first.split()[:5] == ["0", "3", "4.300", "±", "0.361"]
    assert second.split()[:5] == ["1", "3", "5.100", "±", "0.100"]
    assert first.endswith("10.0 ± 0.0")


def test_one_seed_has_no_spread(trainings, capsys):
    """Neither 0 nor nan; also where the other seeds of a combination failed."""
    assert mean_sd([4.0]) == (4.0, None) and plus_minus(4.0, None) == "4.000"
    sweep.main(["debug", "--n_pred=0,1"])
    assert "±" not in capsys.readouterr().out
    trainings.fate = lambda config: 2 if config.n_pred and config.seed else {"val_ce": 4.0}
    assert exit_code("debug", "--n_pred=0,1", "--seed=0,1") == 1
    lines = capsys.readouterr().out.splitlines()
    both, one = (line for line in lines if line.lstrip()[:2] in ("0 ", "1 "))
    assert both.split()[:5] == ["0", "2", "4.000", "±", "0.000"]
    assert one.split()[:3] == ["1", "1", "4.000"] and "±" not in one


def test_csv_has_a_row_per_cell(trainings):
    trainings.fate = lambda config: {"val_ce": 1 / 3 + config.seed}
    sweep.main(["debug", "--jepa_weight=0.5,1", "--seed=0,1", "--max_iters=9"])
    assert list(rows()[0]) == [
        "jepa_weight", "seed", "val_ce", "val_matched", "val_mismatched", "val_retrieval_at_1",
        "val_effective_rank", "tflop", "seconds", "commit", "trained_in", "data",
        "data_sha256",
    ]  # fmt: skip
    assert {r["tflop"] for r in rows()} == {"0.5"}
    assert [(float(r["jepa_weight"]), int(r["seed"]), float(r["val_ce"])) for r in rows()] == [
        (0.5, 0, 1 / 3), (0.5, 1, 4 / 3), (1.0, 0, 1 / 3), (1.0, 1, 4 / 3)]  # fmt: skip
    assert {(r["commit"], r["trained_in"], r["data"], r["data_sha256"]) for r in rows()} == {
        ("abc1234", "unknown", "word_problems", "0" * 64)}  # fmt: skip


def test_cells_of_two_dtypes_are_no_secret(trainings, capsys):
    sweep.main(["debug", "--seed=0,1", "--max_iters=9"])
    for folder, dtype in zip(sorted(AT.glob("seed=*")), ("float32", "bfloat16")):
        about = json.loads((folder / "config.json").read_text())
        about["provenance"]["dtype"] = dtype
        (folder / "config.json").write_text(json.dumps(about))
    capsys.readouterr()
    sweep.main(["debug", "--seed=0,1", "--max_iters=9"])
    assert "warning: DIFFERENT DTYPES" in capsys.readouterr().out
    assert [r["trained_in"] for r in rows()] == ["float32", "bfloat16"]
    sweep.main(["debug", "--dtype=float32,auto", "--max_iters=9"])  # on purpose
    assert "DIFFERENT DTYPES" not in capsys.readouterr().out
    assert [r["dtype"] for r in rows()] == ["float32", "auto"]


def test_exact_match_is_a_figure_where_it_was_asked_for(trainings, capsys):
    trainings.fate = lambda config: {"val_exact": (config.seed + 1) / 4}
    sweep.main(["debug", "--seed=0,1", "--eval_answers=8"])
    header, line = capsys.readouterr().out.split("over n seeds\n")[1].splitlines()[:2]
    assert header.split()[:3] == ["n", "ce", "exact"]
    assert line.split()[4:7] == ["0.375", "±", "0.177"]
    assert [r["val_exact"] for r in rows()] == ["0.25", "0.5"]


def test_a_figure_that_some_cells_lack_is_blank_for_them(trainings, capsys):
    trainings.fate = lambda config: {"val_exact": 0.25} if config.eval_answers else {}
    sweep.main(["debug", "--eval_answers=0,8"])
    without, asked = capsys.readouterr().out.split("no sd\n")[1].splitlines()[1:3]
    assert len(asked.split()) == len(without.split()) + 1 and "0.250" in asked
    assert [r["val_exact"] for r in rows()] == ["", "0.25"]


def test_a_resumed_cell_names_all_its_commits(trainings, capsys):
    sweep.main(["debug", "--seed=1,2"])
    path = AT / "seed=1/config.json"
    made = json.loads(path.read_text())
    made["provenance"]["earlier"] = [{"commit": "0ld"}, {"commit": "abc1234"}]
    path.write_text(json.dumps(made))
    sweep.main(["debug", "--seed=1,2"])
    assert [r["commit"] for r in rows()] == ["0ld AND abc1234", "abc1234"]
    assert "2 seeds; commit 0ld AND abc1234\n" in capsys.readouterr().out


def test_data_sets_can_be_an_axis(trainings, capsys):
    trainings.fate = lambda config: {"val_ce": 1.0 + (config.dataset == "regex")}
    sweep.main(["debug", "--dataset=word_problems,regex", "--max_iters=9"])
    assert [(r["dataset"], r["val_ce"]) for r in rows()] == [
        ("word_problems", "1.0"), ("regex", "2.0")]  # fmt: skip
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["word_problems", "1", "1.000"] in lines and ["regex", "1", "2.000"] in lines


@pytest.fixture
def figures(monkeypatch):
    """The figures that sweep.main draws, which here it does."""
    drawn = []

    def draw(*args):
        drawn.append(REAL_DRAW(*args))
        return drawn[-1]

    monkeypatch.setattr(sweep, "draw", draw)
    return drawn


@pytest.mark.parametrize("axes, n_panels, n_written", [
    (["--seed=0,1"], 3, 2),
    (["--jepa_weight=0.5,1,2", "--seed=0,1"], 3, 3),
    (["--jepa_loss=cosine,l2", "--n_pred=0,1,2"], 3, 6),
    (["--n_pred=0,1", "--seed=0,1", "--jepa_weight=0.5,1", "--bias=true,false"], 6, 4),
])  # fmt: skip
def test_heat_png_writes_every_figure_beside_its_place(
    trainings, figures, axes, n_panels, n_written
):
    trainings.fate = lambda config: {"val_ce": 4.25, "val_matched": 0.75, "val_mismatched": 0.5}
    sweep.main(["debug", *axes, "--max_iters=9"])
    assert (AT / "heat.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    [figure] = figures
    assert len(figure.axes) == n_panels  # a row of three for each value of a third axis
    for panel, value in zip(figure.axes, ("4.250", "0.250", "0.500")):
        texts = [text.get_text() for text in panel.texts]
        assert len(texts) == n_written and all(text.startswith(value) for text in texts)
        has_spread = axes[0] != "--seed=0,1" and "--seed=0,1" in axes
        assert all(("± 0.000" in text) == has_spread for text in texts)
    footer = figure.get_supxlabel()
    for word in ("recipe debug --max_iters=9", "word_problems", "000000000000", "commit abc1234"):
        assert word in footer
    assert ("2 seeds" if "--seed=0,1" in axes else "1 seed;") in footer


@pytest.mark.parametrize("second", ["--jepa_weight=1,2", "--seed=0,1"])
def test_heat_png_survives_a_missing_cell(trainings, figures, second):
    trainings.fate = lambda config: 2 if config.n_pred == 1 else {}
    assert exit_code("debug", "--n_pred=0,1,2", second) == 1
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert (AT / "heat.png").exists()
    assert texts.count("failed") == (2 if second.startswith("--jepa") else 0)


def test_rows_and_columns_of_the_heat_map_are_not_mixed_up(trainings, figures):
    trainings.fate = lambda config: {"val_ce": 10 * config.n_pred + config.jepa_weight}
    sweep.main(["debug", "--n_pred=0,1", "--jepa_weight=1,2,3"])
    panel = figures[0].axes[0]
    assert panel.images[0].get_array().tolist() == [[1, 2, 3], [11, 12, 13]]
    assert (panel.get_ylabel(), panel.get_xlabel()) == ("n_pred", "jepa_weight")
    written = {tuple(t.get_position()): t.get_text() for t in panel.texts}
    assert written[(2, 1)] == "13.000"


def test_cells_of_different_data_are_not_compared_silently(trainings, capsys):
    """The hub may go away in the middle of a sweep: later cells then train on word problems."""
    trainings.fate = lambda config: {"data": str(config.seed) * 64}
    line = error_line(capsys, sweep.main, ["debug", "--seed=0,1"])
    assert "DIFFERENT DATA" in line and "seed 0" in line and "111111111111" in line
    assert len(rows()) == 2 and not (AT / "heat.png").exists()
    # side by side in a grid they are not averaged, and named
    trainings.fate = lambda config: {"data": str(config.n_pred) * 64}
    sweep.main(["debug", "--n_pred=0,1", "--out_dir=out/other"])
    said = capsys.readouterr().out
    assert "DIFFERENT DATA" in said and "000000000000 AND 111111111111" in said


def test_a_file_that_changed_since_is_trained_on_anew(trainings, capsys):
    """Also a finished cell with another data_dir; the same rows elsewhere are the same data."""
    def write(folder, rows):
        folder.mkdir(exist_ok=True)
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return sha256_of_rows(rows)

    argv = ["debug", "--seed=0,1", "--max_iters=9", "--dataset=gsm8k"]
    for name, more in (("a", 0), ("b", 0), ("c", 1)):
        digest = write(Path(name), sums(30 + more))
        trainings.fate = lambda config, digest=digest: {"data": digest}
        sweep.main([*argv, f"--data_dir={name}"])
        said = capsys.readouterr().out
        anew = [run.config.init_from for run in trainings]
        assert said.count("was finished") == (2 if name == "b" else 0)
        assert anew == ([] if name == "b" else ["scratch"] * 2)
        assert said.count("trained anew, the old run") == 2 * more
        trainings.clear()
    assert len(list((AT / "earlier").iterdir())) == 2
    write_run(cells_of(*argv, "--data_dir=c")[0].config, 3, data=digest)  # half done, and then:
    digest = write(Path("c"), sums(40))
    trainings.fate = lambda config: {"data": digest}
    sweep.main([*argv, "--data_dir=c"])
    assert [run.config.init_from for run in trainings] == ["scratch"] * 2


@pytest.mark.parametrize("change", ["csv", "val comes", "val goes", "an old split", "a test comes"])
def test_so_is_one_whose_split_changed(change, trainings, capsys):
    def write(name, rows):
        lines = (f"{row['question']},{row['answer'][-2:].strip()}\n" for row in rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path = Path("own") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("question,answer\n" + "".join(lines) if path.suffix == ".csv" else text)

    ending = "csv" if change == "csv" else "jsonl"
    write(f"train.{ending}", sums(30) * (1 + (change == "an old split")))
    if change == "val goes":
        write("val.jsonl", sums(9, 500))
    argv = ["debug", "--seed=0,1", "--max_iters=9"]
    argv += ["--dataset=gsm8k", "--data_dir=own"] if change == "csv" else ["--dataset=own"]
    cells = cells_of(*argv)
    made = split_rows(cells[0].config)[1]
    if change == "an old split":  # by rows, before questions were kept together
        made = {key: value for key, value in made.items() if "kept" not in key}
    for cell in cells:
        write_run(cell.config, 9)
        path = cell.folder / "config.json"
        about = json.loads(path.read_text())
        about["provenance"]["data"] = made
        path.write_text(json.dumps(about))
    if change == "val goes":
        Path("own/val.jsonl").unlink()
    elif change == "csv":
        write("train.csv", sums(31))
    elif change != "an old split":
        write("val.jsonl" if change == "val comes" else "test.jsonl", sums(9, 500))
    capsys.readouterr()
    sweep.train_cells(cells, 1)
    anew = 0 if change == "a test comes" else 2
    assert capsys.readouterr().out.count("other data than there is now, or another") == anew
    assert len(trainings) == anew


def test_a_cell_that_an_earlier_sweep_still_trains_is_left_alone(trainings, capsys):
    """The earlier sweep was killed; its train.py lives in a session of its own."""
    argv = ["debug", "--seed=0,1"]
    folder = cells_of(*argv)[1].folder
    read, write = os.pipe()
    child = os.fork()
    if not child:
        claim_run(folder)
        os.write(write, b"!")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(read, 1)
        (folder / "log.txt").write_text("its own")
        line = error_line(capsys, sweep.main, argv)
        assert "in training already" in line and f"seed=1 (process {child})" in line
        assert trainings == [] and (folder / "log.txt").read_text() == "its own"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    sweep.main(argv)  # nothing is left of the lock
    assert len(trainings) == 2


def test_a_folder_of_somebody_s_own_is_no_sweep_s(trainings, capsys):
    Path("mine").mkdir()
    Path("mine/results.csv").write_text("a,b\n")
    line = error_line(capsys, sweep.main, ["debug", "--seed=0,1", "--out_dir=mine"])
    assert "nothing was touched" in line and trainings == []
    assert [path.name for path in Path("mine").iterdir()] == ["results.csv"]
