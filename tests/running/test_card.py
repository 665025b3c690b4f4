"""A saved model's card: read by hubs, broken by no name and no text, and true to its run."""

import json
import re
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard

from minalign.running.card import LIMITS, command_of, is_hub_id, model_card, policy_card

HOSTILE = [
    "---",
    "a: b\n---\n# x",
    "```\n# out\n```",
    "| a | b |",
    "<script>alert(1)</script>",
    "é 😀 \u2028 \x1b[31m \x85 \ud800",
    "`` ` ```` `",
    "[x](http://y)",
]


def ran(**changes):
    """What config.json holds."""
    made = dict(
        script="train_policy",
        given={"steps": 3},
        model="",
        dataset="",
        lora_save=None,
        versions={"python": "3.11.7", "torch": "2.13.0"},
        git="0" * 40,
        machine="cpu x86_64, 1 thread",
        dtype="float32",
        fingerprints={"code": "abc", "training data": "def"},
    )
    return made | changes


def card(ran=ran(), task="text-generation", results=None, **parts):  # noqa: B008
    return model_card(ran, "A policy", task, ["reinforce"], results or {}, **parts)


def metadata(text):
    """The front matter, as hubs and PyYAML read it."""
    matter = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1]
    known = yaml.safe_load(matter)
    assert ModelCard(text).data.to_dict() == known
    return known


def blocks(text):
    """The fenced blocks of a text, and what is outside of them, by CommonMark's rule."""
    inside, outside, fence = [], [], None
    for line in text.split("\n"):
        found = re.fullmatch(r"(`{3,})([^`]*)", line)
        if fence is None and found:
            fence = found[1]
            inside.append("")
        elif fence is not None and re.fullmatch(f"`{{{len(fence)},}} *", line):
            fence = None
        elif fence is None:
            outside.append(line)
        else:
            inside[-1] += line + "\n"
    assert fence is None
    return inside, "\n".join(outside)


def headings(text):
    return re.findall(r"^#+ .*", blocks(text)[1], flags=re.M)


def test_hubs_read_what_is_known_and_nothing_else():
    known = {"library_name": "transformers", "tags": ["minalign", "reinforce"]}
    assert metadata(card()) == known | {"pipeline_tag": "text-generation"}
    adapter = ran(model="org/model-1.5", lora_save="adapter", dataset="stanfordnlp/imdb")
    text = card(adapter, "text-classification")
    merge = ran(init="org/m", models=["org/a", "./b", "org/m"])
    assert metadata(card(merge))["base_model"] == ["org/m", "org/a"]
    assert metadata(text) == known | {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "base_model": ["org/model-1.5"],
        "datasets": ["stanfordnlp/imdb"],
    }


@pytest.mark.parametrize("name", ["gpt2", "org/m", "1e5", "no", "null", "org/a.b-c_d", "0x1F"])
def test_a_hub_id_is_a_text_in_the_front_matter(name):
    assert metadata(card(ran(model=name)))["base_model"] == [name]


LOCAL = ["", ".", "runs/a/b", "./x", "/home/alice/m", "~/m", "../m", "a b", "é/m", "x\ny", "a:b"]


@pytest.mark.parametrize("name", LOCAL + HOSTILE)
def test_paths_and_odd_names_are_not_in_the_front_matter(name):
    text = card(ran(model=name, dataset=name, fingerprints={f"start model {name}": "abc"}))
    assert metadata(text).keys() == {"library_name", "pipeline_tag", "tags"}
    assert headings(text) == headings(card()), "nor do they make headings of their own"
    text.encode()


def test_a_folder_with_the_name_of_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/model")
    (tmp_path / "org/model").mkdir(parents=True)
    assert not is_hub_id("org/model")


