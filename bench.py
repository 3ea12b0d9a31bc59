"""What a JEPA step costs over a plain language-model step, on this machine.

    python bench.py [RECIPE] [--key=value ...]      for example: python bench.py gsm8k_jepa

Alternates the arms in one process, on the same examples, so that a machine whose speed drifts
slows all of them alike. Prints medians and the median of the paired ratios; writes out/bench.json.
"""

import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from config import load_config
from data import load_data
from model import GPT
from run import exit_quietly, pick_device, versions
from train import forward_backward, make_optimizer

ROUNDS = 15  # counted steps of each arm, after two that are not


def main(argv: list[str]) -> None:
    config = load_config(argv)
    device, autocast = pick_device(config.device, config.dtype)
    data = load_data(config)
    pairs = data.pairs["train"]
    weight = config.jepa_weight or 1.0
    arms = {
        "CE only": dict(jepa_weight=0.0),
        "JEPA, stop_grad": dict(jepa_weight=weight, jepa_dropout=0.0, stop_grad=True),
        "JEPA, full gradient": dict(jepa_weight=weight, jepa_dropout=0.0, stop_grad=False),
    }
    torch.manual_seed(config.seed)
    model = GPT(config, data.tokenizer.vocab_size, pairs.layout.parents).to(device)
    optimizer = make_optimizer(model, config)
    seconds = {arm: [] for arm in arms}
    tokens = dict.fromkeys(arms, 0)
    for step in range(ROUNDS + 2):
        for arm, options in arms.items():
            pairs.config = replace(config, **options)
            begin = time.perf_counter()
            _, n, _ = forward_backward(model, pairs, step, device, autocast)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if step >= 2:
                seconds[arm].append(time.perf_counter() - begin)
                tokens[arm] += n

    print(f"\n{'arm':<22}{'ms a step':>10}{'tokens/s':>10}{'over CE only':>22}")
    results = {}
    for arm, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds["CE only"]))
        low, ratio, high = ratios[ROUNDS // 4], statistics.median(ratios), ratios[-ROUNDS // 4]
        results[arm] = {
            "ms": 1e3 * statistics.median(times), "tokens_per_second": tokens[arm] / sum(times),
            "ratio": ratio, "ratio_quartiles": [low, high],
        }  # fmt: skip
        print(f"{arm:<22}{results[arm]['ms']:>10.0f}{results[arm]['tokens_per_second']:>10,.0f}"
              f"{ratio:>10.2f} ({low:.2f}-{high:.2f})")
    path = Path("out/bench.json")
    path.parent.mkdir(exist_ok=True)
    about = {"config": asdict(config), "data": data.provenance, "device": str(device),
             "threads": torch.get_num_threads(), "rounds": ROUNDS, **versions()}
    path.write_text(json.dumps({**about, "arms": results}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    exit_quietly(main)
