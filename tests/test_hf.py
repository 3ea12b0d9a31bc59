"""Claims about hf.py: a pretrained model as a trunk is the model itself, in rows of blocks; one
that does not honour the mask is refused; and what is trained of it is saved and comes back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import error_line, sums

pytest.importorskip("transformers", reason="needs requirements-hf.txt")

from tiny_models import CHAT, tiny_folder, tiny_lm, tiny_tokenizer

import eval_alignment
import evaluate
import hf
import sample
import train
from config import Config
from generate import Sampling, generate, generate_plain
from jepa import pair, pair_reads
from model import Batch
from plumbing.files import read_records
from run import load_run
from views import CODE, PRED, TARGET, TEXT, columns_of, fitting, layout_of

KINDS = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "olmo2", "phi",
         "phi3", "gpt_neox", "smollm3", "opt", "granite", "cohere", "stablelm")  # fmt: skip
WRONG = {"gemma2": "", "gpt_neo": "cannot be loaded", "bloom": "cannot be loaded",
         "mamba": "cannot be loaded", "qwen3_5_text": "other hidden states than its paths alone",
         "lfm2": "other hidden states than its paths alone"}  # fmt: skip
# Some releases refuse gemma2 themselves, others leave out its caps without a word.
PARENTS = layout_of(Config()).parents


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("hub") / "llama")


def settings(folder, **fields) -> Config:
    return Config(trunk=str(folder), block_size=30, **fields)


def row_of(trunk, k: int) -> Batch:
    """A row [q q q q a a a a P.. t t t t .], with labels on a."""
    block = torch.tensor([[TEXT] * 4 + [CODE] * 4 + [PRED] * k + [TARGET] * 4 + [0] * 2])
    idx = torch.randint(trunk.vocab_size, block.shape, generator=torch.Generator().manual_seed(1))
    idx[block == TARGET] = idx[block == CODE]
    idx[block == PRED] = trunk.vocab_size + torch.arange(k)
    targets = torch.full_like(idx, -1)
    targets[:, 3:7] = idx[:, 4:8]
    return Batch(idx, block, targets)


def both_losses(ce_sum, pred, target):
    return ce_sum + 3 * (1 - F.cosine_similarity(pred, target)).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_blocks_is_the_model_itself_on_each_path(kind, tmp_path):
    """Hidden states, loss and all gradients, against passes that know no mask and no cache."""
    config = settings(tiny_folder(tmp_path, kind), n_pred=2)
    trunk = hf.load_trunk(config, PARENTS).eval()
    batch = row_of(trunk, 2)
    hidden, ce_sum = trunk(batch, pair_reads(batch, config))
    pred, target = pair(hidden, batch, config)
    loss = both_losses(ce_sum, pred, target)
    loss.backward()
    got = {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}
    trunk.zero_grad()

    lm, words = trunk.lm, batch.idx[:, :8]
    logits = lm(input_ids=words).logits[0, 3:7]
    ce = F.cross_entropy(logits, words[0, 4:8], reduction="sum")
    x = torch.cat([lm.get_input_embeddings()(words[:, :4]), trunk.pred.weight[None]], 1)
    want_pred = lm.base_model(inputs_embeds=x).last_hidden_state[:, -1]
    want_target = lm.base_model(input_ids=words[:, 4:]).last_hidden_state[:, -1]
    want = both_losses(ce, want_pred, want_target)
    want.backward()
    assert torch.allclose(pred, want_pred, atol=1e-5) and torch.allclose(target, want_target,
                                                                         atol=1e-5)  # fmt: skip
    assert abs(loss - want) < 1e-5 * max(1, want.item())
    for name, p in trunk.named_parameters():
        if p.grad is not None:
            scale = max(1.0, p.grad.abs().max().item())
            assert (got[name] - p.grad).abs().max() < 2e-5 * scale, name


@pytest.mark.parametrize("kind", WRONG)
def test_a_model_that_ignores_the_mask_is_refused_by_name(kind, tmp_path, capsys):
    folder = tiny_folder(tmp_path / kind, kind)
    line = error_line(capsys, hf.load_trunk, settings(folder), PARENTS)
    assert WRONG[kind] in line and kind in line


def test_a_broken_mask_logit_or_leak_is_found(llama, monkeypatch):
    """What another release of transformers may do wrong."""
    trunk = hf.load_trunk(settings(llama), PARENTS).eval()
    assert hf.fault_of(trunk) == ""
    right = trunk.layers
    with monkeypatch.context() as patched:
        patched.setattr(trunk, "layers", lambda x, ids, mask: right(x, ids, mask | mask.mT))
        assert "hidden states" in hf.fault_of(trunk)
    with monkeypatch.context() as patched:
        patched.setattr(trunk.config, "logits_scaling", 2.0, raising=False)
        assert "logits" in hf.fault_of(trunk)

    def leaks(x, ids, mask):  # a single number of the padding reaches everybody
        return right(x, ids, mask) + 1e-3 * x[:, -1:, :1]

    with monkeypatch.context() as patched:
        patched.setattr(trunk, "layers", leaks)
        patched.setattr(hf, "TOLERANCE", 1e-2)
        assert hf.fault_of(trunk) == ""  # below the tolerance
        patched.setattr(hf, "TOLERANCE", 1e-6)
        assert hf.fault_of(trunk) != ""


def test_paths_longer_than_window_or_context_are_refused(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "mistral", "mistral", sliding_window=16)
    assert "sliding window" in error_line(capsys, hf.load_trunk, settings(folder), PARENTS)
    folder = tiny_folder(tmp_path / "llama", max_position_embeddings=16)
    line = error_line(capsys, hf.load_trunk, settings(folder), PARENTS)
    assert "context" in line and "--block_size=16" in line
    folder = tiny_folder(tmp_path / "gemma", "gemma3_text", sliding_window=16,
                         layer_types=["full_attention"] * 2)  # fmt: skip
    hf.load_trunk(settings(folder), PARENTS)  # which has a window, and no layer that uses it


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text", "opt"])
def test_generation_through_the_cache_is_the_plain_loop(kind, tmp_path):
    trunk = hf.load_trunk(settings(tiny_folder(tmp_path, kind)), PARENTS).eval()
    prompts = [[5, 6, 7], [9], [10, 11, 12, 13, 14, 15]]
    for sampling in (Sampling(temperature=0), Sampling(temperature=1.0, seed=3)):
        fast = generate(trunk, prompts, 12, 2, sampling)
        assert fast == generate_plain(trunk, prompts, 12, 2, sampling)
    assert any(max(ids) > 2 for ids in fast)  # ids above the end mark may be drawn


def test_pred_rows_begin_as_rows_of_the_table(tmp_path):
    trunk = hf.load_trunk(settings(tiny_folder(tmp_path), n_pred=500), PARENTS)
    rows = trunk.table.weight
    assert torch.allclose(trunk.pred.weight.std(), rows.std(), rtol=0.1)
    assert trunk.embed(torch.tensor([[trunk.vocab_size]])).shape == (1, 1, 32)
    assert hf.load_trunk(settings(tiny_folder(tmp_path / "b"), n_pred=0), PARENTS).pred is None


# --- tokenizer and templates ------------------------------------------------------------------


def pairs_of(config, tokenizer, *rows):
    return fitting(columns_of(list(rows), tokenizer, config), tokenizer, config)[0]


def frames_of(folder, row, **fields):
    """The pieces that an example is made of, decoded with special tokens."""
    config = Config(trunk=str(folder), block_size=200, **fields)
    tokenizer = hf.trunk_tokenizer(config)
    pairs = pairs_of(config, tokenizer, row)
    show = lambda ids: tokenizer.bpe.decode(ids, skip_special_tokens=False)  # noqa: E731
    batch = pairs.pack([0], (TEXT, CODE))
    labels = batch.targets[0][batch.targets[0] >= 0].tolist()
    return [show(pairs.view(0, block)) for block in (TEXT, CODE, TARGET)], show(labels), tokenizer


ROW = {"text": "2 + 3", "code": "five", "system": ""}
TEMPLATES = {
    "plain": ("2 + 3\n", "five</s>", "five</s>"),
    "chat": ("<s><|user|>\n2 + 3<|end|>\n<|assistant|>\n", "five<|end|>",
             "<s><|assistant|>\nfive<|end|>"),
}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_template_frames_the_views_and_the_end_mark_is_a_label(template, llama):
    views, labels, tokenizer = frames_of(llama, ROW, template=template)
    assert tuple(views) == TEMPLATES[template]
    assert labels == TEMPLATES[template][1]  # the answer with its end mark
    views, labels, _ = frames_of(llama, ROW, template=template, label_end=False)
    assert labels == "five" and tuple(views) == TEMPLATES[template]
    assert tokenizer.decode(tokenizer.encode(["five"])[0] + [tokenizer.eot]) == "five"


def test_a_system_prompt_has_its_place(llama, tmp_path):
    row = {**ROW, "system": "Be brief."}
    text = frames_of(llama, row, template="chat")[0][0]
    assert text == ("<s><|system|>\nBe brief.<|end|>\n<|user|>\n2 + 3<|end|>\n<|assistant|>\n")
    assert frames_of(llama, row)[0][0] == "Be brief.\n2 + 3\n"
    assert frames_of(llama, row, system_prompt="drop")[0][0] == "2 + 3\n"
    refuses = CHAT.replace("{% for", "{% if messages[0]['role'] == 'system' %}"
                           "{{ raise_exception('no system') }}{% endif %}{% for", 1)  # fmt: skip
    folder = tiny_folder(tmp_path, template=refuses)
    text = frames_of(folder, row, template="chat")[0][0]  # then it is said by the user
    assert text == "<s><|user|>\nBe brief.\n2 + 3<|end|>\n<|assistant|>\n"


def test_names_of_special_tokens_in_a_text_are_text(llama):
    row = {**ROW, "text": "say <|end|></s>", "code": "<|end|>"}
    views, _, tokenizer = frames_of(llama, row, template="chat")
    config = Config(trunk=str(llama), template="chat", block_size=200)
    pairs = pairs_of(config, tokenizer, row)
    assert pairs.view(0, CODE).count(tokenizer.eot) == 1
    assert tokenizer.decode(pairs.answer(0)) == "<|end|>"
    assert "say <|end|></s>" in views[0]


def test_a_template_that_prints_the_date_is_pinned(tmp_path, capsys):
    dated = "{{ strftime_now('%d %b %Y') }} " + CHAT
    folder = tiny_folder(tmp_path, template=dated)
    views, _, _ = frames_of(folder, ROW, template="chat")
    assert views[0].startswith("26 Jul 2024 <s><|user|>")
    assert "prints the date: here it is always 26 Jul 2024" in capsys.readouterr().out


def test_a_tokenizer_that_cannot_serve_is_refused(tmp_path, capsys):
    config = Config(trunk=str(tmp_path), template="chat")
    tiny_lm("llama").save_pretrained(tmp_path)
    tiny_tokenizer("").save_pretrained(tmp_path)
    assert "no chat template" in error_line(capsys, hf.trunk_tokenizer, config)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    config = Config(trunk=str(tmp_path))
    assert "no end mark" in error_line(capsys, hf.trunk_tokenizer, config)
    tiny_lm("llama", vocab_size=270).save_pretrained(tmp_path)
    assert "do not belong together" in error_line(capsys, hf.trunk_tokenizer, config)


# --- files ------------------------------------------------------------------------------------


def in_hub_layout(cache: Path, name: str, kind: str) -> str:
    """A snapshot as huggingface_hub keeps it; its revision."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / f"models--{name.replace('/', '--')}"
    tiny_folder(folder / "snapshots" / revision, kind)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return revision


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    name = "openai-community/gpt2"
    revision = in_hub_layout(tmp_path, name, "gpt2")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    trunk = hf.load_trunk(Config(trunk=name, block_size=30), PARENTS)
    assert trunk.about["revision"] == revision and trunk.about["name"] == name
    line = error_line(capsys, hf.load_trunk, Config(trunk="nobody/nothing"), PARENTS)
    assert "nobody/nothing" in line and "hub" in line
    line = error_line(capsys, hf.load_trunk, Config(trunk=name, trunk_revision="v9"), PARENTS)
    assert "v9" in line