def test_the_home_folder_names_nobody(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    text = card(ran=ran(fingerprints={"reward /home/alice/rm": "abc"}))
    assert "- reward ~/rm: `abc`" in text and "alice" not in text


@pytest.mark.parametrize("bad", HOSTILE)
def test_no_sample_and_no_metric_breaks_out(bad):
    samples = [{"prompt": bad, "completion": bad, "reward": None}]
    results = {bad: {f"reward {bad}": 0.5, "kl": None}}
    text = card(results=results, samples=samples)
    metadata(text)
    expected = ["How it was made", "What it is made of", "Held-out metrics", "Samples"]
    expected = [f"## {name}" for name in (*expected, "What it is not")]
    assert headings(text) == ["# A policy", *expected]
    rows = [line for line in blocks(text)[1].split("\n") if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4} and len(rows) == 3
    assert "<script" not in re.sub(r"\\.", "", blocks(text)[1])
    assert len(blocks(text)[0]) == 2
    text.encode()


@pytest.mark.parametrize("bad", ["a b", "'", '$(rm -rf "~")', "```", "a\n```\nb", "-x", "é", ""])
def test_the_command_is_the_runs_word_for_word(bad):
    given = {"split": bad, "rm": ["a", bad], "beta": 0.1, "shard": True, "rating_range": (-1, 5)}
    text = card(ran=ran(given=given))
    block = blocks(text)[0][0].removesuffix("\n")
    dash = bad.startswith("-")
    split = [f"--split={bad}"] if dash else ["--split", bad]
    rm = ["--rm=a", f"--rm={bad}"] if dash else ["--rm", "a", bad]
    rest = ["--beta", "0.1", "--shard", "--rating-range", "-1", "5"]
    assert shlex.split(block) == ["python", "train_policy.py", *split, *rm, *rest]


def test_the_command_names_the_launcher_and_the_tool(monkeypatch):
    merge = ran(script="merge", given={"eta": 0.5}, out="a b")
    assert command_of(merge) == "python -m minalign merge --eta 0.5 --out 'a b'"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command_of(ran()) == "torchrun --nproc-per-node 4 train_policy.py --steps 3"
    monkeypatch.setenv("WORLD_SIZE", "8")
    both = "torchrun --nproc-per-node 4 --nnodes 2 train_policy.py --steps 3"
    assert command_of(ran()) == both


def test_a_run_from_python_claims_no_command():
    text = card(ran=ran(given=None, git=None))
    assert "bit for bit" not in text and "```" not in text and "no commit known" in text


def test_the_curve_is_short_and_ends_with_the_model():
    rows = [{"step": n, "loss": 1.0} for n in range(1, 401)]
    for n in range(8, 401, 8):
        rows[n - 1]["eval_reward"] = n / 8
    text = card(results={"start policy": {"reward": 0.0}}, curve=rows)
    curve = text[text.index("## Along the run") : text.index("## What it is not")].split("\n")
    numbers = [float(line.split("|")[2]) for line in curve if re.match(r"\| step \d", line)]
    assert 6 <= len(numbers) <= 12 and numbers[-1] == 50 and numbers == sorted(numbers)
    assert "| start policy | 0.000 |" in text and "| step 400 | 50.000 |" in text
    assert "loss" not in text
    one = card(curve=rows[:8])
    assert one.count("| 1.000 |") == 2 and "It was measured" in one
    none = card(curve=rows[:7])
    assert "|" not in none and "It was not measured." in none


def test_a_policys_card_reads_its_own_part_of_the_logs(tmp_path):
    rows = [{"step": n, "eval_kl_sft": n / 2} for n in range(1, 9)]
    texts = [{"step": n, "prompt": "p", "completion": f"c{n}", "reward": 1.0} for n in range(1, 9)]
    for name, lines in (("metrics", rows), ("samples", texts)):
        text = "\n".join(map(json.dumps, lines)) + '\n{"torn'
        (tmp_path / f"{name}.jsonl").write_text(text)
    text = policy_card(ran(script="warp"), "best", tmp_path, 5, {})
    assert "| step 5 | 2.500 |" in text and "3.000" not in text
    assert [n for n in range(1, 9) if f"p | c{n}" in text] == [3, 4, 5]
    assert metadata(text)["tags"] == ["minalign", "reinforce", "warp"]
    assert "## Along" not in policy_card(ran(), "killed at once", tmp_path / "none", 0, {})


def test_every_kind_of_model_says_what_it_is_not():
    for task, limits in LIMITS.items():
        assert limits in card(task=task)
