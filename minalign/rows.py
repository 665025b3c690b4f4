"""Rows of a data set, from a local file, a folder or the hub, and checked cells of them."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from .common import UserError

FILE_TYPES = (".jsonl", ".gz", ".json", ".csv", ".parquet")


def read_rows(dataset: str, split: str = "train", subset: str = "") -> Sequence[dict]:
    """Rows of a local file (.jsonl, .jsonl.gz, .json, .csv, .parquet), a saved datasets folder, or a hub id."""
    path = Path(dataset)
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        if split != "train":
            raise UserError(f"{dataset} (split {split}): one file is one split: leave the flag out, or give a folder of files")
        rows = list(_read_jsonl(path))
    elif path.exists() or (
        dataset.count("/") <= 1 and path.suffix not in FILE_TYPES and not dataset.startswith((".", "/", "~"))
    ):
        rows = _read_with_datasets(path, dataset, split, subset)
    else:
        raise UserError(f"{dataset}: no such file: give --dataset a .jsonl, .csv or .parquet file, a folder or a hub id")
    if not len(rows):
        raise UserError(f"{dataset}: no rows: expected at least one")
    return rows


def _read_jsonl(path: Path) -> Iterator[dict]:
    # Not with datasets: its error for a broken row does not name the row.
    number = 0  # of rows, as everywhere: blank lines do not count
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    number += 1
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f'{path}: row {number}: got {line.strip()[:40]}, expected {{"column": value, ...}}')
                    yield row
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: row {number}: not JSON ({error}): one object a line") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _read_with_datasets(path: Path, dataset: str, split: str, subset: str) -> Sequence[dict]:
    import datasets  # here: seconds to import, and not everywhere installed

    formats = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
    try:
        if path.is_file():
            if path.suffix not in formats:
                raise UserError(f"{dataset}: unknown file type {path.suffix!r}: expected .jsonl, .json, .csv or .parquet")
            return datasets.load_dataset(formats[path.suffix], data_files=str(path), split=split)
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                return saved[split]
            if split != "train":
                raise UserError(
                    f"{dataset} (split {split}): one saved data set is one split: leave the flag out, or give a folder with splits"
                )
            return saved
        return datasets.load_dataset(dataset, subset or None, split=split)
    except ConnectionError as error:
        raise UserError(
            f"{dataset}: no such folder here, and the hub cannot be reached ({type(error).__name__}): download it "
            "where there is a network and give --dataset the folder or file (HF_HUB_OFFLINE=1 says so at once)"
        ) from error
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # datasets says what went wrong only there
        reason = " ".join(line.strip() for line in (str(cause).strip() or type(cause).__name__).splitlines()[:2])
        raise UserError(f"{dataset} (split {split}): cannot be loaded: {reason}") from error


def text_cell(row: dict, column: str, where: str, may_be_empty: bool = False) -> str:
    """row[column] if it is a text; UserError naming the place if not."""
    value = row.get(column)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        got = "an empty text" if isinstance(value, str) else f"{type(value).__name__} {value!r:.40}"
        raise UserError(f"{where}: column {column!r}: got {got}, expected a text: mend or remove the row")
    return value


def number_cell(row: dict, column: str, where: str) -> float:
    """row[column] if it is a number and not NaN; UserError naming the place if not."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise UserError(f"{where}: column {column!r}: got {value!r:.40}, expected a number: mend or remove the row")
    return float(value)
