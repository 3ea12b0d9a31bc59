"""Claims about run.py and resuming: checkpoints that can be trusted, mistakes that cost a line."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import error_line

import data
import run
import train
from config import Config
from model import GPT
from run import (
    checkpoint_state,
    encode_pairs,
    load_run,
    pick_device,
    read_checkpoint,
    read_records,
    rewrite_records,
    save_checkpoint,
)
from synthetic import word_problems
from views import CODE, PRED, TARGET, TEXT, layout_of, tokenize

CPU = torch.device("cpu")
# Dropout is on, so that a model left in training mode would show.
TINY = Config(n_layer=2, n_head=2, n_embd=32, block_size=400, dropout=0.1, bias=True, n_pred=2)


def bytes_of(path):
    """Every file below a folder (or a file) and its content, to tell whether anything changed."""
    files = path.rglob("*") if path.is_dir() else [path]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


@pytest.fixture(scope="module")
def bpe():
    return data.train_tokenizer([r["answer"] for r in word_problems("train", 100)], 320)


def held_out(n, tokenizer, config):
    rows = [data.as_pair(row) for row in word_problems("val", n)]
    return tokenize(rows, tokenizer, config)[0]


def tiny_model(tokenizer, config=TINY):
    torch.manual_seed(0)
    return GPT(config, tokenizer.vocab_size, layout_of(config).parents)


def state_of(tokenizer, config=TINY, **more):
    model = tiny_model(tokenizer, config)
    return checkpoint_state(config, model, tokenizer, step=3, provenance={"data": {}}, **more)


@pytest.fixture
def ckpt(tmp_path, bpe):
    """A sound checkpoint file of a tiny model."""
    path = tmp_path / "out" / "some" / "ckpt.pt"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, state_of(bpe))
    return path


# --- what is saved is what is loaded ----------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_a_loaded_run_computes_the_same_hidden_states(name, tmp_path, bpe):
    tokenizer = bpe if name == "bpe" else data.gpt2_tokenizer()
    model = tiny_model(tokenizer)
    path = tmp_path / "mine" / "ckpt.pt"
    path.parent.mkdir()
    provenance = {"data": {"dataset": "word_problems"}, "command": "--seed=1"}
    save_checkpoint(path, checkpoint_state(TINY, model, tokenizer, step=7, provenance=provenance))
    pairs = held_out(4, tokenizer, TINY)
    rows = pairs.pack([0, 1, 2, 3], (TEXT, CODE, PRED, TARGET))
    hidden, ce = model.eval()(*rows)
    loaded = load_run(path, CPU)
    again, ce_again = loaded.model(*rows)
    assert torch.equal(again, hidden) and torch.equal(ce_again, ce)
    assert not loaded.model.training
    assert (loaded.name, loaded.path, loaded.config, loaded.step) == ("mine", path, TINY, 7)
    assert loaded.provenance == provenance
    assert loaded.tokenizer.sha256 == tokenizer.sha256
    assert loaded.tokenizer.encode(["8 eggs"]) == tokenizer.encode(["8 eggs"])


def test_a_run_is_named_by_its_folder_or_by_a_checkpoint_in_it(ckpt):
    best = shutil.copy(ckpt, ckpt.with_name("best.pt"))
    for named, path, name in ((ckpt.parent, ckpt, "some"), (best, best, "some/best")):
        assert (load_run(named, CPU).path, load_run(named, CPU).name) == (path, name)


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_save_that_dies_half_way_leaves_the_old_checkpoint(error, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, {"format": "nanoJEPA 1", "weights": torch.ones(1000)})
    before, save = path.read_bytes(), torch.save

    def dies(state, file):
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        raise error

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(type(error)):
        save_checkpoint(path, {"format": "nanoJEPA 1", "weights": torch.zeros(1000)})
    monkeypatch.setattr(torch, "save", save)
    assert path.read_bytes() == before
    assert torch.equal(read_checkpoint(path)["weights"], torch.ones(1000))
    # ... and what the dead one left behind does not hinder the next
    save_checkpoint(path, {"format": "nanoJEPA 1", "weights": torch.zeros(1000)})
    assert torch.equal(read_checkpoint(path)["weights"], torch.zeros(1000))


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def dies(state, file):
        try:
            raise OSError("No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch does

    monkeypatch.setattr(torch, "save", dies)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def save(argv):
        save_checkpoint(tmp_path / "ckpt.pt", {})

    line = error_line(capsys, run.exit_quietly, save)
    assert "ckpt.pt could not be saved: No space left on device" in line
    assert not any(tmp_path.iterdir())


def test_a_rewrite_that_dies_leaves_the_old_records(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1}, {"step": 2}]
    rewrite_records(path, records)
    write_text = Path.write_text

    def dies(self, text):
        write_text(self, text[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", dies)
        rewrite_records(path, records[:1])
    assert read_records(path) == records
    rewrite_records(path, records[:1])
    assert read_records(path) == records[:1]


# --- files that are no sound checkpoint -------------------------------------------------------


def test_a_flipped_byte_in_the_weights_is_found(ckpt, capsys):
    """torch.load alone would load it silently."""
    content = bytearray(ckpt.read_bytes())
    weights = load_run(ckpt, CPU).model.wte.weight.detach().numpy().tobytes()
    content[content.index(weights) + len(weights) // 2] ^= 0x10
    ckpt.write_bytes(content)
    torch.load(ckpt, weights_only=True)
    before = bytes_of(ckpt)
    line = error_line(capsys, load_run, ckpt, CPU)
    assert str(ckpt) in line and "damaged" in line
    assert bytes_of(ckpt) == before


def test_a_flipped_byte_anywhere_is_found_or_harmless(ckpt, capsys):
    sound, content = load_run(ckpt, CPU), ckpt.read_bytes()
    weights = sound.model.state_dict()
    pick = random.Random(0)
    found = 0
    for at in [*pick.sample(range(len(content)), 40), *range(len(content) - 60, len(content), 4)]:
        ckpt.write_bytes(content[:at] + bytes([content[at] ^ 1 << pick.randrange(8)])
                         + content[at + 1 :])  # fmt: skip
        try:
            loaded = load_run(ckpt, CPU)
        except SystemExit:
            found += 1
            assert len(capsys.readouterr().err.splitlines()) == 1
            continue
        assert loaded.config == sound.config
        assert all(torch.equal(v, weights[k]) for k, v in loaded.model.state_dict().items())
    assert found > 30


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_one_line(share, ckpt, capsys):
    content = ckpt.read_bytes()
    ckpt.write_bytes(content[: int(share * len(content))])
    before = bytes_of(ckpt)
    assert f"{ckpt} is not a readable checkpoint" in error_line(capsys, load_run, ckpt, CPU)
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
        torch.save({"format": "nanoJEPA 1", "model": evil}, path)
    elif kind == "old torch format":
        torch.save({"model": evil}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("kind", [
    "text", "zip", "zip with data.pkl", "dict", "list", "pickle", "code", "old torch format",
])  # fmt: skip
def test_a_foreign_file_is_one_line_and_runs_no_code(kind, tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    make_foreign(kind, path)
    before = bytes_of(tmp_path)
    assert str(path) in error_line(capsys, load_run, path, CPU)
    assert not (tmp_path / "evil").exists()
    assert bytes_of(tmp_path) == before


def test_a_missing_checkpoint_says_how_to_get_one(tmp_path, capsys):
    for path, asked in ((tmp_path / "none", "none"), (tmp_path, "ckpt.pt")):
        line = error_line(capsys, load_run, path, CPU)
        assert f"no checkpoint {tmp_path}" in line and asked in line and "train.py" in line


@pytest.mark.parametrize("change, named", [
    ({"config": {"nosuchfield": 1}}, "nosuchfield"),
    ({"config": {"n_layer": 3}}, "weights do not fit"),
    ({"config": {"n_embd": 16}}, "weights do not fit"),
    ({"tokenizer": {"sha256": "0" * 64}}, "another tokenizer"),
    ({"tokenizer": {"ranks": ""}}, "another tokenizer"),
])  # fmt: skip
def test_parts_that_do_not_belong_together_are_one_line(change, named, tmp_path, bpe, capsys):
    state = state_of(bpe)
    for part, values in change.items():
        state[part] = {**state[part], **values}
    save_checkpoint(tmp_path / "ckpt.pt", state)
    line = error_line(capsys, load_run, tmp_path, CPU)
    assert named in line and str(tmp_path / "ckpt.pt") in line


# --- resuming ---------------------------------------------------------------------------------

ARGS = ["--dataset=word_problems", "--tokenizer=bpe", "--bpe_vocab_size=320", "--n_layer=1",
        "--n_head=2", "--n_embd=32", "--batch_size=4", "--max_iters=2", "--eval_interval=2",
        "--eval_pairs=4", "--dtype=float32", "--device=cpu", "--warmup_iters=1"]  # fmt: skip
RESUME = [*ARGS, "--init_from=resume"]


def few_rows(seed=0):
    return {split: word_problems(split, n, seed) for split, n in (("train", 60), ("val", 12))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder out/ after two steps of training."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(data, "generated_rows", few_rows)
        patch.setattr(train, "plot_losses", lambda *_: None)
        patch.setattr(signal, "signal", lambda *_: None)  # conftest guards single tests only
        train.main(ARGS)
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path, monkeypatch):
    """A copy of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "generated_rows", few_rows)
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.mark.parametrize("change, named", [
    (["--n_layer=2"], "n_layer was 1, is 2"),
    (["--seed=2", "--jepa_weight=0.5"], "seed was 1337, is 2; jepa_weight was 1.0, is 0.5"),
    (["--batch_size=8"], "batch_size was 4, is 8"),
    (["--tokenizer=gpt2"], "tokenizer was 'bpe', is 'gpt2'"),
    (["--bpe_vocab_size=400"], "bpe_vocab_size was 320, is 400"),
    (["--dataset=gsm8k"], "dataset was 'word_problems', is 'gsm8k'"),
])  # fmt: skip
def test_resuming_with_another_config_names_what_changed(change, named, out, capsys):
    before = bytes_of(out)
    assert named in error_line(capsys, train.main, [*RESUME, *change])
    assert bytes_of(out) == before


