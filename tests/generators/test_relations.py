"""Claims about generators/relations.py, on facts few enough to check one by one."""

import math

import numpy as np
import pytest

from generators import relations
from generators.relations import (
    Facts,
    Sizes,
    facts_of,
    relation_facts,
    relation_rows,
    reversal_metrics,
)

SIZES = dict(n_relations=4, n_train_entities=30, n_atomic_entities=20, n_train_facts=70,
             n_atomic_facts=50)  # fmt: skip
LAYOUT = Facts(n_relations=4, n_entities=50)


@pytest.fixture(scope="module")
def splits():
    return relation_facts(**SIZES)


def triples(rows):
    """Rows as {(head, relation, tail)}, entities as pairs of tokens."""
    return {((a, b), r, (c, d)) for a, b, r, c, d in rows.tolist()}


def entities(rows):
    return {e for head, _, tail in triples(rows) for e in (head, tail)}


def test_shapes_and_counts(splits):
    assert list(splits) == ["train", "atomic", "held_out"]
    for name, n in (("train", 140), ("atomic", 50), ("held_out", 50)):
        assert splits[name]["rows"].shape == splits[name]["inverse"].shape == (n, 5)
        assert len(triples(splits[name]["rows"])) == n, f"{name} repeats a row"


def test_token_kinds_take_turns(splits):
    """4 relations 0-3, their inverses 4-7, 8 first symbols 8-15, 8 second symbols 16-23."""
    assert (LAYOUT.side, LAYOUT.vocab_size) == (8, 24)
    for part in splits.values():
        for rows in part.values():
            assert np.isin(rows[:, 2], range(8)).all()
            assert np.isin(rows[:, [0, 3]], range(8, 16)).all()
            assert np.isin(rows[:, [1, 4]], range(16, 24)).all()


def test_entities_are_different_pairs_and_side_is_no_larger_than_needed():
    for n in (1, 2, 4, 5, 49, 50, 64):
        facts = Facts(n_relations=3, n_entities=n)
        pairs = facts.entity(np.arange(n))
        assert len({tuple(pair) for pair in pairs.tolist()}) == n
        assert facts.side == math.ceil(math.sqrt(n))
        assert pairs.min() == 6 and pairs.max() < facts.vocab_size


def test_inverse_is_the_same_fact_from_the_other_side(splits):
    """8 17 2 9 20 <-> 9 20 6 8 17, in every split and both ways."""
    assert LAYOUT.invert(np.array([[8, 17, 2, 9, 20]])).tolist() == [[9, 20, 6, 8, 17]]
    for part in splits.values():
        for row, inverse in zip(part["rows"].tolist(), part["inverse"].tolist()):
            a, b, r, c, d = row
            assert inverse == [c, d, r + 4 if r < 4 else r - 4, a, b]


def test_train_has_both_directions_of_every_fact(splits):
    train = triples(splits["train"]["rows"])
    assert train == triples(splits["train"]["inverse"])
    assert (splits["train"]["rows"][:70, 2] < 4).all()
    assert (splits["train"]["rows"][70:, 2] >= 4).all()


def test_atomic_has_one_direction_only(splits):
    assert (splits["atomic"]["rows"][:, 2] < 4).all()


def test_held_out_is_exactly_the_inverses_of_atomic(splits):
    assert (splits["held_out"]["rows"] == splits["atomic"]["inverse"]).all()
    assert (splits["held_out"]["inverse"] == splits["atomic"]["rows"]).all()


def test_held_out_is_never_trained_on(splits):
    trained = triples(splits["train"]["rows"]) | triples(splits["atomic"]["rows"])
    assert not triples(splits["held_out"]["rows"]) & trained


def test_train_and_atomic_share_symbols_but_no_entity():
    splits = relation_facts(**{**SIZES, "n_train_facts": 120, "n_atomic_facts": 80})
    train, atomic = entities(splits["train"]["rows"]), entities(splits["atomic"]["rows"])
    assert len(train) == 30 and len(atomic) == 20 and not train & atomic
    for place in (0, 1):  # of 8 symbols: too few atomic ones would make them words never inverted
        assert len({e[place] for e in atomic} - {e[place] for e in train}) <= 1


def test_every_question_has_one_answer(splits):
    """Over all splits: (e1, r) determines e2 and (e2, r^-1) determines e1."""
    rows = triples(np.concatenate([part["rows"] for part in splits.values()]))
    assert len({(head, r) for head, r, _ in rows}) == len(rows)
    assert len({(tail, r) for _, r, tail in rows}) == len(rows)


def test_with_all_facts_a_relation_is_a_permutation_without_fixed_points():
    rows = relation_facts(3, 12, 2, 36, 6)["train"]["rows"]
    for r in range(6):
        facts = [(head, tail) for head, relation, tail in triples(rows) if relation == r]
        assert len({h for h, _ in facts}) == len({t for _, t in facts}) == len(facts) == 12
        assert all(head != tail for head, tail in facts)


