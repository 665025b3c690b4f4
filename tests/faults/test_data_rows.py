"""Nothing in a data set is ignored in silence: columns, keys, turns, paths and cells.

Each test has the id of the public fault that it stands for. The inputs are written here, by json,
csv, pyarrow and datasets alone.
"""

import csv
import gzip
import json
import re
import sys
import time

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from messages import assistant, system, user

import train_policy
import train_rm
from minalign.data.chat import encode_whole
from minalign.data.columns import Pair
from minalign.data.pairs import encode_pairs, load_pairs
from minalign.data.prompts import load_prompts, tokenize_prompts
from minalign.data.rows import read_rows
from minalign.data.splits import Split
from minalign.running.errors import UserError
from minalign.tools import generate, judge, score

COUNT = 40
ANSWERS = {"chosen": "good {n}", "rejected": "bad {n}"}
PAIR = {"prompt": "What is {n}?", **ANSWERS}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder, and no traces in the home folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Reward models and a policy, with and without a chat template."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("plain", "chatml", "strict"):
        tokenizer = tiny.tokenizer(name)
        tiny.save(folder / f"rm-{name}", tiny.model(tokenizer, "rm"), tokenizer)
        tiny.save(folder / f"lm-{name}", tiny.model(tokenizer), tokenizer)
    return folder


def filled(value, n):
    return json.loads(json.dumps(value).replace("{n}", str(n)))


def rows_of(row, bad=None, place=12):
    """COUNT rows with their numbers, one of them bad."""
    rows = [filled(row, n) for n in range(1, COUNT + 1)]
    if bad is not None:
        rows[place - 1] = bad
    return rows


def write(rows, file="d.jsonl"):
    with open(file, "w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def pairs_of(row, bad=None, chat=True, **options):
    file = write(rows_of(row, bad))
    return [pair for part in load_pairs(Split(file, **options), chat=chat) for pair in part]


def prompts_of(row, bad=None, chat=True, **options):
    file = write(rows_of(row, bad))
    return [p for part in load_prompts(Split(file, **options), chat=chat)[:2] for p in part]


def one_line(error):
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1000
    return str(error.value)


# --- A-F1: columns that are not read


@pytest.mark.parametrize("read", [pairs_of, prompts_of])
@pytest.mark.parametrize(
    "beside",
    [
        {"system": "Be brief"},
        {"question": "What is {n}?", "system": "Be brief"},
        {"instruction": "What is {n}?", "input": ""},
        {"history": [["a", "b"]]},
        {"conversations": [user("What is {n}?")]},
        {"tools": [{"name": "w"}]},
        {"score": 3, "Prompt": "What is {n}?"},
    ],
    ids=lambda beside: " ".join(beside),
)
def test_a_f1_columns_beside_those_that_are_read_are_named(beside, read, capsys):
    read(PAIR | beside)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not read" in line]
    assert all(repr(name) in line for name in beside) and "--columns" in line
    assert "'rejected'" not in line or read is prompts_of


def test_a_f1_pairs_without_a_prompt_are_not_called_chat(capsys):
    pairs = pairs_of(ANSWERS | {"question": "What is {n}?"})
    assert {pair.prompt for pair in pairs} == {""}
    out = capsys.readouterr().out
    assert "as chat" not in out and "40 of 40 without a prompt" in out and "'question'" in out


def test_a_f1_a_column_in_one_late_row_is_named_and_one_of_rated_texts(capsys):
    prompts_of({"prompt": "Why {n}?"}, bad={"prompt": "Why?", "system": "Be brief"})
    assert "columns not read: ['system']" in capsys.readouterr().out
    rows = [{"text": f"film {n}", "rating": n % 3, "title": "x"} for n in range(COUNT)]
    load_pairs(Split(write(rows), eval_share=0.4))
    assert "columns not read: ['title']" in capsys.readouterr().out


# --- --columns


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "folder"])
def test_columns_gives_the_names_of_the_data(kind, capsys):
    rows = rows_of({"question": "What is {n}?", "best": "good {n}", "worst": "bad {n}"})
    if kind == "folder":
        write(rows, "train.jsonl")
    elif kind == "csv":
        write_csv(rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "d.parquet")
    else:
        write(rows)
    names = {"prompt": "question", "chosen": "best", "rejected": "worst"}
    data = Split("." if kind == "folder" else f"d.{kind}", names=names)
    pairs = [pair for part in load_pairs(data, chat=True) for pair in part]
    assert sorted(pair[1:3] for pair in pairs) == sorted(
        (f"good {n}", f"bad {n}") for n in range(1, COUNT + 1)
    )
    assert all(pair.prompt[0]["content"].startswith("What is") for pair in pairs)
    assert "not read" not in capsys.readouterr().out


def test_columns_swaps_and_hides_columns_of_the_same_names(capsys):
    row = PAIR | {"question": "Why {n}?"}
    names = {"chosen": "rejected", "rejected": "chosen", "prompt": "question"}
    for pair in pairs_of(row, names=names):
        assert pair.chosen.startswith("bad") and pair.prompt[0]["content"].startswith("Why")
    assert "columns not read: ['prompt']" in capsys.readouterr().out


def test_columns_is_parsed_from_commas_and_several_values():
    from train_rm import Config, parse_flags

    argv = ["--columns", "prompt=a, with comma,chosen=b", "rejected=c=d", "--columns", "margin=e"]
    config = parse_flags(Config, "", ["--dataset", "d", *argv])
    expected = {"prompt": "a, with comma", "chosen": "b", "rejected": "c=d", "margin": "e"}
    assert Split.from_flags(config).names == expected
    for wrong in ("question=prompt", "prompt", "prompt=", "=a", "prompt=a,prompt=b", ""):
        with pytest.raises(UserError, match="--columns") as error:
            Split.from_flags(parse_flags(Config, "", ["--dataset", "d", "--columns", wrong]))
        one_line(error)