def test_half_a_model_is_refused(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = tiny_folder(tmp_path / "m")
    config = settings(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    assert "half a model" in error_line(capsys, hf.load_trunk, config, PARENTS)
    (folder / "model.safetensors").write_bytes(b"none")
    assert "cannot be loaded" in error_line(capsys, hf.load_trunk, config, PARENTS)
    (folder / "config.json").unlink()
    assert "no config.json" in error_line(capsys, hf.load_trunk, config, PARENTS)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert "no weights as *.safetensors" in error_line(capsys, hf.load_trunk, config, PARENTS)
    (tmp_path / "x.gguf").write_bytes(b"GGUF none")
    for wrong in ("x.gguf", "y.gguf", "nowhere/", "./nowhere"):
        line = error_line(capsys, hf.load_trunk, Config(trunk=str(tmp_path / wrong)), PARENTS)
        assert wrong.strip("./") in line


# --- a run ------------------------------------------------------------------------------------


@pytest.fixture
def fine_tune(llama, tmp_path, monkeypatch, capsys):
    """A function that fine-tunes the tiny llama on 60 sums, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_losses", lambda folder: None)
    Path("pairs").mkdir()
    for split, rows in (("train", sums(60)), ("val", sums(16, 500)), ("test", sums(8, 700))):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        Path("pairs", f"{split}.jsonl").write_text(lines)
    base = shutil.copytree(llama, tmp_path / "base")

    def run(*options):
        capsys.readouterr()
        train.main([*run.argv, *options])
        return capsys.readouterr().out

    run.argv = [f"--trunk={base}", "--dataset=pairs", "--block_size=64", "--batch_size=4",
                "--max_iters=4", "--eval_interval=2", "--eval_pairs=8", "--device=cpu",
                "--warmup_iters=1", "--out_dir=out/a"]  # fmt: skip
    return run


def weights_of(folder="out/a"):
    return torch.load(f"{folder}/ckpt.pt", weights_only=True)["model"]


@pytest.mark.parametrize("options", [[], ["--lora_rank=2", "--pred_rate=10"], ["--template=chat"],
                                     ["--gradient_checkpointing=true", "--stop_grad=true"],
                                     ["--objective=tube", "--n_pred=0", "--template=chat"],
                                     ["--objective=bag", "--lora_rank=2"]])
def test_a_run_resumes_bit_for_bit(fine_tune, options):
    fine_tune(*options)
    whole = weights_of()
    shutil.rmtree("out/a")
    fine_tune(*options, "--max_iters=2", "--lr_decay_iters=4")
    fine_tune("--max_iters=4", "--init_from=resume")
    again = weights_of()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("options", [[], ["--lora_rank=2"]])
def test_two_processes_train_as_one(fine_tune, options):
    fine_tune(*options)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, train.__file__, *fine_tune.argv, *options, "--out_dir=out/b"],
                   env=environment, check=True, capture_output=True, timeout=240)  # fmt: skip
    one, two = (read_records(Path(f"out/{name}/metrics.jsonl")) for name in "ab")
    assert len(one) == len(two) > 4
    for a, b in zip(one, two):
        for key in a.keys() & {"ce", "jepa", "spread", "loss", "grad_norm", "val_ce"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


def test_a_full_run_needs_its_base_no_more(fine_tune, capsys):
    said = fine_tune("--template=chat")
    assert "honours the block mask" in said
    record = json.loads(Path("out/a/config.json").read_text())["provenance"]["trunk"]
    assert record["name"].endswith("base") and len(record["sha256"]) == 64
    shutil.rmtree("base")
    evaluate.main(["out/a", "--device=cpu"])
    # In a process of its own: transformers loads its parts when they are first asked for.
    told = subprocess.run([sys.executable, sample.__file__, "out/a", "--device=cpu",
                           "--num_samples=1", "--max_new_tokens=4"],
                          check=True, capture_output=True, text=True).stdout  # fmt: skip
    assert "--- right answer" in told
    sample.main(["out/a", "--device=cpu", "--prompt=1 + 1", "--num_samples=1"])
    fine_tune("--max_iters=5", "--init_from=resume")
    assert "step 5" in capsys.readouterr().out or weights_of()


def test_a_lora_run_holds_adapters_and_refuses_another_base(fine_tune, llama, capsys):
    fine_tune("--lora_rank=2", "--lora_modules=q_proj,v_proj")
    held = weights_of()
    assert {name.rpartition(".lora_")[0] != "" or name == "pred.weight" for name in held} == {True}
    assert sum("lora_A" in name for name in held) == 4  # two layers, two modules
    evaluate.main(["out/a", "--device=cpu", "--n=2"])
    eval_alignment.main(["out/a", "--device=cpu"])
    tiny_lm("llama", seed=5).save_pretrained("base")
    line = error_line(capsys, load_run, Path("out/a"), torch.device("cpu"))
    assert "another base" in line
    with pytest.raises(SystemExit):
        fine_tune("--init_from=resume", "--max_iters=6")
    with pytest.raises(SystemExit):
        fine_tune("--lora_rank=2", "--lora_modules=nothing", "--out_dir=out/b")
    assert "match nothing" in capsys.readouterr().err


def test_adapters_alone_move_and_merge(llama):
    config = settings(llama, lora_rank=2)
    trunk = hf.load_trunk(config, PARENTS)
    trained = {name for name, p in trunk.named_parameters() if p.requires_grad}
    assert trained == set(trunk.trained()) and "pred.weight" in trained
    for name, p in trunk.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn_like(p) * 0.05
    batch = row_of(trunk, 1)
    before = trunk.eval()(batch, pair_reads(batch, config))[1]
    assert torch.allclose(trunk.merged()(batch, pair_reads(batch, config))[1], before,
                          rtol=1e-5)  # fmt: skip
    assert not any("lora" in name for name in trunk.state_dict())


def test_options_that_do_not_fit_are_one_line(fine_tune, capsys):
    for wrong, says in (("n_layer=3", "has its own"), ("tokenizer=bpe", "has its own"),
                        ("lora_modules=q_proj", "lora_rank"), ("views=facts", "facts")):
        with pytest.raises(SystemExit):
            fine_tune(f"--{wrong}")
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["debug", "--template=chat"])
    assert "--trunk" in capsys.readouterr().err
