"""What is printed, written by a thread: neither a pager nor a closed pipe stops the work. And a bar
in the last line of a terminal."""

import contextlib
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm  # comes with datasets, which is in requirements.txt

from plumbing.files import silence

PATIENCE = 0.2  # seconds that a line may take before the work goes on without it
CLEAR = "\r\x1b[K"  # to the start of the line, and nothing behind it


def stops() -> list[int]:
    """The signals that ask for an end: Ctrl-C, SIGTERM and, unless nohup ignores it, SIGHUP of a
    terminal that was closed."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    heard = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *[hangup] * heard]


class Output:
    """In the place of sys.stdout. A write waits a moment, so that the order with what goes to
    stderr stays; when the reader is slower than that (a pager, Ctrl-S), lines wait in a queue. An
    output that is gone (a closed pipe, a lost terminal) is told on stderr once."""

    def __init__(self, stream):
        stream.flush()
        self.stream, self.number = stream, stream.fileno()
        self.waiting, self.late, self.gone, self.drawn = queue.Queue(), False, False, False
        threading.Thread(target=self.write_all, daemon=True).start()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)  # encoding, isatty, fileno, ...

    def write(self, text: str) -> int:
        line = (CLEAR if self.drawn else "") + text
        self.drawn = False
        self.waiting.put(line.encode(self.stream.encoding or "utf-8", "replace"))
        if text.endswith("\n"):
            self.flush()
        return len(text)

    def draw(self, text: str) -> None:
        """Text in the last line, until the next is drawn or printed; not for a slow reader."""
        if self.wait(0):
            self.write(text)
            self.drawn = bool(text)

    def flush(self) -> None:
        self.late = not self.wait(0 if self.late else PATIENCE)

    def wait(self, seconds: float | None) -> bool:
        """Wait until all is written, or for so many seconds; is it?"""
        done = self.waiting.all_tasks_done
        with done:
            return done.wait_for(lambda: not self.waiting.unfinished_tasks, seconds)

    def write_all(self) -> None:
        # Past the stream: a thread that is stuck within one makes the interpreter abort at its end.
        while (text := self.waiting.get()) is not None:
            while text and not self.gone:
                try:
                    text = text[os.write(self.number, text) :]
                except BlockingIOError:  # somebody has made the terminal non-blocking
                    time.sleep(0.05)
                except OSError as error:
                    self.gone = True
                    said = f"nobody reads the output any more ({error.strerror}): without it\n"
                    with contextlib.suppress(OSError):
                        os.write(2, said.encode())
            self.waiting.task_done()


class Bar:
    """How far a loop is, how fast, and how long it will take, in the last line of a terminal, below
    what is printed. Where the output is none, there is no bar."""

    def __init__(self, what: str, unit: str, total: int, done: int = 0):
        self.total, self.done, self.started, self.due = total, done, time.time(), 0.0
        self.words, self.output = dict(prefix=what, unit=unit, initial=done), None
        if isinstance(sys.stdout, Output) and sys.stdout.isatty() and os.getenv("TERM") != "dumb":
            self.output = sys.stdout
        self.move(0)

    def move(self, n: int = 1, said: str = "") -> bool:
        """n more are done. Is there a bar, so that no line need say it?"""
        self.done += n
        if self.output and self.done >= self.total:
            self.output.draw("")
        elif self.output and time.time() > self.due:
            elapsed, width = time.time() - self.started, shutil.get_terminal_size().columns - 1
            self.output.draw(tqdm.format_meter(self.done, self.total, elapsed, width, postfix=said,
                                               **self.words))  # fmt: skip
            self.due = time.time() + 0.2
        return self.output is not None


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Within, sys.stdout is an Output. In the end what waits is still written, however long a
    reader takes (a signal then ends the process at once), but not after a signal."""
    plain, output, stopped = sys.stdout, None, False
    if plain is None:  # it was closed from the start
        plain = sys.stdout = silence()
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a test's or a notebook's
        if os.name == "posix":
            output = sys.stdout = Output(plain)
    try:
        yield
    except SystemExit as exit_:
        stopped = isinstance(exit_.code, int) and exit_.code > 128
        raise
    finally:
        sys.stdout = plain
        if output and not output.wait(1) and not stopped:
            for number in stops():
                signal.signal(number, signal.SIG_DFL)
            output.wait(None)
        if output:
            output.waiting.put(None)
