"""--key=value for the fields of a dataclass, --help from its comments, mistakes in one line."""

import contextlib
import difflib
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn


def fail(message: str) -> NoReturn:
    """The one way out for a user's mistake: a line on stderr (what, where, what to do), exit 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def program() -> str:
    """How this script was started: python train.py, or python -m lab.sweep."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"


def parse_args(cls: type, argv: list[str], usage: str) -> tuple[dict[str, Any], list[str]]:
    """Split argv into {field: value} for the fields of dataclass `cls` and the other arguments.

    Also answers --help, from the comments in the source of `cls`.
    """
    values, rest = {}, []
    for arg in argv:
        if arg in ("-h", "--help"):
            print(f"usage: {usage}\n{help_text(cls)}")
            raise SystemExit(0)
        if not arg.startswith("-"):
            rest.append(arg)
            continue
        key, equals, text = arg.lstrip("-").partition("=")
        if not equals or not arg.startswith("--"):
            fail(f"{arg}: options are written --key=value (--help lists them)")
        values[key] = convert(cls, key, text, "on the command line")
    return values, rest


def convert(cls: type, key: str, value: Any, where: str) -> Any:
    """`value`, from a recipe or as text from the command line, as the type of field `key`."""
    types = {f.name: f.type for f in fields(cls) if f.name != "recipe"}
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
        fail(f"unknown key {key} {where}; {hint}")
    want = types[key]
    if want is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    elif want in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):  # refused below, with its name
            value = want(value)
    if want is float and type(value) is int:
        value = float(value)
    if type(value) is not want:
        fail(f"{key} {where} must be of type {want.__name__}, got {value!r}")
    return value


def help_text(cls: type) -> str:
    """A line per field of `cls`: name, type, default and comment; section comments as titles."""
    lines = []
    for line in inspect.getsource(cls).splitlines():
        title = re.match(r"    # (.*)", line)
        field = re.match(r"    (\w+): (\w+) = (.*?)  # (.*)", line)
        if title:
            lines.append(f"\n{title[1]}")
        elif field and field[1] != "recipe":
            name, kind, default, comment = field.groups()
            lines.append(f"  --{name}={kind}".ljust(38) + f"{default:>14}  {comment}")
    return "\n".join(lines)
