"""
Facts about made-up entities, for the reversal curse: a model that learned "e1 r e2" in training,
can it answer "e2 r^-1 ?"?

    train      e1 r e2    e2 r^-1 e1    both directions: that r^-1 undoes r can be learned here
    atomic     e3 r e4                  one direction, of other entities
    held_out              e4 r^-1 e3    the other direction of exactly these, never trained on

A row is five tokens: an entity has two, a relation one. Facts.words spells them.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Sizes(NamedTuple):
    """How much a data set of facts holds."""

    n_relations: int  # each with its inverse
    n_train_entities: int  # of the facts that appear in both directions
    n_atomic_entities: int  # of those in one direction, whose inverse is the held-out test
    n_train_facts: int  # carry JEPA
    n_atomic_facts: int  # carry none


SIZES = {
    "relations": Sizes(10, 500, 300, 3000, 900),  # for minutes on a laptop
    "relations_full": Sizes(10, 50_000, 30_000, 300_000, 90_000),  # the original's
}


@dataclass(frozen=True)
class Facts:
    """The token ids that n_relations relations and n_entities entities take:

        n_relations relations | their inverses | side first symbols | side second symbols

    with side = ceil(sqrt(n_entities)). Entity i is the pair of symbols divmod(i, side), so every
    pair names one entity, save for those beyond n_entities."""

    n_relations: int
    n_entities: int

    @property
    def side(self) -> int:
        """How many first symbols there are, and second symbols as well."""
        return math.isqrt(self.n_entities - 1) + 1

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 2 * self.n_relations + 2 * self.side

    def words(self) -> list[str]:
        """Each token id as a word: r0, its inverse R0, first symbols a0, second symbols b0, ..."""
        counts = {"r": self.n_relations, "R": self.n_relations, "a": self.side, "b": self.side}
        return [f" {letter}{i}" for letter, n in counts.items() for i in range(n)]

    def entity(self, i: np.ndarray) -> np.ndarray:
        """The tokens (..., 2) of entities i (...)."""
        first, second = np.divmod(i, self.side)
        return 2 * self.n_relations + np.stack([first, self.side + second], axis=-1)

    def invert(self, rows: np.ndarray) -> np.ndarray:
        """The same facts (n, 5) from the other side: e1 r e2 <-> e2 r^-1 e1."""
        inverse = rows[:, [3, 4, 2, 0, 1]]
        inverse[:, 2] = (inverse[:, 2] + self.n_relations) % (2 * self.n_relations)
        return inverse


def draw_facts(facts, rng, entities, n):
    """n different facts (n, 5) among some entities, in random order.

    Each relation sends every entity to the next one on a circle of them all, in an order of its
    own. So a head has one tail and a tail one head, and nothing is its own tail."""
    m = len(entities)
    circles = rng.permuted(np.tile(entities, (facts.n_relations, 1)), axis=1)
    relation, place = np.divmod(rng.choice(facts.n_relations * m, n, replace=False), m)
    heads, tails = circles[relation, place], circles[relation, (place + 1) % m]
    return np.hstack([facts.entity(heads), relation[:, None], facts.entity(tails)])


def relation_facts(
    n_relations: int,
    n_train_entities: int,
    n_atomic_entities: int,
    n_train_facts: int,
    n_atomic_facts: int,
    seed: int = 0,
) -> dict[str, dict[str, np.ndarray]]:
    """Splits "train" (2 * n_train_facts rows, the second half inverts the first), "atomic" and
    "held_out" (n_atomic_facts rows each), as in the picture above.

    Each is {"rows": (n, 5), "inverse": (n, 5)}: token ids, and row by row the same facts from the
    other side. Facts(n_relations, n_train_entities + n_atomic_entities) explains the ids and has
    the vocab_size. Which entities are train's and which atomic's is random, so both use the same
    symbols. In every row the first three tokens determine the last two: a question has one answer.

    Raises ValueError for sizes that cannot be had: an entity heads at most one fact of each
    relation, and a fact needs two entities."""
    if n_relations < 1:
        raise ValueError(f"n_relations is {n_relations}: must be 1 or more")
    sizes = {"train": (n_train_entities, n_train_facts),
             "atomic": (n_atomic_entities, n_atomic_facts)}  # fmt: skip
    for name, (n_entities, n_facts) in sizes.items():
        if n_entities < 2:
            raise ValueError(f"n_{name}_entities is {n_entities}: must be 2 or more")
        if not 0 <= n_facts <= n_relations * n_entities:
            raise ValueError(f"n_{name}_facts is {n_facts}: must be from 0 to {n_relations} "
                             f"relations * {n_entities} entities")  # fmt: skip
    facts = Facts(n_relations, n_train_entities + n_atomic_entities)
    rng = np.random.default_rng(seed)
    entities = rng.permutation(facts.n_entities)
    train = draw_facts(facts, rng, entities[:n_train_entities], n_train_facts)
    atomic = draw_facts(facts, rng, entities[n_train_entities:], n_atomic_facts)
    both = np.concatenate([train, facts.invert(train)])
    held_out = facts.invert(atomic)
    return {
        "train": {"rows": both, "inverse": facts.invert(both)},
        "atomic": {"rows": atomic, "inverse": held_out},
        "held_out": {"rows": held_out, "inverse": atomic},
    }


def relation_rows(name: str) -> dict[str, list[dict[str, str]]]:
    """Facts as words. Trained on: train facts in both directions, each with its inverse to predict,
    and atomic facts in one, with none. Held out: the atomic facts' inverses, half each for val and
    test; there the fact to predict from is the inverse, and the target the trained fact."""
    ids, facts = facts_of(name)
    words = ids.words()

    def join(ids):
        return "".join(words[i] for i in ids)

    def rows(split, with_target):
        inverses = facts[split]["inverse"] if with_target else [[]] * len(facts[split]["rows"])
        return [
            {"text": join(fact[:3]), "code": join(fact[3:]), "target": join(inverse)}
            for fact, inverse in zip(facts[split]["rows"], inverses)
        ]  # fmt: skip

    held_out = rows("held_out", True)
    return {"train": rows("train", True) + rows("atomic", False),
            "val": held_out[::2], "test": held_out[1::2]}  # fmt: skip


def facts_of(name: str) -> tuple[Facts, dict[str, dict[str, np.ndarray]]]:
    """The token ids and the facts of a data set of relations, the same for every seed."""
    sizes = SIZES[name]
    n_entities = sizes.n_train_entities + sizes.n_atomic_entities
    return Facts(sizes.n_relations, n_entities), relation_facts(*sizes, seed=0)


def reversal_metrics(
    facts: Facts, log_first: np.ndarray, log_second: np.ndarray, answers: np.ndarray
) -> dict[str, float]:
    """How well n questions (e1, r, ?) are answered; answers (n, 2) are token ids, as rows[:, 3:].

    log_first (n, V): log-probabilities of the answer's first token, over the whole vocabulary.
    log_second (n, side, V): of its second token, after each of the first symbols and not only
    after the right one: only so has every entity its probability p(first) p(second | first).

    first, second: share of questions whose likeliest token is right; second is asked after the
    right first. joint: both, which is what greedy decoding gets right. nll: mean of
    -log p(entity), in nats. mrr: mean of 1 / rank of the answer among all entities by
    probability; ties rank before it, so a model that tells none apart has 1 / n_entities.

    Raises ValueError if the shapes do not fit or an answer is no entity."""
    n, v, side = len(answers), facts.vocab_size, facts.side
    for name, array, shape in (("log_first", log_first, (n, v)),
                               ("log_second", log_second, (n, side, v)),
                               ("answers", answers, (n, 2))):  # fmt: skip
        if n == 0 or array.shape != shape:
            raise ValueError(f"{name} is {array.shape}: must be {shape} with n > 0")
    begin, row = v - 2 * side, np.arange(n)  # begin: the first of the first symbols
    right = (answers[:, 0] - begin) * side + answers[:, 1] - begin - side  # the entity's number
    known = (right >= 0) & (right < facts.n_entities)
    if not known.all() or (facts.entity(right) != answers).any():
        raise ValueError("answers must be pairs of tokens that Facts.entity gives")
    second_given_right = log_second[row, answers[:, 0] - begin]  # (n, V)
    first = log_first.argmax(1) == answers[:, 0]
    second = second_given_right.argmax(1) == answers[:, 1]
    joint = log_first[:, begin : begin + side, None] + log_second[:, :, begin + side :]
    joint = joint.reshape(n, -1)[:, : facts.n_entities]  # (n, n_entities)
    own = joint[row, right]
    rank = (~(joint < own[:, None])).sum(1)  # not >=: with nan, the answer comes last
    return {
        "first": first.mean().item(),
        "second": second.mean().item(),
        "joint": (first & second).mean().item(),
        "nll": -own.mean().item(),
        "mrr": (1 / rank).mean().item(),
    }
