"""A page on which one asks a run, and sees what [PRED] guesses before a word is written.

    python demo.py                  the newest run
    python demo.py out/nlrx_jepa    this one; a run at λ = 0 that lies beside it answers as well
    python demo.py --answers=FILE   guesses among the answers of a file, not those of train

Needs Gradio: pip install -r requirements-demo.txt. All that the page shows comes from this machine,
and without --host nobody on another one can open it. Ctrl-C ends it.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignment import verdict
from config import Config, fail, parse_args, what
from data import Data, same_split
from generate import generate_steps, score
from lab import cards, search
from lab.cards import Guess, Places, card, sentence
from plumbing.files import read_json, read_records
from plumbing.processes import pick_device, run_main
from run import Run, chosen_run, data_of, load_run, prompt_of
from views import frames, pred_tokens

SHOWN = 5  # known answers, and questions to begin with
# Fields that change nothing at λ = 0, and dtype: a run that moved may name what auto was.
OF_JEPA = ("jepa_weight", "jepa_loss", "jepa_dropout", "jepa_dropout_per", "jepa_warmup_iters",
           "spread", "spread_weight", "stop_grad", "ema", "objective", "dtype")  # fmt: skip


@dataclass(frozen=True)
class Args:
    # what the page shows
    answers: str = ""  # file of answers or pairs to guess among; empty: the answers of train
    field: str = ""  # of the file's rows, which holds the answer; empty: they are pairs
    n_answers: int = 2000  # the first so many of them
    baseline: str = ""  # a run at λ = 0 that answers as well; empty looks for one beside the run
    max_new_tokens: int = 256  # of an answer, at most; the context may end earlier
    pause: float = 1.0  # seconds between the guess and the first word: one sees which came first
    # where
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines open the page
    port: int = 7860  # 0 takes one that is free
    out_dir: str = ""  # folder of the run, as train.py spells it; RUN says the same
    best: bool = False  # the runs' best.pt (lowest val_ce) instead of their last checkpoint
    data_dir: str = ""  # folder of the data, if it is no longer where the run found it
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16


class Shown(NamedTuple):
    """What the page asks, and what it needs for that."""

    args: Args
    run: Run
    baseline: Run | None
    data: Data
    autocast: Callable
    measures: dict[str, float]  # of the run's alignment when it was last evaluated; may be empty
    table: search.Table | None = None  # known answers; None where Pred needs more than a question
    known: str = ""  # a sentence on the table, or on why there is none
    middle: np.ndarray | None = None  # (C,) the mean of the table's rows


def main(argv: list[str]) -> None:
    values, runs = parse_args(Args, argv, f"python demo.py [RUN] [--key=value ...]\n\n{__doc__}")
    args = Args(**values)
    if args.n_answers < 1 or args.max_new_tokens < 1 or not 0 <= args.pause <= 60:
        fail(f"n_answers={args.n_answers} and max_new_tokens={args.max_new_tokens} must be at "
             f"least 1, and pause={args.pause} from 0 to 60 seconds")
    if args.field and not args.answers:
        fail(f"field={args.field} is one of a file of answers; --answers=FILE names it")
    if importlib.util.find_spec("gradio") is None:
        fail("the page needs Gradio: pip install -r requirements-demo.txt")
    port = free_port(args.host, args.port)
    page = page_of(open_all(args, runs))
    host = f"[{args.host}]" if ":" in args.host else args.host  # ::1, as an address has it
    print(f"http://{host}:{port} shows the page; Ctrl-C ends it", flush=True)
    launch(page, host, port)


def free_port(host: str, port: int) -> int:
    """The port to listen at; one line and exit 2 if that is not possible."""
    if not host:  # a socket takes it for all addresses
        fail("host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 lets others open the page")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError, TypeError) as error:
            fail(f"the page cannot be served at host={host} port={port}: {error}; --port=0 takes a "
                 "port that is free")
        return probe.getsockname()[1]


# --- what the page needs ----------------------------------------------------------------------


def open_all(args: Args, runs: list[str]) -> Shown:
    """The run, the one to compare it with, its data, and the table of known answers."""
    device, autocast = pick_device(args.device, args.dtype)
    run = chosen_run(runs, args.out_dir, device, args.best)
    print(f"run {run.path}, step {run.step}, trained on {run.provenance['data']['dataset']}")
    path = Path(args.baseline) if args.baseline else baseline_beside(run)
    baseline = load_run(path, device, args.best) if path else None
    if baseline and baseline.config.jepa_weight:
        fail(f"baseline={path} was trained with JEPA (jepa_weight={baseline.config.jepa_weight}); "
             "name a run at λ = 0")
    print(f"beside it answers {baseline.path}" if baseline else "no run at λ = 0 lies beside it")
    data = data_of(run, args.data_dir)
    shown = Shown(args, run, baseline, data, autocast, measures_of(run))
    try:
        search.rows_of(run.config)
    except ValueError as error:
        return shown._replace(known=f"There is no guess to show: {error}.")
    train, n = data.pairs["train"], args.n_answers
    if args.answers:
        answers = search.answers_of(run, args)
        n_all, source = len(answers), args.answers
    else:
        answers = search.answers_in(run, train, n)
        n_all, source = len(train), "the training data"
    print(f"reading {min(n, n_all):,} answers of {source}; their embeddings are kept", flush=True)
    table = search.open_table(run, answers[:n], autocast)
    some = f"the first {n:,} of {n_all:,}" if n < n_all else f"all {n_all:,}"
    known = f"Known are {some} answers of {source}, {len(table.answers):,} different ones."
    middle = table.vectors.mean(0, dtype=np.float32)
    return shown._replace(table=table, known=known, middle=middle)


def measures_of(run: Run) -> dict[str, float]:
    """What the evaluation of this checkpoint, or else the last one, says of its alignment."""
    records = [r for r in read_records(run.path.parent / "metrics.jsonl") if "val_ce" in r]
    at_step = [r for r in records if r["step"] == run.step] or records or [{}]
    return {key.removeprefix("val_"): value for key, value in at_step[-1].items()}


def baseline_beside(run: Run) -> Path | None:
    """A folder beside the run's with the same config but λ = 0, trained on the same data."""

    def same(config: Config, provenance: dict) -> tuple:
        rest = {key: value for key, value in what(config).items() if key not in OF_JEPA}
        return rest, provenance["data"]["train_sha256"]

    paths = run.path.parent.parent.glob("*/ckpt.pt") if run.config.jepa_weight else ()
    for path in sorted(paths):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or older
            about = read_json(path.with_name("config.json"))
            config = Config(**about["config"])
            wanted = same(run.config, run.provenance)
            if not config.jepa_weight and same(config, about["provenance"]) == wanted:
                return path.parent
    return None


