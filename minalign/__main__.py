"""Tools beside the three scripts: python -m minalign TOOL, as listed here."""

import importlib
import sys

from . import __version__
from .running.errors import one_line_errors

TOOLS = {
    "generate": "completions of a policy, from prompts in a file or typed in",
    "score": "rewards of texts in a file",
    "evaluate": "policies compared on the same held-out prompts by a reward model",
    "judge": "two policies compared, pair by pair, by a language model as judge",
    "plot": "figures of runs",
    "merge": "saved models merged by their task vectors (WARP)",
    "sweep": "runs of a script for several values of its flags, a table and a figure",
}


@one_line_errors()
def main() -> None:
    """Run the tool that the first argument names.

    An unknown name ends the program with one line and exit status 2.
    """
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print("usage: minalign TOOL [FLAGS]    (minalign TOOL --help lists them)\n")
        print("\n".join(f"  {tool:10}{what}" for tool, what in TOOLS.items()))
    elif name == "--version":
        print(f"minalign {__version__}")
    elif name not in TOOLS:
        print(f"error: no tool {name!r:.40}: expected one of {', '.join(TOOLS)}", file=sys.stderr)
        raise SystemExit(2)
    else:
        importlib.import_module(f"minalign.tools.{name}").main(argv)


if __name__ == "__main__":
    main()
