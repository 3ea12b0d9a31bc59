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
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from config import fail

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DAY = 24 * 3600
HELD: dict[Any, int | None] = {}  # the locks of this process, by what they are on


def write_whole(
    path: Path, write: Callable[[BinaryIO], Any], previous: Path | None = None
) -> None:
    """Replace `path` by what `write` puts into a binary file. Raises OSError, naming the path. What
    stood there is kept as `previous`, if that is given."""
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
        if previous and path.exists():
            keep(path, previous)
        os.replace(name, path)
    except (OSError, RuntimeError) as error:  # torch puts an error of its own over "disk full"
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} could not be saved: {str(first).splitlines()[0]}") from None
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """What is nan or infinite becomes null: JSON has neither, and most programs refuse them."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """JSON Lines, one record at a time, so that memory need not hold them."""
    write_whole(path, lambda file: file.writelines(as_line(record) for record in records))


def keep(path: Path, previous: Path) -> None:
    """Let `previous` be another name of the file at `path`, which is about to be replaced."""
    link = path.with_name(f".{previous.name}.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous)
    except OSError:  # a file system without links: for a moment there is `previous` alone
        os.replace(path, previous)


def previous_of(path: Path) -> Path:
    """The checkpoint before the one at `path`: ckpt-previous.pt for ckpt.pt."""
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def has_checkpoint(folder: Path) -> bool:
    """Is there any, be it the previous or the best one, that a new run would write over?"""
    names = "ckpt.pt", previous_of(Path("ckpt.pt")), "best.pt"
    return any((folder / name).exists() for name in names)


def take_previous(path: Path) -> None:
    """Put the checkpoint before the one at `path` in its place; that one is moved aside."""
    if path.exists():
        print(f"moved {path} to {set_aside(path)}; {previous_of(path).name} takes its place")
    os.replace(previous_of(path), path)


def write_checkpoint(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    write_whole(path, lambda file: torch.save(state, file), previous)


def keep_weights_alone(path: Path, form: str) -> None:
    """Take from a checkpoint what only training on needs: two thirds of it, and the one before."""
    state = read_checkpoint(path, form)
    to_go_on = ("optimizer", "ema", "rng", "cuda_rng")
    write_checkpoint(path, {key: state[key] for key in state if key not in to_go_on})
    previous_of(path).unlink(missing_ok=True)


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
    remove_leftovers(folder.parent)
    unfinished, lock = new_unfinished(folder.parent)

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
        if lock is not None:
            os.close(lock)


def new_unfinished(parent: Path) -> tuple[Path, int | None]:
    """A new temporary folder, and the lock by which others see that somebody is at work on it."""
    while True:
        unfinished = Path(tempfile.mkdtemp(dir=parent, prefix="unfinished-"))
        with contextlib.suppress(OSError):  # another process took it for a leftover just now
            lock = try_lock(unfinished)
            if unfinished.exists():
                return unfinished, lock


def remove_leftovers(parent: Path) -> None:
    """Remove the folders that killed writers left: no lock is on them any more. Where there are no
    locks, and under the name they had in earlier versions, those that are a day old."""
    for path in [*parent.glob("unfinished-*"), *parent.glob("tmp????????")]:
        with contextlib.suppress(OSError):  # locked, or gone meanwhile
            lock = try_lock(path) if path.name.startswith("unfinished-") else None
            if lock is not None or time.time() - path.stat().st_mtime > DAY:
                shutil.rmtree(path, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def remove_folder(folder: Path) -> None:
    """All of it at once, so that no other process meets half of it; perhaps one has removed it."""
    taken, lock = new_unfinished(folder.parent)
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, taken / folder.name)
    shutil.rmtree(taken, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def append_lines(path: Path, records: Iterable[dict]) -> None:
    """More lines at the end of a file of records; a kill may cut the last one short."""
    with open(path, "ab") as file:
        file.writelines(as_line(record) for record in records)


def read_records(path: Path) -> list[dict]:
    """The records of metrics.jsonl or of answers; a damaged line is dropped, as one that a
    kill cut short."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
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