def split_of(shown: Shown, prompt: list[int]) -> tuple[str, str]:
    """The split that holds the question, and its right answer; two empty strings if none does."""
    n_question = len(prompt) - len(pred_tokens(shown.run.config, shown.run.tokenizer.vocab_size))
    for split, pairs in shown.data.pairs.items():
        for example in np.flatnonzero(pairs.question_length == n_question):
            if pairs.prompt(example) == prompt:
                return split, shown.run.tokenizer.decode(pairs.answer(example))
    return "", ""


def questions_to_begin_with(shown: Shown) -> list[str]:
    """Questions of validation, without what stands around them."""
    run, pairs, found = shown.run, shown.data.pairs["val"], {}
    [(before, after, _)] = frames([run.provenance["data"]], run.tokenizer, run.config)
    if run.config.views in ("split", "facts"):
        before, after = [], []
    for ids in (pairs.question(example) for example in range(min(len(pairs), 50))):
        if ids[: len(before)] == before:
            found[run.tokenizer.decode(ids[len(before) : len(ids) - len(after)]).strip()] = None
    return [question for question in found if 0 < len(question) <= 400][:SHOWN]


# --- a question, asked ------------------------------------------------------------------------


@dataclass
class Answer:
    """What a run has written so far."""

    run: Run
    ids: list[int] = field(default_factory=list)

    def text(self) -> str:
        return self.run.tokenizer.decode(self.ids)

    def grow(self, shown: Shown, prompt: list[int]) -> Iterator[None]:
        """Yields after every new token."""
        most, eot = shown.args.max_new_tokens, self.run.tokenizer.eot
        with contextlib.closing(generate_steps(self.run.model, [prompt], most, eot)) as steps:
            while True:
                with shown.autocast():  # anew: the next step may run in another thread
                    step = next(steps, None)
                if step is None:
                    return
                self.ids.append(int(step[1]))
                yield

    def card(self, place: str, judged: tuple[str, str] | None = None) -> str:
        """Of the answer so far; `judged`, when it is finished, by (right answer, scoring)."""
        ids, decode, n = self.ids, self.run.tokenizer.decode, cards.counted(len(self.ids))
        if judged is None:
            return cards.growing_card(place, self.text(), decode(ids[:-1]), n)
        ended = "ended by itself" if ids[-1] == self.run.tokenizer.eot else "was cut off"
        scores = score(self.text(), *judged)
        return cards.answer_card(place, self.text(), f"It {ended} after {n}.", judged[0], scores)


