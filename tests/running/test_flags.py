"""Flags are strict and documented."""

from dataclasses import dataclass

import pytest

from minalign.data.prompts import parse_span
from minalign.running.errors import UserError
from minalign.running.flag_groups import DataFlags, LoraFlags, MachineFlags, resolve_training
from minalign.running.flags import flag, parse_flags


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


def parse(*argv):
    return parse_flags(Config, "What the program does.", list(argv))


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
