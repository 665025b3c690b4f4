"""Data files and checkpoints as a hostile or careless user gives them.

Each ends in one line that says what is wrong, in counted drops, or in success.
"""

import csv
import gzip
import json
import pickle
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from messages import assistant, user
from safetensors.torch import save_file
from standins import CHATML, byte_level_bpe
from transformers import PreTrainedTokenizerFast

from minalign.data import toy
from minalign.data.pairs import encode_pairs, load_pairs
from minalign.data.prompts import load_prompts, tokenize_prompts
from minalign.data.splits import Split
from minalign.models.loading import load_policy
from minalign.reward import RewardModel
from minalign.running.errors import UserError, one_line
from minalign.tools.merge import main as merge

datasets = pytest.importorskip("datasets")  # the one package that a GPU machine may lack
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

STRICT = (  # refuses other roles, in two lines
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('unknown\nrole') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
CASES, SECONDS = 480, 5  # a case that takes longer is a hang
LONG = 1_000_000
DROPS = re.compile(r"(\d+) rows dropped|dropped (\d+) of|(\d+) identical and (\d+) longer")


@pytest.fixture(autouse=True)
def no_traces_in_the_home_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizers():
    """One without a template, one that takes any role and one that refuses most."""
    found, special = [toy.make_tokenizer()], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    for template in (CHATML, STRICT):
        pieces = byte_level_bpe(["what a film"], 300, special)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=pieces, bos_token="<|im_start|>", eos_token="<|im_end|>"
        )
        tokenizer.chat_template = template
        found.append(tokenizer)
    return found


# --- files

FORMS = {  # of good rows
    "prompt": lambda n: {"prompt": f"Why {n}?"},
    "text": lambda n: {"text": f"Film {n} is good."},
    "messages": lambda n: {"messages": [user(f"Why {n}?"), assistant("So."), user("And?")]},
    "pairs": lambda n: {"prompt": f"Why {n}?", "chosen": "So it is.", "rejected": "No."},
    "rated pairs": lambda n: (
        {"prompt": f"Why {n}?", "chosen": "Yes.", "rejected": "No."}
        | {"score_chosen": n, "score_rejected": 0}
    ),
    "dialogues": lambda n: {
        "chosen": f"\n\nHuman: Why {n}?\n\nAssistant: So.",
        "rejected": f"\n\nHuman: Why {n}?\n\nAssistant: No.",
        "margin": n / 2,
    },
    "talks": lambda n: {
        name: [user(f"Why {n}?"), assistant(name)] for name in ("chosen", "rejected")
    },
    "ratings": lambda n: {"text": f"Film {n} is good.", "rating": n},
}
PROMPTS = ("prompt", "text", "messages")


def nested(depth):
    """A list in a list in a list, `depth` deep."""
    value = "deep"
    for _ in range(depth):
        value = [value]
    return value


