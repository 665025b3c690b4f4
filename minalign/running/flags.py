"""Command-line flags from a dataclass."""

import argparse
import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path

from .errors import one_line, require
from .files import read_json

SEEDS = "[0, 9223372036854775808)"  # what Python's and torch's generators both take
TEMPERATURES = "[1e-06, 1e+06]"  # logits divided by it stay float32 numbers
NOT_TAKEN = ("out", "resume")  # by --config: each run has a folder of its own
# What no flag goes beyond that says nothing else: loops end, and float32 holds it.
LARGEST = {int: "[-2147483647, 2147483647]", float: "[-1e+30, 1e+30]"}


def flag(
    default: object,
    help: str,
    allowed: str | tuple[str, ...] | None = None,
    positional: bool = False,
) -> typing.Any:
    """A dataclass field that is a command-line flag: `steps: int = flag(64, "steps", "[1, inf)")`.

    Args:
        help: what --help says of it. The default is added.
        allowed: a tuple of words, or an interval that the value must lie in. A bracket includes its
            end, a parenthesis leaves it out. An end of "inf)" is that of LARGEST.
        positional: for a list: it is given without a flag's name before it, and must be given.
    """
    metadata = {"help": help, "allowed": allowed, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


def fill_in(config: typing.Any, **defaults: typing.Any) -> None:
    """Give each of these fields its default where the flag was not given, and is None."""
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def dashed(name: str) -> str:
    """A field's name as a flag.

    >>> dashed("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def lies_within(value: float, interval: str) -> bool:
    """Whether a number lies in an interval.

    >>> lies_within(0, "(0, 1]"), lies_within(1, "(0, 1]"), lies_within(float("nan"), "[0, inf)")
    (False, True, False)
    """
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


def parse_flags(
    config_class: type, description: str, argv: list[str] | None = None, prog: str | None = None
) -> typing.Any:
    """A config dataclass from the command line: strict, with dashes for underscores.

    A field of type bool is a switch. A list takes several values, and may be given several times.
    A field of type `X | None` is None where the flag is not given, so that the script can tell
    whether it was. An unknown flag or a bad value ends the program with exit status 2 and one line.

    Args:
        config_class: a dataclass whose fields are made by `flag`. The docstring of each class that
            it inherits from is the title of a group of --help.
        description: what --help says of the program.
        argv: the command line; None is sys.argv[1:].
        prog: the program's name in --help; None is the script's.
    Returns:
        An instance of `config_class`. Its attribute `given` has the flags that were given, by name,
        without those of NOT_TAKEN.
    Raises:
        UserError: the file of --config is not one of this program's.
    """
    from .. import __version__

    class Parser(argparse.ArgumentParser):
        place = ""

        def error(self, message: str) -> typing.NoReturn:
            self.exit(2, f"error: {one_line(self.place + message)} (see --help)\n")

    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    options["argument_default"] = argparse.SUPPRESS  # what is parsed was given
    parser = Parser(prog=prog, description=description, **options)
    parser.add_argument("--version", action="version", version=f"minalign {__version__}")
    parser.add_argument(
        "--config", metavar="FILE", help="config.json of a run: its flags, where none is given here"
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's own knows no -1e-05
    kinds = typing.get_type_hints(config_class)
    all_fields = {field.name: field for field in dataclasses.fields(config_class)}
    # A group of --help for each class, the script's own flags first.
    fields = dict(all_fields)
    for owner in config_class.__mro__[:-1]:
        group = parser.add_argument_group(owner.__doc__.strip().rstrip("."))
        for name in owner.__annotations__:
            if name in fields:
                _add_flag(group, fields.pop(name), kinds)

    def read(words: list[str] | None) -> dict[str, typing.Any]:
        given = vars(parser.parse_args(words))
        for name in given.keys() & all_fields.keys():
            value, allowed = given[name], all_fields[name].metadata["allowed"]
            if typing.get_origin(_kind(kinds[name])) is tuple:
                given[name] = tuple(value)  # argparse gives a list
            for one in value if isinstance(value, list) else [value]:
                if expected := _expected(one, allowed):
                    parser.error(f"{dashed(name)} {one}: expected {expected}")
        return given

    given = read(argv)
    if "config" in given:
        parser.place = f"{given['config']}: "
        given = read(words_of(given_in(given.pop("config"), config_class))) | given
    config = config_class(**given)
    config.given = {name: given[name] for name in given if name not in NOT_TAKEN}
    return config


def script_of(config_class: type) -> str:
    """The name of the script or tool whose flags these are, such as train_policy."""
    return Path(inspect.getfile(config_class)).stem


def as_given(config: typing.Any) -> dict[str, typing.Any]:
    """What config.json keeps for --config: the script, and the flags that it was given.

    The flags are None where the config was made without `parse_flags`.
    """
    return {"script": script_of(type(config)), "given": getattr(config, "given", None)}


def given_in(path: str, config_class: type) -> dict[str, typing.Any]:
    """The flags that were given in the run whose config.json this is, without those of NOT_TAKEN.

    Raises:
        UserError: it cannot be read, is of an earlier version or another script, or names a flag
            that is none, or no value.
    """
    ran, script = read_json(Path(path)), script_of(config_class)
    given = ran.get("given")
    require(
        isinstance(given, dict),
        f"--config {path}: does not say which flags were given (a model's, or of an earlier "
        "version): give them here",
    )
    require(
        ran.get("script") == script,
        f"--config {path}: of {ran.get('script')}, expected one of {script}: give it to that one",
    )
    known = {field.name for field in dataclasses.fields(config_class)}
    for name, value in given.items():
        parts = value if isinstance(value, list) else [value]
        whole = value is True or all(type(part) in (str, int, float) for part in parts)
        what = "no value of a flag" if name in known else f"no flag of {script}"
        wrong = f"--config {path}: {dashed(name)} {value}: {what}: remove it from that file"
        require(name in known and whole, wrong)
    return {name: value for name, value in given.items() if name not in NOT_TAKEN}


def words_of(given: dict[str, typing.Any]) -> list[str]:
    """Flags as the words of a command line.

    >>> words_of({"steps": 3, "rm": ["a", "b"], "shard": True, "split": "-x"})
    ['--steps', '3', '--rm', 'a', 'b', '--shard', '--split=-x']
    """
    words = []
    for name, value in given.items():
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if value is True:
            words.append(dashed(name))
        elif any(isinstance(one, str) and one.startswith("-") for one in values):
            words += [f"{dashed(name)}={one}" for one in values]
        else:
            words += [dashed(name), *map(str, values)]
    return words


def _expected(value: object, allowed: str | tuple[str, ...] | None) -> str:
    """What a flag's value should have been, in words; "" for a good one."""
    if isinstance(value, str):  # "ignore" leaves out bytes of the shell that are no UTF-8
        same = value == value.encode(errors="ignore").decode().replace("\0", "")
        return "" if same else "UTF-8 without zero bytes"
    if type(value) not in LARGEST:
        return ""
    open_ended = not allowed or "inf)" in allowed
    intervals = [allowed or LARGEST[type(value)]] + [LARGEST[type(value)]] * open_ended
    return next((f"a number in {one}" for one in intervals if not lies_within(value, one)), "")


def _kind(hint: typing.Any) -> typing.Any:
    """X of `X | None`; the type itself otherwise."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _add_flag(
    group: argparse._ArgumentGroup, field: dataclasses.Field, kinds: dict[str, typing.Any]
) -> None:
    """Add the flag of one field to a group of --help."""
    kind, allowed = _kind(kinds[field.name]), field.metadata["allowed"]
    choices = allowed if isinstance(allowed, tuple) else None
    values = typing.get_args(kind)  # of a tuple, or a list
    shown = not (field.default is None or field.default is False or field.default == "")
    help = field.metadata["help"] + (f" (default: {field.default})" if shown else "")
    options = {"help": help.replace("%", "%%")}
    if kind is bool:
        options |= {"action": "store_true"}
    elif values:
        many = typing.get_origin(kind) is list
        options |= {
            "type": values[0],
            "nargs": "+" if many else len(values),
            "action": "extend" if many else "store",
            "metavar": values[0].__name__.upper(),
        }
    else:
        metavar = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
        options |= {"type": kind, "choices": choices, "metavar": metavar}
    positional = field.metadata["positional"]
    options |= {"metavar": field.name.upper()} if positional else {}
    group.add_argument(field.name if positional else dashed(field.name), **options)
