"""Claims about the project as a whole, read from its source: one door to the inside of the GPT, one
to the disk, imports in one direction, and sizes that a reader can take in.

Source is what lies at the top and in the folders of FOLDERS; tests are free of these rules."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("plumbing", "lab", "generators", "configs", "objectives")
TOP = sorted(path.name for path in ROOT.glob("*.py"))
FILES = TOP + sorted(f"{folder}/{path.name}" for folder in FOLDERS
                     for path in (ROOT / folder).glob("*.py"))  # fmt: skip


@cache
def text_of(file: str) -> str:
    return (ROOT / file).read_text()


@cache
def nodes_of(file: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(text_of(file))))


def lines_of(*files: str) -> int:
    return sum(len(text_of(file).splitlines()) for file in files)


def test_every_python_file_is_looked_at():
    """A new folder with code has to be named in FOLDERS."""
    beside = {"tests", "out", "data", "venv"}  # venv: as .venv, others' code
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in beside]
    code = [path for folder in folders if not folder.name.startswith(".")
            for path in folder.rglob("*.py")]  # fmt: skip
    assert {path.relative_to(ROOT).as_posix() for path in code} <= set(FILES)
    assert {"model.py", "plumbing/kernels.py", "lab/sweep.py"} <= set(FILES)


# --- one door to the inside of the GPT --------------------------------------------------------

INSIDE = re.compile(r"\b(wte|wpe|lm_head|ln_f)\b|\.h\b|\b(model|trunk|gpt|ema)\.drop\b")
INSIDERS = {
    "model.py",  # is it
    "plumbing/kernels.py",  # packs its linear layers
    "plumbing/cache.py",  # holds its keys and values
    "hf.py",  # other people's models, whose parts have the same names
    "lab/peers.py",  # other people's models: nanoGPT's step is written with its layers
}


@pytest.mark.parametrize("file", [file for file in FILES if file not in INSIDERS])
def test_nobody_else_knows_the_inside_of_the_gpt(file):
    """Then another network is a Trunk, and the rest of the project need not know."""
    found = [line for line in text_of(file).splitlines() if INSIDE.search(line)]
    assert not found


def test_the_inside_is_recognized():
    for line in ("model.wte.weight", "x = h.wpe(i)", "lm_head(x)", "*model.h[:-1]", "for b in m.h:",
                 "len(model.h)", "map(model.ln_f, x)", "(model.drop, )", "getattr(m, 'lm_head')"):
        assert INSIDE.search(line), line  # fmt: skip
    for line in ("trunk.logits(x)", "model.hidden", "frame.drop(1)", "trunk.layers", "math.hypot"):
        assert not INSIDE.search(line), line


def calls_of(file: str, name: str) -> list[ast.Call]:
    """Calls of `name` or of `anything.name`."""
    return [node for node in nodes_of(file) if isinstance(node, ast.Call) and called(node) == name]


def called(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def test_a_gpt_is_made_in_one_place():
    assert [file for file in FILES if calls_of(file, "GPT")] == ["run.py"]
    [make_model] = [node for node in nodes_of("run.py")
                    if isinstance(node, ast.FunctionDef) and node.name == "make_model"]  # fmt: skip
    [call] = calls_of("run.py", "GPT")
    assert call in ast.walk(make_model)


# --- one door to the disk ---------------------------------------------------------------------

# Calls that open a file in the mode that one of their arguments names.
OPENERS = {"open", "fdopen", "ZipFile", "TarFile", "memmap", "open_memmap", "NamedTemporaryFile"}
# Methods that write a file, whoever has them. Path.replace is not among them: str has one too.
WRITERS = {"write_text", "write_bytes", "savefig", "tofile", "to_csv", "touch", "rename", "savetxt",
           "savez", "savez_compressed", "symlink_to", "hardlink_to", "urlretrieve"}  # fmt: skip
# Functions of these modules alone. Allowed, since they leave no half of a file: mkdir, and
# temporary folders with the rmtree of what is in them, whose content is nobody's result.
OF_MODULES = {
    "torch": {"save"}, "np": {"save"}, "numpy": {"save"}, "json": {"dump"}, "pickle": {"dump"},
    "shutil": {"copy", "copy2", "copyfile", "copyfileobj", "copytree", "move"},
    "os": {"replace", "rename", "renames", "link", "symlink", "truncate", "open"},
}  # fmt: skip


def writes(call: ast.Call) -> bool:
    """Does the call open, write, copy or move a file?"""
    name, owner = called(call), getattr(getattr(call.func, "value", None), "id", None)
    if owner == "files":  # plumbing.files under its own name
        return False
    is_method = isinstance(call.func, ast.Attribute)
    if (is_method and name in WRITERS) or name in OF_MODULES.get(owner, ()):
        return True
    if name not in OPENERS:
        return False
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    words = [node.value for argument in arguments for node in ast.walk(argument)
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]  # fmt: skip
    mode_unknown = name == "open" and not is_method and len(call.args) > 1 and not words
    return mode_unknown or any(re.fullmatch(r"[rbt+]*[wax+][rbt+]*", word) for word in words)


@pytest.mark.parametrize("file", [file for file in FILES if file != "plumbing/files.py"])
def test_nobody_else_writes_a_file(file):
    """plumbing/files.py writes a file whole or not at all; what goes past it may leave a half."""
    found = [ast.unparse(node) for node in nodes_of(file) if isinstance(node, ast.Call)
             and writes(node)]  # fmt: skip
    assert not found


@pytest.mark.parametrize("source", [
    "open(p, 'w')", "open(p, mode='ab')", "p.open('x')", "open(p, 'a' if more else 'w')",
    "open(p, mode)", "open(p, 'r+b')", "os.fdopen(n, 'wb')", "gzip.open(p, 'wt')",
    "ZipFile(p, 'w')", "p.write_text('')", "(folder / 'a').write_bytes(b'')",
    "draw(x).savefig(p, dpi=120)",
    "x.tofile(p)", "torch.save(x, p)", "np.save(p, x)", "json.dump(x, file)", "shutil.copy(a, b)",
    "os.replace(a, b)", "shutil.move(a, b)", "np.memmap(p, mode='w+')", "a.rename(b)",
])  # fmt: skip
def test_a_write_is_recognized(source):
    assert writes(ast.parse(source).body[0].value)


@pytest.mark.parametrize("source", [
    "open(p)", "open(p, 'rb')", "p.open()", "p.open(newline='')", "ZipFile(p)", "p.read_text()",
    "np.memmap(p, np.int32, 'r')", "write_text(p, 'a')", "files.write_text(p, 'w')",
    "folder.save('best.pt', t)", "'a b'.replace('a', 'w')", "p.mkdir()", "json.dumps(x)",
    "tempfile.TemporaryDirectory()", "shutil.rmtree(p)", "replace(config, seed=1)",
])  # fmt: skip
def test_what_does_not_write_is_left_alone(source):
    assert not writes(ast.parse(source).body[0].value)


# --- functions that fit on a screen -----------------------------------------------------------

LINES, PARAMETERS = 80, 6


def functions_of(file: str) -> list[tuple[str, int, int]]:
    """Name, lines and parameters of each function and lambda, self and cls not counted."""
    found = []
    for node in nodes_of(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            n = sum(argument.arg not in ("self", "cls") for argument in given)
            found.append((getattr(node, "name", "lambda"), node.end_lineno - node.lineno + 1, n))
    return found


@pytest.mark.parametrize("file", FILES)
def test_no_function_is_long_or_has_many_parameters(file):
    too_much = [each for each in functions_of(file) if each[1] > LINES or each[2] > PARAMETERS]
    assert not too_much, "name, lines, parameters"


def test_lines_and_parameters_are_counted():
    functions = {name: rest for name, *rest in functions_of("model.py")}
    assert functions["block_ends"] == [3, 1]
    assert functions["layers"][1] == 6


# --- imports point one way --------------------------------------------------------------------

# The ground floor from below: each file may import those before it. Scripts import no script.
FLOOR = ("config", "model", "views", "jepa", "alignment", "hf", "data", "generate", "run")
# What plumbing may use of it. Kernels do not know the model, and no part of it knows a run.
BELOW_PLUMBING = {"config", "model", "views", "jepa"}


def imports_of(file: str, nested: bool = True) -> set[str]:
    """The project's files that a file imports, as paths; nested: within functions too."""
    functions = [node for node in nodes_of(file) if isinstance(node, ast.FunctionDef)]
    late = {inner for function in functions for inner in ast.walk(function)}
    found = set()
    for node in nodes_of(file):
        if node in late and not nested:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {f"{name.replace('.', '/')}.py" for name in found} & set(FILES)


