"""Claims about lab/gpu_report.py: all of it runs, in parts, and no item that fails ends it.

On a CPU at tiny sizes, but with the kernels that a GPU gets: those of a CPU take longer to trace.
"""

import copy
import json
import math
from functools import cache

import pytest
import torch
from conftest import error_line, patch_in_kernels_of_a_gpu

from lab import gpu_items, gpu_report, timing
from lab.peers import peer_of

pytest.importorskip("transformers")
from tiny_models import tiny_folder

ITEMS = [
    *(f"correct: {name}, {what}" for name in ("small GPT", "tiny")
      for what in ("fp32", "bf16", "cached generation")), "correct: small GPT, fp32, compiled",
    "steps: GPT 45M, eager", "steps: GPT 45M, compiled", "steps: tiny, eager",
    "attention: 2 x 32", "two rows: tiny", "two rows: GPT 45M",
    *(f"generation: {name}, {B}" for name in ("GPT 45M", "tiny") for B in (1, 4)),
    "steps: tiny, compiled",
]  # fmt: skip
FAILING = "generation: tiny, 1"


@pytest.fixture(scope="module", autouse=True)
def rows_made_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_items, "load_data", cache(gpu_items.load_data))
        yield


class Parts:
    """Three runs of the command in one folder, and what each left."""

    def __init__(self, folder):
        tiny_folder(folder / "tiny", vocab_size=512, max_position_embeddings=1024,
                    num_hidden_layers=1)  # fmt: skip
        self.argv = ["--device=cpu", "--tiny=true", f"--trunk={folder / 'tiny'}",
                     f"--out_dir={folder}"]  # fmt: skip
        self.path = folder / "gpu_report.json"
        self.first = self.run("--budget=0.001")
        self.first_page = (folder / "gpu_report.md").read_text()
        self.all = self.run("--budget=600")
        self.page = (folder / "gpu_report.md").read_text()

    def run(self, *argv):
        gpu_report.main([*self.argv, *argv])
        return json.loads(self.path.read_text())


@pytest.fixture(scope="module")
def parts(tmp_path_factory, rows_made_once):
    def with_one_that_fails(lab):
        def fails():
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")

        return gpu_items.items_of(lab) | {FAILING: fails}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_report, "items_of", with_one_that_fails)
        patch_in_kernels_of_a_gpu(patch)
        yield Parts(tmp_path_factory.mktemp("gpu"))


def test_a_part_ends_with_its_budget_and_the_next_one_goes_on(parts, capsys):
    assert parts.first["planned"] == ITEMS and list(parts.first["items"]) == ITEMS[:1]
    assert f"not run yet: {ITEMS[1]}; " in parts.first_page
    assert list(parts.all["items"]) == ITEMS
    assert parts.all["items"][ITEMS[0]] == parts.first["items"][ITEMS[0]]  # not measured again
    before = parts.path.read_bytes()
    assert parts.run() == parts.all and parts.path.read_bytes() == before
    printed = capsys.readouterr().out
    assert parts.page in printed and "19/" not in printed


def test_an_item_that_fails_is_named_with_its_reason_and_ends_nothing(parts):
    assert parts.all["items"][FAILING]["failed"] == "OutOfMemoryError: CUDA out of memory."
    failed = parts.page.partition("## What failed")[2]
    assert failed.strip() == f"- {FAILING}: OutOfMemoryError: CUDA out of memory."
    assert [name for name, item in parts.all["items"].items() if "failed" in item] == [FAILING]


def test_the_device_is_right_and_bf16_is_told_from_fp32(parts):
    items = parts.all["items"]
    assert all(item["right"] for item in items.values() if "right" in item)
    for name in ("small GPT", "tiny"):
        exact, rough = (items[f"correct: {name}, {dtype}"] for dtype in ("fp32", "bf16"))
        for key in ("hidden", "gradient"):
            assert exact[key] < 1e-6 < 1e-4 < rough[key]
        assert items[f"correct: {name}, cached generation"]["equal_rows"] == 2


