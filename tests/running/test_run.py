"""Runs get folders of their own, and a metrics log survives what happens to its run."""

import dataclasses
import importlib
import json
import math
import os
import re
import signal
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_runs import run_policy

import train_policy
from minalign.models.precision import autocast
from minalign.running.device import pick_device, pick_dtype
from minalign.running.errors import UserError, one_line_errors, require
from minalign.running.logs import MetricsLog, open_report
from minalign.running.optimizer import warmup_factor
from minalign.running.run import Run, open_run
from minalign.running.run_folder import claimed_folder


@dataclass
class Config:
    out: str = ""
    batch_size: int = 64
    lr: float = 1e-5
    mu: float | None = None
    anchor: str = "fixed"
    ends: tuple[float, float] | None = None
    resume: bool = False
    seed: int = 0
    eta: list[float] | None = None


def resumed_run(out, config):
    """The folder in which --resume goes on."""
    config = dataclasses.replace(config, out=out, resume=True)
    with claimed_folder(config, "") as (folder, _):
        return folder


def write_config(folder, config, dtype=torch.float32):
    Run(folder, config, torch.device("cpu"), dtype).write_config()


def test_a_user_error_ends_the_program_with_one_line(capsys):
    with pytest.raises(SystemExit) as exit, one_line_errors():
        require(False, "--lr 0: expected a number\n  above 0")
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: --lr 0: expected a number above 0\n"


def test_an_interrupt_ends_the_program_without_a_traceback():
    with pytest.raises(SystemExit) as exit, one_line_errors():
        raise KeyboardInterrupt
    assert exit.value.code == 130


def test_sigterm_ends_the_program_as_ctrl_c_does(capsys):
    """Also while models load, before a loop catches it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exit, one_line_errors():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exit.value.code == 130 and capsys.readouterr().err == "stopped: by SIGTERM\n"


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        _ = 1 / 0
    require(True, "nothing")


# --- runs


def new_run(out, kind):
    """The folder of a run that began, and was killed."""
    with claimed_folder(Config(out=out), kind) as (folder, _):
        (folder / "begun").touch()
    return folder


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
    write_config(tmp_path, Config(lr=0.5), torch.bfloat16)
    ran = json.loads((tmp_path / "config.json").read_text())
    assert ran["lr"] == 0.5 and ran["device"] == "cpu" and ran["dtype"] == "bfloat16"
    assert ran["versions"]["torch"] == torch.__version__ and ran["argv"]


def test_a_run_is_resumed_with_its_own_flags(tmp_path, capsys):
    config = Config(out=str(tmp_path), lr=0.5, ends=(1.0, 2.0))
    write_config(tmp_path, config)
    assert resumed_run(str(tmp_path), dataclasses.replace(config, resume=True)) == tmp_path
    with pytest.raises(UserError, match="ran with --batch-size 64, now 8"):
        resumed_run(str(tmp_path), dataclasses.replace(config, batch_size=8))
    # a job script's first try: nothing to resume
    assert resumed_run(f"{tmp_path}/other", config) == tmp_path / "other"
    assert "no run in" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume needs --out"):
        resumed_run("", config)


def test_each_metrics_line_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.write(step, {"loss": step / 2})
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        expected = [(s, s / 2) for s in range(1, step + 1)]
        assert [(row["step"], row["loss"]) for row in rows] == expected
    assert 0 <= rows[0]["seconds"] <= rows[1]["seconds"] < 60


def test_numbers_that_json_lacks_are_null(tmp_path):
    written = {"loss": math.nan, "lr": math.inf, "kl": -math.inf, "length": 3, "note": "x"}
    MetricsLog(tmp_path).write(1, written)

    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [row[name] for name in written] == [None, None, None, 3, "x"]


# --- device and precision


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
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype("auto", cpu) == pick_dtype("float32", cuda) == torch.float32
    assert pick_dtype("auto", cuda) == (torch.bfloat16 if able else torch.float32)
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_runs_products_in_the_dtype_asked_for(dtype, device):
    with autocast(device, dtype):
        assert (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype == dtype


def test_the_learning_rate_warms_up_linearly():
    factors = [warmup_factor(step, 4) for step in (1, 2, 3, 4, 5, 100)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_factor(1, 0) == 1.0


# --- --report


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_report_that_is_not_installed_is_a_line(name, tmp_path, monkeypatch):
    """Also where a folder of its logs lies there, which Python would import as a package."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    Path(name).mkdir()
    importlib.invalidate_caches()
    with pytest.raises(
        UserError, match=f"--report {name}: it is not installed: pip install {name}"
    ):
        with open_run(train_policy.Config(report=name), "policy"):
            pass
    assert os.listdir(tmp_path) == [name]