def test_relations_differ():
    rows = relation_facts(3, 12, 2, 36, 6)["train"]["rows"]
    tails = [{(h, t) for h, relation, t in triples(rows) if relation == r} for r in range(3)]
    assert tails[0] != tails[1] != tails[2] != tails[0]


def test_same_seed_same_facts_and_another_seed_others(splits):
    again, other = relation_facts(**SIZES), relation_facts(**SIZES, seed=1)
    for name, part in splits.items():
        assert all((part[key] == again[name][key]).all() for key in part)
        assert (part["rows"] != other[name]["rows"]).any()


@pytest.mark.parametrize("wrong, said", [
    (dict(n_relations=0), "n_relations is 0"),
    (dict(n_train_entities=1), "n_train_entities is 1"),
    (dict(n_atomic_entities=0), "n_atomic_entities is 0"),
    (dict(n_train_facts=121), r"n_train_facts is 121: .* 4 relations \* 30 entities"),
    (dict(n_atomic_facts=81), r"n_atomic_facts is 81: .* 4 relations \* 20 entities"),
    (dict(n_atomic_facts=-1), "n_atomic_facts is -1"),
])  # fmt: skip
def test_impossible_sizes_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        relation_facts(**{**SIZES, **wrong})


# ---- data sets of facts ----------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(relations.SIZES, "small", Sizes(**SIZES))
    return "small"


def test_the_sizes_of_the_data_sets():
    """relations_full has those of the experiment that this one follows."""
    assert relations.SIZES == {
        "relations": (10, 500, 300, 3000, 900),
        "relations_full": (10, 50_000, 30_000, 300_000, 90_000),
    }
    for sizes in relations.SIZES.values():  # in proportion: as many facts an entity, about
        assert sizes.n_train_facts / sizes.n_train_entities == 6
        assert sizes.n_atomic_facts / sizes.n_atomic_entities == 3


def test_the_original_data_set_has_its_sizes_and_few_symbols():
    facts, splits = facts_of("relations_full")
    assert (facts.n_relations, facts.n_entities, facts.side) == (10, 80_000, 283)
    assert facts.vocab_size == len(facts.words()) == 2 * 10 + 2 * 283
    n_rows = {split: len(part["rows"]) for split, part in splits.items()}
    assert n_rows == {"train": 600_000, "atomic": 90_000, "held_out": 90_000}
    assert splits["train"]["rows"].max() < facts.vocab_size


def test_facts_of_a_data_set_are_those_of_its_sizes(small, splits):
    facts, found = facts_of(small)
    assert facts == LAYOUT
    for split, part in splits.items():
        assert all((part[key] == found[split][key]).all() for key in part)


def test_words_name_the_tokens(small):
    words = LAYOUT.words()
    assert len(words) == len(set(words)) == LAYOUT.vocab_size
    assert words[:9] == [" r0", " r1", " r2", " r3", " R0", " R1", " R2", " R3", " a0"]
    assert words[15:17] == [" a7", " b0"] and words[-1] == " b7"


def test_rows_are_facts_in_words_and_their_inverses_to_predict(small, splits):
    """70 facts, their inverses, 50 atomic facts that predict nothing; held out are the inverses of
    these, every other one for test."""
    def spelled(tokens):
        return "".join(LAYOUT.words()[i] for i in tokens)

    rows = relation_rows(small)
    assert {split: len(some) for split, some in rows.items()} == {
        "train": 190, "val": 25, "test": 25}  # fmt: skip
    for i, row in enumerate(rows["train"]):
        split, at = ("train", i) if i < 140 else ("atomic", i - 140)
        fact = splits[split]["rows"][at]
        inverse = splits[split]["inverse"][at] if i < 140 else []
        assert row == {"text": spelled(fact[:3]), "code": spelled(fact[3:]),
                       "target": spelled(inverse)}  # fmt: skip
    for split, begin in (("val", 0), ("test", 1)):
        for row, fact, inverse in zip(rows[split], splits["held_out"]["rows"][begin::2],
                                      splits["held_out"]["inverse"][begin::2]):  # fmt: skip
            assert row["text"] + row["code"] == spelled(fact)
            assert row["target"] == spelled(inverse)
            told = {r["text"] + r["code"] for r in rows["train"]}
            assert row["target"] in told and row["text"] + row["code"] not in told


# ---- metrics: 2 relations and 3 entities, which are (a, c), (a, d) and (b, c) -----------------
# Tokens: relations 0 1, inverses 2 3, first symbols a = 4, b = 5, second symbols c = 6, d = 7.

SMALL = Facts(n_relations=2, n_entities=3)
A, B, C, D = 4, 5, 6, 7


