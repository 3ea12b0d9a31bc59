"""Claims about demo.py: what stands on the page and when, without a browser and in one.

The browser is a headless Chromium of the system, driven by selenium; no request may leave this
machine, neither the browser's nor the server's."""

import gc
import importlib.util
import json
import re
import shutil
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import TINY, error_line, release, sums

import demo
import train
from generate import generate
from lab import cards
from lab.search import embed_answers, embed_questions
from plumbing.files import read_json
from run import prompt_of

ARGS = demo.Args(device="cpu", dtype="float32", max_new_tokens=12, pause=0.0)
QUESTION, UNKNOWN = sums(1, 500)[0]["question"], "What is 1 plus 1?"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder, which the tests of this module run in, with pairs and a function that trains."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "mine").mkdir()
    for split, rows in (("train", sums(100)), ("val", sums(20, 500))):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"mine/{split}.jsonl").write_text(lines)

    def run(name, *options):
        train.main([*TINY, "--dataset=mine", "--learning_rate=3e-3", f"--out_dir=out/{name}",
                    *options])  # fmt: skip
        release()

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "plot_losses", lambda folder: None)
        longer = ["--max_iters=60", "--eval_interval=30"]  # until it answers something
        run("jepa", *longer)
        run("plain", "--jepa_weight=0", *longer)
        yield run


@pytest.fixture(scope="module")
def shown(here):
    return demo.open_all(ARGS, ["out/jepa"])


