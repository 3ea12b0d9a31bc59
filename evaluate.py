"""How many held-out questions does a run answer right? Greedy answers, scored, with intervals.

    python evaluate.py                     the newest run, on its test split
    python evaluate.py RUN RUN ...         several, each compared with the first on the same rows
    python evaluate.py RUN --file=p.jsonl  on a file of pairs, all of it

Writes accuracy.json and generations.jsonl (a line per answer) into the run's folder; an interrupted
evaluation goes on where it stopped. A right answer, `exact`: for GSM8K and word problems the number
after the last ####, for anything else the very string. `prefix`: the answer starts with the target.
`stopped`: it ended by itself. `equivalent` (regexes): it describes the same lines.
"""

import json
import math
import re
import time
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config import fail, parse_args
from data import read_jsonl
from model import GPT, read_hidden
from regex_equivalence import equivalent
from run import (
    Run,
    data_of,
    exit_quietly,
    load_run,
    pick_device,
    read_records,
    rewrite_records,
    runs_newest_first,
    set_aside,
    versions,
)
from tokenizer import Tokenizer
from views import CODE, TARGET, TEXT, Example, Pairs, stacked, tokenize

SHARES = ("exact", "prefix", "stopped", "equivalent")


@dataclass(frozen=True)
class Args:
    # which questions
    split: str = "test"  # test | val | train
    file: str = ""  # a .jsonl of pairs instead of the run's own split
    n: int = 0  # the first n of them; 0 is all
    data_dir: str = ""  # folder of the data, if it is no longer where the run found it
    # how to answer and score
    max_new_tokens: int = 0  # at most; 0 is the length of the longest answer in train
    batch_size: int = 64  # questions at a time
    score: str = "auto"  # auto | number (after ####) | final (a number alone) | string | regex
    # choosing among several answers to a question
    samples: int = 0  # answers drawn beside the greedy one, all in memory; the best is scored
    temperature: float = 0.7  # of what is drawn
    judge: float = 0.0  # weight of cos(Pred, Enc) beside the log-probability in choosing it
    # where
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16

    def __post_init__(self):
        for key in ("n", "max_new_tokens", "samples", "judge"):
            if getattr(self, key) < 0:
                fail(f"{key}={getattr(self, key)} must not be below 0")
        if not 0 < self.temperature < math.inf or (self.judge and not self.samples):
            fail(f"temperature={self.temperature} must be above 0 and finite; judge={self.judge} "
                 f"chooses among several answers, samples={self.samples} gives none")


def main(argv: list[str]) -> None:
    values, names = parse_args(Args, argv, "python evaluate.py [RUN ...] [--key=value ...]")
    args = Args(**values)
    if args.split not in ("train", "val", "test") or args.batch_size < 1:
        fail(f"split={args.split} must be test, val or train, and batch_size={args.batch_size} "
             "at least 1")
    if args.score not in ("auto", "number", "final", "string", "regex"):
        fail(f"score={args.score} is not one of auto, number, final, string, regex")
    device, autocast = pick_device(args.device, args.dtype)
    results = []
    for path in [Path(name) for name in names] or runs_newest_first()[:1]:
        results.append(evaluate(load_run(path, device), args, autocast))
        args = replace(args, score=results[0][0]["score"])  # one rule for all that are compared

    keys = [key for key in SHARES if key in results[0][0]]
    print(f"\n{'run':<28}{'n':>6}" + "".join(f"{key:>22}" for key in keys))
    for summary, _ in results:
        print(f"{summary['run']:<28}{summary['n']:>6}" + "".join(
            f"{summary[key]:>8.3f} [{low:.3f}, {high:.3f}]"
            for key in keys for low, high in [summary[f"{key}_95"]]))  # fmt: skip
    (first, ours), *others = results
    for summary, theirs in others:
        target_of = {record["row"]: record["target"] for record in ours}
        same = all(summary[key] == first[key] for key in ("questions_sha256", "n"))
        if not same or any(target_of.get(r["row"], r["target"]) != r["target"] for r in theirs):
            fail(f"{summary['run']} answered other questions than {first['run']}")
        right, wrong = mcnemar_counts(ours, theirs)
        print(f"{summary['run']} against {first['run']}: right where it was wrong {wrong}, wrong "
              f"where it was right {right}, McNemar p = {mcnemar(right, wrong):.2g}")


