"""The comparison of ways to search: each way by hand, BM25 by its formula, and from end to end."""

import json
import math
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_line, sums

from lab import search_study
from lab.search import different_answers, measures, ranks_of
from lab.search_study import SETTINGS, WAYS, Setting
from plumbing.linear_map import ridge
from run import data_of, load_run
from views import CODE, TEXT

CPU = torch.device("cpu")
TINY = dict(n_layer=1, n_head=1, n_embd=32, max_iters=3, eval_interval=3, bpe_vocab_size=320,
            eval_pairs=8, train_rows=64, batch_size=8, eval_answers=0, device="cpu")  # fmt: skip


def test_each_arm_differs_in_its_losses_alone():
    """Same data, steps and seeds; the retriever has no cross-entropy, and it alone may have a
    learning rate of its own; λ = 0 has no JEPA."""
    for name, setting in SETTINGS.items():
        cells = search_study.cells_of(setting, {}, Path("out/x"))
        assert len({cell.folder for cell in cells.values()}) == len(cells)
        free = {"jepa_weight", "jepa_loss", "ce_weight", "spread", "spread_weight", "out_dir",
                "jepa_warmup_iters", "eval_answers"}  # fmt: skip
        for seed in setting.seeds:
            of_arms = {arm: cells[arm, seed].config for arm in setting.arms}
            same = [{k: v for k, v in vars(c).items() if k not in free} for c in of_arms.values()]
            assert same[0] == same[1], name
            differs = {k for k, v in same[2].items() if v != same[1][k]}
            assert differs <= {"learning_rate", "min_lr"}, name
            assert of_arms["λ 0"].jepa_weight == 0 < of_arms["JEPA"].jepa_weight
            assert of_arms["retriever"].ce_weight == 0 < of_arms["retriever"].jepa_weight


def test_each_way_equals_plain_hidden_states(tiny_run):
    """Question and answer in rows of their own, one at a time, without padding."""
    tiny_run(jepa_loss="infonce", spread="none", spread_weight=0)
    run = load_run(Path("out/tiny"), CPU)
    data = data_of(run, "")
    pairs, train = data.pairs["val"], data.pairs["train"]
    answers, own = different_answers(pairs)
    found = search_study.ranks_by_way(run, data, answers, own, nullcontext)
    assert tuple(found) == WAYS

    def states(some, view):
        """Hidden states of one view of each example: [PRED] follows a question."""
        pred = [run.tokenizer.vocab_size] if view == TEXT else []
        rows = [torch.tensor([some.view(e, view) + pred]) for e in range(len(some))]
        with torch.no_grad():
            return [run.model.everywhere(row, torch.ones_like(row))[0] for row in rows]

    def unit(rows):
        return torch.nn.functional.normalize(torch.stack(rows).double(), dim=-1)

    def both(some, view):
        n = 1 if view == TEXT else 0  # [PRED] is no token of the question
        alone = states(some, view)
        return {"last token": unit([h[-1 - n] for h in alone]),
                "mean": unit([h[: len(h) - n].mean(0) for h in alone]),
                "[PRED]": unit([h[-1] for h in alone])}  # fmt: skip

    x, y = both(pairs, TEXT), both(answers, CODE)
    train = train.take(np.random.default_rng(0).permutation(len(train)))
    fit_x, fit_y = both(train, TEXT), both(train, CODE)
    for way in ("[PRED]", "last token", "mean"):
        assert np.array_equal(found[way], ranks_of(x[way].numpy(), y[way].numpy(), own))
    for way in ("last token", "mean"):
        fitted = ridge(fit_x[way], fit_y[way])
        target = (y[way] - fitted.y_mean) / fitted.y_std
        cosines = torch.nn.functional.cosine_similarity(fitted(x[way])[:, None], target, dim=-1)
        expected = [1 + sum(c >= row[i] for j, c in enumerate(row) if j != i)
                    for row, i in zip(cosines.tolist(), own)]  # fmt: skip
        assert np.abs(found[f"{way}, mapped"] - expected).max() <= 1  # but for rounding
        assert (found[f"{way}, mapped"] == expected).mean() > 0.9


