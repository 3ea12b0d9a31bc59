"""Where the pairs come from: files, the hub, generators; and their splits, digests and provenance.

    load_data(config)  -> Data: train, val and test as views.Pairs, the tokenizer, where from

GSM8K is looked for in a local folder, then on the hub; failing both, generators/word_problems.py
makes problems in its form, which are never called GSM8K.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import OWN_FILES, Config, fail
from generators.regexes import regex_rows
from generators.relations import facts_of, relation_rows
from generators.word_problems import word_problem_rows
from objectives.bag import give_idf
from plumbing import columns as token_columns
from plumbing.jsonl import (
    SYSTEMS,
    JsonLines,
    Listed,
    form_of,
    groups_of,
    listed,
    questions_of,
    read_jsonl,
    sha256_of_rows,
)
from plumbing.output import Bar
from plumbing.scoring import scoring_of
from plumbing.tables import ENDINGS as TABLES
from plumbing.tables import first_line, hub_rows, hub_unreachable, read_table
from plumbing.tokenizers import Tokenizer, gpt2_tokenizer, train_tokenizer, word_tokenizer
from views import Columns, Pairs, columns_of, fitting

HUB_ID, HUB_CONFIG = "openai/gsm8k", "main"
GSM8K = {"train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
         "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}  # fmt: skip
GENERATORS = {"word_problems": word_problem_rows, "regex": regex_rows, "regex_depth": regex_rows,
              "relations": relation_rows, "relations_full": relation_rows}  # fmt: skip
N_SCORED = 1000  # answers of train, evenly spaced, that decide how answers are scored


def load_rows(config: Config) -> tuple[dict[str, Sequence[dict[str, str]]], str, str]:
    """Rows of each split as their source has them, the data set's name, and where from."""
    name, files = config.dataset, files_of(config)
    if files:
        rows = {split: read_file(path, config) for split, path in files.items()}
        one_file = Path(name) == files["train"]
        source = files["train"] if one_file else files["train"].parent
        return rows, name_of_files(config, files["train"], sha256s(rows)), str(source)
    if name in GENERATORS:
        rows = GENERATORS[name]
        return rows(name), name, f"{rows.__module__.replace('.', '/')}.py"
    if name.endswith(".txt"):
        path = Path(name)
        return read_text(path), path.stem, str(path)
    if name == "gsm8k":
        return gsm8k_rows(config)
    if Path(name).is_dir():
        fail(f"dataset={name} holds no train.jsonl, nor train{', train'.join(OWN_FILES[1:-1])}")
    if Path(name).is_file():
        fail(f"dataset={name} is a file of no kind that is read: {', '.join(OWN_FILES)}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[^:]*){0,2}", name):
        fail(f"dataset={name} is not gsm8k, {', '.join(GENERATORS)}, the path of a file "
             f"({', '.join(OWN_FILES)}) or of a folder with train.jsonl, or owner/name on the hub")
    return hub_data_set(name)


def sha256s(rows: dict[str, Sequence[dict]]) -> dict[str, str]:
    return {split: sha256_of_rows(some) for split, some in rows.items()}


def is_gsm8k(digests: dict[str, str]) -> bool:
    """Its own rows are called so, and no others, whatever they lie in."""
    return "train" in digests and all(digests.get(s, own) == own for s, own in GSM8K.items())


def name_of_files(config: Config, train: Path, digests: dict[str, str]) -> str:
    """What a data set of files is called, which must not be what another one is called."""
    if is_gsm8k(digests):
        return "gsm8k"
    stem = train.name.partition(".json")[0] if ".json" in train.name else train.stem
    alone = Path(config.dataset) == train
    name = stem if alone else train.resolve().parent.name
    if config.dataset == "gsm8k" or name.casefold() in ("gsm8k", *GENERATORS):
        return train.name if alone else f"{name} ({train.name})"
    return name


def read_file(path: Path, config: Config) -> JsonLines | Listed:
    """The pairs of a file of one's own."""
    if path.suffix in TABLES:
        return listed(read_table(path), str(path), config.bad_lines, form_of(config))
    return read_jsonl(path, config.bad_lines, form_of(config))


def read_questions(path: Path, config: Config) -> JsonLines | Listed:
    """Pairs that a trained run is asked: read as its own are, but of no group."""
    return read_file(path, replace(config, group=""))


