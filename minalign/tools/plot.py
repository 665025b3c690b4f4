"""Figures of runs, from the command line (with matplotlib: pip install matplotlib).

    # training curves, and reward against KL
    python -m minalign plot runs/policy-1 runs/policy-2 --out fig.png
    # loss, accuracy and calibration
    python -m minalign plot runs/rm-1 runs/rm-2 --out rm.pdf
    # the KL-reward plane of one WARP run
    python -m minalign plot runs/warp-1 --out front.png
    python -m minalign plot runs/warp-1 runs/warp-2 runs/policy-1 --out fronts.png
    # three seeds of a policy, a WARP front, and the best of n of `evaluate --best-of`
    python -m minalign plot runs/policy-1 runs/policy-2 runs/policy-3 runs/warp-1 \\
        runs/evaluation-1 --out fronts.png

Runs that share all flags but the seed become one line, their mean, in a band from the lowest to the
highest of them. In the KL-reward plane both are taken at equal KL, over the KLs that all of them
reach.
"""

from dataclasses import dataclass
from pathlib import Path

from ..running.errors import UserError, require
from ..running.files import require_writable
from ..running.flags import flag, parse_flags
from .logged import group_runs, read_run


@dataclass
class Config:
    """Which runs, and where to."""

    runs: list[str] | None = flag(
        None,
        "folders of train_policy.py, train_rm.py, warp.py or evaluate --best-of",
        positional=True,
    )
    out: str = flag(
        "figure.png", "file for the figure, .png, .pdf or .svg; an older one is overwritten"
    )


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, read the runs, draw."""
    config = parse_flags(Config, __doc__, argv, "minalign plot")
    out = Path(config.out)
    require(
        out.suffix in (".png", ".pdf", ".svg"),
        f"--out {out}: expected a name that ends in .png, .pdf or .svg",
    )
    require(out.parent.is_dir(), f"--out {out}: there is no folder {out.parent}: make it first")
    require_writable(out, overwrite=True)
    runs = [read_run(path) for path in config.runs]
    groups = group_runs(runs)
    try:
        from .figures import plot_front, plot_groups
    except ImportError as error:
        raise UserError(f"figures need matplotlib ({error}): pip install matplotlib") from error
    if len(runs) == 1 and runs[0].kind == "warp":
        plot_front(runs[0].results, out)
    else:
        plot_groups(groups, out)
    counts = [f"{len(runs)} run{'s' * (len(runs) > 1)}"]
    counts += [f"{len(groups)} line{'s' * (len(groups) > 1)}"]
    print(f"{', '.join(counts)}: {out}")