def evaluate(run: Run, args: Args, autocast) -> tuple[dict, list[dict]]:
    """Answer and score every question for one run; accuracy.json's content, and the answers."""
    config = run.config
    if config.views in ("facts", "split"):
        use = "eval_relations.py" if config.views == "facts" else "eval_alignment.py"
        fail(f"{run.path} was trained with views={config.views}, which asks no question; "
             f"{use} measures it")
    if args.samples and config.views != "pairs":
        fail(f"{run.path}: samples={args.samples} are judged as pairs, but it was trained with "
             f"views={config.views}")
    if args.judge and not config.jepa_weight:
        print(f"{run.name} was trained without JEPA, so its cosines judge nothing: judge=0 for it")
        args = replace(args, judge=0.0)
    data = data_of(run, args.data_dir)
    if args.file:
        rows = read_jsonl(Path(args.file), config.bad_lines)
        pairs, n, digest = tokenize(rows[:], run.tokenizer, config)[0], len(rows), rows.sha256
    elif args.split not in data.pairs:
        fail(f"{data.provenance['source']} has no {args.split} split; --split=val, or --file=...")
    else:
        pairs, n = data.pairs[args.split], data.provenance[f"{args.split}_rows"]
        # Validation that came out of train is known by train's digest.
        digest = data.provenance.get(f"{args.split}_sha256", data.provenance["train_sha256"])
    n = min(args.n or n, n)
    # What is longer than block_size is not answered, so wrong.
    n_asked = int((pairs.origin < n).sum())
    kind = data.answers if args.score == "auto" else args.score
    limit = args.max_new_tokens or longest_answer(data.pairs["train"])
    if not n_asked:
        fail(f"none of the {n} questions fits into block_size={config.block_size}")

    # One file per checkpoint and set of questions; its first line says of what it is.
    about = {
        "run": run.name, "step": run.step, "questions": args.file or args.split, "n": n,
        "questions_sha256": digest, "max_new_tokens": limit, "score": kind,
        "samples": args.samples, "temperature": args.temperature, "judge": args.judge,
        "dtype": args.dtype,
        "trained": run.provenance, "seed": config.seed, "recipe": config.recipe, **versions(),
    }  # fmt: skip
    names = [] if run.path.stem == "ckpt" else [run.path.stem]
    names += [Path(args.file).stem] if args.file else [args.split] if args.split != "test" else []
    names += [f"first-{args.n}"] if args.n else []
    names += [f"best-of-{args.samples + 1}-judge-{args.judge:g}"] if args.samples else []
    path = run.path.parent / ("-".join(["generations", *names]) + ".jsonl")
    out = run.path.parent / ("-".join(["accuracy", *names]) + ".json")
    records = resumable(path, out, about)
    if records:
        print(f"{path} holds {len(records)} of {n_asked} answers")
    else:
        path.write_text(json.dumps(about) + "\n")
    done = {record["row"] for record in records}
    # Questions of like length together: little padding, and their answers are of like length too.
    order = np.argsort(pairs.asked[:n_asked], kind="stable")
    todo = [int(row) for row in order if pairs.origin[row] not in done]
    started, n_before = time.time(), len(records)
    for begin in range(0, len(todo), args.batch_size):
        batch = todo[begin : begin + args.batch_size]
        new = answer(run.model, run.tokenizer, pairs, batch, limit, autocast, kind,
                     args.samples, args.temperature, args.judge)
        with open(path, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in new)
        records += new
        eta = (time.time() - started) * (n_asked - len(records)) / (len(records) - n_before)
        print(f"{run.name}: {len(records)}/{n_asked} | exact {share(records, 'exact'):.3f} | "
              f"ETA {eta // 60:.0f}:{eta % 60:02.0f}", flush=True)

    summary = {"n": n, "left_out": n - n_asked}
    for key in SHARES:
        if key in records[0]:
            count = sum(record[key] for record in records)
            summary |= {key: count / n, f"{key}_95": wilson(count, n)}
    seconds = sum(record["seconds"] for record in records)
    summary["tokens_per_second"] = sum(record["tokens"] for record in records) / seconds
    out.write_text(json.dumps({**summary, "provenance": about}, indent=1) + "\n")
    print(f"wrote {out} and {path.name}")
    return {**about, **summary}, sorted(records, key=lambda record: record["row"])


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
    rewrite_records(path, records)
    return records[1:]


def longest_answer(pairs: Pairs) -> int:
    """Tokens of the longest answer of a split, its end of text included."""
    return int((pairs.lengths[:, :2].sum(1) - pairs.asked).max())


