"""Claims about data.py, tokenizer.py and the plain tree of views.py: sources, batches, rows."""

import hashlib
import http.server
import json
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import error_line

import data
from config import Config
from data import as_pair, load_data, load_rows, read_jsonl
from regexes import depth
from synthetic import word_problems
from views import CODE, PRED, TARGET, TEXT, Pairs, code_view, tokenize

BATCHES = Config(batch_size=8, block_size=256)
LANGUAGE_MODEL = (TEXT, CODE)


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """Every host that a test tries to reach; none beyond this machine can be reached. A list and
    not only an exception: load_rows, rightly, survives any exception."""
    tried, connect, lookup = [], socket.socket.connect, socket.getaddrinfo

    def guard(host, then, *args, **kwargs):
        tried.append(host)
        if host not in ("127.0.0.1", "localhost"):
            raise OSError(f"a test must not reach {host}")
        return then(*args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", lambda s, to: guard(to[0], connect, s, to))
    monkeypatch.setattr(socket, "getaddrinfo", lambda h, *a, **k: guard(h, lookup, h, *a, **k))
    return tried


@pytest.fixture(scope="module")
def bpe():
    return data.train_tokenizer([r["answer"] for r in word_problems("train", 200)], 512)


@pytest.fixture(scope="module")
def gpt2():
    return data.gpt2_tokenizer()


@pytest.fixture(scope="module")
def problems(bpe):
    """1,001 word problems as Pairs: 125 batches an epoch, and one example left over."""
    pairs, left_out = tokenized(word_problems("train", 1001), bpe, BATCHES)
    assert left_out == 0
    return pairs


def tokenized(rows, tokenizer, config):
    return tokenize([as_pair(row) for row in rows], tokenizer, config)


def write_jsonl(path, rows):
    """As GSM8K's files are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- rows of blocks, drawn by hand ------------------------------------------------------------
# Two pairs of tokens; 8 is the separator, 9 end of text, V = 10, so [PRED] is 10, 11, 12.
#     1 2 8  |  3 4 9           5 8  |  6 9

Q, A, P, T, _ = TEXT, CODE, PRED, TARGET, 0
NO = -1  # no label


def hand_made(**settings):
    tokens = np.array([1, 2, 8, 3, 4, 9, 5, 8, 6, 9], np.int32)
    is_label = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1], bool) | (settings.get("labels") == "all")
    return Pairs(tokens, is_label, np.array([[0, 3, 3], [6, 8, 8]]),
                 np.array([[3, 3, 3], [2, 2, 2]]), np.array([3, 2]), Config(**settings),
                 vocab_size=10)  # fmt: skip


def drawn(rows):
    """Rows as lists."""
    return [t.tolist() for t in rows]


@pytest.mark.parametrize("n_pred, blocks, idx, block, targets", [
    (1, LANGUAGE_MODEL,
     [[1, 2, 8, 3, 4, 9], [5, 8, 6, 9, 0, 0]],
     [[Q, Q, Q, A, A, A], [Q, Q, A, A, _, _]],
     [[NO, NO, 3, 4, 9, NO], [NO, 6, 9, NO, NO, NO]]),
    (1, (TEXT, CODE, PRED),
     [[1, 2, 8, 3, 4, 9, 10], [5, 8, 6, 9, 10, 0, 0]],
     [[Q, Q, Q, A, A, A, P], [Q, Q, A, A, P, _, _]],
     [[NO, NO, 3, 4, 9, NO, NO], [NO, 6, 9, NO, NO, NO, NO]]),
    (3, (TEXT, CODE, PRED),
     [[1, 2, 8, 3, 4, 9, 10, 11, 12], [5, 8, 6, 9, 10, 11, 12, 0, 0]],
     [[Q, Q, Q, A, A, A, P, P, P], [Q, Q, A, A, P, P, P, _, _]],
     [[NO, NO, 3, 4, 9, NO, NO, NO, NO], [NO, 6, 9, NO, NO, NO, NO, NO, NO]]),
    (1, (TEXT, CODE, PRED, TARGET),
     [[1, 2, 8, 3, 4, 9, 10, 3, 4, 9], [5, 8, 6, 9, 10, 6, 9, 0, 0, 0]],
     [[Q, Q, Q, A, A, A, P, T, T, T], [Q, Q, A, A, P, T, T, _, _, _]],
     [[NO, NO, 3, 4, 9, NO, NO, NO, NO, NO], [NO, 6, 9, NO, NO, NO, NO, NO, NO, NO]]),
    (0, (TEXT, CODE, PRED, TARGET),
     [[1, 2, 8, 3, 4, 9, 3, 4, 9], [5, 8, 6, 9, 6, 9, 0, 0, 0]],
     [[Q, Q, Q, A, A, A, T, T, T], [Q, Q, A, A, T, T, _, _, _]],
     [[NO, NO, 3, 4, 9, NO, NO, NO, NO], [NO, 6, 9, NO, NO, NO, NO, NO, NO]]),
    (1, (TARGET,),
     [[3, 4, 9], [6, 9, 0]],
     [[T, T, T], [T, T, _]],
     [[NO, NO, NO], [NO, NO, NO]]),
])  # fmt: skip
def test_rows_are_packed_as_drawn(n_pred, blocks, idx, block, targets):
    """End of text is a label, or the model would never learn to stop; [PRED], padding and the
    target carry none, and neither does the separator."""
    rows = hand_made(n_pred=n_pred).pack(np.array([0, 1]), blocks)
    assert drawn(rows) == [idx, block, targets]


def test_labels_all_adds_the_question_and_nothing_else():
    rows = hand_made(labels="all", n_pred=2).pack(np.array([0, 1]), (TEXT, CODE, PRED, TARGET))
    assert drawn(rows)[2] == [[2, 8, 3, 4, 9, NO, NO, NO, NO, NO, NO],
                              [8, 6, 9, NO, NO, NO, NO, NO, NO, NO, NO]]  # fmt: skip


def test_rows_come_in_the_order_asked_for():
    rows = hand_made().pack(np.array([1, 0, 1]), LANGUAGE_MODEL)
    assert rows.idx[:, 0].tolist() == [5, 1, 5]
    alone = hand_made().pack(np.array([1]), LANGUAGE_MODEL)
    assert drawn(alone)[0] == [[5, 8, 6, 9]]  # a batch is as wide as its own longest row


def test_real_token_zero_is_not_padding(gpt2):
    """GPT-2's token 0 is "!": padding is known by its block, so "!" keeps its block and label."""
    pairs, _ = tokenized([{"question": "!", "answer": "!!"}, {"question": "a", "answer": "!"}],
                             gpt2, Config())  # fmt: skip
    rows = pairs.pack(np.array([1]), LANGUAGE_MODEL)
    assert drawn(rows) == [[[64, gpt2.sep, 0, gpt2.eot]], [[Q, Q, A, A]],
                           [[NO, 0, gpt2.eot, NO]]]  # fmt: skip


@pytest.mark.parametrize("answer_view, code", [
    ("full", "He has 2+3 = <<2+3=5>>5.\n#### 5"), ("final", "5"),
])  # fmt: skip
def test_views_end_in_their_marks(answer_view, code, bpe):
    row = {"question": "How many?", "answer": "He has 2+3 = <<2+3=5>>5.\n#### 5"}
    pairs, left_out = tokenized([row], bpe, Config(answer_view=answer_view))
    assert pairs.view(0, TEXT) == [*bpe.encode(["How many?"])[0], bpe.sep]
    assert pairs.view(0, CODE) == [*bpe.encode([code])[0], bpe.eot]
    assert left_out == 0


def test_final_view_is_what_follows_the_last_marks():
    assert code_view("#### 1\n#### 1,234 ", "final") == "1,234"
    assert code_view("no marks", "final") == "no marks"


@pytest.mark.parametrize("n_pred", [0, 1, 40])
def test_too_long_examples_are_left_out_whole_and_counted(n_pred, bpe):
    """A path is question + answer or question + [PRED], whichever is longer: exactly block_size
    fits."""
    rows = word_problems("train", 50)
    full, _ = tokenized(rows, bpe, Config(block_size=10_000))
    path = np.maximum(full.lengths[:, :2].sum(1), full.lengths[:, 0] + n_pred)
    limit = sorted(path)[25]
    pairs, left_out = tokenized(rows, bpe, Config(block_size=limit, n_pred=n_pred))
    kept = np.flatnonzero(path <= limit)
    assert 0 < left_out == 50 - len(kept)
    assert [pairs.view(i, TEXT) + pairs.view(i, CODE) for i in range(len(pairs))] == [
        full.view(i, TEXT) + full.view(i, CODE) for i in kept
    ]


# --- batches ----------------------------------------------------------------------------------


def test_batches_are_a_pure_function_of_seed_and_step(problems):
    steps = [0, 300, 3, 124, 125, 1, 300, 0]
    jumping = [replace(problems).batch(s).tolist() for s in steps]
    one_object = [problems.batch(s).tolist() for s in steps]
    in_order = {s: problems.batch(s).tolist() for s in range(301)}
    assert jumping == one_object == [in_order[s] for s in steps]


def test_an_epoch_holds_every_example_at_most_once(problems):
    B = BATCHES.batch_size
    per_epoch = len(problems) // B
    orders = []
    for epoch in range(2):
        order = np.concatenate(
            [problems.batch(s) for s in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        )
        assert len(order) == 1000
        assert len(set(order.tolist())) == len(order)
        assert order.min() >= 0 and order.max() < 1001
        orders.append(order.tolist())
    assert orders[0] != orders[1]
    assert set(orders[0]) != set(orders[1])  # the one left over comes later


def test_another_seed_gives_another_order(problems):
    other = replace(problems, config=replace(BATCHES, seed=1))
    assert problems.batch(0).tolist() != other.batch(0).tolist()


@pytest.mark.parametrize("change", [
    {"jepa_weight": 0.0}, {"jepa_weight": 4.0}, {"stop_grad": True}, {"n_pred": 0}, {"n_pred": 4},
    {"jepa_dropout": 0.5}, {"jepa_loss": "mse"}, {"spread": "vicreg", "spread_weight": 0.1},
    {"n_layer": 2}, {"labels": "all"}, {"max_iters": 9}, {"gradient_accumulation_steps": 4},
])  # fmt: skip
def test_batches_are_those_of_the_baseline(change, bpe):
    """Two runs that differ in the objective see the same examples at the same step."""
    rows = word_problems("train", 100)
    config = Config(batch_size=4)
    baseline, _ = tokenized(rows, bpe, config)
    changed, _ = tokenized(rows, bpe, replace(config, **change))
    for step in (0, 40):
        assert changed.batch(step).tolist() == baseline.batch(step).tolist()


@pytest.mark.parametrize("blocks", [LANGUAGE_MODEL, (TEXT, CODE, PRED, TARGET), (TARGET,)])
def test_sorting_by_length_leaves_little_padding(blocks, gpt2):
    """In rows of the language model, in full ones, and in those of a target on its own."""
    pairs, _ = tokenized(word_problems("train", 4096), gpt2, Config(batch_size=16))
    used, total = 0, 0
    for step in range(len(pairs) // 16):
        block = pairs.pack(pairs.batch(step), blocks).block
        used += (block != 0).sum().item()
        total += block.numel()
    assert used > 0.95 * total


def test_lengths_are_mixed_over_an_epoch(problems):
    """Batches are sorted by length inside, not one after the other: no curriculum."""
    per_epoch = len(problems) // BATCHES.batch_size
    width = [problems.lengths[problems.batch(s)].sum(1).mean() for s in range(per_epoch)]
    assert abs(np.corrcoef(np.arange(per_epoch), width)[0, 1]) < 0.2


# --- splits -----------------------------------------------------------------------------------


def texts(pairs, tokenizer):
    return [tokenizer.decode(pairs.view(i, TEXT)) for i in range(len(pairs))]


def test_validation_is_a_fixed_part_of_train_and_test_is_untouched(tmp_path, bpe):
    train, test = word_problems("train", 120), word_problems("test", 30)
    write_jsonl(tmp_path / "train.jsonl", train)
    write_jsonl(tmp_path / "test.jsonl", test)
    splits = []
    for seed in (1, 2):
        config = Config(data_dir=str(tmp_path), seed=seed)
        splits.append({s: texts(p, bpe) for s, p in load_data(config, bpe).pairs.items()})
    assert splits[0] == splits[1]
    got, asked = splits[0], [row["question"] for row in train]
    assert set(got) == {"train", "val", "test"}
    assert got["test"] == [row["question"] for row in test]
    assert len(got["val"]) == 12 and sorted(got["train"] + got["val"]) == sorted(asked)
    assert not set(got["train"]) & set(got["val"])
    assert got["train"] == [q for q in asked if q in set(got["train"])]  # in the file's order
    assert got["val"] != [q for q in asked if q in set(got["val"])]  # the first n are a sample


def test_a_subset_of_train_leaves_validation_as_it_is(tmp_path, bpe, capsys):
    write_jsonl(tmp_path / "train.jsonl", word_problems("train", 120))
    config = Config(data_dir=str(tmp_path), batch_size=8)
    whole = {s: texts(p, bpe) for s, p in load_data(config, bpe).pairs.items()}
    sizes = {}
    for n in (10, 40):
        loaded = load_data(replace(config, train_rows=n), bpe)
        sizes[n] = texts(loaded.pairs["train"], bpe)
        assert len(sizes[n]) == n == loaded.provenance["train_rows"]
        assert texts(loaded.pairs["val"], bpe) == whole["val"]
    assert set(sizes[10]) < set(sizes[40]) < set(whole["train"])  # the smaller lies in the larger
    many = replace(config, train_rows=109)
    assert "has 108 training rows" in error_line(capsys, load_data, many, bpe)


def test_regexes_can_be_split_by_depth():
    rows = data.load_rows(Config(dataset="regex", regex_split="depth"))[0]
    deepest = {split: max(depth(row["code"]) for row in some) for split, some in rows.items()}
    assert deepest["train"] == deepest["val"] == 2
    assert {depth(row["code"]) for row in rows["test"]} == {3}


def test_the_tokenizer_never_reads_held_out_text(tmp_path):
    rows = [{"question": f"q{i}", "answer": "plain"} for i in range(40)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", [{"question": "zyxzyxzyx " * 50, "answer": "zyx"}] * 9)
    config = Config(data_dir=str(tmp_path), tokenizer="bpe", bpe_vocab_size=320)
    tokens = load_data(config).tokenizer.ranks
    assert b"plain" in tokens and b"zyx" not in tokens and b"zy" not in tokens


def test_provenance_tells_rows_and_checksums_of_what_was_read(tmp_path, bpe):
    rows = [*word_problems("train", 59), {"question": "Caf\u00e9 \u2019?", "answer": "\U0001f600"}]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    p = load_data(Config(data_dir=str(tmp_path)), bpe).provenance
    assert p["train_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (p["train_rows"], p["val_rows"]) == (54, 6)
    assert (p["dataset"], p["source"]) == ("gsm8k", str(tmp_path))
    assert (p["tokenizer"], p["tokenizer_sha256"]) == ("bpe", bpe.sha256)
    assert json.loads(json.dumps(p)) == p  # plain types: it goes into checkpoints and results


def test_generated_splits_are_of_gsm8k_size_and_separate():
    rows = data.generated_rows()
    assert {s: len(r) for s, r in rows.items()} == {"train": 7473, "val": 512, "test": 1319}
    assert all(not {r["question"] for r in rows["train"]} & {r["question"] for r in rows[s]}
               for s in ("val", "test"))  # fmt: skip


@pytest.mark.parametrize("n_rows, batch_size, named", [
    (5, 16, "5 training pairs"), (19, 4, "1 validation pairs"),
])  # fmt: skip
def test_too_few_rows_are_one_line(n_rows, batch_size, named, tmp_path, bpe, capsys):
    write_jsonl(tmp_path / "train.jsonl", word_problems("train", n_rows))
    config = Config(data_dir=str(tmp_path), batch_size=batch_size)
    assert named in error_line(capsys, load_data, config, bpe)


def test_twenty_rows_are_enough(tmp_path, bpe):
    write_jsonl(tmp_path / "train.jsonl", word_problems("train", 20))
    pairs = load_data(Config(data_dir=str(tmp_path), batch_size=18), bpe).pairs
    assert (len(pairs["train"]), len(pairs["val"])) == (18, 2)
    assert sorted(pairs["train"].batch(5).tolist()) == list(range(18))


def test_a_block_size_that_fits_nothing_is_one_line(tmp_path, bpe, capsys):
    write_jsonl(tmp_path / "train.jsonl", word_problems("train", 40))
    config = Config(data_dir=str(tmp_path), block_size=4)
    assert "0 training pairs" in error_line(capsys, load_data, config, bpe)


# --- tokenizers -------------------------------------------------------------------------------

UNICODE = "Grüße, 世界! \u2028 e\u0301 👩‍👩‍👧 \x00\t\n  don't  1,234.50\r\n#### 7 "


def test_gpt2_ids_are_the_published_ones(gpt2, connections):
    assert gpt2.encode(["hello world", " Hello, World! 12345", "", "\n\n"]) == [
        [31373, 995], [18435, 11, 2159, 0, 17031, 2231], [], [628],
    ]  # fmt: skip
    assert (gpt2.eot, gpt2.sep, gpt2.vocab_size) == (50256, 50257, 50304)
    assert data.gpt2_tokenizer().sha256 == gpt2.sha256
    assert connections == []


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_any_text_comes_back(name, request):
    tokenizer = request.getfixturevalue(name)
    rows = [UNICODE, "", "a", *(row["answer"] for row in word_problems("val", 50))]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(rows)] == rows


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_no_text_yields_a_special_token(name, request):
    tokenizer = request.getfixturevalue(name)
    typed = "<|endoftext|> and <|sep|>"
    [ids] = tokenizer.encode([typed])
    assert max(ids) < tokenizer.eot < tokenizer.sep < tokenizer.vocab_size
    assert tokenizer.decode([*ids, tokenizer.sep, tokenizer.eot]) == typed  # specials are silent


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_dump_and_parse_are_inverse(name, request):
    tokenizer = request.getfixturevalue(name)
    again = data.Tokenizer.parse(name, tokenizer.dump())
    assert again.ranks == tokenizer.ranks and again.sha256 == tokenizer.sha256
    assert again.encode([UNICODE]) == tokenizer.encode([UNICODE])


def test_bpe_has_the_size_asked_for_and_is_deterministic(connections):
    lines = [row["question"] for row in word_problems("train", 200)]
    first, second = (data.train_tokenizer(lines, 512) for _ in "12")
    assert first.sha256 == second.sha256
    assert (len(first.ranks), first.eot, first.sep, first.vocab_size) == (510, 510, 511, 512)
    assert first.sha256 != data.train_tokenizer(lines[:100], 512).sha256
    assert connections == []


def test_a_tiny_corpus_yields_fewer_tokens_and_still_works():
    tokenizer = data.train_tokenizer(["ab ab"], 8192)
    assert 256 < len(tokenizer.ranks) < 300
    assert tokenizer.vocab_size == 320  # rounded up to a multiple of 64
    assert tokenizer.decode(tokenizer.encode([UNICODE])[0]) == UNICODE


# --- sources ----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path, connections):
    """A closed loopback port in place of the hub, and empty caches; the working directory is
    empty, so no data/gsm8k either. Returns a function that opens the port."""
    import datasets
    import huggingface_hub

    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(data, "generated_rows", lambda: {"train": word_problems("train", 50)})
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = json.dumps({"id": data.HUB_ID}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer, bind_and_activate=False)
    server.server_bind()  # bound but not listening: every connection is refused
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)

    def open_port():
        server.server_activate()
        thread.start()
        return asked

    yield open_port
    if thread.is_alive():
        server.shutdown()
        thread.join()
    server.server_close()


@pytest.fixture
def load_calls(monkeypatch):
    """load_dataset replaced by a stand-in that notes name, config and both offline flags."""
    import datasets
    from huggingface_hub import constants

    calls = []

    def load_dataset(name, config):
        flags = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
        calls.append((name, config, *flags))
        rows = [{**row, "extra": 1} for row in word_problems("val", 30)]
        return {"train": rows, "test": rows[:9]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def offline_flags():
    import datasets
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE


def test_a_local_file_wins_and_nothing_is_asked(hub, connections, load_calls, tmp_path):
    rows = word_problems("train", 5)
    write_jsonl(tmp_path / "empty" / "data" / "gsm8k" / "train.jsonl", rows)
    pairs = [as_pair(row) for row in rows]
    loaded, *about = load_rows(Config())
    assert {s: list(some) for s, some in loaded.items()} == {"train": pairs}
    assert about == ["gsm8k", "data/gsm8k"]
    write_jsonl(tmp_path / "mine" / "train.jsonl", rows[:3])
    write_jsonl(tmp_path / "mine" / "test.jsonl", rows[3:])
    mine = str(tmp_path / "mine")
    loaded, *about = load_rows(Config(data_dir=mine))
    assert {s: list(some) for s, some in loaded.items()} == {"train": pairs[:3], "test": pairs[3:]}
    assert about == ["gsm8k", mine]
    assert connections == load_calls == []


def test_word_problems_ask_nobody(hub, connections, load_calls):
    assert load_rows(Config(dataset="word_problems"))[1:] == ("word_problems", "synthetic.py")
    assert connections == load_calls == []


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_copy_of_the_hub_repository_loads(kind, hub, tmp_path, connections):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "gsm8k"
    rows = {"train": word_problems("train", 20), "test": word_problems("test", 5)}
    for split in rows:
        path = folder / "main" / f"{split}-00000-of-00001.{kind}"
        write_jsonl(path, rows[split])
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[split]), path)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        f"  - split: train\n    path: main/train-*.{kind}\n"
        f"  - split: test\n    path: main/test-*.{kind}\n---\n# GSM8K\n"
    )
    assert load_rows(Config(data_dir=str(folder))) == (rows, "gsm8k", str(folder))
    assert connections == []


@pytest.mark.parametrize("files, named", [
    ({}, "holds no train.jsonl"),
    ({"notes.txt": "hello"}, "holds neither train.jsonl nor a copy"),
    ({"test.jsonl": '{"question": "q", "answer": "a"}\n'}, "holds neither train.jsonl nor a copy"),
    ({"README.md": "---\nconfigs:\n- config_name: main\n  data_files: main/*.jsonl\n---\n",
      "main/train.jsonl": '{"text": "q", "code": "a"}\n'}, "question"),
])  # fmt: skip
def test_a_wrong_data_dir_is_one_line(files, named, hub, tmp_path, capsys):
    """Whoever names a folder wants its data: never a silent fallback."""
    folder = tmp_path / "mine"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    line = error_line(capsys, load_rows, Config(data_dir=str(folder)))
    assert named in line and str(folder) in line


def test_unreachable_hub_falls_back_with_a_notice_nobody_can_miss(hub, capsys):
    began = time.time()
    rows, name, source = load_rows(Config())
    assert time.time() - began < 5
    assert rows["train"] == word_problems("train", 50)
    assert (name, source) == ("word_problems", "synthetic.py")
    printed = capsys.readouterr().out
    assert "NOT GSM8K" in printed and "*" * 60 in printed
    assert "data/gsm8k/train.jsonl" in printed and "--data_dir" in printed  # what to do
    assert offline_flags() == (False, False)


def test_fallback_is_never_called_gsm8k(hub, bpe, capsys):
    loaded = load_data(Config(), bpe)
    assert loaded.provenance["dataset"] == "word_problems"
    assert not any("gsm8k" in str(v).lower() for v in loaded.provenance.values())
    assert "data gsm8k" not in capsys.readouterr().out


def test_without_fallback_an_unreachable_hub_is_one_line(hub, capsys):
    line = error_line(capsys, load_rows, Config(offline_fallback=False))
    assert "data/gsm8k/train.jsonl" in line and "hub" in line


def test_reachable_hub_is_asked_once_and_loaded_online(hub, load_calls, connections):
    asked = hub()
    rows, name, source = load_rows(Config())
    assert asked == [f"/api/datasets/{data.HUB_ID}"]
    assert load_calls == [("openai/gsm8k", "main", False, False)]
    assert (name, source) == ("gsm8k", "hub openai/gsm8k")
    assert rows["train"] == word_problems("val", 30)  # question and answer, nothing else
    assert rows["test"] == rows["train"][:9]
    assert set(connections) == {"127.0.0.1"}


def test_unreachable_hub_takes_a_cached_copy(hub, load_calls, capsys):
    _, name, source = load_rows(Config())
    assert load_calls == [("openai/gsm8k", "main", True, True)]
    assert (name, source) == ("gsm8k", "hub openai/gsm8k")
    assert offline_flags() == (False, False)
    assert "NOT GSM8K" not in capsys.readouterr().out


def test_offline_by_choice_is_respected(hub, load_calls, connections, monkeypatch):
    """HF_HUB_OFFLINE=1: not even the probe goes out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_rows(Config())[1] == "gsm8k"
    assert load_calls == [("openai/gsm8k", "main", True, True)]
    assert connections == []
    assert offline_flags() == (True, False)  # as they were


def test_flags_are_restored_when_nothing_is_cached(hub, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.hub_rows(data.HUB_ID, offline=True)
    assert offline_flags() == (False, False)


# --- JSONL ------------------------------------------------------------------------------------

GOOD = '{"question": "q", "answer": "a"}'
ROW = {"question": "q", "answer": "a"}
BAD_LINES = {
    "not JSON": "question: q", "cut short": GOOD[:-3], "no object": '["q", "a"]', "null": "null",
    "a number": "3", "missing key": '{"question": "q"}', "other keys": '{"in": "q", "out": "a"}',
    "not text": '{"question": "q", "answer": 5}', "null text": '{"question": null, "answer": "a"}',
    "empty text": '{"question": "", "answer": "a"}', "blank": '{"question": "q", "answer": " "}',
    "two rows": GOOD + GOOD,
    "deeply nested": "[" * 100_000,
    "half a character": '{"question": "\\ud83d", "answer": "a"}',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_or_counted(kind, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n\n{BAD_LINES[kind]}\n{GOOD}\n")  # a blank line counts as a line
    line = error_line(capsys, read_jsonl, path, "error")
    assert f"{path}:3: " in line and "--bad_lines=skip" in line
    assert read_jsonl(path, "skip")[:] == [as_pair(ROW)] * 2
    assert f"{path}: left out 1 bad lines, kept 2" in capsys.readouterr().out


def test_a_file_in_another_encoding_is_named(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + GOOD.replace("q", "é").encode("latin-1"))
    assert f"{path}:2: " in error_line(capsys, read_jsonl, path, "error")


@pytest.mark.parametrize("text", ["", "\n \n", "nonsense\n"])
def test_a_file_without_rows_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    assert "holds no pair" in error_line(capsys, read_jsonl, path, "skip")


def test_a_missing_file_or_a_folder_is_one_line(tmp_path, capsys):
    for path in (tmp_path / "none.jsonl", tmp_path):
        assert f"cannot read {path}" in error_line(capsys, read_jsonl, path, "error")


@pytest.mark.parametrize("text", [
    GOOD, f"{GOOD}\n", f"{GOOD}\r\n", f"\ufeff{GOOD}\n", f"\n{GOOD}\n\n",
    '{"id": 7, "answer": "a", "question": "q", "more": [1]}\n',
])  # fmt: skip
def test_ways_to_write_a_good_file(text, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(text.encode())
    assert list(read_jsonl(path, "error")) == [as_pair(ROW)]


def test_only_a_newline_ends_a_line(tmp_path):
    """U+2028, U+0085 and form feed end a line for str.splitlines, not in JSONL."""
    rows = [{"question": "a\u2028b\x85c", "answer": "d\u2029e\x0cf"}, ROW]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    assert list(read_jsonl(path, "error")) == [as_pair(row) for row in rows]
