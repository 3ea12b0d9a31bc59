"""Text from a trunk: greedy or drawn, with a key/value cache; questions answered, answers scored.

    generate        continue token lists of any lengths as one batch
    generate_steps  the same, token by token
    generate_plain  the same, slow and obvious, which the tests hold it to
    answer          answers to questions of a split, with their scores
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from generators.regex_equivalence import equivalent
from model import Trunk, block_causal_mask
from plumbing.kernels import packed_weights
from plumbing.output import Bar
from plumbing.scoring import final_number, holds_number, with_mark
from plumbing.tokenizers import Tokenizer
from views import Pairs

GROW = 32  # columns by which a key/value cache grows
SHARES = ("exact", "prefix", "contains", "stopped", "equivalent")  # of answers, as `score` has them


class Sampling(NamedTuple):
    """How the next token is drawn; top_k=0 and top_p=1 switch those off."""

    temperature: float = 1.0  # 0 is greedy: always the likeliest
    top_k: int = 0  # among the k likeliest
    top_p: float = 1.0  # among the likeliest whose probability reaches p
    seed: int = 0


GREEDY = Sampling(temperature=0)


def generate(
    trunk: Trunk, prompts: list[list[int]], max_new_tokens: int, eot: int,
    sampling: Sampling = GREEDY, streams: list[int] | None = None,
) -> list[list[int]]:
    """Continue token lists as one batch (see generate_steps). Returns each prompt's new tokens;
    they end in eot if it stopped."""
    outputs = [[] for _ in prompts]
    for rows, tokens in generate_steps(trunk, prompts, max_new_tokens, eot, sampling, streams):
        for row, token in zip(rows.tolist(), tokens.tolist()):
            outputs[row].append(token)
    return outputs


@torch.inference_mode()
def generate_steps(
    trunk: Trunk, prompts: list[list[int]], max_new_tokens: int, eot: int,
    sampling: Sampling = GREEDY, streams: list[int] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Continue token lists, each of 1 to longest_path tokens, as one batch with a cache, token by
    token. `streams` says which random numbers each prompt's answer is drawn by: see Draw.

    `eot`, end of text, stops a row; without trunk.n_drawn it is the largest id that may be drawn
    (separator and padding of the table lie above it). Yields after every step the numbers of the
    rows that were not done, (b,), and the token that each of them got, (b,). Several threads may
    generate from one trunk at a time, and whoever closes the iterator ends it. A step runs in the
    autocast that is open around it, the same for all; in between, inference mode is left."""
    assert prompts and all(0 < len(p) <= trunk.longest_path for p in prompts)
    device, most = trunk.device, trunk.longest_path
    length = torch.tensor([len(p) for p in prompts], device=device)
    B, width = len(prompts), max(len(p) for p in prompts)
    S = width + min(max_new_tokens, most - int(length.min()))
    # Prompts are padded on the right; new tokens of all rows go to column width, width + 1, ...
    tokens = torch.zeros(B, S, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    columns = torch.arange(S, device=device)
    # One block per row, with padding (block 0) between the prompt and what it is continued by.
    block = ((columns < length[:, None]) | (columns >= width)).long()
    mask, position_ids = block_causal_mask(block, torch.eye(2, dtype=torch.bool, device=device))
    # A full row goes on with the last position, unread: it is cut below.
    position_ids = position_ids.clamp(max=most - 1)

    draw, cache = Draw(sampling, streams or range(B), S - width, device), trunk.new_cache()
    rows = torch.arange(B, device=device)  # those still in the batch
    left = most - length  # tokens that each of them may get
    done = left <= 0
    start = 0
    with packed_weights(trunk):
        for new in range(width, S):
            end = new
            if new > width:
                # Now and then finished rows leave and the cache grows. In between, shapes stay
                # what they are: a CPU prepares matrix products anew for every shape.
                if (new - width) % GROW == 1 % GROW:
                    stay, room = ~done, min(new + GROW - 1, S)
                    rows, left, done = rows[stay], left[stay], done[stay]
                    cache.resize(stay, room)
                start, end = new - 1, room
            # The last token of a row is its prompt's end at first, then the newest column.
            last = length[rows, None] - 1 if new == width else new - 1
            alone = new == start + 1
            hidden = trunk.layers(
                trunk.embed(tokens[rows, start:new]), position_ids[rows, start:new],
                mask[rows, start:new, :end], cache,
                read=None if alone else (columns[start:new] == last).expand(len(rows), -1),
            ).view(len(rows), -1)  # (rows, C)
            drawn = draw(trunk.logits(hidden).float()[:, : trunk.n_drawn or eot + 1], rows)
            tokens[rows, new] = drawn
            step = rows, drawn
            if done.any():  # finished rows stay for a while
                step = rows[~done], drawn[~done]
            done = done | (drawn == eot) | (left <= new - width + 1)
            yield step
            if done.all():
                break


@torch.inference_mode()
def generate_plain(
    trunk: Trunk, prompts: list[list[int]], max_new_tokens: int, eot: int,
    sampling: Sampling = GREEDY, streams: list[int] | None = None,
) -> list[list[int]]:
    """What `generate` has to equal: for every token, each row alone and anew from its first one."""
    device, streams = trunk.device, streams or range(len(prompts))
    draw = Draw(sampling, streams, max_new_tokens, device)
    outputs = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        going = [i for i, (prompt, ids) in enumerate(zip(prompts, outputs))
                 if ids[-1:] != [eot] and len(prompt) + len(ids) < trunk.longest_path]  # fmt: skip
        if not going:
            break
        logits = []
        for i in going:
            idx = torch.tensor([prompts[i] + outputs[i]], device=device)
            hidden = trunk.everywhere(idx, torch.ones_like(idx))  # one block: plainly causal
            logits.append(trunk.logits(hidden[0, -1]).float()[: trunk.n_drawn or eot + 1])
        for i, token in zip(going, draw(torch.stack(logits), torch.tensor(going)).tolist()):
            outputs[i].append(token)
    return outputs


class Draw:
    """Draws tokens for the rows of a batch, some of which may have left. Each row has random
    numbers of its own, given by (seed, its stream) alone: neither the batch nor who is left in it
    changes what it gets. Called once for every new token, at most n_new times."""

    def __init__(
        self, sampling: Sampling, streams: Sequence[int], n_new: int, device: torch.device
    ):
        self.sampling, self.n_drawn = sampling, 0
        self.uniform = torch.empty(0)  # (n_new, n)
        if sampling.temperature:
            drawn = [np.random.Generator(np.random.Philox(key=[sampling.seed, stream]))
                     .random(n_new, np.float32) for stream in streams]  # fmt: skip
            self.uniform = torch.from_numpy(np.stack(drawn, 1)).to(device)

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A token for each of `rows` (b,), from its logits (b, V): (b,)."""
        temperature, top_k, top_p, _ = self.sampling
        if temperature == 0:
            return logits.argmax(-1)
        probs, order = (logits / temperature).softmax(-1), None
        if top_k:  # likeliest first; sorting all of 50,000 takes 40 times as long
            probs, order = probs.topk(min(top_k, probs.size(-1)))
        elif top_p < 1:
            probs, order = probs.sort(-1, descending=True)
        if top_p < 1:  # the smallest set of tokens whose probability reaches p, never less than one
            probs = probs * (probs.cumsum(-1) - probs < top_p)
        cumulative = probs.cumsum(-1)
        # Ends in exactly 1, which no random number reaches: nothing of probability 0 is drawn.
        cumulative /= cumulative[:, -1:].clone()
        u, self.n_drawn = self.uniform[self.n_drawn, rows, None], self.n_drawn + 1
        drawn = torch.searchsorted(cumulative, u, right=True)
        return (drawn if order is None else order.gather(-1, drawn))[:, 0]


class Asking(NamedTuple):
    """Who answers, and how it is scored."""

    trunk: Trunk
    tokenizer: Tokenizer
    autocast: Callable
    max_new_tokens: int
    scoring: str = "string"  # number | final | string | regex: see `score`


def answer(asking: Asking, pairs: Pairs, examples: list[int], choose=None) -> list[dict]:
    """Greedy answers to questions of a split, as one batch, and their scores: a record each.
    choose(asking, pairs, examples, greedy) -> other answers in their place (see lab/judge.py)."""
    trunk, tokenizer = asking.trunk, asking.tokenizer
    was_training, started = trunk.training, time.time()
    trunk.eval()
    with asking.autocast():
        prompts = [pairs.prompt(example) for example in examples]
        outputs = generate(trunk, prompts, asking.max_new_tokens, tokenizer.eot)
        if choose:
            outputs = choose(asking, pairs, examples, outputs)
    trunk.train(was_training)
    seconds = (time.time() - started) / len(examples)
    records = []
    for example, ids in zip(examples, outputs):
        stopped = ids[-1:] == [tokenizer.eot]
        output, target = tokenizer.decode(ids), tokenizer.decode(pairs.answer(example))
        records.append({
            "row": int(pairs.source_row[example]),
            "prompt": tokenizer.decode(pairs.question(example)),
            "output": output, "target": target,
            "stop": "end of text" if stopped else "length", "stopped": stopped,
            **score(output, target, asking.scoring), "tokens": len(ids), "seconds": seconds,
        })  # fmt: skip
    return records


def answer_shares(asking: Asking, pairs: Pairs, n: int) -> dict[str, float]:
    """Shares of the first n questions of a split that are answered right: exact, prefix, ..."""
    examples = np.argsort(pairs.question_length[:n], kind="stable").tolist()  # little padding
    records, bar = [], Bar("held-out questions", "question", len(examples))
    for begin in range(0, len(examples), 64):
        records += answer(asking, pairs, examples[begin : begin + 64])
        bar.move(len(records) - bar.done)
    return {key: share_of(records, key) for key in SHARES if records and key in records[0]}


def longest_answer(pairs: Pairs, n: int | None = None) -> int:
    """Tokens of the longest answer of a split, its end of text included; or of its first n."""
    return int((pairs.lengths[:n, :2].sum(1) - pairs.question_length[:n]).max(initial=0))


def score(output: str, target: str, scoring: str) -> dict[str, bool]:
    """Is an answer right? By scoring: number (the one after ####), final (the text is a number),
    string (the very same text), regex (the same, and whether it describes the same lines). A
    target without a number is never right by number or final."""
    scores = {"exact": output == target, "prefix": output.startswith(target),
              "contains": target in output}  # fmt: skip
    if scoring in ("number", "final"):
        value = final_number(with_mark(target, scoring))
        right = value is not None and final_number(with_mark(output, scoring)) == value
        scores["exact"] = right
        if value is not None:  # 72 stands in 172 as a text alone
            scores["contains"] = right or holds_number(output, with_mark(target, scoring))
    if scoring == "regex":
        scores["equivalent"] = scores["exact"] or bool(equivalent(output, target))
    return scores


def share_of(records: list[dict], key: str) -> float:
    return sum(record[key] for record in records) / len(records)
