"""Flags are strict and documented."""

import json
import shlex
from dataclasses import dataclass

import pytest

from minalign.data.prompts import parse_span
from minalign.running.errors import UserError, one_line_errors
from minalign.running.flag_groups import DataFlags, LoraFlags, MachineFlags, resolve_training
from minalign.running.flags import as_given, flag, parse_flags, words_of


@dataclass
class Config:
    """What the program is."""

    out: str = flag("", "folder")
    batch_size: int = flag(64, "completions per step", "[1, inf)")
    lr: float = flag(1e-5, "peak learning rate")
    mu: float | None = flag(None, "rate of the average", "(0, 1]")
    anchor: str = flag("fixed", "what the KL is measured from", ("fixed", "ema"))
    ends: tuple[float, float] | None = flag(None, "lower and upper end")
    resume: bool = flag(False, "resume where the run stopped")
    seed: int = flag(0, "seed of everything")
    eta: list[float] | None = flag(None, "interpolation weights")


@dataclass
class Texts:
    """Texts of any kind."""

    name: str = flag("x", "a text")
    names: list[str] | None = flag(None, "texts")


def parse(*argv, kind=Config):
    return parse_flags(kind, "What the program does.", list(argv))


def test_flags_not_given_have_their_defaults():
    assert parse() == Config()


def test_flags_have_the_types_of_their_fields():
    argv = "--batch-size 8 --lr 1e-3 --mu 0.5 --anchor ema --resume --out runs/a".split()
    config = parse(*argv)
    assert config == Config(out="runs/a", batch_size=8, lr=1e-3, mu=0.5, anchor="ema", resume=True)
    values = (config.batch_size, config.lr, config.mu, config.resume)
    assert [type(value) for value in values] == [int, float, float, bool]
    assert parse("--ends", "-1", "5").ends == (-1.0, 5.0)
    assert parse("--eta", "0.5").eta == [0.5] and parse("--eta", "0", "1").eta == [0.0, 1.0]


@pytest.mark.parametrize(
    "argv, culprit",
    [
        (["--bach-size", "8"], "--bach-size"),
        # an abbreviation: another flag may begin like it tomorrow
        (["--batch", "8"], "--batch"),
        (["--batch_size", "8"], "--batch_size"),
        (["--batch-size", "8.5"], "8.5"),
        (["--batch-size"], "--batch-size"),
        (["--batch-size", "0"], "--batch-size 0: expected a number in [1, inf)"),
        (["--mu", "0"], "--mu 0.0: expected a number in (0, 1]"),
        (["--mu", "nan"], "--mu nan"),
        (["--eta", "0", "much"], "much"),
        (["--lr", "fast"], "fast"),
        (["--anchor", "moving"], "moving"),
        (["--ends", "1"], "--ends"),
        (["--resume", "yes"], "yes"),
        (["stray"], "stray"),
    ],
)
def test_bad_flags_end_the_program_with_one_line(argv, culprit, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*argv)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.startswith("error: ") and culprit in err
    assert err.count("\n") == 1 and err.endswith("\n")


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0 and "What the program does." in text
    lines = {part.split()[0]: part for part in text.split(" --")[1:]}
    assert "INT completions per step (default: 64)" in lines["batch-size"]
    assert "FLOAT peak learning rate (default: 1e-05)" in lines["lr"]
    assert "{fixed,ema} what the KL is measured from (default: fixed)" in lines["anchor"]
    assert "INT seed of everything (default: 0)" in lines["seed"]
    assert "FLOAT FLOAT lower and upper end" in lines["ends"]
    assert all("default" not in lines[name] for name in ("out", "mu", "ends", "resume"))


def test_a_list_may_be_given_at_once_or_piece_by_piece():
    assert parse("--eta", "0", "1", "--eta", "0.5").eta == [0.0, 1.0, 0.5]
    assert parse().eta is None


@dataclass
class Derived(Config):
    """What this script adds."""

    batch_size: int = flag(16, "completions per step")
    beta: float = flag(0.1, "weight of the KL")


def test_help_groups_the_flags_by_class_and_the_last_default_counts(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Derived, "", ["--help"])
    _, text = capsys.readouterr().out.split("options:")
    in_order = (
        "What this script adds:",
        "--batch-size INT",
        "--beta FLOAT",
        "What the program is:",
        "--mu FLOAT",
    )
    places = [text.index(part) for part in in_order]
    assert all(before < after for before, after in zip(places, places[1:]))
    assert "per step (default: 16)" in text and text.count("--batch-size INT") == 1
    assert parse_flags(Derived, "", []).batch_size == 16


@pytest.mark.parametrize("text, span", [("", None), ("10", (10, 10)), ("5-15", (5, 15))])
def test_a_span_is_a_number_or_a_range(text, span):
    assert parse_span("--prompt-tokens", text) == span


@pytest.mark.parametrize("text", ["0", "-5", "15-5", "5-", "5-x", "1.5", "5 15"])
def test_a_bad_span_is_one_line(text):
    message = "^--prompt-tokens .*: expected a number or a range, such as 10 or 5-15$"
    with pytest.raises(UserError, match=message):
        parse_span("--prompt-tokens", text)


@dataclass
class Shared(DataFlags, LoraFlags, MachineFlags):
    """Both groups."""


