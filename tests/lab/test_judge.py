"""Claims about lab/judge.py: how answers are measured, and which of several is kept."""

import contextlib
from dataclasses import replace

import pytest
import torch
from conftest import sums

from config import Config
from generate import Asking, answer
from lab import judge
from lab.judge import best_of, judged
from plumbing.tokenizers import train_tokenizer
from run import make_model
from views import TEXT, tokenize


def pairs_of(rows, **options):
    texts = [row[key] for row in rows for key in ("question", "answer")]
    tokenizer = train_tokenizer(texts, 320)
    config = Config(block_size=128, **options)
    pairs = [{"text": r["question"], "code": r["answer"], "system": r.get("system", "")}
             for r in rows]  # fmt: skip
    return tokenize(pairs, tokenizer, config)[0], tokenizer


def a_model(pairs):
    """Weights ten times the usual size, so that its answers differ."""
    config = replace(pairs.config, n_layer=2, n_head=2, n_embd=32)
    model = make_model(config, pairs.vocab_size).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() == 2 else 1)
    return model


@pytest.mark.parametrize("options", [
    {}, {"labels": "all"}, {"layout": "plan"}, {"n_pred": 3}, {"n_pred": 0},
])  # fmt: skip
def test_answers_are_judged_as_each_one_is_alone(options):
    """Against a row per answer without padding: its own softmax at every token, and both views."""
    rows = [{**row, "system": "Add." * (i % 2)} for i, row in enumerate(sums(6))]
    pairs, tokenizer = pairs_of(rows, **options)
    model, k, V = a_model(pairs), pairs.config.n_pred, pairs.vocab_size
    answers = [[*tokenizer.encode([text])[0], tokenizer.eot] for text in ("1", "5+3=8\n#### 8", "")]
    of = [0, 0, 1, 2, 3, 3, 5]
    answers = [answers[i % 3] for i in range(len(of))]
    log_p, cosine = judged(model, pairs, of, answers)
    assert log_p.shape == cosine.shape == (7,)
    for example, ids, p, cos in zip(of, answers, log_p, cosine):
        prompt = pairs.prompt(example)
        idx = torch.tensor([prompt + ids])
        hidden = model.everywhere(idx, torch.ones_like(idx))[0]
        chances = model.logits(hidden).log_softmax(-1)
        at = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        assert p == pytest.approx(sum(chances[i, t].item() for i, t in zip(at, ids)), abs=1e-3)
        asked = torch.tensor([pairs.view(example, TEXT) + [V + i for i in range(k)]])
        system = rows[example]["system"]
        system = tokenizer.encode([system + "\n"])[0] if system else []
        alone = torch.tensor([system + ids])
        pred, enc = (model.everywhere(view, torch.ones_like(view))[0, -1]
                     for view in (asked, alone))  # fmt: skip
        assert cos == pytest.approx(torch.cosine_similarity(pred, enc, dim=0).item(), abs=1e-4)


def test_many_answers_are_judged_in_batches_that_keep_their_order():
    pairs, tokenizer = pairs_of(sums(4))
    model = a_model(pairs)
    of = [i % 4 for i in range(40)]
    answers = [[*tokenizer.encode([str(i * i)])[0], tokenizer.eot] for i in range(40)]
    whole = torch.stack(judged(model, pairs, of, answers))
    for i in (0, 15, 16, 33, 39):
        alone = torch.stack(judged(model, pairs, of[i : i + 1], answers[i : i + 1]))
        torch.testing.assert_close(whole[:, i], alone[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1e6])
def test_the_best_of_several_answers(weight, monkeypatch):
    """The likeliest, or the one nearest to the prediction, of those that ended by themselves."""
    pairs, tokenizer = pairs_of(sums(4))
    model, eot = a_model(pairs), tokenizer.eot
    texts = ["#### 1", "#### 2", "#### 3", "#### 4", "1+1=2"]
    ended = [[*ids, eot] for ids in tokenizer.encode(texts)]
    cut = [tokenizer.encode(["5"])[0]]
    asking = Asking(model, tokenizer, contextlib.nullcontext, 8)
    drawn = []

    def draw(trunk, prompts, max_new_tokens, end, sampling, streams):
        assert len(set(streams)) == len(prompts)
        assert trunk is model and (max_new_tokens, end) == (8, eot)
        assert sampling.temperature == 0.7 and len(prompts) == len(drawn)
        asked.extend(prompts)
        return drawn

    monkeypatch.setattr(judge, "generate", draw)
    asked, greedy, drawn = [], [cut[0], ended[0]], [*ended[1:4], *ended[3:], ended[0]]
    chosen = best_of(3, 0.7, weight)(asking, pairs, [2, 0], greedy)
    assert asked == [pairs.prompt(2)] * 3 + [pairs.prompt(0)] * 3
    candidates = {2: ended[1:4], 0: [ended[0], *ended[3:]]}
    for example, ids in zip((2, 0), chosen):
        given = candidates[example]
        measures = judged(model, pairs, [example] * len(given), given)
        assert ids == given[int(measures[bool(weight)].argmax())]
    drawn = cut
    assert best_of(1, 0.7, weight)(asking, pairs, [1], cut) == cut  # none ended


def test_what_is_drawn_does_not_depend_on_the_batch(monkeypatch):
    """Nor on which questions an interrupted evaluation has left, nor on how many samples follow."""
    pairs, tokenizer = pairs_of(sums(8))
    model = a_model(pairs)
    asking = Asking(model, tokenizer, contextlib.nullcontext, 6)

    def drawn(*batches, samples=3):
        found = {}

        def keep(asking, pairs, examples, answers, weight):
            for example, ids in zip(examples, answers):
                found.setdefault(example, []).append(ids)
            return answers[: len(set(examples))]

        monkeypatch.setattr(judge, "best", keep)
        for batch in batches:
            answer(asking, pairs, batch, best_of(samples, 20.0, 1.0))
        return found

    whole = drawn(list(range(8)))
    assert len({tuple(ids) for found in whole.values() for ids in found[1:]}) == 24
    assert drawn([0, 1, 2], [3, 4, 5], [6, 7]) == whole
    assert drawn(*([i] for i in reversed(range(8)))) == whole
    assert drawn([5, 2]) == {row: whole[row] for row in (5, 2)}
    more = drawn(list(range(8)), samples=5)
    assert {row: found[:4] for row, found in more.items()} == whole


def test_no_samples_no_choice():
    assert best_of(0, 0.7, 5.0) is None


def test_answers_may_be_chosen():
    """As evaluate.py --samples does it: what is chosen is what is scored."""
    pairs, tokenizer = pairs_of(sums(4))
    model = a_model(pairs)
    asking = Asking(model, tokenizer, contextlib.nullcontext, 6)
    records = answer(asking, pairs, [3, 1], best_of(2, 0.7, 1.0))
    assert [r["row"] for r in records] == [3, 1]
    best = best_of(2, 0.7, 1.0)(asking, pairs, [3, 1], [[5], [6]])
    plain = answer(asking, pairs, [3, 1], lambda *args: best)
    assert [r["target"] for r in plain] == [r["target"] for r in records]
    assert [r["output"] for r in plain] == [tokenizer.decode(ids) for ids in best]
