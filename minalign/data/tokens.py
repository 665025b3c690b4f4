"""Token ids of many texts: made in batches, kept on disk between runs, read when asked for."""

import contextlib
import copy
import functools
import hashlib
import io
import marshal
import os
import random
import shutil
import tempfile
import time
import typing
import zipfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..models.folders import first_line
from ..running.errors import UserError, require
from .chat import Text, encode_batch
from .messages import Prompt
from .templates import roles_of

FOLDER = Path("runs/tokens")  # every text that was tokenised, by what its ids depend on

KEPT_FROM = 2**22  # bytes of text: fewer are tokenised in a second, and stay in memory

BATCH = 1000, 2**22  # texts and characters that are tokenised together

Item = typing.TypeVar("Item")

# Tokens of each text; which texts each input has, or below 0, why it has none; those reasons
Index = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(eq=False)
class TokenItems(Sequence[Item]):
    """Items made of token ids when they are asked for: whatever their number, ids stay on disk.

    Args:
        source: all ids as int32, one text after another: a file, or bytes in memory.
        ends: (number of texts + 1,) where in it each text begins, and the last one ends. The last
            text, of no ids, stands for none.
        places: (N, K) which texts item n has.
        extras: N, what else it has.
        make: (its K lists of ids, its extra) -> the item.
    """

    source: typing.BinaryIO | bytes
    ends: np.ndarray
    places: np.ndarray
    extras: Sequence
    make: Callable[[list[list[int]], typing.Any], Item]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, n: int | slice) -> "Item | TokenItems[Item]":
        if isinstance(n, slice):
            return replace(self, places=self.places[n], extras=self.extras[n])
        there = (place for place in self.places[n] if place < len(self.ends) - 2)
        return self.make([self._ids(place).tolist() for place in there], self.extras[n])

    def _ids(self, place: int) -> np.ndarray:
        start, end = (4 * int(self.ends[place + i]) for i in (0, 1))
        if isinstance(self.source, bytes):
            return np.frombuffer(self.source[start:end], np.int32)
        # Not mapped: pages of a map count as this process's memory, and a cut file would kill it
        found = os.pread(self.source.fileno(), end - start, start)
        require(len(found) == end - start, f"{self.source.name}: cut during the run: remove it")
        return np.frombuffer(found, np.int32)

    @property
    def lengths(self) -> np.ndarray:
        """(N, K) int64: tokens of each text of each item; 0 where it has none."""
        return np.diff(self.ends)[self.places]

    def fingerprint(self) -> str:
        """A short hash of all items, in their order; "ids-" says that it is one of ids."""
        digest = hashlib.sha256(self.lengths.tobytes())
        for place in self.places.flat:
            digest.update(self._ids(place))
        digest.update(repr(list(self.extras)).encode("utf-8", "surrogatepass"))
        return f"ids-{digest.hexdigest()[:16]}"