@pytest.mark.parametrize("program", [train_rm, train_policy])
def test_columns_is_checked_before_models_are_loaded(program):
    """A-F1"""
    flags = ["--model", "no-model", "--dataset", write([PAIR]), "--columns", "question=q"]
    with pytest.raises(UserError, match="--columns question=q: expected each of prompt"):
        program.main([*flags, "--device", "cpu", *["--rm", "no-model"] * (program is train_policy)])


@pytest.mark.parametrize("load", [load_pairs, load_prompts])
def test_columns_that_the_data_lack_are_named(load):
    file = write(rows_of(PAIR))
    with pytest.raises(UserError, match="has columns .*'prompt'.*expected 'question'") as error:
        load(Split(file, names={"prompt": "question"}))
    one_line(error)


# --- A-F2: prompt and answers that both hold turns

Q = user("What is {n}?")
JOINED = {  # prompt, what precedes chosen's answer -> the dialogue
    "a system turn in the prompt alone": ([system("Be brief"), Q], [Q], [system("Be brief"), Q]),
    "an answer's own turns follow": (
        [Q],
        [assistant("Even or odd?"), user("Even")],
        [Q, assistant("Even or odd?"), user("Even")],
    ),
    "a prompt of a system turn": ([system("Be brief")], [Q], [system("Be brief"), Q]),
    "the whole dialogue in both": (
        [Q, assistant("So"), user("And?")],
        [Q, assistant("So"), user("And?")],
        [Q, assistant("So"), user("And?")],
    ),
    "the prompt is what is asked last": (
        [user("And {n}?")],
        [Q, assistant("So"), user("And {n}?")],
        [Q, assistant("So"), user("And {n}?")],
    ),
    "the answers have a system turn": ([Q], [system("Be brief"), Q], [system("Be brief"), Q]),
    "a text": ("What is {n}?", [system("Be brief"), Q], [system("Be brief"), Q]),
    "a text that goes on": (
        "What is {n}?",
        [assistant("Even or odd?"), user("Even")],
        [Q, assistant("Even or odd?"), user("Even")],
    ),
    "a history that ends with an answer": (
        [Q, assistant("So")],
        [user("And?")],
        [Q, assistant("So"), user("And?")],
    ),
    "white space": ([user(" What is {n}? ")], [Q], [Q]),
}


@pytest.mark.parametrize("case", JOINED)
def test_a_f2_the_prompt_and_the_turns_of_the_answers_are_joined(case):
    prompt, before, expected = JOINED[case]
    row = {"prompt": prompt, "chosen": [*before, assistant("good")]}
    row["rejected"] = [*before, assistant("bad")]
    found = [pair.prompt for pair in pairs_of(row, eval_share=0.3)]
    wanted = [filled(expected, n) for n in range(1, COUNT + 1)]
    assert sorted(found, key=json.dumps) == sorted(wanted, key=json.dumps)


def test_a_f2_another_dialogue_in_the_answers_is_dropped_with_its_row(capsys):
    bad = {"prompt": [user("Why?")]}
    bad |= {name: [user("Who?"), assistant(name)] for name in ANSWERS}
    assert len(pairs_of(PAIR, bad)) == COUNT - 1
    out = capsys.readouterr().out
    assert "1 rows dropped: the prompt is another than that of the answers (first: row 12)" in out


# --- A-F3: the prompt again in the answers

HUMAN = "\n\nHuman: q{n}\n\nAssistant:"
REPEATED = {
    "hh-rlhf": (HUMAN, HUMAN),
    "a dialogue of a bare question": ("q{n}", HUMAN),
    "a text": ("What is {n}?", "What is {n}?"),
    "a text and a line": ("What is {n}?\n", "What is {n}?\n"),
    "a text without its line": ("What is {n}?\n", "What is {n}?"),
    "messages": ([user("What is {n}?")], "What is {n}?"),
    "messages in text": ([user("q{n}")], HUMAN),
    "Human without lines before": ("Human: q{n}\n\nAssistant:", "Human: q{n}\n\nAssistant:"),
}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("case", REPEATED)
def test_a_f3_a_prompt_repeated_in_both_answers_is_read_once(case, chat, capsys):
    prompt, start = REPEATED[case]
    row = {"prompt": prompt, "chosen": start + " good{n}", "rejected": start + " bad{n}"}
    for pair in pairs_of(row, chat=chat, eval_share=0.3):
        words = json.dumps([pair.prompt, pair.chosen])
        assert len(re.findall(r"q\d|What is", words)) == 1 and "good" in pair.chosen
    out = capsys.readouterr().out
    assert "40 rows: the answers repeat the prompt" in out and "first: row 1)" in out


def test_a_f3_a_script_without_spaces_is_no_longer_word():
    row = {
        "prompt": "天气{n}怎么样",
        "chosen": "天气{n}怎么样很好",
        "rejected": "天气{n}怎么样不好",
    }
    assert {pair[1:3] for pair in pairs_of(row)} == {("很好", "不好")}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "art {n}", "chosen": "art {n}0 is", "rejected": "art {n}1 was"},
        {"prompt": "Say {n}", "chosen": "Say {n} again", "rejected": "No"},
        {"prompt": "Say {n}", "chosen": "Say {n}", "rejected": "Say {n} twice"},
    ],
    ids=["a longer word", "one answer alone", "an answer that is the prompt"],
)
def test_a_f3_answers_that_only_look_so_stay_whole(row, capsys):
    chosen = sorted(filled(row, n)["chosen"] for n in range(1, COUNT + 1))
    assert sorted(pair.chosen for pair in pairs_of(row, eval_share=0.3)) == chosen
    assert "repeat" not in capsys.readouterr().out