def test_figures_are_finite_and_the_kernels_of_a_gpu_compile_once(parts):
    items = parts.all["items"]
    for name, item in items.items():
        if name.startswith("steps"):
            assert item["recompilations"] == (0 if name.endswith("compiled") else None)
            assert item["jepa_over_ce"]["median"] > 0 and set(item["arms"]) == {"CE only", "JEPA"}
            for arm in item["arms"].values():
                assert arm["tokens_per_second"]["median"] > 0 and arm["tflops"]["median"] > 0
    arms = items["two rows: tiny"]
    speeds = [about["examples_per_second"]["median"] for about in arms.values()
              if isinstance(about, dict)]  # fmt: skip
    assert len(speeds) == 3 and all(0 < speed < math.inf for speed in speeds)


def test_the_page_is_made_of_the_json_alone_in_narrow_tables(parts):
    assert gpu_report.page_of(json.loads(parts.path.read_text())) == parts.page
    on_a_card = copy.deepcopy(parts.all) | {"peak_tflops": 989, "dtype": "bfloat16"}
    for item in on_a_card["items"].values():
        for about in (item, *item.get("arms", {}).values(), *item.values()):
            if isinstance(about, dict) and "peak_gb" in about:
                about["peak_gb"] = 3.25
        if "forward" in item:
            item["forward and backward"] = item["forward"]
    on_a_card["items"]["attention: 2 x 32"]["right"] = False
    page = gpu_report.page_of(on_a_card)
    assert "not known" in parts.page and "not known" not in page
    assert "(0.0%)" in page and "3.25" in page and "**NO**" in page
    assert "- attention: 2 x 32: it ran, and its result is wrong" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) > 20 and all(row.count("|") <= 7 for row in rows)


def test_another_commit_begins_anew_and_keeps_the_report(parts, monkeypatch, capsys):
    was = gpu_report.versions()
    monkeypatch.setattr(gpu_report, "versions", lambda: was | {"commit": "another"})
    assert list(parts.run("--budget=0.001")["items"]) == ITEMS[:1]
    assert (parts.path.parent / "earlier/gpu_report-1.json").exists()


def test_nothing_runs_after_an_error_that_leaves_the_gpu_unusable(tmp_path, monkeypatch, capsys):
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_report, "items_of", lambda lab: {"a: 1": fails, "a: 2": dict})
    argv = ["--device=cpu", "--tiny=true", f"--out_dir={tmp_path}"]
    gpu_report.main(argv)
    assert "1 of 2 items are done; the same command goes on" in capsys.readouterr().out
    gpu_report.main(argv)
    assert list(json.loads((tmp_path / "gpu_report.json").read_text())["items"]) == ["a: 1", "a: 2"]


def test_a_trunk_that_is_not_there_is_looked_for_once(monkeypatch):
    lab, asked = gpu_items.Lab("cpu", True, "./nowhere"), []
    make = timing.untrained
    monkeypatch.setattr(timing, "untrained", lambda *given: asked.append(1) or make(*given))
    for _ in range(2):
        assert "trunk=./nowhere: no such folder" in gpu_items.in_a_line(
            lambda: lab.weights("nowhere"))[1]  # fmt: skip
    assert asked == [1]


def test_the_official_recipe_gets_our_weights_and_pred_rows(parts):
    for trunk, name in ((parts.argv[2].removeprefix("--trunk="), "tiny"), ("", "GPT 45M")):
        lab = gpu_items.Lab("cpu", True, trunk)
        ours, config = lab.weights(name).eval(), lab.configs[name]
        theirs = peer_of(ours, config).eval()
        V = ours.vocab_size
        idx = torch.tensor([[5, 9, 2, V]])  # [PRED] at the end
        logits = ours.logits(ours.everywhere(idx, torch.ones_like(idx)))
        torch.testing.assert_close(theirs(idx).logits[..., :V], logits, rtol=1e-4, atol=1e-4)


def test_without_a_gpu_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU here" in error_line(capsys, gpu_report.main, [])
    assert "--tiny=true" in error_line(capsys, gpu_report.main, ["--device=cpu"])


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA A10G", None), ("Tesla T4", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
])  # fmt: skip
def test_a_card_is_known_by_its_name(name, tflops):
    assert gpu_report.peak_of(name) == tflops
