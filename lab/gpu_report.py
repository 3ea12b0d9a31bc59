"""What one CUDA GPU makes of this project.

    python -m lab.gpu_report [--budget=170] [--out_dir=out] [--trunk=...]

correct     losses, hidden states and gradients of a JEPA step against the CPU's; cached generation
steps       CE only and JEPA, eager and compiled, for three models
attention   a boolean mask against FlexAttention with the tree of blocks as its mask
two rows    the official recipe on the same weights, beside our one row
generation  at four batch sizes

Each item is written to gpu_report.json when it is done, and gpu_report.md is made from that. A part
ends when its budget is spent; started again on the same commit, GPU and torch, the command goes on.
An item that fails is noted with its reason, and ends nothing. docs/gpu.md says more.
"""

import contextlib
import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from config import fail, parse_args
from lab import bench, bench_tables, timing
from lab.gpu_items import LIMITS, Lab, in_a_line, items_of
from plumbing.files import read_json, set_aside, write_json, write_text
from plumbing.processes import run_main, versions

# Dense bf16 TFLOP/s of the makers' data sheets; the first whose words are all in the card's name.
PEAKS = {"B200": 2250, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835,
         "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "RTX 4090": 165,
         "RTX 3090": 71}  # fmt: skip


@dataclass(frozen=True)
class Options:
    device: str = "cuda"  # cuda | cuda:1 | cpu, which goes with tiny
    tiny: bool = False  # sizes at which a CPU runs all of it in seconds; the figures say nothing
    budget: float = 170.0  # seconds after which no further item begins
    trunk: str = ""  # the pretrained model: hub id, folder, .gguf; empty is smollm2_jepa's
    out_dir: str = "out"  # folder of gpu_report.json and gpu_report.md


def main(argv: list[str]) -> None:
    began = time.perf_counter()
    options = Options(**parse_args(Options, argv, "python -m lab.gpu_report [--key=value ...]")[0])
    if not options.device.startswith("cuda") and not (options.device == "cpu" and options.tiny):
        fail(f"device={options.device}: the report is of a CUDA GPU; --device=cpu --tiny=true "
             "shows on a processor that all of it runs")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        fail("there is no CUDA GPU here; --device=cpu --tiny=true shows on a processor that all of "
             "the report runs")
    lab = Lab(options.device, options.tiny, options.trunk)
    path, todo, longest = Path(options.out_dir) / "gpu_report.json", items_of(lab), 0.0
    report = read_or_begin(path, lab, options.tiny) | {"planned": list(todo)}
    for n, (name, work) in enumerate(todo.items(), 1):
        if name in report["items"]:
            continue
        spent = time.perf_counter() - began
        if longest and spent + longest > options.budget:  # one item at least, or it would never end
            break
        begin = time.perf_counter()
        result, reason = in_a_line(work)
        took = time.perf_counter() - begin
        longest = max(longest, took)
        report["items"][name] = {"seconds": took, **({"failed": reason} if reason else result)}
        write_json(path, report)
        write_text(path.with_suffix(".md"), page_of(report))
        print(f"{n}/{len(todo)}  {name}  {took:.1f} s  {reason and 'failed: ' + reason}",
              flush=True)  # fmt: skip
        gc.collect()
        if "CUDA error" in reason:  # after one of these, nothing runs in this process any more
            break
        if lab.setup.device.type == "cuda":
            torch.cuda.empty_cache()
    done = len(report["items"])
    print(page_of(report) if done == len(todo) else
          f"{done} of {len(todo)} items are done; the same command goes on with the others")
    print(f"wrote {path} and {path.with_suffix('.md')}")


