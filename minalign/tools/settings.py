"""What a run ran with, taken over by the tools that look at it: no flag has to be typed again."""

import json
import os.path
import re
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ..running.errors import require
from ..running.flags import dashed, parse_flags
from .logged import read_object

SAMPLING = ("format", "max_new_tokens", "temperature")
# Groups whose others go with the first: those of another data set would be nonsense.
DATA = "dataset subset split eval_split eval_share split_seed prompt_column columns prompt_tokens"
DATA = (*DATA.split(), "max_prompt_tokens")
REWARD = ("rm", "rm_weights", "rm_average", "standardize_rewards")

INSIDE_A_RUN = re.compile(r"model|best|merged|front|(iteration|run)-\d+|eta-.*")


def settings_of(paths: Sequence[str]) -> dict[str, dict]:
    """Path -> the flags of the policy run that it is, or lies in; paths of no run are left out."""
    found = {}
    for path in filter(os.path.exists, paths):
        folder = Path(os.path.abspath(path))
        while INSIDE_A_RUN.fullmatch(folder.name) and not is_run(folder):
            folder = folder.parent
        if is_run(folder):
            found[path] = read_object(folder / "config.json")
    return found


def is_run(folder: Path) -> bool:
    """Whether the folder's config.json is that of a policy run, not that of a model."""
    path = folder / "config.json"
    settings = read_object(path) if path.is_file() else {}
    return "max_new_tokens" in settings and "model_type" not in settings


def agreed(runs: dict[str, dict], name: str, flag_name: str) -> typing.Any:
    """The value that a setting had in all these runs; None where it was empty.

    Args:
        flag_name: the flag to give where they differ.
    Raises:
        UserError: two had different ones.
    """
    (path, value), *others = ((path, settings.get(name)) for path, settings in runs.items())
    for other, its_value in others:
        require(
            (its_value or 0) == (value or 0),
            f"{path} ran with {dashed(name)} {value}, {other} with {its_value}: give "
            f"{dashed(flag_name)}",
        )
    return None if value in ("", []) or value is False else value


def parse_flags_of_runs(
    config_class: type,
    description: str,
    argv: list[str] | None,
    prog: str,
    models: Callable[[typing.Any], Sequence[str]],
    take: dict[str, str],
) -> typing.Any:
    """As parse_flags, but flags that are not given are those that the models' runs had.

    What is taken is printed.

    Args:
        models: the models in a config; those of no run are left out.
        take: flag -> the setting of a run that it takes.
    Raises:
        UserError: two runs differ in a setting that is to be taken.
    """
    argv = sys.argv[1:] if argv is None else argv
    config = parse_flags(config_class, description, argv, prog)
    runs, taken = settings_of(models(config)), []
    given = {word.partition("=")[0] for word in argv}
    for name, key in take.items() if runs else ():
        head = next((group[0] for group in (DATA, REWARD) if key in group[1:]), "")
        of_others = dashed(head) in given and any(
            run.get(head) != getattr(config, head) for run in runs.values()
        )
        if of_others or not hasattr(config, name) or dashed(name) in given:
            continue
        value = agreed(runs, key, name)
        if isinstance(value, list):
            taken += [dashed(name), *map(str, value)]
        elif value is not None:
            taken += [dashed(name) if value is True else f"{dashed(name)}={value}"]
    if taken:
        print(f"as {', '.join(runs)} ran: {' '.join(taken)}")
    return parse_flags(config_class, description, [*taken, *argv], prog)


def held_out_rows(models: Sequence[str], flag_name: str) -> tuple[list[dict], str, str]:
    """The rows whose prompts these models' runs were evaluated on, their source, and the column.

    Args:
        flag_name: the flag that gives other prompts.
    Raises:
        UserError: there is no such run, or two had other data.
    """
    from ..data.chat import first_turn
    from ..data.columns import Dropped, read_prompt
    from ..data.splits import Split, both_splits, divide

    runs = settings_of(models)
    had = {name: agreed(runs, name, flag_name) for name in DATA if runs}
    missing = f"{dashed(flag_name)} is missing: the prompts to answer"
    require(bool(had.get("dataset")), missing)
    names = ("dataset", "split", "eval_split", "eval_share", "split_seed", "subset")
    data = Split(*(had[name] or "" for name in names))
    rows, columns = both_splits(data)
    column = prompt_column(columns, data.dataset, had["prompt_column"])
    require(not had["prompt_tokens"], f"{missing}: those of the run were beginnings of texts")

    def read(row: dict, where: str) -> tuple[str, dict] | Dropped:
        prompt = read_prompt(row, where, column, False)
        return prompt if isinstance(prompt, Dropped) else (prompt, row)

    items = divide(data, rows, read, lambda item: first_turn(item[0]))[1]
    count = next(iter(runs.values()))["eval_prompts"]
    held_out = list({json.dumps(prompt): row for prompt, row in items}.values())[:count]
    print(f"prompts: {len(held_out)} that {', '.join(runs)} held out of {data.dataset}")
    return held_out, data.dataset, column


def prompt_column(columns: Collection[str], source: str, given: str | None) -> str:
    """The column of prompts: the one that is given, or the first that is read as prompts.

    Raises:
        UserError: it is not there.
    """
    known = [given] if given else ["prompt", "messages", "chosen"]
    column = next((name for name in known if name in columns), "")
    expected = " or ".join(known)
    require(bool(column), f"{source}: has columns {sorted(columns)}: expected {expected}")
    return column