def test_resuming_on_other_data_is_refused(out, capsys, monkeypatch):
    before = bytes_of(out)
    monkeypatch.setattr(data, "generated_rows", lambda: few_rows(seed=1))
    assert "train_sha256, val_sha256, " in error_line(capsys, train.main, RESUME)
    monkeypatch.setattr(data, "generated_rows", lambda: {**few_rows(), "val": few_rows(1)["val"]})
    assert ": val_sha256 changed" in error_line(capsys, train.main, RESUME)
    assert bytes_of(out) == before


def test_resuming_with_another_tokenizer_is_refused(out, capsys, monkeypatch, bpe):
    """Same settings, another result: say, another version of the library that trains it."""
    before = bytes_of(out)
    monkeypatch.setattr(data, "train_tokenizer", lambda *_: bpe)
    assert ": tokenizer_sha256 changed" in error_line(capsys, train.main, RESUME)
    assert bytes_of(out) == before


def test_resuming_a_damaged_checkpoint_is_refused(out, capsys):
    path = out / "default" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-100])
    before = bytes_of(out)
    assert "ckpt.pt is not a readable checkpoint" in error_line(capsys, train.main, RESUME)
    assert bytes_of(out) == before


def test_resuming_nothing_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint out/default/ckpt.pt" in error_line(capsys, train.main, RESUME)
    assert list(tmp_path.iterdir()) == []


