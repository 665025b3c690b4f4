"""Flags are strict and documented, runs get folders of their own, and a metrics log survives what happens to its run."""

import dataclasses
import json
import math
from dataclasses import dataclass

import pytest
import torch

from minalign.common import (
    MetricsLog, UserError, autocast, flag, new_run, one_line_errors, parse_flags, pick_device, pick_dtype, require,
    resumed_run, warmup_factor, write_config,
)  # fmt: skip


@dataclass
class Config:
    out: str = flag("", "folder")
    batch_size: int = flag(64, "completions a step", within="[1, inf)")
    lr: float = flag(1e-5, "peak learning rate")
    mu: float | None = flag(None, "rate of the average", within="(0, 1]")
    anchor: str = flag("fixed", "what the KL is measured from", ("fixed", "ema"))
    ends: tuple[float, float] | None = flag(None, "lower and upper end")
    resume: bool = flag(False, "go on where the run stopped")
    seed: int = flag(0, "seed of everything")
    eta: list[float] | None = flag(None, "interpolation weights")


def parse(*argv):
    return parse_flags(Config, "What the program does.", list(argv))


def test_flags_not_given_have_their_defaults():
    assert parse() == Config()


def test_flags_have_the_types_of_their_fields():
    config = parse("--batch-size", "8", "--lr", "1e-3", "--mu", "0.5", "--anchor", "ema", "--resume", "--out", "runs/a")
    assert config == Config(out="runs/a", batch_size=8, lr=1e-3, mu=0.5, anchor="ema", resume=True)
    assert [type(value) for value in (config.batch_size, config.lr, config.mu, config.resume)] == [int, float, float, bool]
    assert parse("--ends", "-1", "5").ends == (-1.0, 5.0)
    assert parse("--eta", "0.5").eta == [0.5] and parse("--eta", "0", "1").eta == [0.0, 1.0]


@pytest.mark.parametrize("argv, culprit", [
    (["--bach-size", "8"], "--bach-size"),
    (["--batch", "8"], "--batch"),  # an abbreviation: another flag may begin like it tomorrow
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
])  # fmt: skip
def test_bad_flags_end_the_program_with_one_line(argv, culprit, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*argv)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert err.startswith("error: ") and culprit in err and err.count("\n") == 1 and err.endswith("\n")


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0 and "What the program does." in text
    lines = {part.split()[0]: part for part in text.split(" --")[1:]}
    assert "INT completions a step (default: 64)" in lines["batch-size"]
    assert "FLOAT peak learning rate (default: 1e-05)" in lines["lr"]
    assert "{fixed,ema} what the KL is measured from (default: fixed)" in lines["anchor"]
    assert "INT seed of everything (default: 0)" in lines["seed"]
    assert "FLOAT FLOAT lower and upper end" in lines["ends"]
    assert all("default" not in lines[name] for name in ("out", "mu", "ends", "resume"))


def test_a_user_error_ends_the_program_with_one_line(capsys):
    with pytest.raises(SystemExit) as exit, one_line_errors():
        require(False, "--lr 0: expected a number\n  above 0")
    assert exit.value.code == 2 and capsys.readouterr().err == "error: --lr 0: expected a number above 0\n"


def test_an_interrupt_ends_the_program_without_a_traceback():
    with pytest.raises(SystemExit) as exit, one_line_errors():
        raise KeyboardInterrupt
    assert exit.value.code == 130


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        1 / 0
    require(True, "nothing")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_runs_are_numbered_by_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [str(new_run("", kind)) for kind in ("rm", "rm", "policy", "rm")]
    assert runs == ["runs/rm-1", "runs/rm-2", "runs/policy-1", "runs/rm-3"]
    for name in ("rm-9", "rm-10", "rm-old", "policy-x-30"):
        (tmp_path / "runs" / name).mkdir()
    assert str(new_run("", "rm")) == "runs/rm-11", "by number: rm-9 sorts behind rm-10"
    assert (tmp_path / "runs" / "rm-11").is_dir()


def test_an_occupied_folder_is_refused(tmp_path):
    assert new_run(f"{tmp_path}/a/b", "rm") == tmp_path / "a" / "b"
    assert new_run(f"{tmp_path}/a/b", "rm") == tmp_path / "a" / "b", "an empty folder is free"
    (tmp_path / "a" / "b" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"--out {tmp_path}/a/b: holds another run"):
        new_run(f"{tmp_path}/a/b", "rm")
    with pytest.raises(UserError, match="cannot be used"):
        new_run(f"{tmp_path}/a/b/config.json", "rm")


def test_the_config_file_tells_what_ran(tmp_path):
    write_config(tmp_path, Config(lr=0.5), torch.device("cpu"), torch.bfloat16)
    ran = json.loads((tmp_path / "config.json").read_text())
    assert ran["lr"] == 0.5 and ran["device"] == "cpu" and ran["dtype"] == "bfloat16"
    assert ran["versions"]["torch"] == torch.__version__ and ran["argv"]


def test_a_run_is_resumed_with_its_own_flags(tmp_path):
    config = Config(out=str(tmp_path), lr=0.5, ends=(1.0, 2.0))
    write_config(tmp_path, config, torch.device("cpu"), torch.float32)
    assert resumed_run(str(tmp_path), dataclasses.replace(config, resume=True)) == tmp_path
    with pytest.raises(UserError, match="ran with --batch-size 64, now 8"):
        resumed_run(str(tmp_path), dataclasses.replace(config, batch_size=8))
    with pytest.raises(UserError, match="no run at --out"):
        resumed_run(f"{tmp_path}/other", config)


def test_each_metrics_line_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.write(step, {"loss": step / 2})
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(row["step"], row["loss"]) for row in rows] == [(s, s / 2) for s in range(1, step + 1)]
    assert 0 <= rows[0]["seconds"] <= rows[1]["seconds"] < 60


def test_numbers_that_json_lacks_are_null(tmp_path):
    MetricsLog(tmp_path).write(1, {"loss": math.nan, "lr": math.inf, "kl": -math.inf, "length": 3, "note": "x"})
    refuse = lambda name: pytest.fail(f"{name} is not JSON")  # noqa: E731
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (row["loss"], row["lr"], row["kl"], row["length"], row["note"]) == (None, None, None, 3, "x")


# --- device and precision --------------------------------------------------------------------------------------------


def test_a_device_is_picked_with_a_reason():
    assert pick_device("cpu") == (torch.device("cpu"), "as asked")
    device, reason = pick_device("auto")
    assert (device.type == "cuda") == torch.cuda.is_available() and reason.startswith("auto: ")


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"^--device {name}: cannot be used .*try auto or cpu$"):
        pick_device(name)


@pytest.mark.parametrize("able", [True, False])
def test_precision_is_bfloat16_where_cuda_has_it(able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype("auto", cpu) == pick_dtype("float32", cuda) == torch.float32
    assert pick_dtype("auto", cuda) == (torch.bfloat16 if able else torch.float32)
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_products_in_the_dtype_asked_for(dtype, device):
    with autocast(device, dtype):
        assert (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype == dtype


def test_the_learning_rate_warms_up_linearly():
    assert [warmup_factor(step, 4) for step in (1, 2, 3, 4, 5, 100)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_factor(1, 0) == 1.0