# --- A-F4: keys of messages


@pytest.mark.parametrize(
    "message",
    [
        assistant("") | {"tool_calls": [{"function": {"name": "w", "arguments": {"c": "Rome"}}}]},
        assistant(None) | {"tool_calls": [{"id": 1}]},
        assistant("So") | {"function_call": {"name": "w"}},
        {"role": "tool", "content": "22C", "tool_call_id": "1"},
        user("So") | {"tools": [{"name": "w"}]},
    ],
    ids=["tool_calls", "null content", "function_call", "tool_call_id", "tools"],
)
def test_a_f4_a_dialogue_with_tool_use_is_dropped_with_its_row(message, capsys):
    talk = [user("Weather?"), message, user("And?")]
    bad = {name: [*talk, assistant(name)] for name in ANSWERS}
    assert len(pairs_of(PAIR, bad)) == COUNT - 1
    assert re.search("1 rows dropped: .*tool use .*first: row 12", capsys.readouterr().out)
    with pytest.raises(UserError, match="tool use"):
        pairs_of(bad)


@pytest.mark.parametrize(
    "key, value",
    [
        ("reasoning_content", "Let me see"),
        ("thinking", "Let me see"),
        ("name", "Ann"),
        ("weight", 0),
        ("train", False),
        ("images", [{"url": "x"}]),
        ("audio", {"id": "x"}),
    ],
)
def test_a_f4_other_keys_of_messages_are_named_with_their_count(key, value, capsys):
    row = {name: [user("Why {n}?"), assistant(name) | {key: value}] for name in ANSWERS}
    assert len(pairs_of(row)) == COUNT
    out = capsys.readouterr().out
    assert f"40 rows: keys of messages not read: ['{key}'] (first: row 1)" in out


def test_a_f4_keys_without_content_say_nothing(capsys):
    """As the columns of a parquet file have them."""
    empty = {"tool_calls": None, "name": "", "reasoning_content": None}
    empty["function_call"] = {"name": None, "arguments": {"a": None}}
    row = {name: [user("Why {n}?") | empty, assistant(name) | empty] for name in ANSWERS}
    assert len(pairs_of(row)) == COUNT
    assert "keys of messages" not in capsys.readouterr().out


# --- A-F5, A-H7: messages in other forms

TALKS = {name: [user("Why {n}?"), assistant(name + " {n}")] for name in ANSWERS}


def sharegpt(messages):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


def in_form(form, messages):
    return {
        "JSON": lambda: json.dumps(messages),
        "indented JSON": lambda: "\n " + json.dumps(messages, indent=1),
        "JSON of content first": lambda: json.dumps(
            [{"content": m["content"], "role": m["role"]} for m in messages]
        ),
        "ShareGPT": lambda: sharegpt(messages),
        "JSON of ShareGPT": lambda: json.dumps(sharegpt(messages)),
        "human and gpt as roles": lambda: [
            {"role": m["from"], "content": m["value"]} for m in sharegpt(messages)
        ],
    }[form]()


IN_FORMS = ["JSON", "indented JSON", "JSON of content first", "ShareGPT", "JSON of ShareGPT"]
IN_FORMS += ["human and gpt as roles"]


@pytest.mark.parametrize("form", IN_FORMS)
def test_a_f5_a_h7_messages_in_other_forms_are_messages(form):
    """The reward model reads what the template makes of them."""
    tokenizer = tiny.tokenizer("chatml")
    pairs = pairs_of({name: in_form(form, talk) for name, talk in TALKS.items()})
    expected = {
        tokenizer.apply_chat_template(filled(TALKS["chosen"], n), tokenize=False)
        for n in range(1, COUNT + 1)
    }
    ids = [encode_whole(tokenizer, pair.prompt, pair.chosen) for pair in pairs]
    assert {tokenizer.decode(part) for part in ids} == expected
    for column in ("prompt", "messages"):
        prompts = prompts_of({column: in_form(form, TALKS["chosen"])})
        assert sorted(map(json.dumps, prompts)) == sorted(
            json.dumps([user(f"Why {n}?")]) for n in range(1, COUNT + 1)
        )


PARTS = [{"type": "text", "text": "q{n}"}]
LISTS = {"role": ["user", "assistant"], "content": ["q{n}", "a"]}
SAME_DIALOGUE = {
    "parts": [user(PARTS), assistant([{"type": "text", "text": "a"}])],
    "two parts": [user([PARTS[0] | {"text": "q"}, PARTS[0] | {"text": "{n}"}]), assistant("a")],
    "parts with gaps, as parquet has them": [user([PARTS[0] | {"image": None}]), assistant("a")],
    "a struct of lists": LISTS,
    "a struct of lists of ShareGPT": {"from": ["human", "gpt"], "value": LISTS["content"]},
    "json that begins with another key": json.dumps([{"id": 1} | user("q{n}"), assistant("a")]),
}


@pytest.mark.parametrize("name", SAME_DIALOGUE)
def test_messages_in_parts_and_structs_are_the_dialogue_that_they_hold(name, capsys):
    """A-F5"""
    given = SAME_DIALOGUE[name]
    other = json.loads(json.dumps(given).replace('"a"', '"b"').replace('\\"a\\"', '\\"b\\"'))
    pairs = pairs_of({"chosen": given, "rejected": other})
    assert len(pairs) == COUNT
    assert all(pair.prompt[0]["content"][0] == "q" for pair in pairs)
    assert {(len(p.prompt), p.chosen, p.rejected) for p in pairs} == {(1, "a", "b")}
    assert len(prompts_of({"messages": given})) == COUNT
    assert f"{COUNT} rows: column 'messages' ends with an answer" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["", None, []])
