"""From question/answer pairs to batches of blocks: sources, views, batches.

    load_data(config)  -> Data: train, val and test pairs as tokens, the tokenizer, where from
    pairs.batch(...)   -> which examples step s trains on, a pure function of (seed, s)
    pairs.pack(...)    -> those examples as rows of blocks, ready for the model

GSM8K is looked for in a local folder, then on the hub; failing both, synthetic.py makes word
problems in its form, which are never called GSM8K.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import Config, fail
from model import PAD
from synthetic import word_problems
from tokenizer import Tokenizer, gpt2_tokenizer, train_tokenizer

HUB_ID, HUB_CONFIG = "openai/gsm8k", "main"

# The blocks of a row and, for each, the block it continues (see model.block_causal_mask):
# an answer continues its question, so do the [PRED] tokens, and the target stands alone.
TEXT, CODE, PRED, TARGET = 1, 2, 3, 4
PARENTS = (None, None, TEXT, TEXT, None)  # of PAD, TEXT, CODE, PRED, TARGET
LANGUAGE_MODEL = (TEXT, CODE)  # the blocks of a row without JEPA: an ordinary causal row


# --- sources: where the pairs come from -------------------------------------------------------


def load_rows(config: Config) -> tuple[dict[str, list[dict[str, str]]], str, str]:
    """Rows {"question", "answer"} of each split, the data set's name, and where they came from."""
    if config.dataset == "word_problems":
        return generated_rows(), "word_problems", "synthetic.py"
    folder = Path(config.data_dir or f"data/{config.dataset}")
    if (folder / "train.jsonl").exists():
        splits = ("train", "test") if (folder / "test.jsonl").exists() else ("train",)
        rows = {s: read_jsonl(folder / f"{s}.jsonl", config.bad_lines) for s in splits}
        return rows, "gsm8k", str(folder)
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


def generated_rows() -> dict[str, list[dict[str, str]]]:
    """The built-in data, GSM8K's size; its splits share no template."""
    sizes = {"train": 7473, "val": 512, "test": 1319}
    return {split: word_problems(split, n) for split, n in sizes.items()}


def read_jsonl(path: Path, bad_lines: str) -> list[dict[str, str]]:
    """Rows of a JSONL file. A line that is no question/answer pair is named as file:line, or
    counted and left out with bad_lines="skip"."""
    rows, bad = [], 0
    try:
        lines = path.read_bytes().split(b"\n")  # only "\n" ends a line: text may hold U+2028
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row = {key: row[key] for key in ("question", "answer")}
            if not all(isinstance(v, str) and v.strip() for v in row.values()):
                raise ValueError
            "".join(row.values()).encode()  # half a surrogate pair is no text
            rows.append(row)
        except (ValueError, KeyError, TypeError, RecursionError):
            if bad_lines == "error":
                fail(f'{path}:{number}: not {{"question": text, "answer": text}}; mend the line, '
                     "or --bad_lines=skip leaves such lines out")
            bad += 1
    if bad:
        print(f"{path}: left out {bad} bad lines, kept {len(rows)}")
    if not rows:
        fail(f"{path} holds no question/answer pair")
    return rows


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


# --- views: pairs as tokens, and as rows of blocks --------------------------------------------


class Rows(NamedTuple):
    """A batch for the model, each (B, T): tokens, the block of each, next tokens (-1: no label)."""

    idx: torch.Tensor
    block: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> "Rows":
        if device.type != "cuda":
            return Rows(*(t.to(device) for t in self))
        return Rows(*(t.pin_memory().to(device, non_blocking=True) for t in self))


