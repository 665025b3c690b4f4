"""Whatever goes wrong in loading a model, in one line that is true and names the file at fault."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from ..running.errors import UserError, is_out_of_memory
from .folders import first_line

READ_AS_JSON = (
    "config.json generation_config.json adapter_config.json tokenizer_config.json tokenizer.json "
    "special_tokens_map.json added_tokens.json vocab.json model.safetensors.index.json"
).split()


@contextlib.contextmanager
def loading_errors(where: str, folder: str, part: str) -> Iterator[None]:
    """Whatever is raised inside becomes a UserError that names the model and the file at fault.

    Args:
        where: what the message begins with: the flag and its value.
        folder: where the files are.
        part: what is read, where no file can be found to be broken.
    Raises:
        UserError: anything but Ctrl-C and running out of memory.
    """
    try:
        yield
    except BaseException as error:  # the panics of tokenizers are not Exceptions
        named = isinstance(error, UserError) and str(error).startswith(where)
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))
        if named or stopped or is_out_of_memory(error):
            raise
        raise UserError(f"{where}: cannot be loaded: {_reason(error, folder, part)}") from error


def _reason(error: BaseException, folder: str, part: str) -> str:
    """What is true of an error in loading, in one line."""
    reason, text = first_line(error).rstrip("."), str(error)
    if isinstance(error, UserError):
        return reason
    if "trust_remote_code" in text:
        return (
            "it needs code of its own, which is never run: take a model that transformers itself "
            "knows"
        )
    if not os.path.isdir(folder):
        return f"{reason}: without a network, give the folder of a local copy"
    if broken := _broken_file(Path(folder)):
        return broken
    if part == "config.json" and not (Path(folder) / part).is_file():
        return f"no config.json in {folder}"
    if "backend tokenizer" in text and not (Path(folder) / "tokenizer.json").is_file():
        part, reason = "the tokenizer", f"no tokenizer.json in {folder}"
    lacking = not (is_sentencepiece_available() and is_protobuf_available())
    for file in Path(folder).glob("*.model") if lacking and part == "the tokenizer" else ():
        if file.read_bytes()[:1] == b"\n":  # a protobuf, where tiktoken's files are text
            return f"{file.name} needs sentencepiece and protobuf: pip install both"
    return f"{part}: {reason}"


def _broken_file(folder: Path) -> str:
    """The first file of a model's folder that cannot be what its name says, and why; else ""."""
    for file in sorted(filter(Path.is_file, folder.iterdir())):
        try:
            with file.open("rb") as opened:
                if opened.read(30).startswith(b"version https://git-lfs"):
                    return f"{file.name} is a git-lfs pointer: git lfs pull"
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            if file.name in READ_AS_JSON:
                content = json.loads(file.read_text(encoding="utf-8"))
                if not isinstance(content, dict):
                    return f"{file.name}: got {str(content):.30}, expected a JSON object"
        except Exception as error:  # whatever a reader makes of a broken file
            return f"{file.name}: {first_line(error)}"
    return ""
