"""Rows of a data set, from a local file, a folder or the hub."""

from __future__ import annotations

import csv
import functools
import gzip
import json
import os
import re
import shutil
import sys
import tempfile
import typing
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

from ..running.errors import UserError, require
from .cells import shown

FILE_TYPES = (".jsonl", ".gz", ".json", ".csv", ".parquet")

SAVED = ("state.json", "dataset_dict.json")  # by datasets' save_to_disk

# A path with a typing error is no name on the hub.
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*|[\w-]+")

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_rows(
    dataset: str, split: str = "train", subset: str = "", columns: Collection[str] | None = None
) -> list[dict]:
    """Rows of a local file, a saved datasets folder, or a hub id.

    Cells of a .csv file are texts. A path is taken as it is, never as a pattern.

    Args:
        dataset: which; of files .jsonl, .jsonl.gz, .json, .csv and .parquet.
        split: as "train" or "train[:100]"; one file is the split "train".
        subset: configuration of a hub data set that has several.
        columns: those to read, where data lie column by column. Cells of others are None, and may
            hold anything. Without it, all are read; pictures and sound are never decoded.
    Raises:
        UserError: there are no rows, or they cannot be read.
    """
    path = Path(dataset)
    may_be_on_the_hub = (
        bool(HUB_ID.fullmatch(dataset))
        and path.suffix not in FILE_TYPES
        and not os.path.exists(dataset.partition("/")[0])
    )
    # os.path, since Path's own tests raise for long names.
    require(
        os.path.exists(dataset) or may_be_on_the_hub,
        f"{dataset}: no such file: give --dataset a .jsonl, .csv or .parquet file, a folder or a "
        "hub id",
    )
    is_saved = any(os.path.exists(f"{dataset}/{name}") for name in SAVED)
    has_subsets = not os.path.isfile(dataset) and not is_saved
    require(has_subsets or not subset, f"--subset {subset:.40}: {dataset} has none: leave it out")
    try:
        _refuse_pointers(path)
        if os.path.isfile(dataset):
            rows = _part({"train": _read_file(path, columns)}, split)
        elif is_saved:
            rows = _read_saved(dataset, split, columns)
        else:
            rows = _read_folder(dataset, split, subset, columns)
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
    require(bool(rows), f"{dataset}: no rows: expected at least one")
    return rows


def _refuse_pointers(path: Path) -> None:
    """UserError where git left a pointer to a large file in place of it."""
    files = (f for f in path.rglob("*") if f.suffix in (*FILE_TYPES, ".arrow"))
    for file in files if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as content:
                is_pointer = content.read(len(LFS_POINTER)) == LFS_POINTER
            require(not is_pointer, f"{file}: a git-lfs pointer, not the file: run git lfs pull")


def _read_file(path: Path, columns: Collection[str] | None) -> list[dict]:
    if path.name.endswith((".json", ".jsonl", ".jsonl.gz")):
        return _read_json(path)
    if path.suffix == ".csv":
        return _read_csv(path)
    require(
        path.suffix == ".parquet",
        f"{path}: unknown file type {path.suffix!r}: expected .jsonl, .json, .csv or .parquet",
    )
    import datasets

    with tempfile.TemporaryDirectory() as copy:  # of a name that is no pattern to datasets
        os.symlink(os.path.realpath(path), f"{copy}/rows.parquet")
        rows = datasets.Dataset.from_parquet(f"{copy}/rows.parquet", cache_dir=copy)
        return _from_arrow(rows.with_format("arrow")[:], columns)


def _read_json(path: Path) -> list[dict]:
    """Objects, one per line, or one array of them."""
    # Not with datasets: its error for a broken row does not name the row, and a file that is `null`
    # ends the program.
    rows, is_array = [], False
    opener = gzip.open if path.suffix == ".gz" else open
    read = functools.partial(json.loads, object_pairs_hook=_object)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            is_array = next(filter(str.strip, file), "").lstrip().startswith("[")
            file.seek(0)  # blank lines are no rows
            rows.extend(read(file.read()) if is_array else map(read, filter(str.strip, file)))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # too deep, or a number of thousands of digits
        place = "" if is_array else f" row {len(rows) + 1}:"
        raise UserError(
            f"{path}:{place} not JSON ({error}): one object per line, or an array of them"
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f'{path}: row {number}: got {row!r:.40}, expected {{"column": value, ...}}'
            )
    return rows


