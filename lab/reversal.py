"""The reversal curse in figures: how well a run on dataset=relations answers (e1, r, ?).

    python eval_relations.py [RUN] [--key=value ...]       the newest run, or the one named

Asks for facts it was trained on in both directions (train), in one (atomic), and for the inverses
of the atomic ones, which it never saw (held_out). Writes relations.json into the run's folder.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import fail, parse_args
from data import facts_of
from relations import Facts, reversal_metrics
from run import exit_quietly, load_run, pick_device, runs_newest_first, versions


@dataclass(frozen=True)
class Args:
    # what is asked
    n: int = 450  # facts of each kind, at most
    # how
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16


def main(argv: list[str]) -> None:
    values, names = parse_args(Args, argv, "python eval_relations.py [RUN] [--key=value ...]")
    args = Args(**values)
    if args.n < 1 or len(names) > 1:
        fail(f"n={args.n} must be at least 1, and one run at a time, got {' '.join(names)}")
    device, autocast = pick_device(args.device, args.dtype)
    run = load_run(Path(names[0]) if names else runs_newest_first()[0], device)
    config = run.config
    if config.dataset != "relations":
        fail(f"{run.path} was trained on {config.dataset}; this asks for dataset=relations")
    facts, splits = facts_of(config)

    results = {}
    print(f"\n{'facts':<10}{'n':>6}{'first':>8}{'second':>8}{'joint':>8}{'MRR':>8}{'NLL':>8}")
    for split, arrays in splits.items():
        if not len(arrays["rows"]):
            continue
        # A fixed choice among the split's facts, in chunks: a question asks `side` times over.
        chosen = np.random.default_rng(0).permutation(len(arrays["rows"]))[: args.n]
        rows = arrays["rows"][chosen]
        chunks = np.array_split(rows, -(-len(rows) // 64))
        parts = [
            reversal_metrics(facts, *ask(run.model, facts, chunk, device, autocast), chunk[:, 3:])
            for chunk in chunks
        ]
        weights = [len(chunk) for chunk in chunks]
        m = {key: float(np.average([p[key] for p in parts], weights=weights)) for key in parts[0]}
        results[split] = {"n": len(rows), **m}
        print(f"{split:<10}{len(rows):>6}" + "".join(
            f"{m[key]:>8.3f}" for key in ("first", "second", "joint", "mrr", "nll")))  # fmt: skip
    path = run.path.parent / "relations.json"
    about = {"step": run.step, "trained": run.provenance, **versions()}
    path.write_text(json.dumps({**about, "facts": results}, indent=1) + "\n")
    print(f"chance: joint {1 / facts.n_entities:.4f}; wrote {path}")


@torch.no_grad()
def ask(model, facts: Facts, rows: np.ndarray, device, autocast) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the answer's two tokens: (n, V), and (n, side, V) after each possible
    first token, for facts (n, 5) whose first three tokens are the question."""
    question = torch.from_numpy(rows[:, :3]).to(device)
    n, V = len(rows), facts.vocab_size
    firsts = torch.arange(V - 2 * facts.side, V - facts.side, device=device)
    both = torch.cat([question.repeat_interleave(facts.side, 0), firsts.repeat(n)[:, None]], 1)
    with autocast():
        hidden = model.hidden(both, torch.ones_like(both))  # one block: an ordinary causal row
        logits = model.lm_head(hidden[:, 2:])[..., :V].float()  # (n * side, 2, V)
    log_probs = logits.log_softmax(-1).view(n, facts.side, 2, V).cpu().numpy()
    return log_probs[:, 0, 0], log_probs[:, :, 1]


if __name__ == "__main__":
    exit_quietly(main)
