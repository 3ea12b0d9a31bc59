"""How many held-out questions does a run answer right? Answers, scored, with 95 % intervals.

    python evaluate.py                     the newest run, on its test split
    python evaluate.py RUN RUN ...         several, each compared with the first on the same rows
    python evaluate.py RUN --file=p.jsonl  on a file of pairs, all of it

Answers are greedy, or the best of several (--samples). Writes accuracy.json and generations.jsonl
(a line per answer) into the run's folder; an interrupted evaluation goes on where it stopped. A
right answer, `exact`, is the same number after the last #### or the very string: training decided
by its data which, --score says otherwise. `prefix`: the answer starts with the target. `contains`:
the target, or its number, stands somewhere in it. `stopped`: it ended by itself. `equivalent`
(regexes): it describes the same lines.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import CHOICES, fail, parse_args, relocated
from data import questions_seen, read_questions
from generate import SHARES, Asking, answer, longest_answer, share_of
from plumbing.files import append_lines, read_records, set_aside, write_json, write_lines
from plumbing.jsonl import JsonLines, Listed
from plumbing.output import Bar
from plumbing.processes import clock, dtype_on, pick_device, run_main, versions
from plumbing.scoring import refuse_no_number
from plumbing.stats import mcnemar, wilson
from run import Run, data_of, load_run, runs_newest_first
from views import Pairs, tokenize


@dataclass(frozen=True)
class Args:
    # which questions
    split: str = "test"  # test | val | train
    file: str = ""  # a file of pairs (.jsonl, .csv, ...) instead of the run's own split
    n: int = 0  # the first n of them; 0 is all
    best: bool = False  # the run's best.pt (lowest val_ce) instead of its last checkpoint
    data_dir: str = ""  # folder of the data, if it is no longer where the run found it
    out_dir: str = ""  # folder of the run, as train.py spells it; RUN says the same
    # how to answer and score
    max_new_tokens: int = 0  # at most; 0 is the longest answer of train and of what is asked
    batch_size: int = 64  # questions at a time
    score: str = "auto"  # auto (the run's) | number (after ####) | final (alone) | string | regex
    # choosing among several answers to a question
    samples: int = 0  # answers drawn beside the greedy one, all in memory; the best is scored
    temperature: float = 0.7  # of what is drawn
    judge: float = 0.0  # weight of cos(Pred, Enc) beside the log-probability in choosing it
    # where
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16

    def __post_init__(self):
        if self.score not in CHOICES["score"]:
            fail(f"score={self.score} is not one of {', '.join(CHOICES['score'])}")
        for key in ("n", "max_new_tokens", "samples", "judge"):
            if getattr(self, key) < 0:
                fail(f"{key}={getattr(self, key)} must not be below 0")
        if not 0 < self.temperature < math.inf or (self.judge and not self.samples):
            fail(f"temperature={self.temperature} must be above 0 and finite; judge={self.judge} "
                 f"chooses among several answers, samples={self.samples} gives none")


def main(argv: list[str]) -> None:
    usage = f"python evaluate.py [RUN ...] [--key=value ...]\n\n{__doc__}"
    values, names = parse_args(Args, argv, usage)
    args = Args(**values)
    if args.split not in ("train", "val", "test") or args.batch_size < 1:
        fail(f"split={args.split} must be test, val or train, and batch_size={args.batch_size} "
             "at least 1")
    names += [args.out_dir] if args.out_dir else []
    device, autocast = pick_device(args.device, args.dtype)
    results = []
    for path in [Path(name) for name in names] or runs_newest_first()[:1]:
        results.append(evaluate(load_run(path, device, args.best), args, autocast))
        args = replace(args, score=results[0][0]["score"])  # one rule for all that are compared
    print_table([summary for summary, _ in results])
    for other in results[1:]:
        print(comparison(results[0], other))


def print_table(summaries: list[dict]) -> None:
    """A row per run: questions, those of them that were too long, and shares of all of them with
    their 95 % intervals."""
    keys = [key for key in SHARES if key in summaries[0]]
    width = max(len("run"), *(len(summary["run"]) for summary in summaries))
    head = f"\n{'run':<{width}}{'n':>6}{'left out':>10}"
    print(head + "".join(f"{key:>22}" for key in keys))
    for summary in summaries:
        line = f"{summary['run']:<{width}}{summary['n']:>6}{summary['left_out']:>10}"
        for key in keys:
            low, high = summary[f"{key}_95"]
            line += f"{summary[key]:>8.3f} [{low:.3f}, {high:.3f}]"
        print(line)


def comparison(first: tuple[dict, list[dict]], other: tuple[dict, list[dict]]) -> str:
    """Where the other run is right and the first is wrong, and the other way round, in a line."""
    (summary_a, a), (summary_b, b) = first, other
    target_of = {record["row"]: record["target"] for record in a}
    same = all(summary_a[key] == summary_b[key] for key in ("questions_sha256", "n"))
    if not same or any(target_of.get(r["row"], r["target"]) != r["target"] for r in b):
        fail(f"{summary_b['run']} answered other questions than {summary_a['run']}")
    only_a, only_b = mcnemar_counts(a, b)
    return (f"{summary_b['run']} against {summary_a['run']}: right where it was wrong {only_b}, "
            f"wrong where it was right {only_a}, McNemar p = {mcnemar(only_a, only_b):.2g}")


def mcnemar_counts(a: list[dict], b: list[dict]) -> tuple[int, int]:
    """Rows that only `a` got right, and only `b`; one that is missing is wrong."""
    right_a, right_b = ({r["row"] for r in records if r["exact"]} for records in (a, b))
    return len(right_a - right_b), len(right_b - right_a)


# --- one run ----------------------------------------------------------------------------------


class Questions(NamedTuple):
    """What is asked: the first n rows of `pairs`, where the too long ones are missing."""

    pairs: Pairs
    n: int
    sha256: str  # of the rows
    scoring: str
    max_new_tokens: int


def evaluate(run: Run, args: Args, autocast) -> tuple[dict, list[dict]]:
    """Answer and score every question for one run; accuracy.json's content, and the answers."""
    from lab.judge import best_of

    args = refuse_or_adapt(run, args)
    questions = questions_of(run, args)
    # A question longer than block_size is not answered, and so counts as wrong.
    n_asked = asked_of(questions.pairs, questions.n)
    if not n_asked:
        fail(f"none of the {questions.n} questions fits into block_size={run.config.block_size}")
    say_what_is_never_right(run, questions, n_asked)

    # One file per checkpoint and set of questions; its first line says of what it is.
    about = provenance_of(run, args, questions)
    path, out = files_of(run, args)
    records = resumable(path, out, about)
    if records:
        print(f"{path} holds {len(records)} of {n_asked} answers")
    else:
        write_lines(path, [about])
    done = {record["row"] for record in records}
    asking = Asking(run.model, run.tokenizer, autocast, questions.max_new_tokens, questions.scoring)
    choose = best_of(args.samples, args.temperature, args.judge)
    # Questions of like length together: little padding, and their answers are of like length too.
    order = np.argsort(questions.pairs.question_length[:n_asked], kind="stable")
    todo = [int(e) for e in order if questions.pairs.source_row[e] not in done]
    started, n_before = time.time(), len(records)
    bar = Bar("evaluation", "question", n_asked, n_before)
    for begin in range(0, len(todo), args.batch_size):
        new = answer(asking, questions.pairs, todo[begin : begin + args.batch_size], choose)
        append_lines(path, new)
        records += new
        eta = (time.time() - started) * (n_asked - len(records)) / (len(records) - n_before)
        exact = f"exact {share_of(records, 'exact'):.3f}"
        if not bar.move(len(new), exact):
            print(f"{run.name}: {len(records)}/{n_asked} | {exact} | ETA {clock(eta)}", flush=True)

    summary = {"n": questions.n, "left_out": questions.n - n_asked}
    for key in SHARES:
        if key in records[0]:
            count = sum(record[key] for record in records)
            summary |= {key: count / questions.n, f"{key}_95": wilson(count, questions.n)}
    seconds = sum(record["seconds"] for record in records)
    summary["tokens_per_second"] = sum(record["tokens"] for record in records) / seconds
    write_json(out, {**summary, "provenance": about})
    print(f"wrote {out} and {path.name}")
    return {**about, **summary}, sorted(records, key=lambda record: record["row"])


