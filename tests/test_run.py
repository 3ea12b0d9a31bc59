"""Claims about run.py: a run that is opened is the one that was trained, and resuming goes on."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import error_line, release

import data
import run
import sample
import train
from config import Config
from generators.word_problems import word_problems
from model import block_ends
from plumbing import processes
from plumbing.files import read_records, write_checkpoint
from plumbing.jsonl import as_pair
from plumbing.processes import run_main
from plumbing.tokenizers import gpt2_tokenizer, train_tokenizer
from run import Folder, Progress, load_run, make_model
from views import CODE, PRED, TARGET, TEXT, tokenize

CPU = torch.device("cpu")
# Dropout is on, so that a model left in training mode would show.
TINY = Config(n_layer=2, n_head=2, n_embd=32, block_size=400, dropout=0.1, bias=True, n_pred=2)


def bytes_of(path):
    """Every file below a folder (or a file) and its content, to tell whether anything changed."""
    files = path.rglob("*") if path.is_dir() else [path]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([r["answer"] for r in word_problems("train", 100)], 320)


def held_out(n, tokenizer, config):
    rows = [as_pair(row) for row in word_problems("val", n)]
    return tokenize(rows, tokenizer, config)[0]


def tiny_model(tokenizer, config=TINY):
    torch.manual_seed(0)
    return make_model(config, tokenizer.vocab_size)


def save(path, tokenizer, step=3, provenance=None):
    """What training leaves to be evaluated, of an untrained model. Returns that model."""
    model = tiny_model(tokenizer)
    folder = Folder(path.parent, SimpleNamespace(tokenizer=tokenizer), provenance or {}, True)
    t = SimpleNamespace(model=model, pairs=SimpleNamespace(config=TINY))
    folder.save(path.name, t, Progress(step=step), resumable=False)
    return model


@pytest.fixture
def ckpt(tmp_path, bpe):
    """A sound checkpoint file of a tiny model."""
    path = tmp_path / "out" / "some" / "ckpt.pt"
    save(path, bpe)
    return path


# --- what is saved is what is loaded ----------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_a_loaded_run_computes_the_same_hidden_states(name, tmp_path, bpe):
    tokenizer = bpe if name == "bpe" else gpt2_tokenizer()
    path = tmp_path / "mine" / "ckpt.pt"
    provenance = {"data": {"dataset": "word_problems"}, "command": "--seed=1"}
    model = save(path, tokenizer, step=7, provenance=provenance)
    pairs = held_out(4, tokenizer, TINY)
    batch = pairs.pack([0, 1, 2, 3], (TEXT, CODE, PRED, TARGET))
    read = block_ends(batch.block)
    hidden, ce = model.eval()(batch, read)
    loaded = load_run(path, CPU)
    again, ce_again = loaded.model(batch, read)
    torch.testing.assert_close(again, hidden, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ce_again, ce) and not hidden[read].isnan().any()
    assert not loaded.model.training
    assert (loaded.name, loaded.path, loaded.config, loaded.step) == ("mine", path, TINY, 7)
    assert loaded.provenance == provenance
    assert loaded.tokenizer.sha256 == tokenizer.sha256
    assert loaded.tokenizer.encode(["8 eggs"]) == tokenizer.encode(["8 eggs"])


def test_a_run_is_named_by_its_folder_or_by_a_checkpoint_in_it(ckpt):
    best = shutil.copy(ckpt, ckpt.with_name("best.pt"))
    for named, path, name in ((ckpt.parent, ckpt, "some"), (best, best, "some/best")):
        assert (load_run(named, CPU).path, load_run(named, CPU).name) == (path, name)


@pytest.mark.parametrize("change, named", [
    ({"config": {"nosuchfield": 1}}, "nosuchfield"),
    ({"config": {"n_layer": 3}}, "weights do not fit"),
    ({"config": {"n_embd": 16}}, "weights do not fit"),
    ({"tokenizer": {"sha256": "0" * 64}}, "another tokenizer"),
    ({"tokenizer": {"dump": "YQ== 0\n"}}, "another tokenizer"),
])  # fmt: skip
def test_parts_that_do_not_belong_together_are_one_line(change, named, ckpt, capsys):
    state = torch.load(ckpt)
    for part, values in change.items():
        state[part] = {**state[part], **values}
    write_checkpoint(ckpt, state)
    line = error_line(capsys, load_run, ckpt, CPU)
    assert named in line and str(ckpt) in line


def test_a_run_of_an_earlier_version_is_one_line(ckpt, capsys):
    """As nanoJEPA 1 wrote it: other fields throughout, of which none may be met first."""
    state = torch.load(ckpt)
    state |= {"format": "nanoJEPA 1", "tokens": 9, "config": {"direction": "forward"},
              "tokenizer": {"name": "bpe", "ranks": ""}}  # fmt: skip
    write_checkpoint(ckpt, state)
    line = error_line(capsys, load_run, ckpt, CPU)
    assert f"{ckpt} " in line and "nanoJEPA 1" in line and "nanoJEPA 2" in line


def test_a_damaged_run_is_one_line(ckpt, capsys):
    for cut, said in ((-100, "is not a readable checkpoint"), (0, "no checkpoint")):
        ckpt.write_bytes(ckpt.read_bytes()[:cut]) if cut else ckpt.unlink()
        assert f"{ckpt}" in (line := error_line(capsys, load_run, ckpt, CPU)) and said in line


# --- resuming ---------------------------------------------------------------------------------

ARGS = ["--dataset=word_problems", "--tokenizer=bpe", "--bpe_vocab_size=320", "--n_layer=1",
        "--n_head=2", "--n_embd=32", "--batch_size=4", "--max_iters=2", "--eval_interval=2",
        "--eval_pairs=4", "--dtype=float32", "--device=cpu", "--warmup_iters=1",
        "--out_dir=out/default"]  # fmt: skip
RESUME = [*ARGS, "--init_from=resume"]


def few_rows(name="word_problems", seed=0):
    return {split: word_problems(split, n, seed) for split, n in (("train", 60), ("val", 12))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder out/ after two steps of training."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(data.GENERATORS, "word_problems", few_rows)
        patch.setattr(train, "plot_losses", lambda *_: None)
        patch.setattr(signal, "signal", lambda *_: None)  # conftest guards single tests only
        train.main(ARGS)
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path, monkeypatch):
    """A copy of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.GENERATORS, "word_problems", few_rows)
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.mark.parametrize("change, named", [
    (["--n_layer=2"], "n_layer was 1, is 2"),
    (["--seed=2", "--jepa_weight=0.5"], "jepa_weight was 0.3, is 0.5; seed was 1337, is 2"),
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
    monkeypatch.setitem(data.GENERATORS, "word_problems", lambda name: few_rows(seed=1))
    assert "train_sha256, val_sha256, " in error_line(capsys, train.main, RESUME)
    other_val = {**few_rows(), "val": few_rows(seed=1)["val"]}
    monkeypatch.setitem(data.GENERATORS, "word_problems", lambda name: other_val)
    assert ": val_sha256 changed" in error_line(capsys, train.main, RESUME)
    assert bytes_of(out) == before


def test_a_test_that_comes_later_stops_no_run(out, capsys, monkeypatch):
    with_test = {**few_rows(), "test": few_rows(seed=1)["val"]}
    monkeypatch.setitem(data.GENERATORS, "word_problems", lambda name: with_test)
    train.main([*RESUME, "--max_iters=3"])
    about = json.loads((out / "default" / "config.json").read_text())["provenance"]
    assert about["data"]["test_rows"] == 12 and "test_rows" not in about["earlier"][0]


def test_a_run_that_goes_on_in_another_dtype_says_so(out, capsys, monkeypatch):
    args = [arg for arg in ARGS if not arg.startswith(("--dtype", "--out_dir"))]

    def trains(name, bf16, *more):
        monkeypatch.setattr(processes, "has_bf16", lambda device: bf16)
        capsys.readouterr()
        train.main([*args, f"--out_dir=out/{name}", *more])
        release()
        about = json.loads((out / name / "config.json").read_text())
        return capsys.readouterr().out, about["config"]["dtype"], about["provenance"]["dtype"]

    on = "--init_from=resume", "--max_iters=3"
    assert trains("stays", False)[1:] == trains("leaves", False)[1:] == ("auto", "float32")
    said, *dtypes = trains("leaves", True, *on)
    assert "was trained in float32 so far and goes on in bfloat16; --dtype=float32 keeps" in said
    assert dtypes == ["auto", "bfloat16"]
    back = trains("leaves", True, "--init_from=resume", "--max_iters=4", "--dtype=float32")
    assert back[1:] == ("float32", "float32")  # the advice can be followed then too
    said, *dtypes = trains("stays", True, *on, "--dtype=float32")
    assert "so far" not in said and dtypes == ["float32", "float32"]
    line = error_line(capsys, train.main, [*args, "--out_dir=out/stays", *on, "--dtype=bfloat16"])
    assert "dtype was 'float32', is 'bfloat16'" in line


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
    steps = [r["step"] for r in read_records(out / "default" / "metrics.jsonl") if "ce" in r]
    assert steps == [0, 1, 2]
    assert load_run(out / "default", CPU).step == 3


def test_a_resumed_run_names_the_code_of_every_sitting(out, monkeypatch):
    real = run.versions
    first = json.loads((out / "default/config.json").read_text())["provenance"]
    for steps in (3, 4):
        versions = {**real(), "commit": f"before {steps}"}
        monkeypatch.setattr(run, "versions", lambda versions=versions: versions)
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
        records = read_records(out / "default" / "metrics.jsonl")
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


# --- the config of a resumed run --------------------------------------------------------------

GO_ON = ["--out_dir=out/default", "--init_from=resume"]


def steps_of(folder="out/default"):
    return [r for r in read_records(Path(folder) / "metrics.jsonl") if "lr" in r]


def test_the_config_of_a_resumed_run_is_the_checkpoints(out, capsys):
    """Nothing else has to be said again: neither the data, nor the model, nor the device."""
    saved = load_run(out / "default", CPU).config
    train.main([*GO_ON, "--max_iters=3", "--log_interval=1"])
    assert "step 2/3" in capsys.readouterr().out
    config = load_run(out / "default", CPU).config
    expected = replace(saved, init_from="resume", max_iters=3, lr_decay_iters=2, log_interval=1)
    assert config == expected


def test_the_line_after_ctrl_c_works_as_printed(tmp_path, monkeypatch, capsys):
    """Shell and all, with options, and a folder, that need not be remembered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.GENERATORS, "word_problems", few_rows)
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    (tmp_path / "my recipe.py").write_text("max_iters = 6\nn_layer = 2\nout_dir = 'elsewhere'\n")
    options = [arg for arg in ARGS if "max_iters" not in arg and "out_dir" not in arg]
    real = train.learning_rate

    def learning_rate(step, config):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(step, config)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    with pytest.raises(SystemExit):
        train.main(["my recipe.py", *options, "--seed=5", "--out_dir=out/it's mine"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("SIGTERM: saved out/it's mine/ckpt.pt at step 4; to go on: python train")
    python, script, *argv = shlex.split(line.partition("to go on: ")[2])
    assert (python, script, argv[0]) == ("python", "train.py", "my recipe.py")
    monkeypatch.setattr(train, "learning_rate", real)
    train.main(argv)
    printed = capsys.readouterr().out
    assert "note:" not in printed  # the recipe is as it was; the options were given, not changed
    config = load_run(tmp_path / "out/it's mine", CPU).config
    assert (config.seed, config.n_layer, config.recipe) == (5, 1, "my recipe")
    assert [r["step"] for r in steps_of("out/it's mine")] == [*range(6)]


def test_several_processes_go_on_as_several(monkeypatch):
    """One alone would draw other random numbers, and take longer."""
    folder = Folder(Path("out/debug"), None, {"command": "debug --seed=2"}, True)
    assert folder.how_to_resume().startswith("python train.py debug --out_dir=")
    monkeypatch.setenv("WORLD_SIZE", "2")
    start = "torchrun --standalone --nproc_per_node=2 train.py debug --out_dir=out/debug "
    assert folder.how_to_resume() == start + "--init_from=resume"


def test_a_recipe_that_changed_is_named_and_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.GENERATORS, "word_problems", few_rows)
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    recipe = tmp_path / "mine.py"
    recipe.write_text("learning_rate = 2e-3\nn_pred = 2\n")
    train.main(["mine.py", *ARGS])
    recipe.write_text("learning_rate = 5e-3\nn_pred = 2\nn_embd = 7\n")  # alone it would be refused
    capsys.readouterr()
    train.main(["mine.py", *GO_ON, "--max_iters=3"])
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "mine.py" in note and "learning_rate=0.005 (the run: 0.002)" in note
    assert "not used" in note and "n_pred" not in note
    assert load_run(Path("out/default"), CPU).config.learning_rate == 2e-3


def test_a_data_file_that_moved_can_be_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    for folder in ("here", "there", "third", "other"):
        (tmp_path / folder).mkdir()
    rows = [f'{{"question": "What is {i} plus 1?", "answer": "{i + 1}"}}\n' for i in range(40)]
    Path("here/pairs.jsonl").write_text("".join(rows))
    Path("other/pairs.jsonl").write_text("".join(rows[:-1]))
    train.main([*ARGS, "--dataset=here/pairs.jsonl"])
    Path("here/pairs.jsonl").rename("there/pairs.jsonl")
    train.main([*GO_ON, "--dataset=there/pairs.jsonl", "--max_iters=3"])
    Path("there/pairs.jsonl").rename("third/pairs.jsonl")
    train.main([*GO_ON, "--data_dir=third", "--max_iters=4"])
    opened = load_run(Path("out/default"), CPU)
    assert (opened.step, opened.config.dataset) == (4, "third/pairs.jsonl")
    line = error_line(capsys, train.main, [*GO_ON, "--dataset=other/pairs.jsonl"])
    assert "was trained on other data: " in line and "train_sha256" in line
    line = error_line(capsys, train.main, [*GO_ON, "--dataset=gone/pairs.jsonl"])
    assert "dataset was 'third/pairs.jsonl', is 'gone/pairs.jsonl'" in line


def test_a_split_that_is_another_one_now_is_noted(tmp_path, monkeypatch, capsys):
    """A moved folder without its val.jsonl: validation would now come out of what was train."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *_: None)
    rows = [f'{{"question": "What is {i} plus 1?", "answer": "{i + 1}"}}\n' for i in range(60)]
    for folder, splits in (("here", ("train", "val")), ("there", ("train",))):
        Path(folder).mkdir()
        for split, some in zip(splits, (rows[:40], rows[40:])):
            Path(folder, f"{split}.jsonl").write_text("".join(some))
    train.main([*ARGS, "--dataset=here"])
    opened = load_run(Path("out/default"), CPU)
    capsys.readouterr()
    Path("here").rename("gone")
    line = error_line(capsys, run.data_of, opened, "")
    assert line.startswith("error: here, which out/default/ckpt.pt was trained on, is gone;")
    Path("gone").rename("here")
    run.data_of(opened, "here")
    assert "another split" not in capsys.readouterr().out
    run.data_of(opened, "there")
    assert "was trained with another split of its data" in capsys.readouterr().out
    sample.main(["out/default", "--data_dir=there", "--num_samples=1", "--device=cpu"])
    assert "note: the run saw other data, or another split of it" in capsys.readouterr().out


def test_more_steps_keep_the_schedule_and_say_so(out, capsys):
    rates = [r["lr"] for r in steps_of()]
    train.main([*RESUME, "--max_iters=5"])
    said = "stays at min_lr=0.0001 from step 2 on; --lr_decay_iters=5 would bend it"
    assert said in capsys.readouterr().out
    assert [r["lr"] for r in steps_of()] == [*rates, *[1e-4] * 3]
    train.main([*GO_ON, "--max_iters=7"])  # the schedule is still the first one's
    assert [r["lr"] for r in steps_of()][-2:] == [1e-4] * 2
    train.main([*GO_ON, "--max_iters=7"])
    assert "schedule" not in capsys.readouterr().out.splitlines()[-1]


def test_the_schedule_is_bent_on_purpose(out, capsys):
    train.main([*RESUME, "--max_iters=6", "--lr_decay_iters=6"])
    assert "bent: it reaches min_lr=0.0001 at step 6, not 2" in capsys.readouterr().out
    rates = [r["lr"] for r in steps_of()][2:]
    config = replace(load_run(out / "default", CPU).config, max_iters=6, lr_decay_iters=6)
    assert rates == [train.learning_rate(step, config) for step in (2, 3, 4, 5)]
    assert min(rates) > 1e-4


# --- the last two checkpoints -----------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    at = len(content) // 2
    content[at] ^= 0xFF
    path.write_bytes(content)


def test_the_checkpoint_before_the_last_one_is_kept(out, capsys):
    first = (out / "default/ckpt.pt").read_bytes()
    train.main([*GO_ON, "--max_iters=3", "--eval_interval=3"])
    last, previous = out / "default/ckpt.pt", out / "default/ckpt-previous.pt"
    assert previous.read_bytes() == first != last.read_bytes()
    assert not last.samefile(previous)  # one damaged byte may not cost both
    assert load_run(previous, CPU).step == 2


def test_a_damaged_checkpoint_names_the_other_and_that_one_goes_on(out, capsys):
    train.main([*GO_ON, "--max_iters=4", "--eval_interval=2"])
    whole = load_run(out / "default", CPU).model.state_dict()
    flip(out / "default/ckpt.pt")
    before = bytes_of(out)
    for call, *args in ((train.main, GO_ON), (load_run, out / "default", CPU)):
        line = error_line(capsys, call, *args)
        assert "ckpt.pt is damaged" in line and "default/ckpt-previous.pt" in line
        assert "--init_from=previous goes on" in line
    assert bytes_of(out) == before
    damaged = (out / "default/ckpt.pt").read_bytes()
    train.main(["--out_dir=out/default", "--init_from=previous"])
    assert "ckpt-previous.pt takes its place" in capsys.readouterr().out
    assert (out / "default/earlier/ckpt-1.pt").read_bytes() == damaged
    again = load_run(out / "default", CPU)
    assert again.step == 4 and all(torch.equal(w, whole[n]) for n, w in
                                   again.model.state_dict().items())  # fmt: skip
    assert load_run(out / "default/ckpt-previous.pt", CPU).step == 2
    assert [r["step"] for r in steps_of()] == [0, 1, 2, 3]


def test_previous_is_refused_where_there_is_none(out, capsys):
    before = bytes_of(out)
    line = error_line(capsys, train.main, ["--out_dir=out/default", "--init_from=previous"])
    assert "no checkpoint out/default/ckpt-previous.pt" in line and bytes_of(out) == before


def test_best_is_the_checkpoint_with_the_lowest_loss(out, capsys):
    assert load_run(out / "default", CPU, best=True).path.name == "best.pt"
    line = error_line(capsys, load_run, out / "default/ckpt.pt", CPU, best=True)
    assert "is a checkpoint already" in line


# --- other mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    ["--data_dir=nowhere", "--dataset=gsm8k"], ["--device=nonsense"], ["--n_layer=0"],
    ["--batch_size=500"], ["--block_size=8"],
])  # fmt: skip
def test_a_mistake_writes_nothing(change, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.GENERATORS, "word_problems", few_rows)
    error_line(capsys, train.main, [*ARGS, *change])
    assert list(tmp_path.iterdir()) == []


def test_an_out_dir_that_is_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.GENERATORS, "word_problems", few_rows)
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["train.py", *ARGS, "--out_dir=notes"])
    assert "notes" in error_line(capsys, run_main, train.main)
    assert (tmp_path / "notes").read_text() == "mine"


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
