"""What does JEPA buy for search? Networks trained with and without it, and BM25, side by side.

    python -m lab.search_study gsm8k [--jobs=2] [--key=value ...]
    python -m lab.search_study nlrx --dataset=pairs.jsonl
    python -m lab.search_study smollm2                          a pretrained model, one seed

Trains λ = 0, JEPA and a retriever (the same network with InfoNCE alone, ce_weight = 0); the same
command again skips what is finished. Then each question of the held-out pairs looks for its
answer among theirs (lab/search.py says what is measured): by [PRED] and Enc, by the last or the
mean hidden state of both texts, by those after a ridge map that is fitted on train, and by BM25.
Writes results.json.
"""

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from config import Config, fail, find_recipe, parse_args
from data import Data
from lab.arms import BASE, INFONCE, PLAIN
from lab.search import different_answers, embed, last_split, measures, ranks_of, rows_of
from lab.sweep import Cell, make_arm_cell, result_of, train_cells, warn_of_dtypes
from plumbing.files import write_json
from plumbing.linear_map import ridge
from plumbing.processes import pick_device, run_main, versions
from plumbing.stats import mean_sd, paired_t, plus_minus, wilson
from run import Run, data_of, load_run
from views import TEXT, Pairs

WAYS = ("[PRED]", "last token", "mean", "last token, mapped", "mean, mapped")
N_FIT = 8000  # pairs of train that a map is fitted on, at most
Found = dict[str, dict[str, list[float]]]  # "arm, way" -> measure -> a value per seed


class Setting(NamedTuple):
    """What is trained: a recipe, fields over it, and over those the fields of each arm."""

    recipe: str
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    seeds: Sequence[int] = range(3)


# A retriever has InfoNCE alone. Its weight does not matter then: AdamW does not see the gradient's
# size. On GSM8K it has the best of three rates: at 2e-3 it found .06 of 256, at 5e-4 .23 (one seed,
# validation; 1e-3 was behind 5e-4 after 300 of the 500 steps).
RETRIEVER = dict(jepa_loss="infonce", jepa_weight=1.0, spread="none", spread_weight=0.0,
                 jepa_warmup_iters=0, ce_weight=0.0, eval_answers=0)  # fmt: skip
SLOWER = dict(RETRIEVER, learning_rate=5e-4, min_lr=5e-5)
SETTINGS = {
    "nlrx": Setting("nlrx_jepa", BASE, {"λ 0": PLAIN, "JEPA": INFONCE, "retriever": RETRIEVER}),
    "gsm8k": Setting("gsm8k_nano", {}, {"λ 0": PLAIN, "JEPA": {}, "retriever": SLOWER}),
    "smollm2": Setting("smollm2_jepa", {},
                       {"λ 0": PLAIN, "JEPA": {}, "retriever": RETRIEVER}, (1337,)),
}


@dataclass(frozen=True)
class Options(Config):
    # of the study; beside them any field that python train.py --help lists
    jobs: int = 1  # runs to train at a time


def main(argv: list[str]) -> None:
    given, names = parse_args(Options, argv, f"python -m lab.search_study SETTING [--key=value ...]"
                                             f"\n\n{__doc__}")  # fmt: skip
    if len(names) != 1 or names[0] not in SETTINGS:
        fail(f"name a setting: {', '.join(SETTINGS)}")
    setting, jobs = SETTINGS[names[0]], given.pop("jobs", 1)
    folder = Path(given.pop("out_dir", f"out/search-{names[0]}"))
    for key, value in given.items():
        if key in ("seed", "init_from") or any(key in arm for arm in setting.arms.values()):
            fail(f"{key}={value}: the study sets {key} itself, arm by arm or seed by seed")
    if jobs < 1:
        fail(f"jobs={jobs} must be at least 1")
    cells = cells_of(setting, given, folder)
    refuse(next(iter(cells.values())).config)
    n_failed = train_cells(list(cells.values()), jobs)
    results = {at: result for at, cell in cells.items() if (result := result_of(cell))}
    whole = [arm for arm in setting.arms if all((arm, seed) in results for seed in setting.seeds)]
    for arm in setting.arms:
        if arm not in whole:
            print(f"{arm} is left out: not all of its seeds are finished")
    if not whole:
        fail("no arm is finished")
    warn_of_dtypes(results.values())
    found, about = search_all({at: cell for at, cell in cells.items() if at[0] in whole})
    about |= {"setting": names[0], "command": shlex.join(argv), **versions()}
    print("\n".join(table(found, about)))
    write_json(folder / "results.json", {"found": found, "provenance": about})
    print(f"wrote {folder / 'results.json'}")
    if n_failed:
        raise SystemExit(1)


def refuse(config: Config) -> None:
    """Exit, before anything is trained, where what comes after it cannot work."""
    if importlib.util.find_spec("bm25s") is None:
        fail("BM25 needs a package: pip install bm25s")
    try:
        question, _ = rows_of(config)
    except ValueError as error:
        fail(str(error))
    if TEXT not in question:
        fail(f"a run with layout={config.layout} reads no question by itself")


def cells_of(setting: Setting, given: dict[str, Any], folder: Path) -> dict[tuple[str, int], Cell]:
    """A run for each arm and seed; the first seed of all arms comes first."""
    recipe = find_recipe(setting.recipe)
    return {(arm, seed): make_arm_cell(recipe, folder, arm,
                                       {**setting.base, **given, **fields}, seed)
            for seed in setting.seeds for arm, fields in setting.arms.items()}  # fmt: skip


