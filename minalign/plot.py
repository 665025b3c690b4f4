"""Figures, with matplotlib (optional: pip install matplotlib)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: works without a screen
import matplotlib.pyplot as plt

BLUE, ORANGE, GREY = "#1f5fa8", "#d1620c", "#8a8a8a"


def plot_front(results: dict, path: Path) -> None:
    """The KL-reward plane of a WARP run: training curves, merges and the front; gold reward beside it where known.

    `results` is what front.json holds.
    """
    panels = [("reward", "reward model's score")]
    if "gold" in results["front"][0]:
        panels.append(("gold", "gold reward (the truth)"))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.4), squeeze=False, layout="constrained")
    start = results["front"][0] if results["front"][0]["eta"] == 0 else None
    for axis, (key, label) in zip(axes[0], panels):
        for i, run in enumerate(results["runs"]):
            points = run["curve"]
            if run["iteration"] == 1 and start:
                points = [start, *points]
            axis.plot([p["kl_sft"] for p in points], [p[key] for p in points], color=GREY, lw=1, alpha=0.7,
                      label="policies in training" if i == 0 else None)  # fmt: skip
        front = results["front"]
        axis.plot([p["kl_sft"] for p in front], [p[key] for p in front], "o-", color=BLUE, ms=4, lw=2,
                  label="front: start policy to last merge")  # fmt: skip
        for point in front:
            if point["eta"] in (0, 0.5, 1):
                name = {0: "start policy", 1: "$\\eta=1$"}.get(point["eta"], f"$\\eta={point['eta']:g}$")
                axis.annotate(
                    name, (point["kl_sft"], point[key]), xytext=(7, -11), textcoords="offset points", color=BLUE, fontsize=9
                )
        for merge in results["merges"]:
            axis.plot(merge["kl_sft"], merge[key], "D", color=ORANGE, ms=7, zorder=3,
                      label="merge of an iteration" if merge["iteration"] == 1 else None)  # fmt: skip
            axis.annotate(f"{merge['iteration']}", (merge["kl_sft"], merge[key]), xytext=(-4, 8),
                          textcoords="offset points", color=ORANGE, fontsize=9)  # fmt: skip
        axis.set_xlabel("KL(policy || start), nats per completion")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, loc="lower right", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