def hub_data_set(dataset: str) -> tuple[dict[str, Sequence[dict[str, str]]], str, str]:
    """As load_rows, for owner/name, owner/name:configuration or owner/name:configuration:split,
    the split to train on; validation and test are those that are called so."""
    name, configuration, train = [*dataset.split(":"), "", ""][:3]
    reason = hub_unreachable(name)
    configuration = configuration or (HUB_CONFIG if name == HUB_ID else None)
    try:
        splits = hub_rows(name, configuration, offline=bool(reason))
    except Exception as error:  # the hub's many ways to fail: not cached, refused, renamed, ...
        fail(f"dataset={dataset}: the hub gave none ({reason or first_line(error)}); it is "
             "written owner/name:configuration:split, and without a hub as a file")
    train = train or "train"
    if train not in splits:
        fail(f"dataset={dataset} has no split {train} but {', '.join(splits)}; name the one to "
             f"train on: {name}:{configuration or ''}:SPLIT")
    names = {"train": train, "val": "validation", "test": "test"}
    rows = {split: splits[known] for split, known in names.items()
            if known in splits and (split == "train" or known != train)}  # fmt: skip
    if unused := [split for split in splits if split not in names.values()]:
        print(f"splits not used: {', '.join(unused)}")
    return rows, "gsm8k" if is_gsm8k(sha256s(rows)) else dataset, f"hub {dataset}"


def gsm8k_rows(config: Config) -> tuple[dict[str, Sequence[dict[str, str]]], str, str]:
    """As load_rows, without local JSONL files of GSM8K: the hub, else what stands in for it."""
    folder = Path(config.data_dir or "data/gsm8k")
    if config.data_dir:  # a copy of the hub's repository, or a mistake
        if not folder.is_dir() or not any(folder.iterdir()):
            fail(f"data_dir={config.data_dir} holds no train.jsonl; give the folder that does")
        try:
            name = f"{folder.resolve().name} (train)"
            return called_gsm8k(hub_rows(str(folder), HUB_CONFIG), name, folder)
        except Exception as error:  # as many ways as below
            fail(f"{folder} holds neither train.jsonl nor a copy of {HUB_ID}: {first_line(error)}")
    reason = hub_unreachable(HUB_ID)
    try:
        rows = hub_rows(HUB_ID, HUB_CONFIG, offline=bool(reason))
        return called_gsm8k(rows, HUB_ID, f"hub {HUB_ID}")
    except Exception as error:  # the hub's many ways to fail: not cached, refused, renamed, ...
        reason = reason or first_line(error)
    if not config.offline_fallback:
        fail(f"no GSM8K: {folder}/train.jsonl is missing and the hub gave none ({reason})")
    print(
        "\n  ******************************************************************************\n"
        "  NOT GSM8K. This run uses made-up word problems (generators/word_problems.py),\n"
        f"  because {folder}/train.jsonl is missing and the hub gave nothing\n"
        f"  ({reason[:74]}).\n"
        "  Its results say nothing about GSM8K. For the real data, put train.jsonl and\n"
        f"  test.jsonl into {folder}/ or name their folder with --data_dir=...\n"
        "  ******************************************************************************\n"
    )
    return word_problem_rows(), "word_problems", "generators/word_problems.py"


def called_gsm8k(
    splits: dict[str, list[dict]], otherwise: str, source: str | Path
) -> tuple[dict[str, list[dict[str, str]]], str, str]:
    """As load_rows, of the splits of GSM8K's repository, question and answer alone."""
    rows = {split: [{"question": row["question"], "answer": row["answer"]} for row in some]
            for split, some in splits.items()}  # fmt: skip
    return rows, "gsm8k" if is_gsm8k(sha256s(rows)) else otherwise, str(source)


def files_of(config: Config) -> dict[str, Path]:
    """The files of pairs that the splits come from; none where they come from elsewhere."""
    name = config.dataset
    if name.endswith((*OWN_FILES, ".zst")) and not name.endswith(".txt"):
        return {"train": Path(name)}
    folder = Path(config.data_dir or "data/gsm8k") if name == "gsm8k" else Path(name)
    if name in GENERATORS or not folder.is_dir():
        return {}
    files = {}
    for split in ("train", "val", "validation", "test"):
        paths = [folder / f"{split}{ending}" for ending in OWN_FILES if ending != ".txt"]
        for path in filter(Path.is_file, paths):
            files.setdefault(split.replace("validation", "val"), path)
    return files if "train" in files else {}


def unused_files(config: Config) -> list[str]:
    """Files of a folder with splits that could hold pairs too, and of which none is a split."""
    files = files_of(config)
    if not files or Path(config.dataset) == files["train"]:
        return []
    kinds = tuple(ending for ending in OWN_FILES if ending not in (".json", ".txt"))
    return sorted(path.name for path in files["train"].parent.iterdir()
                  if path.name.endswith(kinds) and path not in files.values())  # fmt: skip


