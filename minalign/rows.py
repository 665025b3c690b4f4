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

from .common import UserError

FILE_TYPES = (".jsonl", ".gz", ".json", ".csv", ".parquet")
HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


def read_rows(dataset: str, split: str = "train", subset: str = "") -> Sequence[dict]:
    """Rows of a local file (.jsonl, .jsonl.gz, .json, .csv, .parquet), a saved datasets folder, or a hub id."""
    path = Path(dataset)
    if os.path.isfile(dataset) and path.name.endswith((".json", ".jsonl", ".jsonl.gz")):  # Path's own raises for long names
        if split != "train":
            raise UserError(f"{dataset} (split {split}): one file is one split: leave the flag out, or give a folder of files")
        rows = _read_json(path)
    elif os.path.exists(dataset) or (
        dataset.count("/") <= 1 and path.suffix not in FILE_TYPES and not dataset.startswith((".", "/", "~"))
    ):
        rows = _read_with_datasets(path, dataset, split, subset)
    else:
        raise UserError(f"{dataset}: no such file: give --dataset a .jsonl, .csv or .parquet file, a folder or a hub id")
    if not len(rows):
        raise UserError(f"{dataset}: no rows: expected at least one")
    return rows


def _read_json(path: Path) -> list[dict]:
    """Objects one a line, or a .json file that is one array of them."""
    # Not with datasets: its error for a broken row does not name the row, and a file that is `null` ends the program.
    rows = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            is_array = path.suffix == ".json" and file.read(1) == "["
            file.seek(0)
            for row in json.load(file) if is_array else map(json.loads, filter(str.strip, file)):  # blank lines are no rows
                rows.append(row)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # too deep, or a number of thousands of digits
        place = "" if is_array else f" row {len(rows) + 1}:"
        raise UserError(f"{path}:{place} not JSON ({error}): one object a line, or in a .json file an array of them") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f'{path}: row {number}: got {row!r:.40}, expected {{"column": value, ...}}')
    return rows


def _read_with_datasets(path: Path, dataset: str, split: str, subset: str) -> Sequence[dict]:
    import datasets  # here: seconds to import, and not everywhere installed

    try:
        if os.path.isfile(dataset):
            if path.suffix not in (".csv", ".parquet"):
                raise UserError(f"{dataset}: unknown file type {path.suffix!r}: expected .jsonl, .json, .csv or .parquet")
            # A row of more cells than the header has is an error: as an index they would be lost, and the rest move.
            options = {"index_col": False} if path.suffix == ".csv" else {}
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Length of header or names does not match")
                rows = datasets.load_dataset(path.suffix[1:], data_files=str(path), split=split, **options)
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            rows = datasets.load_from_disk(str(path))
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split]
            elif split != "train":
                raise UserError(
                    f"{dataset} (split {split}): one saved data set is one split: leave the flag out, or give a folder with "
                    "splits"
                )
        else:
            rows = datasets.load_dataset(dataset, subset or None, split=split)
        rows.data.validate(full=True)  # texts that are no UTF-8, which would raise where they are used
        return rows
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(
            f"{dataset}: no such folder here, and the hub cannot be reached ({type(error).__name__}): download it "
            "where there is a network and give --dataset the folder or file (HF_HUB_OFFLINE=1 says so at once)"
        ) from error
    except Exception as error:  # as broken YAML, archives and pictures in a folder make it raise, too
        cause = error.__cause__ or error  # datasets says what went wrong only there
        reason = " ".join(line.strip() for line in (str(cause).strip() or type(cause).__name__).splitlines()[:2])
        raise UserError(f"{dataset} (split {split}): cannot be loaded: {reason}") from error


def text_cell(row: dict, column: str, where: str, may_be_empty: bool = False) -> str:
    """row[column] if it is a text; UserError naming the place if not."""
    value = row.get(column)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        got = "an empty text" if isinstance(value, str) else f"{type(value).__name__} {value!r:.40}"
        raise UserError(f"{where}: column {column!r}: got {got}, expected a text: mend or remove the row")
    require_characters(value, f"{where}: column {column!r}")
    return value


def require_characters(text: str, where: str) -> None:
    """UserError naming the place if the text has half a character, as "\\ud83d" alone is in JSON: tokenizers refuse it."""
    half = HALF_CHARACTER.search(text)
    if half:
        raise UserError(f"{where}: got {half[0]!r}, half a character, expected a whole one: mend or remove the row")


def number_cell(row: dict, column: str, where: str) -> float:
    """row[column] if it is a finite number; UserError naming the place if not."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{where}: column {column!r}: got {value!r:.40}, expected a number: mend or remove the row")
    return float(value)
