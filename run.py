"""A run: its folder under out/, written by train.py and opened by the other scripts.

    make_model(config, vocab_size)  the only place where a trunk is constructed
    load_run(path, device)          a trained run, ready to evaluate
    data_of(run, folder)            the data that it was trained on, or a line that says it is not
    prompt_of(run, question)        a question of the user's, as the run is asked
    Folder, Progress, restore       what training writes, and goes on from
"""

import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import LATER, Config, check, fail, parse_args, relocated, what
from data import Data, load_data, same_split
from model import GPT, Trunk
from plumbing import files
from plumbing.processes import clock, dtype_on, versions
from plumbing.tokenizers import Tokenizer, load_tokenizer
from plumbing.track import Tracker, start_tracker
from views import frames, layout_of, pred_tokens

FORMAT = "nanoJEPA 2"  # of a checkpoint


def make_model(config: Config, vocab_size: int, about: dict | None = None) -> Trunk:
    """The network of a config, untrained or pretrained; what is new in it comes from torch's random
    state. `about` is that of a checkpoint whose weights it will get."""
    if config.trunk != "gpt":
        from hf import load_trunk

        return load_trunk(config, layout_of(config).parents, about)
    return GPT(config, vocab_size, layout_of(config).parents)


@dataclass
class Run:
    """A trained model with what is needed to use it."""

    name: str
    path: Path
    config: Config
    model: Trunk
    tokenizer: Tokenizer
    step: int
    provenance: dict[str, Any]


def load_run(path: Path, device: torch.device, best: bool = False) -> Run:
    """The run at `path`, ready to evaluate: a folder (its last checkpoint, or the best one) or a
    checkpoint file."""
    if path.is_file() and best:
        fail(f"{path} is a checkpoint already; --best takes the best.pt of a run's folder")
    path = path / ("best.pt" if best else "ckpt.pt") if path.is_dir() else path
    state = files.read_checkpoint(path, FORMAT)
    config = config_of(state, path)
    tokenizer = tokenizer_of(state, path)
    model = make_model(config, tokenizer.vocab_size, state.get("trunk"))
    try:
        model.load_trained(state["model"])
    except RuntimeError as error:
        fail(f"{path}: its weights do not fit its config ({str(error).splitlines()[0]})")
    name = path.parent.name if path.stem == "ckpt" else f"{path.parent.name}/{path.stem}"
    return Run(name, path, config, model.to(device).eval(), tokenizer, state["step"],
               state["provenance"])


def data_of(run: Run, folder: str) -> Data:
    """The data that a run was trained on, in `folder` or, if that is empty, where it was; one line
    and exit 2 if other data lies there."""
    trained_on, dataset = run.provenance["data"], run.config.dataset
    if not folder and trained_on["source"] == dataset and not Path(dataset).exists():
        fail(f"{dataset}, which {run.path} was trained on, is gone; --data_dir=... names the "
             "folder or file where it is now")
    data = load_data(relocated(run.config, folder), run.tokenizer)
    if data.provenance["train_sha256"] != trained_on["train_sha256"]:
        fail(f"{run.path} was trained on {trained_on['dataset']} from {trained_on['source']}, "
             f"other data than {data.provenance['source']} holds; --data_dir names a folder")
    if not same_split(trained_on, data.provenance):
        print(f"note: {run.path} was trained with another split of its data, so what is validation "
              "now may be what it was trained on")
    data.score_as(trained_on)
    return data


def chosen_run(names: list[str], out_dir: str, device: torch.device, best: bool = False) -> Run:
    """The one run that a command line names, as an argument or as --out_dir; else the newest."""
    names = [*names, out_dir] if out_dir else names
    if len(names) > 1:
        fail(f"one run at a time, got {' '.join(names)}")
    return load_run(Path(names[0]) if names else runs_newest_first()[0], device, best)


def runs_newest_first() -> list[Path]:
    """The folders under out/ that hold a checkpoint."""
    found = sorted(Path("out").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime, reverse=True)
    if not found:
        fail("no run under out/ yet; train one first: python train.py config/gsm8k_jepa.py")
    return [path.parent for path in found]


