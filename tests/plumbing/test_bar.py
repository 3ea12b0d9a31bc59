"""Claims about the bar of plumbing/output.py: in a terminal it shows how far the work is, without
tearing a line or stopping the work; elsewhere there are plain lines."""

import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import TINY, sums

from plumbing.output import Bar
from plumbing.processes import ROOT

pty = pytest.importorskip("pty")

BEGIN = "import time; from plumbing.options import fail; from plumbing.output import Bar"
RUN = "from plumbing.processes import run_main; run_main(main)"


def start(code, folder, columns=100):
    """The process of a program, and the terminal that it writes to."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment,
                               stdin=theirs, stdout=theirs, stderr=theirs)  # fmt: skip
    os.close(theirs)
    return process, ours


def in_a_terminal(code, folder, columns=100):
    """All that a program writes to a terminal."""
    process, terminal = start(code, folder, columns)
    said, deadline = b"", time.time() + 120
    try:
        while time.time() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    said += os.read(terminal, 1 << 16)
                except OSError:  # the program has ended
                    break
        process.wait(timeout=10)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    return said.decode()


def on_screen(said):
    """The lines that a terminal shows in the end."""
    lines, line, at = [], "", 0
    for part in re.split(r"(\r|\n|\x1b\[K)", said):
        if part == "\n":
            lines.append(line.rstrip())
            line, at = "", 0
        elif part == "\r":
            at = 0
        elif part == "\x1b[K":
            line = line[:at]
        else:
            line, at = line[:at] + part + line[at + len(part) :], at + len(part)
    return [*lines, line.rstrip()]


WORK = f"""{BEGIN}
def main(argv):
    bar = Bar("work", "step", 40, done=10)
    for i in range(30):
        time.sleep(0.05)
        if not bar.move(said=f"loss {{i}}"):
            print("step", i)
        if i % 10 == 0:
            print("evaluated", i)
        if i == 5:
            inner = Bar("within", "pair", 9)
            for _ in range(9):
                time.sleep(0.05)
                inner.move()
{RUN}
"""


def test_in_a_terminal_lines_stand_whole_above_the_bar(tmp_path):
    said = in_a_terminal(WORK, tmp_path)
    assert on_screen(said) == [*(f"evaluated {i}" for i in (0, 10, 20)), ""]  # it leaves nothing
    times = r"\[(.*?)<(.*?), (.*?)(?:, loss (\d+))?\]"
    bars = re.findall(rf"work: +(\d+)%\|[^|]*\| (\d+)/40 {times}", said)
    assert len(bars) > 3 and bars[0] == ("25", "10", "00:00", "?", "?step/s", "")
    done = [int(n) for _, n, *_ in bars]
    assert done == sorted(done) and done[-1] > 30
    for percent, n, _, left, rate, loss in bars[1:]:
        assert int(percent) == int(n) * 100 // 40 and int(loss) == int(n) - 11
        assert re.fullmatch(r"\d\d:\d\d", left) and re.fullmatch(r" *[\d.]+(step/s|s/step)", rate)
    assert re.search(r"within: .*/9 \[", said)
    assert max(len(line) for line in re.split(r"[\r\n]|\x1b\[K", said)) < 100


def test_through_a_pipe_there_are_the_lines_alone(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WORK], cwd=tmp_path, capture_output=True,
                          text=True, env=environment)  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("step")] == [f"step {i}" for i in range(30)]
    assert len(lines) == 33 and done.stderr == "" and "\x1b" not in done.stdout


def test_no_bar_without_a_terminal_or_steady_output(capsys):
    bar = Bar("work", "step", 3, done=1)
    assert not bar.move(2) and not bar.output and bar.done == 3
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("way, says", [
    ("fail('no such file')", "error: no such file"), ("raise KeyboardInterrupt", "interrupted"),
    ("raise OSError('disk full')", "error: disk full"),
])  # fmt: skip
def test_a_last_word_on_stderr_has_a_line_of_its_own(way, says, tmp_path):
    code = f"{BEGIN}\ndef main(argv):\n    bar = Bar('work', 'step', 9)\n    {way}\n{RUN}"
    said = in_a_terminal(code, tmp_path)
    assert "work:   0%" in said and on_screen(said) == [says, ""]


def test_a_terminal_that_is_halted_halts_no_work(tmp_path):
    """Ctrl-S: nothing is read. Far more bars would be drawn than a terminal takes unread; those
    that nobody sees are not kept either, and the lines are."""
    code = (f"{BEGIN}\nfrom pathlib import Path\nimport sys\ndef main(argv):\n"
            "    bar = Bar('work', 'step', 10**9)\n"
            "    for i in range(5000):\n        bar.due = 0\n        bar.move()\n"
            "    print('done')\n"
            "    Path('waiting').write_text(str(sys.stdout.waiting.unfinished_tasks))\n"
            f"{RUN}")  # fmt: skip
    process, terminal = start(code, tmp_path)
    try:
        deadline, waiting = time.time() + 60, tmp_path / "waiting"
        while not (waiting.exists() and waiting.read_text()):
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.1)
        assert int(waiting.read_text()) < 10
        said = ""
        while not said.endswith("done\r\n"):
            said += os.read(terminal, 1 << 16).decode()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_training_and_evaluation_in_a_terminal_show_bars_in_the_place_of_their_lines(tmp_path):
    """The lines of evaluations stay; Ctrl-C saves, and says so in a line of its own."""
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(120)))
    tiny = [arg for arg in TINY if not arg.startswith("--dataset")]
    argv = [*tiny, "--dataset=sums.jsonl", "--eval_answers=4", "--max_iters=100000"]
    code = ("import os, signal, train\nreal = train.train_step\n"
            "def step(t, number):\n"
            f"    if number == 40:\n        os.kill(os.getpid(), {int(signal.SIGINT)})\n"
            "    return real(t, number)\n"
            "train.train_step, train.plot_losses = step, lambda folder: None\n"
            f"train.run_main(lambda argv: train.main({argv}))\n")  # fmt: skip
    said = in_a_terminal(code, tmp_path)
    lines = on_screen(said)
    assert [line[:14] for line in lines if ": val ce" in line] == [
        f"step {step}: val ce"[:14] for step in range(3, 42, 3)]  # fmt: skip
    assert not [line for line in lines if "| loss" in line or "%|" in line]
    of_steps = r"training: .*/100000 \[.*step.*, loss \d+\.\d{4}\]"
    for bar in (of_steps, "tokens: ", "held-out pairs: ", "held-out questions: "):
        assert re.search(bar, said), bar
    [saved] = [line for line in lines if "SIGINT: saved" in line]
    assert saved.startswith("SIGINT") and "at step 41" in saved
    said = in_a_terminal("import evaluate\nevaluate.run_main(lambda argv: evaluate.main(["
                         "'out/tiny', '--split=val', '--batch_size=2', '--device=cpu']))", tmp_path)
    assert re.search(r"evaluation: .*/12 \[.*question", said)
    assert not [line for line in on_screen(said) if "ETA" in line or "%|" in line]
    assert "wrote out/tiny/accuracy-val.json" in said
