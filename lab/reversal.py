"""The reversal curse in figures: how well a run on dataset=relations answers (e1, r, ?).

    python -m lab.reversal [RUN] [--key=value ...]       the newest run, or the one named

Asks for facts it was trained on in both directions (train), in one (atomic), and for the inverses
of the atomic ones, which it never saw (held_out). Writes relations.json into the run's folder.
"""

from dataclasses import dataclass

import numpy as np
import torch

from config import fail, parse_args
from generators.relations import SIZES, Facts, facts_of, reversal_metrics
from model import Trunk
from plumbing.files import write_json
from plumbing.processes import pick_device, run_main, versions
from run import chosen_run


@dataclass(frozen=True)
class Args:
    # what is asked
    n: int = 450  # facts of each kind, at most
    # how
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16


def main(argv: list[str]) -> None:
    usage = f"python -m lab.reversal [RUN] [--key=value ...]\n\n{__doc__}"
    values, names = parse_args(Args, argv, usage)
    args = Args(**values)
    if args.n < 1:
        fail(f"n={args.n} must be at least 1")
    device, autocast = pick_device(args.device, args.dtype)
    run = chosen_run(names, "", device)
    name = run.config.dataset
    if name not in SIZES:
        fail(f"{run.path} was trained on {name}; this asks for dataset=relations")
    facts, splits = facts_of(name)

    results = {}
    print(f"\n{'facts':<10}{'n':>6}{'first':>8}{'second':>8}{'joint':>8}{'MRR':>8}{'NLL':>8}")
    for split, arrays in splits.items():
        if not len(arrays["rows"]):
            continue
        # A fixed choice among the split's facts.
        chosen = np.random.default_rng(0).permutation(len(arrays["rows"]))[: args.n]
        m = measure(run.model, facts, arrays["rows"][chosen], autocast)
        results[split] = {"n": len(chosen), **m}
        print(f"{split:<10}{len(chosen):>6}" + "".join(
            f"{m[key]:>8.3f}" for key in ("first", "second", "joint", "mrr", "nll")))  # fmt: skip
    path = run.path.parent / "relations.json"
    write_json(path, {"step": run.step, "trained": run.provenance, **versions(), "facts": results})
    print(f"chance: joint {1 / facts.n_entities:.4f}; wrote {path}")


def measure(trunk: Trunk, facts: Facts, rows: np.ndarray, autocast) -> dict[str, float]:
    """relations.reversal_metrics of facts (n, 5), in chunks: each question asks `side` times."""
    chunks = np.array_split(rows, -(-len(rows) // 64))
    parts = [reversal_metrics(facts, *ask(trunk, facts, chunk, autocast), chunk[:, 3:])
             for chunk in chunks]  # fmt: skip
    weights = [len(chunk) for chunk in chunks]
    return {key: float(np.average([part[key] for part in parts], weights=weights))
            for key in parts[0]}  # fmt: skip


@torch.no_grad()
def ask(trunk: Trunk, facts: Facts, rows: np.ndarray, autocast) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the answer's two tokens: (n, V), and (n, side, V) after each possible
    first token, for facts (n, 5) whose first three tokens are the question."""
    question = torch.from_numpy(rows[:, :3]).to(trunk.device)
    n, V = len(rows), facts.vocab_size
    firsts = torch.arange(V - 2 * facts.side, V - facts.side, device=trunk.device)
    both = torch.cat([question.repeat_interleave(facts.side, 0), firsts.repeat(n)[:, None]], 1)
    with autocast():
        hidden = trunk.everywhere(both, torch.ones_like(both))  # one block: an ordinary causal row
        logits = trunk.logits(hidden[:, 2:])[..., :V].float()  # (n * side, 2, V)
    log_probs = logits.log_softmax(-1).view(n, facts.side, 2, V).cpu().numpy()
    return log_probs[:, 0, 0], log_probs[:, :, 1]


if __name__ == "__main__":
    run_main(main)
