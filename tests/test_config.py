"""Claims about config.py: three layers of settings, and one line for every mistake."""

import ast
import inspect
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from config import CHOICES, POSITIVE, RECIPES, Config, load_config, moved

SETTABLE = [f for f in fields(Config) if f.name != "recipe"]  # the loader fills in recipe
NUMBERS = [f.name for f in SETTABLE if f.type in (int, float)]
RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


def error_line(capsys, argv):
    """The one line that load_config(argv) writes to stderr before it exits with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        load_config(argv)
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


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


@pytest.mark.parametrize("task", ["gsm8k", "nlrx"])
def test_baseline_differs_from_jepa_in_jepa_weight_alone(task):
    jepa, baseline = (asdict(load_config([f"{task}_{r}"])) for r in ("jepa", "baseline"))
    assert {k for k in jepa if jepa[k] != baseline[k]} == {"recipe", "out_dir", "jepa_weight"}
    assert baseline["jepa_weight"] == 0 < jepa["jepa_weight"]


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().n_layer = 3


# --- conversions ------------------------------------------------------------------------------


@pytest.mark.parametrize("arg, value", [
    ("--n_layer=3", 3), ("--learning_rate=1e-3", 1e-3), ("--learning_rate=1", 1.0),
    ("--dropout=.5", 0.5), ("--bias=True", True), ("--bias=true", True), ("--compile=False", False),
    ("--compile=false", False), ("--data_dir=3", "3"), ("--data_dir=a=b", "a=b"),
    ("--data_dir=", ""),
])  # fmt: skip
def test_text_becomes_the_type_of_its_field(arg, value):
    got = getattr(load_config([arg]), arg[2:].partition("=")[0])
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("arg", [
    "--n_layer=1.5", "--n_layer=1e3", "--n_layer=", "--n_layer=six", "--n_layer=True",
    "--learning_rate=fast", "--learning_rate=", "--learning_rate=1,5", "--bias=1", "--bias=yes",
    "--bias=",
])  # fmt: skip
def test_text_of_another_type_is_refused(arg, capsys):
    key, _, text = arg[2:].partition("=")
    wanted = type(getattr(Config, key)).__name__
    line = error_line(capsys, [arg])
    assert f"{key} on the command line must be of type {wanted}, got {text!r}" in line


def test_a_recipe_may_write_an_int_for_a_float_and_nothing_else(tmp_path, capsys):
    value = load_config([write_recipe(tmp_path, "jepa_weight = 2\n")]).jepa_weight
    assert value == 2 and type(value) is float
    for line in ("n_layer = 2.0", "n_layer = True", "bias = 1", "jepa_weight = True",
                 "dataset = 5", "n_layer = None", "data_dir = ['a']"):
        recipe = write_recipe(tmp_path, f"{line}\n")
        key = line.split()[0]
        assert f"{key} in {recipe} must be of type" in error_line(capsys, [recipe])


# --- mistakes ---------------------------------------------------------------------------------


def test_unknown_key_names_the_nearest_one(tmp_path, capsys):
    typo = error_line(capsys, ["--jepa_wieght=2"])
    assert "unknown key jepa_wieght on the command line; did you mean jepa_weight?" in typo
    recipe = write_recipe(tmp_path, "n_layers = 3\n")
    typo = error_line(capsys, [recipe])
    assert f"unknown key n_layers in {recipe}; did you mean n_layer?" in typo
    assert "--help" in error_line(capsys, ["--zzzzzz=1"])
    assert "unknown key recipe" in error_line(capsys, ["--recipe=debug"])


@pytest.mark.parametrize("arg", ["--n_layer", "-n_layer=3", "-n", "--", "-", "--bias"])
def test_options_are_written_with_two_dashes_and_equals(arg, capsys):
    assert f"error: {arg}: options are written --key=value" in error_line(capsys, [arg])


def test_two_recipes_are_refused(capsys):
    line = error_line(capsys, ["debug", "gsm8k_jepa"])
    assert "one recipe at a time, got debug gsm8k_jepa" in line


def test_unknown_recipe_lists_the_known_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("gsm8k_jeppa", "config/gsm8k_jeppa.py", str(tmp_path)):
        line = error_line(capsys, [name])
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
    line = error_line(capsys, [recipe])
    assert named in line


def test_a_recipe_that_is_no_text_is_one_line(tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes(bytes(range(256)))
    assert "does not run" in error_line(capsys, [str(tmp_path / "ckpt.pt")])


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_outside_its_list_names_the_list(key, capsys):
    line = error_line(capsys, [f"--{key}=other"])
    assert f"{key}='other'" in line and ", ".join(CHOICES[key]) in line


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_may_be_negative(key, capsys):
    assert f"{key}=-1" in error_line(capsys, [f"--{key}=-1"])


@pytest.mark.parametrize("key", sorted(POSITIVE))
def test_sizes_and_counts_must_be_above_zero(key, capsys):
    assert f"{key}=0" in error_line(capsys, [f"--{key}=0"])


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_a_number_must_be_finite(text, capsys):
    for key in (f.name for f in SETTABLE if f.type is float):
        assert f"{key}={text}" in error_line(capsys, [f"--{key}={text}"])


@pytest.mark.parametrize("args, named", [
    (["--n_head=7"], "n_embd=512 must be a multiple of n_head=7"),
    (["--dropout=1"], "dropout=1.0 must be below 1"),
    (["--jepa_dropout=1"], "jepa_dropout=1.0 must be below 1"),
    (["--beta1=1"], "beta1=1.0 must be below 1"),
    (["--beta2=1.5"], "beta2=1.5 must be below 1"),
    (["--min_lr=1e-2"], "min_lr=0.01 is above learning_rate=0.001"),
    (["--spread=vicreg"], "set both or none"),
    (["--spread_weight=0.1"], "set both or none"),
    (["--batch_size=1", "--jepa_loss=infonce"], "batch_size=1"),
    (["--batch_size=1", "--spread=sigreg", "--spread_weight=0.1"], "batch_size=1"),
    (["--bpe_vocab_size=319"], "bpe_vocab_size=319 must be at least 320"),
    (["--eval_pairs=1"], "eval_pairs=1"),
    (["--seed=100000000000000000000"], "seed=1"),
    (["--ema=1"], "ema=1.0 must be below 1"),
    (["--layout=plan", "--direction=reverse"], "layout=plan and direction=reverse are two layouts"),
    (["--layout=isolated", "--pred_place=front"], "layout=isolated and pred_place=front"),
    (["--direction=reverse", "--pred_place=front"], "direction=reverse and pred_place=front"),
    (["--layout=plan", "--n_pred=0"], "layout=plan needs [PRED]"),
    (["--pred_place=front", "--n_pred=0"], "pred_place=front needs [PRED]"),
    (["--views=steps", "--layout=plan"], "layout=plan goes with views=pairs, not steps"),
    (["--views=steps", "--direction=reverse"], "direction=reverse goes with views=pairs"),
    (["--views=steps", "--answer_view=final"], "answer_view=full"),
    (["nlrx_jepa", "--data_dir=mine"], "data_dir=mine goes with dataset=gsm8k"),
    (["relations", "--train_rows=300"], "train_rows=300 goes with pairs"),
])  # fmt: skip
def test_values_that_cannot_work_are_refused(args, named, capsys):
    assert named in error_line(capsys, args)


@pytest.mark.parametrize("args", [
    ["--batch_size=1"], ["--batch_size=1", "--jepa_loss=infonce", "--jepa_weight=0"],
    ["--bpe_vocab_size=320"], ["--min_lr=1e-3"], ["--n_pred=0"], ["--dropout=0.99"],
    ["--grad_clip=0"], ["--warmup_iters=0"], ["--spread=cross", "--spread_weight=0.1"],
    ["--eval_pairs=2"], ["--seed=0"], ["--views=steps", "--n_pred=0"], ["--ema=0.999"],
    ["--layout=isolated", "--n_pred=0"], ["--direction=reverse", "--n_pred=0"],
])  # fmt: skip
def test_values_at_the_edge_are_accepted(args):
    assert isinstance(load_config(args), Config)


# --- help -------------------------------------------------------------------------------------


def comments():
    """Of every field, read from the source in another way than help_text does."""
    source = inspect.getsource(Config).splitlines()
    lines = {f.name: [s for s in source if s.startswith(f"    {f.name}: ")] for f in SETTABLE}
    return {name: line.partition("  # ")[2] for name, [line] in lines.items()}


def help_lines(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        load_config(argv)
    assert exit_.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return [line for line in printed.out.splitlines() if line.startswith("  --")]


def test_every_field_has_a_comment():
    assert [name for name, comment in comments().items() if not comment] == []


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["nosuchrecipe", "--n_layer=3", "--help"]])
def test_help_shows_every_field_with_type_default_and_comment(argv, capsys):
    shown, comment_of = help_lines(argv, capsys), comments()
    assert len(shown) == len(SETTABLE)
    for field, line in zip(SETTABLE, shown):
        option, default, comment = line.split(maxsplit=2)
        assert option == f"--{field.name}={field.type.__name__}"
        assert ast.literal_eval(default) == field.default
        assert comment == comment_of[field.name]


def test_help_tells_every_choice(capsys):
    shown = {line.split("=")[0].strip(" -"): line for line in help_lines(["--help"], capsys)}
    for key, choices in CHOICES.items():
        assert all(choice in shown[key] for choice in choices), shown[key]


def test_rules_name_fields_that_exist():
    """A renamed field would silently lose its check."""
    assert set(CHOICES) | POSITIVE <= {f.name for f in SETTABLE}


def test_data_is_looked_for_where_it_was_moved():
    config = Config(data_dir="here")
    assert moved(config, "") == config and moved(config, "there").data_dir == "there"
    for name in ("pairs.jsonl", "book.txt"):
        own = Config(dataset=f"here/{name}")
        assert moved(own, "") == own and moved(own, "there").dataset == f"there/{name}"