def test_resuming_for_longer_goes_on(out):
    train.main([*RESUME, "--max_iters=3", "--eval_interval=3"])
    steps = [r["step"] for r in run.read_records(out / "default" / "metrics.jsonl") if "ce" in r]
    assert steps == [0, 1, 2]
    assert load_run(out / "default", CPU).step == 3


def test_a_resumed_run_names_the_code_of_every_sitting(out, monkeypatch):
    first = json.loads((out / "default/config.json").read_text())["provenance"]
    for steps in (3, 4):
        versions = {**run.versions(), "commit": f"before {steps}"}
        monkeypatch.setattr(train, "versions", lambda versions=versions: versions)
        train.main([*RESUME, f"--max_iters={steps}"])
    now = json.loads((out / "default/config.json").read_text())["provenance"]
    assert now == load_run(out / "default", CPU).provenance and now["commit"] == "before 4"
    assert [(was["until_step"], was["commit"]) for was in now["earlier"]] == [
        (2, first["commit"]), (3, "before 3")]  # fmt: skip
    assert now["earlier"][0]["command"] == first["command"]


def test_going_on_keeps_the_evaluation_that_is_not_repeated(out):
    """The run's last, at a step that is no multiple of eval_interval; one that is comes anew."""
    for interval, seen in ((3, [2, 3]), (1, [2, 3, 4])):
        train.main([*RESUME, f"--max_iters={seen[-1]}", f"--eval_interval={interval}"])
        records = run.read_records(out / "default" / "metrics.jsonl")
        assert [r["step"] for r in records if "val_ce" in r][-len(seen):] == seen


def test_resuming_for_fewer_steps_takes_none(out, monkeypatch):
    """The run stands at step 2 of 2; asked for 1, it may end or refuse, but not train for ever."""

    def one_more_step(step, config):
        pytest.fail(f"trains step {step} of {config.max_iters}")

    monkeypatch.setattr(train, "learning_rate", one_more_step)
    try:
        train.main([*RESUME, "--max_iters=1"])
    except SystemExit as exit_:
        assert exit_.code == 2
    assert load_run(out / "default", CPU).step == 2