def jsonl_files(config: Config) -> dict[str, Path]:
    """As files_of, where all are JSON Lines: the tokens of those are kept."""
    files = files_of(config)
    return {} if any(path.suffix in TABLES for path in files.values()) else files


def read_text(path: Path) -> dict[str, list[dict[str, str]]]:
    """A plain text file, in lines; the last tenth of them is held out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path} as UTF-8 text: {error}")
    cut = len(lines) - len(lines) // 10
    rows = [{"text": line, "code": ""} for line in lines]
    return {"train": rows[:cut], "val": rows[cut:]}


@dataclass
class Data:
    """Splits as tokens, the tokenizer, and provenance for every result."""

    pairs: dict[str, Pairs]  # train, val and, where there is one, test
    tokenizer: Tokenizer
    provenance: dict[str, str | int]
    scoring: str  # of answers: number | final | string | regex (see generate.score)

    def score_as(self, stored: dict) -> None:
        """Scores as a checkpoint's provenance has it: decided once, when the run began."""
        self.provenance |= {k: stored[k] for k in ("scoring", "scoring_by") if k in stored}
        self.scoring = self.provenance["scoring"]


def load_data(config: Config, tokenizer: Tokenizer | None = None) -> Data:
    """Everything a run reads. `tokenizer` is a checkpoint's; None builds the config's own.
    Validation rows come out of train by a fixed permutation, the same for every seed and run
    (generators have their own validation split). The tokens of files are kept for the next run."""
    if config.trunk != "gpt":
        from hf import trunk_tokenizer

        tokenizer = tokenizer or trunk_tokenizer(config)
    elif config.tokenizer == "gpt2":
        tokenizer = tokenizer or gpt2_tokenizer()
    columns, tokenizer, provenance = load_columns(config, tokenizer)
    pairs, left_out = {}, {}
    for split in columns:
        pairs[split], left_out[split] = fitting(columns[split], tokenizer, config)
    report(config, pairs, left_out, tokenizer, provenance)
    refuse_too_few(config, pairs, provenance["source"])
    train = Pairs(*columns["train"], config, tokenizer.vocab_size)  # the long ones too
    at = np.linspace(0, len(train) - 1, min(len(train), N_SCORED)).astype(int)
    some = [tokenizer.decode(train.answer(example)) for example in at]
    provenance = {**provenance, **scoring_of(config, some)}
    if config.objective == "bag":
        provenance |= give_idf(pairs)
    if config.views not in ("facts", "split"):
        print(f"answers are scored as {provenance['scoring']}: {provenance['scoring_by']}")
    return Data(pairs, tokenizer, provenance, provenance["scoring"])


