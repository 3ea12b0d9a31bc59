"""Rows that the library `datasets` reads: CSV and Parquet files, and data sets on the hub."""

import csv
import json
from pathlib import Path

from config import fail

ENDINGS = (".csv", ".parquet")


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV or Parquet file. All of a CSV is text, as it is written there: an answer
    007 is not 7, and NA is not a missing one."""
    import datasets

    datasets.disable_progress_bars()
    level, counts = datasets.logging.get_verbosity(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # nobody is told of a file on this machine
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would log what is raised anyway
    options = {}
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                csv.field_size_limit(2**31 - 1)  # of 131,072 characters
                lines = csv.reader(file)
                names, first = next(lines, []), next(filter(None, lines), [])
            # pandas would take the first cells for a name of the row, and shift all others.
            if len(first) > len(names) or len(set(names)) < len(names):
                fail(f"cannot read {path}: its first line must name each column once: it has "
                     f"{', '.join(names)}, and the row below has {len(first)} cells")
            features = datasets.Features({name: datasets.Value("string") for name in names})
            options = {"features": features, "keep_default_na": False}
        rows = datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train",
                                     streaming=True, **options)  # fmt: skip
        return [as_json(row) for row in rows]  # streamed: no copy in a cache
    except UnicodeDecodeError as error:
        fail(f"cannot read {path}: it is not UTF-8 ({error.reason}); iconv makes it UTF-8")
    except Exception as error:  # pandas' and pyarrow's, of many kinds
        fail(f"cannot read {path}: {first_line(error)}")
    finally:
        datasets.logging.set_verbosity(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def hub_unreachable(name: str) -> str:
    """Why the hub cannot be asked, or an empty string. One request of at most 3 seconds:
    `load_dataset` by itself retries for 23 seconds before it believes that it is offline."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().dataset_info(name, timeout=3)
    except Exception as error:  # no network, a proxy's answer, a timeout, a refusal
        return first_line(error)
    return ""


def hub_rows(name: str, configuration: str | None, offline: bool = False) -> dict[str, list[dict]]:
    """The splits of a data set: the hub's id, or a folder laid out as the hub's repository.

    offline=True takes a copy that an earlier run cached. Raises whatever `datasets` raises."""
    import datasets
    from huggingface_hub import constants

    datasets.disable_progress_bars()
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        if offline:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        splits = datasets.load_dataset(name, configuration)
        return {split: [as_json(row) for row in splits[split]] for split in splits}
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def as_json(row: dict) -> dict:
    """The row; dates and the like as text."""
    try:
        json.dumps(row)
        return row
    except TypeError:
        return json.loads(json.dumps(row, default=str))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
