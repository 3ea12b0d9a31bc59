"""Every file that this project writes is written here: whole or not at all.

A file is first written under a name of its own, forced to the disk, then renamed: a kill or a full
disk at any moment leaves the old one or the new one. A test holds the other modules to that.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from config import fail


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace `path` by what `write` puts into a binary file. Raises OSError, naming the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A unique name: two processes that write one file at a time must not share a half of it.
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(number, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's own right is the owner's alone
        os.replace(name, path)
    except (OSError, RuntimeError) as error:  # torch puts an error of its own over "disk full"
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} could not be saved: {str(first).splitlines()[0]}") from None
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """JSON Lines, one record at a time, so that memory need not hold them."""
    write_whole(path, lambda file: file.writelines(as_line(record) for record in records))


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    write_whole(path, lambda file: torch.save(state, file))


def write_figure(path: Path, figure, dpi: int = 110) -> None:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    write_whole(path, lambda file: file.write(buffer.getvalue()))


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Within, a function that appends bytes to a file of the folder, by its name; afterwards the
    folder is there, with all of them. If another process made it meanwhile, theirs stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))

    def append(name: str, content: bytes) -> None:
        with open(unfinished / name, "ab") as file:
            file.write(content)

    try:
        yield append
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(unfinished, folder)
    except OSError as error:
        if not folder.is_dir():
            raise OSError(f"{folder} could not be written: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def append_lines(path: Path, records: Iterable[dict]) -> None:
    """More lines at the end of a file of records; a kill may cut the last one short."""
    with open(path, "ab") as file:
        file.writelines(as_line(record) for record in records)


def read_records(path: Path) -> list[dict]:
    """The records of metrics.jsonl or of answers; a line that a kill cut short is dropped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def as_line(record: dict) -> bytes:
    return (json.dumps(record) + "\n").encode()


def open_log(path: Path, more: bool):
    """A file for the output of another program; more=True adds to what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab" if more else "wb")


def silence():
    """An output that nobody reads, open until the process ends."""
    return open(os.devnull, "w")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    return digest.hexdigest()


def read_checkpoint(path: Path, form: str) -> dict[str, Any]:
    """The saved state, on the CPU; one line and exit 2 for a file that is no sound checkpoint.
    `form` is what its field "format" has to say."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself does not notice a flipped byte
        if damaged:
            fail(f"checkpoint {path} is damaged (in {damaged}); train again or use another one")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no checkpoint {path}; train first: python train.py config/gsm8k_jepa.py")
    except Exception as error:  # not a zip archive, not torch's, not weights only, ...
        fail(f"{path} is not a readable checkpoint ({type(error).__name__}: "
             f"{str(error).splitlines()[0][:80] if str(error) else ''})")
    written = state.get("format") if isinstance(state, dict) else None
    if written != form:
        fail(f"{path} was not written by this version of train.py (it says {written}, not {form}); "
             "train again, or use the commit that its config.json names")
    return state


def set_aside(path: Path) -> Path:
    """Move a run's folder, or a file of one, into earlier/ beside it, out of the way of a new one
    with its name: nothing is overwritten. Returns where it is now."""
    (path.parent / "earlier").mkdir(exist_ok=True)
    ending = "" if path.is_dir() else path.suffix  # a folder may be called jepa_weight=0.5
    for number in itertools.count(1):
        aside = path.parent / "earlier" / f"{path.name.removesuffix(ending)}-{number}{ending}"
        if not aside.exists():
            return Path(shutil.move(path, aside))
