"""The house stands as docs/developing.md draws it: rooms, directions of imports, no circles."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOOK = {"losses", "logprobs", "reinforce", "merge", "rollout", "reward", "task"}
ROOMS = {"models", "data", "running", "measuring", "tools"}
SCRIPTS = {"train_rm", "train_policy", "warp"}
MODULES = {  # name -> file
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "minalign").rglob("*.py"))
}
MAY_IMPORT = {  # room -> rooms that it uses, beside its own; running.errors is everybody's
    "book": {"book", "models", "data"},
    "models": {"book", "data"},
    "data": {"book", "models"},
    "running": {"models"},
    "measuring": {"book", "models", "data"},
    "tools": {"book", "models", "data", "running", "measuring"},
}


def imports(name):
    """The modules of minalign and the scripts that a module imports, also inside functions.

    What is imported for annotations alone (TYPE_CHECKING) does not count.
    """
    nodes = list(ast.walk(ast.parse(MODULES[name].read_text())))
    guards = [n for n in nodes if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    typing_only = {inner for guard in guards for inner in ast.walk(guard)}
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import) and node not in typing_only:
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node not in typing_only:
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            inner = [f"{source}.{alias.name}" for alias in node.names]
            found |= {module if module in MODULES else source for module in inner}
    return {module for module in found if module.split(".")[0] in ("minalign", *SCRIPTS)}


def room(module):
    name = module.split(".")[1]
    return name if name in ROOMS else "book"


def test_the_top_is_the_book_and_five_rooms():
    top = {path.stem for path in (ROOT / "minalign").glob("*.py")}
    assert top == BOOK | {"__init__", "__main__"}
    folders = {path.parent.name for path in (ROOT / "minalign").glob("*/__init__.py")}
    assert folders == ROOMS
    assert (ROOT / "minalign/py.typed").exists()


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"minalign", "minalign.__main__"}))
def test_imports_keep_their_direction(name):
    for other in imports(name) - {"minalign", name, "minalign.running.errors"}:
        assert other.split(".")[0] not in SCRIPTS, f"{name} imports the script {other}"
        here, there = room(name), room(other)
        assert there == here or there in MAY_IMPORT[here], f"{name} imports {other}"


def test_there_are_no_circles():
    TopologicalSorter({name: imports(name) for name in MODULES}).prepare()  # or CycleError


def loaded(code):
    """The modules that a fresh interpreter has loaded after `code`."""
    program = f"import sys; {code}; print(*sys.modules, sep='\\n')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return set(done.stdout.splitlines())


def test_rollout_pulls_in_no_data_code():
    modules = loaded("import minalign.rollout")
    assert "datasets" not in modules
    assert not [name for name in modules if name.startswith("minalign.data")]


def test_flags_are_parsed_before_torch_is_imported():
    assert "torch" not in loaded("import train_rm, train_policy, warp")


def public_functions(name, owner):
    """What a module, or a class of it, defines: names and functions, methods among them."""
    for attribute, value in vars(owner).items():
        value = getattr(value, "__func__", value)  # of a class method
        if attribute.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if inspect.isfunction(value):
            yield f"{owner.__name__}.{attribute}", inspect.unwrap(value)
        elif inspect.isclass(value):
            yield from public_functions(name, value)


@pytest.mark.parametrize("name", [*MODULES, *sorted(SCRIPTS)])
def test_public_functions_have_annotations_and_a_docstring(name):
    """Every argument and every result."""
    if name == "minalign.tools.figures":
        pytest.importorskip("matplotlib")
    for where, function in public_functions(name, importlib.import_module(name)):
        signature = inspect.signature(function)
        for parameter in signature.parameters.values():
            annotated = parameter.annotation is not inspect.Parameter.empty
            assert annotated or parameter.name in ("self", "cls"), f"{where}: {parameter.name}"
        assert signature.return_annotation is not inspect.Signature.empty, f"{where}: its result"
        assert function.__doc__, f"{where} has no docstring"


@pytest.mark.parametrize("files", ["*.py", "docs/*.py", "minalign/**/*.py", "tests/**/*.py"])
def test_lines_have_at_most_100_characters_and_the_formatter_is_never_off(files):
    for path in ROOT.glob(files):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path}:{number}"
            assert not re.search(r"fmt: (skip|off)", line), f"{path}:{number}"