def test_a_gap_in_the_prompt_beside_whole_dialogues_is_none(prompt):
    """A-F2"""
    talk = {"prompt": prompt} | {k: [user("q{n}"), assistant(k)] for k in ANSWERS}
    assert len(pairs_of(talk)) == COUNT


@pytest.mark.parametrize("place", [1, 12])
def test_a_pair_without_a_prompt_among_others_is_dropped(place, capsys):
    """A-F1: first or not, it would be read without the chat template, or take it from all."""
    rows = rows_of(PAIR, {"prompt": "", "chosen": "x", "rejected": "y"}, place)
    pairs = [p for part in load_pairs(Split(write(rows)), chat=True) for p in part]
    assert len(pairs) == COUNT - 1 and all(pair.prompt for pair in pairs)
    said = "1 rows dropped: no prompt, where others have one (first: 'x')"
    assert said in capsys.readouterr().out
    assert len([p for part in load_pairs(Split("d.jsonl"), chat=False) for p in part]) == COUNT


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("row", ['{"text": "a", "text": "b"}', '{"m": [{"role": 1, "role": 2}]}'])
def test_json_that_says_a_thing_twice_is_refused(row, array):
    """A-F4"""
    with open("d.json", "w") as file:
        file.write(f"[{row}]" if array else row)
    with pytest.raises(UserError, match=r"twice: \['(text|role)'\]"):
        read_rows("d.json")


def test_a_subset_of_what_has_none_is_refused():
    """A-F4"""
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk("saved")
    for name in (write([{"text": "a"}]), "saved"):
        with pytest.raises(UserError, match="--subset other: .* has none"):
            read_rows(name, subset="other")


def test_a_h7_the_data_set_of_llama_factory_is_read(capsys):
    row = {
        "conversations": sharegpt([user("Why {n}?")]),
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    for pair in pairs_of(row, names={"prompt": "conversations"}):
        assert pair.prompt[0]["role"] == "user" and pair[1:3] == ("good", "bad")
    with pytest.raises(UserError, match="is an answer alone, and there is no prompt"):
        pairs_of(row)
    assert len(pairs_of({name: sharegpt(talk) for name, talk in TALKS.items()})) == COUNT


@pytest.mark.parametrize("role", ["function_call", "observation", "tool", "bing"])
def test_a_h7_other_roles_of_sharegpt_are_dropped(role, capsys):
    talk = [{"from": "human", "value": "q"}, {"from": role, "value": "x"}]
    bad = {name: [*talk, {"from": "gpt", "value": name}] for name in ANSWERS}
    assert len(pairs_of(PAIR, bad)) == COUNT - 1
    assert re.search(f"1 rows dropped: .*'{role}'.*row 12", capsys.readouterr().out)


def test_a_f5_messages_that_are_cut_off_or_pythons_are_not_taken_for_text(capsys):
    for text in (json.dumps(TALKS["chosen"])[:-9], str(TALKS["chosen"])):
        assert len(pairs_of(PAIR, PAIR | {"chosen": text})) == COUNT - 1
        assert "messages that are not JSON" in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer",
    ['{"value": 3}', '[{"value": 3}]', "[1, 2]", '{"role": 7}', "[TODO]", '{"content": "x", '],
)
def test_a_f5_answers_in_json_stay_texts(answer):
    pairs = pairs_of(PAIR | {"chosen": answer + " {n}" * (answer == "[TODO]")})
    assert all(pair.chosen.startswith(answer.strip()) for pair in pairs) and len(pairs) == COUNT


# --- A-F6: paths

NAMES = ["g[1]", "g*", "g?", "g[!x]", "g[1", "a::b", "~g", "a b"]


def write_csv(rows, file="d.csv"):
    with open(file, "w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "folder", "folder of csv", "saved"])
@pytest.mark.parametrize("name", NAMES)
def test_a_f6_a_path_is_no_pattern(name, kind, tmp_path):
    """Beside it lies what the pattern would find."""
    for folder, word in (("g1", "wrong"), ("a", "wrong"), (name, "right")):
        rows, path = [{"prompt": f"{word} {n}"} for n in range(3)], tmp_path / "here" / folder
        table = datasets.Dataset.from_list(rows)
        if kind == "saved":
            table.save_to_disk(str(path)) if "::" not in name else None
            continue
        path.mkdir()
        if kind == "csv" or kind == "folder of csv":
            write_csv(rows, path / "train.csv")
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "train.parquet")
        else:
            write(rows, path / "train.jsonl")
    if kind == "saved" and "::" in name:
        pytest.skip("datasets cannot save there")
    dataset = f"./{name}" + (
        "" if kind in ("folder", "folder of csv", "saved") else f"/train.{kind}"
    )
    assert [row["prompt"] for row in read_rows(dataset)] == ["right 0", "right 1", "right 2"]


def test_a_f6_a_folder_whose_parents_look_like_a_pattern(tmp_path, monkeypatch):
    inner = tmp_path / "x[1]" / "data"
    inner.mkdir(parents=True)
    write([{"prompt": "right"}], inner / "train.jsonl")
    monkeypatch.chdir(tmp_path / "x[1]")
    for dataset in ("data", ".", str(inner)):
        if dataset == ".":
            monkeypatch.chdir(inner)
        assert read_rows(dataset) == [{"prompt": "right"}]


# --- S33: names that no hub can have


@pytest.mark.parametrize(
    "name",
    [
        "runs/data-1",
        "nowhere/d.jsonl",
        "a/b/c",
        "./data",
        "/data/x",
        "~/data",
        "data.jsnl",
        "runs/",
        "x y",
        "pairs*",
    ],
)
def test_s33_a_path_with_a_typing_error_is_refused_at_once(name, tmp_path, monkeypatch):
    import huggingface_hub.constants

    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    (tmp_path / "here" / "runs" / "rm-1").mkdir(parents=True)
    name = "runs/data-1" if name == "runs/" else name
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^{re.escape(name)}: no such file") as error:
        load_prompts(Split(name))
    assert time.monotonic() - began < 1
    one_line(error)