def fill_standard_numbers() -> None:
    """Where input, output or errors were closed from the start, no file of ours takes its number:
    a warning would be written into it."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)


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
    other = (f"; {before} is the checkpoint before it, from which --init_from=previous goes on"
             if (before := previous_of(path)).exists() else "")  # fmt: skip
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself does not notice a flipped byte
        if damaged:
            fail(f"checkpoint {path} is damaged (in {damaged})"
                 f"{other or '; train again or use another one'}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no checkpoint {path}{other or '; train first: python train.py gsm8k_jepa'}")
    except Exception as error:  # not a zip archive, not torch's, not weights only, ...
        fail(f"{path} is not a readable checkpoint ({type(error).__name__}: "
             f"{str(error).splitlines()[0][:80] if str(error) else ''}){other}")
    written = state.get("format") if isinstance(state, dict) else None
    if written != form:
        fail(f"{path} was not written by this version of train.py (it says {written}, not {form}); "
             "train again, or use the commit that its config.json names")
    return state


# --- whose folder it is -----------------------------------------------------------------------


def claim_run(folder: Path) -> None:
    """For the first process of a run, see claim. Checkpoints that a kill left half written, each as
    large as a whole one, are removed."""
    if os.environ.get("RANK", "0") == "0":
        claim(folder, is_run)
        for path in folder.glob(".*.pt.*.tmp"):
            path.unlink()


def claim(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """Make the folder this process's own until it ends, in whatever way: one line and exit 2 if
    another living process has it, or if it holds what `is_ours` does not know."""
    path = folder / ".lock"
    if owner := owner_of(folder):
        fail(f"{folder} belongs to process {owner}, which is still at work in it; wait until it "
             f"ends or stop it (kill {owner}), or name another --out_dir")
    if folder.exists() and not is_ours(folder):
        fail(f"{folder} holds files that are not of a run; nothing was touched, name another "
             "--out_dir")
    if folder in HELD or (path.exists() and inode(path.stat()) in HELD):
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = try_lock(path, os.O_RDWR | os.O_CREAT)
        if lock is None:
            HELD[folder] = None
            print(f"no locks here: nothing keeps a second run out of {folder}")
        elif path.exists() and inode(path.stat()) == inode(os.fstat(lock)):
            HELD[inode(os.fstat(lock))] = lock
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
            return
        else:  # it was moved away just now
            os.close(lock)
            claim(folder, is_ours)
    except BlockingIOError:
        fail(f"{folder} was taken by another process just now; name another --out_dir")


def owner_of(folder: Path) -> str:
    """The number of the other living process that has claimed the folder; empty if there is none.
    """  # fmt: skip
    path = folder / ".lock"
    try:
        if inode(path.stat()) not in HELD and (lock := try_lock(path)) is not None:
            os.close(lock)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except BlockingIOError:
        return path.read_text().strip() or "?"
    return ""


def try_lock(path: Path, flags: int = os.O_RDONLY) -> int | None:
    """Lock a file or folder: its open number, or None where nothing can be locked (Windows, some
    network disks). Raises BlockingIOError if another process has it. The lock ends with the
    process, also with one that is killed."""
    if fcntl is None:
        return None
    number = os.open(path, flags, 0o666)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(number)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return number


def inode(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def is_run(folder: Path) -> bool:
    """Is the folder a run's, or what is left of one that was killed before it wrote its config, or
    empty? Other programs call their files ckpt.pt and metrics.jsonl too."""
    names = {path.name for path in folder.iterdir()}
    with contextlib.suppress(Exception):  # damaged, of another form, ...
        if "config.json" in names:
            return {"config", "provenance"} <= read_json(folder / "config.json").keys()
        if "ckpt.pt" in names:  # copied here without the rest, to go on
            state = torch.load(folder / "ckpt.pt", "cpu", weights_only=True, mmap=True)
            return state["format"].startswith("nanoJEPA")
    return all(name in (".lock", "log.txt") or re.fullmatch(r"\..*\.tmp", name) for name in names)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def set_aside(path: Path) -> Path:
    """Move a run's folder, or a file of one, into earlier/ beside it, out of the way of a new one
    with its name: nothing is overwritten. Returns where it is now."""
    (path.parent / "earlier").mkdir(exist_ok=True)
    ending = "" if path.is_dir() else path.suffix  # a folder may be called jepa_weight=0.5
    for number in itertools.count(1):
        aside = path.parent / "earlier" / f"{path.name.removesuffix(ending)}-{number}{ending}"
        if not aside.exists():
            return Path(shutil.move(path, aside))
