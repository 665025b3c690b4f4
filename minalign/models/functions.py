"""A user's Python function as a reward: found by its name, and its result as numbers."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
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

    It may be any object that can be called with two arguments. Of a class an object is made, once.

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
    require(not inspect.iscoroutinefunction(function), f"{what} one that is async")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise UserError(f"{what} one with {inspect.signature(function)} ({error})") from error
    except ValueError:
        pass  # written in C, without a signature
    return function


def check_functions(names: Sequence[str] | None) -> None:
    """Load the functions among the names after --rm, so that a slip is told before a run begins."""
    for name in filter(is_function, names or ()):
        load_function(name)


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


def call(name: str, function: Callable, *arguments: object) -> list[float]:
    """What a reward function returns, as one number for each completion.

    A number is what float() takes: of NumPy, torch, decimal, too. A text is none.

    Args:
        name: of the function, for errors.
        arguments: of the function. The last is the list of completions.
    Raises:
        UserError: the function fails, or returns something else.
    """
    count = len(arguments[-1])
    try:
        given = function(*arguments)
        given = list(given) if isinstance(given, Iterator) else given
    except (Exception, SystemExit) as error:
        raise UserError(f"--rm {name}: {told(error)}") from error
    what = f"--rm {name}: got {given!r:.60} for {count} completions, expected one number for each"
    values = []
    try:
        require(not isinstance(given, (*TEXTS, Mapping, Set)), "it is no list")
        for value in given:
            real = isinstance(value, numbers.Real) or not isinstance(value, numbers.Complex)
            require(real and not isinstance(value, TEXTS), f"{value!r:.60} is no number")
            values.append(float(value))
    except Exception as error:
        raise UserError(f"{what} (at completion {len(values) + 1}: {error})") from error
    require(len(values) == count, f"{what} ({len(values)} of them)")
    return values