def config_of(state: dict[str, Any], path: Path) -> Config:
    unknown = set(state["config"]) - {f.name for f in fields(Config)}
    if unknown:
        fail(f"{path} has config fields that this version lacks: {', '.join(sorted(unknown))}")
    return Config(**state["config"])


def tokenizer_of(state: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with."""
    saved = state["tokenizer"]
    tokenizer = load_tokenizer(saved["name"], saved["dump"])
    if tokenizer.sha256 != saved["sha256"]:
        fail(f"{path} was made with another tokenizer ({saved['name']} {saved['sha256'][:12]}, "
             f"here {tokenizer.sha256[:12]}); its answers would be noise")
    return tokenizer


def prompt_of(run: Run, question: str, system: str | None = None) -> list[int]:
    """The tokens that an answer to a user's question continues; `system` stands before it or, if
    None, the run's own. ValueError with a sentence for a question that it cannot be asked."""
    tokenizer, config = run.tokenizer, run.config
    try:
        [ids] = tokenizer.encode([question])
    except ValueError as error:
        raise ValueError(f"{question[:60]!r}: {error} of {run.path}, which has words such as "
                         "'a3 b4 r2'") from None  # fmt: skip
    row = run.provenance["data"] if system is None else {"system": system}
    before, after, bare = [], [], []  # running text and facts go on without an end mark
    if config.views not in ("split", "facts"):
        [(before, after, _), (bare, _, _)] = frames([row, {}], tokenizer, config)
    if system and before == bare:
        raise ValueError(f"{run.path} was trained without system prompts (system_prompt="
                         f"{config.system_prompt}, layout={config.layout}, views={config.views}): "
                         "none can stand before a prompt")  # fmt: skip
    ids = [*before, *ids, *after, *pred_tokens(config, tokenizer.vocab_size)]
    if not 0 < len(ids) < config.block_size:
        raise ValueError(f"the prompt has {len(ids):,} tokens, its end mark included; the context "
                         f"of {run.path} leaves room for {config.block_size - 1:,}")  # fmt: skip
    return ids


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds it."""

    step: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    best_ce: float = math.inf
    best_step: int = 0  # at which it was measured

    def measured(self, val_ce: float) -> bool:
        """Note an evaluation at this step; is it the best so far?"""
        better = val_ce < self.best_ce
        if better:
            self.best_ce, self.best_step = val_ce, self.step
        return better

    def is_enough(self, config: Config) -> bool:
        """Have config.patience evaluations gone by since the best one? Counted by steps, so that
        one which a resumed run repeats counts once."""
        since = self.step // config.eval_interval - self.best_step // config.eval_interval
        return self.step < config.max_iters and 0 < config.patience <= since

    def line(self, total: dict, recent, measures: dict, config: Config) -> str:
        """Loss and terms of this step, speed over recent ones, cosines of the last evaluation."""
        seconds, tokens = map(sum, zip(*recent))
        jepa = f"jepa {total['jepa']:.4f}" if "jepa" in total else "jepa -"
        cosine = (f"val cos {measures['matched']:.2f}/{measures['mismatched']:.2f} at step "
                  f"{measures['step']} | " if measures else "")  # fmt: skip
        eta = clock((config.max_iters - self.step - 1) * seconds / len(recent))
        return (f"step {self.step}/{config.max_iters} | loss {total['loss']:.4f} | "
                f"ce {total['ce']:.4f} | {jepa} | {cosine}{tokens / seconds:,.0f} tokens/s | "
                f"{1e3 * recent[-1][0]:.0f} ms | ETA {eta}")  # fmt: skip


class Folder(NamedTuple):
    """The run's folder; the first process alone writes to it."""

    path: Path
    data: Data
    provenance: dict[str, Any]
    first: bool
    tracker: Tracker = Tracker()

    def log(self, **record) -> None:
        if self.first:
            files.append_lines(self.path / "metrics.jsonl", [record])
            self.tracker.log(record)

    def how_to_resume(self) -> str:
        """The command line that goes on with this run."""
        words = shlex.split(self.provenance["command"])  # without the script's own name
        script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
        world = int(os.environ.get("WORLD_SIZE", 1))
        several = ["torchrun", "--standalone", f"--nproc_per_node={world}"]
        return shlex.join([*(several if world > 1 else ["python"]), script,
                           *(w for w in words if not w.startswith("-")), f"--out_dir={self.path}",
                           "--init_from=resume"])  # fmt: skip

    def save(self, name: str, t, progress: Progress, resumable: bool) -> None:
        """A checkpoint of t (train.Training) to evaluate, and to go on from if it is resumable; the
        one before is kept then. It holds plain types only, so that it loads without running code.
        Weights that are no numbers any more are not saved: the last good ones stay."""
        if not all(p.isfinite().all() for p in t.model.parameters()):
            fail(f"the weights are not finite at step {progress.step}, so they were not saved; "
                 f"{self.path} keeps the last checkpoint, a lower learning_rate may help")
        tokenizer, state, previous = self.data.tokenizer, {}, None
        if resumable:
            previous = files.previous_of(self.path / name)
            on_cuda = t.model.device.type == "cuda"
            state = dict(
                optimizer=t.optimizer.state_dict(), ema=t.ema.trained() if t.ema else None,
                rng=torch.get_rng_state(),
                cuda_rng=torch.cuda.get_rng_state(t.model.device) if on_cuda else None,
            )  # fmt: skip
        files.write_checkpoint(self.path / name, {
            "format": FORMAT, "config": asdict(t.pairs.config), "model": t.model.trained(),
            "trunk": t.model.about,
            "tokenizer": {"name": tokenizer.name, "dump": tokenizer.dump(),
                          "sha256": tokenizer.sha256},
            "provenance": self.provenance, "step": progress.step, "progress": asdict(progress),
            **state,
        }, previous)  # fmt: skip


class Resumed(NamedTuple):
    """What a resumed run starts from."""

    config: Config
    saved: dict[str, Any]  # the checkpoint
    tokenizer: Tokenizer | None  # a pretrained trunk's; others are made of the data, and compared
    notes: list[str]  # lines that say what is otherwise than it was


def read_to_resume(asked: Config, argv: list[str]) -> Resumed:
    """The checkpoint that a run goes on from. Its config is the checkpoint's and, over it, what the
    command line gives: where it runs, and LATER. What is trained may not change, but for where its
    data lies. A recipe that says something else by now is named in a note, and not used."""
    path = Path(asked.out_dir) / "ckpt.pt"
    path = path if asked.init_from == "resume" else files.previous_of(path)
    saved = files.read_checkpoint(path, FORMAT)
    if "optimizer" not in saved:
        fail(f"{path} is a finished cell of a sweep: it holds no optimizer, so it cannot go on; "
             "with another --out_dir it is trained anew")
    was = config_of(saved, path)
    given, recipes = parse_args(Config, argv, "")
    sittings = [*saved["provenance"].get("earlier", []), saved["provenance"]]
    changed = [
        f"{key} was {value!r}, is {given[key]!r}" for key, value in what(was).items()
        if given.get(key, value) != value and key not in LATER
        and not (key == "dataset" and Path(given[key]).exists())  # the rows' digests will tell
        and not (key == "dtype" and given[key] in [some.get(key) for some in sittings])  # auto's
    ]  # fmt: skip
    if changed:
        fail(f"{path} cannot be resumed with another config: {'; '.join(changed)}")
    folder = given.pop("data_dir", "")
    config = replace(was, **{**given, "init_from": asked.init_from, "out_dir": asked.out_dir})
    config, notes = keep_schedule(was, relocated(config, folder), "lr_decay_iters" in given)
    check(config)
    known = {word.lstrip("-").partition("=")[0] for sitting in sittings
             for word in shlex.split(sitting.get("command", ""))} | given.keys()  # fmt: skip
    known |= {"lr_decay_iters"} if "max_iters" in known else set()
    known |= {"dataset"} if folder or "data_dir" in known else set()
    differs = [f"{key}={getattr(asked, key)!r} (the run: {value!r})"
               for key, value in what(was).items()
               if key not in known and getattr(asked, key) != value]  # fmt: skip
    if recipes and differs:
        notes.append(f"note: the recipe {recipes[0]} is not the run's any more, and not used: it "
                     f"says {', '.join(differs)}")  # fmt: skip
    tokenizer = tokenizer_of(saved, path) if saved.get("trunk") else None
    return Resumed(config, saved, tokenizer, notes)


def keep_schedule(was: Config, config: Config, bends: bool) -> tuple[Config, list[str]]:
    """The learning rate goes on as it was planned, however many steps are asked for now, unless the
    command line `bends` it."""
    end = was.lr_decay_iters or was.max_iters
    if not bends and config.max_iters != was.max_iters:
        config = replace(config, lr_decay_iters=end)
        if config.max_iters > end:
            return config, [f"the learning rate keeps its schedule and stays at min_lr="
                            f"{config.min_lr:g} from step {end} on; --lr_decay_iters="
                            f"{config.max_iters} would bend it"]  # fmt: skip
    if (now := config.lr_decay_iters or config.max_iters) != end:
        return config, [f"the learning rate's schedule is bent: it reaches min_lr="
                        f"{config.min_lr:g} at step {now}, not {end}"]  # fmt: skip
    return config, []


def restore(t, saved: dict[str, Any], data: Data) -> Progress:
    """Put a checkpoint's state into the model, optimizer and random numbers of t (train.Training);
    how far it had come. Exits if it was trained on other data."""
    was, now = saved["provenance"]["data"], data.provenance
    # Where it lies may differ; the system prompt is part of the rows, and so of their digest.
    free = ("source", "system", "systems", "dataset", "scoring", "scoring_by", "notes",
            "val_in_train")  # fmt: skip
    changed = [key for key in now if was.get(key) != now[key] and key not in free
               and not key.startswith("test_")]  # nothing is trained on the test  # fmt: skip
    if changed:
        fail(f"{t.pairs.config.out_dir}/ckpt.pt was trained on other data: {', '.join(changed)} "
             "changed")
    data.score_as(was)
    t.model.load_trained(saved["model"])
    t.optimizer.load_state_dict(saved["optimizer"])
    if t.ema:
        t.ema.load_trained(saved["ema"])
    torch.set_rng_state(saved["rng"])
    if t.model.device.type == "cuda" and saved["cuda_rng"] is not None:
        torch.cuda.set_rng_state(saved["cuda_rng"], t.model.device)
    return Progress(**{"best_step": saved["step"], **saved["progress"]})


def provenance_of(
    argv: list[str], data: Data, trunk: Trunk, saved: dict[str, Any] | None
) -> dict[str, Any]:
    """Of what a run is made; a resumed one also says whose code took the steps before."""
    dtype = dtype_on(trunk.device, data.pairs["train"].config.dtype)
    provenance = {"data": data.provenance, **versions(), "device": trunk.device.type,
                  "dtype": dtype, "command": shlex.join(argv)}  # fmt: skip
    if trunk.about:
        provenance["trunk"] = {k: v for k, v in trunk.about.items() if k != "config"}
    if saved:
        was = saved["provenance"]
        if was.get("dtype", dtype) != dtype:
            print(f"note: the run was trained in {was['dtype']} so far and goes on in {dtype}; "
                  f"--dtype={was['dtype']} keeps what it was")  # fmt: skip
        earlier_run = {key: was[key] for key in was if key not in ("data", "earlier")}
        provenance["earlier"] = [*was.get("earlier", []),
                                 {"until_step": saved["step"], **earlier_run}]  # fmt: skip
    return provenance


def start_folder(folder: Folder, config: Config, progress: Progress, again: bool) -> Folder:
    """The folder with its tracker, and in it config.json and metrics.jsonl. A new run moves an
    earlier one of its name out of the way. A resumed one drops what was logged after its
    checkpoint, and the evaluation at that very step if it comes `again`."""
    path, kept = folder.path, []
    files.claim_run(path)
    if config.init_from == "previous":
        files.take_previous(path / "ckpt.pt")
    if config.init_from != "scratch":
        kept = [r for r in files.read_records(path / "metrics.jsonl") if r["step"] < progress.step
                or (r["step"] == progress.step and "val_ce" in r and not again)]  # fmt: skip
    elif files.has_checkpoint(path):
        print(f"moved the earlier run to {files.set_aside(path)}")
        files.claim_run(path)
    about = {"config": asdict(config), "provenance": folder.provenance}
    files.write_json(path / "config.json", about)
    files.write_lines(path / "metrics.jsonl", kept)
    return folder._replace(tracker=start_tracker(config.track, path, about))
