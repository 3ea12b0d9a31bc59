"""Search answers by their meaning: [PRED](question) against Enc(answer), by cosine.

    python -m lab.search RUN --answers=FILE --query="..."    the nearest answers of a file
    python -m lab.search RUN --query="..."                   of the run's own training data
    python -m lab.search RUN --eval                          how well held-out questions find theirs

FILE holds pairs in a form that the run's own data may have, whose questions are not looked at; with
--field=NAME, rows whose answer is in that field; or, as .txt, an answer per line. Equal answers are
kept once. Their embeddings lie beside the run in search/, are computed once, and all of them are
compared with each query: a million of 576 numbers are 1.2 GB and take seconds.

--eval takes the test split, or validation where the data has no test, or --answers=FILE, and says
for how many questions their own answer is the nearest (recall@1), among the ten nearest
(recall@10), and the mean of 1 / its rank (MRR). A tie counts against the model.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from config import Config, fail, parse_args
from data import Data, read_questions
from evaluate import asked_rows
from model import read_hidden
from plumbing.files import sha256_of, write_folder, write_json
from plumbing.output import Bar
from plumbing.processes import pick_device, run_main, versions
from plumbing.stats import wilson
from run import Run, chosen_run, data_of
from views import AGAIN, CODE, TARGET, TEXT, Pairs, layout_of, tokenize

BATCH = 64  # rows in a forward pass
CHUNK = 1 << 16  # answers that are embedded, written and compared at a time


@dataclass(frozen=True)
class Args:
    # what to look for, and where
    query: str = ""  # a question
    answers: str = ""  # file of answers or pairs; empty: the answers that the run was trained on
    field: str = ""  # of the file's rows, which holds the answer; empty: they are pairs
    eval: bool = False  # measure on held-out pairs
    top: int = 5  # answers to show
    # where
    out_dir: str = ""  # folder of the run; RUN says the same
    best: bool = False  # the run's best.pt (lowest val_ce) instead of its last checkpoint
    data_dir: str = ""  # folder of the data, if it is no longer where the run found it
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16


class Table(NamedTuple):
    """Answers and where they lie: rows of unit length, mapped from a file."""

    answers: list[str]  # different ones, that fit into the run's context
    vectors: np.ndarray  # (N, C) float16


def main(argv: list[str]) -> None:
    values, names = parse_args(Args, argv, f"python -m lab.search [RUN] [--key=value ...]\n\n"
                                           f"{__doc__}")  # fmt: skip
    args = Args(**values)
    if args.eval == bool(args.query):
        fail('give either --query="..." or --eval')
    if args.top < 1:
        fail(f"top={args.top} must be at least 1")
    if args.eval and args.field:
        fail(f"field={args.field} names answers without questions; --eval needs pairs")
    device, autocast = pick_device(args.device, args.dtype)
    run = chosen_run(names, args.out_dir, device, args.best)
    try:
        rows_of(run.config)
    except ValueError as error:
        fail(str(error))
    if not run.config.jepa_weight:
        print(f"note: {run.path} was trained without JEPA, so nothing taught its [PRED] to find "
              "an answer")  # fmt: skip
    if args.eval:
        evaluate(run, args, autocast)
    else:
        show_nearest(run, args, autocast)


def show_nearest(run: Run, args: Args, autocast) -> None:
    try:
        query = embed_questions(run, [args.query], autocast)
    except ValueError as error:
        fail(f"query: {error}")
    if "systems" in run.provenance["data"]:
        print(f"note: the run's rows began with {run.provenance['data']['systems']} different "
              "system prompts; none stands before this question or the answers")
    answers = answers_of(run, args)
    table = open_table(run, answers, autocast)
    print(f"{len(table.answers)} different ones of {len(answers)} answers of "
          f"{args.answers or run.provenance['data']['dataset'] + ', train'}")  # fmt: skip
    cosines, rows = nearest(table.vectors, query, args.top)
    for number, (cosine, row) in enumerate(zip(cosines[0], rows[0]), 1):
        print(f"\n--- {number}, cosine {cosine:.3f}\n{table.answers[row]}")


def answers_of(run: Run, args: Args) -> list[str]:
    """The answers to search, as texts: of a file, or those that the run was trained on."""
    path, field = Path(args.answers), args.field
    if not args.answers:
        if field:
            fail(f"field={field} is one of a file of answers; --answers=FILE names it")
        return answers_in(run, data_of(run, args.data_dir).pairs["train"])
    if path.suffix == ".txt":
        if field:
            fail(f"field={field} is one of a file of rows; {path} has an answer per line")
        try:
            lines = [line for line in path.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read {path}: {error}")
        return lines or fail(f"{path} holds no answer")
    # The answer alone, as a pair of it with itself.
    config = replace(run.config, fields=f"{field}:{field}", group="") if field else run.config
    return [row["code"] for row in read_questions(path, config)[:]]


def answers_in(run: Run, pairs: Pairs, n: int | None = None) -> list[str]:
    """The answers of a split, or of its first n examples, as texts."""
    return [run.tokenizer.decode(pairs.answer(example)) for example in range(len(pairs))[:n]]


# --- texts as vectors -------------------------------------------------------------------------


def rows_of(config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The blocks of the two rows from whose ends Pred and Enc are read: of a question alone, and of
    an answer alone. ValueError with a sentence where the run has no such rows."""
    if config.objective != "pair":
        raise ValueError(f"a run with objective={config.objective} does not predict Enc(answer), "
                         "so it cannot search")  # fmt: skip
    layout = layout_of(config)

    def path_to(block: int) -> tuple[int, ...]:
        parent = layout.parents[block]
        return (*(() if parent is None else path_to(parent)), block)

    question, answer = path_to(layout.pred), path_to(layout.enc)
    if config.views != "pairs" or {CODE, TARGET} & {*question} or {TEXT, AGAIN} & {*answer}:
        why = f"views={config.views}" if config.views != "pairs" else f"layout={config.layout}"
        raise ValueError(f"a run with {why} does not predict an answer from its question alone, so "
                         "it cannot search")  # fmt: skip
    return question, answer