def _object(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON, which may not say one thing twice."""
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else 0
    require(not twice, f"twice: {shown(twice or ())}")
    return dict(pairs)


def _read_csv(path: Path, separator: str = ",") -> list[dict]:
    """Rows of texts, as the file has them."""
    # Not with datasets: it makes 7 of 007, and nothing of the answer "None".
    csv.field_size_limit(sys.maxsize)
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = filter(None, csv.reader(file, delimiter=separator, strict=True))
            names = next(lines, [])
            twice = {name for name in names if names.count(name) > 1}
            require(not twice, f"{path}: two columns have one name: {shown(twice)}: rename one")
            for cells in lines:
                require(
                    len(cells) <= len(names),
                    f"{path}: row {len(rows) + 1}: {len(cells)} cells under {len(names)} names: "
                    'put a text with commas into "quotes"',
                )
                rows.append(dict.fromkeys(names) | dict(zip(names, cells)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: row {len(rows) + 1}: cannot be read: {error}") from error
    return rows


def _read_saved(folder: str, split: str, columns: Collection[str] | None) -> list[dict]:
    import datasets

    saved = datasets.load_from_disk(folder)
    saved = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    rows = {
        name: _from_arrow(part.with_format("arrow")[:], columns) if name in split else []
        for name, part in saved.items()
    }
    return _part(rows, split)


def _read_folder(
    dataset: str, split: str, subset: str, columns: Collection[str] | None
) -> list[dict]:
    """Rows of a folder of files, or of the hub."""
    import datasets  # here: seconds to import, and not everywhere installed

    options, is_here = {}, os.path.isdir(dataset)
    dataset = os.path.realpath(dataset) if is_here else dataset
    with tempfile.TemporaryDirectory() as copy:
        if is_here and re.search(r"[*?[\]:]", dataset):
            # datasets takes a folder's name as a pattern, and knows no way to say that it is none.
            shutil.copytree(dataset, f"{copy}/data", copy_function=os.symlink)
            dataset, options = f"{copy}/data", {"cache_dir": f"{copy}/cache"}
        config = datasets.load_dataset_builder(dataset, subset or None, **options).config
        kind = type(config).__name__
        if kind in ("CsvConfig", "JsonConfig") and not getattr(config, "field", None):
            # It guesses types: of a text beside a number it makes JSON, in quotes.
            fetch, rows = datasets.DownloadManager(), {}
            for name, files in zip(map(str, config.data_files), config.data_files.values()):
                files = fetch.download_and_extract(list(files)) if name in split else []
                paths = [Path(os.path.realpath(file)) for file in fetch.iter_files(files)]
                read = functools.partial(_read_csv, separator=getattr(config, "sep", ","))
                read = read if kind == "CsvConfig" else _read_json
                rows[name] = [row for path in paths for row in read(path)]
            return _part(rows, split)
        rows = datasets.load_dataset(dataset, subset or None, split=split, **options)
        return _from_arrow(rows.with_format("arrow")[:], columns)


def _part(tables: Mapping[str, list[dict]], split: str) -> list[dict]:
    """The rows that `split` names, as "train" or "train[:100]"."""
    if split in tables:
        return tables[split]
    import datasets

    instruction = datasets.ReadInstruction.from_spec(split)
    pieces = instruction.to_absolute({name: len(rows) for name, rows in tables.items()})
    return [row for piece in pieces for row in tables[piece.splitname][piece.from_ : piece.to]]


def _from_arrow(table: typing.Any, columns: Collection[str] | None) -> list[dict]:
    """Rows of an Arrow table as they are stored: set_format and decoding play no part."""
    every = dict.fromkeys(table.column_names)
    names = [name for name in every if columns is None or name in columns]
    if not names:
        return [dict(every) for _ in range(table.num_rows)]
    table = table.select(names)
    table.validate(full=True)  # texts that are no UTF-8 would raise where they are used
    rows = [every | row for row in table.to_pylist()]
    mixed = [name for name in names if "arrow.json" in str(table.schema.field(name).type)]
    if mixed:  # cells of different types are stored as JSON
        import datasets

        features = datasets.Features.from_arrow_schema(table.select(mixed).schema)
        for row in rows:
            row |= features.decode_example({name: row[name] for name in mixed})
    return rows