def log_probs(p_a, c_after_a, c_after_b, waste=0.0):
    """One question: (1, V) and (1, 2, V), the share `waste` of all going to a relation token."""
    first, second = np.zeros((1, 8)), np.zeros((1, 2, 8))
    first[0, [A, B, 0]] = p_a * (1 - waste), (1 - p_a) * (1 - waste), waste
    second[0, :, 0] = waste
    second[0, 0, [C, D]] = c_after_a * (1 - waste), (1 - c_after_a) * (1 - waste)
    second[0, 1, [C, D]] = c_after_b * (1 - waste), (1 - c_after_b) * (1 - waste)
    with np.errstate(divide="ignore"):
        return np.log(first), np.log(second)


def test_a_worked_example():
    """p(a) = .6, p(c|a) = .3, p(c|b) = .9: joint ac .18, ad .42, bc .36; bd .04 is no entity."""
    question = log_probs(0.6, 0.3, 0.9)
    expected = {(A, C): (1, 0, 0, 0.18, 3), (A, D): (1, 1, 1, 0.42, 1), (B, C): (0, 1, 0, 0.36, 2)}
    for answer, (first, second, joint, p, rank) in expected.items():
        assert reversal_metrics(SMALL, *question, np.array([answer])) == pytest.approx(
            {"first": first, "second": second, "joint": joint, "nll": -math.log(p), "mrr": 1 / rank}
        )


def test_metrics_are_means_over_questions():
    questions = [(log_probs(0.6, 0.3, 0.9), (A, C)), (log_probs(0.2, 0.5, 0.7), (B, C))]
    single = [reversal_metrics(SMALL, *q, np.array([answer])) for q, answer in questions]
    both = reversal_metrics(
        SMALL, *(np.concatenate(arrays) for arrays in zip(*(q for q, _ in questions))),
        np.array([answer for _, answer in questions]))  # fmt: skip
    assert both == pytest.approx({key: (single[0][key] + single[1][key]) / 2 for key in both})


def test_what_no_entity_has_counts_in_nll_but_not_in_rank():
    waste = reversal_metrics(SMALL, *log_probs(0.6, 0.3, 0.9, waste=0.3), np.array([(A, D)]))
    assert waste["nll"] == pytest.approx(-math.log(0.42 * 0.7**2)) and waste["mrr"] == 1
    most = reversal_metrics(SMALL, *log_probs(0.6, 0.3, 0.9, waste=0.9), np.array([(A, D)]))
    assert most["first"] == most["second"] == most["joint"] == 0  # a relation token is likelier


def test_a_perfect_model_scores_one():
    with_zeros = log_probs(0.0, 0.5, 1.0)
    assert reversal_metrics(SMALL, *with_zeros, np.array([(B, C)])) == pytest.approx(
        {"first": 1, "second": 1, "joint": 1, "nll": 0, "mrr": 1}
    )


def test_a_model_that_tells_none_apart_ranks_last():
    flat = np.full((5, 8), -math.log(8)), np.full((5, 2, 8), -math.log(8))
    metrics = reversal_metrics(SMALL, *flat, np.array([(A, C), (A, D), (B, C), (A, C), (A, C)]))
    assert metrics["mrr"] == pytest.approx(1 / 3)
    assert metrics["nll"] == pytest.approx(2 * math.log(8))


def test_nan_ranks_last_and_shows_in_nll():
    metrics = reversal_metrics(SMALL, np.full((1, 8), np.nan), np.zeros((1, 2, 8)),
                               np.array([(A, C)]))  # fmt: skip
    assert metrics["mrr"] == pytest.approx(1 / 3) and math.isnan(metrics["nll"])


def test_answers_are_the_last_two_tokens_of_rows(splits):
    """A model that knows every answer is right on every held-out row."""
    rows = splits["held_out"]["rows"]
    first, second = np.full((50, 24), -9.0), np.full((50, 8, 24), -9.0)
    first[np.arange(50), rows[:, 3]] = 0
    second[np.arange(50), rows[:, 3] - 8, rows[:, 4]] = 0
    metrics = reversal_metrics(LAYOUT, first, second, rows[:, 3:])
    assert metrics == {"first": 1, "second": 1, "joint": 1, "nll": 0, "mrr": 1}


def test_wrong_shapes_and_answers_are_refused():
    first, second = log_probs(0.6, 0.3, 0.9)
    with pytest.raises(ValueError, match="log_second"):
        reversal_metrics(SMALL, first, second[:, 0], np.array([(A, C)]))
    with pytest.raises(ValueError, match="log_first"):
        reversal_metrics(SMALL, first[:, :6], second, np.array([(A, C)]))
    with pytest.raises(ValueError, match="n > 0"):
        reversal_metrics(SMALL, first[:0], second[:0], np.zeros((0, 2), int))
    for answer in ((B, D), (C, A), (0, C), (A, 8), (A, A)):  # (b, d) is beyond the three entities
        with pytest.raises(ValueError, match="answers"):
            reversal_metrics(SMALL, first, second, np.array([answer]))
