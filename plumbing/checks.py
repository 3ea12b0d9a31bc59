"""Which values of a config cannot work, and which do not go together: one line each, and exit 2."""

import math
import re
from dataclasses import fields
from typing import Any

from plumbing.options import fail

# What data of one's own is named by, beside folders and the hub; and what is made here.
OWN_FILES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".txt")
MADE_HERE = ("word_problems", "regex", "regex_depth", "relations", "relations_full")


def check(config: Any, choices: dict[str, tuple[str, ...]], positive: set[str]) -> None:
    """Of a config.Config: `choices` of its fields, and those that have to be above 0."""
    for key, known in choices.items():
        value = getattr(config, key)
        if value not in known:
            fail(f"{key}={value!r} is not one of {', '.join(known)}")
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type in (int, float) and not (math.isfinite(value) and value >= 0):
            fail(f"{field.name}={value} must be a finite number, not below 0")
        if field.name in positive and value == 0:
            fail(f"{field.name}=0 must be above 0")
    for key in ("dropout", "jepa_dropout", "jepa_split", "beta1", "beta2", "ema"):
        if getattr(config, key) >= 1:
            fail(f"{key}={getattr(config, key)} must be below 1")
    check_data(config)
    check_objective(config)
    check_trunk(config)
    if config.n_embd % config.n_head:
        fail(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
    if config.min_lr > config.learning_rate:
        fail(f"min_lr={config.min_lr} is above learning_rate={config.learning_rate}")
    if config.eval_pairs < 2:
        fail(f"eval_pairs={config.eval_pairs} must be at least 2: mismatched cosine needs two")
    if config.seed >= 2**63:
        fail(f"seed={config.seed} must be below 2**63")


def check_data(config: Any) -> None:
    """What goes with which data set."""
    facts = config.dataset in ("relations", "relations_full")
    for key, value in (("views", "facts"), ("tokenizer", "words")):
        if facts != (getattr(config, key) == value):
            fail(f"{key}={value} goes with dataset=relations, and with nothing else")
    if config.train_rows and facts:
        fail(f"train_rows={config.train_rows} goes with pairs; generators/relations.py has the "
             "sizes of dataset=relations")
    if config.views.startswith("steps") and config.answer_view == "final":
        fail(f"views={config.views} needs the worked answer: answer_view=full")
    if config.dataset.endswith(".txt") and config.views != "split":
        fail(f"dataset={config.dataset} is running text and needs views=split")
    if config.data_dir and config.dataset != "gsm8k":
        fail(f"data_dir={config.data_dir} goes with dataset=gsm8k; data of your own is named by "
             "dataset=folder or dataset=folder/pairs.jsonl")
    for key in ("fields", "group"):
        made = config.dataset in MADE_HERE or config.dataset.endswith(".txt")
        if getattr(config, key) and made:
            fail(f"{key}={getattr(config, key)} goes with rows of your own, not {config.dataset}")
    if config.fields and not re.fullmatch(r"[^+:]+(\+[^+:]+)*:[^+:]+(\+[^+:]+)*", config.fields):
        fail(f"fields={config.fields} must name the question's fields and the answer's, as in "
             "instruction+input:output")
    if config.eval_answers and config.views in ("facts", "split"):
        fail(f"eval_answers={config.eval_answers}: views={config.views} asks no question")
    if config.bpe_vocab_size < 320:
        fail(f"bpe_vocab_size={config.bpe_vocab_size} must be at least 320 (256 bytes and merges)")


def check_objective(config: Any) -> None:
    """What goes with which loss and tree of blocks."""
    single = config.objective.startswith("tube")
    only = {"n_pred": 0, "layout": "tree", "views": "pairs"} if single else {}
    if single or config.objective == "bag":
        only |= {"pooling": "last", "stop_grad": False, "ema": 0.0}
    for key, value in only.items():
        if getattr(config, key) != value:
            why = ("reads single states of question and answer and nothing beside them" if single
                   else "predicts a bag of tokens, and no hidden state")  # fmt: skip
            fail(f"{key}={getattr(config, key)}: objective={config.objective} {why}; it goes with "
                 f"{key}={value}")
    if config.objective == "bag" and config.layout == "reverse":
        fail("layout=reverse: objective=bag predicts an answer's tokens, and not a question's")
    if config.layout != "tree" and config.views != "pairs":
        fail(f"layout={config.layout} goes with views=pairs, not {config.views}")
    if config.layout in ("plan", "front") and config.n_pred == 0:
        fail(f"layout={config.layout} needs [PRED]: n_pred must be above 0")
    if (config.spread == "none") != (config.spread_weight == 0):
        fail(f"spread={config.spread} with spread_weight={config.spread_weight}: without a spread "
             "term the weight is 0, with one it is above 0")
    if config.jepa_weight and config.batch_size == 1 and (
        config.spread != "none" or config.jepa_loss == "infonce"
    ):
        fail("batch_size=1: infonce and the spread terms compare the examples of a batch")


def check_trunk(config: Any) -> None:
    """What goes with our own GPT alone, and what with a pretrained trunk alone."""
    for key, unset in (("trunk_revision", ""), ("template", "plain"), ("lora_rank", 0),
                       ("lora_modules", ""), ("gradient_checkpointing", False)):
        if config.trunk == "gpt" and getattr(config, key) != unset:
            fail(f"{key}={getattr(config, key)} goes with a pretrained trunk, --trunk=...")
    if config.lora_modules and not config.lora_rank:
        fail(f"lora_modules={config.lora_modules} needs lora_rank above 0")
    if not config.lora_alpha or not config.pred_rate:
        fail(f"lora_alpha={config.lora_alpha} and pred_rate={config.pred_rate} must be above 0")
    if config.trunk != "gpt" and config.views == "facts":
        fail(f"views=facts goes with trunk=gpt: words of made-up facts are not {config.trunk}'s")
    if not config.label_end and config.views in ("split", "facts"):
        fail(f"label_end=False: views={config.views} has no end mark")