def plain(html: str) -> str:
    """The words of a piece of HTML."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html)).strip()


def written_by(run, question: str) -> str:
    """What `generate` makes of a question, all at once."""
    [ids] = generate(run.model, [prompt_of(run, question)], ARGS.max_new_tokens, run.tokenizer.eot)
    return run.tokenizer.decode(ids)


# --- what stands on the page ------------------------------------------------------------------


def test_the_guess_comes_before_the_first_word_then_a_token_at_a_time(shown):
    first, *growing, last = demo.ask(shown, QUESTION)
    assert "Nothing is written yet" in first.answer and first.guess.count("<li>") == 5
    n_tokens = [int(re.search(r"(\d+) token", page.answer)[1]) for page in growing]
    assert n_tokens == list(range(1, 13))
    assert all(page.guess == first.guess for page in growing)
    assert cards.escape(written_by(shown.run, QUESTION)) in last.answer
    assert cards.escape(written_by(shown.baseline, QUESTION)) in last.plain
    assert "held-out question (val)" in first.said and "The right answer is" in last.answer
    assert "<table>" in last.mask and "<table>" not in growing[-1].mask


def test_the_guess_names_the_nearest_of_the_known_answers(shown):
    [query] = embed_questions(shown.run, [QUESTION], shown.autocast)
    known = list(dict.fromkeys(row["answer"] for row in sums(100)))
    cosines = embed_answers(shown.run, known, shown.autocast) @ query
    guess = demo.guess_of(shown, query)
    best = np.argsort(-cosines)[:5]
    assert [text for _, text in guess.near] == [known[row] for row in best]
    np.testing.assert_allclose([cosine for cosine, _ in guess.near], cosines[best], atol=1e-3)
    assert guess.usual == pytest.approx(cosines.mean(), abs=1e-3)
    assert f"all 100 answers of the training data, {len(known)} different ones" in guess.known
    *_, last = demo.ask(shown, QUESTION)
    answer = written_by(shown.run, QUESTION)
    own = embed_answers(shown.run, [answer], shown.autocast)[0] @ query
    assert f"how near it came to the guess: {own:.3f} {answer.split()[0]}" in plain(last.guess)


def test_where_a_question_comes_from_is_said(shown):
    for question, said in ((sums(1)[0]["question"], "was trained on this very question"),
                           (QUESTION, "held-out question (val)"), (UNKNOWN, "is yours")):
        first = next(demo.ask(shown, f"  {question}\n"))
        assert said in first.said
    another = replace(shown.data, provenance={**shown.data.provenance, "val_sha256": "0"})
    first = next(demo.ask(shown._replace(data=another), QUESTION))
    assert "trained with another split" in first.said
    mixed = replace(shown.run, provenance={"data": {"systems": "2 or more"}})
    assert "2 or more different system prompts stood before" in cards.where_from(mixed, "", True)
    *_, last = demo.ask(shown, UNKNOWN)
    assert "right" not in plain(last.answer)
    assert demo.questions_to_begin_with(shown) == [row["question"] for row in sums(5, 500)]


@pytest.mark.parametrize("question, said", [
    ("", "no question yet"), (" \n\t", "no question yet"),
    ("12 plus " * 12_500, "tokens, its end mark included; the context of out/jepa/ckpt.pt leaves "
     "room for 63"), ("a" * 100_000, "leaves room for 63"), ("🙂" * 100_000, "leaves room for 63"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_a_sentence(question, said, shown):
    [page] = demo.ask(shown, question)
    assert said in page.said and len(page.said) < 300
    assert page[1:] == demo.first_page(shown)[1:]


@pytest.mark.parametrize("question", ["二加三等于几？", "🙂+🙂=?", "ما هو 2 زائد 3؟", "\ud83d half",
                                      "\0\x1b[1m", "<script>alert(1)</script>"])  # fmt: skip
def test_any_script_is_answered_and_none_is_markup(question, shown):
    *_, last = demo.ask(shown, question)
    assert " token" in last.answer and "<table>" in last.mask
    assert not any("<script" in html for html in last)


def test_closing_a_question_ends_its_answers(shown, monkeypatch):
    open_ones, real = Counter(), demo.generate_steps

    def steps(trunk, *args):
        open_ones[trunk] += 1
        try:
            yield from real(trunk, *args)
        finally:
            open_ones[trunk] -= 1

    monkeypatch.setattr(demo, "generate_steps", steps)
    asked = demo.ask(shown, QUESTION)
    for _ in range(4):
        next(asked)
    assert sorted(open_ones.values()) == [1, 1]
    asked.close()
    assert sorted(open_ones.values()) == [0, 0]


def test_several_ask_one_model_at_once(shown):
    """Each gets what it would have got alone; the answers of four grow at a time."""
    questions = [row["question"] for row in sums(8, 500)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda question: [*demo.ask(shown, question)][-1], questions))
    for question, page in zip(questions, found):
        assert page == [*demo.ask(shown, question)][-1]


def test_a_visitor_has_one_question_answered_at_a_time(shown):
    visit, later, asked = demo.Visit(), [], demo.ask(shown, QUESTION)
    first = visit.pages(asked)
    for _ in range(3):
        next(first)
    newer = threading.Thread(
        target=lambda: later.extend(visit.pages(demo.ask(shown, UNKNOWN))))  # fmt: skip
    newer.start()
    while visit.newest is asked:
        time.sleep(0.01)
    assert later == []  # it waits
    assert "Stopped" in next(first).said and next(first, None) is None
    newer.join()
    assert cards.escape(written_by(shown.run, UNKNOWN)) in later[-1].answer
    third = visit.pages(demo.ask(shown, QUESTION))
    next(third)
    visit.newest = None  # the button Stop
    assert "Stopped" in next(third).said and next(third, None) is None


def test_the_mask_is_that_of_the_row_in_training(shown):
    """Cells by hand: a question of n tokens, its answer of m, [PRED], and the answer again."""
    html, tokenizer = cards.mask_card(shown.run, "2 + 3?", "$5$\n"), shown.run.tokenizer
    (question, answer) = tokenizer.encode(["2 + 3?", "$5$\n"])
    n, m = len(question) + 1, len(answer) + 1  # an end mark each
    lines = [re.findall(r'<td class="b(\d)">', line) for line in html.split("<tr")[2:]]
    q, a = ["1"] * n, ["2"] * m
    want = [q[: i + 1] for i in range(n)] + [q + a[: i + 1] for i in range(m)]
    assert [[cell for cell in line if cell != "0"] for line in lines[: n + m]] == want
    assert [cell for cell in lines[n + m] if cell != "0"] == [*q, "4"]
    assert all(set(line) == {"0", "3"} for line in lines[n + m + 1 :])
    assert len(lines) == n + m + 1 + m and {len(line) for line in lines} == {len(lines)}
    assert "[PRED] sees question" in plain(html) and "answer again sees itself alone" in plain(html)
    assert "<th>$</th>" in html and "too many to read" not in html
    assert "too many to read" in cards.mask_card(shown.run, "2 + 3? " * 4, "5")
    assert "longer than the context of 64" in cards.mask_card(shown.run, "2 + 3? " * 40, "5")


def test_the_run_is_shown_with_its_last_evaluation(shown):
    text = plain(cards.run_card(shown.run, shown.measures))
    assert f"matched {shown.measures['matched']:.2f} mean cosine" in text
    assert "On held-out pairs, after 60 steps" in text and "100 pairs of mine from mine" in text
    assert shown.run.provenance["data"]["train_sha256"][:12] in text and "commit" in text
    for name, matched, mismatched in (("collapsed", 0.99, 0.98), ("aligned", 0.9, 0.1),
                                      ("partly aligned", 0.9, 0.6), ("not aligned", 0.1, 0.1),
                                      ("of one answer only", 0.9, np.nan),
                                      ("not finite", np.nan, 0.1)):  # fmt: skip
        measures = shown.measures | {"matched": matched, "mismatched": mismatched}
        text = plain(cards.run_card(shown.run, measures))
        assert f"Embeddings: {name}. {cards.VERDICTS[name]}" in text
        doubt = demo.guess_of(shown._replace(measures=measures), shown.middle).doubt
        assert bool(doubt) == (name in ("collapsed", "not aligned"))
    assert "No evaluation" in cards.run_card(shown.run, {})


def test_an_answer_is_judged_as_evaluate_judges_it():
    for text, right, scores, said in (
        ("5", "5", {"exact": True}, "That is right , to the letter"),
        ("5.0", "5", {"exact": True}, "That is right, though written otherwise ."),
        ("aa*", "a+", {"exact": False, "equivalent": True}, "right, though written otherwise"),
        ("6", "5", {"exact": False}, "That is not right . The right answer is: 5"),
    ):
        assert said in plain(cards.answer_card("answer", text, "", right, scores))


# --- other runs -------------------------------------------------------------------------------


def test_a_run_without_jepa_says_so(here):
    shown = demo.open_all(ARGS, ["out/plain"])
    assert shown.baseline is None and "itself one at λ = 0" in demo.first_page(shown).plain
    *_, last = demo.ask(shown, QUESTION)
    assert "nothing taught its [PRED]" in last.guess
    assert "training leaves out [PRED]" in last.mask


@pytest.mark.parametrize("options, said", [
    (["--layout=reverse"], "a run with layout=reverse does not predict an answer from its question "
     "alone"), (["--views=steps"], "a run with views=steps"),
    (["--views=split", "--labels=all"], "a run with views=split"), (["--n_pred=0"], ""),
    (["--layout=plan", "--n_pred=2"], ""), (["--layout=front", "--pooling=mean"], ""),
])  # fmt: skip
def test_other_layouts_answer_with_or_without_a_guess(options, said, here):
    here("other", "--max_iters=1", *options)
    shown = demo.open_all(ARGS, ["out/other"])
    assert (shown.table is None) == bool(said)
    *_, last = demo.ask(shown, QUESTION)
    assert " token" in last.answer and "<table>" in last.mask and said in last.guess
    assert "The model answers all the same" in last.guess or not said
    assert cards.intro(shown.run).count("[PRED]") == {"--n_pred=0": 0, "--layout=plan": 4}.get(
        options[0], 2)  # fmt: skip


def test_a_question_that_leaves_no_room_for_a_guess_is_answered_all_the_same(here):
    here("wide", "--n_pred=3", "--max_iters=2")
    shown = demo.open_all(ARGS, ["out/wide"])
    room = shown.run.config.block_size - 1
    question = "1"
    while len(prompt_of(shown.run, question)) < room:
        question += " 1"
    assert len(prompt_of(shown.run, question)) == room
    last = list(demo.ask(shown, question))[-1]
    assert "No guess: longer than the context" in plain(last.guess)
    assert "It " in plain(last.answer) and "after" in plain(last.answer)


def test_a_pretrained_run_is_asked_in_its_template(here, tmp_path):
    pytest.importorskip("transformers", reason="needs requirements-hf.txt")
    from tiny_models import tiny_folder

    trunk = tiny_folder(tmp_path / "llama")
    drop = ("--tokenizer", "--bpe", "--n_layer", "--n_head", "--n_embd")
    options = [option for option in TINY if not option.startswith(drop)]
    chat = {"messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2"},
                         {"role": "assistant", "content": "3"}]}  # fmt: skip
    lines = json.dumps(chat) + "\n"
    Path("chat.jsonl").write_text("".join(lines.replace("1+2", f"{i}+2") for i in range(40)))
    train.main([*options, f"--trunk={trunk}", "--template=chat", "--dataset=chat.jsonl",
                "--eval_pairs=4", "--out_dir=out/pretrained", "--max_iters=1"])  # fmt: skip
    release()
    shown = demo.open_all(ARGS, ["out/pretrained"])
    question, *_ = demo.questions_to_begin_with(shown)
    assert re.fullmatch(r"\d+\+2", question)  # without the template and the system prompt
    first, *_, last = demo.ask(shown, question)
    assert "held-out question (val)" in first.said and " token" in last.answer
    assert "&lt;mark&gt;" in last.mask and "<mark>" not in last.mask
    assert prompt_of(shown.run, question) == shown.data.pairs["val"].prompt(0)


def test_known_answers_may_come_from_a_file_and_are_capped(shown):
    Path("known.txt").write_text("seven\neight\nseven\n\n" + "9 " * 200 + "\n")
    for n, some in ((2, "the first 2 of 4"), (4, "all 4")):
        again = demo.open_all(replace(ARGS, answers="known.txt", n_answers=n), ["out/jepa"])
        assert again.table.answers == ["seven", "eight"]  # the long one has no place
        assert again.known == f"Known are {some} answers of known.txt, 2 different ones."
    again = demo.open_all(replace(ARGS, n_answers=7), ["out/jepa"])
    assert "the first 7 of 100 answers of the training data" in again.known
    assert next(demo.ask(again, QUESTION)).guess.count("<li>") == 5


def test_the_baseline_beside_a_run_differs_in_nothing_but_jepa(shown):
    assert shown.baseline.path == Path("out/plain/ckpt.pt")
    path = Path("out/plain/config.json")
    about, text = read_json(path), path.read_text()
    for key, value, found in (("seed", 7, False), ("jepa_weight", 0.5, False),
                              ("spread", "vicreg", True), ("device", "cuda", True),
                              ("nonsense", 1, False)):  # fmt: skip
        path.write_text(json.dumps({**about, "config": {**about["config"], key: value}}))
        assert bool(demo.baseline_beside(shown.run)) == found, key
    path.write_text("{")
    assert demo.baseline_beside(shown.run) is None
    path.write_text(text)
    alone = plain(demo.first_page(shown._replace(baseline=None)).plain)
    assert "No run at λ = 0" in alone and alone.endswith(
        "--dataset=mine --learning_rate=3e-3 --max_iters=60 --eval_interval=30 --jepa_weight=0 "
        "--out_dir=out/jepa-baseline")  # fmt: skip


# --- the command ------------------------------------------------------------------------------


def test_a_users_mistake_is_one_line(here, capsys, monkeypatch, tmp_path):
    def line(*argv):
        return error_line(capsys, demo.main, ["--device=cpu", "--port=0", *argv])

    def gradio_is(found):
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name: found if name == "gradio" else real(name))  # fmt: skip

    real = importlib.util.find_spec
    gradio_is("here")
    assert "no checkpoint out/none" in line("out/none")
    assert "one run at a time" in line("out/jepa", "out/plain")
    assert "baseline=out/jepa was trained with JEPA" in line("out/jepa", "--baseline=out/jepa")
    assert "n_answers=0" in line("--n_answers=0") and "pause=nan" in line("--pause=nan")
    assert "cannot read known" in line("out/jepa", "--answers=known")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port={port}" in line(f"--port={port}") and "--port=0" in line(f"--port={port}")
    assert "port=99999" in line("--port=99999") and "host=192.0.2.1" in line("--host=192.0.2.1")
    assert "host is empty" in line("--host=") and "host=ää" in line("--host=" + "ä" * 70)
    monkeypatch.chdir(tmp_path)
    assert "no run under out/ yet" in line()
    assert "--answers=FILE" in line("--field=output")
    gradio_is(None)
    assert "pip install -r requirements-demo.txt" in line()


@pytest.mark.parametrize("host, shown_as", [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_an_address_is_written_as_browsers_read_it(here, capsys, monkeypatch, host, shown_as):
    served = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "here")
    monkeypatch.setattr(demo, "free_port", lambda host, port: 7)
    monkeypatch.setattr(demo, "page_of", lambda shown: "page")
    monkeypatch.setattr(demo, "launch", lambda *about: served.append(about))
    demo.main(["out/jepa", "--device=cpu", f"--host={host}"])
    assert served == [("page", shown_as, 7)]
    assert f"http://{shown_as}:7 shows the page" in capsys.readouterr().out


def test_help_lists_the_fields(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{field.name}=" in printed for field in fields(demo.Args))


# --- in a browser -----------------------------------------------------------------------------

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if not path]

def in_browser(test):
    """Skipped where there is none. Gradio and selenium leave warnings of their own."""
    skip = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here")
    return skip(pytest.mark.filterwarnings("ignore")(test))


FLAGS = ("--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
         "--disable-background-networking --disable-component-update --disable-sync "
         "--disable-dev-shm-usage --window-size=1280,1400")  # fmt: skip
STEP = {"seconds": 0.05}  # that a token takes


@pytest.fixture(scope="module")
def served(shown):
    """The page's address. Answers are slowed down, so that one sees them grow."""
    real, connect, outside = demo.generate_steps, socket.socket.connect, []

    def slowly(*args):
        for step in real(*args):
            time.sleep(STEP["seconds"])
            STEP["taken"] = STEP.get("taken", 0) + 1
            yield step

    def watched(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_here(f"//{address[0]}"):
            outside.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "generate_steps", slowly)
        patch.setattr(socket.socket, "connect", watched)
        page = demo.page_of(shown._replace(args=replace(ARGS, pause=1.0)))
        port = demo.free_port("127.0.0.1", 0)
        demo.launch(page, "127.0.0.1", port, block=False)
        yield f"http://127.0.0.1:{port}/"
        page.close()
        gc.collect()  # of Gradio's event loops; here their warnings are ignored
    assert not outside  # the server asks nobody either


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def is_here(url: str) -> bool:
    """Is the address this machine's, or none of a network at all?"""
    parts = urlsplit(url)
    inside = parts.scheme in ("data", "blob", "about") or parts.scheme.startswith("chrome")
    return inside or parts.hostname in ("127.0.0.1", "localhost", "::1")


