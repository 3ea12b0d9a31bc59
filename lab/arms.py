"""The arms of the study: what lab/study.py trains and compares, as data.

An arm is a name and a few config fields. A run's config is the recipe, over it BASE, over that what
the command line gives, the fields of the arm and a seed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

Fields = dict[str, Any]  # of a Config


class Stage(NamedTuple):
    """Arms that are trained and told in one table."""

    summary: str  # its line in --help
    seeds: Sequence[int]
    arms: dict[str, Fields]  # the others are tested against the first


RECIPE = "nlrx_jepa"
# Without a spread term, so that an arm says it if it has one.
BASE = dict(
    train_rows=2000, system_prompt="drop", max_iters=600, eval_interval=150, eval_answers=512,
    eval_pairs=512, log_interval=50, spread="none", spread_weight=0.0,
)  # fmt: skip

# What several arms share. PLAIN is the language model alone, CROSS the default of this project.
PLAIN = dict(jepa_weight=0.0)
CROSS = dict(jepa_weight=0.3, spread="cross", spread_weight=0.6)
INFONCE = dict(jepa_loss="infonce", jepa_weight=0.05, jepa_warmup_iters=0)
# How the variants were run, before the first two were found to cost λ = 0 a sixth of its accuracy.
EARLIER = dict(labels="answer", bpe_vocab_size=1024, min_lr=2e-4, max_iters=500, eval_interval=250)

# Each changes one thing of CROSS.
VARIANTS = {
    "tree (the default)": {},
    "isolated": dict(layout="isolated"),
    "plan": dict(layout="plan"),
    "reverse": dict(layout="reverse"),
    "front": dict(layout="front"),
    "k 0": dict(n_pred=0),
    "k 4": dict(n_pred=4),
    "stop_grad": dict(stop_grad=True),
    "ema .99": dict(ema=0.99),
    "Enc mean": dict(pooling="mean"),
    "l2": dict(jepa_loss="l2"),
    "mse": dict(jepa_loss="mse"),
    "InfoNCE": dict(jepa_loss="infonce", spread="none", spread_weight=0.0),
    "cosine alone": dict(spread="none", spread_weight=0.0),
    "vicreg": dict(spread="vicreg", spread_weight=0.1),
    "sigreg": dict(spread="sigreg", spread_weight=0.02),
    "half the steps": dict(jepa_dropout=0.5),
    "half the examples": dict(jepa_dropout=0.5, jepa_dropout_per="example"),
    "λ 0": PLAIN,
}

COARSE = {
    "λ 0": PLAIN,
    "λ 0, lr 2e-3": dict(PLAIN, learning_rate=2e-3),
    "λ 0, lr 5e-4": dict(PLAIN, learning_rate=5e-4),
    "cosine λ .3, cross": CROSS,
    "cosine λ .3, cross, lr 2e-3": dict(CROSS, learning_rate=2e-3),
    "cosine λ .3, cross, lr 5e-4": dict(CROSS, learning_rate=5e-4),
    "InfoNCE λ .05": INFONCE,
    "InfoNCE λ .05, lr 2e-3": dict(INFONCE, learning_rate=2e-3),
    "InfoNCE λ .05, lr 5e-4": dict(INFONCE, learning_rate=5e-4),
    "cosine λ 1": dict(jepa_weight=1.0, jepa_warmup_iters=0),  # as published; it collapses
    "InfoNCE λ .05, stop_grad": dict(INFONCE, stop_grad=True),
    "cosine λ .3, cross, k 4": dict(CROSS, n_pred=4),
    "plan, λ 0": dict(PLAIN, layout="plan"),
    "plan, InfoNCE λ .05": dict(INFONCE, layout="plan"),
    "InfoNCE λ .2, LD .75": dict(INFONCE, jepa_weight=0.2, jepa_dropout=0.75),
    "cosine λ .5, sigreg .02": dict(jepa_weight=0.5, spread="sigreg", spread_weight=0.02),
    "cosine λ .5, vicreg .1": dict(jepa_weight=0.5, spread="vicreg", spread_weight=0.1),
    "cosine λ .5, sigreg .005": dict(jepa_weight=0.5, spread="sigreg", spread_weight=0.005),
    "cosine λ .5, vicreg .5": dict(jepa_weight=0.5, spread="vicreg", spread_weight=0.5),
    "cosine λ .3, cross, stop_grad": dict(CROSS, stop_grad=True),
    "InfoNCE λ .05, k 0": dict(INFONCE, n_pred=0),
    "InfoNCE λ .05, k 2": dict(INFONCE, n_pred=2),
    "InfoNCE λ .1, LD .5": dict(INFONCE, jepa_weight=0.1, jepa_dropout=0.5),
}

# What did best of each family in the coarse pass and did not collapse.
FAMILIES = {
    **{arm: COARSE[arm] for arm in (
        "λ 0", "plan, λ 0", "plan, InfoNCE λ .05", "InfoNCE λ .05, k 2",
    )},
    "InfoNCE λ .05, k 4": dict(INFONCE, n_pred=4),
    **{arm: COARSE[arm] for arm in (
        "InfoNCE λ .05, stop_grad", "InfoNCE λ .1, LD .5", "cosine λ .5, sigreg .005",
    )},
}  # fmt: skip

# As many operations in all arms on Turk: a step with JEPA costs more, so its arm takes fewer.
LONGER = {
    "λ 0, dropout .1, 1,645 steps": dict(PLAIN, dropout=0.1, max_iters=1645, eval_interval=411),
    "InfoNCE λ .05, dropout .1, 1,200 steps": dict(
        INFONCE, dropout=0.1, max_iters=1200, eval_interval=300),
    "λ 0, 1,645 steps": dict(PLAIN, max_iters=1645, eval_interval=411),
    "InfoNCE λ .05, 1,200 steps": dict(INFONCE, max_iters=1200, eval_interval=300),
}  # fmt: skip

# As LONGER, each arm with its best dropout and share of JEPA steps.
DROPOUT = {
    "λ 0, dropout .2, 1,645 steps": dict(PLAIN, dropout=0.2, max_iters=1645, eval_interval=411),
    "InfoNCE λ .2, LD .75, dropout .2, 1,504 steps": dict(
        INFONCE, jepa_weight=0.2, jepa_dropout=0.75, dropout=0.2, max_iters=1504,
        eval_interval=376),
}  # fmt: skip

# With --train_rows=0 these are 13 epochs of NL-RX.
CONVERGED = {
    "λ 0, 3,000 steps": dict(PLAIN, max_iters=3000, eval_interval=750),
    "InfoNCE λ .2, LD .75, 2,727 steps": dict(
        INFONCE, jepa_weight=0.2, jepa_dropout=0.75, max_iters=2727, eval_interval=682),
}  # fmt: skip

MAIN = {arm: COARSE[arm] for arm in ("λ 0", "cosine λ .3, cross", "InfoNCE λ .05")}
TWO = {arm: COARSE[arm] for arm in ("λ 0", "InfoNCE λ .05")}
RATES = {arm: COARSE[arm] for arm in ("InfoNCE λ .05", "λ 0", "λ 0, lr 2e-3")}

# longer and dropout take other seeds than the stages that their settings were chosen by.
STAGES = {
    "coarse": Stage("23 arms, one seed", (0,), COARSE),
    "families": Stage("the best of each family, five seeds", range(5), FAMILIES),
    "main": Stage("three arms, five seeds", range(5), MAIN),
    "two": Stage("two of those, for other data", range(5), TWO),
    "rates": Stage("JEPA beside λ 0 at its own learning rate too, five seeds", range(5), RATES),
    "longer": Stage("at equal compute, with and without dropout", range(5, 10), LONGER),
    "dropout": Stage("the same with the best dropout of each arm", range(5, 10), DROPOUT),
    "converged": Stage("at equal compute until it levels off, for all rows of a file", range(3),
                       CONVERGED),
    "variants": Stage("every layout, loss and option, one seed", (0,),
                      {arm: {**CROSS, **EARLIER, **fields} for arm, fields in VARIANTS.items()}),
}  # fmt: skip
