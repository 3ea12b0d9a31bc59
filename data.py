"""Where the pairs come from: files, the hub, generators; and their splits, digests and provenance.

    load_data(config)  -> Data: train, val and test as views.Pairs, the tokenizer, where from

GSM8K is looked for in a local folder, then on the hub; failing both, synthetic.py makes word
problems in its form, which are never called GSM8K.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import token_cache
from config import Config, fail
from regexes import regex_pairs
from relations import Facts, relation_facts
from synthetic import word_problems
from tokenizer import Tokenizer, gpt2_tokenizer, train_tokenizer, word_tokenizer
from views import Columns, Pairs, columns_of, fitting

HUB_ID, HUB_CONFIG = "openai/gsm8k", "main"


# --- sources: where the pairs come from -------------------------------------------------------


def load_rows(config: Config) -> tuple[dict[str, Sequence[dict[str, str]]], str, str]:
    """Rows of each split as their source has them, the data set's name, and where from."""
    files = jsonl_files(config)
    if files:
        source = files["train"].parent if config.dataset == "gsm8k" else files["train"]
        rows = {split: read_jsonl(path, config.bad_lines) for split, path in files.items()}
        return rows, Path(config.dataset).stem, str(source)
    if config.dataset == "word_problems":
        return generated_rows(), "word_problems", "synthetic.py"
    if config.dataset == "regex":
        sizes = {"train": 8000, "val": 512, "test": 1000}
        by_depth = config.regex_split == "depth"
        rows = {s: regex_pairs(s, n, by_depth=by_depth) for s, n in sizes.items()}
        return rows, "regex", "regexes.py"
    if config.dataset == "relations":
        return relation_rows(config), "relations", "relations.py"
    if config.dataset.endswith(".txt"):
        path = Path(config.dataset)
        return read_text(path), path.stem, str(path)
    if config.dataset != "gsm8k":
        fail(f"dataset={config.dataset} is not gsm8k, word_problems, regex, relations, or the path "
             "of a .jsonl or .txt file")
    folder = Path(config.data_dir or f"data/{config.dataset}")
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
        "  NOT GSM8K. This run uses word problems made by synthetic.py, because\n"
        f"  {folder}/train.jsonl is missing and the hub gave nothing\n  ({reason[:74]}).\n"
        "  Its results say nothing about GSM8K. For the real data, put train.jsonl and\n"
        f"  test.jsonl into {folder}/ or name their folder with --data_dir=...\n"
        "  ******************************************************************************\n"
    )
    return generated_rows(), "word_problems", "synthetic.py"


def jsonl_files(config: Config) -> dict[str, Path]:
    """The files of pairs that the splits come from; none where they come from elsewhere."""
    if config.dataset.endswith(".jsonl"):
        return {"train": Path(config.dataset)}
    folder = Path(config.data_dir or "data/gsm8k")
    if config.dataset != "gsm8k" or not (folder / "train.jsonl").exists():
        return {}
    files = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    return {split: path for split, path in files.items() if path.exists()}


def generated_rows() -> dict[str, list[dict[str, str]]]:
    """The built-in data, GSM8K's size; its splits share no template."""
    sizes = {"train": 7473, "val": 512, "test": 1319}
    return {split: word_problems(split, n) for split, n in sizes.items()}


def relation_rows(config: Config) -> dict[str, list[dict[str, str]]]:
    """Facts as words. Trained on: train facts in both directions, each with its inverse to predict,
    and atomic facts in one, with none. Held out: the atomic facts' inverses, half each for val and
    test; there the fact to predict from is the inverse, and the target the trained fact."""
    ids, facts = facts_of(config)
    words = ids.words()

    def join(ids):
        return "".join(words[i] for i in ids)

    def rows(split, with_target):
        inverses = facts[split]["inverse"] if with_target else [[]] * len(facts[split]["rows"])
        return [
            {"text": join(fact[:3]), "code": join(fact[3:]), "target": join(inverse)}
            for fact, inverse in zip(facts[split]["rows"], inverses)
        ]  # fmt: skip

    held_out = rows("held_out", True)
    return {"train": rows("train", True) + rows("atomic", False),
            "val": held_out[::2], "test": held_out[1::2]}  # fmt: skip


