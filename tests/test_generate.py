"""Claims about generate.py: the cached batch equals the slow and obvious one; when rows stop; how
tokens are drawn. Questions and answers are in test_evaluate.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_model import EOT, V, make_gpt, plain_gpt

import generate as generate_module
from generate import GREEDY, Draw, Sampling, generate, generate_plain, generate_steps

PROMPTS = [[5, 9, 2, 40, 13], [21], [8, 30, 12], [3, 3, 3, 3, 3, 3, 3, 61]]


def make_talker(seed=0, quiet=True):
    """A model with strong opinions; quiet: one that practically never says end of text."""
    gpt = make_gpt(seed, scale=8)
    if quiet:
        with torch.no_grad():
            gpt.wte.weight[EOT] = 0  # logit 0, below the largest of 63 others
    return gpt.eval()


# --- the cached batch equals the slow and obvious one -------------------------------------------

WAYS = {
    "greedy": dict(temperature=0),
    "sampled": dict(temperature=1.0),
    "top_k": dict(temperature=1.5, top_k=5),
    "top_p": dict(temperature=2.0, top_p=0.8),
    "both": dict(temperature=1.2, top_k=20, top_p=0.95),
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_generate_equals_generate_plain(options):
    gpt, sampling = make_talker(quiet=False), Sampling(**options, seed=3)
    cached = generate(gpt, PROMPTS, 16, EOT, sampling)
    assert cached == generate_plain(gpt, PROMPTS, 16, EOT, sampling)
    assert len({tuple(row) for row in cached}) == len(PROMPTS)  # each prompt its own text


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_rows_that_stop_early_and_rows_that_get_full_equal_the_plain_ones(options, monkeypatch):
    """In one batch: prompts of 1 to 32 tokens, of which 32 fit; rows that say end of text, rows
    that reach longest_path, and rows that go on to the last token that was asked for."""
    gpt, eot, new, sampling = make_gpt(scale=8).eval(), 15, 12, Sampling(**options, seed=1)
    lengths = (1, 4, 31, 12, 32, 20, 7, 9, 2, 25)
    prompts = [[(11 * i + 5 * j) % V for j in range(n)] for i, n in enumerate(lengths)]
    expected = generate_plain(gpt, prompts, new, eot, sampling)
    for grow in (1, 3, 32):
        monkeypatch.setattr(generate_module, "GROW", grow)
        assert generate(gpt, prompts, new, eot, sampling) == expected
    room = [min(new, 32 - n) for n in lengths]  # block_size is 32
    ends = ["stopped" if row[-1:] == [eot] else "full" if n < new else "asked for"
            for row, n in zip(expected, room)]  # fmt: skip
    assert set(ends) == {"stopped", "full", "asked for"}
    assert all(end == "stopped" or len(row) == n for row, n, end in zip(expected, room, ends))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_rows_that_finish_and_leave_change_no_other(temperature, monkeypatch):
    """In generate_plain no row knows another. The cached batch shrinks and its caches grow."""
    gpt, batches = make_gpt(block_size=64), []
    prompts = [[i, 1, *range(i % 5)] for i in range(24)]
    expected = generate_plain(gpt, prompts, 50, 7, Sampling(temperature))
    gpt.ln_f.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    for grow in (1, 3, 32):
        monkeypatch.setattr(generate_module, "GROW", grow)
        batches.clear()
        assert generate(gpt, prompts, 50, 7, Sampling(temperature)) == expected
        if temperature:  # at temperature 0 this model never stops
            assert len({len(row) for row in expected}) > 5
            assert batches[0] == 24 > batches[-1] and batches == sorted(batches, reverse=True)


def test_greedy_generation_is_the_argmax_of_a_plain_gpt():
    gpt = make_talker()
    gpt_with_bias = make_gpt(bias=True)  # the reference reads biases; these are all 0
    gpt_with_bias.load_state_dict(gpt.state_dict(), strict=False)
    for prompt, new in zip(PROMPTS, generate(gpt, PROMPTS, 6, EOT)):
        ids = list(prompt)
        for _ in range(6):
            hidden = plain_gpt(gpt_with_bias, torch.tensor([ids]))[0, -1]
            ids.append((gpt.wte.weight @ hidden).argmax().item())
        assert ids == prompt + new


def test_batched_greedy_generation_equals_one_by_one():
    gpt = make_talker()
    batch = generate(gpt, PROMPTS, 12, EOT)
    assert batch == [generate(gpt, [p], 12, EOT)[0] for p in PROMPTS]


def test_a_prompt_may_end_in_pred_tokens():
    gpt = make_talker()
    prompts = [[*p, V, V + 1] for p in PROMPTS]
    new = generate(gpt, prompts, 8, EOT)
    assert new == generate_plain(gpt, prompts, 8, EOT)
    assert new != generate(gpt, PROMPTS, 8, EOT)
    with torch.no_grad():
        gpt.pred.weight.copy_(torch.randn_like(gpt.pred.weight))
    assert new != generate(gpt, prompts, 8, EOT)  # it is read, not skipped


def test_each_token_is_computed_once():
    """The prompts in one pass, then a column in each, and the output layer on one position of each
    row; the slow one computes every row anew for each of its tokens."""
    gpt, passes, outputs = make_talker(), [], []
    gpt.h[0].register_forward_hook(lambda _, inputs, output: passes.append(output.shape[:2]))
    gpt.lm_head.register_forward_hook(lambda _, inputs, output: outputs.append(output.shape))
    generate(gpt, PROMPTS, 6, EOT)
    assert passes == [(4, 8)] + 5 * [(4, 1)]
    assert outputs == 6 * [(4, V)]
    passes.clear()
    generate_plain(gpt, PROMPTS, 6, EOT)
    assert passes == [(1, len(p) + i) for i in range(6) for p in PROMPTS]


# --- token by token ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("grow", [1, 3, 32])
def test_a_row_is_in_every_step_up_to_its_last_token(options, grow, monkeypatch):
    """Prompts of 1 to 32 tokens, of which 32 fit. A row that has said end of text stays in the
    batch for a while, and a full one is in it at first: no step tells of them."""
    monkeypatch.setattr(generate_module, "GROW", grow)
    gpt, eot, new, sampling = make_gpt(scale=8).eval(), 15, 12, Sampling(**options, seed=1)
    prompts = [[(11 * i + 5 * j) % V for j in range(n)] for i, n in enumerate((1, 31, 32, 20, 25))]
    expected = generate_plain(gpt, prompts, new, eot, sampling)
    steps = [(rows.tolist(), tokens.tolist())
             for rows, tokens in generate_steps(gpt, prompts, new, eot, sampling)]  # fmt: skip
    assert len(steps) == max(map(len, expected)) and len(set(map(len, expected))) > 2
    for number, (rows, tokens) in enumerate(steps):
        assert rows == [row for row, ids in enumerate(expected) if len(ids) > number]
        assert tokens == [expected[row][number] for row in rows]
    assert list(generate_steps(gpt, prompts, 0, eot)) == []


def modes():
    return torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


def test_steps_of_several_threads_leave_no_mode_behind():
    """A server's threads take turns on one iterator; what runs there afterwards is as before."""
    gpt, seen = make_talker(), []
    gpt.ln_f.register_forward_hook(lambda *_: seen.append(modes()))

    def take(steps):
        with torch.autocast("cpu", torch.bfloat16):
            return next(steps)[1].tolist()

    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(gpt, PROMPTS, 6, EOT)
    seen.clear()
    steps = generate_steps(gpt, PROMPTS, 6, EOT)
    with ThreadPoolExecutor(1) as pool:
        for number in range(6):
            tokens = pool.submit(take, steps).result() if number % 2 else take(steps)
            assert tokens == [row[number] for row in expected]
            assert modes() == pool.submit(modes).result() == (False, False)
    assert seen == 6 * [(True, True)]