def answer(
    model: GPT, tokenizer: Tokenizer, pairs: Pairs, rows: list[int], max_new_tokens: int, autocast,
    kind: str = "string", samples: int = 0, temperature: float = 0.7, judge: float = 0.0,
) -> list[dict]:
    """Answers of the model to examples `rows` of a split, as one batch, and their scores: the
    greedy ones or, with `samples`, the best of those and as many drawn ones."""
    was_training, started = model.training, time.time()
    model.eval()
    prompts, eot = [pairs.prompt(row) for row in rows], tokenizer.eot
    with autocast():
        outputs = model.generate(prompts, max_new_tokens, eot, temperature=0)
        if samples:
            repeated = [prompt for prompt in prompts for _ in range(samples)]
            drawn = model.generate(repeated, max_new_tokens, eot, temperature=temperature)
            asked = [row for row in rows for _ in range(samples)]
            outputs = best(model, pairs, rows + asked, outputs + drawn, judge, eot)
    model.train(was_training)
    seconds = (time.time() - started) / len(rows)
    records = []
    for row, ids in zip(rows, outputs):
        stopped = ids[-1:] == [tokenizer.eot]
        output, target = tokenizer.decode(ids), tokenizer.decode(pairs.answer(row))
        records.append({
            "row": int(pairs.origin[row]), "prompt": tokenizer.decode(pairs.question(row)),
            "output": output, "target": target,
            "stop": "end of text" if stopped else "length", "stopped": stopped,
            **score(output, target, kind), "tokens": len(ids), "seconds": seconds,
        })  # fmt: skip
    return records


def best(
    model: GPT, pairs: Pairs, rows: list[int], answers: list[list[int]], judge: float, eot: int
) -> list[list[int]]:
    """Of the answers to each question, the one of highest log-probability + judge * cosine. One
    that did not end by itself is taken only if none did. `rows` (m,) says what is answered."""
    of = {row: [] for row in rows}
    for row, ids in zip(rows, answers):
        of[row].append(ids)
    for row, found in of.items():
        ended = [ids for ids in found if ids[-1:] == [eot]]
        of[row] = list(map(list, dict.fromkeys(map(tuple, ended or found[:1]))))
    rows, answers = zip(*((row, ids) for row, found in of.items() for ids in found))
    log_p, cosine = judged(model, pairs, rows, answers)
    chosen = {}
    for row, ids, points in zip(rows, answers, (log_p + judge * cosine).tolist()):
        if row not in chosen or points > chosen[row][0]:
            chosen[row] = points, ids
    return [ids for _, ids in chosen.values()]


@torch.no_grad()
def judged(model: GPT, pairs: Pairs, rows, answers) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each answer after its question, in nats, and the cosine of Pred(question)
    and Enc(answer): (m,) each. Question i is example rows[i], its answer the tokens answers[i]."""
    examples = []
    for row, ids in zip(rows, answers):
        text, code, target = (pairs.view(row, block) for block in (TEXT, CODE, TARGET))
        system = target[: len(target) - len(code)]
        examples.append(Example(text, len(text), ids, system + ids))
    config = replace(pairs.config, labels="answer")
    candidates = Pairs(*stacked(examples, config), config, pairs.vocab_size)
    layout, device = pairs.layout, model.wte.weight.device
    log_p, cosine = torch.empty(len(rows)), torch.empty(len(rows))
    for at in np.array_split(np.arange(len(rows)), -(-len(rows) // 16)):
        idx, block, targets = candidates.pack(at, layout.row).to(device)
        hidden, labelled = model.hidden(idx, block), targets != -1
        logits = model.lm_head(hidden[labelled]).float()
        loss = torch.zeros(targets.shape, device=device)
        loss[labelled] = F.cross_entropy(logits, targets[labelled], reduction="none")
        log_p[at] = -loss.sum(1).cpu()
        pred = read_hidden(hidden, block, layout.pred).float()
        enc = read_hidden(hidden, block, layout.enc, pairs.config.pooling).float()
        cosine[at] = F.cosine_similarity(pred, enc).cpu()
    return log_p, cosine


# --- scores -----------------------------------------------------------------------------------


def score(output: str, target: str, kind: str) -> dict[str, bool]:
    """Is an answer right? kind: number (after ####), final (the text is one), string, regex."""
    scores = {"exact": output == target, "prefix": output.startswith(target)}
    if kind in ("number", "final"):
        mark = "####" if kind == "final" else ""
        value = number(mark + target)
        scores["exact"] = value is not None and number(mark + output) == value
    if kind == "regex":
        scores["equivalent"] = scores["exact"] or bool(equivalent(output, target))
    return scores


def number(text: str) -> Decimal | None:
    """The number after the last ####, without commas and $; None if there is none."""
    _, mark, after = text.rpartition("####")
    found = re.match(r"\s*(-?(\d+(\.\d+)?|\.\d+))(?![\d/]|\.\d)", re.sub(r"[$,]", "", after))
    return Decimal(found[1]) if mark and found else None


def share(records: list[dict], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def wilson(count: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share, Wilson's score interval: it holds near 0 and 1 too."""
    p = count / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar_counts(ours: list[dict], theirs: list[dict]) -> tuple[int, int]:
    """Rows that only `ours` got right, and only `theirs`; one that is missing is wrong."""
    a, b = ({record["row"] for record in records if record["exact"]} for records in (ours, theirs))
    return len(a - b), len(b - a)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of the exact McNemar test: where two models differ, is it a fair coin?"""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


if __name__ == "__main__":
    exit_quietly(main)
