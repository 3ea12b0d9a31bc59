"""A bar with rate and remaining time, where a person watches."""

import contextlib
import sys
from collections.abc import Iterator, Sequence


class Bar:
    """Nothing, where nobody watches; `shown` says so, for whoever prints lines instead."""

    def __init__(self, tqdm=None):
        self.tqdm, self.shown = tqdm, tqdm is not None

    def update(self, n: int = 1, text: str = "") -> None:
        """n more are done; `text` stands at the end of the bar until the next one."""
        if self.tqdm is not None:
            self.tqdm.set_postfix_str(text, refresh=False)
            self.tqdm.update(n)
            if not n:  # only the time is another
                self.tqdm.refresh()


NO_BAR = Bar()


class Above:
    """In the place of sys.stdout while there is a bar: whole lines, printed above it."""

    def __init__(self, stream, writing):
        self.stream, self.writing, self.text = stream, writing, ""

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        lines, end, self.text = (self.text + text).rpartition("\n")
        if end:
            with self.writing():
                self.stream.write(lines + end)
                self.stream.flush()
        return len(text)


@contextlib.contextmanager
def bar_of(total: int, unit: str, done: int = 0, delay: float = 2) -> Iterator[Bar]:
    """Within, a Bar over `total` units, `done` of them before; it appears after `delay` seconds. It
    is drawn on stderr, and only if both outputs are a terminal."""
    plain = sys.stdout
    if not (plain.isatty() and sys.stderr.isatty()):
        yield NO_BAR
        return
    from tqdm import tqdm  # datasets, which requirements.txt names, brings it

    with tqdm(total=total, initial=done, unit=unit, delay=delay, dynamic_ncols=True) as shown:
        sys.stdout = Above(plain, tqdm.external_write_mode)
        try:
            yield Bar(shown)
        finally:
            plain.write(sys.stdout.text)
            sys.stdout = plain


def watched(items: Sequence, unit: str) -> Iterator:
    """The items, with a bar over them."""
    with bar_of(len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()