def load_columns(
    config: Config, tokenizer: Tokenizer | None
) -> tuple[dict[str, Columns], Tokenizer, dict]:
    """The tokens of each split, from where they are kept or made now; tokenizer and provenance."""
    files, folder = jsonl_files(config), None
    if files and config.views != "split":  # which runs all text together
        folder = token_columns.folder_of(files, config, tokenizer)
    if folder and token_columns.is_sound(folder):
        provenance, tokenizer, columns = token_columns.read(folder, tokenizer)
        for note in provenance.get("notes", []):  # as they were said when the files were read
            print(note)
        return columns, tokenizer, provenance
    rows, provenance = split_rows(config)
    tokenizer = tokenizer or tokenizer_for(rows["train"], config)
    provenance |= {"tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.sha256}
    if not folder:
        columns = {split: columns_of(some[:], tokenizer, config) for split, some in rows.items()}
        return columns, tokenizer, provenance
    fields = token_columns.fields_of(config)
    chunks = {split: chunks_of(some, tokenizer, fields) for split, some in rows.items()}
    token_columns.write(folder, provenance, tokenizer, chunks)
    return token_columns.read(folder, tokenizer)[-1], tokenizer, provenance


def report(
    config: Config, pairs: dict[str, Pairs], left_out: dict[str, int], tokenizer: Tokenizer,
    provenance: dict,
) -> None:
    """What was loaded and what was not, in a few lines."""
    counts = ", ".join(f"{split} {len(p)}" for split, p in pairs.items())
    print(f"data {provenance['dataset']} from {provenance['source']}: {counts} pairs; "
          f"sha256 of train {provenance['train_sha256'][:12]}")
    if config.dataset == "gsm8k" and provenance["dataset"] not in ("gsm8k", "word_problems"):
        print(f"not GSM8K: {provenance['source']} holds other rows, so the results are those of "
              f"{provenance['dataset']}")
    if unused := unused_files(config):
        print(f"files not used: {', '.join(unused)}")
    report_repeated(config, provenance)
    if provenance["dataset"] == "word_problems":
        print("validation and test hold out whole kinds of problems: their loss stands far above "
              "the training loss")
    size, asked = tokenizer.size, config.bpe_vocab_size
    fewer = f", {asked} were asked for, but train has no more pairs to merge"
    fewer = fewer if tokenizer.name == "bpe" and size < asked else ""
    print(f"tokenizer {tokenizer.name}: {size} tokens{fewer}; train holds "
          f"{pairs['train'].lengths[:, :2].sum():,}")
    usable = {split: int(p.has_target(np.arange(len(p))).sum()) for split, p in pairs.items()}
    if config.views.startswith("steps") or any(usable[s] < len(p) for s, p in pairs.items()):
        counts = ", ".join(f"{split} {usable[split]} of {len(p)}" for split, p in pairs.items())
        print(f"with two views, so with a JEPA term: {counts}")
    if "systems" in provenance:
        print(f"system prompts: {provenance['systems']} different ones in train; sample.py "
              "--system=... says which stands before a question of yours")
    if any(left_out.values()):
        print(f"left out as longer than block_size={config.block_size}: {left_out}")


def report_repeated(config: Config, provenance: dict) -> None:
    """Which rows were kept together, and which held-out ones ask what train answers."""
    if n := provenance.get("kept_together"):
        what = f"groups (the same {config.group}, or question)" if config.group else (
            "questions that occur more than once")  # fmt: skip
        print(f"kept together: {provenance['kept_together_rows']} rows of {n} {what}")
    for split in ("val", "test"):
        for key, what in ((f"{split}_in_train", "questions"),
                          (f"{split}_groups_in_train", f"rows' {config.group}")):
            if n := provenance.get(key):
                print(f"{n} of {provenance[f'{split}_rows']} {split} {what} are in train")


def refuse_too_few(config: Config, pairs: dict[str, Pairs], source: str) -> None:
    """Exit where the pairs do not make a batch or an evaluation."""
    if len(pairs["train"]) < config.batch_size:
        fail(f"{len(pairs['train'])} training pairs from {source} are fewer than "
             f"batch_size={config.batch_size}; lower it or bring more data")
    n_val = pairs["val"].has_target(np.arange(min(config.eval_pairs, len(pairs["val"])))).sum()
    if n_val < 2:
        why = " with two steps" if config.views.startswith("steps") else ""
        unit = "lines" if config.dataset.endswith(".txt") else "pairs"
        fail(f"{n_val} validation pairs{why} from {source}: mismatched cosine needs 2, and "
             f"validation takes a tenth of train; bring at least 20 {unit}")


def split_rows(config: Config) -> tuple[dict[str, Sequence[dict[str, str]]], dict]:
    """Rows of train, val and perhaps test, as pairs where views are of pairs; and provenance."""
    rows, name, source = load_rows(config)
    of_pairs = config.views != "facts" and not config.dataset.endswith(".txt")
    if of_pairs:
        rows = {split: some if isinstance(some, JsonLines | Listed) else listed(
                    some, f"{source}, {split}", config.bad_lines, form_of(config))
                for split, some in rows.items()}  # fmt: skip
    digests = {f"{split}_sha256": digest for split, digest in sha256s(rows).items()}
    given, made = [split for split in ("val", "test") if split in rows], {}
    notes = [f"{split}: {note}" for split in rows if of_pairs for note in rows[split].found.notes()]
    if "val" not in rows:
        rows["train"], rows["val"], made = held_out(rows["train"], config)
    if config.train_rows:
        n_rows = len(rows["train"])
        if config.train_rows > n_rows:
            fail(f"train_rows={config.train_rows}: {source} has {n_rows} training rows")
        chosen = np.random.default_rng(1).permutation(n_rows)[: config.train_rows]
        rows["train"] = take(rows["train"], np.sort(chosen))
    counts = {f"{split}_rows": len(some) for split, some in rows.items()}
    provenance = {"dataset": name, "source": source, **counts, **digests}
    if of_pairs:
        provenance |= made | in_train(rows, given, config)
        systems = rows["train"].found.systems
        no_place = [f"{key}={value}" for key, value in (("layout", "isolated"), ("views", "split"))
                    if getattr(config, key) == value]  # fmt: skip
        if any(systems) and config.system_prompt == "keep" and no_place:
            notes.append(f"system prompts are left out: {no_place[0]} has no place for them")
            print(notes[-1])
        elif any(systems) and config.system_prompt == "keep":
            # What a question asked later begins with; of several, whoever asks names one.
            one, more = {"system": next(iter(systems))}, " or more" * (len(systems) == SYSTEMS)
            provenance |= one if len(systems) == 1 else {"systems": f"{len(systems)}{more}"}
    return rows, provenance | ({"notes": notes} if notes else {})


def held_out(rows: JsonLines | Listed, config: Config) -> tuple[Sequence, Sequence, dict]:
    """Train and validation, and what was kept together: whole questions are held out, and whole
    groups, so that no copy of what is asked was trained on.

    Rows come in a fixed random order, and with each row all that belong with it, until there are
    enough; what has more rows than that stays in train."""
    component = together(questions_of(rows), groups_of(rows))
    order = np.random.default_rng(0).permutation(len(rows))
    n_val, ordered = min(512, len(order) // 10), component[order]
    turn = ordered[np.sort(np.unique(ordered, return_index=True)[1])]  # as they come first
    n_rows = np.bincount(component)
    if n_val and len(n_rows) == 1:
        fail(f"all {len(rows)} rows of train belong together, so none can be held out: they have "
             f"one question{' or ' + config.group if config.group else ''}")
    small = turn[n_rows[turn] <= n_val]
    enough = small[: np.searchsorted(n_rows[small].cumsum(), n_val) + 1]
    if n_val and not len(small):
        enough = turn[n_rows[turn].argmin()]
    chosen = np.isin(ordered, enough)
    split = take(rows, np.sort(order[~chosen])), take(rows, order[chosen])
    many = n_rows[n_rows > 1]
    if not len(many):
        return *split, {}
    return *split, {"kept_together_rows": int(many.sum()), "kept_together": len(many)}


def together(questions: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(n,) a number for each row, the same for rows of one question or one group; a row may join
    its question with its group."""
    numbers = [np.unique(keys, return_inverse=True)[1] for keys in (questions, groups) if len(keys)]
    if len(numbers) == 1:
        return numbers[0]
    lowest, before = np.arange(len(questions)), None  # number of a row that it belongs with
    while not np.array_equal(lowest, before):
        before = lowest
        for number in numbers:
            least = np.full(number.max() + 1, len(lowest))
            np.minimum.at(least, number, lowest)
            lowest = least[number]
        lowest = lowest[lowest]
    return np.unique(lowest, return_inverse=True)[1]


def in_train(rows: dict[str, JsonLines | Listed], given: list[str], config: Config) -> dict:
    """How many rows of the splits that were given ask what train answers, where any does."""
    kinds = {"": questions_of} | ({"_groups": groups_of} if config.group else {})
    counts = {f"{split}{kind}_in_train": int(np.isin(keys(rows[split]), keys(rows["train"])).sum())
              for kind, keys in kinds.items() for split in given}  # fmt: skip
    return {key: count for key, count in counts.items() if count}


def questions_seen(rows: JsonLines | Listed, config: Config, *splits: str) -> np.ndarray:
    """(n,) which of these rows, of a file, ask a question of these splits of a config's data. That
    is read once more for it: kept tokens hold no questions."""
    with contextlib.redirect_stdout(io.StringIO()):  # all of it was said before
        known = split_rows(config)[0]
    return np.isin(questions_of(rows), np.concatenate([questions_of(known[s]) for s in splits]))


def same_split(a: dict, b: dict) -> bool:
    """Do two provenances tell of the same train and validation rows?"""
    keys = ("train_sha256", "val_sha256", "kept_together", "kept_together_rows")
    return all(a.get(key) == b.get(key) for key in keys)


def take(rows: Sequence, at: np.ndarray) -> Sequence:
    return rows.take(at) if hasattr(rows, "take") else [rows[i] for i in at]


def tokenizer_for(train: Sequence[dict[str, str]], config: Config) -> Tokenizer:
    """The tokenizer that a config without GPT-2's gets from its data."""
    if config.tokenizer == "words":
        return word_tokenizer(facts_of(config.dataset)[0].words())
    texts = (row.get(key, "") for some in in_chunks(train) for row in some
             for key in ("text", "code"))  # fmt: skip
    return train_tokenizer(texts, config.bpe_vocab_size)


def in_chunks(rows: Sequence, size: int = 10_000) -> Iterator[Sequence]:
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))


def chunks_of(rows: Sequence, tokenizer: Tokenizer, config: Config) -> Iterator[Columns]:
    bar = Bar("tokens", "row", len(rows))
    for some in in_chunks(rows):
        yield columns_of(some, tokenizer, config, bar.done)
        bar.move(len(some))
