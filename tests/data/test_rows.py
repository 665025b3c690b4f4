"""Every source reads alike, and what cannot be read is named in one line."""

import gzip
import json
import time

import pytest

from minalign.data.cells import number_cell, text_cell
from minalign.data.rows import read_rows
from minalign.running.errors import UserError

datasets = pytest.importorskip("datasets")  # the one package that a GPU machine may lack


@pytest.fixture(autouse=True)
def no_traces_in_the_home_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


ROWS = [{"text": f'film {n}: naïve, "quoted"\nand two lines', "rating": n / 2} for n in range(5)]


def write_jsonl(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "saved"])
def test_every_source_reads_alike(name, tmp_path):
    path, table = tmp_path / name, datasets.Dataset.from_list(ROWS)
    if name == "saved":
        table.save_to_disk(path)
    elif name == "a.csv":
        table.to_csv(path)
    elif name == "a.parquet":
        table.to_parquet(path)
    elif name == "a.json":
        path.write_text(json.dumps(ROWS))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    rows = [{"text": row["text"], "rating": str(row["rating"])} for row in ROWS]
    assert read_rows(str(path)) == (rows if name == "a.csv" else ROWS)


@pytest.mark.parametrize("kind", ["saved", "files"])
def test_a_folder_has_splits(kind, tmp_path):
    if kind == "saved":
        table = datasets.Dataset.from_list(ROWS)
        datasets.DatasetDict({"train": table.select([0]), "test": table}).save_to_disk(tmp_path)
    else:
        write_jsonl(tmp_path / "train.jsonl", ROWS[:1])
        write_jsonl(tmp_path / "test.jsonl", ROWS)
    assert [dict(row) for row in read_rows(str(tmp_path), "test")] == ROWS
    assert [dict(row) for row in read_rows(str(tmp_path))] == ROWS[:1]
    with pytest.raises(UserError, match=f"^{tmp_path} .split nowhere.*cannot be loaded") as error:
        read_rows(str(tmp_path), "nowhere")
    assert "\n" not in str(error.value)


def test_a_folder_has_subsets(tmp_path):
    subsets, configs = {"easy": ROWS[:2], "hard": ROWS[2:]}, ""
    for name, rows in subsets.items():
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", rows)
        configs += f"- config_name: {name}\n  data_files: {name}/train.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, rows in subsets.items():
        assert [dict(row) for row in read_rows(str(tmp_path), subset=name)] == rows
    with pytest.raises(UserError, match=f"^{tmp_path}.*hard") as error:
        read_rows(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "saved", "folder"])
def test_a_part_of_a_split_can_be_asked_for(name, tmp_path):
    path, table = tmp_path / name, datasets.Dataset.from_list(ROWS)
    if name == "folder":
        path.mkdir()
        write_jsonl(path / "train.jsonl", ROWS)
    elif name == "a.parquet":
        table.to_parquet(path)
    elif name == "a.jsonl":
        write_jsonl(path, ROWS)
    elif name == "saved":
        table.save_to_disk(path)
    else:
        table.to_csv(path)
    texts = [row["text"] for row in ROWS]
    assert [row["text"] for row in read_rows(str(path), "train[1:3]")] == texts[1:3]
    assert [row["text"] for row in read_rows(str(path), "train[4:]+train[:1]")] == texts[
        4:
    ] + texts[:1]


@pytest.mark.parametrize("split", ["test", "test[:2]"])
@pytest.mark.parametrize("kind", ["a.jsonl", "saved"])
def test_a_source_of_one_split_does_not_pretend_to_have_others(kind, split, tmp_path):
    """All rows, silently, would train on what was to be held out."""
    path = tmp_path / kind
    if kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        write_jsonl(path, ROWS)
    with pytest.raises(UserError, match=f"^{path} .split {split[:4]}"):
        read_rows(str(path), split)


@pytest.mark.parametrize(
    "name", "no.gz no.jsonl.gz no.jsonl no.txt no.json no.csv no.parquet folder".split()
)
def test_bad_files_are_named(name, tmp_path):
    if name == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=f"^{tmp_path / name}") as error:
        read_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "missing", "{}/missing.jsonl missing.csv ./missing a/b/c ~/missing missing.jsonl.gz".split()
)
def test_missing_files_are_named(missing, tmp_path):
    missing = missing.format(tmp_path)
    with pytest.raises(UserError, match=f"^{missing}: no such file"):
        read_rows(missing)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "saved"])
def test_sources_without_rows_are_named(name, tmp_path):
    path = tmp_path / name
    if name == "a.parquet":
        datasets.Dataset.from_dict({"text": []}).to_parquet(path)
    elif name == "saved":
        datasets.Dataset.from_dict({"text": []}).save_to_disk(path)
    else:
        contents = {"a.csv": b"text,rating\n", "a.json": b"[]", "a.jsonl.gz": gzip.compress(b"")}
        path.write_bytes(contents.get(name, b""))
    with pytest.raises(UserError, match=f"^{path}") as error:
        read_rows(str(path))
    assert "\n" not in str(error.value)


def test_a_data_set_of_the_hub_needs_the_hub(monkeypatch):
    """One line, at once, that says what to do without a network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    began = time.monotonic()
    message = "^stanfordnlp/no-such: .*hub cannot be reached.*give --dataset the folder or file"
    with pytest.raises(UserError, match=message) as error:
        read_rows("stanfordnlp/no-such")
    assert "\n" not in str(error.value) and time.monotonic() - began < 10


def test_types_that_differ_in_a_column_reach_the_checks_of_cells(tmp_path):
    rows = [{"text": "a", "rating": 1}, {"text": {"b": 1}, "rating": "high"}]
    assert read_rows(write_jsonl(tmp_path / "a.jsonl", rows)) == rows


@pytest.mark.parametrize("bad", ['{"prompt": ', "[]", "7", '{"a": NaN', "[" * 100_000])
def test_a_broken_line_is_named_by_its_row(bad, tmp_path):
    """Blank lines are no rows."""
    with pytest.raises(UserError, match="row 2: ") as error:
        read_rows(write_jsonl(tmp_path / "a.jsonl", ['{"prompt": "p"}', "", bad]))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "value, got",
    [
        (7, "int"),
        (None, "NoneType"),
        (["a"], "list"),
        ("", "an empty text"),
        (" \n", "an empty text"),
    ],
)
def test_a_cell_that_is_no_text_is_named(value, got):
    with pytest.raises(UserError, match=f"^column 'text': got {got}"):
        text_cell({"text": value}, "text")
    if isinstance(value, str):
        assert text_cell({"text": value}, "text", may_be_empty=True) == value


@pytest.mark.parametrize("value", ["high", "", None, True, float("nan"), "nan", 10**400, [1]])
def test_a_cell_that_is_no_number_is_named(value):
    with pytest.raises(UserError, match="^column 'rating': got .*, expected a number"):
        number_cell({"rating": value}, "rating")
    assert number_cell({"rating": 3}, "rating") == number_cell({"rating": "3"}, "rating") == 3.0
