"""Where a script runs: the device and its dtype, one process or several, signals, the way out."""

import contextlib
import ctypes
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import CHOICES, fail
from plumbing.files import fill_standard_numbers, silence
from plumbing.output import steady_output, stops

ROOT = Path(__file__).resolve().parent.parent  # the checkout


class Processes(NamedTuple):
    """This process among those that torchrun started; every method does nothing in a single one."""

    rank: int = 0
    world: int = 1

    def mine(self, rows):
        """This process's share of rows (B, ...): every world-th."""
        return rows[self.rank :: self.world]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The shares of all processes, (B / world, C) -> (B, C) in the order of the whole;
        gradients flow to one's own share only."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        torch.distributed.all_gather(parts, x.detach().contiguous())
        parts[self.rank] = x
        return torch.stack(parts, 1).flatten(0, 1)

    def sum(self, value: float, device: torch.device) -> float:
        """The sum of what each process has."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return total.item()

    def agree(self, number: int, device: torch.device) -> int:
        """The largest of the processes' numbers, so that all of them see a signal at one step."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, device=device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)

    def leave(self) -> None:
        """End together. A process that leaves at once can deadlock: gloo's threads still have to
        let go of the last tensors, for which they need the interpreter that waits for them."""
        if self.world > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def join_processes(device: str) -> Processes:
    """Join those that torchrun started, if it did. All but the first print no more."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world == 1:
        return Processes()
    if device.startswith("cuda:"):
        fail(f"device={device} would put all {world} processes on one GPU; --device=cuda gives "
             "each its own")
    on_cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_cuda:
        local, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= n_gpus:
            fail(f"process {local + 1} on this machine has no GPU of its own: there are {n_gpus}; "
                 f"--nproc_per_node={n_gpus}")
        torch.cuda.set_device(local)
    # The first process evaluates while the others wait for its next step, however long it takes;
    # the default timeout ends a run after 10 or 30 minutes. A process that dies is noticed anyway.
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(days=7))
    if rank:
        sys.stdout = silence()
    return Processes(rank, world)


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
    dtype = dtype_on(chosen, dtype)
    keep_memory(chosen)

    def autocast():
        if dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(chosen.type, torch.bfloat16)

    threads = f", {torch.get_num_threads()} threads" if chosen.type == "cpu" else ""
    print(f"device {chosen} {dtype}{threads}")
    return chosen, autocast


def dtype_on(device: torch.device, dtype: str) -> str:
    """What computes there: for auto bf16, where the device has it."""
    return dtype if dtype != "auto" else "bfloat16" if has_bf16(device) else "float32"


def has_bf16(device: torch.device) -> bool:
    """Has the device instructions for bf16? One that only emulates it is slower than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def keep_memory(device: torch.device) -> None:
    # torch's matrix products (oneDNN) keep code and buffers of every shape they meet, and here each
    # batch has a new one: 11 MB a step, 6 GB in a run. Keep the latest few.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # By default glibc returns every large tensor to the kernel, which then hands out zeroed
        # pages anew: 60 % of the output layer's time. Keep freed memory (M_MMAP_THRESHOLD = -3,
        # M_TRIM_THRESHOLD = -1).
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30), libc.mallopt(-1, 2**31 - 1)


def versions() -> dict[str, str]:
    """Commit, torch, python, machine and time, for the provenance of a result."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {
        "commit": commit or "unknown", "torch": str(torch.__version__),
        "python": platform.python_version(), "machine": platform.machine(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def clock(seconds: float) -> str:
    """Minutes and seconds: 59.7 is 1:00, never 0:60."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class StopSignal:
    """Ctrl-C, SIGTERM and SIGHUP set `number`, for the loop to see; a second one ends at once. The
    handler does nothing else: whatever it interrupts may be half done."""

    def __init__(self):
        self.number = 0
        for number in stops():
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)


def compile_or_not(model: torch.nn.Module, autocast, try_once) -> None:
    """Compile forward in place, or say why not and go on uncompiled; try_once() runs it."""
    try:
        model.compile(dynamic=True)
        with autocast():
            try_once()
        print("compiled")
    except Exception as error:  # no compiler, an unsupported GPU, ...
        model._compiled_call_impl = None
        print(f"not compiled, running eagerly: {type(error).__name__}: {error}".splitlines()[0])
    model.zero_grad(set_to_none=True)


def run_main(main) -> None:
    """Run a script's main; what is not the script's fault ends in a line, not a traceback."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may be missing here; no figure needs a window
    fill_standard_numbers()
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a ? where the encoding has no λ
    with steady_output():
        run_to_a_line(main)


def run_to_a_line(main) -> None:
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print(end="", flush=True)  # takes a bar away
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:  # disk full, no right to write, ...
        fail(str(error))
    except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is one of the latter
        first = str(error).partition("\n")[0]
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in first:  # which is how a CPU says it
            raise
        fail(f"the device ran out of memory, a smaller batch_size needs less: {first}")