def test_iterators_on_one_model_do_not_mix_and_one_may_be_closed():
    gpt, sampling = make_talker(), Sampling(seed=2)
    alone = [generate(gpt, [prompt], 10, EOT, sampling)[0] for prompt in PROMPTS[:3]]
    together = [generate_steps(gpt, [prompt], 10, EOT, sampling) for prompt in PROMPTS[:3]]
    texts = [[], [], []]
    for step in range(10):
        for text, steps in zip(texts, together):
            if text is texts[1] and step >= 4:
                steps.close()
            else:
                text += next(steps)[1].tolist()
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert texts == [alone[0], alone[1][:4], alone[2]]
    loss = gpt.wte.weight.sum()  # a model that answers can still be trained
    loss.backward()


# --- when rows stop ---------------------------------------------------------------------------


def test_generation_stops_at_end_of_text_and_draws_nothing_above_it():
    eot, new = 7, 10  # of 64 ids, 56 lie above
    gpt, passes = make_gpt(), []
    gpt.ln_f.register_forward_hook(lambda *_: passes.append(1))
    rows = generate(gpt, [[i] for i in range(32)], new, eot, Sampling(temperature=1.0))
    assert max(max(row) for row in rows) <= eot
    stopped = [row for row in rows if row[-1] == eot]
    assert 0 < len(stopped) < len(rows)
    assert all(eot not in row[:-1] for row in stopped)
    assert all(len(row) == new and eot not in row for row in rows if row not in stopped)
    passes.clear()
    [row] = generate(gpt, [[1]], 30, eot, Sampling(temperature=1.0))
    assert row[-1] == eot and len(row) == len(passes) < 30  # no pass after the last row's end


