"""Claims about plumbing/options.py: --key=value and --help for any dataclass, one line for every
mistake. Config is the example, and a small class of its own."""

import ast
import inspect
from dataclasses import dataclass, fields

import pytest
from conftest import error_line

from config import Config
from plumbing.options import convert, fail, help_text, parse_args

SETTABLE = [f for f in fields(Config) if f.name != "recipe"]  # the loader fills in recipe


@dataclass(frozen=True)
class Small:
    # first things
    size: int = 3  # how many
    share: float = 0.5  # of all; 1 is all
    # then the rest
    loud: bool = False  # true | false
    name: str = "a b"  # a text, # and all

    @property
    def twice(self):  # no field
        return 2 * self.size


def parsed(*argv, cls=Config):
    return parse_args(cls, list(argv), "python some.py [--key=value ...]")


def test_fields_and_other_arguments_are_told_apart_in_any_order():
    assert parsed(cls=Small) == ({}, [])
    want = ({"size": 4, "loud": True}, ["one", "two"])
    assert parsed("one", "--size=4", "two", "--loud=true", cls=Small) == want
    assert parsed("--loud=true", "--size=4", "one", "two", cls=Small) == want
    assert parsed("--size=4", "--size=5", cls=Small) == ({"size": 5}, [])  # the later wins


# --- conversions ------------------------------------------------------------------------------


@pytest.mark.parametrize("arg, value", [
    ("--n_layer=3", 3), ("--learning_rate=1e-3", 1e-3), ("--learning_rate=1", 1.0),
    ("--dropout=.5", 0.5), ("--bias=True", True), ("--bias=true", True), ("--compile=False", False),
    ("--compile=false", False), ("--data_dir=3", "3"), ("--data_dir=a=b", "a=b"),
    ("--data_dir=", ""),
])  # fmt: skip
def test_text_becomes_the_type_of_its_field(arg, value):
    [got] = parsed(arg)[0].values()
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("arg", [
    "--n_layer=1.5", "--n_layer=1e3", "--n_layer=", "--n_layer=six", "--n_layer=True",
    "--learning_rate=fast", "--learning_rate=", "--learning_rate=1,5", "--bias=1", "--bias=yes",
    "--bias=",
])  # fmt: skip
def test_text_of_another_type_is_refused(arg, capsys):
    key, _, text = arg[2:].partition("=")
    wanted = type(getattr(Config, key)).__name__
    line = error_line(capsys, parsed, arg)
    assert f"{key} on the command line must be of type {wanted}, got {text!r}" in line


def test_an_int_may_stand_for_a_float_and_nothing_else_for_anything(capsys):
    value = convert(Config, "jepa_weight", 2, "here")
    assert value == 2 and type(value) is float
    for key, wrong in (("n_layer", 2.0), ("n_layer", True), ("bias", 1), ("jepa_weight", True),
                       ("dataset", 5), ("n_layer", None), ("data_dir", ["a"])):  # fmt: skip
        line = error_line(capsys, convert, Config, key, wrong, "here")
        wanted = type(getattr(Config, key)).__name__
        assert f"{key} here must be of type {wanted}, got {wrong!r}" in line


# --- mistakes ---------------------------------------------------------------------------------


def test_a_mistake_is_a_line_on_stderr_and_exit_code_2(capsys):
    assert error_line(capsys, fail, "what and where; what to do") == (
        "error: what and where; what to do")  # fmt: skip
    assert capsys.readouterr().out == ""


def test_unknown_key_names_the_nearest_one(capsys):
    typo = error_line(capsys, parsed, "--jepa_wieght=2")
    assert "unknown key jepa_wieght on the command line; did you mean jepa_weight?" in typo
    assert "--help" in error_line(capsys, parsed, "--zzzzzz=1")
    assert "unknown key recipe" in error_line(capsys, parsed, "--recipe=debug")
    assert "unknown key twice" in error_line(capsys, parsed, "--twice=2", cls=Small)
    assert "unknown key sise in a file; did you mean size?" in error_line(
        capsys, convert, Small, "sise", 3, "in a file")  # fmt: skip


@pytest.mark.parametrize("arg", ["--n_layer", "-n_layer=3", "-n", "--", "-", "-bias"])
def test_options_are_written_with_two_dashes_and_equals(arg, capsys):
    assert f"error: {arg}: options are written --key=value" in error_line(capsys, parsed, arg)


def test_a_switch_needs_no_value():
    assert parsed("--bias", "--stop_grad=false") == ({"bias": True, "stop_grad": False}, [])


# --- help -------------------------------------------------------------------------------------


def comments():
    """Of every field, read from the source in another way than help_text does."""
    source = inspect.getsource(Config).splitlines()
    lines = {f.name: [s for s in source if s.startswith(f"    {f.name}: ")] for f in SETTABLE}
    return {name: line.partition("  # ")[2] for name, [line] in lines.items()}


def help_lines(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        parsed(*argv)
    assert exit_.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("usage: python some.py [--key=value ...]\n")
    return [line for line in printed.out.splitlines() if line.startswith("  --")]


def test_every_field_has_a_comment():
    assert [name for name, comment in comments().items() if not comment] == []


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["nosuchrecipe", "--n_layer=3", "--help"]])
def test_help_shows_every_field_with_type_default_and_comment(argv, capsys):
    shown, comment_of = help_lines(capsys, *argv), comments()
    assert len(shown) == len(SETTABLE)
    for field, line in zip(SETTABLE, shown):
        option, default, comment = line.split(maxsplit=2)
        assert option == f"--{field.name}={field.type.__name__}"
        assert ast.literal_eval(default) == field.default
        assert comment == comment_of[field.name]


def test_help_has_the_section_comments_as_titles():
    def line(option, default, comment):
        return f"  {option:<36}{default:>14}  {comment}"

    assert help_text(Small).splitlines() == [
        "", "first things", line("--size=int", "3", "how many"),
        line("--share=float", "0.5", "of all; 1 is all"),
        "", "then the rest", line("--loud=bool", "False", "true | false"),
        line("--name=str", '"a b"', "a text, # and all"),
    ]  # fmt: skip
