"""Claims about config.py: three layers of settings, and one line for every mistake."""

from dataclasses import FrozenInstanceError, asdict, fields

import pytest
from conftest import error_line

from config import CHOICES, LATER, POSITIVE, RECIPES, WHERE, Config, load_config, relocated, what
from generators.relations import SIZES
from jepa import OBJECTIVES

SETTABLE = [f for f in fields(Config) if f.name != "recipe"]  # the loader fills in recipe
PLAIN = ["--spread=none", "--spread_weight=0"]  # the published loss alone
NUMBERS = [f.name for f in SETTABLE if f.type in (int, float)]
RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


def write_recipe(tmp_path, text, name="mine.py"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


# --- layers -----------------------------------------------------------------------------------


def test_no_arguments_give_the_defaults():
    assert load_config([]) == Config(recipe="default", out_dir="out/default")


def test_recipe_wins_over_default_and_command_line_over_recipe(tmp_path):
    recipe = write_recipe(tmp_path, "n_layer = 3\nn_pred = 4\n")
    for argv in ([recipe, "--n_pred=2"], ["--n_pred=2", recipe]):  # in any order
        c = load_config(argv)
        assert (c.n_layer, c.n_pred, c.n_head) == (3, 2, Config.n_head)


def test_run_folder_is_named_after_the_recipe_unless_told_otherwise(tmp_path):
    recipe = write_recipe(tmp_path, "n_layer = 3\n")
    assert load_config([recipe]).out_dir == "out/mine"
    assert load_config([recipe]).recipe == "mine"
    assert load_config([recipe, "--out_dir=elsewhere"]).out_dir == "elsewhere"
    recipe = write_recipe(tmp_path, "out_dir = 'from/recipe'\n")
    assert load_config([recipe]).out_dir == "from/recipe"


def test_empty_out_dir_means_the_default_one():
    """As its comment says; taken literally it would be the current folder."""
    assert load_config(["debug", "--out_dir="]).out_dir == "out/debug"


def test_recipe_may_calculate_and_keep_private_names(tmp_path):
    c = load_config([write_recipe(tmp_path, "_heads = 2\nn_head = _heads\nn_embd = 32 * _heads\n")])
    assert (c.n_head, c.n_embd) == (2, 64)


@pytest.mark.parametrize("where", ["repository", "elsewhere"])
def test_three_spellings_name_the_same_recipe_from_any_directory(
    where, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(RECIPES.parent if where == "repository" else tmp_path)
    found = []
    for name in ("config/gsm8k_jepa.py", "configs/gsm8k_jepa.py", "gsm8k_jepa"):
        found.append(load_config([name]))
        printed = capsys.readouterr().out
        assert printed.startswith("recipe ") and printed.endswith("configs/gsm8k_jepa.py\n")
    assert found[0] == found[1] == found[2]
    assert found[0].recipe == "gsm8k_jepa"


def test_an_existing_path_wins_over_configs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "gsm8k_jepa.py").write_text("n_layer = 3\n")
    assert load_config(["config/gsm8k_jepa.py"]).n_layer == 3
    assert capsys.readouterr().out == "recipe config/gsm8k_jepa.py\n"
    assert load_config(["gsm8k_jepa"]).n_layer == 6  # no such path here: the one in configs/


def test_a_folder_does_not_hide_a_recipe(tmp_path, monkeypatch):
    """In out/, say, there is a folder gsm8k_jepa."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k_jepa").mkdir()
    assert load_config(["gsm8k_jepa"]).recipe == "gsm8k_jepa"


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_every_recipe_loads(name):
    assert load_config([name]).recipe == name


def test_a_run_of_other_settings_has_another_folder(tmp_path):
    """Else starting the λ = 0 run would move the JEPA run away."""
    recipe = write_recipe(tmp_path, "jepa_weight = 0.5\nn_layer = 3\n")
    for options, name in (
        (["--jepa_weight=0"], "mine,jepa_weight=0"), (["--seed=2"], "mine,seed=2"),
        (["--jepa_loss=l2", "--n_layer=2"], "mine,n_layer=2,jepa_loss=l2"),
        (["--n_layer=2", "--jepa_loss=l2"], "mine,n_layer=2,jepa_loss=l2"),  # in any order
        (["--n_layer=3"], "mine"),  # as in the recipe
        (["--dataset=some/where/pairs.jsonl"], "mine,dataset=pairs.jsonl"),
        (["--device=cpu", "--log_interval=3", "--compile=false"], "mine"),  # where it runs
        (["--max_iters=9", "--eval_interval=3", "--lr_decay_iters=8", "--patience=2"], "mine"),
    ):
        assert load_config([recipe, *options]).out_dir == f"out/{name}"
        assert load_config([recipe, *options, "--out_dir=here"]).out_dir == "here"
    assert load_config(["--seed=2"]).out_dir == "out/default,seed=2"


def test_the_name_of_a_folder_is_short_and_safe():
    weights = ["0.1234567", "0.12345671"]
    long = [f"--{f.name}={f.default}1" for f in SETTABLE if f.type is int and f.name not in LATER
            and f.name not in ("n_head", "n_embd", "log_interval", "eval_answers", "lora_rank")]
    names = [load_config([*long, f"--jepa_weight={w}"]).out_dir.split("/") for w in weights]
    assert names[0] != names[1] and all(len(parts) == 2 for parts in names)
    assert all(len(name.encode()) <= 120 for _, name in names)
    odd = load_config(["--dataset=a/b $(c) 'd'.jsonl"]).out_dir
    assert odd == "out/default,dataset=b___c___d_.jsonl"


# What these change beside λ has no effect without it, or on what is trained: they share a baseline.
OTHER_OBJECTIVES = {
    "nlrx_tube": {"objective", "n_pred", "jepa_warmup_iters", "spread", "spread_weight"},
    "nlrx_paper": {"n_pred", "jepa_warmup_iters", "spread", "spread_weight", "eval_answers"},
}


@pytest.mark.parametrize("name", [name for name in RECIPE_NAMES if "baseline" not in name])
def test_every_recipe_has_a_baseline(name):
    jepa = asdict(load_config([name]))
    plain = "nlrx" if name in OTHER_OBJECTIVES else name.removesuffix("_jepa")
    baseline = asdict(load_config([f"{plain}_baseline"]))
    assert {k for k in jepa if jepa[k] != baseline[k]} == {
        "recipe", "out_dir", "jepa_weight", *OTHER_OBJECTIVES.get(name, ())}  # fmt: skip
    assert baseline["jepa_weight"] == 0 < jepa["jepa_weight"]


def test_a_baseline_is_two_lines(tmp_path, capsys):
    recipe = write_recipe(tmp_path, 'base = "gsm8k_jepa"\njepa_weight = 0.0\n')
    mine, baseline = asdict(load_config([recipe])), asdict(load_config(["gsm8k_baseline"]))
    assert {k for k in mine if mine[k] != baseline[k]} == {"recipe", "out_dir"}
    assert (mine["recipe"], mine["out_dir"]) == ("mine", "out/mine")
    assert capsys.readouterr().out.splitlines()[0] == f"recipe {recipe}"
    for name in (name for name in RECIPE_NAMES if name.endswith("baseline")):
        lines = (RECIPES / f"{name}.py").read_text().splitlines()
        assert len([line for line in lines if not line.startswith("#")]) == 2


def test_a_recipe_wins_over_its_base_and_that_over_its_own(tmp_path):
    """Whether base is named by a path or by a name in configs/, and wherever it stands."""
    first = write_recipe(tmp_path, "n_layer = 3\nn_pred = 4\nn_head = 4\n", "first.py")
    second = write_recipe(tmp_path, f"n_pred = 2\nbase = {first!r}\nn_head = 2\n", "second.py")
    c = load_config([write_recipe(tmp_path, f"base = {second!r}\nn_head = 1\n"), "--n_pred=0"])
    assert (c.n_layer, c.n_pred, c.n_head, c.recipe) == (3, 0, 1, "mine")
    for name in ("debug", "debug.py", "config/debug.py"):
        c = load_config([write_recipe(tmp_path, f"base = {name!r}\nn_head = 1\n")])
        assert (c.dataset, c.n_head) == ("word_problems", 1)


@pytest.mark.parametrize("bases, named", [
    (["nosuch"], "no recipe nosuch"), (["{0}"], "{0} is its own base"),
    (["{1}", "{0}"], "{0} is its own base"), (["{1}", "{2}", "{1}"], "{1} is its own base"),
    (["{1}", "nosuch"], "no recipe nosuch"), ([3], "no recipe 3"),
])  # fmt: skip
def test_a_base_that_cannot_be_is_one_line(bases, named, tmp_path, capsys):
    """Missing, or in a circle of one, two or, further down a chain, two again."""
    paths = [str(tmp_path / f"recipe{i}.py") for i in range(3)]
    for path, base in zip(paths, bases):
        base = base.format(*paths) if isinstance(base, str) else base
        write_recipe(tmp_path, f"base = {base!r}\n", path)
    assert named.format(*paths) in error_line(capsys, load_config, [paths[0]])


def test_a_mistake_in_a_base_is_named_there(tmp_path, capsys):
    base = write_recipe(tmp_path, "n_layers = 3\n", "base.py")
    recipe = write_recipe(tmp_path, f"base = {base!r}\nn_layer = 3\n")
    assert f"unknown key n_layers in {base}" in error_line(capsys, load_config, [recipe])


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().n_layer = 3


def test_a_recipe_may_write_an_int_for_a_float_and_nothing_else(tmp_path, capsys):
    value = load_config([write_recipe(tmp_path, "jepa_weight = 2\n")]).jepa_weight
    assert value == 2 and type(value) is float
    for line in ("n_layer = 2.0", "n_layer = True", "bias = 1", "jepa_weight = True",
                 "dataset = 5", "n_layer = None", "data_dir = ['a']"):
        recipe = write_recipe(tmp_path, f"{line}\n")
        key = line.split()[0]
        assert f"{key} in {recipe} must be of type" in error_line(capsys, load_config, [recipe])


# --- mistakes ---------------------------------------------------------------------------------


def test_unknown_key_names_the_nearest_one(tmp_path, capsys):
    recipe = write_recipe(tmp_path, "n_layers = 3\n")
    typo = error_line(capsys, load_config, [recipe])
    assert f"unknown key n_layers in {recipe}; did you mean n_layer?" in typo
    typo = error_line(capsys, load_config, [write_recipe(tmp_path, "n_layer = 3\n"), "--n_heads=3"])
    assert "unknown key n_heads on the command line; did you mean n_head?" in typo


@pytest.mark.parametrize("option", [
    "--direction=reverse", "--pred_place=front", "--regex_split=depth", "--step_pair=random",
    "--n_relations=3", "--n_train_entities=20", "--n_atomic_entities=16", "--n_train_facts=40",
    "--n_atomic_facts=30", "--base=gsm8k_jepa",
])  # fmt: skip
def test_what_is_no_setting_any_more_is_an_unknown_key(option, tmp_path, capsys):
    """Now layout=reverse, layout=front, dataset=regex_depth, views=steps_random and the SIZES of
    dataset=relations; base belongs into recipes."""
    key, value = option[2:].split("=")
    assert f"unknown key {key} on the command line" in error_line(capsys, load_config, [option])
    if key != "base":
        recipe = write_recipe(tmp_path, f"{key} = {value!r}\n")
        assert f"unknown key {key} in {recipe}" in error_line(capsys, load_config, [recipe])


def test_two_recipes_are_refused(capsys):
    line = error_line(capsys, load_config, ["debug", "gsm8k_jepa"])
    assert "one recipe at a time, got debug gsm8k_jepa" in line


def test_unknown_recipe_lists_the_known_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("gsm8k_jeppa", "config/gsm8k_jeppa.py", str(tmp_path)):
        line = error_line(capsys, load_config, [name])
        assert f"no recipe {name}" in line and all(r in line for r in RECIPE_NAMES)


@pytest.mark.parametrize("text, named", [
    ("n_layer = = 3\n", "SyntaxError"), ("n_layer = 1 / 0\n", "ZeroDivisionError"),
    ("import nosuchmodule\n", "nosuchmodule"), ("n_layer = m\n", "NameError"),
    ("raise ValueError('two\\nlines')\n", "ValueError"),
    ("import math\n", "unknown key math"),
    ("n_head = 7\n", "n_embd=512 must be a multiple of n_head=7"),
])  # fmt: skip
def test_a_bad_recipe_is_one_line(text, named, tmp_path, capsys):
    recipe = write_recipe(tmp_path, text)
    line = error_line(capsys, load_config, [recipe])
    assert named in line


def test_a_recipe_that_is_no_text_is_one_line(tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes(bytes(range(256)))
    assert "does not run" in error_line(capsys, load_config, [str(tmp_path / "ckpt.pt")])


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_outside_its_list_names_the_list(key, capsys):
    line = error_line(capsys, load_config, [f"--{key}=other"])
    assert f"{key}='other'" in line and ", ".join(CHOICES[key]) in line


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_may_be_negative(key, capsys):
    assert f"{key}=-1" in error_line(capsys, load_config, [f"--{key}=-1"])


@pytest.mark.parametrize("key", sorted(POSITIVE))
def test_sizes_and_counts_must_be_above_zero(key, capsys):
    assert f"{key}=0" in error_line(capsys, load_config, [f"--{key}=0"])


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_a_number_must_be_finite(text, capsys):
    for key in (f.name for f in SETTABLE if f.type is float):
        assert f"{key}={text}" in error_line(capsys, load_config, [f"--{key}={text}"])


@pytest.mark.parametrize("args, named", [
    (["--n_head=7"], "n_embd=512 must be a multiple of n_head=7"),
    (["--dropout=1"], "dropout=1.0 must be below 1"),
    (["--jepa_dropout=1"], "jepa_dropout=1.0 must be below 1"),
    (["--beta1=1"], "beta1=1.0 must be below 1"),
    (["--beta2=1.5"], "beta2=1.5 must be below 1"),
    (["--min_lr=1e-2"], "min_lr=0.01 is above learning_rate=0.001"),
    (["--jepa_split=1"], "jepa_split=1.0 must be below 1"),
    (["--spread=none"], "spread=none with spread_weight=0.6"),
    (["--spread_weight=0"], "spread=cross with spread_weight=0.0"),
    (["debug", "--spread=vicreg"], "spread=vicreg with spread_weight=0.0"),
    (["--batch_size=1", "--jepa_loss=infonce", *PLAIN], "batch_size=1"),
    (["--batch_size=1", "--spread=sigreg", "--spread_weight=0.1"], "batch_size=1"),
    (["--batch_size=1"], "batch_size=1"),
    (["--bpe_vocab_size=319"], "bpe_vocab_size=319 must be at least 320"),
    (["--eval_pairs=1"], "eval_pairs=1"),
    (["--seed=100000000000000000000"], "seed=1"),
    (["--ema=1"], "ema=1.0 must be below 1"),
    (["--layout=plan", "--n_pred=0"], "layout=plan needs [PRED]"),
    (["--layout=front", "--n_pred=0"], "layout=front needs [PRED]"),
    (["--views=steps", "--layout=plan"], "layout=plan goes with views=pairs, not steps"),
    (["--views=steps", "--layout=reverse"], "layout=reverse goes with views=pairs"),
    (["--views=steps_random", "--layout=front"], "layout=front goes with views=pairs"),
    (["--views=steps", "--answer_view=final"], "views=steps needs the worked answer"),
    (["--views=steps_random", "--answer_view=final"], "answer_view=full"),
    (["nlrx_jepa", "--data_dir=mine"], "data_dir=mine goes with dataset=gsm8k"),
    (["relations", "--train_rows=300"], "train_rows=300 goes with pairs"),
    (["relations", "--dataset=relations_full", "--train_rows=300"], "train_rows=300 goes with"),
    (["--views=facts"], "views=facts goes with dataset=relations"),
    (["--tokenizer=words"], "tokenizer=words goes with dataset=relations"),
    (["relations", "--views=pairs"], "views=facts goes with dataset=relations"),
    (["relations", "--tokenizer=gpt2"], "tokenizer=words goes with dataset=relations"),
    (["--dataset=book.txt"], "dataset=book.txt is running text and needs views=split"),
    (["text_jepa", "--eval_answers=9"], "eval_answers=9: views=split asks no question"),
    (["relations", "--eval_answers=9"], "eval_answers=9: views=facts asks no question"),
])  # fmt: skip
def test_values_that_cannot_work_are_refused(args, named, capsys):
    assert named in error_line(capsys, load_config, args)


@pytest.mark.parametrize("args", [
    ["--batch_size=1", *PLAIN], ["--batch_size=1", "--jepa_loss=infonce", "--jepa_weight=0"],
    ["--bpe_vocab_size=320"], ["--min_lr=1e-3"], ["--n_pred=0"], ["--dropout=0.99"],
    ["--grad_clip=0"], ["--warmup_iters=0"], ["--spread=cross", "--spread_weight=0.1"],
    ["--eval_pairs=2"], ["--seed=0"], ["--views=steps", "--n_pred=0"], ["--ema=0.999"],
    ["--layout=isolated", "--n_pred=0"], ["--layout=reverse", "--n_pred=0"],
    ["--views=steps_random"], ["relations", "--dataset=relations_full"],
    ["--dataset=relations.jsonl"],  # a file of pairs, whatever its name
])  # fmt: skip
def test_values_at_the_edge_are_accepted(args):
    assert isinstance(load_config(args), Config)


# --- help -------------------------------------------------------------------------------------


def help_lines(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        load_config([*argv, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_help_shows_every_field_and_first_the_fifteen_that_one_really_touches(capsys):
    usage, _, title, *lines = help_lines(capsys, "debug", "--n_layer=3")
    assert usage.endswith("[RECIPE] [--key=value ...]") and title == "what one really touches"
    options = [line.split("=")[0] for line in lines]
    assert options[:16] == [
        "  --dataset", "  --max_iters", "  --batch_size", "  --learning_rate", "  --n_layer",
        "  --n_head", "  --n_embd", "  --block_size", "  --jepa_weight", "  --jepa_loss",
        "  --spread", "  --spread_weight", "  --jepa_dropout", "  --n_pred", "  --seed", "",
    ]  # fmt: skip
    shown = [option for option in options if option.startswith("  --")]
    assert sorted(shown) == sorted(f"  --{field.name}" for field in SETTABLE)


def test_help_tells_every_choice(capsys):
    shown = {line.split("=")[0].strip(" -"): line for line in help_lines(capsys)}
    for key, choices in CHOICES.items():
        assert all(choice in shown[key] for choice in choices), shown[key]


def test_rules_name_fields_that_exist():
    """A renamed field would silently lose its check, or count as what is trained."""
    assert set(CHOICES) | POSITIVE <= {f.name for f in SETTABLE}
    assert set(LATER) < set(what(Config())) and not set(LATER) & set(WHERE)
    assert set(WHERE) < {f.name for f in fields(Config)} and len(set(WHERE)) == len(WHERE)
    assert CHOICES["objective"] == tuple(OBJECTIVES)


def test_what_is_trained_is_all_but_where():
    config = load_config(["debug", "--seed=3"])
    assert what(config) == {f.name: getattr(config, f.name) for f in fields(Config)
                            if f.name not in WHERE}  # fmt: skip
    elsewhere = load_config(["debug", "--seed=3", "--out_dir=there", "--device=cpu",
                             "--compile=false", "--log_interval=7"])  # fmt: skip
    assert what(elsewhere) == what(config)
    assert what(load_config(["debug", "--seed=4"])) != what(config)


def test_every_generated_set_of_facts_goes_with_facts(capsys):
    for name in SIZES:
        assert load_config(["relations", f"--dataset={name}"]).views == "facts"
        line = error_line(capsys, load_config, [f"--dataset={name}"])
        assert "views=facts goes with dataset=relations" in line


def test_data_is_looked_for_where_it_was_moved():
    config = Config(data_dir="here")
    assert relocated(config, "") == config and relocated(config, "there").data_dir == "there"
    for name in ("pairs.jsonl", "book.txt"):
        own = Config(dataset=f"here/{name}")
        assert relocated(own, "") == own and relocated(own, "there").dataset == f"there/{name}"
