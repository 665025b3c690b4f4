"""What a run ran with, taken over by the tools that look at it: no flag has to be typed again."""

import os.path
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from ..running.errors import one_line, require
from ..running.files import read_json
from ..running.flags import dashed, parse_flags

# Flag -> the setting of a run that it takes.
SAMPLING = {name: name for name in ("format", "max_new_tokens", "temperature", "stop")}
# Groups whose others go with the first: those of another data set would be nonsense.
DATA = "dataset subset split eval_split eval_share split_seed columns prompt_tokens"
DATA = (*DATA.split(), "max_prompt_tokens")
REWARD = ("rm", "rm_weights", "rm_combine", "rm_average", "standardize_rewards")

INSIDE_A_RUN = re.compile(r"model|best|merged|front|(iteration|run)-\d+|eta-.*")


def settings_of(paths: Sequence[str]) -> dict[str, dict]:
    """Path -> the flags of the policy run that it is, or lies in; paths of no run are left out."""
    found = {}
    for path in filter(os.path.exists, paths):
        folder = Path(os.path.abspath(path))
        settings = _config_of(folder)
        while not settings and INSIDE_A_RUN.fullmatch(folder.name):
            folder = folder.parent
            settings = _config_of(folder)
        found |= {path: settings} if settings else {}
    return found


def _config_of(folder: Path) -> dict:
    """What config.json says, if it is that of a policy run and not that of a model."""
    path = folder / "config.json"
    settings = read_json(path) if path.is_file() else {}
    return settings if "max_new_tokens" in settings and "model_type" not in settings else {}


def agreed(runs: dict[str, dict], name: str, flag_name: str) -> typing.Any:
    """The value that a setting had in all these runs; None where it was empty.

    Raises:
        UserError: two had different ones: `flag_name` has to be given.
    """
    values = {path: settings.get(name) for path, settings in runs.items()}
    empty = all(value is False or value in (None, "", []) for value in values.values())
    (path, value), *others = values.items()
    for other, its_value in others:
        require(
            empty or its_value == value,
            f"{path} ran with {dashed(name)} {value}, {other} with {its_value}: give "
            f"{dashed(flag_name)}",
        )
    return None if empty else value


def parse_flags_of_runs(
    config_class: type,
    description: str,
    argv: list[str] | None,
    prog: str,
    models: Callable[[typing.Any], Sequence[str]],
    take: dict[str, str],
) -> typing.Any:
    """As flags.parse_flags, with the settings of the models' runs for flags not given (printed).

    Args:
        models: the config's models; those of no run are left out.
        take: flag -> the setting of a run that it takes.
    Raises:
        UserError: two runs had different ones.
    """
    config = parse_flags(config_class, description, argv, prog)
    argv = sys.argv[1:] if argv is None else argv
    runs, taken = settings_of(models(config)), []
    given = {word.partition("=")[0] for word in argv}
    for name, key in take.items() if runs else ():
        head = next((group[0] for group in (DATA, REWARD) if key in group[1:]), "")
        heads = [run.get(head) for run in runs.values()] if dashed(head) in given else []
        of_others = any(head_value != getattr(config, head) for head_value in heads)
        if of_others or not hasattr(config, name) or dashed(name) in given:
            continue
        value = agreed(runs, key, name)
        if isinstance(value, list) and name == "stop":  # they may begin with a dash
            taken += [f"{dashed(name)}={one}" for one in value]
        elif isinstance(value, list):
            taken += [dashed(name), *map(str, value)]
        elif value is not None:
            taken += [dashed(name) if value is True else f"{dashed(name)}={value}"]
    if not taken:
        return config
    print(one_line(f"as {', '.join(runs)} ran: {' '.join(taken)}"))
    return parse_flags(config_class, description, [*taken, *argv], prog)


def held_out_rows(
    models: Sequence[str], flag_name: str, asked: dict[str, str] | None = None
) -> tuple[list[dict], str, str]:
    """The rows (by our names) that these models' runs held out, their source, the prompts' column.

    Args:
        asked: further columns, see models.functions.columns_asked.
    Raises:
        UserError: there is no such run, or two had other data: `flag_name` has to be given.
    """
    from ..data.columns import columns_for, parse_columns, prompt_column, read_prompt
    from ..data.messages import Note, Prompt, first_turn
    from ..data.prompts import different
    from ..data.splits import Split, both_splits, divide

    runs = settings_of(models)
    had = {name: agreed(runs, name, flag_name) for name in DATA if runs}
    missing = f"{dashed(flag_name)} is missing: the prompts to answer"
    require(bool(had.get("dataset")), missing)
    require(not had["prompt_tokens"], f"{missing}: those of the run were beginnings of texts")
    names = ("dataset", "split", "eval_split", "eval_share", "split_seed", "subset")
    values = ("" if had[name] is None else had[name] for name in names)
    names = parse_columns(had["columns"], ["**"])  # also what the run's own rewards named
    data, asked = Split(*values, names, asked or {}), asked or {}
    rows, known, columns = both_splits(data)
    column = prompt_column(known, data.names, columns, data.dataset)

    def read(row: dict, where: str, note: Note) -> tuple[Prompt, dict]:
        return read_prompt(row, where, note, column, False), row

    items = divide(data, rows, read, lambda item: first_turn(item[0]))[1]
    count = agreed(runs, "eval_prompts", flag_name)
    items = {different(prompt, columns_for(row, asked, column)): row for prompt, row in items}
    held_out = list(items.values())[:count]
    print(f"prompts: {len(held_out)} that {', '.join(runs)} held out of {data.dataset}")
    return held_out, data.dataset, column
