"""A run's records sent to a tracker as well: trackio, which keeps them on this machine, or wandb.

    refuse_tracker(name)                exits where it cannot work
    start_tracker(name, folder, about)  -> a Tracker; that of "none" does nothing

The keys are those of metrics.jsonl, which is written in any case. A tracker that fails in the
middle of a run is left out from then on: it never takes the run along.
"""

import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import fail


class Tracker:
    def __init__(self, name: str = "none"):
        self.name, self.run = name, None  # its run, with log(record, step=...) and finish()

    def log(self, record: dict[str, Any]) -> None:
        if self.run:
            rest = {key: value for key, value in record.items() if key != "step"}
            self.carefully(lambda: self.run.log(rest, step=record["step"]))

    def finish(self) -> None:
        """Wait until everything is sent."""
        if self.run:
            self.carefully(self.run.finish)

    def carefully(self, do: Callable) -> None:
        try:
            do()
        except Exception as error:  # whatever goes wrong there, here training goes on
            said = (str(error).splitlines() or [""])[0]
            print(f"{self.name} failed and is left out from here on: {type(error).__name__}: "
                  f"{said}; metrics.jsonl has everything")  # fmt: skip
            self.run = None


def refuse_tracker(name: str) -> None:
    """Exit if a tracker's package or its login is missing, before anything is loaded."""
    if name == "none":
        return
    try:
        package = importlib.import_module(name)
    except ImportError:
        fail(f"track={name} needs a package: pip install {name}")
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if name == "trackio" or offline:
        return
    try:
        why = "" if package.login(prompt=False) else "nobody is logged in"
    except Exception as error:  # a key that is none, no network, a setting it does not know, ...
        why = (str(error).splitlines() or [type(error).__name__])[0]
    if why:
        fail(f"track=wandb: {why}; wandb login logs in, and WANDB_MODE=offline needs no login")


def start_tracker(name: str, folder: Path, about: dict[str, Any]) -> Tracker:
    """Open a tracker's run for a run's folder. `about` is what config.json holds. The runs of a
    sweep are a group, which has its name. A resumed run goes on in the tracker's run it began."""
    if name == "none":
        return Tracker()
    began = about["provenance"].get("earlier", [about["provenance"]])[0]["time"]
    group = None if folder.parent.name in ("out", "") else folder.parent.name
    options = dict(project="nanojepa", name=f"{folder.name} {began}", group=group, config=about,
                   resume="allow")  # fmt: skip
    package = importlib.import_module(name)
    if name == "wandb":  # there the id says which run it is
        digest = hashlib.sha256(f"{folder.resolve()} {began}".encode()).hexdigest()[:16]
        settings = package.Settings(console="off", quiet=True)
        options |= dict(id=digest, dir=str(folder), settings=settings)
    else:
        options |= dict(embed=False, auto_log_cpu=False, auto_log_gpu=False)
    tracker = Tracker(name)
    tracker.carefully(lambda: setattr(tracker, "run", package.init(**options)))
    return tracker