def refuse_or_adapt(run: Run, args: Args) -> Args:
    """Exit where this run cannot be asked so; judge=0 for a run whose cosines judge nothing."""
    views = run.config.views
    if views in ("facts", "split"):
        use = "python -m lab.reversal" if views == "facts" else "python eval_alignment.py"
        fail(f"{run.path} was trained with views={views}, which asks no question; {use} measures "
             "it")
    if args.samples and views != "pairs":
        fail(f"{run.path}: samples={args.samples} are judged as pairs, but it was trained with "
             f"views={views}")
    has_pred = not run.config.objective.startswith("tube")
    if args.judge and not (run.config.jepa_weight and has_pred):
        without = "JEPA" if has_pred else "[PRED]"
        print(f"{run.name} was trained without {without}, so its cosines judge nothing: judge=0 "
              "for it")  # fmt: skip
        return replace(args, judge=0.0)
    return args


def questions_of(run: Run, args: Args) -> Questions:
    """The rows that args name, tokenized for the run."""
    data = data_of(run, args.data_dir)
    if args.file:
        rows = asked_rows(run, args.file, args.data_dir)
        pairs, _ = tokenize(rows[:], run.tokenizer, run.config)
        pairs.idf = data.pairs["train"].idf
        n, digest = len(rows), rows.sha256
    elif args.split not in data.pairs:
        fail(f"{data.provenance['source']} has no {args.split} split; --split=val, or --file=...")
    else:
        pairs, n = data.pairs[args.split], data.provenance[f"{args.split}_rows"]
        # Validation that came out of train is known by train's digest.
        digest = data.provenance.get(f"{args.split}_sha256", data.provenance["train_sha256"])
    scoring = data.scoring if args.score == "auto" else args.score
    if {scoring, data.scoring} == {"number", "final"}:  # after the mark or alone, as the run has it
        scoring = data.scoring
    n = min(args.n or n, n)
    known, asked = longest_answer(data.pairs["train"]), longest_answer(pairs, asked_of(pairs, n))
    limit = args.max_new_tokens or max(known, asked)
    print(f"{run.name}: scored as {scoring}; answers of at most {limit} tokens (the longest answer "
          f"of train has {known}, of those asked {asked})")
    return Questions(pairs, n, digest, scoring, limit)


