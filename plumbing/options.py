"""--key=value for the fields of a dataclass, --help from its comments, mistakes in one line."""

import contextlib
import difflib
import hashlib
import inspect
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn


def fail(message: str) -> NoReturn:
    """The one way out for a user's mistake: a line on stderr (what, where, what to do), exit 2."""
    print(end="", flush=True)  # takes a bar away
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def program() -> str:
    """How this script was started: python train.py, or python -m lab.sweep."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"


def folder_name(recipe: str, differs: dict[str, Any]) -> str:
    """A run's name: its recipe and what differs from it, as in gsm8k_jepa,jepa_weight=0. Of a path
    its last part is told; what would be too long a name ends in a digest of the rest."""
    parts = [f"{key}={Path(value).name if isinstance(value, str) else value}".removesuffix(".0")
             for key, value in differs.items()]  # fmt: skip
    name = re.sub(r"[^\w.=,+-]", "_", ",".join([recipe, *parts]))
    if len(name.encode()) > 120:
        start, digest = name.encode()[:100].decode(errors="ignore"), hashlib.sha256(name.encode())
        name = f"{start}-{digest.hexdigest()[:8]}"
    return name


def parse_args(cls: type, argv: list[str], usage: str) -> tuple[dict[str, Any], list[str]]:
    """Split argv into {field: value} for the fields of dataclass `cls` and the other arguments.

    Also answers --help, from the comments in the source of `cls`.
    """
    values, rest = {}, []
    switches = {f.name for f in fields(cls) if f.type is bool}  # --best says --best=true
    for arg in argv:
        if arg in ("-h", "--help"):
            print(f"usage: {usage}\n{help_text(cls)}")
            raise SystemExit(0)
        if not arg.startswith("-"):
            rest.append(arg)
            continue
        key, equals, text = arg.lstrip("-").partition("=")
        if not (equals or key in switches) or not arg.startswith("--"):
            fail(f"{arg}: options are written --key=value (--help lists them)")
        values[key] = convert(cls, key, text if equals else "true", "on the command line")
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


def find_recipe(folder: Path, name: str) -> Path:
    """A path that exists is the recipe; else its stem names a file in `folder`."""
    path = Path(name)
    if path.is_file():
        return path
    known = sorted(p.stem for p in folder.glob("*.py"))
    if path.stem not in known:
        fail(f"no recipe {name}: no such file, and configs/ holds {', '.join(known)}")
    return folder / f"{path.stem}.py"


def read_recipe(
    cls: type, folder: Path, path: Path, above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """The assignments of a recipe file over those of its base, checked against `cls`.

    `base = "gsm8k_jepa"` starts from that recipe; `above` are those that named this one as theirs.
    """
    if path in above:
        fail(f"recipe {path} is its own base; remove its line base = ...")
    try:
        names = runpy.run_path(str(path))
    except Exception as error:  # a recipe is the user's code: whatever it raises is theirs
        fail(f"recipe {path} does not run: {type(error).__name__}: {error}".splitlines()[0])
    values = {k: v for k, v in names.items() if not k.startswith("_")}
    base = values.pop("base", None)
    inherited = {}
    if base:
        inherited = read_recipe(cls, folder, find_recipe(folder, str(base)), (*above, path))
    return {**inherited, **{k: convert(cls, k, v, f"in {path}") for k, v in values.items()}}


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
