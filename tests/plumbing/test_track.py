"""A tracker gets what metrics.jsonl gets, and never takes a run along."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import error_line

import train
from lab import sweep
from plumbing.files import read_records


class StandIn:
    """A tracker's package, and its runs, that keeps what it is told."""

    def __init__(self, monkeypatch, name):
        self.opened, self.records, self.finished, self.logged_in = [], [], 0, True
        self.dies_at = None  # a step
        self.Settings = lambda **options: options
        monkeypatch.setitem(sys.modules, name, self)

    def init(self, **options):
        if self.dies_at == "init":
            raise OSError("no network\nmore")
        self.opened.append(options)
        return self

    def login(self, prompt):
        assert prompt is False
        if isinstance(self.logged_in, Exception):
            raise self.logged_in
        return self.logged_in

    def log(self, record, step):
        if step == self.dies_at:
            raise RuntimeError("disk full")
        self.records.append({"step": step, **record})

    def finish(self):
        self.finished += 1


def logged():
    return read_records(Path("out/tiny/metrics.jsonl"))


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_it_gets_the_records_and_the_provenance(tiny_run, monkeypatch, name):
    package = StandIn(monkeypatch, name)
    tiny_run(track=name)
    assert package.records == logged() and len(logged()) == 8
    [options] = package.opened
    about = json.loads(Path("out/tiny/config.json").read_text())
    assert options["config"] == about and about["config"]["track"] == name
    assert options["project"] == "nanojepa" and options["group"] is None
    assert options["name"] == f"tiny {about['provenance']['time']}"
    assert package.finished == 1
    if name == "wandb":
        assert options["dir"] == "out/tiny"  # its files lie in the run's folder


def test_a_tracked_run_is_the_same_run(tiny_run, monkeypatch):
    tiny_run()
    plain = logged()
    StandIn(monkeypatch, "trackio")
    tiny_run(track="trackio")
    for a, b in zip(plain, logged(), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_a_resumed_run_goes_on_in_the_trackers_run(tiny_run, monkeypatch):
    package = StandIn(monkeypatch, "wandb")
    tiny_run(track="wandb", max_iters=3)
    tiny_run(track="wandb", init_from="resume")
    first, second = package.opened
    assert first["id"] == second["id"] and first["name"] == second["name"]
    assert first["resume"] == "allow"
    steps = [record["step"] for record in package.records]
    assert steps == [0, 1, 2, 3, 3, 3, 4, 5, 6]  # evaluated at the end and once more on resuming
    monkeypatch.setattr("run.versions", lambda: {"time": "later", "commit": ""})
    tiny_run(track="wandb", max_iters=1)  # another run in the same folder
    assert package.opened[-1]["id"] != first["id"]


@pytest.mark.parametrize("dies_at", ["init", 0, 3, 5])
def test_a_tracker_that_dies_is_left_out_and_the_run_goes_on(tiny_run, monkeypatch, dies_at):
    package = StandIn(monkeypatch, "trackio")
    package.dies_at = dies_at
    said = tiny_run(track="trackio")
    assert said.count("trackio failed and is left out from here on: ") == 1
    assert "done in" in said and len(logged()) == 8
    if dies_at != "init":
        assert package.records == [r for r in logged() if r["step"] < dies_at]


def test_an_interrupted_run_is_finished_there_too(tiny_run, monkeypatch):
    package = StandIn(monkeypatch, "trackio")
    monkeypatch.setattr(train, "StopSignal", lambda: SimpleNamespace(number=2))
    with pytest.raises(SystemExit):
        tiny_run(track="trackio")
    assert package.finished == 1


@pytest.mark.parametrize("name, says", [
    ("trackio", "pip install trackio"), ("wandb", "pip install wandb"), ("mlflow", "is not one of"),
])  # fmt: skip
def test_a_missing_package_is_one_line_before_anything_happens(tiny_run, monkeypatch, capsys, name,
                                                               says):  # fmt: skip
    monkeypatch.setitem(sys.modules, name, None)
    assert says in error_line(capsys, tiny_run, track=name)
    assert not Path("out").exists()


def test_a_missing_login_is_one_line_unless_it_works_offline(tiny_run, monkeypatch, capsys):
    package = StandIn(monkeypatch, "wandb")
    package.logged_in = False
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert "wandb login" in error_line(capsys, tiny_run, track="wandb")
    package.logged_in = RuntimeError("API key must have 40+ characters\nmore")
    assert "40+ characters; wandb login" in error_line(capsys, tiny_run, track="wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny_run(track="wandb", max_iters=1)
    assert package.records


def test_cells_of_a_sweep_are_a_group(tiny_run, monkeypatch):
    package = StandIn(monkeypatch, "trackio")
    tiny_run(track="trackio", max_iters=1, out_dir="out/sweep-tiny/seed=1")
    assert package.opened[0]["group"] == "sweep-tiny"
    cells = sweep.make_cells(*sweep.parse(["debug", "--seed=1,2", "--track=trackio"])[:2])
    assert all("--track=trackio" in cell.command for cell in cells)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_real_ones_take_it_offline(tiny_run, monkeypatch, tmp_path, name):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "tio") if name == "trackio" else 0
    said = tiny_run(track=name, max_iters=2)
    assert "failed" not in said and "done in" in said
