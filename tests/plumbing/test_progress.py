"""A bar where a person watches, and nothing but plain lines elsewhere."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from plumbing.processes import ROOT
from plumbing.progress import NO_BAR, bar_of, watched

PAUSE = "from plumbing import progress; import time, sys; from plumbing.processes import run_main"


def in_a_terminal(code: str, tmp_path, columns=100) -> str:
    """What a program writes to a terminal of its own, all of it."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    said, ends = b"", time.time() + 60
    while time.time() < ends:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                part = os.read(terminal, 1 << 16)
            except OSError:  # Linux says so when the program has ended
                part = b""
            if not part:
                break
            said += part
    os.waitpid(pid, 0)
    os.close(terminal)
    return said.decode()


def on_screen(said: str) -> list[str]:
    """The lines that a terminal shows in the end: what follows a carriage return overwrites."""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", said).replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


WORK = f"""{PAUSE}
def main(argv):
    with progress.bar_of(40, "step", done=10, delay=0) as bar:
        for i in range(30):
            time.sleep(0.02)
            bar.update(1, f"loss {{i}}")
            if i % 10 == 0:
                print("evaluated", i)
    print("done")
run_main(main)
"""


def test_in_a_terminal_lines_stand_whole_above_a_bar_with_rate_and_time(tmp_path):
    said = in_a_terminal(WORK, tmp_path)
    lines = on_screen(said)
    assert [line for line in lines if line.startswith("evaluated")] == [
        f"evaluated {i}" for i in (0, 10, 20)]  # fmt: skip
    assert lines.index("evaluated 20") < lines.index("done")
    bars = re.findall(r"(\d+)%\|[^|]*\| (\d+)/40 \[([^\]]*)\]", said)
    assert bars[-1][:2] == ("100", "40") and len(bars) > 5
    assert "step/s" in bars[-1][2] and "loss 29" in bars[-1][2] and "<" in bars[-1][2]
    [last] = [line for line in lines if "40/40" in line]
    assert last.startswith("100%")


def test_through_a_pipe_there_are_the_lines_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", WORK], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout.splitlines() == [*(f"evaluated {i}" for i in (0, 10, 20)), "done"]
    assert done.stderr == ""


def test_training_in_a_terminal_shows_a_bar_in_the_place_of_its_lines(tmp_path):
    argv = ["debug", "--device=cpu", "--dataset=word_problems", "--max_iters=8", "--log_interval=1",
            "--eval_interval=4", "--eval_pairs=8", "--n_layer=1", "--n_embd=32"]  # fmt: skip
    code = f"""import train, plumbing.progress
real = plumbing.progress.bar_of
train.bar_of = lambda *args, **options: real(*args, **options, delay=0)
train.plot_losses = lambda folder: None
train.run_main(lambda argv: train.main({argv}))
"""
    said = in_a_terminal(code, tmp_path)
    lines = on_screen(said)
    assert len([line for line in lines if re.match(r"step \d: val ce", line)]) == 2
    assert not [line for line in lines if re.match(r"step \d/8 \| loss", line)]
    assert re.search(r"8/8 \[.*step.*loss \d", said) and any("done in" in line for line in lines)


@pytest.mark.parametrize("stop", [3, 10])
def test_watched_gives_the_items(stop):
    assert [item for item, _ in zip(watched(range(10), "item"), range(stop))] == [*range(stop)]


def test_where_nobody_watches_nothing_is_shown(capsys):
    with bar_of(3, "step", delay=0) as bar:
        bar.update(2, "loss 1")
        assert bar is NO_BAR and not bar.shown
    assert capsys.readouterr() == ("", "")
