"""Tokens from the disk are those that the files give."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import sums

import data
import token_cache
from config import Config
from data import in_chunks, load_data


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(row) + "\n" for row in sums(60)]
    (tmp_path / "sums.jsonl").write_text("".join(rows))
    return Config(dataset="sums.jsonl", tokenizer="bpe", bpe_vocab_size=300, batch_size=4,
                  views="steps", step_pair="random", block_size=64)  # fmt: skip


def folders():
    return sorted(path.name for path in (data.Path("out/tokens")).iterdir())


def assert_same(a, b):
    assert (a.provenance, a.answers, a.tokenizer.sha256) == (
        b.provenance, b.answers, b.tokenizer.sha256)  # fmt: skip
    assert a.pairs.keys() == b.pairs.keys()
    for split, pairs in a.pairs.items():
        for name in token_cache.Columns._fields:
            ours, theirs = getattr(pairs, name), getattr(b.pairs[split], name)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name


def in_memory(config, monkeypatch):
    """What load_data gives when it takes the file for something else."""
    with monkeypatch.context() as patched:
        rows = data.load_rows(config)
        patched.setattr(data, "jsonl_files", lambda config: {})
        patched.setattr(data, "load_rows", lambda config: rows)
        return load_data(config)


@pytest.mark.parametrize("size", [1, 7, 54, 1000])
def test_in_chunks_as_all_at_once_and_again_without_the_file(config, size, monkeypatch):
    monkeypatch.setattr(data, "in_chunks", lambda rows: in_chunks(rows, size))
    first = load_data(config)
    assert_same(first, in_memory(config, monkeypatch))
    monkeypatch.setattr(data, "load_rows", lambda config: 1 / 0)
    again = load_data(config)
    assert_same(first, again)
    assert not again.pairs["train"].tokens.flags.owndata  # the file, not a copy
    assert len(folders()) == 1


def test_another_file_or_config_is_tokenized_anew(config, monkeypatch):
    load_data(config)
    others = dict(bpe_vocab_size=290, labels="all", views="pairs", step_pair="first",
                  train_rows=20, seed=1, bad_lines="skip", answer_view="final")  # fmt: skip
    for n, (key, value) in enumerate(others.items(), 2):
        other = replace(config, **{key: value})
        assert_same(load_data(other), in_memory(other, monkeypatch))
        assert len(folders()) == n, key
    more = json.dumps(sums(61)[-1]) + "\n"
    with open("sums.jsonl", "a") as file:
        file.write(more)
    assert_same(load_data(config), in_memory(config, monkeypatch))
    assert len(folders()) == n + 1


def test_what_tokens_do_not_depend_on_takes_the_same(config):
    config = replace(config, step_pair="first")
    load_data(config)
    few = load_data(replace(config, seed=2, block_size=32, n_layer=1)).pairs["train"]
    assert len(folders()) == 1
    assert 0 < len(few) < 54 and few.lengths.sum(1).max() <= 32 * 3


def test_the_checkpoints_tokenizer_is_taken(config):
    bpe = load_data(replace(config, dataset="word_problems", block_size=512)).tokenizer
    assert load_data(config).tokenizer.sha256 != bpe.sha256
    loaded = load_data(config, bpe)
    assert loaded.tokenizer.sha256 == bpe.sha256 == loaded.provenance["tokenizer_sha256"]
    question = loaded.pairs["train"].prompt(0)
    assert bpe.decode(question) in {row["question"] for row in sums(60)}
    assert len(folders()) == 2


def test_of_two_writers_one_wins_and_nothing_is_left_behind(config, monkeypatch):
    first, ours = load_data(config), folders()
    (folder,) = [data.Path("out/tokens") / name for name in ours]
    provenance, tokenizer, columns = token_cache.read(folder, None)
    token_cache.write(folder, provenance, tokenizer, {s: [c] for s, c in columns.items()})
    assert folders() == ours
    assert_same(first, load_data(config))


def test_a_missing_file_is_one_line(config, capsys):
    with pytest.raises(SystemExit):
        load_data(replace(config, dataset="none.jsonl"))
    assert "cannot read none.jsonl" in capsys.readouterr().err