def test_tensorboard_gets_every_metric(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_report("tensorboard", tmp_path, 0, {}) as report:
        log = MetricsLog(tmp_path, 0, report)
        log.write(1, {"reward": 0.5})
        log.write(2, {"reward": 0.75})
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("reward")] == [(1, 0.5), (2, 0.75)]


@pytest.fixture
def reports(monkeypatch):
    """Stand-ins for wandb and trackio, with the calls that both document: init, log, finish.

    Real ones were tried by hand: neither is among the packages of the tests.
    """
    made, active = [], []

    class Report:
        def __init__(self, *, project, name, config, resume, **own):
            assert not active, "the report before has not ended"
            assert project == "minalign" and resume == "allow"
            self.name, self.config, self.own, self.rows = name, config, own, []
            made.append(self)
            active.append(self)

        def log(self, metrics, step=None):
            assert active == [self]
            self.rows.append({"step": step, **metrics})

    for name in ("wandb", "trackio"):
        module = types.ModuleType(name)
        module.init, module.finish = Report, active.clear
        monkeypatch.setitem(sys.modules, name, module)
    yield made
    assert not active


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]


def test_a_report_has_what_metrics_jsonl_has_and_goes_on_with_the_run(tmp_path, reports):
    for steps in (1, 2):
        run_policy(tmp_path / "run", report="wandb", steps=steps, resume=steps == 2)
    first, then = reports
    assert first.rows + then.rows == logged(tmp_path / "run") and len(then.rows) == 1
    assert first.config["steps"] == 1 and first.config["report"] == "wandb"
    assert first.own == then.own == {"id": first.name, "dir": str(tmp_path / "run")}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_each_run_has_a_report_of_its_own(tmp_path, reports, name):
    """Also where folders have like names, or a run begins anew; and one ends before the next."""
    (tmp_path / "a b").mkdir()
    (tmp_path / "a-b").mkdir()
    for folder, done in (("a b", 0), ("a-b", 0), ("a b", 3), ("a b", 0), ("a b", 3)):
        with open_report(name, tmp_path / folder, done, {"steps": 9}) as report:
            report({"reward": 0.5}, done + 1)
    names = [report.name for report in reports]
    assert names[0] == names[2] and names[3] == names[4] and len(set(names)) == 3
    assert all(re.fullmatch(r"[\w-]+-a-b-[0-9a-f]{8}", name) for name in names)
    assert [report.rows[0]["step"] for report in reports] == [1, 1, 4, 1, 4]


def test_a_report_ends_with_a_run_that_fails(tmp_path, reports):
    with pytest.raises(ZeroDivisionError):
        with open_report("wandb", tmp_path, 0, {}):
            _ = 1 / 0


def test_a_report_that_cannot_be_begun_is_a_line(tmp_path, monkeypatch, reports):
    def refuse(**_):
        raise RuntimeError("no API key\nsee the manual")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(UserError, match="^--report wandb: no API key: log in there, .* leave"):
        with open_report("wandb", tmp_path, 0, {}):
            pytest.fail("it has begun")


def test_the_commit_that_ran_is_written_down(tmp_path):
    write_config(tmp_path, Config())
    revision = json.loads((tmp_path / "config.json").read_text())["git"]
    assert revision is None or re.fullmatch("[0-9a-f]{40}", revision)
