"""Every knob of nanoJEPA, in one flat frozen dataclass, and the few lines that fill it.

Three layers, the later wins: the defaults below, a recipe (a file of bare assignments in
configs/), `--key=value` on the command line. Everything is checked before the first step; a
mistake is one line on stderr and exit code 2. A field's comment is also its line in `--help`.
"""

import contextlib
import difflib
import inspect
import math
import re
import runpy
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

RECIPES = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class Config:
    # the run
    recipe: str = ""  # name of the recipe; filled in by the loader
    out_dir: str = ""  # folder of the run; empty means out/<recipe>
    init_from: str = "scratch"  # scratch | resume (go on from out_dir/ckpt.pt)
    seed: int = 1337  # weights, data order, dropout
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16
    compile: bool = True  # torch.compile the model on CUDA; it is slower than eager on a CPU
    # data
    dataset: str = "gsm8k"  # gsm8k | word_problems, regex, relations (made here) | a .jsonl or .txt
    data_dir: str = ""  # folder of GSM8K's train.jsonl and test.jsonl; empty means data/gsm8k
    offline_fallback: bool = True  # train on word_problems when gsm8k cannot be had
    train_rows: int = 0  # train on this many rows, a fixed random choice; 0 is all
    regex_split: str = "random"  # random | depth (dataset=regex: test stacks more rules than train)
    bad_lines: str = "error"  # error | skip (count unreadable JSONL lines and go on)
    tokenizer: str = "gpt2"  # gpt2 (50257 tokens) | bpe (trained on train) | words (relations)
    bpe_vocab_size: int = 8192  # size of the bpe vocabulary, its two special tokens included
    answer_view: str = "full"  # full (worked answer, as in the paper) | final (number after ####)
    labels: str = "answer"  # answer | all: the tokens that cross-entropy is taken on
    views: str = "pairs"  # pairs | steps (of the answer) | split (running text) | facts (relations)
    step_pair: str = "first"  # first | random: which two neighbouring steps are the views
    jepa_split: float = 0.5  # where a block of running text is split; 0 is anywhere
    system_prompt: str = "keep"  # keep (before both views) | drop
    # the sizes of dataset=relations (the original's: 50000, 30000, 300000, 90000)
    n_relations: int = 10  # each with its inverse
    n_train_entities: int = 500  # of the facts that appear in both directions
    n_atomic_entities: int = 300  # of those in one direction, whose inverse is the held-out test
    n_train_facts: int = 3000  # carry JEPA
    n_atomic_facts: int = 900  # carry none
    # model
    n_layer: int = 6  # transformer blocks
    n_head: int = 8  # attention heads
    n_embd: int = 512  # channels
    block_size: int = 512  # longest path of tokens (question + answer)
    dropout: float = 0.0  # on the embeddings and the residual branches
    bias: bool = False  # biases in linear layers and layer norms, as GPT-2 has them
    # objective: ce_weight * CE + jepa_weight * d(Pred(text), Enc(code)) + spread_weight * R
    n_pred: int = 1  # number k of [PRED] tokens; 0 reads Pred at the last text token
    ce_weight: float = 1.0  # weight of the cross-entropy
    jepa_weight: float = 1.0  # weight of the JEPA distance; 0 is the baseline (no R either)
    jepa_loss: str = "cosine"  # cosine | l2 | mse | infonce
    jepa_dropout: float = 0.0  # share of steps (or examples) without the JEPA term and its cost
    jepa_dropout_per: str = "batch"  # batch (whole steps) | example
    jepa_warmup_iters: int = 0  # steps over which the weights of d and R grow from 0
    layout: str = "tree"  # tree | isolated (answer alone) | plan (answer continues [PRED])
    direction: str = "forward"  # forward | reverse (predict the question from the answer)
    pred_place: str = "back"  # back | front ([PRED] before a copy of the question)
    pooling: str = "last"  # last | mean: Enc at the last token of a view, or over all of it
    ema: float = 0.0  # decay of a moving average of the weights that encodes targets; 0 is off
    stop_grad: bool = False  # encode the target without gradient, which costs a third
    spread: str = "none"  # none | vicreg | sigreg | cross: anti-collapse term R
    spread_weight: float = 0.0  # weight of R
    # optimization
    batch_size: int = 16  # examples in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in a step
    max_iters: int = 500  # steps
    learning_rate: float = 1e-3  # peak
    min_lr: float = 1e-4  # at the end of the decay
    warmup_iters: int = 50  # steps of linear warm-up
    lr_decay_iters: int = 0  # step at which min_lr is reached; 0 means max_iters
    weight_decay: float = 0.1  # on matrices, none on vectors
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip
    # evaluation and logging
    eval_interval: int = 100  # steps between evaluations; each also writes a checkpoint
    eval_pairs: int = 256  # held-out pairs in an evaluation, the same ones every time
    eval_answers: int = 0  # held-out questions it answers (val_exact ...); 0 does not ask
    log_interval: int = 10  # steps between progress lines