def pairs_of(run: Run, view: str, texts: Sequence[str]) -> Pairs:
    """Examples with one view, "text" or "code", behind the run's system prompt if it has one; those
    that fit into its context (source_row says which)."""
    system = run.provenance["data"].get("system", "")
    rows = [{"text": "", "code": "", "system": system, view: text} for text in texts]
    return tokenize(rows, run.tokenizer, run.config)[0]


@torch.inference_mode()
def embed(run: Run, pairs: Pairs, blocks: tuple[int, ...], reads, autocast) -> np.ndarray:
    """Embeddings of the examples from rows that hold `blocks`, float32, of unit length: (R, n, C),
    one for each of the R `reads`, which are a block and its pooling, "last" or "mean"."""
    trunk, n = run.model, len(pairs)
    vectors = np.empty((len(reads), n, trunk.width), np.float32)
    order = np.argsort(pairs.lengths.sum(1), kind="stable")  # of like length together
    bar = Bar("embeddings", "text", n)
    for at in (order[begin : begin + BATCH] for begin in range(0, n, BATCH)):
        batch = pairs.pack(at, blocks).to(trunk.device)
        with autocast():
            hidden = trunk.everywhere(batch.idx, batch.block)
        for found, (block, pooling) in zip(vectors, reads):
            views = read_hidden(hidden, batch.block, block, pooling)
            found[at] = F.normalize(views.float(), dim=-1).cpu().numpy()
        bar.move(len(at))
    return vectors


def embed_pred(run: Run, pairs: Pairs, autocast) -> np.ndarray:
    """Pred of each example's question: (n, C)."""
    blocks, _ = rows_of(run.config)
    return embed(run, pairs, blocks, [(blocks[-1], "last")], autocast)[0]