def resolved(**given):
    config = Shared(**given)
    resolve_training(config)
    return config


def test_flags_of_data_need_a_data_set():
    for other in ({"subset": "small"}, {"eval_split": "test"}, {"format": "chat"}):
        with pytest.raises(UserError, match="needs --dataset"):
            resolved(**other)
        assert resolved(dataset="here", **other) == Shared(dataset="here", **other)


def test_flags_of_lora_need_a_rank_and_get_their_defaults():
    others = {
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "lora_targets": ["q_proj"],
        "lora_save": "adapter",
    }
    for name, value in others.items():
        with pytest.raises(UserError, match="needs --lora-rank"):
            resolved(**{name: value})
    assert resolved() == Shared()
    assert resolved(lora_rank=4) == Shared(lora_rank=4, lora_alpha=8.0, lora_save="merged")


# --- --config: the flags of an earlier run


def write_run(path, config):
    """What a run of this config leaves, without what only runs know."""
    path.write_text(json.dumps({"batch_size": 99} | as_given(config)))
    return str(path)


def test_a_config_file_gives_the_flags_that_were_given(tmp_path):
    argv = "--batch-size 8 --ends -1 5 --eta 0 -0.5 --resume --anchor fixed --out runs/a".split()
    first = parse(*argv, "--mu", "1e-05")
    file = write_run(tmp_path / "config.json", first)
    again = parse("--config", file)
    assert again == Config(batch_size=8, ends=(-1.0, 5.0), eta=[0.0, -0.5], mu=1e-5)
    assert "anchor" in again.given, "a default that was given stays, whatever it becomes"
    assert again.given == first.given and {"out", "resume"}.isdisjoint(again.given)
    assert type(again.ends) is tuple


def test_flags_win_over_the_config_file_a_list_as_a_whole(tmp_path):
    file = write_run(tmp_path / "config.json", parse("--eta", "0", "1", "--mu", "0.5"))
    config = parse("--eta", "0.5", "--config", file, "--out", "b")
    assert config == Config(eta=[0.5], mu=0.5, out="b")
    third = write_run(tmp_path / "third.json", config)
    assert parse("--config", third) == Config(eta=[0.5], mu=0.5), "a chain of configs"


def test_an_out_or_resume_in_a_config_file_is_left_alone(tmp_path):
    file = tmp_path / "config.json"
    given = {"out": "x", "resume": True, "seed": 3}
    file.write_text(json.dumps({"script": "test_flags", "given": given}))
    assert parse("--config", str(file)) == Config(seed=3)


@pytest.mark.parametrize("text", ["-x", "a b", "", "'", '"$(rm)`', "--x", "-1", "é\n\u2028#"])
def test_any_text_comes_back_from_a_config_file_and_a_command_line(tmp_path, text):
    first = parse(f"--name={text}", "--names=a", f"--names={text}", kind=Texts)
    assert first == Texts(text, ["a", text])
    file = write_run(tmp_path / "config.json", first)
    assert parse("--config", file, kind=Texts) == first
    line = shlex.join(words_of(first.given))
    assert parse(*shlex.split(line), kind=Texts) == first


@pytest.mark.parametrize(
    "content, culprit",
    [
        ("{", "cannot be read"),
        ("[1]", "expected an object"),
        ("{}", "does not say which flags were given"),
        ({"given": None}, "does not say which flags were given"),
        ({"given": ["--seed", "1"]}, "does not say which flags were given"),
        ({"given": {}}, "of None, expected one of test_flags"),
        ({"given": {}, "script": "warp"}, "of warp, expected one of test_flags"),
        ({"tensorboard": True}, "--tensorboard True: no flag of test_flags"),
        ({"config": "x"}, "--config x: no flag of test_flags"),
        ({"help": True}, "--help True: no flag of test_flags"),
        ({"seed": None}, "--seed None: no value of a flag"),
        ({"seed": False}, "--seed False: no value of a flag"),
        ({"seed": {"a": 1}}, "no value of a flag"),
        ({"eta": [1, [2]]}, "no value of a flag"),
        ({"eta": []}, "--eta: expected at least one"),
        ({"seed": True}, "--seed: expected one argument"),
        ({"seed": 1.5}, "--seed: invalid int value: '1.5'"),
        ({"seed": "x"}, "--seed: invalid int value: 'x'"),
        ({"mu": 0}, "--mu 0.0: expected a number in (0, 1]"),
        ({"anchor": "moving"}, "--anchor: invalid choice: 'moving'"),
        ({"ends": [1]}, "--ends: expected 2 arguments"),
    ],
)
def test_a_bad_config_file_is_one_line_that_names_it(tmp_path, content, culprit, capsys):
    file = tmp_path / "config.json"
    if isinstance(content, dict) and "given" not in content:
        content = {"given": content, "script": "test_flags"} if content else content
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit) as exit, one_line_errors():
        parse("--config", str(file))
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert str(file) in err and culprit in err


@pytest.mark.parametrize("path", ["", "nowhere.json", "."])
def test_a_config_file_that_is_not_there_is_one_line(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        parse("--config", path)


def test_a_config_made_in_python_does_not_say_what_was_given():
    assert as_given(Config()) == {"script": "test_flags", "given": None}
    assert as_given(parse()) == {"script": "test_flags", "given": {}}
