"""A run: its folder under out/, written by train.py and opened by the other scripts.

    make_model(config, vocab_size)  the only place where a trunk is constructed
    load_run(path, device)          a trained run, ready to evaluate
    data_of(run, folder)            the data that it was trained on, or a line that says it is not
    Folder, Progress, restore       what training writes, and goes on from
"""

import math
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import Config, fail, relocated, what
from data import Data, load_data
from model import GPT, Trunk
from plumbing import files
from plumbing.processes import versions
from plumbing.tokenizers import Tokenizer, load_tokenizer
from views import layout_of

FORMAT = "nanoJEPA 2"  # of a checkpoint


def make_model(config: Config, vocab_size: int) -> Trunk:
    """The network of a config, untrained; its weights come from torch's random state."""
    return GPT(config, vocab_size, layout_of(config).parents)


@dataclass
class Run:
    """A trained model with what is needed to use it."""

    name: str
    path: Path
    config: Config
    model: Trunk
    tokenizer: Tokenizer
    step: int
    provenance: dict[str, Any]


def load_run(path: Path, device: torch.device) -> Run:
    """The run at `path`, a folder (its last checkpoint) or a checkpoint file, ready to evaluate."""
    path = path / "ckpt.pt" if path.is_dir() else path
    state = files.read_checkpoint(path, FORMAT)
    config = config_of(state, path)
    tokenizer = tokenizer_of(state, path)
    model = make_model(config, tokenizer.vocab_size)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        fail(f"{path}: its weights do not fit its config ({str(error).splitlines()[0]})")
    name = path.parent.name if path.stem == "ckpt" else f"{path.parent.name}/{path.stem}"
    return Run(name, path, config, model.to(device).eval(), tokenizer, state["step"],
               state["provenance"])


def data_of(run: Run, folder: str) -> Data:
    """The data that a run was trained on, in `folder` or, if that is empty, where it was; one line
    and exit 2 if other data lies there."""
    data = load_data(relocated(run.config, folder), run.tokenizer)
    trained_on = run.provenance["data"]
    if data.provenance["train_sha256"] != trained_on["train_sha256"]:
        fail(f"{run.path} was trained on {trained_on['dataset']} from {trained_on['source']}, "
             f"other data than {data.provenance['source']} holds; --data_dir names a folder")
    return data


def chosen_run(names: list[str], out_dir: str, device: torch.device) -> Run:
    """The one run that a command line names, as an argument or as --out_dir; else the newest."""
    names = [*names, out_dir] if out_dir else names
    if len(names) > 1:
        fail(f"one run at a time, got {' '.join(names)}")
    return load_run(Path(names[0]) if names else runs_newest_first()[0], device)


def runs_newest_first() -> list[Path]:
    """The folders under out/ that hold a checkpoint."""
    found = sorted(Path("out").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime, reverse=True)
    if not found:
        fail("no run under out/ yet; train one first: python train.py config/gsm8k_jepa.py")
    return [path.parent for path in found]


def config_of(state: dict[str, Any], path: Path) -> Config:
    unknown = set(state["config"]) - {f.name for f in fields(Config)}
    if unknown:
        fail(f"{path} has config fields that this version lacks: {', '.join(sorted(unknown))}")
    return Config(**state["config"])


