"""What the scripts share about a run (a folder under out/): device, checkpoints, held-out pairs."""

import contextlib
import ctypes
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import CHOICES, Config, fail, moved
from data import Data, load_data
from model import GPT, read_hidden
from tokenizer import Tokenizer, gpt2_tokenizer
from views import Pairs, layout_of


def join_processes(device: str) -> tuple[int, int]:
    """Rank and number of the processes that torchrun started; 0 and 1 without it. All but the first
    print no more."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        on_cuda = device in ("auto", "cuda") and torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if on_cuda else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    return rank, world


def leave_processes(world: int) -> None:
    """End together. A process that leaves at once can deadlock: gloo's threads still have to let
    go of the last tensors, for which they need the interpreter that waits for them to end."""
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def pick_device(device: str, dtype: str) -> tuple[torch.device, Any]:
    """The device, and a function that opens the autocast context for its dtype."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen)
        if chosen.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("cpu, cuda and mps are supported")
    except (RuntimeError, AssertionError, ImportError) as error:
        fail(f"device={device} cannot be used here: {str(error).splitlines()[0][:120]}")
    if dtype not in CHOICES["dtype"]:
        fail(f"dtype={dtype} is not one of {', '.join(CHOICES['dtype'])}")
    if dtype == "auto":
        if chosen.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # without these instructions a CPU is slower in bf16 than in fp32
            has = getattr(torch.cpu, "get_capabilities", dict)() if chosen.type == "cpu" else {}
            fast = has.get("avx512_bf16") or has.get("amx_bf16")
        dtype = "bfloat16" if fast else "float32"
    # On a CPU, torch's matrix products (oneDNN) keep code and buffers of every shape they meet, and
    # here each batch has a new one: 11 MB a step, 6 GB in a run. Keep the latest few.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    if chosen.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # By default glibc returns every large tensor to the kernel, which then hands out zeroed
        # pages anew: 60 % of the output layer's time. Keep freed memory (M_MMAP_THRESHOLD = -3,
        # M_TRIM_THRESHOLD = -1).
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, 2**31 - 1)

    def autocast():
        if dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(chosen.type, torch.bfloat16)

    threads = f", {torch.get_num_threads()} threads" if chosen.type == "cpu" else ""
    print(f"device {chosen} {dtype}{threads}")
    return chosen, autocast


def versions() -> dict[str, str]:
    """Commit, torch, python, machine and time, for the provenance of a result."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {
        "commit": commit or "unknown", "torch": str(torch.__version__),
        "python": platform.python_version(), "machine": platform.machine(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


# --- checkpoints ------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write all of it or nothing: a kill at any moment leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch puts an error of its own over "disk full"
        temporary.unlink(missing_ok=True)
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} could not be saved: {str(first).splitlines()[0]}") from None
    os.replace(temporary, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The saved state, on the CPU; one line and exit 2 for a file that is no sound checkpoint."""
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
    if not isinstance(state, dict) or state.get("format") != "nanoJEPA 1":
        fail(f"{path} was not written by this train.py; give a ckpt.pt that was")
    return state


@dataclass
class Run:
    """A trained model with what is needed to use it."""

    name: str
    path: Path
    config: Config
    model: GPT
    tokenizer: Tokenizer
    step: int
    provenance: dict[str, Any]


def load_run(path: Path, device: torch.device) -> Run:
    """The run at `path`, a folder (its last checkpoint) or a checkpoint file, ready to evaluate."""
    path = path / "ckpt.pt" if path.is_dir() else path
    state = read_checkpoint(path)
    config = config_of(state, path)
    tokenizer = tokenizer_of(state, path)
    model = GPT(config, tokenizer.vocab_size, layout_of(config).parents)
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
    data, trained_on = load_data(moved(run.config, folder), run.tokenizer), run.provenance["data"]
    if data.provenance["train_sha256"] != trained_on["train_sha256"]:
        fail(f"{run.path} was trained on {trained_on['dataset']} from {trained_on['source']}, "
             f"other data than {data.provenance['source']} holds; --data_dir names a folder")
    return data


