"""Errors that end a program in one line."""

import contextlib
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Iterator


def visible(text: str) -> str:
    r"""Text of a stranger for a terminal: what would steer it is spelled out. Line ends stay.

    >>> print(visible("a\x1b]0;x\x07b"))
    a\x1b]0;x\x07b
    """
    steering = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(steering, lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """Any text as one visible line. Words over 200 characters and lines over 1,000 are shortened.

    >>> one_line("a\\n b"), len(one_line("x" * 5000))
    ('a b', 153)
    """
    text = visible(" ".join(text.split()))
    text = re.sub(r"\S{201,}", lambda found: f"{found[0][:100]}...{found[0][-50:]}", text)
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-250:]}"


class UserError(ValueError):
    """Bad input from outside. Its message is one line that says what, where and how to fix it."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python ran out of memory, on a GPU or a CPU."""
    by_name = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return by_name or "can't allocate memory" in str(error)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on an error from outside, and when it is stopped.

    Errors from outside are UserError, the system's (a full disk) and too little memory: exit status
    2. It is 130 after Ctrl-C, SIGTERM, or when nobody reads the output any more. Any
    other exception keeps its traceback. What an output cannot spell, it shows escaped.
    """

    def terminated(*_: object) -> typing.NoReturn:
        raise KeyboardInterrupt("by SIGTERM")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)  # as Ctrl-C, also while models load
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: >&-
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, since an error at exit is no single line
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        _silence_broken_stdout()
        reason = "nobody reads the output" if isinstance(stop, OSError) else str(stop)
        _end(f"stopped{reason and ': '}{reason}", 130)
    except UserError as error:
        _end(f"error: {error}", 2)
    except OSError as error:
        if error.errno is None:  # a library's, not the system's
            raise
        _silence_broken_stdout()
        place = error.filename or "output"
        _end(f"error: {place}: {error.strerror}: choose another name or place", 2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "Python's own"
        _end(f"error: out of memory ({reason}): lower --batch-size or --max-new-tokens", 2)


def _end(line: str, status: int) -> typing.NoReturn:
    with contextlib.suppress(OSError):  # stderr may be what is broken
        print(one_line(line), file=sys.stderr)
    raise SystemExit(status) from None


def _silence_broken_stdout() -> None:
    """Where stdout takes nothing any more, let Python's last flush go nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