def tokenizer_of(state: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with."""
    saved = state["tokenizer"]
    tokenizer = load_tokenizer(saved["name"], saved["dump"])
    if tokenizer.sha256 != saved["sha256"]:
        fail(f"{path} was made with another tokenizer ({saved['name']} {saved['sha256'][:12]}, "
             f"here {tokenizer.sha256[:12]}); its answers would be noise")
    return tokenizer


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds it."""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    best_ce: float = math.inf


class Folder(NamedTuple):
    """The run's folder; the first process alone writes to it."""

    path: Path
    data: Data
    provenance: dict[str, Any]
    first: bool

    def log(self, **record) -> None:
        if self.first:
            files.append_lines(self.path / "metrics.jsonl", [record])

    def save(self, name: str, t, progress: Progress, resumable: bool) -> None:
        """A checkpoint of t (train.Training) to evaluate, and to go on from if it is resumable.
        It holds plain types only, so that it loads without running code."""
        tokenizer, state = self.data.tokenizer, {}
        if resumable:
            on_cuda = t.model.device.type == "cuda"
            state = dict(
                optimizer=t.optimizer.state_dict(), ema=t.ema.state_dict() if t.ema else None,
                rng=torch.get_rng_state(),
                cuda_rng=torch.cuda.get_rng_state(t.model.device) if on_cuda else None,
            )  # fmt: skip
        files.write_checkpoint(self.path / name, {
            "format": FORMAT, "config": asdict(t.pairs.config), "model": t.model.state_dict(),
            "tokenizer": {"name": tokenizer.name, "dump": tokenizer.dump(),
                          "sha256": tokenizer.sha256},
            "provenance": self.provenance, "step": progress.step, "progress": asdict(progress),
            **state,
        })  # fmt: skip


def read_to_resume(config: Config) -> dict[str, Any]:
    """The checkpoint that a run goes on from. What is trained may not have changed; how long, and
    how often it is evaluated, may."""
    path, free = Path(config.out_dir) / "ckpt.pt", ("max_iters", "eval_interval")
    saved = files.read_checkpoint(path, FORMAT)
    now, was = what(config), what(config_of(saved, path))
    changed = [f"{key} was {was[key]!r}, is {now[key]!r}" for key in now
               if was[key] != now[key] and key not in free]  # fmt: skip
    if changed:
        fail(f"{path} cannot be resumed with another config: {'; '.join(changed)}")
    return saved


def restore(t, saved: dict[str, Any], data: Data) -> Progress:
    """Put a checkpoint's state into the model, optimizer and random numbers of t (train.Training);
    how far it had come. Exits if it was trained on other data."""
    was, now = saved["provenance"]["data"], data.provenance
    # Where it lies may differ; the system prompt is part of the rows, and so of their digest.
    changed = [key for key in now if key not in ("source", "system") and was.get(key) != now[key]]
    if changed:
        fail(f"{t.pairs.config.out_dir}/ckpt.pt was trained on other data: {', '.join(changed)} "
             "changed")
    t.model.load_state_dict(saved["model"])
    t.optimizer.load_state_dict(saved["optimizer"])
    if t.ema:
        t.ema.load_state_dict(saved["ema"])
    torch.set_rng_state(saved["rng"])
    if t.model.device.type == "cuda" and saved["cuda_rng"] is not None:
        torch.cuda.set_rng_state(saved["cuda_rng"], t.model.device)
    return Progress(**saved["progress"])


def provenance_of(argv: list[str], data: Data, saved: dict[str, Any] | None) -> dict[str, Any]:
    """Of what a run is made; a resumed one also says whose code took the steps before."""
    provenance = {"data": data.provenance, **versions(), "command": shlex.join(argv)}
    if saved:
        was = saved["provenance"]
        earlier_run = {key: was[key] for key in was if key not in ("data", "earlier")}
        provenance["earlier"] = [*was.get("earlier", []),
                                 {"until_step": saved["step"], **earlier_run}]  # fmt: skip
    return provenance


def start_folder(folder: Folder, config: Config, progress: Progress, again: bool) -> None:
    """config.json and metrics.jsonl; a new run moves an earlier one of its name out of the way.
    A resumed one drops what was logged after its checkpoint, and the evaluation at that very step
    if it comes `again`."""
    path, kept = folder.path, []
    if config.init_from == "resume":
        kept = [r for r in files.read_records(path / "metrics.jsonl") if r["step"] < progress.step
                or (r["step"] == progress.step and "val_ce" in r and not again)]  # fmt: skip
    elif (path / "ckpt.pt").exists():
        print(f"moved the earlier run to {files.set_aside(path)}")
    about = {"config": asdict(config), "provenance": folder.provenance}
    files.write_json(path / "config.json", about)
    files.write_lines(path / "metrics.jsonl", kept)
