"""Merging two saved models of 135 million float32 parameters with their init.

Ours, mergekit's nuslerp, and reading and writing alone.

    pip install mergekit && python tests/benchmarks/merge.py --shape M

mergekit's nuslerp is spherical interpolation of task vectors, too, but of a row or a tensor, not of
a layer. The work is alike, the result is not. "read and write" loads the inputs through safetensors
and saves one of them: what no merge can avoid. Ours alone waits until the disk has what it wrote.
No side's imports are timed.
"""

import contextlib
import io
import os
import tempfile
import time
from pathlib import Path

from side_by_side import compare, make_model, peak, report

FOLDER = Path(tempfile.gettempdir()) / "minalign-merge-benchmark"


def inputs(shape: str, count: int) -> list[str]:
    """The init and `count` models with other weights, made once.

    What any side would import late is imported here.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    paths = [FOLDER / f"{shape}-{i}" for i in range(count + 1)]
    for i, path in enumerate(paths):
        if not path.exists():
            model, tokenizer = make_model(shape)
            torch.manual_seed(i)
            for parameter in model.parameters() if i else []:
                parameter.data += 1e-3 * torch.randn_like(parameter)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
    for path in paths:
        with open(path / "model.safetensors", "rb") as file:  # into the page cache
            while file.read(2**20):
                pass
    os.sync()
    return list(map(str, paths))


def ours(shape: str, count: int) -> None:
    """python -m minalign merge, without its start-up."""
    import minalign.models.saving  # noqa: F401
    from minalign.tools import merge as merge_folders

    init, *models = inputs(shape, count)
    with tempfile.TemporaryDirectory() as folder:
        before, began = peak(), time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            merge_folders.main(["--init", init, "--models", *models, "--out", f"{folder}/merged"])
        report([time.monotonic() - began], peak() - before)


def mergekit(shape: str, count: int) -> None:
    """run_merge of nuslerp with a base model, without its start-up."""
    import torch  # noqa: F401
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    init, *models = inputs(shape, count)
    merged = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    given = {"merge_method": "nuslerp", "base_model": init, "dtype": "float32", "models": merged}
    config = MergeConfiguration.model_validate(given)
    with tempfile.TemporaryDirectory() as folder:
        before, began = peak(), time.monotonic()
        run_merge(config, f"{folder}/merged", MergeOptions(quiet=True))
        report([time.monotonic() - began], peak() - before)


def read_and_write(shape: str, count: int) -> None:
    """safetensors' load_file of all inputs, save_file of one."""
    from safetensors.torch import load_file, save_file

    paths = inputs(shape, count)
    with tempfile.TemporaryDirectory() as folder:
        before, began = peak(), time.monotonic()
        for path in paths:
            state = load_file(f"{path}/model.safetensors")
            sum(float(tensor.sum()) for tensor in state.values())  # mapped until it is looked at
        save_file(state, f"{folder}/out.safetensors")
        report([time.monotonic() - began], peak() - before)


if __name__ == "__main__":
    sides = {
        "ours": lambda shape: ours(shape, 2),
        "mergekit": lambda shape: mergekit(shape, 2),
        "read and write": lambda shape: read_and_write(shape, 2),
    }

    def floor(shape, work):
        return [(0, 4 * (FOLDER / f"{shape}-0" / "model.safetensors").stat().st_size)]

    compare(__file__, __doc__, sides, floor, shape="M")
