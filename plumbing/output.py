"""What is printed, written by a thread: neither a pager nor a closed pipe stops the work."""

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator

from plumbing.files import silence

PATIENCE = 0.2  # seconds that a line may take before the work goes on without it


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
        self.waiting, self.late, self.gone = queue.Queue(), False, False
        threading.Thread(target=self.write_all, daemon=True).start()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)  # encoding, isatty, fileno, ...

    def write(self, text: str) -> int:
        self.waiting.put(text.encode(self.stream.encoding or "utf-8", "replace"))
        if text.endswith("\n"):
            self.flush()
        return len(text)

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