CELLS = [  # in place of one good cell
    *("", " \n\t ", "\x00", "a\x00b", "\x1b[2J\x07", "\ufeffmark", "\ud800", "half \udc00 of it"),
    *("\u2028\x85\x0c", "naïve 🙂", "7", "NaN"),
    *("\n\nAssistant:", "\n\nHuman:", "\n\nAssistant:\n\nAssistant:", "\n\nSystem:"),
    *("<extra_id_1>Assistant\n", "<extra_id_1>User\n", "<|im_end|>", "</s>"),
    *(7, 0, -1.5, True, None, float("nan"), float("inf"), -float("inf"), 10**400, 10**4000),
    *([], {}, [[]], [{}], {"a": [{"b": []}]}, ["text"], [None], nested(20), nested(900)),
    [user("")],
    [assistant("")],
    [user("a"), assistant("")],
    [user("a"), assistant(" ")],
    [user("a"), assistant("b")],
    [{"role": "user"}],
    [{"content": "a"}],
    [{"role": None, "content": "a"}],
    [{"role": "user", "content": 7}],
    [{"role": "user", "content": ["a"]}],
    [{"role": "tool", "content": "a"}],
    [{"role": "line\nbreak", "content": "a"}],
    [user("a"), {"role": "x\r\ny", "content": "b"}],
    [{"role": "\ud800", "content": "a"}],
    [user("\udfff")],
    [{"role": "system", "content": "a"}],
    [user("a"), user("b"), assistant("c")],
]
HUGE = [  # as a cell, too
    lambda: "a" * LONG,
    lambda: "a " * (LONG // 2),
    lambda: "a" + " " * LONG + "b",
    lambda: "\n" * LONG + "b",
    lambda: "\n\nHuman: a" * (LONG // 10),
    lambda: [user("a" * LONG), assistant("b")],
    lambda: ["a"] * (LONG // 10),
    lambda: "<extra_id_1>User\n" * (LONG // 20),
]


def spoil_rows(rng, rows):
    """Make some rows bad, in place. Returns what was done."""
    others = "no column,other name,other names,same,empty row,huge,long,odd name".split(",")
    kind = rng.choice(["cell"] * 8 + others)
    for row in rng.sample(rows, rng.choice([1, 1, 2, len(rows)]) if kind != "huge" else 1):
        column = rng.choice(list(row))
        if kind == "cell":
            row[column] = rng.choice(CELLS)
        elif kind == "huge":
            row[column] = rng.choice(HUGE)()
        elif kind == "long" and isinstance(row[column], str):
            row[column] += " or so" * 500
        elif kind == "no column":
            del row[column]
        elif kind == "other name":
            row[column.upper()] = row.pop(column)
        elif kind == "same":
            row |= rows[0] | ({"rejected": row["chosen"]} if "chosen" in row else {})
        elif kind == "odd name":
            row["a\nb" * rng.choice([1, 100_000])] = "x"
        elif kind == "empty row":
            row.clear()
    if kind == "other names":
        for row in rows:
            row[f"{column}\n2"] = row.pop(column)
    return kind


INSERTED = [  # anywhere
    *(b"\x00", b"\xff\xfe", b'"', b"\n", b"\r", b",", b"{", b"]"),
    *(b"\xed\xa0\x80", b"\\ud800", b'{"prompt": ', b"9" * 5000),
]
LINES = [  # between two lines, or at an end
    *(b"null", b"7", b'"a"', b"[]", b"{}"),
    b"[" * 2000 + b"]" * 2000,
    b"[" * 100_000,
    *(b"NaN", b"a,b,c,d,e,f", b"\x00"),
    b"{" * 9,
    b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"text": ' + b"9" * 5000 + b"}",
    b'{"text": "a"',
    b"x" * LONG,
]


def spoil_bytes(rng, content):
    """The bytes of a file, some of them changed."""
    kinds = "flipped flipped cut random inserted mark empty line doubled".split()
    kind = rng.choice(kinds)
    at = rng.randrange(len(content) + 1)
    if kind == "flipped":
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 3, 30])):
            flipped[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(flipped)
    if kind == "inserted":
        return content[:at] + rng.choice(INSERTED) + content[at:]
    if kind == "line":
        kept = content.split(b"\n")
        kept.insert(rng.choice([0, len(kept) // 2, len(kept)]), rng.choice(LINES))
        return b"\n".join(kept)
    return {
        "cut": content[:at],
        "random": rng.randbytes(200),
        "mark": b"\xef\xbb\xbf" + content,
        "doubled": content * 2,
    }.get(kind, b"")


def write(path, rows):
    """Rows in the format of the file's name. False where that format cannot hold them."""
    names = dict.fromkeys(name for row in rows for name in row)
    if path.suffix == ".parquet":
        try:
            table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
            pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
        except Exception:  # mixed types, half characters
            return False
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            writer = csv.DictWriter(file, list(names))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "\n".join(map(json.dumps, rows)) if path.suffix != ".json" else json.dumps(rows)
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return True


# --- one case


def read_and_encode(path, form, tokenizer, chat):
    """As the scripts do it. Returns what is loaded, training and held out, before it is tokens."""
    data = Split(str(path), eval_share=0.3)
    if form in PROMPTS:
        parts = load_prompts(data, chat=chat)[:2]
        for part in parts:
            tokenize_prompts(tokenizer, part, 500, None, "training")
    else:
        parts = load_pairs(data, chat=chat)
        for part in parts:
            encode_pairs(part, tokenizer, max_tokens=500, max_pairs=40, seed=0)
    return parts


def check_texts(form, chat, rows, parts, printed):
    """Nothing is lost without being counted, and texts are what the file says."""
    loaded = [item for part in parts for item in part]
    if (
        form in ("prompt", "text")
        and not chat
        and all(isinstance(row.get(form), str) for row in rows)
    ):
        rows = [row for row in rows if row[form].strip()]
        texts = [row[form] for row in rows if "<extra_id_1>" not in row[form]]
        assert {prompt for prompt in loaded if prompt in texts} == set(texts)
        assert len(loaded) == len({row[form] for row in rows})
    elif form not in (*PROMPTS, "ratings"):
        assert len(loaded) + sum(map(int, re.findall(r"(\d+) rows dropped", printed))) == len(rows)
        encoded = re.findall(
            r"kept (\d+) of (\d+) pairs: (\d+) identical and (\d+) longer", printed
        )
        assert encoded
        assert all(int(kept) + int(same) + int(long) == int(of) for kept, of, same, long in encoded)


def run_case(seed, folder, tokenizers, capsys):
    """How the case ends: "error", "drops", "success", or a description of a crash."""
    rng = random.Random(seed)
    form = rng.choice(list(FORMS))
    rows = [FORMS[form](n) for n in range(24)]
    names = ["jsonl"] * 4 + ["json"] * 2 + ["jsonl.gz", "csv", "csv", "parquet", "txt"]
    path = folder / f"case-{seed}.{rng.choice(names)}"
    in_rows = rng.random() < 0.6
    did = spoil_rows(rng, rows) if in_rows else "bytes"
    if not write(path, rows):
        path = path.with_suffix(".jsonl")
        write(path, rows)
    if not in_rows:
        path.write_bytes(spoil_bytes(rng, path.read_bytes()))
    tokenizer = rng.choice(tokenizers)
    chat = rng.choice([True, False]) if tokenizer.chat_template else rng.choice([None, False])
    where = f"seed {seed}: {form}, {did}, {path.name}, chat {chat}"

    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        parts = read_and_encode(path, form, tokenizer, chat)
        signal.setitimer(signal.ITIMER_REAL, 0)
        printed = capsys.readouterr().out
        if in_rows and path.suffix != ".csv":  # which has no types
            check_texts(form, chat, rows, parts, printed)
        dropped = sum(int(count) for counts in DROPS.findall(printed) for count in counts if count)
        return "drops" if dropped else "success"
    except UserError as error:
        message = str(error)
        named = str(path) in message or " --" in message or "(--" in message
        if named and len(message.splitlines()) == 1 and len(message) < 1000:
            return "error"
        return f"{where}: {message:.300}"
    except Exception as error:
        crash = f"{type(error).__name__} after {time.monotonic() - began:.1f} s"
        return f"{where}: {crash}: {str(error):.200}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        capsys.readouterr()  # of a case that ends in an error
        path.unlink()


def test_every_file_is_read_or_named_in_one_line(tmp_path, tokenizers, capsys):
    """A few hundred files. `pytest -s` shows how they end."""

    def hang(*_):
        raise TimeoutError("a hang")

    before = signal.signal(signal.SIGALRM, hang)
    try:
        ends = [run_case(seed, tmp_path, tokenizers, capsys) for seed in range(CASES)]
    finally:
        signal.signal(signal.SIGALRM, before)
    counts = Counter(end if end in ("error", "drops", "success") else "crash" for end in ends)
    crashes = [end for end in ends if end not in counts]
    with capsys.disabled():
        print(f"\n{CASES} files: {dict(counts)}")
    assert not crashes, "\n".join(crashes)
    assert min(counts[end] for end in ("error", "drops", "success")) >= 20


# --- what such files found


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["a" + " " * 200_000 + "b", "\n\nHuman: a" * 100_000], ids=["white space", "turns"]
)
def test_long_texts_are_read_in_linear_time(text, tmp_path):
    lines = [json.dumps({"prompt": f"{n}{text}"}) for n in (*range(3), "")]
    (tmp_path / "a.jsonl").write_text("".join(line + "\n" for line in lines))
    began = time.monotonic()
    load_prompts(Split(str(tmp_path / "a.jsonl"), eval_share=0.5), chat=True)
    assert time.monotonic() - began < SECONDS


def test_lists_of_every_depth_are_named(tmp_path):
    """The depths lie between what can be parsed and what repr can show."""
    for depth in range(900, 1000):
        (tmp_path / "a.jsonl").write_text('{"prompt": ' + "[" * depth + "]" * depth + "}\n")
        with pytest.raises(UserError, match="row 1"):
            load_prompts(Split(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    "number", ["Infinity", "-Infinity", "NaN", "1" + "0" * 400, "1" + "0" * 5000, "1e999"]
)
def test_numbers_that_are_not_finite_are_named(number, tmp_path):
    rows = '{"text": "a", "rating": 1}\n' + ('{"text": "b", "rating": ' + number + "}\n") * 2
    (tmp_path / "a.jsonl").write_text(rows)
    with pytest.raises(UserError, match="row 2"):
        load_pairs(Split(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv"])
def test_bytes_that_are_no_utf8_are_not_left_out(name, tmp_path):
    """A text of another encoding, such as latin-1."""
    path, packed = tmp_path / name, name.endswith(".gz")
    write(path, [{"prompt": f"film {n}"} for n in range(30)])
    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    changed = content.replace(b"film 7", b"na\xefve 7")
    path.write_bytes(gzip.compress(changed) if packed else changed)
    with pytest.raises(UserError, match=f"^{path}.*utf-8"):
        load_prompts(Split(str(path)))


def test_more_cells_than_columns_move_no_text(tmp_path):
    """Unquoted commas.

    pandas takes the first cells of such rows as an index, and "world" as the prompt.
    """
    path = tmp_path / "a.csv"
    path.write_text("prompt\n" + "".join(f"Hello, world {n}\n" for n in range(40)))
    with pytest.raises(UserError, match=f"^{path}") as error:
        load_prompts(Split(str(path)))
    assert "\n" not in str(error.value)


def test_a_text_that_is_no_utf8_in_a_parquet_file_is_named(tmp_path):
    """Found by Arrow only where the text is used."""
    path = tmp_path / "a.parquet"
    write(path, [{"prompt": f"film {n}"} for n in range(30)])
    path.write_bytes(path.read_bytes().replace(b"film 7", b"fi\xff\xfe 7"))
    with pytest.raises(UserError, match=f"^{path}.*UTF8"):
        load_prompts(Split(str(path)))


@pytest.mark.parametrize("content", [b"null", b"[]", b"7", b"{}", b"{", b"", b"\xff"])
@pytest.mark.parametrize(
    "name",
    "saved/state.json saved/dataset_info.json files/README.md files/a.zip files/a.tar".split(),
)
def test_broken_folders_are_named(name, content, tmp_path):
    folder, file = name.split("/")
    table = datasets.Dataset.from_list([{"prompt": f"{n}"} for n in range(30)])
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    if file == "README.md":
        (tmp_path / "files" / "train.jsonl").write_text('{"prompt": "a"}\n')
        content = b"---\nconfigs: [" + content + b"\n---\n"
    (tmp_path / name).write_bytes(content)
    try:
        load_prompts(Split(str(tmp_path / folder)))
    except UserError as error:
        assert str(error).startswith(str(tmp_path / folder)) and len(str(error).splitlines()) == 1
    else:
        # which says nothing, and takes nothing away
        assert (file, content) == ("dataset_info.json", b"{}")


LONG_NAMES = ["x" * 5000, "x/" + "y" * 5000 + ".jsonl"]


@pytest.mark.parametrize(
    "dataset",
    [*LONG_NAMES, "a\0b", "a\0b.jsonl", "\ud800.jsonl", "./", "a b"]
    + [pytest.param("//", marks=pytest.mark.slow)],  # the whole disk
)
def test_names_of_no_file_are_named(dataset):
    with pytest.raises(UserError, match=f"^{re.escape(one_line(dataset)[:99])}"):
        load_prompts(Split(dataset))


# --- security


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def checkpoint(folder):
    """Save a toy policy without its weights, and return them."""
    tokenizer = toy.make_tokenizer()
    model = toy.make_model(tokenizer, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return model.state_dict()


@pytest.mark.parametrize("load", [load_policy, RewardModel.from_pretrained])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_is_never_run(load, form, tmp_path):
    weights = checkpoint(tmp_path / "model") | {"trap": Trap(tmp_path / "ran")}
    file = tmp_path / "model" / "pytorch_model.bin"
    if form == "pickle":
        file.write_bytes(pickle.dumps(weights["trap"]))
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=f"{tmp_path / 'model'}: cannot be loaded") as error:
        load(str(tmp_path / "model"))
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", [load_policy, RewardModel.from_pretrained])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_checkpoint_is_never_run(load, file, tmp_path):
    """Neither a model's nor a tokenizer's. tests/scripts/test_tasks.py has the message."""
    folder = tmp_path / "model"
    weights = {name: weight.clone() for name, weight in checkpoint(folder).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / file).read_text())
    kinds = ("Config", "Model", "ModelForCausalLM", "ModelForSequenceClassification")
    auto = {f"Auto{kind}": "code.Mine" for kind in kinds} | {"AutoTokenizer": ["code.Mine", None]}
    config |= {"model_type": "mine", "tokenizer_class": "Mine", "auto_map": auto}
    (folder / file).write_text(json.dumps(config))
    try:
        load(str(folder))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_names_in_a_model_leave_no_folder(tmp_path, capsys):
    """Weights called ../../evil are weights in the merged file, and no files of that name."""
    (tmp_path / "in").mkdir()
    for name in ("init", "a", "b"):
        tiny.policy(tmp_path / "in" / name)
        weights = {"../../evil": torch.randn(3), "/tmp/evil.layers.0.x": torch.randn(3)}
        save_file(weights, tmp_path / "in" / name / "model.safetensors", {"format": "pt"})
    folders = [str(tmp_path / "in" / name) for name in ("init", "a", "b")]
    before, out = set(tmp_path.rglob("*")), str(tmp_path / "out" / "merged")
    merge(["--init", folders[0], "--models", *folders[1:], "--out", out])
    new = {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before}
    copied = {path.name for path in (tmp_path / "in" / "init").iterdir()}
    copied |= {"angles.json", "README.md"}
    assert new == {"out", "out/merged", *(f"out/merged/{name}" for name in copied)}


def test_nothing_runs_what_a_file_says():
    """No pickle but read as weights, no code of others, no shell."""
    root = Path(__file__).parents[2]
    bad = re.compile(
        r"pickle\.loads?\(|Unpickler\(|torch\.load\((?!.*weights_only=True)|allow_pickle=True"
        r"|(?<![\w.])(?<!def )(?:eval|exec)\(|os\.(?:system|popen)\b|subprocess|shell=True"
        r"|trust_remote_code=(?!False)|yaml\.(?:unsafe_)?load\("
    )
    scripts = [root / name for name in ("train_rm.py", "train_policy.py", "warp.py")]
    files = [*root.glob("minalign/**/*.py"), *scripts]
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines()]
    starting = ("run.py", "sweep.py")  # git; a script by its own name
    lines = [line for line in lines if line[0] not in starting or "subprocess" not in line[1]]
    assert len(files) > 20 and not [(name, line) for name, line in lines if bad.search(line)]
    dangerous = (
        "pickle.load(f) torch.load(f) eval(x) exec(x) os.system(x) import subprocess; shell=True "
        "trust_remote_code=True"
    )
    assert len(bad.findall(dangerous)) == 8  # the pattern finds what it should