def test_a_row_stops_at_block_size():
    gpt = make_talker()
    prompts = [[1] * n for n in (32, 31, 30, 4)]  # block_size is 32
    rows = generate(gpt, prompts, 20, EOT)
    assert [len(row) for row in rows] == [0, 1, 2, 20]
    alone = [generate(gpt, [p], 20, EOT)[0] for p in prompts]
    assert rows == alone  # a full row does not disturb the others


def test_a_full_row_leaves_the_batch(monkeypatch):
    monkeypatch.setattr(generate_module, "GROW", 1)
    gpt, batches = make_talker(), []
    gpt.h[0].register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    generate(gpt, [[1] * n for n in (32, 31, 30, 4)], 20, EOT)
    assert batches == [4, 2] + 18 * [1]


def test_nothing_is_asked_for():
    gpt = make_talker()
    assert generate(gpt, PROMPTS, 0, EOT) == generate_plain(gpt, PROMPTS, 0, EOT) == [[]] * 4


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[1] * 33]],
                         ids=["none", "empty", "one_empty", "too_long"])  # fmt: skip
def test_prompts_that_are_empty_or_too_long_are_refused(prompts):
    with pytest.raises(AssertionError):
        generate(make_talker(), prompts, 4, EOT)


# --- how tokens are drawn ---------------------------------------------------------------------


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    gpt = make_talker()
    greedy = generate(gpt, PROMPTS, 12, EOT, GREEDY)
    assert greedy == generate(gpt, PROMPTS, 12, EOT)  # the default
    assert generate(gpt, PROMPTS, 12, EOT, Sampling(temperature=3.0, top_k=1)) == greedy
    assert generate(gpt, PROMPTS, 12, EOT, Sampling(temperature=3.0, top_p=1e-6)) == greedy


def test_temperature_top_k_and_top_p_do_what_they_say():
    """Probabilities .5 .3 .15 .05: top_p = .7 needs the first two; top_k = 3 drops the last;
    temperature 1/2 squares them."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(4000, 4)

    def shares(**options):
        draw = Draw(Sampling(**options, seed=0), range(len(logits)), 1, torch.device("cpu"))
        drawn = draw(logits, torch.arange(len(logits)))
        return drawn.bincount(minlength=4) / len(logits)

    for options, expected in (
        (dict(), [0.15, 0.5, 0.05, 0.3]),
        (dict(top_k=3), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        (dict(top_p=0.7), [0, 0.5 / 0.8, 0, 0.3 / 0.8]),
        (dict(temperature=0.5), [p * p / 0.365 for p in (0.15, 0.5, 0.05, 0.3)]),
        (dict(temperature=0), [0.0, 1, 0, 0]),
    ):
        got = shares(**options)
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=0.03)
        assert all((share == 0) == (want == 0) for share, want in zip(got, expected))


def test_what_a_row_draws_does_not_depend_on_which_others_are_left():
    logits, left = torch.randn(9, V), torch.tensor([1, 4, 8])
    everyone, few = (Draw(Sampling(seed=5), range(9), 3, torch.device("cpu")) for _ in range(2))
    for _ in range(3):
        assert torch.equal(everyone(logits, torch.arange(9))[left], few(logits[left], left))


def test_what_a_row_draws_does_not_depend_on_its_batch():
    """Its stream decides, and by default its place among the prompts: whatever the batch size, the
    order and how much is asked for."""
    gpt, sampling = make_talker(quiet=False), Sampling(temperature=1.5, seed=4)
    prompts, streams = [*PROMPTS, PROMPTS[0]], [7, 2**62, 0, 31, 8]
    whole = generate(gpt, prompts, 12, EOT, sampling, streams)
    assert whole == generate_plain(gpt, prompts, 12, EOT, sampling, streams)
    assert whole[0] != whole[4]  # the same question again
    for size in (1, 2, 3):
        parts = [generate(gpt, prompts[i : i + size], 12, EOT, sampling, streams[i : i + size])
                 for i in range(0, 5, size)]  # fmt: skip
        assert [row for part in parts for row in part] == whole
    assert generate(gpt, prompts[::-1], 12, EOT, sampling, streams[::-1]) == whole[::-1]
    short = generate(gpt, prompts, 5, EOT, sampling, streams)
    assert short == [row[:5] for row in whole]
    assert generate(gpt, prompts, 12, EOT, sampling) == generate(
        gpt, prompts, 12, EOT, sampling, list(range(5)))  # fmt: skip


def test_same_seed_same_text_other_seed_other_text():
    gpt = make_talker()
    first = generate(gpt, PROMPTS, 12, EOT, Sampling(temperature=2.0, seed=1))
    assert first == generate(gpt, PROMPTS, 12, EOT, Sampling(temperature=2.0, seed=1))
    assert first != generate(gpt, PROMPTS, 12, EOT, Sampling(temperature=2.0, seed=2))
