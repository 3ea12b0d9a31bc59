"""The code of the pages in docs/ runs, and does what the page says."""

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_line

import config
import jepa
import run
import train
from generate import generate, generate_plain
from plumbing.files import read_records
from views import CODE, TEXT, columns_of, fitting, layout_of

ROOT = Path(train.__file__).parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "LOG.md",
                *(ROOT / "log").glob("*.md")])  # fmt: skip


def code_of(page: str) -> dict:
    """What the Python blocks of a page define."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
        exec(block, names)
    return names


@pytest.mark.parametrize("page", ["new-objective.md", "new-trunk.md", "your-own-loop.md"])
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


@pytest.fixture
def own_loop(tmp_path):
    """The page's functions and a folder with a tiny model; examples as the page and as the project
    have them, two with one answer among them."""
    pytest.importorskip("transformers", reason="needs requirements-hf.txt")
    from tiny_models import tiny_folder

    import hf

    folder = str(tiny_folder(tmp_path / "llama"))
    settings = config.Config(trunk=folder, block_size=60, n_pred=2, jepa_weight=0.7,
                             spread_weight=1.5)  # fmt: skip
    rows = [{"text": f"{a} + {b}", "code": f"{a}+{b}={a + b}" * (1 + a % 2)}
            for a, b in ((1, 2), (13, 4), (5, 20), (6, 1))]  # fmt: skip
    rows.append({"text": "four and thirteen?", "code": rows[1]["code"]})
    tokenizer = hf.trunk_tokenizer(settings)
    pairs = fitting(columns_of(rows, tokenizer, settings), tokenizer, settings)[0]
    examples = [(pairs.view(i, TEXT), pairs.view(i, CODE)) for i in range(len(pairs))]
    assert len(examples) == 5 and examples[1][1] == examples[4][1]
    return code_of("your-own-loop.md"), folder, pairs, examples


def test_the_own_loop_has_our_loss_and_gradients(own_loop):
    """Against hf.load_trunk and the functions of jepa.py, weights and [PRED] of one value."""
    import hf

    page, folder, pairs, examples = own_loop
    lm, pred = page["load"](folder, 2)
    loss = page["loss_of"](lm, pred, examples, 0.7, 1.5)
    loss.backward()

    settings, everyone = pairs.config, np.arange(len(pairs))
    trunk = hf.load_trunk(settings, pairs.layout.parents).eval()
    trunk.pred.weight.data.copy_(pred.weight.data)
    batch = pairs.pack(everyone, pairs.layout.row)
    hidden, ce_sum = trunk(batch, jepa.pair_reads(batch, settings))
    ours, groups = jepa.pair(hidden, batch, settings), pairs.groups(everyone)
    want = (ce_sum / (batch.targets != -1).sum() + 0.7 * jepa.distance(*ours, "cosine", groups)
            + 1.5 * jepa.spread(*ours, "cross", groups))  # fmt: skip
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(pred.weight.grad, trunk.pred.weight.grad, rtol=1e-4, atol=1e-6)
    theirs, mine = dict(lm.named_parameters()), dict(trunk.lm.named_parameters())
    assert theirs.keys() == mine.keys()
    for name, p in theirs.items():
        torch.testing.assert_close(p.grad, mine[name].grad, rtol=1e-4, atol=1e-6)


def test_the_own_loop_learns(own_loop):
    page, folder, _, examples = own_loop
    lm, pred = page["load"](folder)
    groups = [{"params": lm.parameters()}, {"params": pred.parameters(), "weight_decay": 0.0}]
    optimizer, losses, before = torch.optim.AdamW(groups, lr=1e-2), [], pred.weight.clone()
    for _ in range(8):
        losses.append(page["loss_of"](lm, pred, examples))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5 and not torch.equal(pred.weight, before)


def test_the_own_loop_warns_of_what_is_so(own_loop):
    """With eager attention the same code gives no error and another loss."""
    page, folder, _, examples = own_loop
    lm, pred = page["load"](folder)
    right = page["loss_of"](lm, pred, examples)
    lm.set_attn_implementation("eager")
    assert abs(page["loss_of"](lm, pred, examples) - right) > 1e-2


def test_each_flag_of_ours_in_the_flag_table_is_a_setting():
    """And the command on the page is one that train.py takes."""
    page = (ROOT / "docs/from-the-official-code.md").read_text()
    here = " ".join(line.split("|")[2] for line in page.splitlines() if line.startswith("|"))
    named = re.findall(r"--(\w+)(?:=([\w.]+))?", here)
    settings = asdict(config.Config())
    assert len(named) > 25 and {name for name, _ in named} <= settings.keys()
    for name, value in named:
        assert not value or value in config.CHOICES.get(name, (value,))
    [command] = re.findall(r"python train\.py ((?:.*\\\n)*.*)", page)
    asked = config.load_config(command.replace("\\\n", " ").split())
    assert asked.spread == "none" and asked.label_end is False and asked.min_lr == 0


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
