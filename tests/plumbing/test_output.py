"""Claims about plumbing/output.py, and what a run with a stuck or lost output keeps."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY, error_line, sums

import train
from plumbing.files import owner_of
from plumbing.output import Output, steady_output, stops
from plumbing.plots import plot_losses
from plumbing.processes import ROOT, StopSignal, run_main


@pytest.fixture
def pipe():
    """The two ends of a small pipe, the second as a text stream."""
    read, write = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    stream = os.fdopen(write, "w", encoding="ascii")
    yield read, stream
    for close in (lambda: os.close(read), stream.close):
        with contextlib.suppress(OSError):  # the test did
            close()


def test_what_is_printed_arrives_in_order_and_at_once(pipe):
    read, stream = pipe
    output = Output(stream)
    print("first", 1, "λ", file=output)
    assert os.read(read, 100) == b"first 1 ?\n"
    print("a prompt> ", end="", file=output, flush=True)
    assert os.read(read, 100) == b"a prompt> "
    assert output.fileno() == stream.fileno() and not output.isatty()


def test_a_reader_that_reads_nothing_stops_nobody(pipe):
    read, stream = pipe
    output, begin = Output(stream), time.time()
    for i in range(3000):
        print(f"line {i:10d}", file=output)
    assert time.time() - begin < 3 and not output.wait(0)
    got = b""
    while got.count(b"\n") < 3000:  # nothing is lost once it reads on
        got += os.read(read, 1 << 16)
    assert got.decode().split("\n")[2999] == "line       2999" and output.wait(5)


def test_a_reader_that_is_gone_is_told_once(pipe, capfd):
    read, stream = pipe
    os.close(read)
    output = Output(stream)
    for _ in range(3):
        print("to nobody", file=output)
    assert output.wait(5)
    assert capfd.readouterr().err == "nobody reads the output any more (Broken pipe): without it\n"


def test_after_a_signal_nobody_waits_for_a_reader(pipe, monkeypatch):
    monkeypatch.setattr(sys, "stdout", pipe[1])
    begin = time.time()
    with pytest.raises(SystemExit), steady_output():
        print("x" * 10_000)
        raise SystemExit(128 + signal.SIGTERM)
    assert time.time() - begin < 5 and sys.stdout is pipe[1]


def test_an_output_that_is_closed_from_the_start(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setenv("MPLBACKEND", "agg")
    run_main(lambda argv: print("to nobody"))
    assert sys.stdout.name == os.devnull


def test_a_lost_terminal_is_a_signal_unless_nohup_ignores_it():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in stops()
        StopSignal()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = StopSignal()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_figure_that_cannot_be_drawn_ends_no_run(tmp_path, capsys):
    plot_losses(tmp_path / "nowhere")
    assert "loss.png could not be drawn (FileNotFoundError" in capsys.readouterr().out


def start(folder, *argv, **options):
    given = {arg.partition("=")[0] for arg in argv}
    tiny = [arg for arg in TINY if arg.partition("=")[0] not in given]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *tiny, *argv], cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_a_run_whose_output_is_stuck_goes_on_saves_and_owns_its_folder(
    pipe, tmp_path, monkeypatch, capsys
):
    """Its pipe is full long before: nobody reads. A second run is refused; SIGHUP ends the first
    one, which saves; then the folder is free."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(120)))
    steps = ["--max_iters=1000000", "--eval_interval=1000000", "--dataset=sums.jsonl"]
    process = start(tmp_path, *steps, stdout=pipe[1])
    folder, deadline = tmp_path / "out/tiny", time.time() + 60
    try:
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 80):  # 8 kB of lines
            assert time.time() < deadline and process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        before = sorted(tmp_path.rglob("*")), (folder / "config.json").read_bytes()
        for more in ("--seed=3", "--init_from=resume"):
            line = error_line(capsys, train.main, [*TINY, more])
            assert f"belongs to process {process.pid}" in line
        assert before == (sorted(tmp_path.rglob("*")), (folder / "config.json").read_bytes())
        process.send_signal(signal.SIGHUP)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGHUP and said == ""
    assert torch.load(folder / "ckpt.pt")["step"] > 80
    assert owner_of(folder) == ""


def test_a_notebook_s_settings_and_ascii_stop_no_command(tmp_path):
    """matplotlib refuses a backend that is not there when it is imported; ascii has no λ."""
    environment = {**os.environ, "MPLBACKEND": "module://nowhere.backend_inline", "LC_ALL": "C",
                   "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}  # fmt: skip
    program = ("from lab import draw_mask; from plumbing.processes import run_main\n"
               "run_main(lambda argv: (print('λ ±'), draw_mask.main([])))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          env={**environment, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"? ?\n") and (tmp_path / "out/mask.png").exists()


def test_no_file_takes_the_place_of_a_closed_stderr():
    """A warning of a library would be written into a checkpoint."""
    code = ("import os; from plumbing.processes import run_main; "
            "run_main(lambda argv: print(os.open('run.py', os.O_RDONLY) > 2))")  # fmt: skip
    shell = 'exec "$0" -c "$1" 0<&- 2>&-'
    said = subprocess.run(["sh", "-c", shell, sys.executable, code], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE).stdout  # fmt: skip
    assert said == "True\n"
