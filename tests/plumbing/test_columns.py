"""Claims about plumbing/columns.py: tokens from the disk are those that the files give."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import error_line, sums

import data
from config import CHOICES, Config
from data import in_chunks, load_data
from plumbing import columns as token_columns
from plumbing.columns import FIELDS, fields_of


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(row) + "\n" for row in sums(60)]
    (tmp_path / "sums.jsonl").write_text("".join(rows))
    return Config(dataset="sums.jsonl", tokenizer="bpe", bpe_vocab_size=300, batch_size=4,
                  views="steps_random", block_size=64)  # fmt: skip


def folders():
    return sorted(path.name for path in (data.Path("out/tokens")).iterdir())


def assert_same(a, b):
    assert (a.provenance, a.scoring, a.tokenizer.sha256) == (
        b.provenance, b.scoring, b.tokenizer.sha256)  # fmt: skip
    assert a.pairs.keys() == b.pairs.keys()
    for split, pairs in a.pairs.items():
        for name in token_columns.Columns._fields:
            ours, theirs = getattr(pairs, name), getattr(b.pairs[split], name)
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), name


def in_memory(config, monkeypatch, tokenizer=None):
    """What load_data gives when it takes the file for something else."""
    with monkeypatch.context() as patched:
        rows = data.load_rows(config)
        patched.setattr(data, "jsonl_files", lambda config: {})
        patched.setattr(data, "load_rows", lambda config: rows)
        return load_data(config, tokenizer)


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
    others = dict(bpe_vocab_size=290, labels="all", views="pairs", train_rows=20,
                  bad_lines="skip", answer_view="final")  # fmt: skip
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
    config = replace(config, views="steps")
    load_data(config)
    few = load_data(replace(config, seed=2, block_size=32, n_layer=1)).pairs["train"]
    assert len(folders()) == 1
    assert 0 < len(few) < 54 and few.lengths.sum(1).max() <= 32 * 3


def test_the_checkpoints_tokenizer_is_taken(config):
    bpe = data.train_tokenizer(["What is 3 plus 5?"] * 9, 270)
    assert load_data(config).tokenizer.sha256 != bpe.sha256
    loaded = load_data(config, bpe)
    assert loaded.tokenizer.sha256 == bpe.sha256 == loaded.provenance["tokenizer_sha256"]
    question = loaded.pairs["train"].prompt(0)
    assert bpe.decode(question) in {row["question"] for row in sums(60)}
    assert len(folders()) == 2


def test_of_two_writers_one_wins_and_nothing_is_left_behind(config, monkeypatch):
    first, ours = load_data(config), folders()
    (folder,) = [data.Path("out/tokens") / name for name in ours]
    provenance, tokenizer, columns = token_columns.read(folder, None)
    token_columns.write(folder, provenance, tokenizer, {s: [c] for s, c in columns.items()})
    assert folders() == ours
    assert_same(first, load_data(config))


def test_a_missing_file_is_one_line(config, capsys):
    line = error_line(capsys, load_data, replace(config, dataset="none.jsonl"))
    assert "cannot read none.jsonl" in line


# --- what they depend on ----------------------------------------------------------------------

KEPT = [("pairs", layout) for layout in CHOICES["layout"]] + [("steps", "tree"),
                                                               ("steps_random", "tree")]


@pytest.fixture(scope="module")
def bpe():
    return data.train_tokenizer([row["answer"] for row in sums(30)], 300)


@pytest.mark.parametrize("views, layout", KEPT)
def test_a_field_that_tokens_are_not_made_from_cannot_be_read(views, layout):
    config = Config(views=views, layout=layout, seed=3)
    kept = fields_of(config)
    for field in fields(Config):
        if field.name in FIELDS:
            assert getattr(kept, field.name) == getattr(config, field.name)
        else:
            with pytest.raises(AttributeError, match=field.name):
                getattr(kept, field.name)


@pytest.mark.parametrize("views, layout", KEPT)
@pytest.mark.parametrize("options", [
    {}, {"system_prompt": "drop", "labels": "all", "train_rows": 9, "answer_view": "final"},
], ids=["usual", "others"])  # fmt: skip
def test_all_that_can_be_kept_is_made_from_those_fields(
    views, layout, options, bpe, tmp_path, monkeypatch
):
    """Whoever makes tokens sees the part of the config that names their folder, and no more."""
    monkeypatch.chdir(tmp_path)
    roles = ("system", "user", "assistant")
    chats = [{"messages": [{"role": role, "content": text} for role, text in zip(
        roles, ("Add.", row["question"], row["answer"]))]} for row in sums(60)]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    config = Config(dataset="chats.jsonl", tokenizer="bpe", views=views, layout=layout,
                    batch_size=4, **options)  # fmt: skip
    seen, real = [], data.columns_of
    monkeypatch.setattr(data, "columns_of", lambda rows, tokenizer, config, first: (
        seen.append(config), real(rows, tokenizer, config, first))[1])  # fmt: skip
    first = load_data(config, bpe)
    assert len(folders()) == 1 and seen == [fields_of(config)] * 2  # train and val
    monkeypatch.setattr(data, "columns_of", real)
    assert_same(first, in_memory(config, monkeypatch, bpe))


# --- are they what was written? ---------------------------------------------------------------


def test_a_damaged_folder_is_made_anew(config, monkeypatch, capsys):
    """A changed byte anywhere, a file that is shorter or gone: never another text's tokens."""
    first = load_data(config)
    [name] = folders()
    folder = data.Path("out/tokens") / name
    assert token_columns.is_sound(folder) and "damaged" not in capsys.readouterr().out
    for file in sorted(path.name for path in folder.iterdir()):
        for damage in ("changed", "shorter", "gone"):
            content = bytearray((folder / file).read_bytes())
            if not content:
                continue
            content[len(content) // 2] ^= 1
            if damage == "gone":
                (folder / file).unlink()
            else:
                (folder / file).write_bytes(content if damage == "changed" else content[:-1])
            assert_same(first, load_data(config))
            said = capsys.readouterr().out
            assert (f"{folder} is damaged" in said) == (file != "checked.json"), (file, damage)
    assert folders() == [name]


def test_two_runs_may_find_the_same_damage_at_once(config, monkeypatch):
    """As the cells of a sweep do: what one has just removed ends none of the others."""
    first, [folder] = load_data(config), data.Path("out/tokens").iterdir()
    (folder / "train.tokens").touch()
    real = token_columns.sha256_of

    def sha256_of(path):
        if path.name != "train.tokens":
            return real(path)
        token_columns.remove_folder(folder)  # the other run is a moment ahead
        return "another"

    monkeypatch.setattr(token_columns, "sha256_of", sha256_of)
    assert_same(first, load_data(config))
    assert folders() == [folder.name]


def test_files_are_hashed_once_per_size_and_time(config, monkeypatch):
    hashed, real = [], token_columns.sha256_of
    monkeypatch.setattr(token_columns, "sha256_of", lambda path: (
        hashed.append(path.name), real(path))[1])  # fmt: skip
    load_data(config)
    hashed.clear()
    load_data(config)
    sources = {name.split("/")[-1] for name in token_columns.SOURCES}
    assert not set(hashed) - sources - {"sums.jsonl"}
    [folder] = data.Path("out/tokens").iterdir()
    (folder / "train.tokens").touch()
    for times in (1, 0):
        hashed.clear()
        load_data(config)
        assert hashed.count("train.tokens") == times and "val.tokens" not in hashed
