"""The third way to use minalign: a function of a pure file, pasted under `import torch` and `import math`, runs.

The functions are found by themselves, so one that is added later is tested, too.
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

MODULES = [importlib.import_module(f"minalign.{name}") for name in ("losses", "logprobs", "reinforce", "merge", "merge_states")]
TREES = [ast.parse(Path(module.__file__).read_text()) for module in MODULES]
COPIES = [
    pytest.param(module, node.name, ast.unparse(node), id=node.name)
    for module, tree in zip(MODULES, TREES)
    for node in tree.body
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
]


@pytest.mark.parametrize("tree", TREES, ids=[module.__name__ for module in MODULES])
def test_pure_files_import_nothing_but_torch_and_math(tree):
    """Nothing inside a function either, and no `import torch.nn.functional as F` that a copy would miss.

    What runs only as `python -m` (the block under __name__) does not count: nobody copies it.
    """
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    imports = [ast.unparse(n) for node in body for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
    imports = set(imports) - {
        "from .merge_states import liti, merge_policies, task_vector"
    }  # merge.py shows them, and uses none
    assert imports <= {"import torch", "import math"}


@pytest.mark.parametrize("module, name, source", COPIES)
def test_a_copy_needs_no_other_name_of_its_file(module, name, source):
    """Not in its body, and not in a decorator, a default or an annotation."""

    def global_names(table):
        yield from (symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced())
        for inner in table.get_children():
            yield from global_names(inner)

    needed = set(global_names(symtable.symtable(source, "<copy>", "exec")))
    assert needed <= {"torch", "math", name, *dir(builtins)}


@pytest.mark.parametrize("module, name, source", COPIES)
def test_a_copy_passes_its_own_doctest_with_torch_and_math_alone(module, name, source):
    namespace = {"torch": torch, "math": math}
    exec(source, namespace)
    copy, neighbours = namespace[name], vars(module)  # an example may compare with a neighbour, the copy may not
    tests = doctest.DocTestFinder().find(copy, name, module=False, globs={**neighbours, "math": math, name: copy})
    runner, report = doctest.DocTestRunner(), []
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    assert runner.tries == source.count(">>> ")  # none was overlooked
