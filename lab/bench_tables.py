"""What bench.py prints: a table for each part, and the results of several machines side by side.

    print_training(results), ...  of what the part of that name returns
    side_by_side(paths)           of bench.json files, as a table for docs/speed.md
"""

import json
from pathlib import Path

from config import fail

MACHINES = 5  # beside the column of names: a page has room for six columns


def shown(ratio: dict | None, digits: int = 2) -> str:
    """A ratio and its quartiles as text; nothing where there is none."""
    if ratio is None:
        return ""
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


# --- a table per part -------------------------------------------------------------------------


def print_quick(results: dict) -> None:
    print(f"\nratios, medians of {results['rounds']} rounds and their quartiles")
    for name, ratio in results["ratios"].items():
        print(f"{name:<48}{shown(ratio):>22}")
    for line in results["left_out"]:
        print(line)


def print_training(results: dict) -> None:
    print(f"\ntraining, real (unpadded) tokens, {results['share_of_answers']:.0%} of our plain "
          f"row's in the answer\n{'':<30}{'ms a step':>10}{'tokens/s':>10}"
          f"{'step over CE only':>22}")  # fmt: skip
    for name, arm in results["arms"].items():
        print(f"{name:<30}{arm['ms']:>10,.0f}{arm['tokens_per_second']['median']:>10,.0f}"
              f"{shown(arm['over_ce_only']):>22}")
    for name, ratio in results["ratios"].items():
        ours, _, theirs = name.partition(" over ")
        print(f"{ours} has {shown(ratio)} times the tokens/s of {theirs}")


def print_generation(results: dict) -> None:
    least, most = results["prompt_tokens"]
    print(f"\ngeneration, {results['new_tokens']} new tokens a row, greedy, prompts of {least} to "
          f"{most} tokens\n"
          f"{'batch':>5}  {'':<16}{'ms a step':>12}{'tokens/s':>10}{'ours is faster by':>22}")
    for B, arms in results["batches"].items():
        for name, arm in arms.items():
            rate = arm["tokens_per_second"]["median"]
            print(f"{B:>5}  {name:<16}{1e3 * B / rate:>12.1f}{rate:>10,.0f}"
                  f"{shown(arm['ours_is_faster_by']):>22}")


def print_loading(results: dict) -> None:
    print(f"\nfrom file to first batch{'':<8}{'training pairs':>16}{'cold, s':>10}{'warm, s':>10}"
          f"{'peak, MB':>12}{'warm':>8}")
    for name, found in results["sets"].items():
        cold, warm = found["cold"], found["warm"]
        print(f"{name:<32}{found['pairs']:>16,}{cold['seconds']['median']:>10.2f}"
              f"{warm['seconds']['median']:>10.2f}{cold['MB']['median']:>12,.0f}"
              f"{warm['MB']['median']:>8,.0f}")


def print_curves(results: dict) -> None:
    print(f"\na step of rows x tokens of text and code{'ms':>12}{'us a token':>12}")
    for name, found in results["shapes"].items():
        print(f"{name:<40}{found['ms']['median']:>12,.0f}{found['us_per_token']['median']:>12.1f}")
    print(f"doubling the longest rows makes one cost 2^{results['power_of_length']:.2f} "
          "(attention alone: 2^2)")


def print_profile(results: dict) -> None:
    arms = list(results["arms"].values())
    print("\nwhere a step's time goes, ms (share)")
    print(f"{'':<34}" + "".join(f"{name:>18}" for name in results["arms"]))
    for phase in arms[0]["seconds"]:
        cells = [f"{1e3 * arm['seconds'][phase]['median']:,.0f} "
                 f"({arm['share'][phase]['median']:.1%})" for arm in arms]  # fmt: skip
        print(f"{phase:<34}" + "".join(f"{cell:>18}" for cell in cells))
    for title, cells in (
        ("padding, over an epoch", [f"{arm['padding']:.1%}" for arm in arms]),
        ("trunk, GFLOP/s",
         [f"{arm['trunk_flops_per_second']['median'] / 1e9:,.0f}" for arm in arms]),
        ("of the fastest matrix product", [shown(arm["trunk_over_ceiling"]) for arm in arms]),
    ):  # fmt: skip
        print(f"{title:<34}" + "".join(f"{cell:>18}" for cell in cells))
    ceiling = results["ceiling_flops_per_second"]["median"]
    print(f"fastest matrix product, {results['ceiling_dtype']}: {ceiling / 1e9:,.0f} GFLOP/s")


# --- several machines -------------------------------------------------------------------------


def side_by_side(paths: list[Path]) -> None:
    """Print a Markdown table of bench.json files: a column each, a row for each figure that any
    of them has."""
    if len(paths) > MACHINES:
        fail(f"{len(paths)} files: a table has room for {MACHINES} of them")
    columns = [figures_of(path) for path in paths]
    names = list(dict.fromkeys(name for column in columns for name in column))
    print("| " + " | ".join(["", *(path.stem for path in paths)]) + " |")
    print("|---" * (len(paths) + 1) + "|")
    for name in names:
        print("| " + " | ".join([name, *(column.get(name, "") for column in columns)]) + " |")


def figures_of(path: Path) -> dict[str, str]:
    """Name and text of the machine and of every ratio in a bench.json."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        parts = report["parts"]
        figures = {
            "processor": report["processor"],
            "cores, threads": f"{report['cores']}, {report['threads']}",
            "dtype": report["dtype"], "torch": report["torch"], "commit": report["commit"],
            "day": report["time"][:10], "recipe": report["config"]["recipe"],
            "data": report["data"]["dataset"],
        }  # fmt: skip
        for part in parts:
            figures |= {f"{name} ({part})": text for name, text in RATIOS[part](parts[part])}
        return figures
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except (KeyError, TypeError, ValueError):  # no JSON, of something else, of an older bench
        fail(f"{path} is no report of this python -m lab.bench: measure again")


def of_training(part: dict) -> list[tuple[str, str]]:
    over = [(f"{name} over CE only, time", shown(arm["over_ce_only"]))
            for name, arm in part["arms"].items() if arm["over_ce_only"] and name != "CE only"]
    return over + [(f"{name}, speed", shown(ratio)) for name, ratio in part["ratios"].items()]


def of_generation(part: dict) -> list[tuple[str, str]]:
    return [(f"batch {B} over {name}, speed", shown(arm["ours_is_faster_by"]))
            for B, arms in part.get("batches", {}).items() for name, arm in arms.items()
            if arm["ours_is_faster_by"]]  # fmt: skip


RATIOS = {  # name and text of each figure in what a part has returned
    "quick": lambda part: [(name, shown(ratio)) for name, ratio in part["ratios"].items()],
    "training": of_training,
    "generation": of_generation,
    "data": lambda part: [(f"{name}, {state}, s", shown(found[state]["seconds"]))
                          for name, found in part["sets"].items() for state in ("cold", "warm")],
    "curves": lambda part: [("power of the length", f"{part['power_of_length']:.2f}")],
    "profile": lambda part: [(f"trunk over the fastest matrix product, {name}",
                              shown(arm["trunk_over_ceiling"]))
                             for name, arm in part["arms"].items()],
}  # fmt: skip
