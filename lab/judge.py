"""Choosing among several answers to a question by [PRED]: log-probability + weight * cosine.

    python evaluate.py --samples=16 --judge=10      the best of 17 answers a question

λ = 0 has the likeliest; a model with JEPA also knows how near each answer's embedding lies to what
[PRED] foresaw.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from generate import Asking, Sampling, generate
from jepa import OBJECTIVES
from model import Trunk
from views import CODE, TARGET, TEXT, Example, Pairs, stacked


def best_of(samples: int, temperature: float, weight: float) -> Callable | None:
    """What generate.answer takes as `choose`: the greedy answer and `samples` drawn ones, of which
    the best is kept; None without samples."""
    if not samples:
        return None

    def choose(asking: Asking, pairs: Pairs, examples: list[int], greedy: list[list[int]]):
        repeated = [example for example in examples for _ in range(samples)]
        prompts, eot = [pairs.prompt(example) for example in repeated], asking.tokenizer.eot
        sampling = Sampling(temperature=temperature)
        # Random numbers by the row in its split and the sample, so whatever the batch holds.
        rows = pairs.source_row[examples].tolist()
        streams = [row << 32 | sample for row in rows for sample in range(samples)]
        drawn = generate(asking.trunk, prompts, asking.max_new_tokens, eot, sampling, streams)
        return best(asking, pairs, examples + repeated, greedy + drawn, weight)

    return choose


def best(
    asking: Asking, pairs: Pairs, examples: list[int], answers: list[list[int]], weight: float
) -> list[list[int]]:
    """Of the answers to each question, the one of highest log-probability + weight * cosine. One
    that did not end by itself is taken only if none did. `examples` says what each answers."""
    answers_to = {example: [] for example in examples}
    for example, ids in zip(examples, answers):
        answers_to[example].append(ids)
    for example, found in answers_to.items():
        ended = [ids for ids in found if ids[-1:] == [asking.tokenizer.eot]]
        answers_to[example] = list(map(list, dict.fromkeys(map(tuple, ended or found[:1]))))
    asked, answers = zip(*((example, ids) for example, found in answers_to.items()
                           for ids in found))  # fmt: skip
    log_p, cosine = judged(asking.trunk, pairs, asked, answers)
    chosen = {}
    for example, ids, points in zip(asked, answers, (log_p + weight * cosine).tolist()):
        if example not in chosen or points > chosen[example][0]:
            chosen[example] = points, ids
    return [ids for _, ids in chosen.values()]


@torch.no_grad()
def judged(trunk: Trunk, pairs: Pairs, examples, answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each answer after its question, in nats, and the cosine of Pred(question)
    and Enc(answer): (m,) each. Question i is examples[i], its answer the tokens answers[i]."""
    rows = []
    for example, ids in zip(examples, answers):
        text, code, target = (pairs.view(example, block) for block in (TEXT, CODE, TARGET))
        system = target[: len(target) - len(code)]
        rows.append(Example(text, len(text), ids, system + ids, tuple(pairs.framing[example])))
    config = replace(pairs.config, labels="answer")
    candidates = Pairs(*stacked(rows, config), config, pairs.vocab_size, idf=pairs.idf)
    objective, rng = OBJECTIVES[config.objective], np.random.default_rng(0)
    log_p, cosine = torch.empty(2, len(rows)).unbind()
    for at in np.array_split(np.arange(len(rows)), -(-len(rows) // 16)):
        batch = candidates.pack(at, objective.row(pairs.layout))
        batch = batch._replace(given=objective.given(candidates, at, rng)).to(trunk.device)
        hidden, labelled = trunk.everywhere(batch.idx, batch.block), batch.targets != -1
        logits = trunk.logits(hidden[labelled]).float()
        loss = torch.zeros(batch.targets.shape, device=trunk.device)
        loss[labelled] = F.cross_entropy(logits, batch.targets[labelled], reduction="none")
        log_p[at] = -loss.sum(1).cpu()
        pred, target = objective.views(hidden, batch, config)
        cosine[at] = F.cosine_similarity(pred.float(), target.float()).cpu()
    return log_p, cosine