# --- A-G10: cells of .csv files

ODD = ["5", "007", "1e5", "None", "null", "NA", "nan", "n/a", "True", "2020-01-01", "-", "1,5", '"']


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_g10_cells_of_csv_files_are_texts(kind):
    rows = [{"prompt": f"q{n}", "chosen": word, "rejected": "x"} for n, word in enumerate(ODD)]
    write_csv(rows, "train.csv")
    assert read_rows("train.csv" if kind == "file" else ".") == rows


def test_a_g10_numbers_are_read_where_numbers_are_asked_for(capsys):
    rows = [{"text": f"film {n}", "rating": str(n % 4)} for n in range(COUNT)]
    write_csv(rows)
    train, held = load_pairs(Split("d.csv", eval_share=0.4))
    assert {pair.chosen_rating for pair in [*train, *held]} == {1.0, 2.0, 3.0}
    rows = [filled(PAIR, n) | {"margin": "2.5"} for n in range(COUNT)]
    write_csv(rows)
    assert {pair.margin for part in load_pairs(Split("d.csv")) for pair in part} == {2.5}


@pytest.mark.parametrize(
    "text, message",
    [
        ("prompt,prompt\na,b\n", "two columns have one name"),
        ("prompt,chosen\na,b,c\n", "row 1: 3 cells under 2 names"),
        ('prompt\na\n"b\nc\n', "row 2: cannot be read"),
        ("prompt;chosen\na;b\n", r"has columns \['prompt;chosen'\]"),
        ("prompt\n", "no rows"),
    ],
    ids=["twice", "more cells", "an open quote", "semicolons", "no rows"],
)
def test_a_g10_what_is_no_csv_is_named(text, message):
    with open("d.csv", "w") as file:
        file.write(text)
    with pytest.raises(UserError, match=f"^d.csv: .*{message}") as error:
        load_prompts(Split("d.csv"))
    one_line(error)


def test_a_g10_csv_keeps_quotes_line_ends_marks_and_long_cells(capsys):
    rows = [{"prompt": 'a "b"\r\nc, d', "x": ""}, {"prompt": " e ", "x": "f" * 300_000}]
    with open("d.csv", "w", newline="", encoding="utf-8-sig") as lines:
        writer = csv.DictWriter(lines, ["prompt", "x"])
        writer.writeheader()
        writer.writerows(rows)
        lines.write("\r\nfewer cells\r\n")
    assert read_rows("d.csv") == [*rows, {"prompt": "fewer cells", "x": None}]


# --- A-G11, A-G12: columns that nobody needs, and formats that were set


def with_pictures(rows):
    features = datasets.Dataset.from_list(rows).features
    rows = [row | {"image": {"bytes": b"no picture", "path": None}} for row in rows]
    rows = [row | {"frames": [{"bytes": b"none", "path": None}]} for row in rows]
    features |= {"image": datasets.Image(), "frames": datasets.List(datasets.Image())}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved"])
def test_a_g11_pictures_are_not_decoded(kind, tmp_path, monkeypatch, capsys):
    table = with_pictures(rows_of(PAIR))
    if kind == "saved":
        table.save_to_disk("d")
    else:
        (tmp_path / "here" / "d").mkdir()
        table.to_parquet("d/train.parquet")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(datasets.config, "PIL_AVAILABLE", False)
    dataset = "d/train.parquet" if kind == "parquet" else "d"
    train, held = load_pairs(Split(dataset), chat=True)
    assert len(train) + len(held) == COUNT
    assert "columns not read: ['frames', 'image']" in capsys.readouterr().out
    assert read_rows(dataset)[0]["image"]["bytes"] == b"no picture"


def test_a_g11_a_column_that_is_not_read_may_hold_what_is_no_text(capsys):
    rows = [{"prompt": f"film {n}", "other": "xxxx"} for n in range(COUNT)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, "d.parquet", compression="none", use_dictionary=False)
    content = open("d.parquet", "rb").read().replace(b"xxxx", b"\xff\xfe\xff\xfe")
    open("d.parquet", "wb").write(content)
    train, held, *_ = load_prompts(Split("d.parquet"))
    assert len(train) + len(held) == COUNT
    with pytest.raises(UserError, match="^d.parquet.*UTF8"):
        load_prompts(Split("d.parquet", names={"prompt": "other"}))


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("columns", [None, ["chosen"]], ids=["all", "one column"])
def test_a_g12_a_format_that_was_set_plays_no_part(form, columns):
    rows = rows_of(TALKS | {"chosen_rating": 4, "rejected_rating": 1.5})
    table = datasets.Dataset.from_list(rows)
    table.with_format(form, columns=columns).save_to_disk("d")
    pairs = [pair for part in load_pairs(Split("d"), chat=True) for pair in part]
    assert len(pairs) == COUNT and {pair.ratings for pair in pairs} == {(4.0, 1.5)}
    assert read_rows("d") == rows


def test_a_g12_cells_of_different_types_are_what_they_were(tmp_path):
    """datasets stores them as JSON, a text with its quotes, and in a second split leaves it so."""
    rows = [{"prompt": "Why?"}, {"prompt": [user("Why?")]}, {"prompt": 7}, {"prompt": None}]
    (tmp_path / "here" / "d").mkdir()
    write(rows, "d/train.jsonl")
    assert read_rows("d") == rows
    (tmp_path / "here" / "two").mkdir()
    write(rows[:1], "two/train.jsonl")
    write(rows, "two/test.jsonl")
    assert read_rows("two", "test") == rows and read_rows("two", "test[1:3]") == rows[1:3]
    write([{"prompt": "2020-01-01"}], "two/train.jsonl")
    assert read_rows("two") == [{"prompt": "2020-01-01"}]
    try:
        datasets.load_dataset("d", split="train").save_to_disk("saved")
    except datasets.exceptions.DatasetGenerationError:
        return  # older ones refuse such a column, and so have saved none
    datasets.load_dataset("d", split="train").to_parquet("d.parquet")
    assert read_rows("saved") == rows and read_rows("d.parquet") == rows