def facts_of(config: Config) -> tuple[Facts, dict[str, dict[str, np.ndarray]]]:
    """The token ids and the facts of dataset=relations, the same for every seed."""
    sizes = [config.n_relations, config.n_train_entities, config.n_atomic_entities,
             config.n_train_facts, config.n_atomic_facts]  # fmt: skip
    try:
        facts = relation_facts(*sizes, seed=0)
    except ValueError as error:
        fail(str(error))
    return Facts(config.n_relations, config.n_train_entities + config.n_atomic_entities), facts


def read_text(path: Path) -> dict[str, list[dict[str, str]]]:
    """A plain text file, in lines; the last tenth of them is held out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {path} as UTF-8 text: {error}")
    cut = len(lines) - len(lines) // 10
    rows = [{"text": line, "code": ""} for line in lines]
    return {"train": rows[:cut], "val": rows[cut:]}


class JsonLines(Sequence):
    """Pairs in a file (see read_jsonl), parsed anew whenever asked for: memory holds no more than
    the place of each line. sha256 is of all rows."""

    def __init__(self, path: Path, places: np.ndarray, sha256: str):
        self.path, self.places, self.sha256 = path, places, sha256

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at):
        if not isinstance(at, slice):
            return self[at : at + 1][0]
        pairs = []
        with open(self.path, "rb") as file:
            for place in self.places[at].tolist():
                file.seek(place)
                pairs.append(as_pair(json.loads(file.readline())))
        return pairs

    def take(self, rows: np.ndarray) -> "JsonLines":
        return JsonLines(self.path, self.places[rows], self.sha256)


def read_jsonl(path: Path, bad_lines: str) -> JsonLines:
    """The pairs of a JSONL file. A line that is no pair (see as_pair) is named as file:line, or
    counted and left out with bad_lines="skip"."""
    places, end, n_bad, digest = array("q"), 0, 0, hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):  # only "\n" ends one: text may hold U+2028
                begin, end = end, end + len(line)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    as_pair(row)
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    if bad_lines == "error":
                        fail(f"{path}:{number}: no pair of texts (question and answer, text and "
                             "code, or messages); mend the line, or --bad_lines=skip leaves such "
                             "lines out")
                    n_bad += 1
                    continue
                places.append(begin)
                digest.update(as_line(row))
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    if n_bad:
        print(f"{path}: left out {n_bad} bad lines, kept {len(places)}")
    if not places:
        fail(f"{path} holds no pair")
    return JsonLines(path, np.array(places), digest.hexdigest())


def as_pair(row: dict) -> dict[str, str]:
    """{"text", "code", "system"} of a row in any form; raises one of several errors for others.

    {"question", "answer"}, {"text", "code"}, or {"messages": [...]} with roles: the last message,
    the assistant's, is the code; an optional first one of the system is kept apart; all between
    them (several turns, perhaps) is the text.
    """
    system = ""
    if "messages" in row:
        messages = row["messages"]
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        *turns, last = messages
        if last["role"] != "assistant":
            raise ValueError("the last message is not the assistant's")
        pair = {"text": "\n".join(m["content"] for m in turns), "code": last["content"]}
    else:
        text, code = ("question", "answer") if "question" in row else ("text", "code")
        pair = {"text": row[text], "code": row[code]}
    for value in (*pair.values(), system + "x"):
        if not value.strip():
            raise ValueError("a view is empty")
        value.encode()  # half a surrogate pair is no text
    return {**pair, "system": system}


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


# --- all of it --------------------------------------------------------------------------------


@dataclass
class Data:
    """Splits as tokens, the rows they came from, the tokenizer, and provenance for every result."""

    pairs: dict[str, Pairs]  # train, val and, where there is one, test
    tokenizer: Tokenizer
    provenance: dict[str, str | int]
    answers: str  # how they are scored: number | final | string | regex (see evaluate.score)


def load_data(config: Config, tokenizer: Tokenizer | None = None) -> Data:
    """Everything a run reads. `tokenizer` is a checkpoint's; None builds the config's own.

    Validation rows come out of train by a fixed permutation, the same for every seed and run
    (the generator has its own validation split); test is never touched. The tokens of files are
    kept for the next run (see token_cache).
    """
    if config.tokenizer == "gpt2":
        tokenizer = tokenizer or gpt2_tokenizer()
    files, folder = jsonl_files(config), None
    if files and config.views != "split":  # which runs all text together
        folder = token_cache.folder_of(files, config, tokenizer)
    if folder and folder.exists():
        provenance, tokenizer, columns = token_cache.read(folder, tokenizer)
    else:
        rows, provenance = split_rows(config)
        tokenizer = tokenizer or tokenizer_for(rows["train"], config)
        provenance |= {"tokenizer": tokenizer.name, "tokenizer_sha256": tokenizer.sha256}
        if folder:
            chunks = {s: chunks_of(some, tokenizer, config) for s, some in rows.items()}
            token_cache.write(folder, provenance, tokenizer, chunks)
            columns = token_cache.read(folder, tokenizer)[-1]
        else:
            columns = {s: columns_of(some[:], tokenizer, config) for s, some in rows.items()}

    name, source = provenance["dataset"], provenance["source"]
    pairs, left_out = {}, {}
    for split in columns:
        pairs[split], left_out[split] = fitting(columns[split], tokenizer, config)
    counts = ", ".join(f"{split} {len(p)}" for split, p in pairs.items())
    print(f"data {name} from {source}: {counts} pairs; "
          f"sha256 of train {provenance['train_sha256'][:12]}")
    print(f"tokenizer {tokenizer.name}: {tokenizer.vocab_size} tokens, "
          f"train holds {pairs['train'].lengths[:, :2].sum():,}")
    usable = {split: int(p.has_target(np.arange(len(p))).sum()) for split, p in pairs.items()}
    if config.views == "steps" or any(usable[split] < len(p) for split, p in pairs.items()):
        counts = ", ".join(f"{split} {usable[split]} of {len(p)}" for split, p in pairs.items())
        print(f"with two views, so with a JEPA term: {counts}")
    if any(left_out.values()):
        print(f"left out as longer than block_size={config.block_size}: {left_out}")
    if len(pairs["train"]) < config.batch_size:
        fail(f"{len(pairs['train'])} training pairs from {source} are fewer than "
             f"batch_size={config.batch_size}; lower it or bring more data")
    n_val = pairs["val"].has_target(np.arange(min(config.eval_pairs, len(pairs["val"])))).sum()
    if n_val < 2:
        why = " with two steps" if config.views == "steps" else ""
        unit = "lines" if config.dataset.endswith(".txt") else "pairs"
        fail(f"{n_val} validation pairs{why} from {source}: mismatched cosine needs 2, and "
             f"validation takes a tenth of train; bring at least 20 {unit}")
    answers = {"gsm8k": "number", "word_problems": "number", "regex": "regex"}.get(name, "string")
    if answers == "number" and config.answer_view == "final":
        answers = "final"  # the answer is the number alone
    return Data(pairs, tokenizer, provenance, answers)


def split_rows(config: Config) -> tuple[dict[str, Sequence[dict[str, str]]], dict]:
    """Rows of train, val and perhaps test, as pairs where views are of pairs; and provenance."""
    rows, name, source = load_rows(config)
    digests = {f"{split}_sha256": sha256(some) for split, some in rows.items()}
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
        return word_tokenizer(facts_of(config)[0].words())
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


def sha256(rows: Sequence[dict]) -> str:
    """Of the rows as JSON Lines: for GSM8K, from wherever, the sha256 of its published file."""
    if isinstance(rows, JsonLines):
        return rows.sha256
    digest = hashlib.sha256()
    for row in rows:
        digest.update(as_line(row))
    return digest.hexdigest()


def as_line(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()