def config_of(state: dict[str, Any], path: Path) -> Config:
    unknown = set(state["config"]) - {f.name for f in fields(Config)}
    if unknown:
        fail(f"{path} has config fields that this version lacks: {', '.join(sorted(unknown))}")
    return Config(**state["config"])


def tokenizer_of(state: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer a checkpoint was trained with: gpt2 is rebuilt, others are stored in it."""
    saved = state["tokenizer"]
    ranks = saved["ranks"]
    tokenizer = Tokenizer.parse(saved["name"], ranks) if ranks else gpt2_tokenizer()
    if tokenizer.sha256 != saved["sha256"]:
        fail(f"{path} was made with another tokenizer ({saved['name']} {saved['sha256'][:12]}, "
             f"here {tokenizer.sha256[:12]}); its answers would be noise")
    return tokenizer


def checkpoint_state(config: Config, model: GPT, tokenizer: Tokenizer, **more) -> dict[str, Any]:
    """What every checkpoint holds; plain types only, so that it loads without running code."""
    ranks = "" if tokenizer.name == "gpt2" else tokenizer.dump()
    return {
        "format": "nanoJEPA 1", "config": asdict(config), "model": model.state_dict(),
        "tokenizer": {"name": tokenizer.name, "ranks": ranks, "sha256": tokenizer.sha256}, **more,
    }  # fmt: skip


def runs_newest_first() -> list[Path]:
    """The folders under out/ that hold a checkpoint."""
    found = sorted(Path("out").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime, reverse=True)
    if not found:
        fail("no run under out/ yet; train one first: python train.py config/gsm8k_jepa.py")
    return [path.parent for path in found]


def read_records(path: Path) -> list[dict]:
    """The records of metrics.jsonl or of answers; a line that a kill cut short is dropped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def rewrite_records(path: Path, records: list[dict]) -> None:
    """Replace a file of records; as with a checkpoint, a kill leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, path)


def set_aside(path: Path) -> Path:
    """Move a run's folder, or a file of one, into earlier/ beside it, out of the way of a new one
    with its name: nothing is overwritten. Returns where it is now."""
    (path.parent / "earlier").mkdir(exist_ok=True)
    ending = "" if path.is_dir() else path.suffix  # a folder may be called jepa_weight=0.5
    for number in itertools.count(1):
        aside = path.parent / "earlier" / f"{path.name.removesuffix(ending)}-{number}{ending}"
        if not aside.exists():
            return Path(shutil.move(path, aside))


# --- held-out pairs ---------------------------------------------------------------------------


@torch.no_grad()
def encode_pairs(model: GPT, pairs: Pairs, n: int, device: torch.device, autocast):
    """Cross-entropy and both views' embeddings of the first n pairs of a split.

    Returns: mean cross-entropy per label in nats; pred and target, float32 on the CPU, (m, C) for
    the m of them that have both views, in the order of the pairs.
    """
    n = min(n, len(pairs))
    layout, config = pairs.layout, pairs.config
    order = np.argsort(pairs.lengths[:n].sum(1), kind="stable")  # little padding
    has_target = pairs.has_target(np.arange(n))
    pred = torch.empty(n, config.n_embd)
    target = torch.empty_like(pred)
    ce, n_labels = 0.0, 0
    was_training = model.training
    model.eval()
    for begin in range(0, n, 16):
        at = order[begin : begin + 16]
        rows = pairs.pack(at, layout.row, has_target[at]).to(device)
        with autocast():
            hidden, ce_sum = model(*rows)
        ce, n_labels = ce + ce_sum.item(), n_labels + (rows.targets != -1).sum().item()
        pred[at] = read_hidden(hidden, rows.block, layout.pred).float().cpu()
        target[at] = read_hidden(hidden, rows.block, layout.enc, config.pooling).float().cpu()
    model.train(was_training)
    return ce / n_labels, pred[has_target], target[has_target]


def exit_quietly(main) -> None:
    """Run a script's main; what is not the script's fault ends in a line, not a traceback."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # disk full, no right to write, ...
        fail(str(error))
    except torch.OutOfMemoryError as error:
        fail(f"the device ran out of memory, a smaller batch_size needs less: "
             f"{str(error).splitlines()[0]}")