# --- A-G13, A-G14, A-G15: single rows

BAD_ROWS = {
    "an empty answer": {"rejected": ""},
    "a blank answer": {"rejected": " \n"},
    "an empty answer in messages": {name: [user("q"), assistant("")] for name in ANSWERS},
    "no answer": {"rejected": None},
    "a number": {"chosen": 7},
    "a half character": {"chosen": "\ud83d"},
    "no prompt": {"prompt": None},
    "a list": {"prompt": ["a"]},
    "no messages": {"prompt": []},
    "a picture": {"prompt": [user([{"type": "image", "url": "a.png"}, *PARTS])]},
    "a part with a picture": {"prompt": [user([PARTS[0] | {"image": "a.png"}])]},
    "a part with a number": {"prompt": [user([PARTS[0] | {"text": 5}])]},
    "parts of words": {"prompt": [user(["a"])]},
    "nothing asked": {"prompt": [user("q"), assistant("a"), user(" ")]},
    "content null": {"prompt": [user(None)]},
    "an open dialogue": {name: [user("q")] for name in ANSWERS},
    "different prompts": {"prompt": None}
    | {name: f"\n\nHuman: {name}?\n\nAssistant: x" for name in ANSWERS},
    "a prompt that ends with an answer": {"prompt": [user("q"), assistant("a")]},
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_g15_rows_of_no_use_are_dropped_and_counted_with_the_first(case, capsys):
    rows = rows_of(PAIR)
    rows[11] = rows[11] | BAD_ROWS[case]
    rows[20] = rows[20] | BAD_ROWS[case]
    train, held = load_pairs(Split(write(rows)), chat=True)
    assert len(train) + len(held) == COUNT - 2
    assert re.search(r"d.jsonl: 2 rows dropped: .* \(first: row 12\)", capsys.readouterr().out)
    for row in rows[: COUNT // 2 + 1]:
        row |= BAD_ROWS[case]
    with pytest.raises(UserError, match="d.jsonl: 21 of 40 are of no use: .*first: row 1") as error:
        load_pairs(Split(write(rows)), chat=True)
    one_line(error)


@pytest.mark.parametrize(
    "bad", [{"prompt": ""}, {"prompt": None}, {}, {"prompt": [assistant("a")]}]
)
def test_a_g15_prompts_of_no_use_are_dropped_and_counted(bad, capsys):
    assert len(prompts_of({"prompt": "Why {n}?"}, bad)) == COUNT - 1
    assert re.search(r"1 rows dropped: .*\(first: row 12\)", capsys.readouterr().out)


def test_a_g15_several_reasons_are_counted_apart_and_rows_have_their_split(capsys):
    rows = rows_of(PAIR)
    for number, bad in ((3, {"chosen": ""}), (5, {"chosen": 7}), (7, {"chosen": ""})):
        rows[number - 1] |= bad
    write(rows, "test.jsonl")
    write([filled(PAIR, n) for n in range(50, 90)], "train.jsonl")
    load_pairs(Split(".", eval_split="test"), chat=True)
    out = capsys.readouterr().out
    assert ".: 2 rows dropped: an empty answer (first: row 3 of test)" in out
    assert "1 rows dropped: column 'chosen': got int, expected a text (first: row 5 of test)" in out


def test_a_g15_the_prompt_of_a_dropped_row_stays_held_out():
    rows = rows_of(PAIR)
    rows[2] |= {"chosen": ""}
    rows[4] |= {"rejected": 7}
    write(rows, "test.jsonl")
    write([filled(PAIR, n) for n in (3, 5, *range(50, 90))], "train.jsonl")
    train, _ = load_pairs(Split(".", eval_split="test"))
    assert len(train) == 40 and {"What is 3?", "What is 5?"}.isdisjoint(p.prompt for p in train)


def test_a_g13_a_dialogue_that_the_template_refuses_is_dropped_with_its_row(capsys):
    tokenizer, two = tiny.tokenizer("strict"), [user("a"), user("b")]
    bad = {"prompt": two, "chosen": "x", "rejected": "y"}
    pairs = pairs_of(PAIR, bad)
    limits = dict(max_tokens=200, max_pairs=100, seed=0)
    examples = encode_pairs(pairs, tokenizer, **limits)
    out = capsys.readouterr().out
    assert len(examples) == COUNT - 1
    assert re.search(r"1 pairs dropped: .*roles must alternate.*first: d.jsonl: row 12", out)
    prompts = prompts_of(PAIR, bad)
    assert len(tokenize_prompts(tokenizer, prompts, 200, None, "training")) == COUNT - 1
    out = capsys.readouterr().out
    assert re.search(r"1 training prompts dropped: .*alternate.*first: d.jsonl: row 12", out)

    pairs = [Pair([*two, user(f"{n}")], "x", "y") for n in range(3)]
    with pytest.raises(UserError, match="3 of 3 are of no use: .*alternate"):
        encode_pairs(pairs, tokenizer, **limits)
    with pytest.raises(UserError, match="3 of 3 are of no use: .*alternate"):
        tokenize_prompts(tokenizer, [pair.prompt for pair in pairs], 200, None, "training")


RATED = PAIR | {"chosen_rating": 4, "rejected_rating": 1, "margin": 3}


@pytest.mark.parametrize("gap", [None, "N/A", "", [], float("nan")])
@pytest.mark.parametrize("column", ["chosen_rating", "rejected_rating", "margin"])
def test_a_g14_a_gap_in_a_number_is_an_error_only_where_it_is_needed(column, gap, capsys):
    bad = filled(RATED, 12) | {column: gap}
    assert len(pairs_of(RATED, bad)) == COUNT
    for needs in ("ratings", "margin"):
        train, held = load_pairs(Split("d.jsonl"), needs=needs)
        is_needed = needs == "ratings" and column != "margin"
        assert len(train) + len(held) == COUNT - is_needed
        assert ("first: row 12" in capsys.readouterr().out) == is_needed


def test_a_g14_numbers_that_are_needed_and_not_there_are_named():
    file = write(rows_of(PAIR))
    for needs, flag in (("ratings", "--rating-coef"), ("margin", "--margin")):
        with pytest.raises(UserError, match=f"^d.jsonl: .*{flag} needs"):
            load_pairs(Split(file), needs=needs)
    rows = [row | {"margin": None} for row in rows_of(PAIR)]
    with pytest.raises(
        UserError,
        match="40 of 40 are of no use: 40 rows dropped: no two ratings that are numbers, no margin",
    ):
        load_pairs(Split(write(rows)), needs="margin")


# --- A-F16: ties


@pytest.mark.parametrize(
    "names", [("chosen_rating", "rejected_rating"), ("score_chosen", "score_rejected")]
)
def test_a_f16_ties_are_counted_apart(names, capsys):
    pairs_of(PAIR | dict.fromkeys(names, 3))
    assert "(above the rejected one's in 0.0%, equal in 100.0%)" in capsys.readouterr().out


# --- A-F11, A-H4: the tools read as training does

WRONG_PROMPTS = {
    "picture": [user([{"type": "image", "url": "a.png"}])],
    "null": [user(None)],
    "other keys": [{"speaker": "user", "text": "q"}],
    "a number": 7,
    "ends with an answer": [user("q"), assistant("a")],
    "empty": [],
}


def scores(models, rm, rows, *flags):
    file = write(rows)
    score.main(["--rm", str(models / rm), "--data", file, "--out", "s.jsonl", *flags])
    return [json.loads(line) for line in open("s.jsonl")]


@pytest.mark.parametrize("rm", ["rm-plain", "rm-chatml"])
@pytest.mark.parametrize("case", WRONG_PROMPTS)
def test_a_f11_score_checks_prompts_as_training_does(case, rm, models, capsys):
    row, bad = {"prompt": [user("q{n}")], "completion": "yes"}, {"prompt": WRONG_PROMPTS[case]}
    found = scores(models, rm, rows_of(row, bad | {"completion": "yes"}))
    assert [n for n, row in enumerate(found, 1) if "reward" not in row] == [12]
    assert re.search(r"1 rows dropped: .*\(first: row 12\)", capsys.readouterr().out)
    (models.parent / "x").mkdir(exist_ok=True)
    with pytest.raises(UserError, match="3 of 3 are of no use"):
        write([bad | {"completion": "yes"}] * 3)
        score.main(["--rm", str(models / rm), "--data", "d.jsonl", "--out", "t.jsonl"])


def test_a_f11_score_reads_sharegpt_and_other_columns(models):
    tokenizer, talk = tiny.tokenizer("chatml"), [user("q"), assistant("yes")]
    torch.manual_seed(0)
    model = tiny.model(tokenizer, "rm").eval()
    ids = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids).logits.item()
    forms = [
        {"question": sharegpt(talk[:1]), "answer": "yes"},
        {"question": json.dumps(talk[:1]), "answer": "yes"},
        {"question": talk[:1], "answer": [assistant("yes")]},
    ]
    for row in scores(models, "rm-chatml", forms, "--columns", "prompt=question,completion=answer"):
        assert row["reward"] == pytest.approx(expected, abs=1e-4) and "question" in row


PARTS_OF_ANSWER = [{"type": "text", "text": "a"}]
SCORED = {
    "messages in parts": {"completion": [assistant(PARTS_OF_ANSWER)]},
    "messages as json": {"completion": json.dumps([assistant("a")])},
    "one message": {"completion": assistant("a")},
    "text": {"completion": " a "},
}


def test_a_f5_score_reads_one_answer_in_any_form_alike(models):
    rows = [{"prompt": "q"} | row for row in SCORED.values()]
    rows += [{"prompt": [user("q")]} | row for row in SCORED.values()]
    found = {round(row["reward"], 5) for row in scores(models, "rm-chatml", rows)}
    assert len(found) == 1


@pytest.mark.parametrize(
    "row, unread",
    [
        ({"text": "a", "prompt": "q"}, "prompt"),
        ({"text": "a", "messages": [user("q"), assistant("a")]}, "messages"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "completion": "c"}, "completion"),
        ({"prompt": "q", "completion": "c", "chosen": "a"}, "chosen"),
    ],
)
def test_a_f1_score_names_what_it_does_not_read(row, unread, models, capsys):
    scores(models, "rm-chatml", [row])
    assert f"columns not read: ['{unread}']" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["<|im_start|>q", [user("<|im_start|>q")]])