def read_or_begin(path: Path, lab: Lab, tiny: bool) -> dict:
    """The report that an earlier part has begun, if it is of the same code, machine and options."""
    about = {**timing.machine(lab.setup.device), **versions()}
    same = {key: about[key] for key in ("commit", "processor", "torch")}
    same |= {"tiny": tiny, "trunk": lab.configs[lab.pretrained].trunk}
    if path.exists():
        with contextlib.suppress(ValueError, KeyError):  # not ours, or damaged
            report = read_json(path)
            if report["same"] == same:
                return report
        print(f"moved another report to {set_aside(path)}")
    peak = peak_of(about["processor"])
    dtype = str(timing.dtype_of(lab.setup.autocast, lab.setup.device)).removeprefix("torch.")
    return {"same": same, **about, "dtype": dtype, "limits": LIMITS, "rounds": lab.sizes.rounds,
            "new_tokens": bench.NEW_TOKENS,
            "peak_tflops": peak if dtype == "bfloat16" else None, "items": {}}  # fmt: skip


def peak_of(card: str) -> int | None:
    """Its bf16 TFLOP/s, if it is one of PEAKS; a laptop's is slower than its name says."""
    words = set(card.replace("-", " ").split())
    return next((tflops for known, tflops in PEAKS.items()
                 if set(known.split()) <= words and "Laptop" not in words), None)  # fmt: skip


# --- the page ---------------------------------------------------------------------------------


def page_of(report: dict) -> str:
    """gpu_report.md, from what gpu_report.json holds and nothing else."""
    parts = {}  # of the items that went well: their names without the part, and figures
    for name, item in report["items"].items():
        part, _, what = name.partition(": ")
        if "failed" not in item:
            parts.setdefault(part, {})[what] = item
    about = (f"{report['processor']}, torch {report['torch']}, {report['dtype']}, commit "
             f"{report['commit']}, {report['time'][:10]}; {len(report['items'])} of "
             f"{len(report['planned'])} items in {minutes_of(report):.1f} minutes.")
    tiny = ["**Tiny sizes: the figures say nothing, only that all of it runs.**"]
    sections = [make(parts[part], report) for part, make in SECTIONS.items() if part in parts]
    lines = ["# What a GPU makes of this project", about, *tiny * report["same"]["tiny"],
             *(line for section in sections for line in section), *what_failed(report)]
    return "\n\n".join(lines) + "\n"


def minutes_of(report: dict) -> float:
    return sum(item["seconds"] for item in report["items"].values()) / 60


def table(head: str, rows: list[list[str]]) -> str:
    """A Markdown table; head names its columns, parted by |."""
    columns = head.count("|") + 1
    return "\n".join([f"| {head.replace('|', ' | ')} |", "|---" * columns + "|",
                      *(f"| {' | '.join(row)} |" for row in rows)])  # fmt: skip


def gigabytes(item: dict) -> str:
    return "not known" if item["peak_gb"] is None else f"{item['peak_gb']:.2f}"


def yes(item: dict) -> str:
    return "yes" if item["right"] else "**NO**"


def correct_lines(items: dict, report: dict) -> list[str]:
    limits = ", ".join(f"{limit:g} in {dtype}" for dtype, limit in report["limits"].items())
    compared = {name: item for name, item in items.items() if "hidden" in item}
    rows = [[name, f"{item['hidden']:.1e}", f"{item['gradient']:.1e}",
             "{:.5f}, {:.5f}".format(*item["loss"]), yes(item)]
            for name, item in compared.items()]  # fmt: skip
    answers = [f"{name}: {item['equal_rows']} of {item['rows']} greedy answers equal those "
               f"without a cache." for name, item in items.items() if "rows" in item]  # fmt: skip
    return ["## Correct?", "A JEPA step on the same weights and rows, off from that of the CPU in "
            f"fp32 (norm of the difference over the norm; at most {limits}).",
            table("model, dtype|hidden states|gradient|loss here, on the CPU|right", rows),
            *answers]  # fmt: skip