def tokenised(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[tuple[Prompt, ...]],
    texts_of: Callable[..., Iterable[Text]],
    *,
    end: bool,
    kind: str,
    rng: random.Random | None = None,
    settings: tuple = (),
) -> tuple[TokenItems[list[list[int]]], dict[int, str]]:
    """Texts as token ids, from disk where they were tokenised before.

    What is large is kept in FOLDER, under a hash of everything that its ids depend on, and one line
    says so. Where that cannot be written, ids stay in memory, as those of little data do.

    Args:
        inputs: N prompts, or prompts and completions.
        texts_of: (rng, *input) -> its texts, or a UserError. Nothing else may change them
            than `tokenizer`, `rng` and `settings`.
        end: whether the end token follows a plain text.
        kind: of the inputs, in words.
        rng: what texts_of draws from, if it does.
        settings: numbers and texts.
    Returns:
        Lists of token ids of each input; and n -> why input n was refused: it has none.
    """
    digest, size, kept = hashlib.sha256(), 0, None
    kinds = {roles_of(given[0]): given for given in reversed(inputs) if isinstance(given[0], list)}
    for given in reversed(kinds.values()):  # what is said of a template is said in any case
        with contextlib.suppress(UserError):
            list(encode_batch(tokenizer, texts_of(copy.copy(rng), *given), end))
    for prompt, *completions in inputs:
        prompt = list(prompt) if isinstance(prompt, list) else prompt
        # Equal values give equal bytes; with json, too, at a fifth of the speed
        content = marshal.dumps((prompt, *completions), 2)
        size += len(content)
        digest.update(content)

    def encode(file: typing.BinaryIO) -> Index:
        return _encode(
            tokenizer, inputs, functools.partial(texts_of, copy.copy(rng)), end, file, kind
        )

    if size >= KEPT_FROM:
        try:
            _update(digest, tokenizer, (*settings, end, rng and rng.getstate()))
            folder = FOLDER / digest.hexdigest()[:16]
            done = "read from" if (kept := _open(folder)) else "written to"
            kept = kept or _write(folder, encode)
            whole = [file for file in FOLDER.glob("*/ids") if file.parent.suffix != ".part"]
            total = sum(map(os.path.getsize, whole))
            room = f"{FOLDER} holds {total / 1e6:,.0f} MB: remove it when you like"
            print(f"  tokens of {kind} {done} {folder} ({room})")
        except OSError as error:
            reason = error.strerror or error
            print(f"  tokens of {kind} stay in memory: {FOLDER} cannot be written ({reason})")
    if kept is None:
        file = io.BytesIO()
        index = encode(file)
        kept = file.getvalue(), index
    source, (lengths, places, reasons) = kept
    # One more text, an empty one, is that of what was refused, or has fewer texts than others
    ends = np.cumsum([0, *lengths, 0], dtype=np.int64)
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
        files = [*Path(folder).rglob("*.*"), *Path(__file__).parent.glob("*.py")]
        for file in sorted(files, key=lambda file: (file.name, file)):
            digest.update(file.name.encode() + file.read_bytes())


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Iterable[tuple[Prompt, ...]],
    texts_of: Callable[..., Iterable[Text]],
    end: bool,
    file: typing.BinaryIO,
    kind: str,
) -> Index:
    """Write the ids of texts into `file`, those of equal texts once."""
    lengths, rows, reasons, known, batch, waiting = [], [], {}, {}, [], 0

    def tokenise() -> None:
        for ids in encode_batch(tokenizer, batch, end):
            lengths.append(len(ids))
            file.write(array("i", ids))
        batch.clear()

    for given in tqdm(inputs, desc=f"tokens of {kind}", leave=False, disable=None):
        rows.append([])
        try:
            texts = list(texts_of(*given))
        except UserError as error:
            rows[-1].append(-1 - reasons.setdefault(str(error), len(reasons)))
            continue
        for text in texts:
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
    places = [row + [-1] * (width - len(row)) for row in rows]
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


def _write(
    folder: Path, write: Callable[[typing.BinaryIO], Index]
) -> tuple[typing.BinaryIO, Index] | None:
    """Fill `folder` under another name, rename it (others see all or nothing), and open it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for part in FOLDER.glob("*.part"):
        with contextlib.suppress(OSError):  # another process may be faster
            if time.time() - part.stat().st_mtime > 24 * 3600:  # of a killed run
                shutil.rmtree(part)
    part = Path(tempfile.mkdtemp(dir=FOLDER, prefix=f"{folder.name}.", suffix=".part"))
    try:
        with open(part / "ids", "wb") as file:
            lengths, places, reasons = write(file)
            file.flush()
            os.fsync(file.fileno())
        np.savez(part / "index.npz", lengths=lengths, places=places, reasons=reasons)
        try:
            part.rename(folder)
        except OSError:  # it is there: another process's, or half of one
            if _open(folder) is None:
                shutil.rmtree(folder)
                part.rename(folder)
        return _open(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
