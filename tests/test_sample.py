"""Claims about sample.py: which questions the model is given, and what is printed of them."""

import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import TINY, error_line, sums

import data
import evaluate
import sample
import train
from config import load_config
from data import load_data
from generate import Sampling
from generators.relations import SIZES, Sizes
from plumbing.processes import ROOT
from run import load_run
from views import TEXT

CPU = torch.device("cpu")
ARGS = ["--device=cpu", "--dtype=float32", "--max_new_tokens=2"]
SAMPLE = ["out/tiny", *ARGS]


@pytest.fixture
def given(monkeypatch):
    """The prompts that are continued, as they come."""
    prompts, real = [], sample.generate
    monkeypatch.setattr(
        sample, "generate", lambda trunk, new, *args: prompts.extend(new) or real(trunk, new, *args)
    )
    return prompts


# --- what the model is given ------------------------------------------------------------------


def test_sampling_from_a_plan_gives_the_model_its_pred_tokens(tiny_run, given, capsys):
    tiny_run(layout="plan", n_pred=2, max_iters=1)
    sample.main([*SAMPLE, "--num_samples=2", "--prompt=What is 3 plus 2?"])
    sample.main([*SAMPLE, "--num_samples=2"])
    held_out = load_data(load_config([*TINY, "--layout=plan", "--n_pred=2"]))
    tokenizer, val = held_out.tokenizer, held_out.pairs["val"]
    pred = [tokenizer.vocab_size, tokenizer.vocab_size + 1]
    asked = [*tokenizer.encode(["What is 3 plus 2?"])[0], tokenizer.sep, *pred]
    assert given == [asked, asked, *(val.view(i, TEXT) + pred for i in (0, 1))]
    assert "What is 3 plus 2?" in capsys.readouterr().out


