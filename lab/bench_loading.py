"""From a file to the first batch: the part `data` of bench.py."""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from config import fail, find_recipe
from data import jsonl_files
from lab import bench_tables, timing
from lab.timing import Setup, quartiles_of, rounds_of
from plumbing.files import write_lines
from plumbing.processes import ROOT

ROWS = (10_000, 100_000, 1_000_000)  # of made-up files

# What a fresh process does until it has a batch.
FRESH = """
import json, resource, sys, time
from config import load_config
from data import load_data
config = load_config(sys.argv[1:])
begin = time.perf_counter()
train = load_data(config).pairs["train"]
train.pack(train.batch(0), train.layout.row)
seconds = time.perf_counter() - begin
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(train)]))
"""


def loading(setup: Setup) -> dict:
    """From a file to the first batch in fresh processes: cold, and warm with its tokens on disk.
    Then files of more and more pairs, 20 words each."""
    results = {"rounds": timing.SLOW_ROUNDS, "sets": {}}
    argv, own = from_anywhere(setup)
    with tempfile.TemporaryDirectory() as folder:
        sets = {setup.data.provenance["dataset"]: own}
        for n in ROWS:
            sets[f"{n:,} pairs"] = [f"--dataset={make_pairs(Path(folder) / f'{n}.jsonl', n)}"]
        for name, options in sets.items():
            rounds = [load_twice([*argv, *options]) for _ in rounds_of(f"data, {name}",
                                                                       timing.SLOW_ROUNDS)]
            found = results["sets"][name] = {"pairs": rounds[0][0].pairs}
            for state, loads in zip(("cold", "warm"), zip(*rounds)):
                found[state] = {"seconds": quartiles_of(load.seconds for load in loads),
                                "MB": quartiles_of(load.megabytes for load in loads)}  # fmt: skip
    bench_tables.print_loading(results)
    return results


def from_anywhere(setup: Setup) -> tuple[list[str], list[str]]:
    """The command line without relative paths, and an option that names the data by a whole one:
    a fresh process runs in another folder."""
    argv = [arg if arg.startswith("--") else str(find_recipe(arg).resolve()) for arg in setup.argv]
    config = setup.config
    if config.dataset.endswith((".jsonl", ".txt")):
        return argv, [f"--dataset={Path(config.dataset).resolve()}"]
    if files := jsonl_files(config):
        return argv, [f"--data_dir={files['train'].resolve().parent}"]
    return argv, []


class Load(NamedTuple):
    """What a fresh process took to its first batch."""

    seconds: float
    megabytes: float  # at its peak
    pairs: int  # to train on


def load_twice(argv: list[str]) -> list[Load]:
    """Two fresh processes one after the other; the first finds no tokens on disk."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            done = subprocess.run([sys.executable, "-c", FRESH, *argv], capture_output=True,
                                  text=True, cwd=folder, env={**os.environ, "PYTHONPATH": path})
            if done.returncode:
                fail(f"a fresh process could not load: {done.stderr.strip()[-200:]}")
            seconds, peak, n_pairs = json.loads(done.stdout.splitlines()[-1])
            megabytes = peak / (1e6 if sys.platform == "darwin" else 1e3)
            loads.append(Load(seconds, megabytes, n_pairs))
    return loads


def make_pairs(path: Path, n: int) -> Path:
    """A file of n pairs of made-up words, all different."""
    r = random.Random(0)
    words = [a + b for a in "bcdfghklmnprst" for b in ("ar", "en", "il", "od", "un", "ast", "ell")]

    def rows() -> Iterator[dict[str, str]]:
        for i in range(n):
            yield {"text": f"{' '.join(r.choices(words, k=12))} {i}",
                   "code": f"{i} {' '.join(r.choices(words, k=8))}"}  # fmt: skip

    write_lines(path, rows())
    return path
