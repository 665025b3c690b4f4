"""Rows of a data set, from a local file, a folder or the hub, and checked cells of them."""

import gzip
import json
import os
import re
import sys
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

from ..running.errors import UserError

FILE_TYPES = (".jsonl", ".gz", ".json", ".csv", ".parquet")

HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


def read_rows(dataset: str, split: str = "train", subset: str = "") -> Sequence[dict]:
    """Rows of a local file, a saved datasets folder, or a hub id.

    Args:
        dataset: which; of files .jsonl, .jsonl.gz, .json, .csv and .parquet.
        split: of a folder or a hub id; one file is the split "train".
        subset: configuration of a hub data set that has several.
    Raises:
        UserError: there are no rows, or they cannot be read.
    """
    path = Path(dataset)
    may_be_on_the_hub = (
        dataset.count("/") <= 1
        and path.suffix not in FILE_TYPES
        and not dataset.startswith((".", "/", "~"))
    )
    # os.path, since Path's own tests raise for long names.
    if os.path.isfile(dataset) and path.name.endswith((".json", ".jsonl", ".jsonl.gz")):
        if split != "train":
            raise UserError(
                f"{dataset} (split {split}): one file is one split: leave the flag out, or give a "
                "folder of files"
            )
        rows = _read_json(path)
    elif os.path.exists(dataset) or may_be_on_the_hub:
        rows = _read_with_datasets(path, dataset, split, subset)
    else:
        raise UserError(
            f"{dataset}: no such file: give --dataset a .jsonl, .csv or .parquet file, a folder or "
            "a hub id"
        )
    if not len(rows):
        raise UserError(f"{dataset}: no rows: expected at least one")
    return rows


def _read_json(path: Path) -> list[dict]:
    """Objects, one per line, or a .json file that is one array of them."""
    # Not with datasets: its error for a broken row does not name the row, and a file that is `null`
    # ends the program.
    rows = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            is_array = path.suffix == ".json" and file.read(1) == "["
            file.seek(0)
            lines = filter(str.strip, file)  # blank lines are no rows
            for row in json.load(file) if is_array else map(json.loads, lines):
                rows.append(row)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # too deep, or a number of thousands of digits
        place = "" if is_array else f" row {len(rows) + 1}:"
        raise UserError(
            f"{path}:{place} not JSON ({error}): one object per line, or in a .json file an array "
            "of them"
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f'{path}: row {number}: got {row!r:.40}, expected {{"column": value, ...}}'
            )
    return rows


def _read_with_datasets(path: Path, dataset: str, split: str, subset: str) -> Sequence[dict]:
    import datasets  # here: seconds to import, and not everywhere installed

    try:
        if os.path.isfile(dataset):
            if path.suffix not in (".csv", ".parquet"):
                raise UserError(
                    f"{dataset}: unknown file type {path.suffix!r}: expected .jsonl, .json, .csv "
                    "or .parquet"
                )
            # A row of more cells than the header has is an error: as an index they would be lost,
            # and the rest move.
            options = {"index_col": False} if path.suffix == ".csv" else {}
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Length of header or names does not match")
                rows = datasets.load_dataset(
                    path.suffix[1:], data_files=str(path), split=split, **options
                )
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(str(path))
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split]
            elif split != "train":
                raise UserError(
                    f"{dataset} (split {split}): one saved data set is one split: leave the flag "
                    "out, or give a folder with splits"
                )
        else:
            rows = datasets.load_dataset(dataset, subset or None, split=split)
        # Texts that are no UTF-8 would raise where they are used.
        rows.data.validate(full=True)
        return rows
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(
            f"{dataset}: no such folder here, and the hub cannot be reached "
            f"({type(error).__name__}): download it where there is a network and give --dataset "
            "the folder or file (HF_HUB_OFFLINE=1 says so at once)"
        ) from error
    except Exception as error:
        # Broken YAML, archives and pictures in a folder make it raise errors of many kinds.
        cause = error.__cause__ or error  # datasets says what went wrong only there
        lines = (str(cause).strip() or type(cause).__name__).splitlines()
        reason = " ".join(line.strip() for line in lines[:2])
        raise UserError(f"{dataset} (split {split}): cannot be loaded: {reason}") from error


def text_cell(row: dict, column: str, where: str, may_be_empty: bool = False) -> str:
    """row[column] if it is a text.

    Raises:
        UserError: it is not, or it is empty; the message names the place.
    """
    value = row.get(column)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        got = "an empty text" if isinstance(value, str) else f"{type(value).__name__} {value!r:.40}"
        raise UserError(
            f"{where}: column {column!r}: got {got}, expected a text: fix or remove the row"
        )
    require_characters(value, f"{where}: column {column!r}")
    return value


def require_characters(text: str, where: str) -> None:
    r"""Check that a text has no half character, as "\ud83d" alone is in JSON: tokenizers refuse it.

    Raises:
        UserError: it has one; the message names the place.
    """
    half = HALF_CHARACTER.search(text)
    if half:
        raise UserError(
            f"{where}: got {half[0]!r}, half a character, expected a whole one: "
            "fix or remove the row"
        )


def number_cell(row: dict, column: str, where: str) -> float:
    """row[column] if it is a finite number.

    Raises:
        UserError: it is not; the message names the place.
    """
    value = row.get(column)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise UserError(
            f"{where}: column {column!r}: got {value!r:.40}, expected a number: "
            "fix or remove the row"
        )
    return float(value)
