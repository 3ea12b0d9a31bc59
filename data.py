"""Where the pairs come from: files, the hub, generators; and their splits, digests and provenance.

    load_data(config)  -> Data: train, val and test as views.Pairs, the tokenizer, where from

GSM8K is looked for in a local folder, then on the hub; failing both, generators/word_problems.py
makes problems in its form, which are never called GSM8K.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Config, fail
from generators.regexes import regex_rows
from generators.relations import facts_of, relation_rows
from generators.word_problems import word_problem_rows
from plumbing import columns as token_columns
from plumbing.jsonl import JsonLines, as_pair, read_jsonl, sha256_of_rows
from plumbing.tokenizers import Tokenizer, gpt2_tokenizer, train_tokenizer, word_tokenizer
from views import Columns, Pairs, columns_of, fitting

HUB_ID, HUB_CONFIG = "openai/gsm8k", "main"
GENERATORS = {"word_problems": word_problem_rows, "regex": regex_rows, "regex_depth": regex_rows,
              "relations": relation_rows, "relations_full": relation_rows}  # fmt: skip
SCORING = {"gsm8k": "number", "word_problems": "number", "regex": "regex", "regex_depth": "regex"}


def load_rows(config: Config) -> tuple[dict[str, Sequence[dict[str, str]]], str, str]:
    """Rows of each split as their source has them, the data set's name, and where from."""
    files = jsonl_files(config)
    if files:
        source = files["train"].parent if config.dataset == "gsm8k" else files["train"]
        rows = {split: read_jsonl(path, config.bad_lines) for split, path in files.items()}
        return rows, Path(config.dataset).stem, str(source)
    name = config.dataset
    if name in GENERATORS:
        rows = GENERATORS[name]
        return rows(name), name, f"{rows.__module__.replace('.', '/')}.py"
    if name.endswith(".txt"):
        path = Path(name)
        return read_text(path), path.stem, str(path)
    if name != "gsm8k":
        fail(f"dataset={name} is not gsm8k, {', '.join(GENERATORS)}, or the path of a .jsonl or "
             ".txt file")
    return gsm8k_rows(config)


def gsm8k_rows(config: Config) -> tuple[dict[str, Sequence[dict[str, str]]], str, str]:
    """As load_rows, without local JSONL files of GSM8K: the hub, else what stands in for it."""
    folder = Path(config.data_dir or "data/gsm8k")
    if config.data_dir:  # a copy of the hub's repository, or a mistake
        if not folder.is_dir() or not any(folder.iterdir()):
            fail(f"data_dir={config.data_dir} holds no train.jsonl; give the folder that does")
        try:
            return hub_rows(str(folder)), "gsm8k", str(folder)
        except Exception as error:  # as many ways as below
            fail(f"{folder} holds neither train.jsonl nor a copy of {HUB_ID}: "
                 f"{type(error).__name__}: {error}".splitlines()[0])
    reason = hub_unreachable()
    try:
        return hub_rows(HUB_ID, offline=bool(reason)), "gsm8k", f"hub {HUB_ID}"
    except Exception as error:  # the hub's many ways to fail: not cached, refused, renamed, ...
        reason = reason or f"{type(error).__name__}: {error}".splitlines()[0]
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


def jsonl_files(config: Config) -> dict[str, Path]:
    """The files of pairs that the splits come from; none where they come from elsewhere."""
    if config.dataset.endswith(".jsonl"):
        return {"train": Path(config.dataset)}
    folder = Path(config.data_dir or "data/gsm8k")
    if config.dataset != "gsm8k" or not (folder / "train.jsonl").exists():
        return {}
    files = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    return {split: path for split, path in files.items() if path.exists()}


def read_text(path: Path) -> dict[str, list[dict[str, str]]]:
    """A plain text file, in lines; the last tenth of them is held out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path} as UTF-8 text: {error}")
    cut = len(lines) - len(lines) // 10
    rows = [{"text": line, "code": ""} for line in lines]
    return {"train": rows[:cut], "val": rows[cut:]}


def hub_unreachable() -> str:
    """Why the hub cannot be asked, or an empty string. One request of at most 3 seconds:
    `load_dataset` by itself retries for 23 seconds before it believes that it is offline."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().dataset_info(HUB_ID, timeout=3)
    except Exception as error:  # no network, a proxy's answer, a timeout, a refusal
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def hub_rows(name: str, offline: bool = False) -> dict[str, list[dict[str, str]]]:
    """GSM8K through `datasets`: the hub's id, or a folder laid out as the hub's repository.

    offline=True takes a copy that an earlier run cached. Raises whatever `datasets` raises."""
    import datasets
    from huggingface_hub import constants

    datasets.disable_progress_bars()
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if offline:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        splits = datasets.load_dataset(name, HUB_CONFIG)
        return {
            split: [{"question": r["question"], "answer": r["answer"]} for r in splits[split]]
            for split in splits
        }
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@dataclass
class Data:
    """Splits as tokens, the tokenizer, and provenance for every result."""

    pairs: dict[str, Pairs]  # train, val and, where there is one, test
    tokenizer: Tokenizer
    provenance: dict[str, str | int]
    scoring: str  # of answers: number | final | string | regex (see generate.score)