@pytest.mark.parametrize("file", TOP)
def test_the_ground_floor_imports_what_is_below(file):
    name = file.removesuffix(".py")
    below = FLOOR[: FLOOR.index(name)] if name in FLOOR else FLOOR
    imported = {other.removesuffix(".py") for other in imports_of(file) if other in TOP}
    assert imported <= set(below)


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("plumbing/")])
def test_plumbing_knows_no_run_and_no_study(file):
    imported = {other.removesuffix(".py") for other in imports_of(file)
                if not other.startswith("plumbing/")}  # fmt: skip
    assert imported <= BELOW_PLUMBING


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("objectives/")])
def test_objectives_stand_on_what_is_below_their_door(file):
    """jepa.py imports them, and so the training step; they know neither losses nor a run."""
    imported = {other.removesuffix(".py") for other in imports_of(file)
                if not other.startswith("plumbing/")}  # fmt: skip
    assert imported <= {"config", "model", "views"}


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("generators/")])
def test_generators_stand_alone(file):
    assert all(other.startswith("generators/") for other in imports_of(file))


def test_the_lab_is_entered_from_two_places():
    """evaluate.py imports the judge when one is asked for. demo.py shows what lab/ makes of a run:
    it searches, and its cards draw the mask. Everything else does without lab/."""
    outside = [file for file in FILES if not file.startswith("lab/")]
    doors = {(file, other) for file in outside for other in imports_of(file)
             if other.startswith("lab/")}  # fmt: skip
    assert doors == {("evaluate.py", "lab/judge.py"), ("demo.py", "lab/search.py"),
                     ("demo.py", "lab/cards.py")}  # fmt: skip
    assert not any(other.startswith("lab/") for other in imports_of("evaluate.py", nested=False))


