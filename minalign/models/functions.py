"""A user's Python function as a reward: found by its name, and its result as numbers."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import itertools
import numbers
import operator
import os
import re
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path

from ..running.errors import UserError, require

TEXTS = (str, bytes, bytearray)
LIBRARIES = ("<frozen ", __file__, *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))


def is_function(name: str) -> bool:
    """Whether --rm names a Python function: no hub id has a colon.

    >>> is_function("rules:short"), is_function("./rules.py:short"), is_function("runs/rm-1")
    (True, True, False)
    """
    return bool(re.fullmatch(r".*(:[^/]*|\.py)", name, re.DOTALL)) and not os.path.isdir(name)


def load_function(name: str) -> Callable:
    """The function of "module:function" or "file.py:function", looked for in this folder, too.

    It may be any object that can be called with two lists, see `with_texts`. Of a class an object
    is made, once.

    Raises:
        UserError: it cannot be imported, or is no such thing.
    """
    module, _, attribute = name.rpartition(":")
    folder = str(Path(module).parent.resolve())
    sys.path.insert(0, folder)
    try:
        function = operator.attrgetter(attribute)(import_module(module))
        if inspect.isclass(function):
            function = made(function)
    except (Exception, SystemExit) as error:
        expected = "expected module:function or file.py:function"
        raise UserError(f"--rm {name}: cannot be imported ({told(error)}): {expected}") from error
    finally:  # it may import its neighbours later, but hides nobody else's modules
        sys.path.remove(folder)
        sys.path.append(folder)
    what = f"--rm {name}: expected a function of two arguments, prompts and completions, got"
    require(callable(function), f"{what} a {type(function).__name__}")
    kinds = function, type(function).__call__
    is_async = any(map(inspect.iscoroutinefunction, kinds)) or inspect.isasyncgenfunction(function)
    require(not is_async, f"{what} one that is async")
    try:
        with_texts(function, [], [])
    except TypeError as error:
        raise UserError(f"{what} one with {inspect.signature(function)} ({error})") from error
    return function


def with_texts(
    function: Callable, prompts: list, completions: list[str]
) -> inspect.BoundArguments | None:
    """A function's arguments with both lists in place; all others are columns of the data.

    The lists are its first two, whatever their names. Where a parameter called prompts or
    completions is not the first or the second, as in trl's f(completions, answer), names decide.

    Returns:
        None for a function written in C, without a signature.
    Raises:
        TypeError: it does not take both.
    """
    torch = sys.modules.get("torch")
    if torch and isinstance(function, torch.nn.Module):  # whose own __call__ takes anything
        function = function.forward
    try:
        signature = inspect.signature(function)
    except ValueError:
        return None
    texts, known = {"prompts": prompts, "completions": completions}, signature.parameters
    if all(
        name not in known
        or name == place
        and known[name].kind is not inspect.Parameter.KEYWORD_ONLY
        for name, place in itertools.zip_longest(texts, list(known)[:2])
    ):
        return signature.bind_partial(prompts, completions)
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    return signature.bind_partial(**{n: texts[n] for n in texts if n in known or takes_any})


def asked_of(function: Callable) -> dict[str, bool]:
    """The columns that a function's parameters name: name -> whether it must be there.

    "**" stands for all that there are.

    >>> asked_of(lambda prompts, completions, answer, scale=1.0, **others: ...)
    {'answer': True, 'scale': False, '**': False}
    """
    bound, asked = with_texts(function, [], []), {}
    taken = {*bound.arguments} if bound else set()
    if isinstance(function, functools.partial):
        taken |= function.keywords.keys()  # given already
    for name, parameter in bound.signature.parameters.items() if bound else ():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            asked["**"] = False
        elif name not in taken and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            asked[name] = parameter.default is inspect.Parameter.empty
    return asked


def columns_asked(names: Sequence[str]) -> dict[str, str]:
    """The columns that the functions among these rewards ask for, see `asked_of`.

    Returns:
        Column -> the function that cannot do without it, or "".
    """
    asked = {}
    for name in filter(is_function, names):
        for column, needed in asked_of(load_function(name)).items():
            asked[column] = asked.get(column) or name * needed
    return asked


def check_functions(names: Sequence[str] | None, dataset: str) -> None:
    """Load the functions among the names after --rm, so that a slip is told before a run begins.

    The toy world, whose `dataset` is "", has no columns.
    """
    for column, name in columns_asked(names or ()).items():
        require(bool(dataset) or not name, f"--rm {name}: names column {column!r}: needs --dataset")


made = functools.cache(lambda kind: kind())  # a class, once: it may load a model


def import_module(name: str) -> types.ModuleType:
    """A module by its name, or by its file; a file beside the caller is read as it is now."""
    path = file_of(name)
    if path is None:
        return importlib.import_module(name)
    digest = hashlib.sha256(bytes(path) + path.read_bytes()).hexdigest()
    key = f"{path.stem}_{digest[:8]}".replace(".", "_")  # hides no other module
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        sys.modules[key] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def file_of(name: str) -> Path | None:
    """The file that a module is read from, if that is named or lies in this folder."""
    path = Path(name if name.endswith(".py") else f"{name}.py").resolve()
    return path if name.endswith(".py") or os.path.isfile(path) else None


def told(error: BaseException) -> str:
    """An error's type, text, and the last line of the user's own code that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    place = f", {own[-1].filename}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {error}{place}"


def call(
    name: str,
    function: Callable,
    prompts: list,
    completions: list[str],
    columns: Mapping[str, list] = types.MappingProxyType({}),
) -> list[float | None]:
    """What a reward function returns, as one number for each completion.

    A number is what float() takes: of NumPy, torch, decimal, too. A text is none. None says that
    the reward does not apply.

    Args:
        name: of the function, for errors.
        columns: name -> N values. The function gets those that it asks for, see `asked_of`.
    Raises:
        UserError: a column that it needs is missing, it fails, or it returns something else.
    """
    count, bound = len(completions), with_texts(function, prompts, completions)
    asked = asked_of(function)
    for column, needed in asked.items():
        there = column in columns
        require(there or not needed, f"--rm {name}: names column {column!r}: the prompts have none")
        if there:
            bound.arguments[column] = columns[column]
    if "**" in asked:
        own = {*bound.signature.parameters}
        own |= function.keywords.keys() if isinstance(function, functools.partial) else set()
        others = {column: columns[column] for column in columns if column not in own}
        rest = list(bound.signature.parameters)[-1]
        bound.arguments[rest] = bound.arguments.get(rest, {}) | others
    try:
        given = function(*bound.args, **bound.kwargs) if bound else function(prompts, completions)
        given = list(given) if isinstance(given, Iterator) else given
    except (Exception, SystemExit) as error:
        raise UserError(f"--rm {name}: {told(error)}") from error
    what = f"--rm {name}: got {given!r:.60} for {count} completions, expected one number for each"
    values = []
    try:
        if inspect.iscoroutine(given):
            given.close()
        require(not inspect.isawaitable(given), "it is async")
        require(not isinstance(given, (*TEXTS, Mapping, Set)), "it is no list")
        for value in given:
            real = isinstance(value, numbers.Real) or not isinstance(value, numbers.Complex)
            require(real and not isinstance(value, TEXTS), f"{value!r:.60} is no number")
            values.append(None if value is None else float(value))
    except Exception as error:
        raise UserError(f"{what} (at completion {len(values) + 1}: {error})") from error
    require(len(values) == count, f"{what} ({len(values)} of them)")
    return values
