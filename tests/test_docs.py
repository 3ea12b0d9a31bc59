"""The code of the pages in docs/ runs, and does what the page says."""

import re
from pathlib import Path

import pytest
import torch
from conftest import error_line

import config
import jepa
import run
import train
from generate import generate, generate_plain
from plumbing.files import read_records
from views import layout_of

ROOT = Path(train.__file__).parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "LOG.md",
                *(ROOT / "log").glob("*.md")])  # fmt: skip


def code_of(page: str) -> dict:
    """What the Python blocks of a page define."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
        exec(block, names)
    return names


@pytest.mark.parametrize("page", ["new-objective.md", "new-trunk.md"])
def test_a_page_of_code_has_at_most_60_lines(page):
    assert len((ROOT / "docs" / page).read_text().splitlines()) <= 60


def test_the_toy_objective_trains_and_is_measured(tiny_run, monkeypatch, capsys):
    monkeypatch.setitem(jepa.OBJECTIVES, "means", None)  # taken out again afterwards
    monkeypatch.setitem(config.CHOICES, "objective", ("pair", "means"))
    code_of("new-objective.md")
    printed = tiny_run(objective="means")
    records = read_records(Path("out/tiny/metrics.jsonl"))
    terms = [record["jepa"] for record in records if "jepa" in record]
    assert len(terms) == 6 and all(0 < term < 2 for term in terms)
    assert "cosine matched" in printed and "nan" not in printed
    line = error_line(capsys, tiny_run, objective="means", stop_grad=True)
    assert "nothing to encode apart" in line


@pytest.fixture
def toy_trunk(monkeypatch):
    """run.make_model makes the trunk of the page, here and in training."""
    toy = code_of("new-trunk.md")["CausalMean"]

    def make(config, vocab_size, about=None):
        return toy(config, vocab_size, layout_of(config).parents)

    monkeypatch.setattr(run, "make_model", make)
    monkeypatch.setattr(train, "make_model", make)
    return make


def test_the_toy_trunk_trains_answers_and_goes_on(toy_trunk, tiny_run):
    tiny_run()
    before = read_records(Path("out/tiny/metrics.jsonl"))
    assert before[-1]["val_ce"] < before[0]["ce"]  # it learns something
    tiny_run(max_iters=8, init_from="resume")
    assert read_records(Path("out/tiny/metrics.jsonl"))[-1]["step"] == 8
    opened = run.load_run(Path("out/tiny"), torch.device("cpu"))
    prompts, eot = [[5, 9, 2, 40], [21], [8, 30]], opened.tokenizer.eot
    assert generate(opened.model, prompts, 12, eot) == generate_plain(
        opened.model, prompts, 12, eot)  # fmt: skip


def test_a_packed_row_of_the_toy_trunk_equals_separate_passes(toy_trunk):
    """q q a P t: the answer and [PRED] continue the question, the target stands alone."""
    trunk = toy_trunk(config.Config(n_embd=8, n_head=1, n_pred=1), 32).eval()
    q, a, t, pred = [3, 4], [5], [6], [32]

    def alone(tokens):
        idx = torch.tensor([tokens])
        return trunk.everywhere(idx, torch.ones_like(idx))[0]

    packed = trunk.everywhere(torch.tensor([q + a + pred + t]), torch.tensor([[1, 1, 2, 4, 3]]))[0]
    want = torch.stack([*alone(q), alone(q + a)[-1], alone(q + pred)[-1], alone(t)[-1]])
    torch.testing.assert_close(packed, want)


def test_every_link_of_a_page_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_formula_links_to_its_line():
    [number] = re.findall(r"\(train\.py#L(\d+)\)", (ROOT / "README.md").read_text())
    line = (ROOT / "train.py").read_text().splitlines()[int(number) - 1]
    assert line.strip().startswith("return config.ce_weight * ce")


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 100 for line in lines if not line.startswith("|"))
    assert len((ROOT / "LOG.md").read_text().splitlines()) <= 80