def chat(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.fixture
def train_on_chats(tmp_path, monkeypatch):
    """A function that trains a tiny model for a step on 40 sums, which begin with these system
    prompts in turn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *paths: None)

    def run(systems, *options):
        rows = [chat(("system", systems[i % len(systems)]), ("user", row["question"]),
                     ("assistant", row["answer"])) for i, row in enumerate(sums(40))]  # fmt: skip
        Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train.main([*TINY, "--dataset=mine.jsonl", "--eval_pairs=4", "--max_iters=1", *options])

    return run


@pytest.mark.parametrize("system_prompt", ["keep", "drop"])
def test_a_prompt_stands_where_questions_stood_in_training(system_prompt, given, train_on_chats):
    train_on_chats(["Add."], f"--system_prompt={system_prompt}")
    sample.main([*SAMPLE, "--num_samples=1", "--prompt=What is 3 plus 2?"])
    tokenizer = load_run(Path("out/tiny"), CPU).tokenizer
    before = tokenizer.encode(["Add.\n"])[0] if system_prompt == "keep" else []
    assert given == [[*before, *tokenizer.encode(["What is 3 plus 2?"])[0], tokenizer.sep]]


def test_another_system_prompt_may_stand_before_a_prompt(given, train_on_chats, capsys):
    train_on_chats(["Add."])
    ask = [*SAMPLE, "--num_samples=1", "--prompt=What is 3 plus 2?"]
    tokenizer = load_run(Path("out/tiny"), CPU).tokenizer
    for system, before in ((None, "Add.\n"), ("Subtract.", "Subtract.\n"), ("", "")):
        sample.main(ask + ([] if system is None else [f"--system={system}"]))
        asked = [*tokenizer.encode(["What is 3 plus 2?"])[0], tokenizer.sep]
        assert given[-1] == [*(tokenizer.encode([before])[0] if before else []), *asked]
    line = error_line(capsys, sample.main, [*SAMPLE, "--system=Add."])
    assert "system stands before a prompt" in line
    train_on_chats(["Add."], "--system_prompt=drop")
    line = error_line(capsys, sample.main, [*ask, "--system=Add."])
    assert "trained without system prompts (system_prompt=drop" in line


def test_mixed_system_prompts_are_said(given, train_on_chats, capsys):
    train_on_chats(["Be polite.", "Be brief."])
    assert "system prompts: 2 different ones" in capsys.readouterr().out
    for option, noted in (([], True), (["--system=Be brief."], False)):
        sample.main([*SAMPLE, "--num_samples=1", "--prompt=What is 3 plus 2?", *option])
        note = "began with 2 different system prompts; none stands before this one"
        assert (note in capsys.readouterr().out) == noted


def test_best_asks_the_best_checkpoint(tiny_run, monkeypatch, capsys):
    real, n = train.embed_pairs, []

    def embed_pairs(*args):
        n.append(None)
        return len(n), *real(*args)[1:]  # every evaluation is worse

    monkeypatch.setattr(train, "embed_pairs", embed_pairs)
    tiny_run()
    for args, seen in ((SAMPLE, "ckpt.pt, step 6"), ([*SAMPLE, "--best"], "best.pt, step 3")):
        sample.main([*args, "--num_samples=1"])
        assert f"run out/tiny/{seen}" in capsys.readouterr().out
    evaluate.main(["out/tiny", "--device=cpu", "--split=val", "--n=2", "--best=true"])
    assert Path("out/tiny/accuracy-best-val-first-2.json").exists()


def test_samples_of_steps_and_of_running_text(tiny_run, given, capsys):
    """Of steps, the right answer is all that follows the question; running text has no end mark."""
    tiny_run(views="steps", max_iters=1)
    sample.main([*SAMPLE, "--num_samples=3"])
    printed = capsys.readouterr().out
    assert all(f"--- right answer\n{row['answer']}" in printed for row in sums(3, 500))
    tiny_run(views="split", labels="all", max_iters=1)
    sample.main([*SAMPLE, "--prompt=What is"])
    assert given[-1] == load_run(Path("out/tiny"), CPU).tokenizer.encode(["What is"])[0]


def test_a_run_on_facts_is_asked_in_its_own_words(tmp_path, monkeypatch, given, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda *paths: None)
    monkeypatch.setitem(SIZES, "relations", Sizes(3, 20, 16, 40, 30))
    train.main([*TINY, "--dataset=relations", "--views=facts", "--tokenizer=words",
                "--max_iters=1"])  # fmt: skip
    tokenizer = load_run(Path("out/tiny"), CPU).tokenizer
    for prompt in (" a3 b4  r2", "a3 b4 r2"):
        capsys.readouterr()
        sample.main([*SAMPLE, f"--prompt={prompt}"])
        assert "a3 b4" in capsys.readouterr().out
        assert given[-1] == tokenizer.encode([" a3 b4 r2"])[0] and len(given[-1]) == 3
    # A word that it has not seen is one line, which says how its words look.
    for prompt, unknown in (("hello", "hello"), ("a3 b4 x", "x"), ("a3 b4 r99", "r99")):
        line = error_line(capsys, sample.main, [*SAMPLE, f"--prompt={prompt}"])
        assert f"no word {unknown} " in line and prompt in line and "a3 b4 r2" in line
    assert "0 tokens" in error_line(capsys, sample.main, [*SAMPLE, "--prompt= "])


# --- what is printed --------------------------------------------------------------------------


def test_held_out_questions_come_with_their_right_answers(tiny_run, capsys):
    tiny_run(max_iters=1)
    sample.main([*SAMPLE, "--num_samples=2"])
    printed = capsys.readouterr().out
    for row in sums(2, 500):
        assert f"--- question\n{row['question']}\n--- tiny answers\n" in printed
        assert f"--- right answer\n{row['answer']}" in printed
    assert printed.count("--- question") == 2 and "note:" not in printed
    assert "run out/tiny/ckpt.pt, step 1, trained on sums" in printed
    assert printed.count("[cut off: no end of text]") == 2  # after two tokens
    sample.main([*SAMPLE, "--num_samples=99"])  # no more than there are
    assert capsys.readouterr().out.count("--- question") == 20
    sample.main([*SAMPLE, "--num_samples=3", "--prompt=What is 3 plus 2?"])  # answers to one
    printed = capsys.readouterr().out
    assert printed.count("--- question") == 3 and "right answer" not in printed


def test_the_seed_decides_what_is_drawn(tiny_run, monkeypatch):
    tiny_run(max_iters=1)
    samplings = []
    monkeypatch.setattr(sample, "generate", lambda trunk, prompts, n, eot, sampling: (
        samplings.append(sampling) or [[eot]] * len(prompts)))  # fmt: skip
    sample.main([*SAMPLE, "--seed=5", "--temperature=0.5", "--top_k=3", "--top_p=0.9"])
    sample.main(SAMPLE)
    assert samplings == [Sampling(0.5, 3, 0.9, 5), Sampling(0.8, 50, 1.0, 1337)]


def test_questions_of_other_data_are_noted(tiny_run, monkeypatch, capsys):
    tiny_run(max_iters=1)
    monkeypatch.setattr(data, "load_rows", lambda config: (
        {"train": sums(90, 1000), "val": sums(20, 500)}, "sums", "test"))  # fmt: skip
    sample.main([*SAMPLE, "--num_samples=1"])
    said = "note: the run saw other data, or another split of it (sums from test)"
    assert said in capsys.readouterr().out


# --- question after question ------------------------------------------------------------------


@pytest.fixture
def converse(monkeypatch, capsys):
    """A function that pipes lines into --interactive: its answers, and what stands on stderr."""

    def ask(lines, *options):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        capsys.readouterr()
        sample.main(["out/tiny", "--device=cpu", "--dtype=float32", "--interactive", *options])
        printed = capsys.readouterr()
        return printed.out.split("trained on ")[1].partition("\n")[2], printed.err

    return ask


@pytest.mark.parametrize("options", [[], ["--temperature=0"], ["--seed=5", "--top_p=0.9"]])
def test_interactive_answers_are_those_of_a_prompt(options, tiny_run, converse, capsys):
    """Each question stands alone, and gets what it gets without --interactive and the same seed."""
    tiny_run()
    questions, expected = ["What is 3 plus 2?", "1", "Wie viel ist das – 5 €?"], []
    for question in questions:
        sample.main(["out/tiny", "--device=cpu", "--dtype=float32", "--num_samples=1",
                     f"--prompt={question}", *options])  # fmt: skip
        answer = capsys.readouterr().out.partition("--- tiny answers\n")[2]
        expected.append(f"> {question}\n{answer}")
    said, complaints = converse("\n".join(questions), *options)  # no line end after the last
    assert said == "".join(expected) and complaints == ""
    assert converse("\n  \n".join([*questions, ""]), *options)[0] == said  # nothing is no question
    assert converse("") == ("", "")


def test_what_cannot_be_asked_is_a_line_and_the_next_question_is_answered(tiny_run, converse):
    tiny_run(max_iters=1)
    alone, _ = converse("What is 3 plus 2?\n")
    said, complaints = converse(f"{'12 plus ' * 40}\nWhat is 3 plus 2?\n")
    assert said == f"> {'12 plus ' * 40}\n{alone}"
    [line] = complaints.splitlines()
    assert line.startswith("error: ") and "leaves room for 63" in line


def test_interactive_questions_stand_behind_their_system_prompt(
    train_on_chats, converse, monkeypatch
):
    prompts, real = [], sample.generate_steps
    monkeypatch.setattr(sample, "generate_steps", lambda trunk, new, *args: (
        prompts.extend(new) or real(trunk, new, *args)))  # fmt: skip
    train_on_chats(["Be polite.", "Be brief."])
    tokenizer = load_run(Path("out/tiny"), CPU).tokenizer
    [asked], [system] = tokenizer.encode(["What is 3 plus 2?"]), tokenizer.encode(["Be kind.\n"])
    noted, _ = converse("What is 3 plus 2?\n" * 2)
    assert noted.count("2 different system prompts; none stands before this one") == 1
    assert "note" not in converse("What is 3 plus 2?\n" * 2, "--system=Be kind.")[0]
    assert prompts == 2 * [[*asked, tokenizer.sep]] + 2 * [[*system, *asked, tokenizer.sep]]


def test_ctrl_c_ends_an_answer_and_not_the_questions(tiny_run, converse, monkeypatch):
    tiny_run()
    whole, real = converse("What is 3 plus 2?\n", "--temperature=0")[0], sample.generate_steps

    def steps(*args):
        for number, step in enumerate(real(*args)):
            if number == 3 and not interrupted:
                interrupted.append(1)
                raise KeyboardInterrupt
            yield step

    interrupted = []
    monkeypatch.setattr(sample, "generate_steps", steps)
    said, _ = converse("What is 3 plus 2?\n" * 2, "--temperature=0")
    first, stopped, second = said.partition(" [stopped]\n")
    assert stopped and second == whole and len(first) < len(whole) and whole.startswith(first)


class Letters:
    """Text as bytes, a token each; a new line is the end. `falls_back`: as some tokenizers decode,
    of which an unfinished character spoils the ones before it."""

    eot = 10

    def __init__(self, falls_back):
        self.falls_back = falls_back

    def decode(self, ids):
        text = bytes(i for i in ids if i != self.eot)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(text) if self.falls_back else text.decode(errors="replace")


@pytest.mark.parametrize("falls_back", [False, True])
@pytest.mark.parametrize("text", [
    b"4 \xe2\x82\xac \xf0\x9f\x98\x80!\n", b"\xe2\x82", b"\n", b"a\xff\xffb\n", b"a\xe2\n",
    "é\ufffd\ufffd.\n".encode(),
])  # fmt: skip
def test_no_half_of_a_character_is_printed(text, falls_back, monkeypatch):
    """What is printed after each byte is whole, and in the end it is the text."""
    printed, whole = [], Letters(falls_back).decode(text)
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    steps = ((torch.tensor([0]), torch.tensor([byte])) for byte in text)
    monkeypatch.setattr(sample, "generate_steps", lambda *_: (
        step for step in steps if printed.append(out.getvalue()) is None))  # fmt: skip
    run = type("Run", (), {"tokenizer": Letters(falls_back), "model": None})
    sample.print_answer(run, sample.Args(), [1], contextlib.nullcontext)
    end = "\n" if text.endswith(b"\n") else " [cut off: no end of text]\n"
    for at, before in enumerate(printed):
        if not falls_back:  # all that is certain, and at once
            complete = text[:at].decode(errors="replace").rstrip("\ufffd")
            assert before == complete.rstrip("\n")
        assert not before.endswith("\ufffd")
    said = out.getvalue()
    assert said == whole + end or (falls_back and said.endswith(f"\n{whole}{end}"))


def test_in_a_terminal_ctrl_d_and_ctrl_c_leave(tiny_run):
    """A prompt, an answer behind the echoed question, and no traceback."""
    pty = pytest.importorskip("pty")
    tiny_run(max_iters=1)
    command = [sys.executable, str(ROOT / "sample.py"), *SAMPLE, "--interactive"]
    for leave in (b"\x04", b"\x03"):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs,
                                   start_new_session=True, preexec_fn=own_terminal)  # fmt: skip
        os.close(theirs)
        seen = read_until(ours, "> ")
        os.write(ours, b"What is 3 plus 2?\n")
        seen += read_until(ours, "> ")
        # Python misses a signal that comes between its prompt and its wait for a key.
        for _ in range(20):
            os.write(ours, leave)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
                break
        assert process.returncode == 0
        seen += read_until(ours, None)
        os.close(ours)
        assert "What is 3 plus 2?" in seen and "[cut off: no end of text]" in seen
        assert "Traceback" not in seen and "error" not in seen


def own_terminal():
    """Make stdin the terminal of this process, so that Ctrl-C in it is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_until(terminal, end):
    """What a terminal shows up to `end`, or until it is closed."""
    seen, deadline = "", time.time() + 60
    while end is None or not seen.endswith(end):
        assert time.time() < deadline, seen
        try:
            seen += os.read(terminal, 1000).decode(errors="replace")
        except OSError:  # closed
            assert end is None, seen
            break
    return seen


# --- the command ------------------------------------------------------------------------------


def answers(printed):
    return printed[printed.index("--- question") :]


def test_a_run_may_be_named_as_train_spells_it(tiny_run, capsys):
    tiny_run(max_iters=1)
    tiny_run(max_iters=2, out_dir="out/newer")
    printed = []
    for args in (["--out_dir=out/tiny"], ["out/tiny"], ["out/tiny/ckpt.pt"], []):
        capsys.readouterr()
        sample.main([*args, *ARGS, "--num_samples=1"])
        printed.append(capsys.readouterr().out)
    assert answers(printed[0]) == answers(printed[1]) == answers(printed[2])
    assert "run out/tiny/ckpt.pt, step 1," in printed[0]
    assert "run out/newer/ckpt.pt, step 2," in printed[3]  # the newest
    two = ["out/tiny", "--out_dir=out/newer", *ARGS]
    assert "one run at a time" in error_line(capsys, sample.main, two)
    line = error_line(capsys, sample.main, ["--out_dir=out/none", *ARGS])
    assert "no checkpoint out/none" in line


@pytest.mark.parametrize("script", [sample, evaluate])
def test_help_is_the_modules_text_and_its_fields(script, capsys):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as exit_:
            script.main([flag])
        printed = capsys.readouterr()
        assert exit_.value.code == 0 and printed.err == ""
        assert script.__doc__.strip() in printed.out
        for field in fields(script.Args):
            [line] = [line for line in printed.out.splitlines()
                      if line.startswith(f"  --{field.name}=")]  # fmt: skip
            assert str(field.default) in line
        comments = [line.partition("  # ")[2] for line in
                    inspect.getsource(script.Args).splitlines() if " = " in line]  # fmt: skip
        assert all(comment in printed.out for comment in comments)


@pytest.mark.parametrize("arg", [
    "--seed=99999999999999999999", "--seed=-1", "--temperature=nan", "--temperature=inf",
    "--temperature=-1", "--top_k=-1", "--top_p=0", "--top_p=1.5", "--num_samples=0",
    "--max_new_tokens=0", "--samples=3", "--dtype=float16", "--device=abacus",
])  # fmt: skip
def test_a_mistake_is_one_line(arg, capsys):
    key = arg[2:].partition("=")[0]
    assert key in error_line(capsys, sample.main, ["out/none", "--device=cpu", arg])


def test_two_runs_or_a_prompt_without_its_key_are_one_line(capsys):
    line = error_line(capsys, sample.main, ["out/a", "What is 3 plus 2?"])
    assert "one run at a time" in line and "--prompt=" in line


def test_interactive_takes_no_prompt(capsys):
    for option in ("--prompt=a", "--num_samples=2"):
        line = error_line(capsys, sample.main, ["out/a", "--interactive", option])
        assert option[2:].partition("=")[0] in line and "asks for questions" in line


def test_a_prompt_that_fills_the_context_is_one_line(tiny_run, capsys):
    tiny_run(max_iters=1)
    line = error_line(capsys, sample.main, [*SAMPLE, "--prompt=" + "12 plus " * 40])
    assert "leaves room for 63" in line