def test_a_f7_score_names_special_tokens_and_no_flag_that_it_lacks(prompt, models, capsys):
    scores(models, "rm-chatml", [{"prompt": prompt, "completion": "a"}])
    out = capsys.readouterr().out
    assert "1 of 1 texts hold special tokens such as <|im_start|>" in out
    assert "--format" not in out


def test_a_f3_score_says_that_completions_repeat_their_prompt(models, capsys):
    rows = [{"prompt": "What?", "completion": f"What?{end}"} for end in (" Yes", " No", "")]
    scores(models, "rm-plain", [*rows, {"prompt": "", "completion": ""}])
    out = capsys.readouterr().out
    assert "2 rows: completions begin with their prompt" in out
    assert "1 rows dropped: neither a prompt nor a completion (first: row 4)" in out


def test_a_h4_tools_name_the_columns_that_are_there(models, capsys):
    write([{"question": "q"}] * 3)
    message = r"d.jsonl: has columns \['question'\]: expected prompt"
    with pytest.raises(UserError, match=message):
        score.main(["--rm", str(models / "rm-plain"), "--data", "d.jsonl", "--out", "s.jsonl"])
    lm = str(models / "lm-chatml")
    with pytest.raises(UserError, match=message):
        generate.main(["--model", lm, "--data", "d.jsonl"])
    config = judge.resolve(judge.Config(a=lm, b=lm, judge=lm, prompts="d.jsonl"))
    with pytest.raises(UserError, match=message):
        judge.load_pairs(config)


