"""What README and docs say is so: the loop, files, names, links, commands, the page that runs."""

import ast
import importlib
import json
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest

import train_policy
import train_rm
import warp
from minalign.running.flags import parse_flags
from minalign.tools import plot

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"]
TEXT = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
SCRIPTS = {"train_rm.py": train_rm, "train_policy.py": train_policy, "warp.py": warp}
CODE = [*ROOT.glob("*.py"), *ROOT.glob("minalign/**/*.py"), *ROOT.glob("docs/*.py")]


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_readme_is_one_page():
    text = TEXT["README.md"]
    assert len(text.splitlines()) <= 140 and len(text.split()) <= 1200


def test_the_loop_in_the_readme_is_the_one_that_runs():
    """All lines between two `...` stand in train_policy.py, one after the other, in this order."""
    quoted = next(block for block in blocks(TEXT["README.md"], "python") if "run.steps" in block)
    source = (ROOT / "train_policy.py").read_text()
    place = 0
    for part in re.split(r"^ *\.\.\.\n", quoted, flags=re.MULTILINE):
        part = "".join(f"    {line}\n" if line else "\n" for line in part.strip("\n").split("\n"))
        found = source.find(part, place)
        assert found >= 0, f"not in train_policy.py:\n{part}"
        place = found + len(part)
    for line in ("sampler.sample(", "kl_penalized_rewards(", ".backward()", "optimizer.step()"):
        assert line in quoted


def words_of_the_code():
    """Names of every kind, and texts that are one word: columns, metrics, choices of a flag."""
    words = {path.stem for path in CODE}
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = (getattr(node, field, None) for field in ("name", "id", "arg", "attr", "value"))
            words.update(part for part in parts if isinstance(part, str))
    words |= {f"eval_{word}" for word in words}  # a metric on held-out prompts
    return words | {word.replace("chosen", "rejected") for word in words}


WORDS = words_of_the_code()
SOURCE = "".join(path.read_text() for path in [*CODE, *ROOT.glob("tests/**/*.py")])
FLAGS = set(re.findall(r'"(--[a-z-]+)"', SOURCE))  # of argparse, and --help
FLAGS |= {  # of dataclasses
    f"--{field.replace('_', '-')}"
    for field in re.findall(r"^    (\w+): .* = flag\(", SOURCE, flags=re.MULTILINE)
}


def flags_of(text):
    return re.findall(r"(?<!\S)--[a-z-]+", text)


def is_there(path):
    """Whether a file or folder is in the repository, or one that the code writes."""
    places = (".", "minalign", "tests/benchmarks", "tests/experiments/reference")
    return any((ROOT / place / path).exists() for place in places) or path.rstrip("/") in WORDS


def is_defined(name):
    """Whether a module has it. Of an object, as in `optimizer.step`, the parts must be words."""
    if name.split(".")[0] not in ("minalign", "train_rm", "train_policy", "warp"):
        return WORDS.issuperset(name.split("."))
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", TEXT)
def test_what_is_named_exists(page):
    """In backticks: flags, files and folders, and names, alone, after a dot or called."""
    prose = re.sub(r"^```.*?^```", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", prose):
        if not span.startswith(("pip ", "ruff ")):
            assert FLAGS.issuperset(flags_of(span)), f"{page}: {span}"
        if re.fullmatch(r"[\w./-]+(/|\.(py|md|toml|cff|txt|jsonl?|csv))", span):
            assert is_there(span), f"{page}: {span}"
        elif named := re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*)(\(.*\))?", span):
            assert is_defined(named[1]), f"{page}: {span}"


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page}: {target}"


def commands(text):
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.partition("  #")[0].strip().removesuffix("&&").strip()
            if line and not line.startswith("#"):
                yield line


@pytest.mark.parametrize("page", TEXT)
def test_commands_have_flags_that_exist_and_go_together(page, monkeypatch):
    """Every command of scripts and tools, as far as it needs neither a model nor data."""
    for command in commands(TEXT[page]):
        words = shlex.split(re.sub(r" --config \S+", "", command))  # a run's, which is not there
        if words[0] == "torchrun":
            monkeypatch.setenv("WORLD_SIZE", words[2])
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            words = ["python", *words[script:]]
        if words[:3] == ["python", "-m", "minalign"]:
            tool = importlib.import_module(f"minalign.tools.{words[3]}")
            if words[3] == "sweep":  # it asks the script
                monkeypatch.chdir(ROOT)
                tool.plan(*tool.split_command(words[4:]))
                continue
            config = parse_flags(tool.Config, "", words[4:])
            if hasattr(tool, "resolve") and words[3] != "judge":
                tool.resolve(config)  # judge's looks for files
        elif words[0] == "python" and words[1] in SCRIPTS:
            script = SCRIPTS[words[1]]
            script.resolve(script.parse_flags(script.Config, "", words[2:]))
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).exists(), f"{page}: {command}"
            assert FLAGS.issuperset(flags_of(command)), f"{page}: {command}"
        else:
            assert words[:2] in (["python", "-m"], ["pip", "install"]), f"{page}: {command}"
        monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_the_notebook_is_kept_without_outputs_and_its_commands_are_flags_that_exist():
    """That it runs, .ci/run tests."""
    cells = json.loads((ROOT / "docs/minalign.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    source = "\n".join("".join(cell["source"]) for cell in code)
    calls = re.findall(r'(train_rm|train_policy|warp|plot)\.main\(\s*"([^"]*)"\.split\(\)', source)
    assert len(calls) == source.count(".main(") > 5
    for name, line in calls:
        if name == "plot":
            parse_flags(plot.Config, "", line.split())
        else:
            script = SCRIPTS[f"{name}.py"]
            words = re.sub(r"--config \S+", "", line).split()
            script.resolve(parse_flags(script.Config, "", words))


def test_the_step_on_one_page_raises_the_reward(tmp_path, monkeypatch):
    """The samples of the last ten steps of docs/one_page.py are better than those of the first ten.

    Its function has at most 36 lines of code.
    """
    monkeypatch.chdir(tmp_path)
    page = runpy.run_path(str(ROOT / "docs/one_page.py"))
    curve = page["train"](steps=40)
    assert sum(curve[-10:]) / 10 > sum(curve[:10]) / 10 + 0.5
    source = (ROOT / "docs/one_page.py").read_text()
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef))
    body = source.splitlines()[function.lineno : function.end_lineno]
    assert len([line for line in body if line.strip() and not line.strip().startswith("#")]) <= 36
