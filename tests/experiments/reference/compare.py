"""Does a new reference run lie in the band of the published one?

    python tests/experiments/reference/compare.py runs/reference/record \\
        tests/experiments/reference/stories260k

Both are records of run.py. Each quantity's mean over the k new seeds is held against the mean of
the n published ones, plus or minus t s sqrt(1/n + 1/k): the 95% prediction interval, with s the
deviation of the published seeds and t Student's quantile for n - 1 degrees of freedom (4.30 for
three seeds). It is never narrower than 0.002 to either side.

A stage (rm, policy, warp, best of n) is outside where more than half of its quantities are, and the
run where a stage is; the exit status is 1 then. By chance one quantity in twenty is outside. Those
of a stage hang together, so that many may be at once: whatever hangs together how, a stage is
outside by chance in at most one run of ten; in one of twenty if its quantities move as one.

Runs with other flags, or whose reward model saw other pairs of tokens, are refused (exit status 2).
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

# Student's t, 97.5%, for 1, 2, ... degrees of freedom; for more than 9 the last, which is wider
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FLOOR = 0.002
SAME_CONTENT = ("rm: training data", "rm: held-out data")


def refusal(new: dict, published: dict) -> str:
    """Why the two cannot be compared, or "": the first flag or data that differ."""
    if len(published["seeds"]) < 2:
        return "the published run has one seed, and no band"
    for stage in published["settings"]:
        ours, theirs = new["settings"].get(stage, {}), published["settings"][stage]
        for name in sorted((ours.keys() | theirs.keys()) - {"seed"}):
            if ours.get(name) != theirs.get(name):
                flag = f"{stage}: --{name.replace('_', '-')}"
                return f"{flag} is {ours.get(name)} here, {theirs.get(name)} in the published run"
    for seed in sorted(new["seeds"].keys() & published["seeds"].keys()):
        ours, theirs = (of["seeds"][seed]["fingerprints"] for of in (new, published))
        for name in sorted(ours.keys() & theirs.keys()):
            if name in SAME_CONTENT and ours[name] != theirs[name]:
                return f"seed {seed}, {name}: other ratings, or another tokenizer"
    return ""


def notes(new: dict, published: dict) -> list[str]:
    """What differs and may move the last digits, or more: versions, machine, prompts, code."""
    found = []
    for name in sorted(new["versions"].keys() | published["versions"].keys()):
        ours, theirs = (of["versions"].get(name) for of in (new, published))
        if ours != theirs:
            found.append(f"{name} {ours} here, {theirs} published")
    if new["machine"] != published["machine"]:
        found.append(f"machine: {new['machine']} here, {published['machine']} published")
    for seed in sorted(new["seeds"].keys() & published["seeds"].keys()):
        ours, theirs = (of["seeds"][seed]["fingerprints"] for of in (new, published))
        names = [name for name in theirs if ours.get(name) != theirs[name]]
        found += [f"seed {seed}: another content of {', '.join(names)}"] if names else []
    return found


def values(record: dict, name: str) -> list[float]:
    """A quantity of every seed; NaN where it is missing."""
    found = [of["measured"].get(name) for of in record["seeds"].values()]
    return [math.nan if value is None else value for value in found]


def band(published: list[float], k: int) -> tuple[float, float]:
    """Where the mean of k new seeds lies in 95 of 100 cases."""
    n = len(published)
    t, middle = T[min(n - 1, len(T)) - 1], statistics.mean(published)
    half = max(FLOOR, t * statistics.stdev(published) * math.sqrt(1 / n + 1 / k))
    return middle - half, middle + half


def equality(new: dict, published: dict) -> list[str]:
    """A line for each seed that both have: how far their numbers are from each other."""
    lines = []
    for seed in sorted(new["seeds"].keys() & published["seeds"].keys()):
        ours, theirs = (of["seeds"][seed]["measured"] for of in (new, published))
        if ours == theirs:
            lines.append(f"seed {seed}: equal to the last digit")
            continue
        gaps = {
            name: abs(ours[name] - theirs[name])
            for name in theirs
            if ours.get(name) is not None and theirs[name] is not None
        }
        name = max(gaps, key=gaps.get, default=None)
        same = sum(gap == 0 for gap in gaps.values())
        largest = f"; the largest difference is {gaps[name]:.2g} ({name})" if gaps else ""
        lines.append(f"seed {seed}: {same} of {len(theirs)} equal to the last digit{largest}")
    return lines


def compare(new: dict, published: dict) -> tuple[list[str], bool]:
    """Lines of a report, and whether the new run lies in the band."""
    k, stages = len(new["seeds"]), {}
    lines = [f"{'':32}{'new':>10}   {'band':>18}"]
    names = dict.fromkeys(name for of in published["seeds"].values() for name in of["measured"])
    for name in names:
        known, ours = values(published, name), values(new, name)
        if not all(map(math.isfinite, known)):
            lines.append(f"{name:32}not finite in the published run: left out")
            continue
        mean, (low, high) = sum(ours) / k, band(known, k)
        inside = low <= mean <= high  # not where it is NaN
        stages.setdefault(name.split(":")[0], []).append(inside)
        says = "in" if inside else "OUT" if math.isfinite(mean) else "OUT (missing)"
        lines.append(f"{name:32}{mean:10.3f}   [{low:7.3f}, {high:7.3f}] {says}")
    extra = {name for of in new["seeds"].values() for name in of["measured"]} - names.keys()
    lines += [f"not in the published run: {', '.join(sorted(extra))}"] if extra else []
    lines += ["", *notes(new, published), *equality(new, published)]
    count, out = (sum(map(of, stages.values())) for of in (len, lambda of: of.count(False)))
    lines.append(f"{out} of {count} quantities are outside; {count / 20:.1f} would be by chance")
    failed = [stage for stage, inside in stages.items() if inside.count(False) > len(inside) / 2]
    if failed:
        lines.append(f"OUTSIDE the band: more than half of {', '.join(failed)}")
    else:
        lines.append("in the band: of no stage more than half is outside")
    return lines, not failed


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("new", type=Path, help="record/ of a run")
    parser.add_argument("published", type=Path, help="the published record")
    given = parser.parse_args(argv)
    paths = (given.new / "results.json", given.published / "results.json")
    new, published = (json.loads(path.read_text()) for path in paths)
    why = refusal(new, published)
    if why:
        print(f"not comparable: {why}")
        return 2
    lines, inside = compare(new, published)
    print("\n".join(lines))
    return 0 if inside else 1


if __name__ == "__main__":
    sys.exit(main())