def test_the_same_rows_may_lie_elsewhere_on_resume(tmp_path, monkeypatch):
    """Checksums tell that they are the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(
            f'{{"question": "What is {i} plus 1?", "answer": "#### {i + 1}"}}\n' for i in range(40)
        ))  # fmt: skip
    train.main([*ARGS, "--dataset=gsm8k", "--data_dir=here"])
    train.main([*RESUME, "--dataset=gsm8k", "--data_dir=there", "--max_iters=3"])
    assert load_run(tmp_path / "out" / "default", CPU).step == 3


# --- other mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    ["--data_dir=nowhere", "--dataset=gsm8k"], ["--device=nonsense"], ["--n_layer=0"],
    ["--batch_size=500"], ["--block_size=8"],
])  # fmt: skip
def test_a_mistake_writes_nothing(change, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "generated_rows", few_rows)
    error_line(capsys, train.main, [*ARGS, *change])
    assert list(tmp_path.iterdir()) == []


def test_an_out_dir_that_is_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "generated_rows", few_rows)
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["train.py", *ARGS, "--out_dir=notes"])
    assert "notes" in error_line(capsys, run.exit_quietly, train.main)
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("device", [
    "nonsense", "", "cuda:99", "cpu:x",
    "hpu",
    "meta",
    "vulkan",
])  # fmt: skip
def test_an_impossible_device_is_one_short_line(device, capsys):
    line = error_line(capsys, pick_device, device, "auto")
    assert f"device={device} cannot be used here" in line
    assert len(line) < 400  # torch lists its sixty backends where one is missing


def test_an_unknown_dtype_is_one_line(capsys):
    assert "dtype=fp32 is not one of" in error_line(capsys, pick_device, "cpu", "fp32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_computes_in_the_dtype_asked_for(dtype, capsys):
    device, autocast = pick_device("cpu", dtype)
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, dtype)
    assert device == CPU and f"device cpu {dtype}" in capsys.readouterr().out


def test_runs_are_listed_newest_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, age in (("b", 30), ("c", 10), ("a", 20)):
        path = tmp_path / "out" / name / "ckpt.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (2e9 - age, 2e9 - age))
    (tmp_path / "out" / "unfinished").mkdir()
    (tmp_path / "out" / "earlier" / "c-1").mkdir(parents=True)  # where train.py sets runs aside
    (tmp_path / "out" / "earlier" / "c-1" / "ckpt.pt").touch()
    assert run.runs_newest_first() == [Path("out/c"), Path("out/a"), Path("out/b")]


def test_without_runs_the_way_to_one_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # without out/, then with an empty one
        line = error_line(capsys, run.runs_newest_first)
        assert "no run under out/" in line and "python train.py" in line
        (tmp_path / "out").mkdir(exist_ok=True)


def test_ctrl_c_ends_in_a_line(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        run.exit_quietly(main)
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- held-out pairs ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_pred", [0, 1, 3])
def test_encoded_pairs_keep_their_order_and_equal_one_pair_at_a_time(n_pred, bpe):
    """Batches are sorted by length; what comes back is not. 20 pairs make two batches."""
    config = Config(n_layer=2, n_head=2, n_embd=32, block_size=300, dropout=0.1, n_pred=n_pred)
    pairs = held_out(25, bpe, config)
    model = tiny_model(bpe, config).train()
    ce, pred, target = encode_pairs(model, pairs, 20, CPU, torch.no_grad)
    assert model.training  # as it was
    assert pred.shape == target.shape == (20, 32) and not pred.requires_grad

    model.eval()
    ce_sum, n_labels = 0.0, 0
    for i in range(20):
        # Every view in a row of its own, so that blocks and padding cannot matter.
        rows = pairs.pack([i], (TEXT, PRED))
        hidden = model.hidden(rows.idx, rows.block)
        text, code = pairs.view(i, TEXT), pairs.view(i, CODE)
        at_end = hidden[0, len(text) + n_pred - 1]
        torch.testing.assert_close(pred[i], at_end, rtol=1e-4, atol=1e-5)
        rows = pairs.pack([i], (TARGET,))
        hidden = model.hidden(rows.idx, rows.block)
        torch.testing.assert_close(target[i], hidden[0, len(code) - 1], rtol=1e-4, atol=1e-5)
        idx = torch.tensor([text + code])
        hidden = model.hidden(idx, torch.full_like(idx, TEXT))  # one block: plain causal attention
        logits = model.lm_head(hidden[0, len(text) - 1 : -1])
        ce_sum += F.cross_entropy(logits, torch.tensor(code), reduction="sum").item()
        n_labels += len(code)
    assert ce == pytest.approx(ce_sum / n_labels, rel=1e-5)


def test_asking_for_more_pairs_than_there_are_gives_all(bpe):
    pairs = held_out(5, bpe, TINY)
    _, pred, target = encode_pairs(tiny_model(bpe), pairs, 256, CPU, torch.no_grad)
    assert len(pred) == len(target) == len(pairs)


def test_metrics_lose_only_a_line_that_was_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert run.read_records(path) == []
    path.write_text('{"step": 0, "ce": 5.5}\n{"step": 1, "ce": 4.5}\n{"step": 2, "c')
    assert run.read_records(path) == [{"step": 0, "ce": 5.5}, {"step": 1, "ce": 4.5}]