@dataclass
class Pairs:
    """Tokenized pairs of one split: a flat token stream and where each view lies in it.

    tokens (N,) int32; starts and lengths (n, 2) int64, column 0 the text view (ends in sep),
    column 1 the code view (ends in eot).
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    config: Config
    vocab_size: int

    def __len__(self) -> int:
        return len(self.starts)

    def view(self, row: int, which: int) -> list[int]:
        """Tokens of one view: which = 0 the text, 1 the code."""
        start = self.starts[row, which]
        return self.tokens[start : start + self.lengths[row, which]].tolist()

    def batch(self, step: int) -> np.ndarray:
        """(B,) the examples of micro-batch `step`, a pure function of (seed, step).

        Every epoch is a new order without repeats. Within pools of 64 batches the examples are
        sorted by length before they are cut into batches, so that a batch needs little padding;
        then the batches are shuffled. What is left over at the end of an epoch waits for the
        next order.
        """
        B = self.config.batch_size
        epoch, step = divmod(step, len(self) // B)
        if getattr(self, "_epoch", None) != epoch:  # planning an epoch costs milliseconds
            rng = np.random.default_rng((self.config.seed, epoch))
            order = rng.permutation(len(self))[: len(self) // B * B]
            length = self.lengths[order] @ (1, 2)  # of a full row: text, code, code again
            pool = np.arange(len(order)) // (64 * B)
            order = order[np.lexsort((length, pool))].reshape(-1, B)
            self._epoch, self._order = epoch, order[rng.permutation(len(order))]
        return self._order[step]

    def pack(self, rows: np.ndarray, blocks: tuple[int, ...]) -> Rows:
        """Examples `rows` (B,) as rows that hold `blocks`, in that order, padded on the right.

        Labels: each answer token, end of text included, is the target of the token before it;
        labels="all" adds the question's. [PRED], padding and the target view carry none.
        """
        k, B = self.config.n_pred, len(rows)
        text, code = self.lengths[rows].T
        sizes = {TEXT: text, CODE: code, PRED: np.full(B, k), TARGET: code}
        begins = {TEXT: self.starts[rows, 0], CODE: self.starts[rows, 1],
                  TARGET: self.starts[rows, 1]}
        width = int(sum(sizes[b] for b in blocks).max())
        idx = np.zeros((B, width), np.int64)
        block = np.full((B, width), PAD)
        columns = np.arange(width)
        start = np.zeros((B, 1), np.int64)  # column at which the block begins, in each row
        for b in blocks:
            within = columns - start  # (B, width) index inside the block
            inside = (within >= 0) & (within < sizes[b][:, None])
            if b == PRED:
                tokens = self.vocab_size + within
            else:
                tokens = self.tokens[np.where(inside, begins[b][:, None] + within, 0)]
            idx[inside], block[inside] = tokens[inside], b
            start = start + sizes[b][:, None]
        targets = np.full((B, width), -1)
        labelled = (TEXT, CODE) if self.config.labels == "all" else (CODE,)
        is_label = np.isin(block[:, 1:], labelled)
        targets[:, :-1][is_label] = idx[:, 1:][is_label]
        return Rows(*map(torch.from_numpy, (idx, block, targets)))


def tokenize(rows: list[dict[str, str]], tokenizer: Tokenizer, config: Config) -> tuple[Pairs, int]:
    """Pairs of the rows, and how many were left out because a path is longer than block_size.
    They are left out whole: a view that lost its end would lose where its embedding is read."""
    texts = tokenizer.encode([row["question"] for row in rows])
    codes = tokenizer.encode([code_view(row["answer"], config.answer_view) for row in rows])
    views = [[*ids, mark] for pair in zip(texts, codes)
             for ids, mark in zip(pair, (tokenizer.sep, tokenizer.eot))]
    lengths = np.array([len(v) for v in views], np.int64)
    starts = (np.cumsum(lengths) - lengths).reshape(-1, 2)
    lengths = lengths.reshape(-1, 2)
    fits = np.maximum(lengths.sum(1), lengths[:, 0] + config.n_pred) <= config.block_size
    tokens = np.fromiter((t for v in views for t in v), np.int32)
    pairs = Pairs(tokens, starts[fits], lengths[fits], config, tokenizer.vocab_size)
    return pairs, int((~fits).sum())


def code_view(answer: str, answer_view: str) -> str:
    """The worked answer as it is, or only the number after its last ####."""
    return answer if answer_view == "full" else answer.rpartition("####")[2].strip()


# --- all of it --------------------------------------------------------------------------------


@dataclass
class Data:
    """Splits as tokens, the rows they came from, the tokenizer, and provenance for every result."""

    pairs: dict[str, Pairs]  # train, val and, where there is one, test
    tokenizer: Tokenizer
    provenance: dict[str, str | int]


def load_data(config: Config, tokenizer: Tokenizer | None = None) -> Data:
    """Everything a run reads. `tokenizer` is a checkpoint's; None builds the config's own.

    Validation rows come out of train by a fixed permutation, the same for every seed and run
    (the generator has its own validation split); test is never touched.
    """
    rows, name, source = load_rows(config)
    digest = {split: sha256(r) for split, r in rows.items()}
    if "val" not in rows:
        order = np.random.default_rng(0).permutation(len(rows["train"]))
        n_val = min(512, len(order) // 10)
        train = rows["train"]
        rows["val"] = [train[i] for i in order[:n_val]]
        rows["train"] = [train[i] for i in np.sort(order[n_val:])]
    if tokenizer is None and config.tokenizer == "bpe":
        train_texts = [row[key] for row in rows["train"] for key in ("question", "answer")]
        tokenizer = train_tokenizer(train_texts, config.bpe_vocab_size)
    elif tokenizer is None:
        tokenizer = gpt2_tokenizer()

    pairs, left_out = {}, {}
    for split in rows:
        pairs[split], left_out[split] = tokenize(rows[split], tokenizer, config)
    counts = ", ".join(f"{split} {len(p)}" for split, p in pairs.items())
    print(f"data {name} from {source}: {counts} pairs; sha256 of train {digest['train'][:12]}")
    print(f"tokenizer {tokenizer.name}: {tokenizer.vocab_size} tokens, "
          f"train holds {pairs['train'].lengths.sum():,}")
    if any(left_out.values()):
        print(f"left out as longer than block_size={config.block_size}: {left_out}")
    if len(pairs["train"]) < config.batch_size:
        fail(f"{len(pairs['train'])} training pairs from {source} are fewer than "
             f"batch_size={config.batch_size}; lower it or bring more data")
    if len(pairs["val"]) < 2:
        fail(f"{len(pairs['val'])} validation pairs from {source}: mismatched cosine needs 2, "
             "and validation takes a tenth of train; bring at least 20 pairs")
    provenance = {
        "dataset": name, "source": source, "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        **{f"{split}_rows": len(r) for split, r in rows.items()},
        **{f"{split}_sha256": d for split, d in digest.items()},
    }  # fmt: skip
    return Data(pairs, tokenizer, provenance)


def sha256(rows: list[dict[str, str]]) -> str:
    """Of the rows as JSON Lines: for GSM8K, from wherever, the sha256 of its published file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update((json.dumps(row) + "\n").encode())
    return digest.hexdigest()
