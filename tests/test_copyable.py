"""The third way to use minalign: a function of a pure file, pasted into another project, runs.

Above it stand `import torch` and `import math`, nothing else. The functions are found in their
files, so one that is added later is tested, too.
"""

import ast
import builtins
import doctest
import importlib
import math
import symtable
from pathlib import Path

import pytest
import torch

PURE = ("losses", "logprobs", "reinforce", "merge")
MODULES = [importlib.import_module(f"minalign.{name}") for name in PURE]
TREES = [ast.parse(Path(module.__file__).read_text()) for module in MODULES]
COPIES = [
    pytest.param(module, node.name, ast.unparse(node), id=node.name)
    for module, tree in zip(MODULES, TREES)
    for node in tree.body
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
]
NAMES = {param.id: param.values for param in COPIES}  # every function and class of the pure files


def global_names(source):
    """What a source looks up outside itself: also in a decorator, a default or an annotation."""

    def of(table):
        for symbol in table.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                yield symbol.get_name()
        for inner in table.get_children():
            yield from of(inner)

    return set(of(symtable.symtable(source, "<copy>", "exec")))


def neighbours(module, source):
    """The functions of the same file that a source names, and those that these name."""
    found = {}
    for name in global_names(source):
        if name in NAMES and NAMES[name][0] is module:
            found |= {name: NAMES[name][2]}
    return found


@pytest.mark.parametrize("tree", TREES, ids=[module.__name__ for module in MODULES])
def test_pure_files_import_nothing_but_torch_and_math(tree):
    """Nor inside a function, nor `import torch.nn.functional as F`: a copy would lack the name."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert {ast.unparse(n) for n in nodes} <= {"import torch", "import math"}


@pytest.mark.parametrize("module, name, source", COPIES)
def test_a_copy_needs_no_other_name_than_functions_of_its_file(module, name, source):
    known = {"torch", "math", name, *dir(builtins), *neighbours(module, source)}
    assert global_names(source) <= known


def test_only_slerps_merge_policies_and_two_baselines_name_a_neighbour():
    """All other functions are copied alone."""
    needing = {name for name, values in NAMES.items() if set(neighbours(*values[::2])) - {name}}
    baselines = {"PromptBaseline", "ShrinkageBaseline"}
    assert needing == {"slerp", "slerp_many", "merge_policies"} | baselines
    assert set(neighbours(*NAMES["slerp"][::2])) == {"slerp_coefficients"}


@pytest.mark.parametrize("module, name, source", COPIES)
def test_a_copy_passes_its_own_doctest_with_torch_and_math_alone(module, name, source):
    namespace = {"torch": torch, "math": math}
    for part in (*neighbours(module, source).values(), source):
        exec(part, namespace)
    copy = namespace[name]
    shown = {**vars(module), "math": math, name: copy}  # an example may compare with a neighbour
    tests = doctest.DocTestFinder().find(copy, name, module=False, globs=shown)
    runner, report = doctest.DocTestRunner(), []
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    assert runner.tries == source.count(">>> ")  # none was overlooked
