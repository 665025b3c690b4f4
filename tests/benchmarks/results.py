"""Results of benchmarks: the file that keeps them, the table and the figure that are made of them.

A result is what one side took at one shape on one device: benchmark, device, shape, machine, work,
who, seconds and peak (medians; bytes, None where not kept), ratios (seconds through those of the
work's first side, round by round, sorted), rounds, floor (seconds; the first side's, where known)
and facts. In facts, "spent" says where the seconds of a step go, in hundredths.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

PACKAGES = ("torch", "transformers", "trl", "mergekit")
FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16")  # flags of a processor
SAME = ("benchmark", "device", "shape")  # a run replaces all results that have these in common
MARKS = ("<!-- results: made by tests/benchmarks/all.py -->\n", "<!-- end of results -->\n")
MEASURED_FLOORS = {"products", "read and write"}  # sides that no way can do without
WIDEST = 4.0  # where bars end: longer ones would make the others unreadable


def machine(device: str) -> str:
    """What figures depend on: the device, threads, versions."""
    import torch

    if device == "cuda":
        what = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
        flags = [flag for flag in FAST_BFLOAT16 if flag in facts.get("flags", "").split()]
        name, fast = facts.get("model name", platform.machine()), " and ".join(flags)
        what = f"{name}, {os.cpu_count()} cores with {fast or 'no fast bfloat16'}, "
        what += f"{torch.get_num_threads()} threads"
    for package in PACKAGES:
        try:
            what += f", {package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            what += f", no {package}"
    return what


def store(results: list[dict], path: Path) -> None:
    """Put results of one run in the place of those that the file holds of the same kind."""
    old = json.loads(path.read_text()) if path.exists() else []
    kept = [one for one in old if any(one[key] != results[0][key] for key in SAME)]
    rows = sorted(
        kept + results, key=lambda one: (one["benchmark"], one["device"], "SML".find(one["shape"]))
    )
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def spread(ratios: list[float]) -> str:
    """The median and the range of sorted ratios."""
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}" if ratios else "-"
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


def groups(results: list[dict], keys: tuple[str, ...]) -> list[list[dict]]:
    """Results that have these keys in common, in the order in which the first of them come."""
    found = {}
    for result in results:
        found.setdefault(tuple(result[key] for key in keys), []).append(result)
    return list(found.values())


def which(result: dict) -> str:
    """The name of a work."""
    work = f", {result['work']}" if result["work"] else ""
    return f"`{result['benchmark']}.py` {result['shape']}{work}"


def table(results: list[dict]) -> str:
    """Markdown: for each machine what it is, and a table with a line per side."""
    text = ""
    for on_machine in groups(results, ("device", "machine")):
        text += f"{on_machine[0]['machine']}:\n\n"
        text += "| benchmark | side | seconds | MiB | times the first | floor, seconds |\n"
        text += "|---|---|---|---|---|---|\n"
        for of_work in groups(on_machine, (*SAME, "work")):
            for i, one in enumerate(of_work):
                floor = f"{one['floor']:.2g}" if "floor" in one else ""
                ratio = spread(one["ratios"]) if i else ""
                memory = "" if one["peak"] is None else f"{one['peak'] / 2**20:.0f}"
                numbers = [f"{one['seconds']:.3g}", memory, ratio, floor]
                text += "| " + " | ".join(["" if i else which(one), one["who"], *numbers]) + " |\n"
        text += "\n"
        for one in on_machine:
            if spent := one["facts"].get("spent"):
                parts = ", ".join(f"{part} {share}%" for part, share in spent.items())
                text += f"- {which(one)}, {one['who']}: {parts}\n"
        text = text.rstrip("\n") + "\n\n"
    return text


def write_table(results: list[dict], path: Path) -> None:
    """Put the table between the two marks of a page."""
    page = path.read_text()
    if any(page.count(mark) != 1 for mark in MARKS):
        raise SystemExit(f"{path}: expected each of these lines once:\n{''.join(MARKS)}")
    (before, rest), end = page.split(MARKS[0]), MARKS[1]
    path.write_text(f"{before}{MARKS[0]}\n{table(results)}{end}{rest.split(end)[1]}")


def figure(results: list[dict], path: Path) -> None:
    """Horizontal bars for each work of ours: ours, the peers, the floor, all in times of ours.

    Works whose first side is not "ours", as those of growth.py, are left out.
    """
    from minalign.tools.figures import BLUE, GREY, ORANGE, STYLE, plt

    plt.rcParams.update(STYLE)
    works = [one for one in groups(results, ("machine", *SAME, "work")) if one[0]["who"] == "ours"]
    bars = []  # label of a work, what a bar is, its length, its colour
    for own, *others in works:
        label = " ".join([own["benchmark"], own["shape"], own["work"]])
        label += "  (GPU)" if own["device"] == "cuda" else ""
        bars.append((label, f"{own['seconds']:.2g} s", 1.0, BLUE))
        for one in others:
            if one["ratios"]:
                ratio = statistics.median(one["ratios"])
                colour = GREY if one["who"] in MEASURED_FLOORS else ORANGE
                bars.append(("", f"{one['who']} {ratio:.2f}", ratio, colour))
        if "floor" in own:
            ratio = own["floor"] / own["seconds"]
            bars.append(("", f"floor {ratio:.2f}", ratio, GREY))
    figure, axes = plt.subplots(figsize=(7, 1 + 0.14 * (len(bars) + len(works))))
    place, ticks = 0.0, {}
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for label, text, length, colour in bars:
        place += 1.8 if label else 1.0
        if label:
            ticks[place] = label
        axes.barh(place, min(length, WIDEST), 0.85, color=colour)
        axes.text(min(length, WIDEST) + 0.03, place, text, va="center", fontsize=7, bbox=behind)
    axes.axvline(1, color=BLUE, linewidth=0.6)
    axes.set(
        ylim=(place + 1, 0.8),
        xlim=(0, 1.2 * min(max((bar[2] for bar in bars), default=1.0), WIDEST)),
    )
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_xlabel(
        f"seconds in times of minalign's (blue);\npeers orange, floors grey; bars end at {WIDEST:g}"
    )
    figure.savefig(path)
    plt.close(figure)