def test_bm25_is_its_formula(tiny_run):
    pytest.importorskip("bm25s")
    tiny_run(max_iters=1)
    run = load_run(Path("out/tiny"), CPU)
    pairs = data_of(run, "").pairs["val"]
    answers, own = different_answers(pairs)
    own = (own + 3) % len(answers)  # the right ones are all found at once
    decode = run.tokenizer.decode

    def words(text):
        return re.findall(r"\w+|[^\w\s]", text.lower())

    texts = [words(decode(answers.answer(i))) for i in range(len(answers))]
    n, mean = len(texts), sum(map(len, texts)) / len(texts)
    having = Counter(word for text in texts for word in set(text))
    ranks = search_study.bm25_ranks(run, pairs, answers, own)
    for example in range(len(pairs)):
        scores = []
        for text in texts:
            count, score = Counter(text), 0.0
            for word in words(decode(pairs.question(example))):
                idf = math.log(1 + (n - having[word] + 0.5) / (having[word] + 0.5))
                size = 1.5 * (1 - 0.75 + 0.75 * len(text) / mean)
                score += idf * count[word] / (count[word] + size)
            scores.append(score)
        assert ranks[example] == sum(s >= scores[own[example]] - 1e-6 for s in scores)
    assert 1 < ranks.mean() < n
    pairs.framing[:, 0] = pairs.question_length  # all of it is a system prompt, and not asked
    assert (search_study.bm25_ranks(run, pairs, answers, own) == n).all()


def test_it_runs_from_end_to_end_and_picks_up_where_it_was(tmp_path, monkeypatch, capsys):
    pytest.importorskip("bm25s")
    monkeypatch.chdir(tmp_path)
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums(120)))
    arms = {arm: {k: v for k, v in fields.items() if k != "eval_answers"}
            for arm, fields in SETTINGS["nlrx"].arms.items()}  # fmt: skip
    monkeypatch.setitem(SETTINGS, "nlrx", Setting("nlrx_jepa", TINY, arms, (0, 1)))
    search_study.main(["nlrx", "--dataset=sums.jsonl", "--jobs=2"])
    first = capsys.readouterr().out
    results = json.loads(Path("out/search-nlrx/results.json").read_text())
    found, about = results["found"], results["provenance"]
    assert list(found) == ["BM25, words", *(f"{arm}, {way}" for arm in arms for way in WAYS)]
    assert all(len(values) == 2 for name in list(found)[1:] for values in found[name].values())
    assert about["n"] == 12 and about["seeds"] == [0, 1] and len(about["trained"]) == 6
    run = load_run(Path("out/search-nlrx/JEPA-1"), CPU)
    data = data_of(run, "")
    answers, own = different_answers(data.pairs["val"])
    ranks = search_study.ranks_by_way(run, data, answers, own, nullcontext)
    assert found["JEPA, [PRED]"]["mrr"][1] == pytest.approx(measures(ranks["[PRED]"])["mrr"])
    search_study.main(["nlrx", "--dataset=sums.jsonl"])
    again = capsys.readouterr().out
    assert again.count("was finished") == 6
    assert first[first.index("| trained") :] == again[again.index("| trained") :]
    assert "| JEPA | [PRED] |" in first and "12 questions of sums, val" in first
    shutil.rmtree("out/search-nlrx/retriever-1")
    monkeypatch.setattr(search_study, "train_cells", lambda cells, jobs: 1)  # it fails
    with pytest.raises(SystemExit):
        search_study.main(["nlrx", "--dataset=sums.jsonl"])
    said = capsys.readouterr().out
    assert "retriever is left out: not all of its seeds are finished" in said
    assert "| JEPA | [PRED] |" in said and "| retriever |" not in said


@pytest.mark.parametrize("argv, says", [
    ([], "name a setting: nlrx, gsm8k"),
    (["nlrx", "--seed=3"], "seed=3: the study sets seed itself"),
    (["nlrx", "--ce_weight=3"], "the study sets ce_weight itself"),
    (["nlrx", "--jobs=0"], "jobs=0"),
    (["nlrx", "--layout=reverse"], "a run with layout=reverse"),
    (["nlrx", "--layout=front"], "a run with layout=front"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search_study.importlib.util, "find_spec", lambda name: "here")
    assert says in error_line(capsys, search_study.main, argv)


def test_a_missing_package_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search_study.importlib.util, "find_spec", lambda name: None)
    assert "pip install bm25s" in error_line(capsys, search_study.main, ["nlrx"])
    assert not Path("out").exists()