def load_data(config: Config, tokenizer: Tokenizer | None = None) -> Data:
    """Everything a run reads. `tokenizer` is a checkpoint's; None builds the config's own.
    Validation rows come out of train by a fixed permutation, the same for every seed and run
    (generators have their own validation split). The tokens of files are kept for the next run."""
    if config.tokenizer == "gpt2":
        tokenizer = tokenizer or gpt2_tokenizer()
    columns, tokenizer, provenance = load_columns(config, tokenizer)
    pairs, left_out = {}, {}
    for split in columns:
        pairs[split], left_out[split] = fitting(columns[split], tokenizer, config)
    report(config, pairs, left_out, tokenizer, provenance)
    refuse_too_few(config, pairs, provenance["source"])
    scoring = SCORING.get(provenance["dataset"], "string")
    if scoring == "number" and config.answer_view == "final":
        scoring = "final"  # the answer is the number alone
    return Data(pairs, tokenizer, provenance, scoring)


def load_columns(
    config: Config, tokenizer: Tokenizer | None
) -> tuple[dict[str, Columns], Tokenizer, dict]:
    """The tokens of each split, from where they are kept or made now; tokenizer and provenance."""
    files, folder = jsonl_files(config), None
    if files and config.views != "split":  # which runs all text together
        folder = token_columns.folder_of(files, config, tokenizer)
    if folder and folder.exists():
        provenance, tokenizer, columns = token_columns.read(folder, tokenizer)
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
    if provenance["dataset"] == "word_problems":
        print("validation and test hold out whole kinds of problems: their loss stands far above "
              "the training loss")
    size, asked = tokenizer.sep + 1, config.bpe_vocab_size  # the table's padding left out
    fewer = f", {asked} were asked for, but train has no more pairs to merge"
    fewer = fewer if tokenizer.name == "bpe" and size < asked else ""
    print(f"tokenizer {tokenizer.name}: {size} tokens{fewer}; train holds "
          f"{pairs['train'].lengths[:, :2].sum():,}")
    usable = {split: int(p.has_target(np.arange(len(p))).sum()) for split, p in pairs.items()}
    if config.views.startswith("steps") or any(usable[s] < len(p) for s, p in pairs.items()):
        counts = ", ".join(f"{split} {usable[split]} of {len(p)}" for split, p in pairs.items())
        print(f"with two views, so with a JEPA term: {counts}")
    if any(left_out.values()):
        print(f"left out as longer than block_size={config.block_size}: {left_out}")


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
    digests = {f"{split}_sha256": sha256_of_rows(some) for split, some in rows.items()}
    if "val" not in rows:
        order = np.random.default_rng(0).permutation(len(rows["train"]))
        n_val = min(512, len(order) // 10)
        rows["val"] = take(rows["train"], order[:n_val])
        rows["train"] = take(rows["train"], np.sort(order[n_val:]))
    if config.train_rows:
        n_rows = len(rows["train"])
        if config.train_rows > n_rows:
            fail(f"train_rows={config.train_rows}: {source} has {n_rows} training rows")
        chosen = np.random.default_rng(1).permutation(n_rows)[: config.train_rows]
        rows["train"] = take(rows["train"], np.sort(chosen))
    if config.views != "facts" and not config.dataset.endswith(".txt"):
        rows = {split: some if isinstance(some, JsonLines) else [as_pair(row) for row in some]
                for split, some in rows.items()}  # fmt: skip
    counts = {f"{split}_rows": len(some) for split, some in rows.items()}
    provenance = {"dataset": name, "source": source, **counts, **digests}
    systems = {row.get("system", "") for row in rows["train"][:1000]}
    if len(systems) == 1 and any(systems) and config.system_prompt == "keep":
        [provenance["system"]] = systems  # what a question asked later has to begin with
    return rows, provenance


def take(rows: Sequence, at: np.ndarray) -> Sequence:
    return rows.take(at) if isinstance(rows, JsonLines) else [rows[i] for i in at]


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
    first = 0
    for some in in_chunks(rows):
        yield columns_of(some, tokenizer, config, first)
        first += len(some)
