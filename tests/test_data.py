"""Claims about data.py: where pairs come from, their splits, and what is said of them."""

import gzip
import hashlib
import http.server
import json
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import error_line, sums

import data
from config import MADE_HERE, Config, load_config, relocated
from data import load_data, load_rows
from generators.regexes import depth, regex_pairs
from generators.word_problems import word_problems
from plumbing.jsonl import as_pair, sha256_of_rows
from plumbing.tokenizers import train_tokenizer
from views import CODE, TARGET, TEXT


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Tokens of files are kept under out/."""
    monkeypatch.chdir(tmp_path)


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
    return train_tokenizer([r["answer"] for r in word_problems("train", 200)], 512)


def write_jsonl(path, rows):
    """As GSM8K's files are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fewer(monkeypatch, generator, part=10):
    """Has a generator make one row of `part` for a data set. Returns what it was asked for."""
    asked, module = {}, sys.modules[generator.__module__]

    def some(split, n, **options):
        asked[split] = n
        return generator(split, n // part, **options)

    monkeypatch.setattr(module, generator.__name__, some)
    return asked


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


def test_regexes_can_be_split_by_depth(monkeypatch):
    """As many rows either way, of which a tenth are drawn here."""
    for name, by_depth in (("regex", False), ("regex_depth", True)):
        asked = fewer(monkeypatch, regex_pairs)
        rows, *about = load_rows(Config(dataset=name))
        assert asked == {"train": 8000, "val": 512, "test": 1000}
        assert about == [name, "generators/regexes.py"]
        for split, some in rows.items():
            assert some == regex_pairs(split, asked[split] // 10, by_depth=by_depth)
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
    assert (p["dataset"], p["source"]) == (f"{tmp_path.name} (train.jsonl)", str(tmp_path))
    assert (p["tokenizer"], p["tokenizer_sha256"]) == ("bpe", bpe.sha256)
    assert json.loads(json.dumps(p)) == p  # plain types: it goes into checkpoints and results


def test_generated_splits_are_of_gsm8k_size_and_separate(monkeypatch):
    asked = fewer(monkeypatch, word_problems)
    rows, *about = load_rows(Config(dataset="word_problems"))
    assert asked == {"train": 7473, "val": 512, "test": 1319} and list(rows) == list(asked)
    assert about == ["word_problems", "generators/word_problems.py"]
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


# --- what is said -----------------------------------------------------------------------------

HELD_OUT = "validation and test hold out whole kinds of problems: their loss stands far above"


def small(monkeypatch, rows):
    """load_rows gives these; as a generator would, with a validation split of its own."""
    monkeypatch.setattr(data, "load_rows", lambda config: (dict(rows), "sums", "test"))


def test_a_vocabulary_smaller_than_asked_for_is_said(monkeypatch, capsys):
    small(monkeypatch, {"train": sums(100), "val": sums(20, 500)})
    config = Config(tokenizer="bpe", bpe_vocab_size=8192, batch_size=4)
    tokenizer = load_data(config).tokenizer
    size = len(tokenizer.ranks) + 2  # without the table's padding, which nobody asked for
    assert size < tokenizer.vocab_size
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("tokenizer ")]
    assert f"bpe: {size} tokens, 8192 were asked for, but train has no more pairs" in line
    load_data(replace(config, bpe_vocab_size=size))
    assert "asked for" not in capsys.readouterr().out


def test_a_tokenizer_that_has_a_size_of_its_own_is_not_said_to_be_small(capsys):
    """20 relations and inverses, twice 29 symbols, two special tokens; 8192 is a bpe's size."""
    load_data(Config(dataset="relations", views="facts", tokenizer="words"))
    assert "tokenizer words: 80 tokens; train holds 34,500\n" in capsys.readouterr().out


def test_it_is_said_that_word_problems_hold_out_whole_kinds(monkeypatch, bpe, capsys):
    fewer(monkeypatch, word_problems, 100)
    config = Config(dataset="word_problems", tokenizer="bpe")
    load_data(config, bpe)
    assert HELD_OUT in capsys.readouterr().out
    monkeypatch.setattr(data, "hub_unreachable", lambda name: "no hub here")
    monkeypatch.setattr(data, "hub_rows", lambda *args, **kwargs: 1 / 0)
    load_data(replace(config, dataset="gsm8k"), bpe)  # which falls back on them
    assert HELD_OUT in capsys.readouterr().out
    small(monkeypatch, {"train": sums(40), "val": sums(9, 500)})
    load_data(config, bpe)  # by what was had, not by what was asked for
    assert HELD_OUT not in capsys.readouterr().out


def test_tokens_of_train_are_counted_and_long_examples_too(monkeypatch, bpe, capsys):
    small(monkeypatch, {"train": sums(100), "val": sums(20, 500)})
    pairs = load_data(Config(batch_size=4, block_size=40, tokenizer="bpe"), bpe).pairs
    tokens = sum(len(pairs["train"].view(i, TEXT) + pairs["train"].view(i, CODE))
                 for i in range(len(pairs["train"])))  # fmt: skip
    out = capsys.readouterr().out
    assert f"train holds {tokens:,}\n" in out
    left_out = {"train": 100 - len(pairs["train"]), "val": 20 - len(pairs["val"])}
    assert left_out["train"] > 0
    assert f"left out as longer than block_size=40: {left_out}" in out


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
    fewer(monkeypatch, word_problems, 100)
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
    """load_dataset replaced by a stand-in that notes name, config and both offline flags. What it
    gives counts as GSM8K."""
    import datasets
    from huggingface_hub import constants

    calls = []

    def load_dataset(name, config):
        flags = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
        calls.append((name, config, *flags))
        rows = [{**row, "extra": 1} for row in word_problems("val", 30)]
        return {"train": rows, "test": rows[:9]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = word_problems("val", 30)
    own = {"train": sha256_of_rows(rows), "test": sha256_of_rows(rows[:9])}
    monkeypatch.setattr(data, "GSM8K", own)
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
    assert about == ["gsm8k (train.jsonl)", "data/gsm8k"]  # for these rows are not GSM8K's
    write_jsonl(tmp_path / "mine" / "train.jsonl", rows[:3])
    write_jsonl(tmp_path / "mine" / "test.jsonl", rows[3:])
    mine = str(tmp_path / "mine")
    loaded, *about = load_rows(Config(data_dir=mine))
    assert {s: list(some) for s, some in loaded.items()} == {"train": pairs[:3], "test": pairs[3:]}
    assert about == ["mine (train.jsonl)", mine]
    assert connections == load_calls == []


def test_word_problems_ask_nobody(hub, connections, load_calls):
    about = load_rows(Config(dataset="word_problems"))[1:]
    assert about == ("word_problems", "generators/word_problems.py")
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
    assert load_rows(Config(data_dir=str(folder))) == (rows, "gsm8k (train)", str(folder))
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
    assert rows["train"] == word_problems("train", 74)
    assert (name, source) == ("word_problems", "generators/word_problems.py")
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
        data.hub_rows(data.HUB_ID, data.HUB_CONFIG, offline=True)
    assert offline_flags() == (False, False)


# --- files of pairs, and pairs that are made ---------------------------------------------------


def shown(pairs, row, tokenizer):
    return [tokenizer.decode(pairs.view(row, block)) for block in (TEXT, CODE, TARGET)]


def test_a_jsonl_file_is_a_data_set(tmp_path, capsys):
    forms = [
        lambda i: {"question": f"q{i}?", "answer": f"a{i}", "id": i},
        lambda i: {"text": f"q{i}?", "code": f"a{i}"},
        lambda i: {"messages": [{"role": "system", "content": "s"},
                                {"role": "user", "content": f"q{i}?"},
                                {"role": "assistant", "content": f"a{i}"}]},
    ]
    path = write_jsonl(tmp_path / "mine.jsonl", [forms[i % 3](i) for i in range(60)])
    config = load_config([f"--dataset={path}", "--tokenizer=bpe", "--bpe_vocab_size=320",
                          "--system_prompt=drop"])  # fmt: skip
    loaded = load_data(config)
    assert {split: len(pairs) for split, pairs in loaded.pairs.items()} == {"train": 54, "val": 6}
    found = []
    for pairs in loaded.pairs.values():
        for i in range(len(pairs)):
            text, code, target = shown(pairs, i, loaded.tokenizer)
            assert target == code
            found.append((text, code))
    assert sorted(found) == sorted((f"q{i}?", f"a{i}") for i in range(60))  # every row, once
    p = loaded.provenance
    assert (p["dataset"], p["source"], p["train_rows"], p["val_rows"]) == ("mine", str(path), 54, 6)
    assert p["train_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"data mine from {path}: train 54, val 6 pairs" in capsys.readouterr().out
    for bad in (tmp_path / "none.jsonl", "nosuch"):
        config = Config(dataset=str(bad), tokenizer="bpe")
        assert str(bad) in error_line(capsys, load_data, config)


def test_regexes_are_a_data_set_with_three_splits(monkeypatch, bpe):
    assert fewer(monkeypatch, regex_pairs, 100) == {}
    loaded = load_data(Config(dataset="regex", tokenizer="bpe"), bpe)
    assert {s: len(p) for s, p in loaded.pairs.items()} == {"train": 80, "val": 5, "test": 10}
    row = regex_pairs("train", 1)[0]
    assert shown(loaded.pairs["train"], 0, bpe) == [row["text"], row["code"], row["code"]]
    assert loaded.scoring == "regex"


# --- questions, not rows, are held out ---------------------------------------------------------


def unlike(n, start=0):
    """n rows, no two of which ask the same."""
    return [{"question": f"What is {i} and {i}?", "answer": f"{2 * i}"}
            for i in range(start, start + n)]  # fmt: skip


def asked_in(rows):
    """The questions of some rows but for case and blanks."""
    return [" ".join(row["text"].casefold().split()) for row in rows]


def split(rows, **options):
    """Train and validation rows of a file with these, and what is recorded of them."""
    write_jsonl(Path("rows.jsonl"), rows)
    rows, provenance = data.split_rows(Config(dataset="rows.jsonl", **options))
    return rows["train"][:], rows["val"][:], provenance


def test_copies_of_a_question_are_on_one_side(bpe, capsys):
    rows = [{"question": f"code of k{i}?", "answer": f"{i * 7919 % 99991}"} for i in range(120)]
    others = [{**row, "question": f" Code  of\nK{i}?"} for i, row in enumerate(rows)]
    train, val, p = split(rows + others)
    assert (len(train), len(val)) == (216, 24) and len(set(asked_in(val))) == 12
    assert not set(asked_in(train)) & set(asked_in(val))
    assert (p["kept_together_rows"], p["kept_together"]) == (240, 120)
    for _ in range(2):  # as it is made, and from tokens that are kept
        load_data(Config(dataset="rows.jsonl", tokenizer="bpe"), bpe)
        said = "kept together: 240 rows of 120 questions that occur more than once\n"
        assert said in capsys.readouterr().out


def test_without_copies_the_split_is_the_permutations():
    rows = unlike(100)
    train, val, p = split(rows)
    order = np.random.default_rng(0).permutation(100)
    asked = [" ".join(row["question"].casefold().split()) for row in rows]
    assert asked_in(val) == [asked[i] for i in order[:10]]
    assert asked_in(train) == [asked[i] for i in sorted(order[10:])]
    assert "kept_together" not in p


def test_the_system_prompt_is_no_part_of_the_question():
    rows = [{"question": f"q{i // 2}", "answer": "a", "system": f"s{i}"} for i in range(40)]
    train, val, _ = split(rows)
    assert len(val) == 4 and not set(asked_in(train)) & set(asked_in(val))


def test_what_stands_before_a_question_is_part_of_it():
    rows = [{"context": f"{i} jars.", "question": "How many?", "answer": f"{i}"} for i in range(40)]
    assert "kept_together" not in split(rows)[2]


def test_groups_are_on_one_side_round_every_corner(capsys):
    """Rows of user i and i + 1 share a question, for every even i: so four rows belong together."""
    rows = [{"question": f"q{i} {j}" if j else f"shared {i // 2}", "answer": "a", "user": i}
            for i in range(60) for j in range(2)]  # fmt: skip
    train, val, p = split(rows, group="user")
    assert len(val) == 12 and len(train) == 108
    assert not {pair["group"] for pair in train} & {pair["group"] for pair in val}
    assert not set(asked_in(train)) & set(asked_in(val))
    assert (p["kept_together_rows"], p["kept_together"]) == (120, 30)
    chain = [{"question": f"q{i // 2}", "answer": "a", "user": (i + 1) // 2} for i in range(99)]
    everything = Config(dataset="rows.jsonl", group="user")
    write_jsonl(Path("rows.jsonl"), chain)
    assert "all 99 rows of train belong together" in error_line(
        capsys, data.split_rows, everything)  # fmt: skip
    line = error_line(capsys, data.split_rows, replace(everything, group="author"))
    assert "rows.jsonl:1: no field author, which group names" in line


def test_what_is_larger_than_validation_stays_in_train_unless_all_is():
    many = [{"question": "the same", "answer": f"{i}"} for i in range(50)]
    train, val, _ = split(many + unlike(50))
    assert len(val) == 10 and asked_in(train).count("the same") == 50
    books = [{"question": f"q{i}", "answer": "a", "book": i % 5 % 4} for i in range(100)]
    train, val, _ = split(books, group="book")
    assert len(val) == 20 and len({pair["group"] for pair in val}) == 1


def test_questions_of_other_splits_that_are_in_train_are_counted(bpe, capsys):
    rows = unlike(60)
    write_jsonl(Path("mine/train.jsonl"), rows[:40])
    write_jsonl(Path("mine/val.jsonl"), [*rows[40:50], rows[0]])
    again = [{**row, "question": row["question"].upper() + " "} for row in rows[:4]]
    write_jsonl(Path("mine/test.jsonl"), rows[50:] + again)
    config = Config(dataset="mine", tokenizer="bpe")
    for _ in range(2):
        p = load_data(config, bpe).provenance
        out = capsys.readouterr().out
        assert "1 of 11 val questions are in train\n" in out
        assert "4 of 14 test questions are in train\n" in out
    assert (p["val_in_train"], p["test_in_train"], p["train_rows"]) == (1, 4, 40)
    asked = data.read_questions(Path("mine/test.jsonl"), replace(config, group="user"))
    capsys.readouterr()
    assert data.questions_seen(asked, config, "train").sum() == 4
    assert data.questions_seen(asked, replace(config, train_rows=1), "train").sum() <= 1
    assert capsys.readouterr().out == ""


def test_all_rows_are_looked_at_for_their_system_prompt(bpe, capsys):
    rows = [{**row, "system": "Add."} for row in unlike(1300)]
    assert split(rows)[2]["system"] == "Add."
    _, _, p = split([*rows[:-1], {**rows[-1], "system": "Take."}])
    assert "system" not in p and p["systems"] == "2"
    load_data(Config(dataset="rows.jsonl", tokenizer="bpe"), bpe)
    assert "system prompts: 2 different ones in train;" in capsys.readouterr().out
    p = split([{**row, "system": f"s{i}"} for i, row in enumerate(unlike(1300))])[2]
    assert p["systems"] == "1000 or more"


def test_system_prompts_without_a_place_are_said_to_be_left_out(bpe, capsys):
    write_jsonl(Path("rows.jsonl"), [{**row, "system": "Add."} for row in unlike(60)])
    for option, times in (({"layout": "isolated"}, 2), ({"views": "split"}, 1)):
        [(key, value)] = option.items()
        for _ in range(times):  # the second time from tokens that are kept
            config = Config(dataset="rows.jsonl", tokenizer="bpe", block_size=64, batch_size=4)
            found = load_data(replace(config, **option), bpe)
            said = f"system prompts are left out: {key}={value} has no place for them\n"
            assert capsys.readouterr().out.count(said) == 1
            assert "system" not in found.provenance and "systems" not in found.provenance


def test_an_answer_that_is_empty_as_final_is_none_in_memory_too(monkeypatch, bpe, capsys):
    rows = unlike(40)
    rows[7]["answer"] = "I do not know.\n####"
    small(monkeypatch, {"train": rows, "val": unlike(9, 500)})
    config = Config(answer_view="final", tokenizer="bpe")
    line = error_line(capsys, load_data, config, bpe)
    assert "test, train, row 8: answer_view=final" in line
    assert len(load_data(replace(config, bad_lines="skip"), bpe).pairs["train"]) == 39
    assert "test, train: left out 1 bad lines, kept 39\n" in capsys.readouterr().out


# --- names, folders, the hub -------------------------------------------------------------------


def test_only_gsm8k_is_called_gsm8k(bpe, capsys, monkeypatch):
    rows = unlike(40)
    for name in ("gsm8k.jsonl", "Regex.jsonl", "word_problems/train.jsonl", "mine/train.jsonl"):
        write_jsonl(Path(name), rows)
    names = {"gsm8k.jsonl": "gsm8k.jsonl", "Regex.jsonl": "Regex.jsonl", "mine": "mine",
             "./word_problems": "word_problems (train.jsonl)", "mine/train.jsonl": "train"}
    for dataset, name in names.items():
        assert load_rows(Config(dataset=dataset))[1] == name
    mine = Config(data_dir="mine", tokenizer="bpe")
    for _ in range(2):
        assert load_data(mine, bpe).provenance["dataset"] == "mine (train.jsonl)"
        assert "not GSM8K: mine holds other rows" in capsys.readouterr().out
    monkeypatch.setattr(data, "GSM8K", {"train": sha256_of_rows(rows), "test": "another"})
    assert {load_rows(Config(dataset=dataset))[1] for dataset in names} == {"gsm8k"}
    load_data(mine, bpe)
    write_jsonl(Path("mine/test.jsonl"), unlike(5, 100))  # which is not GSM8K's
    assert load_rows(mine)[1] == "mine (train.jsonl)"


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_a_folder_with_its_splits_is_a_data_set(ending, bpe, connections, capsys):
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    rows = {"train": unlike(40), "validation": unlike(9, 100), "test": unlike(7, 200)}
    Path("mine").mkdir()
    for name, some in rows.items():
        path = Path(f"mine/{name}.{ending}")
        if ending == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path)
        elif ending == "csv":
            pyarrow.csv.write_csv(pyarrow.Table.from_pylist(some), path)
        else:
            text = "".join(json.dumps(row) + "\n" for row in some).encode()
            path.write_bytes(gzip.compress(text) if ending == "jsonl.gz" else text)
    loaded = load_data(Config(dataset="mine", tokenizer="bpe", block_size=128), bpe)
    assert {s: len(p) for s, p in loaded.pairs.items()} == {"train": 40, "val": 9, "test": 7}
    p = loaded.provenance
    assert (p["dataset"], p["source"]) == ("mine", "mine")
    assert p["test_sha256"] == sha256_of_rows(rows["test"])
    assert connections == []
    Path(f"mine/train.{ending}").unlink()
    assert "holds no train.jsonl" in error_line(capsys, load_rows, Config(dataset="mine"))


def test_files_of_a_folder_that_are_no_split_are_named(bpe, capsys):
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "val.csv", "train.csv"):
        write_jsonl(Path("mine") / name, unlike(40))
    Path("mine/val.csv").write_text("question,answer\n" + "".join(f"q{i},a\n" for i in range(9)))
    config = Config(dataset="mine", tokenizer="bpe")
    for one, said in ((config, True), (replace(config, dataset="mine/dev.jsonl"), False)):
        load_data(one, bpe)
        assert ("files not used: dev.jsonl, train.csv\n" in capsys.readouterr().out) is said
        assert said or "not used" not in capsys.readouterr().out


def test_a_file_of_another_kind_is_no_data_set_of_the_hub(connections, capsys):
    write_jsonl(Path("mine/rows.tsv"), unlike(40))
    line = error_line(capsys, load_rows, Config(dataset="mine/rows.tsv"))
    assert "a file of no kind that is read: .jsonl, " in line and connections == []


def test_a_data_set_on_the_hub(hub, monkeypatch, capsys):
    import datasets

    calls, asked = [], hub()
    splits = {"train": unlike(40), "validation": unlike(9, 100), "extra": unlike(5),
              "mine": unlike(30)}  # fmt: skip

    def load_dataset(name, configuration):
        calls.append((name, configuration))
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, *about = load_rows(Config(dataset="some/sums"))
    assert rows == {"train": splits["train"], "val": splits["validation"]}
    assert about == ["some/sums", "hub some/sums"]
    assert "splits not used: extra, mine" in capsys.readouterr().out
    rows = load_rows(Config(dataset="some/sums:small:mine"))[0]
    assert rows["train"] == splits["mine"]
    load_rows(Config(dataset="openai/gsm8k"))
    assert calls == [("some/sums", None), ("some/sums", "small"), ("openai/gsm8k", "main")]
    assert asked[0] == "/api/datasets/some/sums"
    line = error_line(capsys, load_rows, Config(dataset="some/sums::nosuch"))
    assert "no split nosuch but train, validation, extra, mine" in line


def test_a_hub_that_is_out_of_reach_is_one_line(hub, capsys):
    line = error_line(capsys, load_rows, Config(dataset="some/sums"))
    assert "dataset=some/sums: the hub gave none" in line and "owner/name:configuration" in line


def test_a_row_of_the_hub_that_is_no_pair_is_named(hub, load_calls, capsys):
    config = Config(dataset="some/sums", fields="question:extra")
    line = error_line(capsys, data.split_rows, config)
    assert "hub some/sums, train, row 1: extra is 1, which is no text" in line


@pytest.mark.parametrize("options, said", [
    (["--fields=q"], "fields=q must name"), (["--fields=q:a:b"], "must name"),
    (["--fields=q+:a"], "must name"), (["--fields=:a"], "must name"),
    (["--dataset=regex", "--fields=q:a"], "fields=q:a goes with rows of your own, not regex"),
    (["--dataset=a.txt", "--views=split", "--group=user"], "group=user goes with rows of your own"),
])  # fmt: skip
def test_fields_and_groups_that_make_no_sense_are_refused(options, said, capsys):
    assert said in error_line(capsys, load_config, options)


def test_a_data_set_that_moved_is_found_where_it_is_now():
    for dataset, moved in {"a/b.csv": "there/b.csv", "a/b.jsonl.gz": "there/b.jsonl.gz",
                           "a/b": "there", "regex": "regex", "gsm8k": "gsm8k"}.items():  # fmt: skip
        assert relocated(Config(dataset=dataset), "there").dataset == moved
        assert relocated(Config(dataset=dataset), "").dataset == dataset
    renamed = str(write_jsonl(Path("there/c.jsonl"), unlike(1)))
    assert relocated(Config(dataset="a/b.jsonl"), renamed).dataset == renamed


def test_what_is_made_here_is_named_once():
    assert tuple(data.GENERATORS) == MADE_HERE


# --- how answers are scored -------------------------------------------------------------------

DATES = [{"question": f"Day {i}?", "answer": f"Count.\n#### 2021-05-{i % 28 + 1}"}
         for i in range(60)]  # fmt: skip


@pytest.mark.parametrize("rows, options, scoring", [
    (sums(60), {}, "number"),
    (sums(60), {"answer_view": "final"}, "final"),
    (sums(60), {"views": "steps"}, "number"),
    (sums(60), {"score": "string"}, "string"),
    (DATES, {}, "string"),
    (DATES, {"answer_view": "final"}, "string"),
    # Not all of them, more than may be held out.
    ([*sums(53), *({"question": f"Sure {i}?", "answer": "#### yes"} for i in range(7))], {},
     "string"),
])  # fmt: skip
def test_what_trains_answers_are_decides_how_they_are_scored(rows, options, scoring, bpe, capsys):
    """And no name: neither a file's, nor that of the folder whose data is said to be GSM8K."""
    for name in ("gsm8k.jsonl", "word_problems.jsonl", "regex.jsonl", "mine.jsonl"):
        write_jsonl(Path(name), rows)
        config = Config(dataset=name, tokenizer="bpe", batch_size=4, **options)
        for _ in range(2):  # the second time from the tokens that are kept
            found = load_data(config, bpe)
            assert found.scoring == found.provenance["scoring"] == scoring
            assert f"answers are scored as {scoring}" in capsys.readouterr().out
    write_jsonl(Path("folder/train.jsonl"), rows)
    config = Config(data_dir="folder", tokenizer="bpe", batch_size=4, **options)
    assert load_data(config, bpe).scoring == scoring


def test_the_field_decides_over_tokens_that_are_kept(bpe, capsys):
    write_jsonl(Path("mine.jsonl"), sums(60))
    config = Config(dataset="mine.jsonl", tokenizer="bpe", batch_size=4)
    found = [load_data(replace(config, score=score), bpe).scoring
             for score in ("auto", "string", "auto", "regex", "number")]  # fmt: skip
    assert found == ["number", "string", "number", "regex", "number"]
    write_jsonl(Path("dates.jsonl"), DATES)
    config = replace(config, dataset="dates.jsonl", score="number")
    line = error_line(capsys, load_data, config, bpe)
    assert "score=number" in line and "none of 54 answers of train" in line
    write_jsonl(Path("half.jsonl"), [*DATES[:30], *sums(30)])
    load_data(replace(config, dataset="half.jsonl"), bpe)
    assert "of 54 answers of train hold none, and are never right" in capsys.readouterr().out


def test_what_decided_the_scoring_is_told_as_it_is(bpe, capsys):
    write_jsonl(Path("plain.jsonl"), unlike(60))  # whose answers are numbers, without a ####
    config = Config(dataset="plain.jsonl", tokenizer="bpe", batch_size=4)
    load_data(config, bpe)
    assert "as string: a number follows the #### of 0 of 54 answers" in capsys.readouterr().out
    load_data(replace(config, answer_view="final"), bpe)
    assert "as final: a number is all of 54 of 54 answers of train" in capsys.readouterr().out


def test_the_generators_are_scored_as_ever(monkeypatch, bpe):
    for generator, name, scoring in ((word_problems, "word_problems", "number"),
                                     (regex_pairs, "regex_depth", "regex")):  # fmt: skip
        fewer(monkeypatch, generator, 100)
        assert load_data(Config(dataset=name, tokenizer="bpe"), bpe).scoring == scoring
