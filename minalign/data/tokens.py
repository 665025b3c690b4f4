"""Token ids of many texts: made in batches, kept on disk between runs, read when asked for."""

import hashlib
import io
import marshal
import os
import shutil
import tempfile
import time
import typing
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..models.folders import first_line
from ..running.errors import UserError
from .chat import Text, encode_batch
from .messages import Prompt

FOLDER = Path("runs/tokens")  # every text that was tokenised, by what its ids depend on

KEPT_FROM = 2**22  # bytes of text: fewer are tokenised in a second, and stay in memory

BATCH = 1000, 2**22  # texts and characters that are tokenised together

Item = typing.TypeVar("Item")

# Tokens of each text; which texts each input has, or below 0, why it has none; those reasons
Index = tuple[np.ndarray, np.ndarray, np.ndarray]


class TokenItems(Sequence[Item]):
    """Items made of token ids when they are asked for: whatever their number, ids stay on disk.

    Args:
        source: all ids as int32, one text after another: a file, or bytes in memory.
        ends: (number of texts + 1,) where in it each text begins, and the last one ends.
        places: (N, K) int32, which texts item n has.
        extras: N, what else it has.
        make: (its K lists of ids, its extra) -> the item.
    """

    def __init__(
        self,
        source: typing.BinaryIO | bytes,
        ends: np.ndarray,
        places: np.ndarray,
        extras: Sequence,
        make: Callable[[list[list[int]], typing.Any], Item],
    ) -> None:
        self.source, self.ends, self.places = source, ends, places
        self.extras, self.make = extras, make

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, n: int | slice) -> "Item | TokenItems[Item]":
        if isinstance(n, slice):
            return self.take(n, self.extras[n], self.make)
        return self.make([self._ids(place).tolist() for place in self.places[n]], self.extras[n])

    def _ids(self, place: int) -> np.ndarray:
        start, end = (4 * int(self.ends[place + i]) for i in (0, 1))
        if isinstance(self.source, bytes):
            return np.frombuffer(self.source[start:end], np.int32)
        # Not mapped: pages of a map count as this process's memory, and a cut file would kill it
        found = os.pread(self.source.fileno(), end - start, start)
        if len(found) < end - start:
            raise UserError(f"{self.source.name}: was cut during the run: remove its folder")
        return np.frombuffer(found, np.int32)

    @property
    def lengths(self) -> np.ndarray:
        """(N, K) int64: tokens of each text of each item."""
        return np.diff(self.ends)[self.places]

    def take(
        self,
        kept: np.ndarray | slice,
        extras: Sequence,
        make: Callable[[list[list[int]], typing.Any], Item],
    ) -> "TokenItems[Item]":
        """Items of the same texts, those numbered `kept`, with other extras, made otherwise."""
        return TokenItems(self.source, self.ends, self.places[kept], extras, make)

    def fingerprint(self) -> str:
        """A short hash of all items, in their order."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for place in self.places.flat:
            digest.update(self._ids(place))
        digest.update(repr(list(self.extras)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def tokenised(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Iterable[tuple[Prompt, ...]],
    texts: Callable[[], Iterator[list[Text] | str]],
    *,
    end: bool,
    settings: tuple,
    kind: str,
) -> tuple[TokenItems[list[list[int]]], dict[int, str]]:
    """Texts as token ids, from disk where they were tokenised before.

    What is large is kept in FOLDER, under a hash of everything that its ids depend on, and one line
    says so. Where that cannot be written, ids stay in memory, as those of little data do.

    Args:
        inputs: N prompts, or prompts and completions: what the texts are made of.
        texts: at each call anew, for each input its texts, or why there are none. They must follow
            from `tokenizer`, `inputs` and `settings`.
        end: whether the end token follows a plain text.
        settings: numbers and texts.
        kind: of the inputs, in words.
    Returns:
        Lists of token ids of each input; and n -> why input n was refused: its lists are empty.
    """
    digest, size, kept = hashlib.sha256(), 0, None
    for prompt, *completions in inputs:
        prompt = list(prompt) if isinstance(prompt, list) else prompt
        # Equal values give equal bytes; with json, too, at a fifth of the speed
        content = marshal.dumps((prompt, *completions), 2)
        size += len(content)
        digest.update(content)
    if size >= KEPT_FROM:
        try:
            _update(digest, tokenizer, (*settings, end))
            folder = FOLDER / digest.hexdigest()[:16]
            kept, done = _open(folder), "read from"
            if kept is None:
                _write(folder, lambda file: _encode(tokenizer, texts(), end, file, kind))
                kept, done = _open(folder), "written to"
            total = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
            print(
                f"  tokens of {kind} {done} {folder} ({FOLDER} holds {total / 1e6:,.0f} MB: remove "
                "it when you like)"
            )
        except OSError as error:
            reason = error.strerror or error
            print(f"  tokens of {kind} stay in memory: {FOLDER} cannot be written ({reason})")
    if kept is None:
        file = io.BytesIO()
        index = _encode(tokenizer, texts(), end, file, kind)
        kept = file.getvalue(), index
    source, (lengths, places, reasons) = kept
    ends = np.cumsum(
        [0, *lengths, 0], dtype=np.int64
    )  # the last text is empty: refused ones are it
    refused = {int(n): str(reasons[-1 - places[n, 0]]) for n in np.flatnonzero(places[:, 0] < 0)}
    places = np.where(places < 0, len(lengths), places)
    return TokenItems(source, ends, places, places, lambda ids, _: ids), refused


def _update(digest: typing.Any, tokenizer: PreTrainedTokenizerBase, settings: tuple) -> None:
    """Let a hash of texts depend on all else that their ids depend on."""
    digest.update(repr((settings, transformers.__version__, tokenizers.__version__)).encode())
    if "strftime_now" in str(tokenizer.chat_template):  # it writes the date
        digest.update(time.strftime("%Y-%m-%d").encode())
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # Rust's are of no class of their own
            raise OSError(first_line(error)) from error
        files = [*Path(folder).rglob("*"), *Path(__file__).parent.glob("*.py")]
        for file in sorted(files, key=lambda file: (file.name, file)):
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterator[list[Text] | str],
    end: bool,
    file: typing.BinaryIO,
    kind: str,
) -> Index:
    """Write the ids of texts into `file`, those of equal texts once."""
    lengths, rows, reasons, known, batch = [], [], {}, {}, []

    def tokenise() -> None:
        for ids in encode_batch(tokenizer, batch, end):
            lengths.append(len(ids))
            file.write(array("i", ids))
        batch.clear()

    waiting = 0  # characters
    for found in tqdm(texts, desc=f"tokens of {kind}", leave=False, disable=None):
        if isinstance(found, str):
            rows.append([-1 - reasons.setdefault(found, len(reasons))])
            continue
        rows.append([])
        for text in found:
            name = hashlib.sha256(text.text.encode("utf-8", "surrogatepass")).digest(), text[1]
            if name not in known:
                known[name] = len(known)
                batch.append(text)
                waiting += len(text.text)
            rows[-1].append(known[name])
        if len(batch) >= BATCH[0] or waiting >= BATCH[1]:
            tokenise()
            waiting = 0
    tokenise()
    width = max(map(len, rows), default=1)
    places = [row if len(row) == width else row * width for row in rows]
    places = np.array(places, np.int32).reshape(len(rows), width)
    return np.array(lengths, np.int64), places, np.array(list(reasons), str)


def _open(folder: Path) -> tuple[typing.BinaryIO, Index] | None:
    """What _write wrote; None where there is nothing, or not the whole."""
    try:
        with np.load(folder / "index.npz") as index:
            found = index["lengths"], index["places"], index["reasons"]
        source = open(folder / "ids", "rb", buffering=0)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return (source, found) if 4 * found[0].sum() == os.path.getsize(folder / "ids") else None


def _write(folder: Path, write: Callable[[typing.BinaryIO], Index]) -> None:
    """Fill `folder` under another name, and rename it: others see all of it or nothing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for part in FOLDER.glob("*.part"):
        if time.time() - part.stat().st_mtime > 24 * 3600:  # of a killed run
            shutil.rmtree(part, ignore_errors=True)
    part = Path(tempfile.mkdtemp(dir=FOLDER, prefix=f"{folder.name}.", suffix=".part"))
    try:
        with open(part / "ids", "wb") as file:
            lengths, places, reasons = write(file)
            file.flush()
            os.fsync(file.fileno())
        np.savez(part / "index.npz", lengths=lengths, places=places, reasons=reasons)
        if _open(folder) is None:  # else another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