@pytest.mark.parametrize(
    "row, flags",
    [
        ({"messages": [user("q{n}"), assistant("a")]}, []),
        (TALKS, []),
        ({"question": "q{n}"}, ["--columns", "prompt=question"]),
        ({"prompt": sharegpt([user("q{n}")])}, []),
    ],
    ids=["messages", "chosen", "--columns", "ShareGPT"],
)
def test_a_h4_generate_and_judge_read_the_prompts_that_training_reads(row, flags, models, capsys):
    rows, lm = [filled(row, n) for n in range(3)], str(models / "lm-chatml")
    rows[1] = dict.fromkeys(rows[1])
    write(rows)
    argv = ["--model", lm, "--data", "d.jsonl", "--max-new-tokens", "2", "--out", "o.jsonl"]
    generate.main(argv + flags)
    prompts = [json.loads(line)["prompt"] for line in open("o.jsonl")]
    assert [len(prompt) for prompt in prompts] == [1, 1]
    assert "1 rows dropped" in capsys.readouterr().out
    config = judge.Config(
        a=lm, b=lm, judge=lm, prompts="d.jsonl", columns=flags[1:] or None, max_new_tokens=2
    )
    assert len(judge.load_pairs(judge.resolve(config))) == 2


def test_a_g13_generate_leaves_out_what_the_template_refuses(models, capsys):
    write([{"prompt": [user("a")]}, {"prompt": [user("a"), user("b")]}])
    argv = ["--model", str(models / "lm-strict"), "--data", "d.jsonl", "--max-new-tokens", "2"]
    generate.main([*argv, "--out", "o.jsonl"])
    assert len(open("o.jsonl").readlines()) == 1
    assert re.search(r"1 rows dropped: .*alternate.*row 2", capsys.readouterr().out)


# --- A-H3: advice that follows from the cause


def test_a_h3_the_gap_of_ratings_is_named_where_it_leaves_no_pairs():
    rows = [{"text": f"film {n}", "rating": n / COUNT} for n in range(COUNT)]
    with pytest.raises(UserError, match="lies in 0 to .*--min-rating-gap 1"):
        load_pairs(Split(write(rows)))


def test_a_h3_a_split_that_is_held_out_whole_is_named():
    write(rows_of(PAIR), "train.jsonl")
    for load in (load_pairs, load_prompts):
        with pytest.raises(UserError, match="all of --split train is in --eval-split train"):
            load(Split(".", eval_split="train"))


def test_a_h3_prompts_that_are_too_short_are_not_called_too_long():
    tokenizer = tiny.tokenizer("chatml")
    with pytest.raises(UserError, match="shorter than 50 tokens: lower --prompt-tokens"):
        tokenize_prompts(tokenizer, ["a", "b"], 100, (50, 60), "training")


# --- A-H5: pointers of git-lfs

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
@pytest.mark.parametrize("name", ["jsonl", "json", "jsonl.gz", "csv", "parquet", "arrow"])
def test_a_h5_a_pointer_of_git_lfs_is_called_one(name, kind, tmp_path):
    if name == "arrow" and kind == "file":
        pytest.skip("no file type of its own")
    (tmp_path / "here" / "d").mkdir()
    file = tmp_path / "here" / "d" / f"train.{name}"
    file.write_text(POINTER)
    if kind == "saved":
        (tmp_path / "here" / "d" / "state.json").write_text("{}")
    dataset = str(file) if kind == "file" else "d"
    with pytest.raises(UserError, match=f"train.{name}: a git-lfs pointer.*git lfs pull") as error:
        read_rows(dataset)
    one_line(error)


# --- A-H9: the first character is not the format


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.jsonl.gz"])
@pytest.mark.parametrize(
    "form", [" [{}, {}]", "\n\n[{},\n{}]\n", "\ufeff\n [\n{}\n,{}]", "\n {}\n\n {}\n"]
)
def test_a_h9_white_space_before_an_array_is_none(form, name):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    text = form.replace("{}", "{0}", 1).replace("{}", "{1}").replace("{0}", json.dumps(rows[0]))
    content = text.replace("{1}", json.dumps(rows[1])).encode()
    open(name, "wb").write(gzip.compress(content) if name.endswith("gz") else content)
    assert read_rows(name) == rows


# --- what datasets and pyarrow raise


@pytest.mark.parametrize("name", ["d.parquet", "d.csv", "d.json", "d.jsonl.gz"])
@pytest.mark.parametrize("content", [b"PAR1", b"\xff\xfeh\x00i\x00"])
def test_a_file_that_is_not_what_it_says_is_one_line(name, content):
    open(name, "wb").write(content)
    with pytest.raises(UserError, match=f"^{name}") as error:
        load_prompts(Split(name))
    one_line(error)