def first_page(shown: Shown) -> Places:
    return cards.at_first(shown.run, shown.baseline, shown.known if shown.table is None else "")


def ask(shown: Shown, question: str) -> Iterator[Places]:
    """What the page shows of a question, again after every token. Closing it ends the answers."""
    run, page = shown.run, first_page(shown)
    question = question.strip().encode(errors="replace").decode()  # half a character becomes a ?
    try:
        if not question:
            raise ValueError("there is no question yet; write one, or choose one below")
        prompt = prompt_of(run, question)
    except ValueError as error:
        yield page._replace(said=sentence(f"This cannot be asked: {error}.", "no"))
        return
    split, right = split_of(shown, prompt)
    sure = same_split(run.provenance["data"], shown.data.provenance)
    page = page._replace(said=sentence(cards.where_from(run, split, sure)))
    query = None
    if shown.table:
        try:
            [query] = search.embed_questions(run, [question], shown.autocast)
            guess = guess_of(shown, query)
            page = page._replace(guess=cards.guess_card(guess))
        except ValueError as error:  # there is room for the question, but not for [PRED] after it
            page = page._replace(guess=card("guess", sentence(f"No guess: {error}.", "no")))
    yield page._replace(answer=card("answer", sentence("Nothing is written yet.")))
    time.sleep(shown.args.pause)

    answers = {"answer": Answer(run)}
    growing = [answers["answer"].grow(shown, prompt)]
    if shown.baseline:
        try:
            prompt = prompt_of(shown.baseline, question)
            answers["plain"] = Answer(shown.baseline)
            growing.append(answers["plain"].grow(shown, prompt))
        except ValueError as error:
            page = page._replace(plain=card("plain", sentence(f"Not asked: {error}.", "no")))
    for _ in itertools.zip_longest(*growing):  # a token each
        page = page._replace(**{place: some.card(place) for place, some in answers.items()})
        yield page
    judged = right, shown.data.scoring
    page = page._replace(**{place: some.card(place, judged) for place, some in answers.items()})
    text = answers["answer"].text()
    if query is not None:
        cosine = cosine_of(shown, query, text)
        page = page._replace(guess=cards.guess_card(guess, right, text, cosine))
    yield page._replace(mask=cards.mask_card(run, question, text))


def guess_of(shown: Shown, query: np.ndarray) -> Guess:
    """The known answers nearest to Pred (C,), and whether to trust them."""
    cosines, rows = search.nearest(shown.table.vectors, query[None], SHOWN)
    near = [(float(cosine), shown.table.answers[row]) for cosine, row in zip(cosines[0], rows[0])]
    doubt = cards.DOUBTS.get(verdict(shown.measures) if shown.measures else "", "")
    if not shown.run.config.jepa_weight:
        doubt = "This run was trained at λ = 0: nothing taught its [PRED], so the guess is noise."
    return Guess(near, float(shown.middle @ query), shown.known, doubt)