def embed_enc(run: Run, pairs: Pairs, autocast) -> np.ndarray:
    """Enc of each example's answer: (n, C)."""
    _, blocks = rows_of(run.config)
    return embed(run, pairs, blocks, [(blocks[-1], run.config.pooling)], autocast)[0]


def embed_questions(run: Run, questions: Sequence[str], autocast) -> np.ndarray:
    """Pred of questions, float32, of unit length: (n, C). ValueError if one is too long."""
    return embed_pred(run, all_of(run, "text", questions), autocast)


def embed_answers(run: Run, answers: Sequence[str], autocast) -> np.ndarray:
    """Enc of answers, float32, of unit length: (n, C). ValueError if one is too long."""
    return embed_enc(run, all_of(run, "code", answers), autocast)


def all_of(run: Run, view: str, texts: Sequence[str]) -> Pairs:
    """As pairs_of, but all of them."""
    pairs = pairs_of(run, view, texts)
    if len(pairs) < len(texts):
        raise ValueError(f"longer than the context of the run, block_size={run.config.block_size}")
    return pairs


# --- the table --------------------------------------------------------------------------------


def open_table(run: Run, answers: Sequence[str], autocast) -> Table:
    """The answers, each once, and their embeddings from disk; computed first where they are not
    there. What does not fit into the run's context is left out, with a line."""
    answers = list(dict.fromkeys(answers))
    with autocast():
        is_bf16 = torch.is_autocast_enabled(run.model.device.type)
    made_of = [sha256_of(run.path), is_bf16, *answers]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    folder = run.path.parent / "search" / digest[:16]
    if not (folder / "about.json").exists():
        write_table(folder, run, answers, autocast)
    kept = np.fromfile(folder / "kept", np.int64)
    vectors = np.memmap(folder / "vectors", np.float16, "r").reshape(len(kept), -1)
    if len(kept) < len(answers):
        print(f"{len(answers) - len(kept)} of {len(answers)} answers are longer than block_size="
              f"{run.config.block_size}: left out")  # fmt: skip
    return Table([answers[row] for row in kept], vectors)


def write_table(folder: Path, run: Run, answers: list[str], autocast) -> None:
    kept = 0
    with write_folder(folder) as append:
        for begin in range(0, len(answers), CHUNK):
            pairs = pairs_of(run, "code", answers[begin : begin + CHUNK])
            append("vectors", embed_enc(run, pairs, autocast).astype(np.float16).tobytes())
            append("kept", (begin + pairs.source_row).astype(np.int64).tobytes())
            kept += len(pairs)
        if not kept:
            fail(f"none of {len(answers)} answers fits into block_size={run.config.block_size}")
        about = {"run": str(run.path), "step": run.step, "answers": len(answers), "kept": kept,
                 "trained": run.provenance, **versions()}  # fmt: skip
        append("about.json", json.dumps(about).encode())


