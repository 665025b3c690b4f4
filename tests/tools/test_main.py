"""python -m minalign TOOL: the tools by their names, and one line where a name is wrong."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import minalign
from minalign import __main__ as command

ROOT = Path(__file__).parents[2]


def run(*argv):
    command = [sys.executable, "-m", "minalign", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_help_names_every_tool_and_imports_nothing_heavy():
    for argv in ([], ["--help"], ["-h"]):
        done = run(*argv)
        assert done.returncode == 0 and not done.stderr
        assert all(f"  {name}" in done.stdout for name in command.TOOLS)
    timed = [sys.executable, *"-X importtime -m minalign".split()]
    done = subprocess.run(timed, capture_output=True, text=True, cwd=ROOT)
    assert "torch" not in done.stderr


def test_version():
    assert run("--version").stdout == f"minalign {minalign.__version__}\n"
    for script in ("train_rm", "train_policy", "warp"):
        with pytest.raises(SystemExit) as exit:
            importlib.import_module(script).main(["--version"])
        assert exit.value.code == 0


def test_an_unknown_tool_is_one_line_with_status_2():
    done = run("generat", "--model", "x")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: no tool 'generat': expected one of generate, ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", command.TOOLS)
def test_every_tool_has_flags_and_answers_help(name, capsys):
    tool = importlib.import_module(f"minalign.tools.{name}")
    with pytest.raises(SystemExit) as exit:
        tool.main(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and f"usage: minalign {name}" in text
    assert f"python -m minalign {name}" in text  # an example


def test_errors_of_a_tool_are_one_line():
    done = run("merge", "--out", "x")
    assert done.returncode == 2 and done.stderr == "error: --init is missing\n"


def test_the_console_script_is_the_same_program():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"minalign": "minalign.__main__:main"}
    # the scripts stay out of site-packages
    assert "py-modules" not in project["tool"]["setuptools"]