def test_no_two_files_import_each_other():
    """Round no corner either. lab/judge.py may import what evaluate.py is made of."""
    visiting, done = [], set()

    def visit(file):
        assert file not in visiting, " -> ".join([*visiting, file])
        if file in done:
            return
        visiting.append(file)
        for other in sorted(imports_of(file)):
            visit(other)
        done.add(visiting.pop())

    for file in FILES:
        visit(file)


# --- how much there is to read ----------------------------------------------------------------


def test_few_files_at_the_top():
    assert len(TOP) <= 14


def test_the_idea_is_short():
    assert lines_of("config.py", "views.py", "model.py", "jepa.py", "train.py") <= 1400


def test_what_training_imports_is_short():
    """Round every corner and within functions. Apart are train.py itself, the generators, what a
    pretrained trunk or a tracker needs, and the objectives beside the paper's."""
    reached, to_visit = set(), {"train.py"}
    while to_visit:
        reached |= to_visit
        to_visit = set().union(*map(imports_of, to_visit)) - reached
    apart = ("generators/", "hf.py", "plumbing/hf_", "plumbing/track.py", "train.py",
             "objectives/")  # fmt: skip
    counted = {file for file in reached if not file.startswith(apart)}
    assert {"plumbing/files.py", "views.py", "generate.py"} <= counted
    plumbing = {file for file in counted if file.startswith("plumbing/")}
    assert lines_of(*(counted - plumbing)) <= 2225  # what a reader of LLM-JEPA reads
    assert lines_of(*plumbing) <= 2065  # what keeps files, folders and data sound