def test_an_address_is_told_from_another():
    assert all(map(is_here, ("http://127.0.0.1:7860/a", "data:image/png;base64,", "//127.0.0.1")))
    assert not any(map(is_here, ("https://fonts.googleapis.com/css", "ws://10.0.0.1/", "//8.8.8.8",
                                 "http://127.0.0.1.example.org/")))  # fmt: skip


class Visitor:
    """A tab with the page in it."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.switch_to.new_window("tab")
        self.handle = driver.current_window_handle
        driver.get(address)
        self.until(lambda: self.find("#ask"))

    def find(self, selector):
        self.driver.switch_to.window(self.handle)
        return self.driver.find_elements("css selector", selector)

    def text(self, place):
        self.driver.switch_to.window(self.handle)
        return self.driver.execute_script(
            "return document.getElementById(arguments[0]).innerText", place)  # fmt: skip

    def ask(self, question):
        [box] = self.find("#question textarea")
        self.driver.execute_script(  # keys could not write an emoji
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))", box, question,
        )  # fmt: skip
        self.click("#ask")

    def click(self, selector):
        self.find(selector)[0].click()

    def until(self, holds, seconds=30):
        started = time.time()
        while not (found := holds()):
            assert time.time() - started < seconds, [self.text(p) for p in ("said", "answer")]
            time.sleep(0.02)
        return found

    def leave(self):
        if self.handle in self.driver.window_handles:
            self.driver.switch_to.window(self.handle)
            self.driver.close()
            self.driver.switch_to.window(self.driver.window_handles[0])

    def finished(self):
        return self.until(lambda: self.find("#mask table"))


@pytest.fixture
def visitor(served, chromium):
    """A function that opens the page in a tab; afterwards no tab may have asked anybody else."""
    opened = []

    def visit():
        opened.append(Visitor(chromium, served))
        return opened[-1]

    yield visit
    messages = [json.loads(each["message"])["message"] for each in chromium.get_log("performance")]
    urls = [message["params"].get("request", message["params"])["url"] for message in messages
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated")]
    errors = [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    for some in opened:
        some.leave()
    assert sum(url.startswith(served) for url in urls) > 5  # the log is one
    assert [url for url in urls if not is_here(url)] == [] and errors == []


@in_browser
def test_a_visitor_sees_the_guess_and_then_the_answer_grow(visitor, shown):
    page = visitor()
    assert "[PRED]" in page.driver.page_source and "out/jepa/ckpt.pt" in page.text("run")
    assert "It appears here" in page.text("answer")
    page.click("#chosen .gallery-item, #chosen button")  # the first question
    page.until(lambda: len(page.find("#guess li")) == 5)
    assert "Nothing is written yet" in page.text("answer")  # and the guess stands there
    states = []
    while not page.find("#mask table"):
        states += [text for text in [page.text("answer")] if text not in states]
    tokens = [int(found[1]) for found in re.finditer(r"(\d+) token", " ".join(states))]
    assert len(set(tokens)) > 3 and tokens == sorted(tokens)
    assert "ended by itself" in page.text("answer") or "was cut off" in page.text("answer")
    for place, run in (("answer", shown.run), ("plain", shown.baseline)):
        [said, *_] = [pre.text for pre in page.find(f"#{place} pre")]
        assert said.split() == written_by(run, QUESTION).split()
    assert "held-out question (val)" in page.text("said") and len(page.find("#guess li")) == 6
    assert "[PRED] sees question" in " ".join(page.text("mask").split())
    assert page.find("#mask td.b1 i")[0].size["width"] == 15  # it has its looks


@in_browser
def test_what_cannot_be_asked_is_said_and_the_page_lives_on(visitor):
    page = visitor()
    for question, said in (("", "no question yet"), ("What is 3 plus 4? " * 5556, "leaves room"),
                           (QUESTION, "held-out"), (" ", "no question yet"),
                           ("二加三等于几？ 🙂 ما هو", "is yours")):  # fmt: skip
        page.ask(question)
        page.until(lambda said=said: said in page.text("said"))
        if said in ("held-out", "is yours"):
            page.finished()


@in_browser
def test_a_stopped_question_stops_and_another_may_be_asked(visitor, shown, monkeypatch):
    page = visitor()
    monkeypatch.setitem(STEP, "seconds", 0.5)
    page.ask(QUESTION)
    page.until(lambda: "1 token" in page.text("answer"))
    page.click("#stop")
    page.until(lambda: "Stopped" in page.text("said"))
    time.sleep(1)  # the token that was in the making
    taken, text = STEP["taken"], page.text("answer")
    time.sleep(1.5)
    assert (STEP["taken"], page.text("answer")) == (taken, text) and not page.find("#mask table")
    page.ask(UNKNOWN)  # and one may ask anew without stopping first
    page.until(lambda: "is yours" in page.text("said") and "1 token" in page.text("answer"))
    monkeypatch.setitem(STEP, "seconds", 0.05)
    for chosen in page.find("#chosen .gallery-item, #chosen button")[:2]:  # at once
        chosen.click()
    page.until(lambda: "held-out" in page.text("said"))
    page.finished()
    [said, *_] = [pre.text for pre in page.find("#answer pre")]
    assert said.split() == written_by(shown.run, sums(2, 500)[1]["question"]).split()
    monkeypatch.setitem(STEP, "seconds", 0.5)
    page.ask(QUESTION)
    page.until(lambda: "1 token" in page.text("answer"))
    page.leave()
    time.sleep(2)
    taken = STEP["taken"]
    time.sleep(1.5)
    assert STEP["taken"] == taken  # nobody writes for one who has left


@in_browser
def test_two_visitors_at_once_each_get_their_own(visitor, shown):
    asked = {QUESTION: visitor(), sums(2, 500)[1]["question"]: visitor()}
    for question, page in asked.items():
        page.ask(question)
    both = set()
    while len(both) < 2 and not all(page.find("#mask table") for page in asked.values()):
        growing = [" token" in page.text("answer") for page in asked.values()]
        both |= {all(growing)}
    for question, page in asked.items():
        page.finished()
        [said, *_] = [pre.text for pre in page.find("#answer pre")]
        assert said.split() == written_by(shown.run, question).split()
    assert True in both  # at one time