def asked_rows(run: Run, file: str, data_dir: str) -> JsonLines | Listed:
    """The rows of a file, read as the run's own; a line says how many it was trained on."""
    rows = read_questions(Path(file), run.config)
    known = questions_seen(rows, relocated(run.config, data_dir), "train").sum()
    print(f"{known} of {len(rows)} questions of {file} are in train")
    return rows


def asked_of(pairs: Pairs, n: int) -> int:
    """How many examples the first n rows of a split are: the too long ones are missing."""
    return int((pairs.source_row < n).sum())


def say_what_is_never_right(run: Run, questions: Questions, n_asked: int) -> None:
    """Lines on the questions that no answer could be right to; exits if that is all of them."""
    pairs, n = questions.pairs, questions.n
    if n_asked < n:
        print(f"{n - n_asked} of {n} questions are longer, with their answer, than block_size="
              f"{run.config.block_size}: left out, and counted as wrong")
    answers = [pairs.answer(example) for example in range(n_asked)]
    n_cut = sum(len(ids) - 1 > questions.max_new_tokens for ids in answers)
    if n_cut:
        print(f"{n_cut} of {n_asked} right answers are longer than max_new_tokens="
              f"{questions.max_new_tokens}: never the very string")
    if questions.scoring in ("number", "final"):
        references = [run.tokenizer.decode(ids) for ids in answers]
        n_none = refuse_no_number(questions.scoring, references, "those asked")
        if n_none:
            print(f"{n_none} of {n_asked} references hold no number: never right")


def provenance_of(run: Run, args: Args, questions: Questions) -> dict:
    """Everything that the answers depend on."""
    return {
        "run": run.name, "step": run.step, "questions": args.file or args.split,
        "n": questions.n, "questions_sha256": questions.sha256,
        "max_new_tokens": questions.max_new_tokens, "score": questions.scoring,
        "samples": args.samples, "temperature": args.temperature, "judge": args.judge,
        "dtype": dtype_on(run.model.device, args.dtype), "trained": run.provenance,
        "seed": run.config.seed, "recipe": run.config.recipe, **versions(),
    }  # fmt: skip


def files_of(run: Run, args: Args) -> tuple[Path, Path]:
    """generations...jsonl and accuracy...json: a pair for each checkpoint and set of questions."""
    parts = [] if run.path.stem == "ckpt" else [run.path.stem]
    parts += [Path(args.file).stem] if args.file else [args.split] if args.split != "test" else []
    parts += [f"first-{args.n}"] if args.n else []
    parts += [f"best-of-{args.samples + 1}-judge-{args.judge:g}"] if args.samples else []
    answers, summary = ("-".join([name, *parts]) for name in ("generations", "accuracy"))
    return run.path.parent / f"{answers}.jsonl", run.path.parent / f"{summary}.json"


def resumable(path: Path, summary: Path, about: dict) -> list[dict]:
    """The answers in a file that was begun for the same checkpoint and questions; a line that a
    kill cut short is dropped, and one that a second evaluation at the same time wrote again. The
    answers to anything else are moved aside, and the summary of them."""
    records = list({record.get("row"): record for record in read_records(path)}.values())
    same = ("run", "step", "questions", "questions_sha256", "n", "max_new_tokens", "score",
            "samples", "judge", "dtype", "trained", "commit", "torch")  # fmt: skip
    same += ("temperature",) if about["samples"] else ()
    if not records:
        return []
    if any(records[0].get(key) != about[key] for key in same):
        print(f"moved the answers of another evaluation to {set_aside(path)}")
        if summary.exists():
            set_aside(summary)
        return []
    write_lines(path, records)
    return records[1:]


if __name__ == "__main__":
    run_main(main)
