"""README.md of a saved model, a card as hubs read it: how it was made, of what, what it is not.

Its text is a function of what config.json holds and of the logs.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import typing
from collections.abc import Sequence
from pathlib import Path

from .errors import one_line, visible
from .flags import words_of
from .logs import rows_until
from .ranks import processes

LIMITS = {  # pipeline tag -> what such a model is not
    "text-generation": "It was moved towards what its reward says, which is not what is true, safe "
    "or wanted: where the two differ, it follows the reward, and a high reward far from the start "
    "policy (`kl_sft`, nats per completion) is a reason to read samples.",
    "text-classification": "Its score says which of two answers to one prompt its training data "
    "would prefer. It is no measure of truth or safety, means little across prompts, and less for "
    "texts unlike its data: longer ones, other formats, or those of a policy trained against it.",
}
MEASURED = "It was measured on held-out prompts of its own data, and nowhere else."

MOST_ROWS = 12  # of the curve
HUB_ID = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"


def model_card(
    ran: dict[str, typing.Any],
    title: str,
    task: str,
    tags: Sequence[str],
    results: dict[str, dict[str, float]],
    curve: Sequence[dict] = (),
    samples: Sequence[dict] = (),
) -> str:
    """The text of a README.md.

    Args:
        ran: what config.json holds, see run.describe, with `fingerprints`.
        title: what the model is, in a few words.
        task: of hubs: text-generation or text-classification.
        tags: of hubs.
        results: name -> held-out metrics, of what the model is held against.
        curve: rows of metrics.jsonl, up to this model. Those with held-out metrics count.
        samples: rows with `reward`, and `prompt` and `completion`, or `text`.
    """
    points = [held_out(row) for row in curve if held_out(row)]
    few = points[:: -math.ceil(len(points) / MOST_ROWS or 1)][::-1]
    compared = [{"": name} | row for name, row in results.items()] + points[-1:]
    sections = {
        "How it was made": how(ran),
        "What it is made of": made_of(ran["fingerprints"]),
        "Held-out metrics": table(compared),
        "Along the run": table(few),
        "Samples": shown(samples),
        "What it is not": f"{LIMITS[task]} {MEASURED if compared else 'It was not measured.'}",
    }
    text = f"{front_matter(ran, task, tags)}\n# {plain(title)}\n"
    return text + "".join(f"\n## {name}\n\n{body}\n" for name, body in sections.items() if body)


def policy_card(ran: dict, title: str, folder: Path, step: int, results: dict[str, dict]) -> str:
    """The card of a policy after `step` steps of the run whose logs are in `folder`."""
    curve, samples = (rows_until(folder / f"{name}.jsonl", step) for name in ("metrics", "samples"))
    tags = ["reinforce"] + ["warp"] * (ran["script"] == "warp")
    return model_card(ran, title, "text-generation", tags, results, curve, samples[-3:])


def front_matter(ran: dict[str, typing.Any], task: str, tags: Sequence[str]) -> str:
    """What hubs read: YAML of names that a hub can know. Local paths are none of its business."""
    library = "peft" if ran.get("lora_save") == "adapter" else "transformers"
    bases = [ran["init"], *ran["models"]] if "init" in ran else [ran["model"]]
    known = {"library_name": library, "pipeline_tag": task, "tags": ["minalign", *tags]}
    known["base_model"] = list(filter(is_hub_id, dict.fromkeys(bases)))
    known["datasets"] = list(filter(is_hub_id, [ran.get("dataset", "")]))
    # JSON of ASCII letters is YAML, whatever YAML would make of a bare 1e5 or no
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in known.items() if value]
    return f"---\n{''.join(lines)}---\n"


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a model or data set on a hub, not a path."""
    path = name[:1] in "./~" or os.path.exists(name)
    return not path and re.fullmatch(HUB_ID, name, re.ASCII) is not None


def how(ran: dict[str, typing.Any]) -> str:
    """The command that repeats the run, the code, its libraries and its machine."""
    versions = ", ".join(f"{name} {version}" for name, version in ran["versions"].items())
    commit = f"commit {ran['git']}" if ran["git"] else "no commit known"
    on = f"minalign ({commit}), {versions}; {ran['machine']}, {ran['dtype']}."
    if ran["given"] is None:
        return f"Started from Python: the run's config.json has its flags.\n\n{on}"
    same = "With the same versions on the same machine, this repeats it bit for bit:"
    return f"{same}\n\n{fenced(command_of(ran), 'bash')}\n\n{on}"


def command_of(ran: dict[str, typing.Any]) -> str:
    """The command line of a run, quoted for a shell, without --resume, and --out but of a tool."""
    words, script = ["python", f"{ran['script']}.py"], ran["script"]
    if processes() > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
        nodes = ["--nnodes", str(processes() // local)] if processes() > local else []
        words = ["torchrun", "--nproc-per-node", str(local), *nodes, f"{script}.py"]
    out = {}
    if (Path(__file__).parents[1] / "tools" / f"{script}.py").exists():
        words, out = ["python", "-m", "minalign", script], {"out": ran["out"]}  # it has no default
    return shlex.join([*words, *words_of(ran["given"] | out)])


def made_of(fingerprints: dict[str, str]) -> str:
    """Code, data and models, with their hashes."""
    home = os.path.expanduser("~/")
    names = {name: name.replace(home, "~/") if home != "/" else name for name in fingerprints}
    return "\n".join(f"- {plain(names[name])}: `{fingerprints[name]}`" for name in names)


def held_out(row: dict) -> dict[str, typing.Any]:
    """The step and the metrics on held-out data of a row of metrics.jsonl; {} where it has none."""
    found = {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_")}
    return {"": f"step {row['step']}"} | found if found else {}


def table(rows: Sequence[dict]) -> str:
    """A markdown table of rows of names and numbers, None among them. "" of no rows."""

    def cell(value: object) -> str:
        return f"{value:z.3f}" if isinstance(value, float) else plain(str(value))

    names = dict.fromkeys(name for row in rows for name in row if name not in ("step", "eta"))
    lines = [map(plain, names), ["---"] * len(names)]
    lines += [[cell(row.get(name, "")) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def shown(samples: Sequence[dict]) -> str:
    """Samples as they are, in a block that no text of theirs can end."""
    parts, what = [], "Held-out texts, of each pair the better one first:"
    for sample in samples:
        text, reward = sample.get("text", "")[:600], sample["reward"]
        if "prompt" in sample:
            what = "Prompt | completion, from the last steps of training:"
            text = f"{sample['prompt'][-300:]} | {sample['completion'][:600]}"
        parts.append(f"reward {math.nan if reward is None else reward:z.2f}\n{text}")
    return "\n\n".join([what, fenced(visible("\n\n".join(parts)))]) if parts else ""


def fenced(text: str, language: str = "") -> str:
    """A block of code. Its fence is longer than any row of backticks in it."""
    fence = "`" * max(3, *(1 + len(run) for run in re.findall("`+", text) or [""]))
    return f"{fence}{language}\n{text}\n{fence}"


def plain(text: str) -> str:
    r"""A stranger's name as one line that is no markdown.

    >>> plain("a|b\n# [c](d)")
    'a\\|b # \\[c\\](d)'
    """
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", one_line(text))