def cosine_of(shown: Shown, query: np.ndarray, answer: str) -> float | None:
    """Of Pred (C,) with Enc of the answer; None for one that does not fit into the context."""
    try:
        [vector] = search.embed_answers(shown.run, [answer], shown.autocast)
    except ValueError:
        return None
    return float(vector @ query)


# --- the page ---------------------------------------------------------------------------------


class Visit:
    """Somebody with the page before them, who has one question answered at a time: a newer one
    ends the one before, and so does `newest = None`. (Gradio's own way to cancel breaks off in an
    error where two clicks come close together.)"""

    def __init__(self):
        self.newest, self.busy = None, threading.Lock()

    def pages(self, pages: Iterator[Places]) -> Iterator[Places]:
        """What is to be shown of a new question, after the one before has left."""
        self.newest = pages
        with self.busy, contextlib.closing(pages):
            for page in pages:
                if self.newest is not pages:
                    yield page._replace(said=sentence("Stopped: no more will be written here."))
                    return
                yield page


def page_of(shown: Shown):
    """The page as Gradio's Blocks."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import gradio as gr

    questions, title = questions_to_begin_with(shown), "nanoJEPA: a guess before the first word"
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.HTML(cards.intro(shown.run))
        box = gr.Textbox(label="Your question", max_lines=8, elem_id="question")
        with gr.Row():
            button = gr.Button("Ask", variant="primary", scale=0, elem_id="ask")
            stop = gr.Button("Stop", scale=0, elem_id="stop")
        chosen = gr.Dataset(components=[box], samples=[[question] for question in questions],
                            label="Or choose one that it was not trained on", elem_id="chosen",
                            visible=bool(questions))  # fmt: skip
        first, said = first_page(shown), gr.HTML(elem_id="said")
        with gr.Row(elem_id="beside"):
            beside = [gr.HTML(getattr(first, place), elem_id=place)
                      for place in ("guess", "answer", "plain")]  # fmt: skip
        mask = gr.HTML(first.mask, elem_id="mask")
        gr.HTML(cards.run_card(shown.run, shown.measures), elem_id="run")
        visits = defaultdict(Visit)

        def answers(question, request: gr.Request):
            yield from visits[request.session_hash].pages(ask(shown, question))

        def stopped(request: gr.Request):
            visits[request.session_hash].newest = None

        waits = json.dumps(sentence("The question waits for its turn."))
        for event in (
            gr.on([button.click, box.submit], None, None, said, js=f"() => {waits}"),
            chosen.click(None, chosen, [box, said],
                         js=f"i => [{json.dumps(questions)}[i], {waits}]"),
        ):  # fmt: skip
            event.then(answers, box, [said, *beside, mask], show_progress="hidden",
                       trigger_mode="multiple", concurrency_limit=8, concurrency_id="ask")
        stop.click(stopped)
    return page


def launch(page, host: str, port: int, block: bool = True):
    """Serve the page, out of this machine's files alone."""
    import gradio as gr

    blue = {f"button_primary_background_fill{state}{mode}": "#2a6f97"
            for state in ("", "_hover") for mode in ("", "_dark")}  # fmt: skip
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace"])
    theme.set(**blue)
    # Gradio looks at its own page once, and not through a proxy.
    bare = host.strip("[]")
    os.environ["NO_PROXY"] = f"{os.environ.get('NO_PROXY', '')},{bare},localhost,127.0.0.1"
    return page.launch(server_name=host, server_port=port, theme=theme, css=cards.CSS, quiet=True,
                       share=False, ssr_mode=False, run_history=False, footer_links=[],
                       prevent_thread_lock=not block)  # fmt: skip


if __name__ == "__main__":
    run_main(main)