CHOICES = {
    "init_from": ("scratch", "resume"),
    "dtype": ("auto", "float32", "bfloat16"),
    "bad_lines": ("error", "skip"),
    "regex_split": ("random", "depth"),
    "tokenizer": ("gpt2", "bpe", "words"),
    "answer_view": ("full", "final"),
    "labels": ("answer", "all"),
    "views": ("pairs", "steps", "split", "facts"),
    "step_pair": ("first", "random"),
    "system_prompt": ("keep", "drop"),
    "jepa_dropout_per": ("batch", "example"),
    "layout": ("tree", "isolated", "plan"),
    "direction": ("forward", "reverse"),
    "pred_place": ("back", "front"),
    "pooling": ("last", "mean"),
    "jepa_loss": ("cosine", "l2", "mse", "infonce"),
    "spread": ("none", "vicreg", "sigreg", "cross"),
}
POSITIVE = {
    "n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps",
    "max_iters", "learning_rate", "eval_interval", "eval_pairs", "log_interval",
}  # fmt: skip


def fail(message: str) -> NoReturn:
    """The one way out for a user's mistake: a line on stderr (what, where, what to do), exit 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def load_config(argv: list[str]) -> Config:
    """Config from command-line arguments: an optional recipe, then any number of --key=value.

    Prints the path of the recipe it read. Exits with code 2 and one line on any mistake.
    """
    usage = f"python {Path(sys.argv[0]).name} [RECIPE] [--key=value ...]"
    values, recipes = parse_args(Config, argv, usage)
    if len(recipes) > 1:
        fail(f"one recipe at a time, got {' '.join(recipes)}")
    path = find_recipe(recipes[0]) if recipes else None
    if path:
        print(f"recipe {path}")
    recipe = read_recipe(path) if path else {}
    name = path.stem if path else "default"
    settings = {**recipe, **values, "recipe": name}
    settings["out_dir"] = settings.get("out_dir") or f"out/{name}"
    config = Config(**settings)
    check(config)
    return config


def find_recipe(name: str) -> Path:
    """A path that exists is the recipe; else its stem names a file in configs/."""
    path = Path(name)
    if path.is_file():
        return path
    known = sorted(p.stem for p in RECIPES.glob("*.py"))
    if path.stem not in known:
        fail(f"no recipe {name}: no such file, and configs/ holds {', '.join(known)}")
    return RECIPES / f"{path.stem}.py"


def read_recipe(path: Path) -> dict[str, Any]:
    """The assignments of a recipe file, checked against Config."""
    try:
        names = runpy.run_path(str(path))
    except Exception as error:  # a recipe is the user's code: whatever it raises is theirs
        fail(f"recipe {path} does not run: {type(error).__name__}: {error}".splitlines()[0])
    values = {k: v for k, v in names.items() if not k.startswith("_")}
    return {k: convert(Config, k, v, f"in {path}") for k, v in values.items()}


def parse_args(cls: type, argv: list[str], usage: str) -> tuple[dict[str, Any], list[str]]:
    """Split argv into {field: value} for the fields of dataclass `cls` and the other arguments.

    Also answers --help, from the comments in the source of `cls`.
    """
    values, rest = {}, []
    for arg in argv:
        if arg in ("-h", "--help"):
            print(f"usage: {usage}\n{help_text(cls)}")
            raise SystemExit(0)
        if not arg.startswith("-"):
            rest.append(arg)
            continue
        key, equals, text = arg.lstrip("-").partition("=")
        if not equals or not arg.startswith("--"):
            fail(f"{arg}: options are written --key=value (--help lists them)")
        values[key] = convert(cls, key, text, "on the command line")
    return values, rest


def convert(cls: type, key: str, value: Any, where: str) -> Any:
    """`value`, from a recipe or as text from the command line, as the type of field `key`."""
    types = {f.name: f.type for f in fields(cls) if f.name != "recipe"}
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
        fail(f"unknown key {key} {where}; {hint}")
    want = types[key]
    if want is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    elif want in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):  # refused below, with its name
            value = want(value)
    if want is float and type(value) is int:
        value = float(value)
    if type(value) is not want:
        fail(f"{key} {where} must be of type {want.__name__}, got {value!r}")
    return value


def check(config: Config) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    for key, choices in CHOICES.items():
        value = getattr(config, key)
        if value not in choices:
            fail(f"{key}={value!r} is not one of {', '.join(choices)}")
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type in (int, float) and not (math.isfinite(value) and value >= 0):
            fail(f"{field.name}={value} must be a finite number, not below 0")
        if field.name in POSITIVE and value == 0:
            fail(f"{field.name}=0 must be above 0")
    if config.n_embd % config.n_head:
        fail(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
    variants = [f"{key}={getattr(config, key)}" for key, usual in (
        ("layout", "tree"), ("direction", "forward"), ("pred_place", "back")
    ) if getattr(config, key) != usual]  # fmt: skip
    if len(variants) > 1:
        fail(f"{' and '.join(variants)} are two layouts; take one")
    if config.n_pred == 0 and (config.layout == "plan" or config.pred_place == "front"):
        fail(f"{variants[0]} needs [PRED]: n_pred must be above 0")
    if config.views == "steps" and config.answer_view == "final":
        fail("views=steps needs the worked answer: answer_view=full")
    if config.views != "pairs" and variants:
        fail(f"{variants[0]} goes with views=pairs, not {config.views}")
    for key, value in (("views", "facts"), ("tokenizer", "words")):
        if (config.dataset == "relations") != (getattr(config, key) == value):
            fail(f"{key}={value} goes with dataset=relations, and with nothing else")
    if config.dataset.endswith(".txt") and config.views != "split":
        fail(f"dataset={config.dataset} is running text and needs views=split")
    if config.data_dir and config.dataset != "gsm8k":
        fail(f"data_dir={config.data_dir} goes with dataset=gsm8k; a file of your own is named by "
             "dataset=folder/pairs.jsonl")
    if config.train_rows and config.dataset == "relations":
        fail(f"train_rows={config.train_rows} goes with pairs; relations has n_train_entities")
    if config.regex_split == "depth" and config.dataset != "regex":
        fail(f"regex_split=depth goes with dataset=regex, not {config.dataset}")
    if config.eval_answers and config.views in ("facts", "split"):
        fail(f"eval_answers={config.eval_answers}: views={config.views} asks no question")
    if config.jepa_split >= 1:
        fail(f"jepa_split={config.jepa_split} must be below 1")
    for key in ("dropout", "jepa_dropout", "beta1", "beta2", "ema"):
        if getattr(config, key) >= 1:
            fail(f"{key}={getattr(config, key)} must be below 1")
    if config.min_lr > config.learning_rate:
        fail(f"min_lr={config.min_lr} is above learning_rate={config.learning_rate}")
    if (config.spread == "none") != (config.spread_weight == 0):
        fail(f"spread={config.spread} with spread_weight={config.spread_weight}: set both or none")
    if config.jepa_weight and config.batch_size == 1 and (
        config.spread != "none" or config.jepa_loss == "infonce"
    ):
        fail("batch_size=1: infonce and the spread terms compare the examples of a batch")
    if config.eval_pairs < 2:
        fail(f"eval_pairs={config.eval_pairs} must be at least 2: mismatched cosine needs two")
    if config.seed >= 2**63:
        fail(f"seed={config.seed} must be below 2**63")
    if config.bpe_vocab_size < 320:
        fail(f"bpe_vocab_size={config.bpe_vocab_size} must be at least 320 (256 bytes and merges)")


def moved(config: Config, folder: str) -> Config:
    """The config of a run whose data now lies in `folder`; an empty one means where it was."""
    if folder and config.dataset.endswith((".jsonl", ".txt")):
        return replace(config, dataset=str(Path(folder) / Path(config.dataset).name))
    return replace(config, data_dir=folder or config.data_dir)


def help_text(cls: type) -> str:
    """A line per field of `cls`: name, type, default and comment; section comments as titles."""
    lines = []
    for line in inspect.getsource(cls).splitlines():
        title = re.match(r"    # (.*)", line)
        field = re.match(r"    (\w+): (\w+) = (.*?)  # (.*)", line)
        if title:
            lines.append(f"\n{title[1]}")
        elif field and field[1] != "recipe":
            name, kind, default, comment = field.groups()
            lines.append(f"  --{name}={kind}".ljust(38) + f"{default:>14}  {comment}")
    return "\n".join(lines)