def nearest(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of vectors (N, C) with the highest cosine to each query (Q, C), best first, all of
    unit length: cosines and row numbers, (Q, min(k, N)) each."""
    cosines, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for begin in range(0, len(vectors), CHUNK):
        some = queries @ vectors[begin : begin + CHUNK].astype(np.float32).T  # (Q, chunk)
        best = np.argpartition(-some, min(k, some.shape[1]) - 1, axis=1)[:, :k]
        cosines = np.concatenate([cosines, np.take_along_axis(some, best, 1)], 1)
        rows = np.concatenate([rows, begin + best], 1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        cosines, rows = (np.take_along_axis(found, order, 1) for found in (cosines, rows))
    return cosines, rows


# --- how well it finds ------------------------------------------------------------------------


def evaluate(run: Run, args: Args, autocast) -> None:
    """Print the measures on held-out pairs, and write them to search...json in the run's
    folder, one for each checkpoint and file of pairs."""
    pairs, name, n_rows = held_out(run, args)
    if not len(pairs):
        fail(f"none of the {n_rows} pairs fits into block_size={run.config.block_size}")
    answers, own = different_answers(pairs)
    if (n_systems := systems_of(answers)) > 1:
        print(f"note: the answers stand behind {n_systems} different system prompts, as in "
              "training; a question has its own answer's before it, so the figures are too high")
    ranks = ranks_of(embed_pred(run, pairs, autocast), embed_enc(run, answers, autocast), own)
    found = measures(ranks)
    low, high = wilson(int((ranks == 1).sum()), len(ranks))
    print(f"{run.name}: {len(pairs)} questions of {name}, {len(answers)} different answers; "
          f"{n_rows - len(pairs)} pairs left out as longer than block_size\n"
          f"recall@1 {found['recall_at_1']:.3f} [{low:.3f}, {high:.3f}] | recall@10 "
          f"{found['recall_at_10']:.3f} | MRR {found['mrr']:.3f} | by chance "
          f"{1 / len(answers):.3f}, {min(1, 10 / len(answers)):.3f}")  # fmt: skip
    about = {"run": run.name, "step": run.step, "pairs": name, "n": len(pairs),
             "different_answers": len(answers), "left_out": n_rows - len(pairs)}  # fmt: skip
    parts = [] if run.path.stem == "ckpt" else [run.path.stem]
    parts += [Path(args.answers).stem] if args.answers else []
    path = run.path.parent / f"{'-'.join(['search', *parts])}.json"
    write_json(path, {**found, "recall_at_1_95": [low, high],
                      "provenance": {**about, "trained": run.provenance, **versions()}})
    print(f"wrote {path}")


def held_out(run: Run, args: Args) -> tuple[Pairs, str, int]:
    """Pairs that the run was not trained on, their name, and how many there were before the too
    long ones were left out."""
    if args.answers:
        rows = asked_rows(run, args.answers, args.data_dir)
        return tokenize(rows[:], run.tokenizer, run.config)[0], args.answers, len(rows)
    return last_split(data_of(run, args.data_dir))


def last_split(data: Data) -> tuple[Pairs, str, int]:
    """Test, or validation where there is none; its name; its rows before any was left out."""
    split = "test" if "test" in data.pairs else "val"
    name = f"{data.provenance['dataset']}, {split}"
    return data.pairs[split], name, data.provenance[f"{split}_rows"]


def systems_of(pairs: Pairs) -> int:
    """How many different system prompts stand before the answers that Enc reads."""
    enc = pairs.layout.enc
    return len({tuple(pairs.view(e, enc)[: -pairs.lengths[e, CODE - 1]])
                for e in range(len(pairs))})  # fmt: skip


def different_answers(pairs: Pairs) -> tuple[Pairs, np.ndarray]:
    """Examples with each answer once, and for every example which of those is its own: (n,)."""
    groups = pairs.groups(np.arange(len(pairs)))
    _, first, own = np.unique(groups, return_index=True, return_inverse=True)
    return pairs.take(first), own


def ranks_of(queries: np.ndarray, answers: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The rank of its own answer, `own` (n,), for each query (n, C) among answers (M, C), all of
    unit length: (n,), 1 at best. An answer as near as the own one counts as nearer, and so does nan
    (the slack makes equal ones tie, whatever their last bits)."""
    ranks = np.empty(len(queries), np.int64)
    for begin in range(0, len(queries), BATCH):
        rows = slice(begin, begin + BATCH)
        cosines = queries[rows] @ answers.T
        at_own = np.take_along_axis(cosines, own[rows, None], 1)
        ranks[rows] = (~(cosines < at_own - 1e-6)).sum(1)
    return ranks


def measures(ranks: np.ndarray) -> dict[str, float]:
    """Of ranks (n,): the share that is 1, that is at most 10, and the mean of 1 / rank."""
    return {"recall_at_1": float((ranks == 1).mean()), "recall_at_10": float((ranks <= 10).mean()),
            "mrr": float((1 / ranks).mean())}  # fmt: skip


if __name__ == "__main__":
    run_main(main)
