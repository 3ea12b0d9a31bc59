"""Every setting of a training run, in one flat frozen dataclass, and the few lines that fill it.

Three layers, the later wins: the defaults below, a recipe (a file of bare assignments in
configs/, on top of another recipe if it names one as its base), `--key=value` on the command
line. Everything is checked before the first step; a mistake is one line on stderr and exit code
2. A field's comment is also its line in `--help`.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from plumbing import checks, options
from plumbing.checks import MADE_HERE, OWN_FILES
from plumbing.options import fail, folder_name, parse_args, program

RECIPES = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class Config:
    # what one really touches
    dataset: str = "gsm8k"  # gsm8k | file | folder | owner/name | word_problems, regex, relations
    max_iters: int = 500  # steps
    batch_size: int = 16  # examples in a micro-batch, of all processes together
    learning_rate: float = 1e-3  # peak
    n_layer: int = 6  # transformer blocks
    n_head: int = 8  # attention heads
    n_embd: int = 512  # channels
    block_size: int = 512  # longest path of tokens (question + answer)
    jepa_weight: float = 0.3  # λ, weight of the JEPA distance; 0 is the baseline (no R either)
    jepa_loss: str = "cosine"  # the distance: cosine | l2 | mse | infonce
    spread: str = "cross"  # anti-collapse term R: none | vicreg | sigreg | cross
    spread_weight: float = 0.6  # μ, weight of R
    jepa_dropout: float = 0.0  # LD, share of steps (or examples) without the JEPA term and its cost
    n_pred: int = 1  # k, number of [PRED] tokens; 0 reads Pred at the last text token
    seed: int = 1337  # weights, data order, dropout
    # where it runs, and how
    recipe: str = ""  # name of the recipe; filled in by the loader
    out_dir: str = ""  # folder of the run; empty is out/<recipe> and what differs from the recipe
    init_from: str = "scratch"  # scratch | resume (from ckpt.pt) | previous (ckpt-previous.pt)
    device: str = "auto"  # auto (cuda, then mps, then cpu) | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16
    compile: bool = True  # torch.compile the model on CUDA; it is slower than eager on a CPU
    # evaluation and logging
    eval_interval: int = 100  # steps between evaluations; each also writes a checkpoint
    eval_pairs: int = 256  # held-out pairs in an evaluation, the same ones every time
    patience: int = 0  # stop after this many evaluations without a better val_ce; 0 never does
    eval_answers: int = 0  # held-out questions it answers (val_exact ...); 0 does not ask
    score: str = "auto"  # of answers: auto (train decides) | number | final | string | regex
    log_interval: int = 10  # steps between progress lines; in a terminal there is a bar instead
    track: str = "none"  # none | trackio | wandb: a tracker that gets metrics.jsonl's records too
    # data
    data_dir: str = ""  # folder of GSM8K's train.jsonl and test.jsonl; empty means data/gsm8k
    offline_fallback: bool = True  # train on word_problems when gsm8k cannot be had
    train_rows: int = 0  # train on this many rows, a fixed random choice; 0 is all
    bad_lines: str = "error"  # error | skip (count lines and rows that are no pair and go on)
    fields: str = ""  # names of your fields, as instruction+input:output; empty: the usual ones
    group: str = ""  # a field: rows that agree in it are never split between train and validation
    tokenizer: str = "gpt2"  # gpt2 (50257) | bpe (trained on train) | words; a trunk has its own
    bpe_vocab_size: int = 8192  # size of the bpe vocabulary, its two special tokens included
    answer_view: str = "full"  # full (worked answer, as in the paper) | final (number after ####)
    labels: str = "answer"  # answer | all: the tokens that cross-entropy is taken on
    views: str = "pairs"  # pairs | steps, steps_random (of the answer) | split (text) | facts
    jepa_split: float = 0.5  # where a block of running text is split; 0 is anywhere
    system_prompt: str = "keep"  # keep (before both views; with a trunk the text alone) | drop
    # model
    dropout: float = 0.0  # on the embeddings and the residual branches
    bias: bool = False  # biases in linear layers and layer norms, as GPT-2 has them
    # objective: ce_weight * CE + jepa_weight * d(Pred(text), Enc(code)) + spread_weight * R
    objective: str = "pair"  # pair | tube, tube_printed, tube_two_views | bag: what is paired
    layout: str = "tree"  # tree | isolated | plan | reverse | front: the blocks of a row
    ce_weight: float = 1.0  # γ, weight of the cross-entropy
    jepa_dropout_per: str = "batch"  # batch (whole steps) | example
    jepa_warmup_iters: int = 0  # steps over which the weights of d and R grow from 0
    stop_grad: bool = False  # encode the target without gradient, which costs a third
    ema: float = 0.0  # decay of a moving average of the weights that encodes targets; 0 is off
    pooling: str = "last"  # last | mean: Enc at the last token of a view, or over all of it
    # a pretrained trunk (hf.py) in the place of the model above
    trunk: str = "gpt"  # gpt (untrained) | a hub id | a folder | a .gguf file
    trunk_revision: str = ""  # branch, tag or commit of a hub id
    template: str = "plain"  # plain | chat (the trunk's own): what stands around the views
    label_end: bool = True  # is the end mark a label? False is how the published code trains
    lora_rank: int = 0  # of adapters beside frozen weights; 0 trains all weights
    lora_alpha: float = 32.0  # scale of the adapters, over lora_rank
    lora_modules: str = ""  # layers that get adapters, as q_proj,v_proj; empty: all linear ones
    gradient_checkpointing: bool = False  # compute activations twice, to keep few in memory
    # optimization
    pred_rate: float = 1.0  # learning rate of [PRED], in multiples of the other weights'
    gradient_accumulation_steps: int = 1  # in a step; infonce and spread look at each alone
    min_lr: float = 1e-4  # at the end of the decay
    warmup_iters: int = 50  # steps of linear warm-up
    lr_decay_iters: int = 0  # step at which min_lr is reached; 0 means max_iters
    weight_decay: float = 0.1  # on matrices, none on vectors
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip


# Where a run happens and how much of it is shown, not what is trained: two runs that differ in
# these alone are one and the same. Resuming, sweeps and eval_alignment.py go by it.
WHERE = ("recipe", "out_dir", "init_from", "device", "compile", "data_dir", "log_interval", "track")
# How long a run takes and how often it is measured: a resumed one may change it.
LATER = ("max_iters", "lr_decay_iters", "eval_interval", "patience")

CHOICES = {
    "init_from": ("scratch", "resume", "previous"),
    "dtype": ("auto", "float32", "bfloat16"),
    "track": ("none", "trackio", "wandb"),
    "bad_lines": ("error", "skip"),
    "tokenizer": ("gpt2", "bpe", "words"),
    "template": ("plain", "chat"),
    "answer_view": ("full", "final"),
    "labels": ("answer", "all"),
    "score": ("auto", "number", "final", "string", "regex"),
    "views": ("pairs", "steps", "steps_random", "split", "facts"),
    "system_prompt": ("keep", "drop"),
    "jepa_dropout_per": ("batch", "example"),
    "objective": ("pair", "tube", "tube_printed", "tube_two_views", "bag"),
    "layout": ("tree", "isolated", "plan", "reverse", "front"),
    "pooling": ("last", "mean"),
    "jepa_loss": ("cosine", "l2", "mse", "infonce"),
    "spread": ("none", "vicreg", "sigreg", "cross"),
}
POSITIVE = {
    "n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps",
    "max_iters", "learning_rate", "eval_interval", "eval_pairs", "log_interval",
}  # fmt: skip

# What a pretrained trunk brings along, so that it cannot be asked for.
OF_THE_GPT = ("n_layer", "n_head", "n_embd", "dropout", "bias", "tokenizer", "bpe_vocab_size")

find_recipe = partial(options.find_recipe, RECIPES)
read_recipe = partial(options.read_recipe, Config, RECIPES)


def load_config(argv: list[str]) -> Config:
    """Config from command-line arguments: an optional recipe, then any number of --key=value.

    Prints the path of the recipe it read. Exits with code 2 and one line on any mistake. A run that
    is resumed takes its config from the checkpoint (run.read_to_resume), which is checked there.
    """
    usage = f"{program()} [RECIPE] [--key=value ...]"
    values, recipes = parse_args(Config, argv, usage)
    if len(recipes) > 1:
        fail(f"one recipe at a time, got {' '.join(recipes)}")
    path = find_recipe(recipes[0]) if recipes else None
    if path:
        print(f"recipe {path}")
    recipe = read_recipe(path) if path else {}
    name = path.stem if path else "default"
    config, plain = Config(**{**recipe, **values, "recipe": name}), asdict(Config(**recipe))
    if config.trunk != "gpt" and (unused := [key for key in OF_THE_GPT if key in values]):
        fail(f"{unused[0]}={values[unused[0]]} goes with trunk=gpt; {config.trunk} has its own")
    # Two runs that train something else have two folders, so neither moves the other away.
    differs = {key: value for key, value in what(config).items()
               if key not in LATER and value != plain[key]}  # fmt: skip
    config = replace(config, out_dir=config.out_dir or f"out/{folder_name(name, differs)}")
    if config.init_from not in ("resume", "previous"):
        check(config)
    return config


def check(config: Config) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    checks.check(config, CHOICES, POSITIVE)


def relocated(config: Config, folder: str) -> Config:
    """The config of a run whose data now lies in `folder`, or is that file; empty: as it was."""
    if folder and config.dataset not in ("gsm8k", *MADE_HERE):
        if Path(folder).is_file():  # it has another name now
            return replace(config, dataset=folder)
        file = Path(config.dataset).name if config.dataset.endswith(OWN_FILES) else ""
        return replace(config, dataset=str(Path(folder) / file))
    return replace(config, data_dir=folder or config.data_dir)


def what(config: Config) -> dict[str, Any]:
    """The fields that decide what is trained: all but those of WHERE."""
    return {key: value for key, value in asdict(config).items() if key not in WHERE}