def steps_lines(items: dict, report: dict) -> list[str]:
    peak, rows, ratios = report["peak_tflops"], [], []
    for name, item in items.items():
        again = item["recompilations"]
        for arm, about in item["arms"].items():
            tflops = about["tflops"]["median"]
            share = f" ({tflops / peak:.1%})" if peak else ""
            rows.append([f"{name}, {item['batch']}", arm, f"{tflops:.3g}{share}",
                         f"{about['tokens_per_second']['median']:,.0f}", gigabytes(about)])
        ratio = bench_tables.shown(item["jepa_over_ce"])
        ratios.append([name, ratio, f"{item['first_seconds']:.1f}",
                       "" if again is None else str(again)])  # fmt: skip
    of = f"in brackets the share of the card's {peak:,} in bf16" if peak else (
        "no share of the peak: this card's is not in our table, or it did not run in bf16")
    return ["## Training steps", "Real tokens a second (padding is left out), operations of the "
            f"matrix products in TFLOP/s ({of}), and peak memory.",
            table("model, examples|step|TFLOP/s|tokens/s|peak, GB", rows),
            "Time of a JEPA step over a CE-only one (quartiles); seconds of the first steps; "
            "graphs that torch.compile made after those.",
            table("model|JEPA over CE only|first steps, s|recompilations", ratios)]  # fmt: skip


def attention_lines(items: dict, report: dict) -> list[str]:
    rows = []
    for name, item in items.items():
        for then in (key for key in ("forward", "forward and backward") if key in item):
            sdpa, flex = (item[then][way]["median"] for way in ("sdpa", "flex"))
            rows.append([f"{name} ({item['tokens']}), {then}", f"{sdpa:.3f}", f"{flex:.3f}",
                         f"{sdpa / flex:.2f}", f"{item['mask_ms']['median']:.2f}", yes(item)])
    return ["## Attention", "One layer of the 45M model over rows x tokens of question and answer "
            "(in brackets with [PRED] and the target). Making the tree's block mask is not in "
            "FlexAttention's time; all layers share one. On a CPU it has no backward pass.",
            table("rows|SDPA, ms|Flex, ms|SDPA over Flex|block mask, ms|same", rows)]  # fmt: skip


def two_rows_lines(items: dict, report: dict) -> list[str]:
    rows = []
    for name, item in items.items():
        ours = item["one row"]
        for arm, about in item.items():
            if not isinstance(about, dict):
                continue
            speed = about["examples_per_second"]["median"]
            faster = ours["examples_per_second"]["median"] / speed
            less = f"{ours['peak_gb'] / about['peak_gb']:.2f}" if about["peak_gb"] else "not known"
            rows.append([name, arm, f"{speed:.1f}", gigabytes(about), f"{faster:.2f}", less])
    return ["## One row and the official two", "Eager steps on the same weights, examples (4) and "
            "dtype.", table("model|recipe|examples/s|peak, GB|our speed over it|our peak over its",
                            rows)]  # fmt: skip


def generation_lines(items: dict, report: dict) -> list[str]:
    rows = [[*name.rsplit(", ", 1), f"{item['tokens_per_second']['median']:,.0f}", gigabytes(item)]
            for name, item in items.items()]  # fmt: skip
    return ["## Generation", f"Greedy, {report['new_tokens']} tokens a row, with a cache.",
            table("model|rows|tokens/s|peak, GB", rows)]  # fmt: skip


SECTIONS = {"correct": correct_lines, "steps": steps_lines, "attention": attention_lines,
            "two rows": two_rows_lines, "generation": generation_lines}  # fmt: skip


def what_failed(report: dict) -> list[str]:
    """Items that raised, by their reason, and those that gave something wrong."""
    reasons, items = {}, report["items"]
    for name, item in items.items():
        wrong = "" if item.get("right", True) else "it ran, and its result is wrong (see above)"
        if reason := item.get("failed", wrong):
            reasons.setdefault(reason, []).append(name)
    missing = [name for name in report["planned"] if name not in items]
    lines = [f"- {'; '.join(names)}: {reason}" for reason, names in reasons.items()]
    lines += [f"- not run yet: {'; '.join(missing)}"] * bool(missing)
    return ["## What failed", "\n".join(lines) or "Nothing."]


if __name__ == "__main__":
    run_main(main)
