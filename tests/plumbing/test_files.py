"""What is written is whole or not there; what is read is sound or one line."""

import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import random
import signal
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import error_line

from plumbing import files
from plumbing.files import (
    append_lines,
    claim_run,
    open_log,
    owner_of,
    read_checkpoint,
    read_records,
    set_aside,
    sha256_of,
    silence,
    write_checkpoint,
    write_figure,
    write_folder,
    write_json,
    write_lines,
    write_text,
    write_whole,
)
from plumbing.processes import run_main

FORM = "nanoJEPA 2"


def bytes_of(path):
    """Every file below a folder (or a file) and its content, to tell whether anything changed."""
    found = path.rglob("*") if path.is_dir() else [path]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in found if f.is_file()}


@pytest.fixture
def ckpt(tmp_path):
    """A sound checkpoint file, with parts of every kind."""
    path = tmp_path / "out" / "some" / "ckpt.pt"
    weights = {"a.weight": torch.randn(60, 40), "b.bias": torch.randn(40), "c": torch.arange(9)}
    write_checkpoint(path, {"format": FORM, "config": {"n_layer": 2, "recipe": "some"},
                            "model": weights, "step": 3})  # fmt: skip
    return path


# --- whole or not at all ----------------------------------------------------------------------


def test_json_has_null_for_what_is_no_number(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1.5, math.nan], "b": {"c": math.inf, "d": "NaN"}})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1.5, None], "b": {"c": None, "d": "NaN"}}
    assert "Infinity" not in text


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_write_that_dies_half_way_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "notes"
    write_text(path, "old\n")

    def dies(file):
        file.write(b"new, but")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_whole(path, dies)
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new\n")
    assert path.read_text() == "new\n" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A rename can reach the disk before the content does, and then a power cut empties the file.
    """  # fmt: skip
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda number: (events.append("fsync"), fsync(number)))
    monkeypatch.setattr(files.os, "replace", lambda *a: (events.append("replace"), replace(*a)))
    write_text(tmp_path / "notes", "text")
    assert events == ["fsync", "replace"]


def test_two_writers_at_once_use_names_of_their_own(tmp_path):
    """The second one begins and ends while the first is at it: neither gets a half of the other."""
    path, seen = tmp_path / "notes", []

    def first(file):
        file.write(b"first, ")
        file.flush()
        write_whole(path, second)
        assert path.read_text() == "second"
        file.write(b"later")

    def second(file):
        seen.extend(sorted(tmp_path.iterdir()))
        file.write(b"second")

    write_whole(path, first)
    assert len(seen) == 2 and path not in seen
    assert path.read_text() == "first, later" and list(tmp_path.iterdir()) == [path]


def test_many_writers_leave_one_whole_file(tmp_path):
    path, texts = tmp_path / "notes", [str(i) * 50_000 for i in range(4)]
    threads = [threading.Thread(target=write_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask, rights", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_rights_of_a_file_follow_the_umask(umask, rights, tmp_path):
    """mkstemp alone would keep everyone else from reading a checkpoint."""
    before = os.umask(umask)
    try:
        write_text(tmp_path / "notes", "text")
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert (tmp_path / "notes").stat().st_mode & 0o777 == rights


def test_each_kind_of_file_can_be_read_again(tmp_path):
    folder = tmp_path / "made" / "on the way"
    write_text(folder / "a.txt", "é\n")
    assert (folder / "a.txt").read_bytes() == "é\n".encode()
    write_json(folder / "a.json", {"a": [1, None]})
    assert json.loads((folder / "a.json").read_text()) == {"a": [1, None]}
    records = [{"step": 1, "ce": 0.1}, {"step": 2}]
    write_lines(folder / "a.jsonl", iter(records))
    assert read_records(folder / "a.jsonl") == records
    write_checkpoint(folder / "a.pt", {"format": FORM, "w": torch.ones(3)})
    assert torch.equal(read_checkpoint(folder / "a.pt", FORM)["w"], torch.ones(3))
    figure = SimpleNamespace(
        savefig=lambda file, dpi, format: file.write(f"{format}{dpi}".encode()))  # fmt: skip
    write_figure(folder / "a.png", figure, dpi=90)
    assert (folder / "a.png").read_bytes() == b"png90"


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_save_that_dies_half_way_leaves_the_old_checkpoint(error, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    write_checkpoint(path, {"format": FORM, "weights": torch.ones(1000)})
    before, save = path.read_bytes(), torch.save

    def dies(state, file):
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        raise error

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(type(error)):
        write_checkpoint(path, {"format": FORM, "weights": torch.zeros(1000)})
    monkeypatch.setattr(torch, "save", save)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert torch.equal(read_checkpoint(path, FORM)["weights"], torch.ones(1000))
    # ... and the dead one does not hinder the next
    write_checkpoint(path, {"format": FORM, "weights": torch.zeros(1000)})
    assert torch.equal(read_checkpoint(path, FORM)["weights"], torch.zeros(1000))


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def dies(state, file):
        try:
            raise OSError("No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch does

    monkeypatch.setattr(torch, "save", dies)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def save(argv):
        write_checkpoint(tmp_path / "ckpt.pt", {})

    line = error_line(capsys, run_main, save)
    assert "ckpt.pt could not be saved: No space left on device" in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_rewrite_that_dies_leaves_the_old_records(error, tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1}, {"step": 2}]
    write_lines(path, records)

    def dies():
        yield records[0]
        raise error

    with pytest.raises(type(error)):
        write_lines(path, dies())
    assert read_records(path) == records and list(tmp_path.iterdir()) == [path]
    write_lines(path, records[:1])
    assert read_records(path) == records[:1]


def test_a_folder_appears_whole(tmp_path):
    folder = tmp_path / "tokens" / "abc"
    with write_folder(folder) as append:
        append("one", b"1")
        append("two", b"2")
        append("one", b"11")
        assert not folder.exists()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"one": b"111", "two": b"2"}
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), ValueError("bad")])
def test_a_folder_that_dies_half_way_is_not_there(error, tmp_path):
    folder = tmp_path / "tokens" / "abc"
    with pytest.raises(type(error)), write_folder(folder) as append:
        append("one", b"1")
        raise error
    assert list(folder.parent.iterdir()) == []


def test_of_two_that_write_a_folder_the_first_one_stays(tmp_path):
    folder = tmp_path / "abc"
    with write_folder(folder) as append:
        append("one", b"late")
        with write_folder(folder) as append_too:
            append_too("one", b"early")
    assert (folder / "one").read_bytes() == b"early" and list(tmp_path.iterdir()) == [folder]


# --- line by line -----------------------------------------------------------------------------


def test_metrics_lose_only_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    append_lines(path, [{"step": 0, "ce": 5.5}])
    append_lines(path, [{"step": 1, "ce": 4.5}, {"step": 2, "ce": 3.5}])
    whole = path.read_bytes()
    assert [r["step"] for r in read_records(path)] == [0, 1, 2]
    path.write_bytes(whole[:-7])
    assert read_records(path) == [{"step": 0, "ce": 5.5}, {"step": 1, "ce": 4.5}]
    path.write_bytes(whole.replace(b"5.5", b"5.\xb5"))  # a damaged byte, which is not UTF-8
    assert [r["step"] for r in read_records(path)] == [1, 2]


def test_a_log_is_begun_anew_or_gone_on_with(tmp_path):
    path = tmp_path / "study" / "log"
    for more, then in ((False, b"a"), (True, b"aa"), (False, b"a")):
        with open_log(path, more) as file:
            file.write(b"a")
        assert path.read_bytes() == then


def test_silence_swallows_everything():
    with silence() as file:
        print("nobody reads this", file=file)
        assert file.name == os.devnull


# --- files that are no sound checkpoint -------------------------------------------------------


def test_a_flipped_byte_in_the_weights_is_found(ckpt, capsys):
    """torch.load alone would load it silently."""
    content = bytearray(ckpt.read_bytes())
    weights = read_checkpoint(ckpt, FORM)["model"]["a.weight"].numpy().tobytes()
    content[content.index(weights) + len(weights) // 2] ^= 0x10
    ckpt.write_bytes(content)
    torch.load(ckpt, weights_only=True)
    before = bytes_of(ckpt)
    line = error_line(capsys, read_checkpoint, ckpt, FORM)
    assert str(ckpt) in line and "damaged" in line
    assert bytes_of(ckpt) == before


def test_a_flipped_byte_anywhere_is_found_or_harmless(ckpt, capsys):
    sound, content = read_checkpoint(ckpt, FORM), ckpt.read_bytes()
    pick = random.Random(0)
    found = 0
    for at in [*pick.sample(range(len(content)), 60), *range(len(content) - 60, len(content), 4)]:
        ckpt.write_bytes(content[:at] + bytes([content[at] ^ 1 << pick.randrange(8)])
                         + content[at + 1 :])  # fmt: skip
        try:
            loaded = read_checkpoint(ckpt, FORM)
        except SystemExit:
            found += 1
            assert len(capsys.readouterr().err.splitlines()) == 1
            continue
        assert loaded.keys() == sound.keys()
        assert all(loaded[key] == sound[key] for key in sound if key != "model")
        assert loaded["model"].keys() == sound["model"].keys()
        assert all(torch.equal(w, sound["model"][name]) for name, w in loaded["model"].items())
    assert found > 30


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_one_line(share, ckpt, capsys):
    content = ckpt.read_bytes()
    ckpt.write_bytes(content[: int(share * len(content))])
    before = bytes_of(ckpt)
    line = error_line(capsys, read_checkpoint, ckpt, FORM)
    assert f"{ckpt} is not a readable checkpoint" in line
    assert bytes_of(ckpt) == before


class MakesFolder:
    """Unpickling it makes a folder: the harmless stand-in for what a stranger's file may do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def make_foreign(kind, path):
    evil = MakesFolder(path.parent / "evil")
    if kind == "text":
        path.write_text("not a checkpoint\n")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello.txt", "hello")
    elif kind == "zip with data.pkl":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(evil, protocol=2))
            archive.writestr("archive/version", "3")
    elif kind == "dict":
        torch.save({"model": {}, "step": 3}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(evil))
    elif kind == "code":
        torch.save({"format": FORM, "model": evil}, path)
    elif kind == "old torch format":
        torch.save({"model": evil}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("kind", [
    "text", "zip", "zip with data.pkl", "dict", "list", "pickle", "code", "old torch format",
])  # fmt: skip
def test_a_foreign_file_is_one_line_and_runs_no_code(kind, tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    make_foreign(kind, path)
    before = bytes_of(tmp_path)
    assert str(path) in error_line(capsys, read_checkpoint, path, FORM)
    assert not (tmp_path / "evil").exists()
    assert bytes_of(tmp_path) == before


def test_a_checkpoint_of_an_earlier_version_says_so(tmp_path, capsys):
    write_checkpoint(tmp_path / "ckpt.pt", {"format": "nanoJEPA 1", "model": {}, "step": 3})
    line = error_line(capsys, read_checkpoint, tmp_path / "ckpt.pt", FORM)
    assert f"{tmp_path}/ckpt.pt was not written by this version of train.py" in line
    assert "nanoJEPA 1" in line and "nanoJEPA 2" in line and "train again" in line


def test_a_missing_checkpoint_says_how_to_get_one(tmp_path, capsys):
    line = error_line(capsys, read_checkpoint, tmp_path / "none", FORM)
    assert f"no checkpoint {tmp_path}/none" in line and "train.py" in line


# --- digests, and out of the way --------------------------------------------------------------


def test_the_digest_is_that_of_the_whole_file(tmp_path, capsys):
    content = random.Random(0).randbytes((1 << 20) + 5)  # more than is read at a time
    (tmp_path / "data").write_bytes(content)
    assert sha256_of(tmp_path / "data") == hashlib.sha256(content).hexdigest()
    assert f"cannot read {tmp_path}/none: No such file" in error_line(
        capsys, sha256_of, tmp_path / "none")


def test_what_is_set_aside_overwrites_nothing(tmp_path):
    """Runs and single files; a dot in a folder's name begins no ending."""
    for number in (1, 2):
        for name in ("jepa_weight=0.5", "answers.jsonl"):
            path = tmp_path / name
            if "." in name and name.endswith("jsonl"):
                path.write_text(f"{number}")
            else:
                path.mkdir()
                (path / "ckpt.pt").write_text(f"{number}")
            aside = set_aside(path)
            assert not path.exists()
            stem, ending = ("answers", ".jsonl") if path.suffix == ".jsonl" else (name, "")
            assert aside == tmp_path / "earlier" / f"{stem}-{number}{ending}"
    earlier = tmp_path / "earlier"
    assert [(earlier / f"answers-{n}.jsonl").read_text() for n in (1, 2)] == ["1", "2"]
    assert [(earlier / f"jepa_weight=0.5-{n}/ckpt.pt").read_text() for n in (1, 2)] == ["1", "2"]


# --- whose folder it is -----------------------------------------------------------------------


@pytest.fixture
def other_process():
    """A function that has another process do something and then stay; it gives its number."""
    children = []

    def stays(work):
        read, write = os.pipe()
        children.append(os.fork())
        if not children[-1]:
            work()
            os.write(write, b"!")
            time.sleep(60)
            os._exit(0)
        assert os.read(read, 1) == b"!"
        return children[-1]

    yield stays
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    children.clear()


def test_a_folder_has_one_owner_until_it_is_killed(other_process, tmp_path, capsys):
    folder = tmp_path / "out" / "run"
    assert owner_of(folder) == ""
    child = other_process(lambda: claim_run(folder))
    before = bytes_of(folder)
    line = error_line(capsys, claim_run, folder)
    assert f"{folder} belongs to process {child}" in line and f"kill {child}" in line
    assert owner_of(folder) == str(child) and bytes_of(folder) == before
    os.kill(child, signal.SIGKILL)
    for _ in range(100):
        if not owner_of(folder):
            break
        time.sleep(0.02)
    claim_run(folder)
    claim_run(folder)  # its own already
    assert owner_of(folder) == "" and (folder / ".lock").read_text() == str(os.getpid())


def test_a_folder_that_was_moved_is_owned_anew(tmp_path):
    folder = tmp_path / "run"
    claim_run(folder)
    set_aside(folder)
    claim_run(folder)
    assert (folder / ".lock").read_text() == str(os.getpid())
    with pytest.raises(BlockingIOError):
        files.try_lock(folder / ".lock")


def test_half_a_checkpoint_that_a_kill_left_is_removed(tmp_path):
    for name in (".ckpt.pt.x7.tmp", ".best.pt.x8.tmp", ".accuracy.json.x9.tmp", "ckpt.pt.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text(OURS)
    claim_run(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}  # evaluate.py may be writing the third now
    assert left == {"config.json", ".lock", ".accuracy.json.x9.tmp", "ckpt.pt.tmp"}


def test_without_locks_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "fcntl", None)
    claim_run(tmp_path / "run")
    claim_run(tmp_path / "run")
    assert capsys.readouterr().out.count("nothing keeps a second run out of") == 1
    with write_folder(tmp_path / "made") as append:
        append("one", b"1")
    assert (tmp_path / "made" / "one").exists()


OURS = json.dumps({"config": {}, "provenance": {}})


@pytest.mark.parametrize("content, ours", [
    ({}, True), ({".lock": "7", "log.txt": ""}, True), ({".config.json.x7.tmp": "{"}, True),
    ({"config.json": OURS}, True), ({"metrics.jsonl": ""}, False), ({"ckpt.pt": ""}, False),
    ({"config.json": '{"model_type": "gpt2"}'}, False), ({"config.json": "[1]"}, False),
    ({"config.json": "{}", "ckpt.pt": ""}, False), ({"config.json": "half"}, False),
    ({"thesis.tex": ""}, False), ({"thesis.tex": "", ".lock": ""}, False),
])  # fmt: skip
def test_what_is_not_a_run_s_is_not_touched(content, ours, tmp_path, capsys):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    before = bytes_of(tmp_path)
    if ours:
        claim_run(tmp_path)
    else:
        assert "nothing was touched" in error_line(capsys, claim_run, tmp_path)
        assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("state, ours", [
    ({"model": {}, "iter_num": 3}, False), ({"format": "nanoJEPA 2"}, True),
])  # fmt: skip
def test_a_checkpoint_alone_is_a_run_s_if_it_says_so(state, ours, tmp_path, capsys):
    """nanoGPT leaves a ckpt.pt alone; of our runs one may be copied without the rest."""
    torch.save(state, tmp_path / "ckpt.pt")
    if ours:
        claim_run(tmp_path)
    else:
        assert "nothing was touched" in error_line(capsys, claim_run, tmp_path)


def test_leftovers_of_killed_writers_are_removed_and_nobody_else_s(other_process, tmp_path):
    def dies():
        with contextlib.suppress(ValueError):
            files.new_unfinished(tmp_path)[0].joinpath("half").write_text("7")

    other_process(dies)
    [living] = tmp_path.iterdir()
    for name, age in (("unfinished-dead", 0), ("tmpabcdefgh", 2), ("tmpstillnew", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age * files.DAY,) * 2)
    with write_folder(tmp_path / "new") as append:
        append("one", b"1")
    assert {path.name for path in tmp_path.iterdir()} == {living.name, "tmpstillnew", "new"}
