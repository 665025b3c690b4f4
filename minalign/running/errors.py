"""Errors that end a program in one line."""

import contextlib
import signal
import sys
import threading
import typing
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input from outside. Its message is one line that says what, where and how to fix it."""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or a CPU."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on a UserError, when memory runs out, and when it is stopped.

    The exit status is 2 on an error, and 130 after Ctrl-C or SIGTERM. Any other exception keeps its
    traceback.
    """

    def terminated(*_: object) -> typing.NoReturn:
        raise KeyboardInterrupt("by SIGTERM")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)  # as Ctrl-C, also while models load
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"stopped{f': {stop}' if stop.args else ''}", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fix = "lower --batch-size or --max-new-tokens"
        print(f"error: out of memory ({str(error).splitlines()[0]}): {fix}", file=sys.stderr)
        raise SystemExit(2) from None
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