def search_all(cells: dict[tuple[str, int], Cell]) -> tuple[Found, dict]:
    """What each run finds in each way, and BM25; and what was asked."""
    found, asked = {}, set()
    for (arm, seed), cell in cells.items():
        with contextlib.redirect_stdout(io.StringIO()):  # nine times what is said of the data
            device, autocast = pick_device(cell.config.device, cell.config.dtype)
            run = load_run(cell.folder, device)
            data = data_of(run, "")
        pairs, name, _ = last_split(data)
        answers, own = different_answers(pairs)
        asked.add((name, data.provenance["train_sha256"], len(pairs), len(answers)))
        if len(asked) > 1:
            fail(f"the runs were trained on, or ask, different data: {sorted(asked)}; with another "
                 "--out_dir all of them are trained anew")  # fmt: skip
        if not found:
            add(found, "BM25, words", bm25_ranks(run, pairs, answers, own))
        of_run = ranks_by_way(run, data, answers, own, autocast)
        for way, ranks in of_run.items():
            add(found, f"{arm}, {way}", ranks)
        best = max(of_run, key=lambda way: (of_run[way] == 1).mean())
        print(f"{arm}, seed {seed} | recall@1 {(of_run[best] == 1).mean():.3f} by {best}",
              flush=True)  # fmt: skip
    [(name, digest, n, n_answers)] = asked
    seeds = sorted({seed for _, seed in cells})
    return found, {"pairs": name, "train_sha256": digest, "n": n, "different_answers": n_answers,
                   "seeds": seeds, "trained": {str(cell.folder): result_of(cell)["commit"]
                                               for cell in cells.values()}}  # fmt: skip


def add(found: Found, name: str, ranks: np.ndarray) -> None:
    """One more seed's measures."""
    for measure, value in measures(ranks).items():
        found.setdefault(name, {}).setdefault(measure, []).append(value)


def ranks_by_way(
    run: Run, data: Data, answers: Pairs, own: np.ndarray, autocast
) -> dict[str, np.ndarray]:
    """The ranks of the own answers by each of WAYS; maps are fitted on pairs of train."""
    pairs, train = last_split(data)[0], data.pairs["train"]
    train = train.take(np.random.default_rng(0).permutation(len(train))[:N_FIT])
    question, answer = rows_of(run.config)
    text, end, lone = (TEXT, "last"), (question[-1], "last"), answer[-1]
    of_question = [end, text, (TEXT, "mean")]
    of_answer = [(lone, run.config.pooling), (lone, "last"), (lone, "mean")]
    queries, fit_x = (embed(run, some, question, of_question, autocast) for some in (pairs, train))
    targets = embed(run, answers, answer, of_answer, autocast)
    fit_y = embed(run, train, answer, of_answer, autocast)
    ranks = {way: ranks_of(queries[i], targets[i], own) for i, way in enumerate(WAYS[:3])}
    for i in (1, 2):
        x, y, query, target = (torch.from_numpy(vectors[i]).double()
                               for vectors in (fit_x, fit_y, queries, targets))  # fmt: skip
        fitted = ridge(x, y)
        mapped = fitted(query), fitted.scaled(target)
        ranks[f"{WAYS[i]}, mapped"] = ranks_of(*(F.normalize(v, dim=-1).numpy() for v in mapped),
                                               own)  # fmt: skip
    return ranks


def bm25_ranks(run: Run, pairs: Pairs, answers: Pairs, own: np.ndarray) -> np.ndarray:
    """The ranks of the own answers by BM25 (Lucene's form, k1 1.5, b .75) over words and single
    signs in lower case; ties count against it, and so does an answer that shares no word."""
    import bm25s

    def words(pairs: Pairs, part) -> list[list[str]]:
        texts = (run.tokenizer.decode(part(pairs, example)) for example in range(len(pairs)))
        return [re.findall(r"\w+|[^\w\s]", text.lower()) for text in texts]

    def question(pairs: Pairs, example: int) -> list[int]:  # without template and system prompt
        before, after = pairs.framing[example]
        ids = pairs.question(example)
        return ids[before : len(ids) - after]

    index = bm25s.BM25()
    index.index(words(answers, Pairs.answer), show_progress=False)
    ranks = np.full(len(pairs), len(answers))
    for row, query in enumerate(words(pairs, question)):
        if shared := [word for word in query if word in index.vocab_dict]:
            scores = index.get_scores(shared)
            ranks[row] = (scores >= scores[own[row]]).sum()
    return ranks


def table(found: Found, about: dict) -> list[str]:
    """A Markdown row per arm and way: mean ± sd over seeds, p of recall@1 against JEPA's [PRED]
    (paired t-test over seeds). Of a single seed the 95 % interval of recall@1 (Wilson)."""
    n, seeds = about["n"], about["seeds"]
    lines = [
        f"{n} questions of {about['pairs']} among {about['different_answers']} different answers, "
        f"seeds {seeds}", "", "| trained | searched by | recall@1 | recall@10 | MRR | p |",
        "|---" * 6 + "|",
    ]  # fmt: skip
    expected = found["JEPA, [PRED]"]["recall_at_1"] if "JEPA, [PRED]" in found else []
    for name, values in found.items():
        arm, _, way = name.partition(", ")
        recall = values["recall_at_1"]
        shown = [plus_minus(*mean_sd(each), 3) for each in values.values()]
        if len(recall) == 1:
            low, high = wilson(round(n * recall[0]), n)
            shown[0] += f" [{low:.3f}, {high:.3f}]"
        testable = len(recall) == len(expected) > 1 and recall != expected
        p = f"{paired_t(recall, expected):.2g}" if testable else ""
        lines.append(f"| {arm} | {way} | {' | '.join(shown)} | {p} |")
    return lines


if __name__ == "__main__":
    run_main(main)
